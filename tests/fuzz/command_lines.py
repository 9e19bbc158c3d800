"""Command lines as people mistype them: of each command right ones, changed by a seed and given to the program.

A command line is right and done, or refused in one line with exit code 2, and then nothing has been written. Whatever
is written lies where an option says. Training ends where its first step would begin, serving where it would answer, and
a table of an ablation where its first run would be started.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
from harness import Outcome

from moekit.ablation import session, table
from moekit.ablation.session import CLAIMS
from moekit.ablation.table import RECIPES
from moekit.cli import program
from moekit.cli.command import build_parser
from moekit.cli.recipes import COMMANDS
from moekit.cli.recipes import build_parser as build_recipe_parser
from moekit.runs.known import recipe_names
from moekit.runs.recipe import find_recipe
from moekit.serving.turns import Turns

SMALL = (
    "--model.dim=16", "--model.heads=2", "--model.hidden_dim=32", "--model.num_experts=4", "--data.vocab_size=400",
    "--data.babel_sentences=60", "--data.babel_languages=2", "--data.babel_sizes=null", "--data.max_length=64",
    "--data.directions=avl-tnd,tnd-avl", "--train.max_steps=2", "--train.warmup_steps=1", "--train.log_every=1",
    "--train.validate_every=0", "--train.accelerator=cpu", "--evaluate.max_sentences=2",
    "--evaluate.valid_sentences=2", "--evaluate.samples=1", "--evaluate.beam_size=1",
)  # fmt: skip
CACHE = "--data.cache=../cache"
NEW = ("--out", "new")

LINES: Mapping[str, Sequence[Sequence[str]]] = {
    "run": [["gshard", *SMALL, CACHE, *NEW], ["--smoke", CACHE, *NEW]],
    "fit": [["gshard", *SMALL, CACHE, *NEW], ["gshard", *SMALL, CACHE, "--out", "run", "--resume"],
            ["gshard", "--config", "run/config.yaml", CACHE, *NEW],
            ["gshard", "--smoke", CACHE, *NEW, "--data.vocab_size=320", "--data.source=moses",
             "--data.directions=en-de", "--data.path=text"]],
    "test": [["run", "--evaluate.beam_size", "2"], ["gshard", "--out", "run", "--checkpoint", "last"]],
    "generate": [["run", "--from", "avl", "--to", "tnd", "--input", "text/train.en", "--output", "new"],
                 ["gshard", "--out", "run", "--from=avl", "--to=tnd", "--max_input_tokens", "9"]],
    "serve": [["run", "--port", "0", "--max_lines", "3", "--max_seconds", "9.5"], ["run", "--host", "localhost"]],
    "score": [["run", "--from", "avl", "--input", "score.jsonl", "--output", "new"]],
    "routing": [["run", "--output", "new", "--json"], ["gshard", "--out", "run", "--figures", "new"]],
    "finetune": [["gshard", "--init_from", "run", CACHE, *NEW, "--train.max_steps", "3"]],
    "distill": [["gshard", "--teacher", "run", CACHE, *NEW, "--train.max_steps", "3"]],
    "plan": [["gshard", "--memory", "2", "--sequences", "4"], ["gshard", "--devices", "4", "--length=32"],
             ["gshard", "--config", "run/config.yaml", "--memory=2"],
             ["gshard", "--config=my.yaml", "--model.dim", "24", "--devices", "2"]],
    "inspect": [["run"], ["run/checkpoints/last.ckpt", "--json"]],
    "aggregate": [["run", "run", *NEW, "--shared", "1", "--gates", "fresh", "--seed", "3"]],
    "prune": [["run", "--keep", "50%", "--by", "random", *NEW], ["run", "--keep", "2", *NEW, "--overwrite"]],
    "upcycle": [["run", "--experts", "8", "--noise", "0.1", *NEW, "--restart"]],
    "merge": [["run", *NEW, "--restart"], ["run", "--by-load", *NEW, "--language", "avl"]],
    "split": [["run", "--parts", "2", *NEW]],
    "change": [["run", "--set", "model.capacity_factor=2.0", *NEW]],
    "curve": [["run", "--keep", "50%", "3", "--draws", "1", "--out", "new"]],
    "export": [["other", *NEW, "--max-shard-gb", "1"]],
    "import": [["exported", "--like", "other", *NEW]],
    "report": [["run"], ["run", "run", "--out", "new.html"], ["run", "--markdown"]],
    "compare": [["run", "run", "--out", "new.html"]],
    "ablate": [["table.yaml", "--runs", "new", "--jobs", "1", "--seeds", "1", "2"], ["--list", "--runs", "new"],
               ["gshard/size", "--only", "few", "--out", "new"], ["size", "--jobs=2"], ["--claims"]],
}  # fmt: skip
"""Right command lines. They are given in a folder that has a run, an export of it, and text."""

ODD_WORDS = (
    "", " ", "-", "--", "-1", "0", "1", "2", "7", "1.5", "-0.0", "1e400", "1e-400", ".nan", ".inf", "-.inf", "nan",
    "inf", "1_000", "0x10", "٣", "²", "9" * 25, "9" * 5_000, "true", "False", "null", "None", "[]", "{}", "[1,2]",
    "[[[]]]", "{a: 1}", "{1: 2}", "[0.9,1.5]", "a", "tiny", "en", "en-de", "avl", "avl-tnd", "zh-CN", "auto",
    "all", "cpu", "x=1", "=", "=x", "model.k", "model.k=", "model.dim=8", "train.max_steps=x", "nan%", "-50%",
    "200%", "0%", "1e9%", "%", "%s", "{0}", "run", "run/", "./run", "run/config.yaml", "run/checkpoints",
    "run/checkpoints/last.ckpt", "run/summary.json", "text", "text/train.en", "text.gz", "nowhere",
    "nowhere/at/all", "new/..", ".", "..", "../cache", "/dev/null", "/dev/full", "a,b", "moses:text,text",
    "moses,babel", "babel", "jsonl", "a\nb", "a\0b", "\x1b[31mred", "[/b]", "é" * 300, "\udc80", "&a [*a]",
    "!!python/object:os.system x", "!!int", "*x", "- a", "'", '"', "a: b: c", "@", "`", "https://x.org/y", "~",
    "$HOME", "2020-99-99", "1:99:99", "[" * 3_000, "--help", "--version", "-h", "--config", "--resume",
    "--overwrite", "--smoke",
)  # fmt: skip

TABLE = Path(__file__).with_name("small_ablation.yaml")
"""A table of an ablation, which lies by itself and among the recipes of a checkout."""

_LIMIT_SECONDS = 300
_MAX_BYTES = 16 << 30
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Began(BaseException):
    """Training or serving would begin."""


def _began(*_: Any, **__: Any) -> None:
    raise Began


# -- what is written ---------------------------------------------------------------------------------------------------


class Guard:
    """Sees every file and folder that this process makes, changes or removes; there is no way to end an audit hook."""

    _PATHS: Mapping[str, Sequence[tuple[int, int]]] = {
        "os.mkdir": [(0, 2)], "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.truncate": [(0, 9)],
        "os.chmod": [(0, 2)], "os.rename": [(0, 2), (1, 3)], "os.link": [(0, 2), (1, 3)], "os.symlink": [(1, 2)],
    }  # fmt: skip
    """Where an event's arguments have a path, and the folder that it is relative to."""

    def __init__(self) -> None:
        self.active, self.seen = False, set[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = given
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and not isinstance(path, int):
                self.seen.add(os.path.abspath(os.fsdecode(path)))
        for place, folder in self._PATHS.get(event, ()):
            path, beside = given[place], given[folder] if folder < len(given) else -1
            if not isinstance(path, int):
                above = os.getcwd() if beside in (-1, None) else os.readlink(f"/proc/self/fd/{beside}")
                self.seen.add(os.path.abspath(os.path.join(above, os.fsdecode(path))))

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[str]]:
        self.active, self.seen = True, set()
        try:
            yield self.seen
        finally:
            self.active = False


