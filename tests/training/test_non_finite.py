"""What is not finite stops training or is left out: before weights change, before a checkpoint does, on all ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekit.cli.recipes import main
from moekit.errors import NonFiniteError
from moekit.layer import AuxLosses
from moekit.recipes import switch
from moekit.testing import run_distributed
from moekit.testing.distributed import JoinedProcesses
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.non_finite import NonFinite
from moekit.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint

NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Model(L.LightningModule):
    """Two layers; at chosen micro-batches one term of the loss, or one layer's gradient, is NaN."""

    def __init__(self, bad_terms: tuple[int, ...] = (), bad_gradients: tuple[int, ...] = (), rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        self.bad_terms, self.bad_gradients, self.bad_rank = bad_terms, bad_gradients, rank
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, number: int) -> dict[str, Tensor]:
        here = self.global_rank == self.bad_rank
        main_loss = self.second(self.first(batch)).square().mean()
        if number in self.bad_gradients and here:
            self.second.weight.register_hook(lambda grad: grad * NAN) if number == self.bad_gradients[0] else None
        side = torch.tensor(NAN if number in self.bad_terms and here else 0.25)
        return {"loss": main_loss + side, "main": main_loss.detach(), "side": side}

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(model: Model, watch: NonFinite | None, folder: Path | None = None, **options: Any) -> L.Trainer:
    batches = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    keep = [] if folder is None else [Resumable(folder, every_n_steps=1, every_n_minutes=None)]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=folder is not None, plugins=[AtomicCheckpointIO(), *options.pop("plugins", [])],
        callbacks=[*([watch] if watch else []), *keep], **options,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_it_stops_at_the_first_loss_that_is_not_finite_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = Model(bad_terms=(3, 4))
    with pytest.raises(NonFiniteError) as caught:
        fit(model, NonFinite(), tmp_path)
    assert "step 4 is not finite" in str(caught.value)
    assert "terms of the loss: loss, side." in str(caught.value)  # whose gradients are finite
    assert f"The last good checkpoint is {tmp_path / 'last.ckpt'}." in str(caught.value)
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == 3
    assert same(model.state_dict(), saved["state_dict"])


