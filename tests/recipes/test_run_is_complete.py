"""A run folder needs neither its corpus nor its cache: copied elsewhere it does what it did, and says the same."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from moekit.cli.recipes import main
from moekit.recipes import hash_layers, zcode_m3
from moekit.report.__main__ import main as report
from moekit.runs import Recipe, Run
from moekit.surgery.__main__ import main as surgery

WORDS = {
    "en": ["the dog", "a cat", "my horse", "this bird", "runs", "sleeps", "eats", "sees", "today", "often", "here"],
    "de": ["der hund", "die katze", "mein pferd", "dieser vogel", "rennt", "ruht", "frisst", "sieht", "heute", "oft",
           "hier"],
}  # fmt: skip
SMALL = [
    "--data.vocab_size", "320", "--data.max_length", "40", "--model.dim", "16", "--model.heads", "2",
    "--model.hidden_dim", "32", "--model.num_experts", "4",
    "--train.max_steps", "3", "--train.warmup_steps", "1", "--train.log_every", "1", "--train.validate_every", "3",
    "--train.accelerator", "cpu", "--evaluate.max_sentences", "5", "--evaluate.valid_sentences", "6",
    "--evaluate.samples", "2", "--evaluate.beam_size", "2",
]  # fmt: skip
TASKS = [word for task in ("translation", "denoising", "masked_lm", "replaced_token")
         for word in (f"--tasks.{task}.tokens", "96")]  # fmt: skip


def corpus(folder: Path, *, seed: int = 0, sentences: int = 120) -> Path:
    """Parallel text of two languages, which is also text of each."""
    numbers = random.Random(seed)
    for split, count in (("train", sentences), ("valid", 12), ("test", 9)):
        lines = [[numbers.randrange(len(WORDS["en"])) for _ in range(numbers.randint(2, 7))] for _ in range(count)]
        for language, words in WORDS.items():
            place = folder / f"{split}.{language}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("".join(" ".join(words[n] for n in line) + ".\n" for line in lines), encoding="utf-8")
    return folder


class Kind(NamedTuple):
    """A recipe on a kind of text."""

    recipe: Recipe
    options: list[str]
    generate: list[str]


KINDS = {
    "four tasks on pairs": Kind(
        zcode_m3.RECIPE,
        ["--data.source", "moses", "--model.generator_dim", "8", *TASKS],
        ["--from", "en", "--to", "de"],
    ),
    "tables of the text": Kind(
        hash_layers.RECIPE, ["--data.source", "text", "--tasks.causal_lm.tokens", "96"], ["--from", "de"]
    ),
}


class Made(NamedTuple):
    """A finished run, on text and with a cache of its own."""

    kind: Kind
    home: Path

    @property
    def run(self) -> Path:
        return self.home / "run"

    def do(self, command: str, *options: str | Path) -> int:
        return main(self.kind.recipe, [command, *map(str, options)])


def train(kind: Kind, home: Path, *, seed: int = 0) -> Made:
    corpus(home / "text", seed=seed)
    made = Made(kind, home)
    given = [*SMALL, *kind.options, "--data.path", home / "text", "--data.cache", home / "cache"]
    assert made.do("run", *given, "--out", made.run) == 0
    return made


@pytest.fixture(
    scope="module", params=["four tasks on pairs", pytest.param("tables of the text", marks=pytest.mark.slow)]
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return train(KINDS[request.param], tmp_path_factory.mktemp("made"))


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """The run with a corpus and a cache that may be changed."""
    shutil.copytree(made.home, tmp_path / "own")
    run = tmp_path / "own" / "run"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(made.home), str(tmp_path / "own")))
    for path in (run / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["moekit_config"]["data"] |= {"path": str(run.parent / "text"), "cache": str(run.parent / "cache")}
        torch.save(checkpoint, path)
    return Made(made.kind, tmp_path / "own")


def record(folder: Path, *younger: str) -> dict[str, Any]:
    """What `test` writes, but for how long it took and how much memory the process had, and for keys of the summary."""
    timed = ("evaluation_seconds", "wall_seconds", "tokens_per_second", "peak_memory", "speed", "ending", *younger)
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "samples", "routing")}
    return {**found, "summary": {k: v for k, v in found["summary"].items() if k not in timed}}


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def append(folder: Path, split: str) -> None:
    """Two more sentences in each language."""
    for language in WORDS:
        place = folder / f"{split}.{language}"
        place.write_text(place.read_text() + f"{' '.join(WORDS[language][::-1] * 3)}.\n{WORDS[language][0]}.\n")


def everything(made: Made, run: Path, other: Path, out: Path) -> dict[str, Any]:
    """What a run can do without training on its own text, and what came out."""
    out.mkdir()
    (out / "input").write_text("the dog sleeps here.\ndie katze ruht.\n")
    assert made.do("test", "--out", run) == 0
    found: dict[str, Any] = {"test": record(run)}
    given = ["--out", run, *made.kind.generate, "--input", out / "input", "--output", out / "written"]
    assert made.do("generate", *given) == 0
    found["generate"] = (out / "written").read_text()
    translates = made.kind.recipe is zcode_m3.RECIPE
    if translates:
        assert made.do("generate", *given, "--experts_in_memory", "1") == 0
        found["generate on demand"] = (out / "written").read_text()
    training = ["--data.path", other, "--data.cache", out / "cache", "--train.max_steps", "2"]
    training += ["--train.warmup_steps", "1", "--train.validate_every", "0"]
    assert made.do("finetune", "--init_from", run, *training, "--out", out / "finetuned") == 0
    found["finetune"] = (weights(out / "finetuned"), record(out / "finetuned"))
    student = ["--tasks.replaced_token.tokens", "0"] if translates else []  # which predicts no tokens
    assert made.do("distill", "--teacher", run, *training, *student, "--out", out / "student") == 0
    found["distill"] = weights(out / "student")
    assert surgery(["inspect", str(run)]) == 0
    if translates:  # a table of numbers of experts cannot lose some
        task = ["--task", "denoising"]  # which routing.json does not tell apart: the run validates
        assert surgery(["prune", str(run), "--keep", "2", *task, "--out", str(out / "pruned")]) == 0
        assert made.do("test", "--out", out / "pruned") == 0
        found["prune"] = (weights(out / "pruned"), record(out / "pruned"))
        draws = ["--keep", "2", "--draws", "1", "--out", str(out / "curve")]
        assert surgery(["curve", str(run), *draws]) == 0
        found["curve"] = (out / "curve" / "pruning.md").read_text()
    assert report([str(run)]) == 0
    # It says where the run lies, in commands to copy.
    found["report"] = re.sub(r"[^\s<>\"']*\brun\b", "RUN", (run / "report.html").read_text())
    return found


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


@pytest.mark.slow
def test_a_copy_does_what_the_run_did(own: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test, generate, finetune, distill, surgery and report, in an empty directory, without corpus and cache."""
    at_home = record(own.run)
    other = corpus(tmp_path / "other", seed=1)
    before = everything(own, own.run, other, tmp_path / "before")
    assert before["test"] == at_home, "test says what run said"

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(own.run, elsewhere / "run")
    shutil.rmtree(own.home)
    shutil.rmtree(tmp_path / "before")
    for name in ("summary.json", "samples.json", "routing.json", "report.html"):
        (elsewhere / "run" / name).unlink()
    monkeypatch.chdir(elsewhere)
    after = everything(own, elsewhere / "run", other, tmp_path / "after")
    for name in before:
        assert same(before[name], after[name]), (name, before[name], after[name])
    assert sorted(path.name for path in elsewhere.iterdir()) == ["run"], "nothing was built beside it"


