"""The commands `finetune` and `distill`: runs that start from a run, end as runs, and go on after a stop."""

from __future__ import annotations

import copy
import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moekit.cli.recipes import main
from moekit.data.tokenizer import Tokenizer
from moekit.recipes import gshard, sparse_translation, switch
from moekit.runs import Run
from moekit.runs.surgery.optimizer import optimizer_slots
from moekit.shell import command_line
from moekit.surgery.adapters import is_adapter

SMALL = {
    "model.dim": 16, "model.heads": 2, "model.hidden_dim": 32, "model.num_experts": 4, "data.vocab_size": 400,
    "data.babel_sentences": 200, "data.babel_languages": 2, "data.babel_sizes": "null",
    "data.directions": "avl-tnd,tnd-avl",
    "data.max_length": 64, "train.max_steps": 3, "train.warmup_steps": 1, "train.log_every": 1,
    "train.validate_every": 0, "train.accelerator": "cpu", "tasks.translation.tokens": 128, "evaluate.beam_size": 1,
    "evaluate.max_sentences": 2, "evaluate.valid_sentences": 2, "evaluate.samples": 1,
}  # fmt: skip
GENTLE = ["--train.warmup_steps", "1", "--train.validate_every", "0", "--train.max_steps"]
HEADLINES = [
    "--data.source", "headlines", "--data.directions", "avl-avl,tnd-tnd", "--data.max_length", "200",
    "--data.sentinel", "true", "--tasks.translation.tokens", "500",
]  # fmt: skip


def options(**changes: Any) -> list[str]:
    return [word for key, value in (SMALL | changes).items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, `base`."""
    folder = tmp_path_factory.mktemp("work")
    given = options(**{"data.cache": folder / "cache"})
    assert main(gshard.RECIPE, ["fit", *given, "--out", str(folder / "base")]) == 0
    return folder


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the test and the report after training, which other tests have."""
    monkeypatch.setattr("moekit.runs.evaluate.evaluate", lambda *given: None)


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if name in before and not torch.equal(before[name], value)}


def test_adapters_for_a_summarisation_task(work: Path) -> None:
    """Other data with the run's tokenizer; only adapters train; what comes out is a run for test, generate, surgery."""
    out, cache = work / "headlines", work / "cache"
    start = ["--init_from", str(work / "base"), "--out", str(out), *HEADLINES]
    assert main(gshard.RECIPE, ["finetune", *start, *GENTLE, "2", "--fine_tune.rank", "2"]) == 0
    before, after = weights(work / "base"), weights(out)
    assert not changed(before, after)
    assert set(after) - set(before) == {name for name in after if is_adapter(name)}
    assert any(after[name].any() for name in after if name.endswith(".up"))

    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["init_from"] == str(work / "base")
    assert saved["fine_tune"]["rank"] == 2
    assert saved["train"]["learning_rate"] == pytest.approx(gshard.TINY.train.learning_rate / 4)
    assert saved["model"] == yaml.safe_load((work / "base" / "config.yaml").read_text())["model"]
    assert (out / "summary.json").is_file()
    assert (out / "report.html").is_file()
    own = Tokenizer.load(out / "tokenizer").fingerprint
    trained = [Tokenizer.load(path) for path in (cache / "tokenizers").iterdir() if path.is_dir()]
    assert own in {tokenizer.fingerprint for tokenizer in trained}
    assert len(trained) == 1, "nothing was trained on the headlines"

    merged = Run.load(out)
    assert set(merged.loaded.weights) == set(before)
    assert changed(before, merged.loaded.weights)
    assert optimizer_slots(merged) is None
    text = work / "text"
    text.write_text("mira toru.\n")
    given = ["--from", "avl", "--to", "avl", "--input", str(text), "--output", str(work / "written")]
    assert main(gshard.RECIPE, ["generate", "--out", str(out), *given]) == 0
    assert len((work / "written").read_text().splitlines()) == 1


