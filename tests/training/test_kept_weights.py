"""Weights that are kept: averages beside slow obvious twins, patience and the metric that is meant, across a resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moekit.errors import UserError
from moekit.heads import MaskedLMHead, TranslationHead
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.weights import AverageOfLast, MovingAverage, Patience, kept_weights
from moekit.training.checkpoint_io import AtomicCheckpointIO
from moekit.training.multitask import MultitaskModule
from moekit.training.refusals import check_callbacks
from moekit.transformer import EncoderDecoder

pytestmark = pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
STEPS = 9


class Line(L.LightningModule):
    """A line, with a table of integers that an average must not round, and a frozen weight."""

    def __init__(self, values: list[float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.tensor([0.1, 7.3]), requires_grad=False)
        self.register_buffer("table", torch.arange(1, 200))
        self.values, self.trace = values, {0: self.copy()}

    def copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().sum()

    def on_train_batch_end(self, *args: Any) -> None:
        self.trace[self.trainer.global_step] = self.copy()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen = self.copy()
        number = self.trainer.global_step // 3 - 1
        self.log("valid/loss", self.values[number] if self.values else self.layer(batch).square().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def batches() -> list[Tensor]:
    return list(torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(1)))


def train(
    module: Line, folder: Path, kept: list[L.Callback], steps: int = STEPS, path: Path | None = None
) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, val_check_interval=3, plugins=[AtomicCheckpointIO()],
        callbacks=[*kept, Resumable(folder, every_n_steps=1000)], check_val_every_n_epoch=None,
    )  # fmt: skip
    done = [] if path is None else range(int(torch.load(path, weights_only=True)["global_step"]))
    data = DataLoader(batches()[len(done) :], batch_size=None)
    trainer.fit(module, data, DataLoader(batches()[:1], batch_size=None), ckpt_path=path, weights_only=True)
    return trainer


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def moving(trace: Mapping[int, Mapping[str, Tensor]], decay: float, steps: int) -> dict[str, Tensor]:
    """By the definition: the first weights, then decay * average + (1 - decay) * weights."""
    average = {name: value.double() for name, value in trace[1].items()}
    for step in range(2, steps + 1):
        for name, value in trace[step].items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    return {name: value.to(trace[1][name].dtype) for name, value in average.items()} | {"table": trace[1]["table"]}


def test_a_moving_average_is_its_definition_validated_and_saved_and_training_is_as_without(tmp_path: Path) -> None:
    plain, module = Line(), Line()
    train(plain, tmp_path / "plain", [])
    train(module, tmp_path, [MovingAverage(0.8)])
    expected = moving(plain.trace, 0.8, STEPS)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    same(saved["state_dict"], expected)
    same(module.seen, expected)  # what the last validation measured
    assert torch.equal(saved["state_dict"]["table"], torch.arange(1, 200))
    for step in plain.trace:
        assert all(torch.equal(value, plain.trace[step][name]) for name, value in module.trace[step].items())
    assert (saved["state_dict"]["layer.weight"] - module.layer.weight).abs().max() > 1e-3


def test_a_moving_average_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, first, second = Line(), Line(), Line()
    train(whole, tmp_path / "whole", [MovingAverage(0.8)])
    train(first, tmp_path / "cut", [MovingAverage(0.8)], steps=5)
    train(second, tmp_path / "cut", [MovingAverage(0.8)], path=tmp_path / "cut" / "last.ckpt")
    one, two = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "cut"))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, two[key][name]) for name, value in one[key].items())


def test_the_last_weights_are_averaged_as_a_mean_over_files(tmp_path: Path) -> None:
    module = Line()
    train(module, tmp_path, [AverageOfLast(tmp_path, 2)])
    steps = [6, 9]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step}.ckpt" for step in steps]
    average = torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"]
    for name in ("layer.weight", "layer.bias"):
        mean = sum(module.trace[step][name].double() for step in steps) / 2
        torch.testing.assert_close(average[name], mean.float())  # type: ignore[union-attr]
    assert torch.equal(average["table"], torch.arange(1, 200))
    same(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], module.trace[STEPS])


def test_averaging_takes_steps_before_an_interruption_and_none_that_were_lost(tmp_path: Path) -> None:
    whole, first, second = Line(), Line(), Line()
    train(whole, tmp_path / "whole", [AverageOfLast(tmp_path / "whole", 2)])
    cut = tmp_path / "cut"
    train(first, cut, [AverageOfLast(cut, 2)], steps=6)
    (cut / "step-7.ckpt").write_bytes(b"of a step that is taken again")
    train(second, cut, [AverageOfLast(cut, 2)], path=cut / "last.ckpt")
    one, two = (
        torch.load(place / "average.ckpt", weights_only=True)["state_dict"] for place in (tmp_path / "whole", cut)
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())


VALUES = [3.0, 2.0, 2.5, 2.5, 1.0, 0.5]


def test_patience_ends_training_and_its_count_survives_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kept(folder: Path, patience: int) -> list[L.Callback]:
        return [Patience("valid/loss", "min", patience), BestCheckpoint(folder, monitor="valid/loss")]

    trainer = train(Line(VALUES), tmp_path / "whole", kept(tmp_path / "whole", 2), steps=18)
    assert trainer.global_step == 12
    assert "Stopped after step 12: valid/loss was not better than 2 in 2 validations" in capsys.readouterr().err
    assert torch.load(tmp_path / "whole" / "best.ckpt", weights_only=True)["global_step"] == 6
    cut = tmp_path / "cut"
    train(Line(VALUES), cut, kept(cut, 2), steps=9)
    last = cut / "last.ckpt"
    assert train(Line(VALUES), cut, kept(cut, 2), steps=18, path=last).global_step == 12
    # With more patience the run goes on, and finds better ones.
    assert train(Line(VALUES), cut, kept(cut, 3), steps=18, path=last).global_step == 18
    assert torch.load(cut / "best.ckpt", weights_only=True)["global_step"] == 18


def module(**options: Any) -> MultitaskModule:
    backbone = EncoderDecoder(60, 16, 2, 1, 1, 32)
    return MultitaskModule(backbone, [TranslationHead(), MaskedLMHead(16)], directions=["a-b", "b-a"], **options)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("", ("valid/translation/loss", "min")),
        ("val/loss", ("valid/translation/loss", "min")),
        ("valid/masked_lm/accuracy", ("valid/masked_lm/accuracy", "max")),
        ("val/perplexity", ("valid/translation/perplexity", "min")),
        ("val/bleu", ("valid/bleu/average", "max")),
        ("valid/chrf/b-a", ("valid/chrf/b-a", "max")),
    ],
)
def test_metrics_by_name(name: str, found: tuple[str, str]) -> None:
    assert module(score_valid=3).monitor(name) == found


def test_what_cannot_be_monitored_or_averaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got 'val/bleu'.*need evaluate\.score_valid"):
        module().monitor("val/bleu")
    with pytest.raises(UserError, match=r"got 'valid/blue'\. Did you mean 'valid/bleu'"):
        module(score_valid=3).monitor("valid/blue")
    with pytest.raises(UserError, match=r"got evaluate\.score_valid_every 2"):
        module(score_valid=3, score_valid_every=2).monitor("valid/bleu")
    settings: dict[str, Any] = {"validates": True, "best": "", "patience": 0, "ema": 0.0, "average_last": 0}
    for given, message in (
        ({"validates": False, "patience": 3}, r"train\.patience needs validations .*train\.validate_every"),
        ({"ema": 0.9, "average_last": 3}, "two averages"),
    ):
        with pytest.raises(UserError, match=message):
            kept_weights(module(), tmp_path, **(settings | given))
    assert [type(c) for c in kept_weights(module(), tmp_path, **settings)] == [BestCheckpoint]
    for average in (MovingAverage(0.9), AverageOfLast(tmp_path, 2)):
        with pytest.raises(UserError, match=f"cannot train with {type(average).__name__}"):
            check_callbacks([average])
