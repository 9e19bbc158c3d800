"""MultitaskModule: the objective is the weighted sum, logged by task; usable from LightningCLI."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from sacrebleu.metrics.chrf import CHRF
from torch.utils.data import DataLoader

import moekit as mk
from moekit.data.batch import Batch
from moekit.heads import DenoisingHead, MaskedLMHead, TranslationHead
from moekit.training.multitask import MultitaskModule
from moekit.training.schedules import ConstantWithWarmup
from moekit.transformer import EncoderDecoder, every_other, routed_layers

VOCAB, DIM = 60, 16


def sparse(layer: int, side: str) -> mk.MoELayer:
    return mk.MoELayer(mk.routers.switch(DIM, 4, jitter=0.0), mk.experts.GroupedMLP(4, DIM, 32))


def backbone(dense: bool = False) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(VOCAB, DIM, 2, 2, 2, 32, feed_forward=None if dense else every_other(sparse))


def make_batch(task: str, seed: int = 0, direction: str | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    source = torch.where(mask, torch.randint(45, VOCAB, (2, 6), generator=generator), 0)
    labels = None if task != "masked_lm" else torch.where(mask & (torch.arange(6) == 2), source, -100)
    target = None if task == "masked_lm" else source
    ids = torch.tensor([0, 1])
    return Batch(task, source, mask, target, None if target is None else mask, labels, ids, ids, direction)


def module(**options: object) -> MultitaskModule:
    torch.manual_seed(0)
    heads = [TranslationHead(label_smoothing=0.0), DenoisingHead(label_smoothing=0.0), MaskedLMHead(DIM)]
    settings: dict[str, object] = {"aux": mk.AuxLosses(load_balance=1e-2), "languages": ["aa", "bb"]} | options
    return MultitaskModule(backbone(), heads, **settings)  # type: ignore[arg-type]


def trainer(tmp_path: Path, **options: object) -> L.Trainer:
    settings: dict[str, object] = {
        "max_steps": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "num_sanity_val_steps": 0, "default_root_dir": str(tmp_path),
    }  # fmt: skip
    return L.Trainer(**(settings | options))  # type: ignore[arg-type]


STEP = {task: make_batch(task) for task in ("translation", "denoising", "masked_lm")}
VALID = DataLoader([STEP["translation"]], batch_size=None)


def test_objective_is_the_weighted_sum(tmp_path: Path) -> None:
    """Loss and gradients equal the literal sum over tasks of weight * (loss + aux)."""
    weights = {"translation": 2.0, "masked_lm": 0.5}
    model = module(weights=weights)
    seen: list[torch.Tensor] = []

    class Record(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
            seen.extend(p.grad.clone() for p in pl_module.parameters() if p.grad is not None)

    fit = trainer(tmp_path, max_steps=1, callbacks=[Record()])
    fit.fit(model, DataLoader([STEP], batch_size=None), VALID)

    again = module(weights=weights)
    again.train()
    total = torch.zeros(())
    aux = mk.AuxLosses(load_balance=1e-2)
    for task, part in STEP.items():
        out = again.heads[task](part, again.backbone)
        total = total + {"translation": 2.0, "denoising": 1.0, "masked_lm": 0.5}[task] * (
            out.loss + aux(*out.routings.values())[0]
        )
    total.backward()
    expected = [p.grad for p in again.parameters() if p.grad is not None]
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(fit.callback_metrics["train/loss"], total.detach())


def test_everything_is_logged(tmp_path: Path) -> None:
    model = module(schedule=lambda optimizer: ConstantWithWarmup(optimizer, 2))
    fit = trainer(tmp_path)
    valid = [make_batch(task, seed=3) for task in STEP]
    fit.fit(model, DataLoader([STEP] * 4, batch_size=None), DataLoader(valid, batch_size=None))
    names = set(fit.callback_metrics)
    for task in STEP:
        assert {f"train/{task}/loss", f"train/{task}/accuracy", f"valid/{task}/perplexity"} <= names
    assert {"train/aux/load_balance", "train/routing/drop_rate", "train/routing/encoder.1/drop_rate", "lr"} <= names
    assert {"valid/routing/entropy", "valid/routing/load_cv"} <= names
    assert model.routing is not None
    assert [layer["name"] for layer in model.routing["layers"]] == ["encoder.1", "decoder.1"]
    nats = fit.callback_metrics["valid/translation/loss"]
    torch.testing.assert_close(nats.exp(), fit.callback_metrics["valid/translation/perplexity"])


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    model = MultitaskModule(backbone(dense=True), [TranslationHead()])
    assert routed_layers(model.backbone) == {}
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(model, DataLoader([{"translation": STEP["translation"]}], batch_size=None), VALID)
    assert not any("routing" in name for name in fit.callback_metrics)


class Echo:
    """Translates every sentence into its source, except the first."""

    def text(self, ids: torch.Tensor) -> list[str]:
        return [" ".join(f"w{i}" for i in row if i) for row in ids.tolist()]

    def batch(self, batch: Batch) -> list[str]:
        return ["wrong words here", *self.text(batch.source)[1:]]


def test_the_test_scores_translations_and_keeps_samples(tmp_path: Path) -> None:
    model = module(directions=["aa-bb", "bb-aa"], samples=1)
    batches = [make_batch("translation", 1, "aa-bb"), make_batch("translation", 2, "bb-aa")]
    with pytest.raises(ValueError, match=r"module\.answers\.translate"):
        trainer(tmp_path).test(model, DataLoader(batches, batch_size=None), verbose=False)
    model.answers.translate = Echo()
    values = trainer(tmp_path).test(model, DataLoader(batches, batch_size=None), verbose=False)[0]
    assert 0 < values["test/bleu/aa-bb"] < 100
    assert values["test/bleu/average"] == pytest.approx((values["test/bleu/aa-bb"] + values["test/bleu/bb-aa"]) / 2)
    assert [sample["direction"] for sample in model.answers.samples] == ["aa-bb", "bb-aa"]
    assert model.answers.samples[0]["hypothesis"] == "wrong words here"


def test_scores_are_of_the_original_text_where_it_is_known(tmp_path: Path) -> None:
    """Not of what the tokenizer made of it."""
    model = module(directions=["aa-bb"])
    batch = make_batch("translation", 1, "aa-bb")
    batch.index = torch.tensor([1, 0])
    model.answers.translate = Echo()
    written = ["wrong words here", Echo().text(batch.source)[1]]
    model.answers.originals = lambda direction, numbers: (["source"] * 2, [written[1 - i] for i in numbers])
    values = trainer(tmp_path).test(model, DataLoader([batch], batch_size=None), verbose=False)[0]
    assert values["test/chrf/aa-bb"] == pytest.approx(100)
    assert model.answers.samples[0]["source"] == "source"
    copying = CHRF().corpus_score(["source"] * 2, [written]).score
    assert model.answers.copied["chrf"] == {"average": copying, "directions": {"aa-bb": copying}}


def test_the_test_measures_tasks_that_do_not_translate(tmp_path: Path) -> None:
    """Perplexity over all tokens and by language, equal to a sum by hand; samples from whoever writes them."""
    model = module(samples=1)
    batches = [make_batch("denoising", 1, "aa"), make_batch("denoising", 2, "bb"), make_batch("masked_lm", 3, "bb")]
    model.answers.write = Parrot()
    values = trainer(tmp_path).test(model, DataLoader(batches, batch_size=None), verbose=False)[0]
    with torch.no_grad():
        out = [model.eval()(batch) for batch in batches]
    nll, n = [float(o.nll) for o in out], [int(o.num_predictions) for o in out]
    assert values["test/denoising/loss"] == pytest.approx((nll[0] + nll[1]) / (n[0] + n[1]), rel=1e-5)
    assert values["test/denoising/perplexity/bb"] == pytest.approx(math.exp(nll[1] / n[1]), rel=1e-4)
    assert model.tested["masked_lm"]["perplexity"] == pytest.approx(math.exp(nll[2] / n[2]), rel=1e-4)
    assert list(model.tested["masked_lm"]["languages"]) == ["bb"]
    right = sum(int(o.correct) for o in out[:2])
    assert model.tested["denoising"]["accuracy"] == pytest.approx(right / (n[0] + n[1]))
    assert [(s["task"], s["direction"], s["hypothesis"]) for s in model.answers.samples] == [
        ("denoising", "aa", "heard"), ("denoising", "bb", "heard"), ("masked_lm", "bb", "heard"),
    ]  # fmt: skip
    assert model.answers.scores is None
    # Beside the accuracy: always the most frequent answer, and one of the 60 pieces.
    said = torch.cat([model.heads["denoising"].score(batch, model.backbone).labels for batch in batches[:2]])
    most, _ = Counter(said.tolist()).most_common(1)[0][::-1]
    assert model.tested["denoising"]["majority"] == most / len(said)
    assert model.tested["denoising"]["chance"] == 1 / VOCAB


def test_validation_in_training_scores_the_first_sentences_that_are_written(tmp_path: Path) -> None:
    model = module(directions=["aa-bb", "bb-aa"], score_valid=2, score_valid_every=2)
    batches = [make_batch("translation", 1, "aa-bb"), make_batch("translation", 2, "bb-aa"), make_batch("denoising", 3)]
    batches[0].index, batches[1].index = torch.tensor([5, 1]), torch.tensor([0, 2])
    asked: list[tuple[str, list[int]]] = []

    def originals(direction: str, numbers: list[int]) -> tuple[list[str], list[str]]:
        asked.append((direction, numbers))
        return ["s"] * len(numbers), ["wrong words here"] * len(numbers)

    model.answers.translate, model.answers.originals = Echo(), originals
    seen: list[float | None] = []

    class Record(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(trainer.logged_metrics.get("valid/chrf/average"))

    fit = trainer(tmp_path, val_check_interval=1, max_steps=4, check_val_every_n_epoch=None, callbacks=[Record()])
    fit.fit(model, DataLoader([STEP] * 4, batch_size=None), DataLoader(batches, batch_size=None))
    assert asked == [("aa-bb", [1]), ("bb-aa", [0])] * 2  # in the second and the fourth
    assert seen[0] is None
    assert seen[1] == seen[3] == 100
    checkpoint: dict[str, object] = {}
    model.on_save_checkpoint(checkpoint)
    again = module(directions=["aa-bb", "bb-aa"], score_valid=2, score_valid_every=2)
    again.on_load_checkpoint(checkpoint)
    assert checkpoint == {"validations": 4}
    assert again._validations == 4
    trainer(tmp_path).validate(model, DataLoader(batches, batch_size=None), verbose=False)
    assert len(asked) == 4  # an evaluation that is not of training writes nothing


class Parrot:
    """Writes one thing."""

    def samples(self, batch: Batch, rows: int) -> list[tuple[str, str, str]]:
        return [("given", "right", "heard")] * min(rows, len(batch))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="different tasks"):
        MultitaskModule(backbone(), [TranslationHead(), TranslationHead()])
    with pytest.raises(ValueError, match="without a head"):
        module(weights={"electra": 1.0})


CLI = """
from moekit.data.module import MultitaskData
from moekit.training.cli import StepCLI
from moekit.training.multitask import MultitaskModule