@pytest.mark.usefixtures("untested")
def test_a_stopped_run_of_fine_tuning_goes_on(work: Path, tmp_path: Path) -> None:
    """To the same weights, and without the run it started from."""
    base = tmp_path / "base"
    shutil.copytree(work / "base", base)

    def arguments(out: Path, steps: int) -> list[str]:
        return [
            "finetune", "--init_from", str(base), "--out", str(out), "--fine_tune.tune", "all-routers",
            "--fine_tune.expert_dropout", "0.4", "--fine_tune.train_capacity", "0.5", *GENTLE, str(steps),
        ]  # fmt: skip

    assert main(gshard.RECIPE, arguments(tmp_path / "whole", 4)) == 0
    assert main(gshard.RECIPE, arguments(tmp_path / "parted", 2)) == 0
    shutil.rmtree(base)
    assert main(gshard.RECIPE, [*arguments(tmp_path / "parted", 4), "--resume"]) == 0
    whole, parted = weights(tmp_path / "whole"), weights(tmp_path / "parted")
    assert not changed(whole, parted)
    moved = changed(weights(work / "base"), whole)
    assert moved == {name for name in whole if "router" not in name}
    state = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {float(slot["step"]) for slot in state["optimizer_states"][0]["state"].values()} == {3.0 + 4.0}
    assert state["steps_before"] == 3


@pytest.mark.usefixtures("untested")
def test_fine_tuning_can_begin_with_a_fresh_optimizer(work: Path, tmp_path: Path) -> None:
    given = ["--init_from", str(work / "base" / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "out")]
    assert main(gshard.RECIPE, ["finetune", *given, *GENTLE, "2", "--fine_tune.optimizer", "fresh"]) == 0
    state = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {float(slot["step"]) for slot in state["optimizer_states"][0]["state"].values()} == {2.0}


def columns(folder: Path, name: str) -> list[str]:
    with (folder / "metrics.csv").open() as file:
        return [row[name] for row in csv.DictReader(file) if row["train/loss"]]


def test_a_dense_student(work: Path, tmp_path: Path) -> None:
    """Begins with the teacher's weights, hears it until the stage ends, and is then a run without a teacher."""
    teacher, out = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(work / "base", teacher)
    given = ["--teacher", str(teacher), "--out", str(out), "--model.num_experts", "0", "--distill.until", "2"]
    assert main(gshard.RECIPE, ["distill", *given, "--train.max_steps", "3"]) == 0
    heard = [float(value) for value in columns(out, "train/translation/teacher_loss")]
    # From the same weights the student differs in its new feed-forwards alone: at first it is close to the teacher.
    assert 0 < heard[0] < 0.25
    assert heard[1] > 0 == heard[2]
    student = weights(out)
    assert not any("experts" in name or "router" in name or "teacher" in name for name in student)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["distill"]["objective"] == "mixture"
    assert saved["variant"] == "tiny"
    assert (out / "report.html").is_file()
    shutil.rmtree(teacher)
    assert main(gshard.RECIPE, ["test", "--out", str(out)]) == 0
    assert Run.load(out).config.model.num_experts == 0


@pytest.mark.usefixtures("untested")
def test_a_teacher_that_falls_silent_by_degrees(work: Path, tmp_path: Path) -> None:
    """Of a student that stays as it is, the teacher's loss is the KL divergence times 1, 1/2, 0."""
    given = ["--teacher", str(work / "base"), "--out", str(tmp_path / "out"), "--train.learning_rate", "0"]
    given += ["--distill.objective", "added", "--distill.weight", "1.0", "--distill.inherit", "none"]
    assert main(gshard.RECIPE, ["distill", *given, "--distill.until", "2", "--distill.fall", "linear"]) == 0
    heard = [float(value) for value in columns(tmp_path / "out", "train/translation/teacher_loss")]
    assert heard[1] == pytest.approx(heard[0] / 2, rel=0.2)  # of two batches
    assert heard[2] == 0 < heard[1]


