"""Fine-tuning a small folder in one process: equal to transformers, to itself after a stop, and what is written."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from small_folder import MIXED, TEMPLATE, lines, tokenizer, transformers, write_small_folder
from torch import Tensor

from moekit.cli import program
from moekit.errors import UserError
from moekit.folder_text.encoding import Encoder
from moekit.folders import FolderConfig, TextConfig, TuneConfig, finetune_folder
from moekit.folders.batches import Dealing, TrainingBatches
from moekit.folders.data import FolderData
from moekit.folders.tuned import TunedFolder
from moekit.huggingface import adopt_folder, read_adapters
from moekit.runs.settings.monitor import MonitorConfig
from moekit.surgery import merge_adapters
from moekit.training.callbacks.config import CONFIG_KEY

MEASURED = ("tokens_per_second", "step_seconds", "peak_memory")
"""Columns of metrics.csv that no two runs have alike."""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finetuned")
    write_small_folder(place / "base")
    lines(place / "mixed.jsonl", MIXED)
    return place


def settings(room: Path, *, train: dict[str, Any] | None = None, **more: Any) -> FolderConfig:
    text = {"path": str(room / "mixed.jsonl"), "max_length": 40, "batch_size": 4, "held_out": 0.2}
    base = FolderConfig(
        model=str(room / "base"),
        data=TextConfig(**{**text, **more.pop("data", {})}),
        fine_tune=TuneConfig(**more.pop("fine_tune", {})),
    )
    usual = {"max_steps": 4, "warmup_steps": 0, "accelerator": "cpu", "validate_every": 0, "loggers": "csv",
             "log_every": 1, "learning_rate": 1e-3, "schedule": "constant"}  # fmt: skip
    return base.with_train(**{**usual, **(train or {})})


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.endswith(MEASURED)} for row in csv.DictReader(file)]


def test_equals_training_by_transformers(room: Path, tmp_path: Path) -> None:
    """Whole weights, rows of their own, AdamW: three steps of a plain loop over the same rows.

    Without routers' losses, which adoption has in a form of its own.
    """
    write_small_folder(tmp_path / "base", router_aux_loss_coef=0.0)
    config = settings(
        room, data={"pack": False}, train={"max_steps": 3, "clip": 0.0, "weight_decay": 0.1, "learning_rate": 3e-3}
    )
    config = dataclasses.replace(config, model=str(tmp_path / "base"))
    found = finetune_folder(config, tmp_path / "out")

    own = tokenizer()
    data = FolderData(config, Encoder(own, max_length=40, vocab_size=len(own)))
    batches = TrainingBatches(data.train.rows, Dealing(4), pad=data.pad, seed=config.data.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=config.train.betas)
    for step in range(3):
        batch = batches[step]
        assert not batch.packed
        assert not batch.real.all()
        optimizer.zero_grad()
        loss = model(batch.ids, attention_mask=batch.real.long(), labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(
            float(metrics(found.path)[step]["train/loss"]), float(loss.detach()), rtol=1e-5, atol=1e-6
        )
    assert found.exported == (tmp_path / "out" / "model",)
    tuned, before = weights(found.exported[0]), weights(tmp_path / "base")
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(tuned[name], expected, rtol=1e-5, atol=1e-5, msg=name)
    assert all((tuned[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items() if tensor.ndim > 1)


def test_the_loss_shown_is_of_a_learned_token(room: Path, tmp_path: Path) -> None:
    """Of the batch that ends an accumulated step, whose learned tokens are more or fewer than the step's on average."""
    config = settings(room, data={"pack": False}, train={"max_steps": 1, "accumulate": 4})
    found = finetune_folder(config, tmp_path / "out")
    own = tokenizer()
    data = FolderData(config, Encoder(own, max_length=40, vocab_size=len(own)))
    batch = TrainingBatches(data.train.rows, Dealing(1, accumulate=4), pad=data.pad, seed=config.data.seed)[3]
    assert float(batch.predictions) != int((batch.labels[:, 1:] != -100).sum())
    model = transformers.AutoModelForCausalLM.from_pretrained(room / "base")
    expected = float(model(batch.ids, attention_mask=batch.real.long(), labels=batch.labels).loss.detach())
    torch.testing.assert_close(float(metrics(found.path)[0]["train/loss"]), expected, rtol=1e-5, atol=1e-6)