_guards: list[Guard] = []


def _guard() -> Guard:
    return _guards[0] if _guards else _guards.append(Guard()) or _guards[0]


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies below a folder: kinds, sizes and times."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
    return found


# -- the room ----------------------------------------------------------------------------------------------------------


def furnish(room: Path) -> None:
    """A folder of what the lines name: a run, its export, text."""
    here = room / "right"
    here.mkdir(parents=True)
    (here / "text").mkdir()
    for split, number in (("train", 60), ("valid", 3), ("test", 3)):
        for language in ("en", "de"):
            lines = "".join(f"{language} {split} line {n} of this\n" for n in range(number))
            (here / "text" / f"{split}.{language}").write_text(lines)
    (here / "text.gz").write_bytes(gzip.compress(b"one line\n"))
    (here / "my.yaml").write_text("model: {num_experts: 4}\ntrain: {max_steps: 3, warmup_steps: 1}\n")
    tables = here / "recipes" / "gshard" / "ablations"
    tables.mkdir(parents=True)
    (here / "docs").mkdir()
    for place in (here / "table.yaml", tables / "size.yaml"):
        shutil.copy(TABLE, place)
    shutil.copy(RECIPES / CLAIMS, here / "recipes" / CLAIMS)
    (here / "score.jsonl").write_text('{"context": "a", "continuations": ["b", "c d"], "answer": 1}\n')
    with contextlib.chdir(here), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert program.main(["run", "gshard", *SMALL, CACHE, "--out", "run"]) == 0
        assert program.main(["fit", "switch", *SMALL, "--model.k=1", CACHE, "--out", "other"]) == 0
        assert program.main(["export", "other", "--out", "exported"]) == 0


