"""A folder fine-tuned on two processes, divided while it is read: as on one."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from small_lm import CLIP, VOCABULARY, quiet, trainer_for, whole_weights
from torch import Tensor

import moekit as mk
from moekit.errors import UserError
from moekit.folder_text.encoding import Encoded
from moekit.folders.batches import Dealing, Row, TrainingBatches
from moekit.folders.expert_tokens import ExpertTokens
from moekit.folders.export import AdaptersAtEnd
from moekit.folders.module import FolderModule
from moekit.folders.settings import FolderConfig, TextConfig, TuneConfig
from moekit.huggingface import adopt_folder, consolidate_folder, consolidate_model, read_adapters
from moekit.runs.settings.train import StrategyConfig
from moekit.surgery import merge_adapters
from moekit.testing import run_distributed
from moekit.training.callbacks.random_state import RandomState

transformers = pytest.importorskip("transformers", minversion="5.0", reason="folders are those of transformers 5")

STEPS, ROWS = 3, 4
FULL, LOW = TuneConfig(), TuneConfig(rank=2, adapt="experts,routers,attention")
CASES: dict[str, tuple[TuneConfig, dict[str, Any]]] = {
    "zero 0": (FULL, {"zero_stage": 0}),
    "zero 3": (FULL, {"zero_stage": 3}),
    "adapters": (LOW, {"zero_stage": 3}),
}


def rows() -> list[Row]:
    """Two texts in each row, of which some tokens are learned: more in some rows than in others."""
    draw = torch.Generator().manual_seed(7)
    found = []
    for number in range(10):
        texts = []
        for length in (3 + number % 4, 6):
            ids = torch.randint(3, VOCABULARY, (length,), generator=draw).numpy()
            labels = ids.copy()
            labels[: 1 + number % 3] = -100
            texts.append(Encoded(ids, labels))
        found.append(texts)
    return found


class Rows(L.LightningDataModule):
    """Batches of `rows`, for as many steps."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        sharing = self.trainer.distributed_sampler_kwargs
        rank, ranks = (sharing["rank"], sharing["num_replicas"]) if sharing else (0, 1)
        batches = TrainingBatches(rows(), Dealing(ROWS // ranks, rank, ranks), pad=0, seed=1)
        return torch.utils.data.DataLoader([batches[n] for n in range(STEPS)], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def written(place: Path) -> None:
    torch.manual_seed(0)
    made = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16, num_local_experts=4, num_experts_per_tok=2,
            pad_token_id=0, bos_token_id=None, eos_token_id=None, router_aux_loss_coef=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
    made.save_pretrained(place)


def module_of(place: Path, tune: TuneConfig, *, divided: bool) -> FolderModule:
    return FolderModule(
        place,
        tune,
        optimizer=lambda module: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3),
        schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        divided=divided,
    )


def started(place: Path, tune: TuneConfig, *, divided: bool) -> FolderModule:
    """A module whose adapters begin with the same numbers, however the model is divided."""
    module = module_of(place, tune, divided=divided)
    if tune.rank:
        module.divided = False  # drawn in memory, and then divided
        torch.manual_seed(11)
        module.configure_model()
    return module


def train_all(room: str, expected: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    """What went wrong, by case."""
    wrong: dict[str, str] = {}
    place = Path(room)
    for name, (tune, layout) in CASES.items():
        try:
            module = started(place / "base", tune, divided=True)
            tokens = ExpertTokens()
            more = [AdaptersAtEnd(place / "adapter", str(place / "base"))] if tune.rank else []
            with quiet():
                trainer = trainer_for(
                    mk.ExpertParallelStrategy(**layout),
                    callbacks=[tokens, RandomState(), *more],
                    use_distributed_sampler=False,  # rows are dealt already
                )
                trainer.fit(module, datamodule=Rows())
                trainer.save_checkpoint(place / f"{name}.ckpt")
            found = whole_weights(module)
            assert found.keys() == expected[name].keys()
            for key, value in found.items():
                torch.testing.assert_close(
                    value, expected[name][key], rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
                )
            # Two choices of every token, of all ranks together.
            tokens_seen = sum(len(text) for n in range(STEPS) for row in order(n) for text in rows()[row])
            assert [sum(counts) for counts in tokens.at_end.values()] == 2 * [2 * tokens_seen]
        except BaseException:
            wrong[name] = f"{layout}\n{traceback.format_exc()}"
    assert dist.get_world_size() == 2
    return wrong


def order(step: int) -> list[int]:
    return TrainingBatches(rows(), Dealing(ROWS), pad=0, seed=1).order(step)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Weights, counts, and folders: of whole weights, with merged adapters, and of PEFT."""
    base = tmp_path / "base"
    written(base)
    expected, folders = {}, {}
    for name, (tune, _) in CASES.items():
        module = started(base, tune, divided=False)
        with quiet():
            trainer = L.Trainer(
                accelerator="cpu", devices=1, max_epochs=1, gradient_clip_val=CLIP, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(module, datamodule=Rows())
        expected[name] = {key: p.detach().clone() for key, p in module.named_parameters()}
        folders[name] = tmp_path / f"{name} whole"
        consolidate_model(module.model, base, folders[name])
    outcome = run_distributed(train_all, 2, str(tmp_path), expected, timeout=240.0)
    assert outcome == [{}, {}], "\n".join(text for found in outcome for text in found.values())
    for name, folder in folders.items():
        consolidate_folder(tmp_path / f"{name}.ckpt", base, tmp_path / name)
        one, other = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / name))
        for (key, value), after in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(after, value, rtol=1e-4, atol=2e-6, msg=f"{name}: {key}")
    with pytest.raises(UserError, match="must be a new or empty folder"):
        consolidate_model(module.model, base, folder)
    with pytest.raises(UserError, match=r"must be that of .* an adopted MixtralForCausalLM: it has no "):
        consolidate_model(module.model.model, base, tmp_path / "other")
    read_adapters(tuned := adopt_folder(base, aux=None), tmp_path / "adapter")
    merge_adapters(tuned)
    for key, value in tuned.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[key], rtol=1e-4, atol=2e-6, msg=key)


def test_rows_of_processes_must_be_even() -> None:
    config = FolderConfig(model="", data=TextConfig(path="x", batch_size=3)).with_train(devices=2, accelerator="cpu")
    with pytest.raises(UserError, match=r"data\.batch_size must be divisible by 2, the processes that read .* got 3"):
        config.check()
    config = dataclasses.replace(config, data=TextConfig(path="-", batch_size=4))
    with pytest.raises(UserError, match=r"must name a file, which 2 processes read: got standard input"):
        config.check()
    config = dataclasses.replace(config, data=TextConfig(path="x"), strategy=StrategyConfig(empty_init=True))
    with pytest.raises(UserError, match="empty_init is of runs of recipes"):
        config.check()