class Stop(L.Callback):
    """Ends the process's training as a kill would, after a step whose checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def test_a_killed_training_goes_on_as_if_nothing_had_been(room: Path, tmp_path: Path) -> None:
    """Weights, metrics and counts are those of one that was never stopped; other text and settings are refused."""
    config = settings(
        room,
        fine_tune={"rank": 2, "adapt": "experts,routers"},
        data={"batch_size": 2},
        train={"max_steps": 6, "checkpoint_steps": 2, "accumulate": 2, "validate_every": 3, "learning_rate": 1e-2},
    )
    whole = finetune_folder(config, tmp_path / "whole", merge=True)
    with pytest.raises(RuntimeError, match="killed"):
        finetune_folder(config, tmp_path / "cut", callbacks=lambda _: [Stop(5)], merge=True)
    cut = TunedFolder(tmp_path / "cut")
    assert cut.has_checkpoint
    assert not cut.model.exists()
    with pytest.raises(UserError, match=r"These keys differ: train\.accumulate"):
        finetune_folder(config.with_train(accumulate=1), cut.path, resume=True)
    file = room / "mixed.jsonl"
    text = file.read_text()
    try:
        file.write_text(text.replace("seven", "eight"))
        with pytest.raises(UserError, match="must have the text of its checkpoint"):
            finetune_folder(config, cut.path, resume=True)
    finally:
        file.write_text(text)
    shutil.copytree(room / "base", tmp_path / "other")
    other = dataclasses.replace(config, model=str(tmp_path / "other"))
    (tmp_path / "other" / "chat_template.jinja").write_text(TEMPLATE.replace("content }}", "content }} "))
    with pytest.raises(UserError, match="what the tokenizer makes of them has changed"):
        finetune_folder(other, cut.path, resume=True)
    write_small_folder(tmp_path / "other", num_experts=8)
    with pytest.raises(UserError, match=r"must have the model that it began with: .*other has other weights"):
        finetune_folder(other, cut.path, resume=True)
    again = finetune_folder(config, cut.path, resume=True, merge=True)
    assert metrics(cut.path) == metrics(whole.path)
    assert len(metrics(whole.path)) == 7
    assert finetune_folder(config, cut.path, resume=True, merge=True) == again  # nothing is left to train
    assert metrics(cut.path) == metrics(whole.path)
    assert (again.before, again.after) == (whole.before, whole.after)
    assert cut.results == TunedFolder(whole.path).results
    for name, tensor in weights(whole.path / "model").items():
        assert torch.equal(weights(cut.path / "model")[name], tensor), name

    # What was written is one function, whoever opens it: merged, or the adapter on the base.
    one = adopt_folder(room / "base")
    read_adapters(one, cut.adapter)
    merge_adapters(one)
    for name, tensor in weights(cut.model).items():
        torch.testing.assert_close(one.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert whole.after != whole.before
    opened = transformers.AutoTokenizer.from_pretrained(cut.model)
    assert opened.chat_template == TEMPLATE
    assert not (cut.adapter / "config.json").exists()


def test_a_training_keeps_the_date_that_its_template_writes(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on after midnight, and its adapters are merged then; one of a version that kept no date is told it."""

    class Date(datetime.date):
        day_of_the_clock = 30

        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2026, 7, cls.day_of_the_clock)

    monkeypatch.setattr("moekit.folders.settings.datetime", SimpleNamespace(date=Date))
    write_small_folder(tmp_path / "dated", "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE)
    config = settings(room, fine_tune={"rank": 2}, train={"max_steps": 2, "checkpoint_steps": 1})
    config = dataclasses.replace(config, model=str(tmp_path / "dated"))
    with pytest.raises(RuntimeError, match="killed"):
        finetune_folder(config, tmp_path / "out", callbacks=lambda _: [Stop(1)])
    tuned = TunedFolder(tmp_path / "out")
    assert tuned.settings["data"]["date"] == "2026-07-30"
    Date.day_of_the_clock = 31
    found = finetune_folder(config, tuned.path, resume=True, merge=True)
    assert [folder.name for folder in found.exported] == ["adapter", "model"]
    assert tuned.settings["data"]["date"] == "2026-07-30"
    kept = (tuned.path / "config.yaml").read_text()
    assert kept.count("date: '2026-07-30'") == 1
    (tuned.path / "config.yaml").write_text(kept.replace("'2026-07-30'", "2026-07-30"))  # as one writes it by hand
    finetune_folder(config, tuned.path, resume=True)
    with pytest.raises(
        UserError, match=r"text of its checkpoint.* the date, which is 2026-07-29 here: give --data\.date"
    ):
        finetune_folder(with_date(config, "2026-07-29"), tuned.path, resume=True)

    # Of a version before: neither settings nor checkpoint have a date.
    without = kept.replace("  date: '2026-07-30'\n", "")
    (tuned.path / "config.yaml").write_text(without)
    saved = torch.load(tuned.last, weights_only=True)
    del saved[CONFIG_KEY]["data"]["date"]
    torch.save(saved, tuned.last)
    with pytest.raises(UserError, match="which is 2026-07-31 here"):
        finetune_folder(config, tuned.path, resume=True)
    assert finetune_folder(with_date(config, "2026-07-30"), tuned.path, resume=True).after == found.after
    (tuned.path / "config.yaml").write_text(without)
    Date.day_of_the_clock = 30  # the same text
    assert finetune_folder(config, tuned.path, resume=True).after == found.after


def test_a_date_that_nothing_asks_for(room: Path, tmp_path: Path) -> None:
    """Templates that write none have none in their settings; one that is given is warned of, and must be a day."""
    config = settings(room, train={"max_steps": 1})
    assert finetune_folder(config, tmp_path / "out").warnings == ()
    assert TunedFolder(tmp_path / "out").settings["data"]["date"] is None
    found = finetune_folder(with_date(config, "2026-07-30"), tmp_path / "other")
    assert "data.date has no effect" in found.warnings[0]
    with pytest.raises(UserError, match=r"data\.date must be a day such as 2026-07-31: got 'today'"):
        finetune_folder(with_date(config, "today"), tmp_path / "third")


def with_date(config: FolderConfig, date: str) -> FolderConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


def test_what_does_not_go_together(room: Path, tmp_path: Path) -> None:
    """Each is refused before anything is written."""
    out = tmp_path / "out"
    long = lines(tmp_path / "long.jsonl", 3 * [{"prompt": "a long one", "completion": "x"}])
    cases: list[tuple[FolderConfig, dict[str, Any], str]] = [
        (settings(room, data={"path": ""}), {}, "data.path must name a file"),
        (settings(room, data={"batch_size": 3}, train={"accumulate": 2}), {}, "must be divisible by 2"),
        (settings(room, fine_tune={"tune": "adapters"}), {}, "needs a rank: got 0"),
        (settings(room, fine_tune={"rank": 2, "adapt": "expert"}), {}, "unknown target 'expert'"),
        (settings(room, fine_tune={"rank": 2, "adapt": " "}), {}, "must name some of"),
        (settings(room, fine_tune={"tune": "router"}), {}, "Did you mean 'routers'"),
        (settings(room, fine_tune={"rank": 99}), {}, "fine_tune: rank must be in 1..16"),
        (settings(room, fine_tune={"tune": "feed_forward"}), {}, "it has none that are feed_forward"),
        (settings(room, fine_tune={"rank": 2, "tune": "routers"}), {}, r"makes adapters, and .* routers\+adapters"),
        (settings(room), {"merge": True}, "--merge is of adapters"),
        (settings(room), {"resume": True, "overwrite": True}, "exclude each other"),
        (settings(room, data={"held_out": 0.01, "path": lines(tmp_path / "one.jsonl", MIXED[:1])}), {}, "at least two"),
        (settings(room, data={"max_length": 4, "path": long}), {}, "must have something to learn within"),
        (settings(room, data={"path": str(room / "none.jsonl")}), {}, "cannot read --data.path"),
    ]  # fmt: skip
    transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=300,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_heads=2,
            num_layers=2,
            num_decoder_layers=2,
            num_experts=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
        )
    ).save_pretrained(tmp_path / "switch")
    tokenizer().save_pretrained(tmp_path / "switch")
    switch = dataclasses.replace(settings(room), model=str(tmp_path / "switch"))
    shutil.copytree(room / "base", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    mute = dataclasses.replace(settings(room), model=str(tmp_path / "mute"))
    cases.append((mute, {}, r"must have a tokenizer, .*: it has none of tokenizer\.json"))
    cases.append((switch, {}, "is an encoder-decoder, SwitchTransformersForConditionalGeneration"))
    for config, options, said in cases:
        with pytest.raises(UserError, match=said):
            finetune_folder(config, out, **options)
        assert not out.exists(), said
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(UserError, match=r"of a former fine-tuning of a folder: it holds 'mine\.txt'"):
        finetune_folder(settings(room), out)
    finished = tmp_path / "finished"
    TunedFolder(finished).create(settings(room), overwrite=False)
    with pytest.raises(UserError, match="it holds a fine-tuned folder"):
        finetune_folder(settings(room), finished)
    (finished / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json must be readable JSON"):
        finetune_folder(settings(room), finished, resume=True)
    (finished / "results.json").write_text('{"before": "low"}')
    with pytest.raises(UserError, match=r"results\.json: before must be a number: got 'low'"):
        finetune_folder(settings(room), finished, resume=True)
    torch.save({"state_dict": {}, "optimizer_states": []}, finished / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="must hold the settings of its training: it has none"):
        finetune_folder(settings(room), finished, resume=True)


def test_nothing_that_is_read_is_replaced(room: Path, tmp_path: Path) -> None:
    """Model and text in what a former training wrote are refused while they are whole; text beside it is kept."""
    tuned = TunedFolder(tmp_path / "out")
    tuned.create(settings(room), overwrite=False)
    shutil.copytree(room / "base", tuned.model)
    shutil.copy(room / "mixed.jsonl", tuned.model)
    mine = shutil.copy(room / "mixed.jsonl", tuned.path)
    (tmp_path / "link").symlink_to(tuned.path)
    theirs = str(tmp_path / "link" / "model" / "mixed.jsonl")
    read = sorted(tuned.path.rglob("*"))
    for config, option in (
        (dataclasses.replace(settings(room), model=str(tuned.model)), "--model"),
        (settings(room, data={"path": theirs}), "--data.path"),
        (settings(room, data={"valid_path": theirs}), "--data.valid_path"),
    ):
        for how in ("resume", "overwrite"):
            with pytest.raises(UserError, match=f"{option} .*out/model, which is replaced: it would be lost"):
                finetune_folder(config, tuned.path, **{how: True})
            assert sorted(tuned.path.rglob("*")) == read
    tuned.require_apart(settings(room, data={"path": str(mine), "valid_path": "-"}))
    tuned.clear()
    assert Path(mine).is_file()


def test_the_command(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: what trains, warnings by name, the page, and the folders that are written."""
    out = tmp_path / "out"
    given = ["finetune", "--model", str(room / "base"), "--data.path", str(room / "mixed.jsonl"), "--out", str(out),
             "--data.max_length", "40", "--train.accelerator", "cpu", "--train.loggers", "csv"]  # fmt: skip
    assert program.main([*given, "--train.max_steps", "1", "--data.batch_size", "1", "--fine_tune.rank", "2",
                         "--fine_tune.adapt", "attention,feed_forward"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    per_layer = 4 * 2 * (16 + 16)
    assert f"{2 * per_layer:,} of " in said
    assert f"layers 0 to 1, each: attention {per_layer}" in said
    assert "adapters on feed_forward reach nothing: OlmoeForCausalLM has no matrix of that kind." in said
    assert "no adapter reaches an expert: those on attention leave all experts as they are." in said
    assert "OlmoeForCausalLM; routers add AuxLosses(" in said
    assert "; 1 example held out" in said
    assert "at most 1 step of 1 row, " in said
    assert "on 1 process in" in said
    assert f"written  {out / 'adapter'}" in said
    assert f"report   {out / 'report.html'}" in said
    page = (out / "report.html").read_text()
    assert "base \u00b7 jsonl \u00b7 2 Mixture-of-Experts layers of 4 experts" in page
    assert "Load of every expert" in page
    results = json.loads((out / "results.json").read_text())
    assert (results["steps"], results["parameters"]["trained"]) == (1, 2 * per_layer)
    assert "rank: 2" in (out / "config.yaml").read_text()
    assert "learning_rate: 0.0002" in (out / "config.yaml").read_text()
    card = (out / "adapter" / "README.md").read_text()
    after = json.loads((out / "results.json").read_text())["after"]
    assert f"{after:.4g}"[:5] in card
    assert "Fine-tuned with moekit from base: adapters of rank 2 on attention, feed_forward." in card
    assert str(tmp_path) not in card
    twin = tmp_path / "twin"
    assert program.main(["finetune", *given[1:3], "--config", str(out / "config.yaml"), "--out", str(twin)]) == 0
    assert (twin / "config.yaml").read_text() == (out / "config.yaml").read_text()
    assert (twin / "results.json").read_text() == (out / "results.json").read_text()
    for more, words in (
        ([], "it holds a fine-tuned folder"),
        (["--model", ""], "model must be the name of a file or a folder"),
        (["--train.max_step", "3"], "unknown option --train.max_step"),
        (["--train.ema", "0.9"], "unknown option --train.ema"),
        (["--data.batch_size", "0"], "data.batch_size must be 1 or more"),
    ):
        assert program.main([*given, *more]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert program.main(["finetune", "--model", "x"]) == 2
    assert "needs --out, a folder to write: got none" in capsys.readouterr().err
    assert program.main(["finetune", "--help"]) == 0
    assert "finetune --model FOLDER --help" in capsys.readouterr().out


def test_little_text_and_many_steps_are_warned_of(room: Path, tmp_path: Path) -> None:
    """Before training, which ends here by its minutes; steps that suit the text are given."""
    config = settings(room, train={"max_steps": 5000, "max_minutes": 1e-9})
    found = finetune_folder(config, tmp_path / "out")
    rows = len(FolderData(config, Encoder(own := tokenizer(), max_length=40, vocab_size=len(own))).train.rows)
    (said,) = found.warnings
    assert f"reads its text {5000 * 4 / rows:,.0f} times" in said
    assert f"5,000 steps of 4 rows over {rows} rows of text" in said
    assert f"--train.max_steps {20 * rows // 4} reads it 20 times" in said
    assert TunedFolder(found.path).results["warnings"] == [said]
    assert finetune_folder(config.with_train(max_steps=1), tmp_path / "few").warnings == ()


def test_experts_without_a_token_are_named(room: Path, tmp_path: Path) -> None:
    """A router for which all tokens are alike, so that two of four experts get them all."""
    place = tmp_path / "lazy"
    shutil.copytree(room / "base", place)
    made = transformers.AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        made.model.layers[1].post_attention_layernorm.weight.zero_()
    made.save_pretrained(place)
    config = settings(room, fine_tune={"rank": 2, "adapt": "experts"}, train={"max_steps": 1})
    config = dataclasses.replace(config, model=str(place))
    config = config.with_train(max_steps=2, monitor=MonitorConfig(every=1, window=1))
    found = finetune_folder(config, tmp_path / "out")
    warned = json.loads((found.path / "warnings.json").read_text())["warnings"]
    assert ("dead", "model.model.layers.1.mlp") in {(each["kind"], each["layer"]) for each in warned}
    counts = TunedFolder(found.path).results["expert_tokens"]
    idle = [expert for expert, count in enumerate(counts["model.layers.1.mlp"]) if not count]
    assert len(idle) == 2
    assert found.warnings == (
        f"model.layers.1.mlp: experts {idle[0]}, {idle[1]} got no token in training: what their adapters do there is "
        "not learned.",
    )
    assert sum(counts["model.layers.0.mlp"]) == sum(counts["model.layers.1.mlp"]) > 100