def test_a_corpus_that_is_gone(
    own: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What tests says the same, and a line that it is gone; what trains on it is refused, and leaves nothing."""
    at_home = record(own.run)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(own.run, elsewhere / "run")
    shutil.rmtree(own.home)
    for name in ("summary.json", "samples.json", "routing.json"):
        (elsewhere / "run" / name).unlink()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert own.do("test", "--out", elsewhere / "run") == 0
    assert record(elsewhere / "run") == at_home
    said = " ".join(capsys.readouterr().out.split())
    assert f"tested on the sentences that the folder keeps; the corpus is not here: {own.kind.options[1]}" in said
    assert sorted(path.name for path in elsewhere.iterdir()) == ["run"], "nothing was built beside it"
    for command, name in (("finetune", "--init_from"), ("distill", "--teacher")):
        assert own.do(command, name, elsewhere / "run", "--out", tmp_path / "out") == 2
        message = " ".join(capsys.readouterr().err.split())
        assert str(own.home / "text") in message
        assert "give text to train on with --data.source and --data.path" in message
        assert not (tmp_path / "out").exists()


def test_a_corpus_that_changed_changes_nothing_that_was_recorded(
    own: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two more lines in every file: a new tokenizer would come out of it, and other scores."""
    at_home = record(own.run)
    given = ["--out", own.run, *own.kind.generate, "--input", tmp_path / "input", "--output", tmp_path / "written"]
    (tmp_path / "input").write_text("the dog sleeps here.\ndie katze ruht.\n")
    assert own.do("generate", *given) == 0
    written = (tmp_path / "written").read_text()
    for split in ("train", "valid", "test"):
        append(own.home / "text", split)
    shutil.rmtree(own.home / "cache")
    capsys.readouterr()

    assert own.do("test", "--out", own.run) == 0
    assert record(own.run) == at_home
    said = " ".join(capsys.readouterr().out.split())
    assert "tested on the sentences that the folder keeps; the corpus is not what it was when the run was" in said
    assert own.do("generate", *given) == 0
    assert (tmp_path / "written").read_text() == written

    config, before = own.run / "config.yaml", weights(own.run)
    resume = ["fit", "--config", config, "--out", own.run, "--resume", "--train.max_steps", "5"]
    assert own.do(*map(str, resume)) == 2
    message = " ".join(capsys.readouterr().err.split())
    section = "train/en-de/source" if own.kind.recipe is zcode_m3.RECIPE else "train/en"
    then = Run(own.run).held_out.corpus.sentences[section]  # type: ignore[union-attr]
    assert f"it has changed since then ({'train/' if section.count('/') == 1 else ''}" in message
    assert f": {then:,} sentences then, {then + 2:,} now" in message
    assert equal(weights(own.run), before)

    # The run's tokenizer on new text: that is fine-tuning.
    cache = ["--data.cache", str(own.home / "cache"), "--train.validate_every", "0"]
    cache += ["--train.warmup_steps", "1", "--train.max_steps", "2"]
    assert own.do("finetune", "--init_from", own.run, *cache, "--out", tmp_path / "finetuned") == 0
    own_tokenizer, found = Run(own.run).kept_tokenizer, Run(tmp_path / "finetuned").kept_tokenizer
    assert own_tokenizer is not None
    assert found is not None
    assert found.fingerprint == own_tokenizer.fingerprint
    assert record(tmp_path / "finetuned")["summary"]["data"]["sentences"] != at_home["summary"]["data"]["sentences"]


def test_a_corpus_that_moved_is_trained_on(own: Made) -> None:
    (own.home / "text").rename(own.home / "moved")
    resume = ["--config", own.run / "config.yaml", "--out", own.run, "--resume", "--train.max_steps", "4"]
    assert own.do("fit", *resume, "--data.path", own.home / "moved") == 0
    assert Run(own.run).settings["data"]["path"] == str(own.home / "moved")
    assert torch.load(own.run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert own.do("test", "--out", own.run) == 0


def test_other_words_in_as_many_sentences_are_another_corpus(own: Made, capsys: pytest.CaptureFixture[str]) -> None:
    place = own.home / "text" / "train.en"
    place.write_text(place.read_text().replace("runs", "walks"))
    assert own.do("fit", "--config", own.run / "config.yaml", "--out", own.run, "--resume") == 2
    assert "(as many sentences, other words). Put it back as it was" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def former(own: Made) -> Made:
    """The run as a former version left it, without tokenizer and text."""
    shutil.rmtree(own.run / "tokenizer")
    (own.run / "held_out.json.gz").unlink()
    return own


def test_a_folder_of_a_former_version(former: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """It opens with its corpus, and says so; its record is not overwritten with another corpus's."""
    at_home = record(former.run, "held_out")
    capsys.readouterr()
    assert former.do("test", "--out", former.run) == 0
    assert record(former.run, "held_out") == at_home
    said = " ".join(capsys.readouterr().err.split())
    assert "tokenizer and text are those of its corpus as it is now" in said

    append(former.home / "text", "test")  # of which no tokenizer is made
    assert former.do("test", "--out", former.run) == 2
    assert "it has changed since then" in " ".join(capsys.readouterr().err.split())
    given = ["--out", former.run, *former.kind.generate, "--input", former.home / "text" / "test.de"]
    assert former.do("generate", *given, "--output", former.home / "written") == 0

    append(former.home / "text", "train")
    for command in (["test", "--out", former.run], ["generate", *given]):
        assert former.do(str(command[0]), *command[1:]) == 2
        assert "must be used with the tokenizer that it was trained with" in " ".join(capsys.readouterr().err.split())
    assert record(former.run, "held_out") == at_home


def test_a_former_run_that_goes_on_is_made_complete(former: Made) -> None:
    assert former.do("fit", "--config", former.run / "config.yaml", "--out", former.run, "--resume") == 0
    shutil.rmtree(former.home / "text")
    shutil.rmtree(former.home / "cache")
    assert former.do("test", "--out", former.run) == 0


def test_a_damaged_tokenizer_is_named(own: Made, capsys: pytest.CaptureFixture[str]) -> None:
    model = own.run / "tokenizer" / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-100])
    assert own.do("test", "--out", own.run) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert str(model.parent) in message
    assert "take the folder from a copy of the run" in message


def test_the_tokenizer_of_another_run_is_refused(own: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = train(own.kind, tmp_path / "other", seed=2)
    shutil.rmtree(own.run / "tokenizer")
    shutil.copytree(other.run / "tokenizer", own.run / "tokenizer")
    assert own.do("test", "--out", own.run) == 2
    assert "must be used with the tokenizer that it was trained with" in " ".join(capsys.readouterr().err.split())


def catalog(path: Path, messages: dict[str, str]) -> None:
    """A .mo file."""
    pairs = sorted((key.encode(), value.encode()) for key, value in messages.items())
    tables: list[list[int]] = [[], []]
    text = b""
    for side in (0, 1):
        for pair in pairs:
            tables[side] += [len(pair[side]), 28 + 16 * len(pairs) + len(text)]
            text += pair[side] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 28)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + struct.pack(f"<{4 * len(pairs)}I", *tables[0], *tables[1]) + text)