StepCLI(MultitaskModule, MultitaskData)
"""

YAML = """
seed_everything: 3
trainer:
  max_steps: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  limit_val_batches: 1
  num_sanity_val_steps: 0
  default_root_dir: {root}
model:
  backbone:
    class_path: moekit.transformer.EncoderDecoder
    init_args: {{vocab_size: 700, dim: 16, heads: 2, encoder_layers: 2, decoder_layers: 2, hidden_dim: 32}}
  heads:
    - class_path: moekit.heads.TranslationHead
    - class_path: moekit.heads.DenoisingHead
data:
  source:
    class_path: moekit.data.sources.Babel
    init_args: {{settings: {{languages: 2, train_sentences: 300, valid_sentences: 20, test_sentences: 20}}}}
  tasks:
    translation: {{share: 2.0}}
    denoising: {{share: 1.0}}
  cache: {root}/cache
  vocab_size: 700
  max_length: 64
  tokens_per_step: 384
  progress: false
optimizer:
  class_path: torch.optim.AdamW
  init_args: {{lr: 0.001}}
lr_scheduler:
  class_path: moekit.training.schedules.InverseSquareRoot
  init_args: {{warmup: 2}}
"""


@pytest.mark.filterwarnings("ignore:.*will be overridden by.*")
def test_lightning_cli_trains_module_and_data_from_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cli.yaml"
    file.write_text(YAML.format(root=tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(file)])
    scope: dict[str, object] = {}
    exec(compile(CLI.replace("StepCLI(MultitaskModule", "cli = StepCLI(MultitaskModule"), "train.py", "exec"), scope)
    cli = scope["cli"]
    assert cli.trainer.global_step == 3  # type: ignore[attr-defined]
    assert cli.trainer.lr_scheduler_configs[0].interval == "step"  # type: ignore[attr-defined]