@pytest.mark.usefixtures("untested")
def test_a_shallower_student_begins_with_the_named_layers(work: Path, tmp_path: Path) -> None:
    """At a learning rate of 0 it ends with them, too."""
    given = ["--teacher", str(work / "base"), "--out", str(tmp_path / "out"), "--train.learning_rate", "0"]
    given += ["--model.encoder_layers", "1", "--model.decoder_layers", "1", "--distill.inherit", "everything"]
    assert main(gshard.RECIPE, ["distill", *given, "--distill.layers", "decoder.layers=0; encoder.layers=0"]) == 0
    teacher, student = weights(work / "base"), weights(tmp_path / "out")
    assert set(student) == {name for name in teacher if "layers.1" not in name}
    assert not changed(teacher, student)


@pytest.mark.usefixtures("untested")
def test_a_student_of_another_recipe(work: Path, tmp_path: Path) -> None:
    """Any recipe with these tasks can learn from the run; and go on after a stop."""
    small = {k: v for k, v in SMALL.items() if k.startswith("model.") or k.startswith("train.")}
    given = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    given += ["--teacher", str(work / "base"), "--distill.objective", "added", "--distill.weight", "1.0"]
    given += ["--distill.inherit", "none", "--train.label_smoothing", "0.0", "--train.schedule", "constant"]

    def arguments(out: str, steps: int) -> list[str]:
        return ["distill", *given, "--out", str(tmp_path / out), "--train.max_steps", str(steps)]

    assert main(sparse_translation.RECIPE, arguments("whole", 3)) == 0
    assert main(sparse_translation.RECIPE, arguments("parted", 2)) == 0
    assert main(sparse_translation.RECIPE, [*arguments("parted", 3), "--resume"]) == 0
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "parted"))
    config = Run.open(tmp_path / "whole").settings
    assert config["recipe"] == "sparse_translation"
    assert config["data"]["directions"] == SMALL["data.directions"].split(",")
    # loss = label loss + KL (without smoothing, and this recipe has router losses, which are small and positive).
    rows = [
        [float(x) for x in columns(tmp_path / "whole", name)]
        for name in ("train/loss", "train/translation/loss", "train/translation/teacher_loss")
    ]
    for total, label, kl in zip(*rows, strict=True):
        assert label + kl - 1e-4 <= total < label + kl + 0.5


@pytest.mark.parametrize(
    ("recipe", "command", "given", "message"),
    [
        (gshard, "finetune", [], "needs a run to start from"),
        (gshard, "distill", [], "needs a trained run to learn from"),
        (gshard, "finetune", ["--init_from", "BASE", "--fine_tune.tune", "router"], "Did you mean 'routers'?"),
        (gshard, "finetune", ["--init_from", "BASE", "--model.dim", "32"], "must be that of the run it starts from"),
        (gshard, "finetune", ["--init_from", "BASE", "--variant", "small"], "leave out --variant small"),
        (gshard, "finetune", ["--init_from", "BASE", "--fine_tune.rank", "99"], "fine_tune: rank must be in 1..16"),
        (gshard, "finetune", ["--init_from", "BASE", "--data.babel_languages", "3", "--data.directions", "kmb-avl"],
         "must know the language 'kmb'"),
        (gshard, "finetune", ["--init_from", "nowhere"], "nowhere"),
        (switch, "finetune", ["--init_from", "BASE"], command_line("finetune", "gshard")),
        (gshard, "distill", ["--teacher", "BASE", "--model.dim", "32"], "must have the teacher's sizes"),
        (gshard, "distill", ["--teacher", "BASE", "--distill.weight", "2"], "distill: Mixture.teacher"),
        (gshard, "distill", ["--teacher", "BASE", "--distill.layers", "x=y"], "must be as decoder.layers=0,1,4,5"),
        (switch, "distill", ["--teacher", "BASE", "--model.dim", "16"], "it lacks span_corruption"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing(
    recipe: Any, command: str, given: list[str], message: str, work: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [str(work / "base") if word == "BASE" else word for word in copy.copy(given)]
    out = tmp_path / "out"
    assert main(recipe.RECIPE, [command, *words, "--out", str(out)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_help_names_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (("finetune", ("--init_from", "--fine_tune.tune")), ("distill", ("--teacher", "--distill."))):
        with pytest.raises(SystemExit):
            main(gshard.RECIPE, [command, "--help"])
        text = capsys.readouterr().out
        assert all(word in text for word in words)