# -- changes -----------------------------------------------------------------------------------------------------------


def _options(command: str, recipe: str) -> list[str]:
    """All options of a command."""
    if command in COMMANDS:
        parser: Any = build_recipe_parser(
            find_recipe(recipe, ""), command, next(iter(find_recipe(recipe, "").variants))
        )
    else:
        parser = build_parser(command, {**program.SURGERY, **program.REPORTS, **program.STUDIES}[command])
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]


def changed(words: Sequence[str], options: Sequence[str], chance: random.Random) -> list[str]:
    """A command line with one to three mistakes, or with other settings."""
    words = list(words)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        place = chance.randrange(len(words)) if words else 0
        odd = chance.choice(ODD_WORDS)
        how = chance.randrange(10)
        if how <= 2 and words:  # another value
            option, equals, _ = words[place].partition("=")
            words[place] = f"{option}={odd}" if equals else odd
        elif how <= 5:  # one more setting
            option = chance.choice(options)
            words[place:place] = chance.choice([[f"{option}={odd}"], [option, odd], [option]])
        elif how == 6 and words:
            del words[place]
        elif how == 7 and words:  # a letter is wrong
            at = chance.randrange(len(words[place]) + 1)
            words[place] = words[place][:at] + chance.choice("abz.-=_,") + words[place][at + chance.randrange(2) :]
        elif how == 8 and words:
            words.insert(chance.randrange(len(words) + 1), words[place])
        else:
            words.insert(place, odd)
    return words


# -- a command line ----------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a command line ended.

    Attributes:
        how: the exit code, or that it would have begun.
        said: standard output and standard error.
        written: all files and folders that were touched.
    """

    how: int | str
    out: str
    err: str
    written: set[str]


def _alarm(*_: Any) -> None:
    raise TimeoutError(f"no end after {_LIMIT_SECONDS} seconds")


def ended(words: Sequence[str]) -> Ended:
    """Give a command line to the program, in the current folder; errors of Python pass."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, _alarm)
    environment = dict(os.environ)
    signal.alarm(_LIMIT_SECONDS)
    try:
        with (
            mock.patch.object(L.Trainer, "fit", _began),
            mock.patch.object(Turns, "run", _began),
            mock.patch.object(session, "run_all", _began),
            mock.patch.object(session, "RECIPES", Path.cwd() / "recipes"),
            mock.patch.object(table, "RECIPES", Path.cwd() / "recipes"),
            mock.patch.object(sys, "stdin", io.StringIO("a line\nanother\n")),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _guard().watching() as written,
        ):
            try:
                how: int | str = program.main(words)
            except Began:
                how = "would begin"
            except SystemExit as end:  # of help
                how = end.code if isinstance(end.code, int) else repr(end.code)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.environ.clear()
        os.environ.update(environment)
    return Ended(how, out.getvalue(), err.getvalue(), written)


def _given_places(words: Sequence[str]) -> list[str]:
    """What the words name, were they paths; and the places of commands that are given none."""
    values = [value for word in words for value in (word, word.partition("=")[2]) if value and "\0" not in value]
    values += [str(Path(value).with_suffix(".md")) for value in values if value.strip("./")]  # beside a comparison
    defaults = ["runs", "comparison.html", "comparison.md", "docs/claims.md"]
    return [os.path.realpath(value) for value in (*values, *defaults)]