def test_an_upgrade_of_the_packages_behind_gettext(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run says what it said; going on is refused, with what changed."""
    words = [f"{a}{b}" for a in "bdgklm" for b in "aeiou"]
    english = [f"{a} {b} {c}" for a, b, c in itertools.islice(itertools.product(words, repeat=3), 1300)]
    messages = {line: " ".join(word[::-1] for word in line.split()) for line in english}
    file = tmp_path / "locale" / "de" / "LC_MESSAGES" / "program.mo"
    catalog(file, messages)
    made = Made(Kind(zcode_m3.RECIPE, [], []), tmp_path)
    given = [*SMALL, "--data.source", "gettext", "--data.path", tmp_path / "locale", "--data.cache", tmp_path / "cache"]
    given += ["--model.generator_dim", "8", "--tasks.translation.tokens", "96", "--train.max_steps", "2"]
    assert made.do("run", *given, "--out", made.run) == 0
    at_home = record(made.run)

    catalog(file, {**messages, **{f"{line} xu": f"ux {line}" for line in english[:90]}})
    capsys.readouterr()
    assert made.do("test", "--out", made.run) == 0
    assert record(made.run) == at_home
    assert "the corpus is not what it was when the run was trained" in " ".join(capsys.readouterr().out.split())
    assert made.do("fit", "--config", made.run / "config.yaml", "--out", made.run, "--resume") == 2
    assert "it has changed since then (train/" in " ".join(capsys.readouterr().err.split())


def test_a_run_of_many_devices_is_tested_on_this_machine(own: Made, tmp_path: Path) -> None:
    """As if it had been trained on two nodes of eight GPUs each."""
    at_home = record(own.run)
    there = {"devices": 8, "num_nodes": 2, "accelerator": "gpu"}
    config = yaml.safe_load((own.run / "config.yaml").read_text())
    config["train"] |= there
    (own.run / "config.yaml").write_text(yaml.safe_dump(config))
    for path in (own.run / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["moekit_config"]["train"] |= there
        torch.save(checkpoint, path)
    assert own.do("test", "--out", own.run, "--train.accelerator", "cpu") == 0
    assert record(own.run) == at_home
    if own.kind.recipe is zcode_m3.RECIPE:
        prune = ["prune", str(own.run), "--keep", "2", "--task", "denoising", "--out", str(tmp_path / "pruned")]
        assert surgery(prune) == 0


def test_tables_that_are_made_of_the_text_need_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dense run gets the routers that a run of its text has; without the text it is refused."""
    made = Made(KINDS["tables of the text"], tmp_path)
    given = [*SMALL, *made.kind.options, "--data.path", corpus(tmp_path / "text"), "--data.cache", tmp_path / "cache"]
    assert made.do("fit", *given, "--model.num_experts", "0", "--out", made.run) == 0
    assert made.do("fit", *given, "--out", tmp_path / "sparse") == 0
    upcycle = ["upcycle", str(made.run), "--experts", "4", "--restart", "--out"]
    assert surgery([*upcycle, str(tmp_path / "upcycled")]) == 0
    wanted, found = weights(tmp_path / "sparse"), weights(tmp_path / "upcycled")
    [table] = [name for name in wanted if name.endswith("router.table")]
    assert torch.equal(found[table], wanted[table])
    assert len(wanted[table].unique()) == 4
    shutil.rmtree(tmp_path / "text")
    assert surgery([*upcycle, str(tmp_path / "again")]) == 2
    assert str(tmp_path / "text") in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "again").exists()