def test_it_names_the_gradients(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 3 is not finite .*: gradients of: second.weight\."):
        fit(Model(bad_gradients=(2,)), NonFinite())


def test_it_names_weights_that_were_spoilt_before(tmp_path: Path) -> None:
    model = Model()
    with torch.no_grad():
        model.first.bias[1] = NAN
    with pytest.raises(NonFiniteError, match=r"step 1 .*already before the step, weights of: first.bias\."):
        fit(model, NonFinite())


def test_a_step_of_several_batches_is_one(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 2 is not finite .*terms of the loss: loss, side\."):
        fit(Model(bad_terms=(2,)), NonFinite(), accumulate_grad_batches=2)  # the first of its two


def test_what_is_finite_is_not_changed() -> None:
    with_it, without = Model(), Model()
    fit(with_it, NonFinite(), gradient_clip_val=0.1)
    fit(without, None, gradient_clip_val=0.1)
    assert same(with_it.state_dict(), without.state_dict())
    assert len(with_it.seen) == 8


def test_skip_leaves_the_weights_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch, model = NonFinite("skip", most_in_a_row=2), Model(bad_terms=(2, 4))
    trainer = fit(model, watch, tmp_path)
    steps = [not same(before, after) for before, after in zip(model.seen, model.seen[1:], strict=False)]
    assert steps == [True, False, True, False, True, True, True]
    assert watch.skipped == 2
    assert trainer.callback_metrics["train/skipped_steps"] == 2
    assert "note: step 5 is not finite and was left out; so were 2 in all." in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "last.ckpt")["callbacks"]["NonFinite"] == {"skipped": 2}


def test_skip_stops_after_several_in_a_row() -> None:
    model = Model(bad_terms=(1, 3, 4, 5))
    with pytest.raises(NonFiniteError, match="step 6, like the 2 before it, is not finite"):
        fit(model, NonFinite("skip", most_in_a_row=3))
    assert same(model.state_dict(), model.seen[2])


def test_ignore_trains_on() -> None:
    model = Model(bad_gradients=(2,))
    fit(model, NonFinite("ignore"))
    assert not bool(model.second.weight.isfinite().any())


def test_weights_that_a_step_spoilt_are_never_saved(tmp_path: Path) -> None:
    class Spoils(Model):
        def optimizer_step(self, *args: Any, **options: Any) -> None:
            super().optimizer_step(*args, **options)
            if self.global_step == 3:
                self.second.weight.data[0, 2] = float("inf")

    with pytest.raises(NonFiniteError, match=r"weights after step 4 .* are not saved: second.weight\. The last good"):
        fit(Spoils(), NonFinite(), tmp_path)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="must be one of stop, skip, ignore"):
        NonFinite("raise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        NonFinite(most_in_a_row=0)


def _on_two_ranks() -> list[str]:
    found = []
    for model in (Model(bad_terms=(2,), rank=1), Model(bad_gradients=(1,), rank=1)):
        try:
            fit(model, NonFinite(), devices=2, strategy="ddp", plugins=[JoinedProcesses()])
        except NonFiniteError as error:
            found.append(str(error))
    watch = NonFinite("skip")
    fit(Model(bad_terms=(2,), rank=1), watch, devices=2, strategy="ddp", plugins=[JoinedProcesses()])
    dist.barrier()
    return [*found, str(watch.skipped)]


def test_all_ranks_stop_together_and_say_what_one_has_found() -> None:
    one, other = run_distributed(_on_two_ranks, 2, timeout=300)
    assert one == other
    assert "step 3 is not finite (NaN or infinite): terms of the loss: loss, side." in one[0]
    assert "step 2 is not finite (NaN or infinite): gradients of: second.weight." in one[1]
    assert one[2] == "1"


@pytest.mark.parametrize("case", ["steps too large", "a router's loss"])
def test_a_recipe_stops_and_says_why(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        "--model.dim=16", "--model.heads=2", "--model.hidden_dim=32", "--model.num_experts=2", "--train.clip=0",
        "--data.babel_sentences=60", "--data.vocab_size=400", "--train.warmup_steps=1", "--train.max_steps=9",
        "--train.accelerator=cpu", "--data.cache", str(tmp_path / "cache"), "--train.checkpoint_steps=1",
    ]  # fmt: skip
    calls: list[int] = []
    if case == "steps too large":
        small.append("--train.learning_rate=2e9")
    else:
        weigh = AuxLosses.__call__

        def spoilt(self: AuxLosses, *routings: Any) -> Any:
            total, terms = weigh(self, *routings)
            calls.append(1)
            factor = NAN if len(calls) == 2 else 1.0
            return total * factor, {**terms, "load_balance": terms["load_balance"] * factor}

        monkeypatch.setattr(AuxLosses, "__call__", spoilt)
    out = tmp_path / "run"
    assert main(switch.RECIPE, ["fit", *small, "--out", str(out)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "stopped: step 2 is not finite (NaN or infinite): " in message
    assert "gradients of: backbone." in message
    assert ("terms of the loss: loss, span_corruption/aux/load_balance;" in message) == bool(calls)
    assert f"The last good checkpoint is {out / 'checkpoints' / 'last.ckpt'}." in message
    saved = load_checkpoint(out / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 1
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())
    stopped = json.loads((out / "stopped.json").read_text())
    assert stopped["step"] == 2
    assert " ".join(stopped["why"].split()) in message
    if calls:  # only the second step was spoilt: the run goes on, and is one that did not stop
        assert main(switch.RECIPE, ["fit", *small, "--out", str(out), "--resume"]) == 0
        assert not (out / "stopped.json").exists()