def _faults(result: Ended, words: Sequence[str], cache: Path, before: dict[str, Any]) -> Iterator[str]:
    errors = [line for line in result.err.splitlines() if line.startswith(("error: ", "stopped: "))]
    if result.how not in (0, 2, "would begin"):
        yield f"exit code {result.how}: {result.err[-300:]}"
    if (result.how == 2) != (len(errors) == 1):
        yield f"exit code {result.how} and {len(errors)} errors: {result.err[-300:]}"
    whole = not any("\n" in word for word in words)  # a name with a line break is shown with it
    if errors and whole and not result.err.rstrip("\n").endswith(errors[0].rstrip("\n")):
        yield f"the error must be one line: {result.err[-300:]!r}"
    if "Traceback" in result.err + result.out:
        yield f"a traceback: {result.err[-300:]}"
    if found := _ACTS.search(result.err + result.out):
        yield f"a control character: {found.group()!r}"
    places = (*_given_places(words), str(cache), os.environ["TMPDIR"], os.environ["MPLCONFIGDIR"], "/dev/")
    for path in result.written:
        real = os.path.realpath(path)
        # A folder is made beside its place before it is moved there; folders above are made as well.
        if not any(real.startswith(place) or place.startswith(real) or _beside(real, place) for place in places):
            yield f"writes to {path}"
    if result.how == 2:
        changed = {path for path, _ in _tree(Path.cwd()).items() ^ before.items()}
        kept = [os.path.realpath(word.partition("=")[2]) for word in words if word.startswith("--data.cache=")]
        wrong = sorted(path for path in changed if not any(path.startswith(place) for place in kept))
        if wrong:  # text may be in the cache by then
            yield f"refused, and yet written: {wrong[:3]}"


def _beside(path: str, place: str) -> bool:
    """Whether a path is a draft of a place: hidden, beside it, and named after it."""
    folder, name = os.path.split(place)
    return path.startswith(os.path.join(folder, f".{name}"))


def fuzz_lines(command: str, room: Path, seeds: range) -> Outcome:
    """Change right command lines of a command once for each seed, and give them to the program."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    shutil.rmtree(room / "here", ignore_errors=True)
    for name in ("home", "temporary", "matplotlib"):
        (room / name).mkdir(parents=True, exist_ok=True)
    places = {"HOME": room / "home", "TMPDIR": room / "temporary", "MPLCONFIGDIR": room / "matplotlib"}
    with (
        mock.patch.dict(os.environ, {key: str(value) for key, value in places.items()}),
        mock.patch.object(tempfile, "tempdir", str(room / "temporary")),
    ):
        if not (room / "right").exists():
            furnish(room)
        outcome = Outcome(Counter(), [])
        options: dict[str, list[str]] = {}
        for line in LINES[command]:
            words = [command, *(["gshard"] if line[0] == "--smoke" else []), *line]
            how, faults = _tried(words, room)
            if faults or (how == "refused" and command != "split"):  # the recipe has no size of experts of their own
                outcome.faults.append(f"a right line must be done: {_shown(words)}: {how}, {faults}")
        for seed in seeds:
            (room / "seed").write_text(str(seed))
            chance = random.Random(f"{command} {seed}")
            words = list(chance.choice(LINES[command]))
            recipe = "gshard"
            if words[0] == "--smoke":  # of any recipe
                recipe = chance.choice(recipe_names())
                words.insert(0, recipe)
            if recipe not in options:
                options[recipe] = _options(command, recipe)
            words = [command, *changed(words, options[recipe], chance)]
            how, faults = _tried(words, room)
            outcome.counts[how] += 1
            outcome.faults += [f"seed {seed}: {_shown(words)}: {fault}" for fault in faults]
    return outcome


def _tried(words: Sequence[str], room: Path) -> tuple[str, list[str]]:
    """What came of a command line in a fresh folder, and the faults."""
    here = room / "here"
    shutil.copytree(room / "right", here)
    try:
        with contextlib.chdir(here):
            before = _tree(here)
            result = ended(words)
            how = {0: "done", 2: "refused"}.get(result.how, str(result.how))  # type: ignore[call-overload]
            return how, list(_faults(result, words, room / "cache", before))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", [f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"]
    finally:
        shutil.rmtree(here)


def _shown(words: Sequence[str]) -> str:
    return " ".join(
        ascii(word[:60]) if not word.isprintable() or " " in word or not word else word[:60] for word in words
    )
