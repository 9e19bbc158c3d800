"""Commands that documentation and runs show work as they are shown.

Those of pages are parsed, and their settings checked; a tiny run is made for real, and what it prints is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_pages import PAGES, ROOT, blocks, name

from moekit import shell
from moekit.cli import program, recipes
from moekit.cli.program import main
from moekit.runs import Run
from moekit.runs.known import recipe_names
from moekit.runs.plain import as_plain
from moekit.runs.recipe import find_recipe

SIZES = shlex.split(
    "--model.dim 16 --model.heads 2 --model.hidden_dim 32 --model.num_experts 4 --model.encoder_layers 2 "
    "--model.decoder_layers 2 --data.vocab_size 400 --data.babel_sentences 300 --data.max_length 40"
)
TINY = shlex.split(
    "--data.num_workers 0 --train.max_steps 3 --train.warmup_steps 1 --train.validate_every 0 --train.accelerator cpu "
    "--evaluate.beam_size 1 --evaluate.max_sentences 4 --evaluate.valid_sentences 4"
)


def commands(text: str) -> list[list[str]]:
    """The words of the commands of moekit in the shell blocks of a page."""
    shown = "\n".join(block.code for block in blocks(text) if block.language in ("bash", "console", "sh", ""))
    lines = shown.replace("\\\n", " ").splitlines()
    lines += re.findall(r"^\|.*\| `([^`|]*\bmoekit [^`|]*)` \|", text, flags=re.MULTILINE)
    found = []
    for words in (shlex.split(line, comments=True) for line in lines if "moekit" in line):
        names = [Path(word).name for word in words]
        if "moekit" in names:
            found.append(["moekit", *words[names.index("moekit") + 1 :]])
    return [line[: next((i for i, word in enumerate(line) if word in ("|", "<", ">")), None)] for line in found]


SHOWN = {page: found for page in PAGES if (found := commands(page.read_text(encoding="utf-8")))}


def test_commands_are_found() -> None:
    """The number of pages that show some, so that a pattern that finds none cannot pass; all show one form."""
    assert {"README.md", "docs/index.md", "docs/guides/use-a-run.md"} <= {name(page) for page in SHOWN}
    assert sum(map(len, SHOWN.values())) > 120
    for page in SHOWN:
        shell_code = [b.code for b in blocks(page.read_text(encoding="utf-8")) if b.language == "bash"]
        assert not re.search(r"^[^#]*(python -m moekit|bin/moekit)", "".join(shell_code), flags=re.MULTILINE), name(
            page
        )
    page = "```bash\nx | .venv/bin/moekit run a \\\n  --b c > d # e\n```\n"
    assert commands(page) == [["moekit", "run", "a", "--b", "c"]]


FIRST = ("README.md", "docs/index.md", "docs/guides/quickstart.md", "docs/guides/use-a-run.md")
"""Pages whose commands the fast suite tries."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if name(page) in FIRST else pytest.mark.slow, id=name(page)) for page in SHOWN]
)
def test_commands_of_a_page_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its options, in folders that hold what the page has made before."""
    done: list[str] = []
    for known in (recipes.COMMANDS, program.SURGERY, program.REPORTS, program.STUDIES, program.FOLDERS):
        for command, made in known.items():
            changes: dict[str, Any] = {"run": lambda *given, command=command: done.append(command)}
            monkeypatch.setitem(known, command, dataclasses.replace(made, **changes))  # type: ignore[arg-type]
    monkeypatch.setattr(Run, "load", Run.open)  # no checkpoint is read
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my.yaml").write_text("{train: {max_steps: 7}}")
    makes = dict(made for words in SHOWN[page] for made in recipes_of(words))
    for words in SHOWN[page]:
        for folder in re.findall(r"runs/[\w.-]+", " ".join(words)):
            stored(Path(folder), makes.get(folder) or recipe_of(folder, words))
        before = len(done)
        if {"--help", "--print_config"} & set(words):
            with pytest.raises(SystemExit) as end:
                main(words[1:])
            code = end.value.code
        else:
            code = main(words[1:])
            expected = len(recipe_names()) if words[1:3] == ["run", "all"] else 1
            assert words[1:] in ([], ["--help"]) or len(done) == before + expected, words
        assert code == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"


def recipes_of(words: list[str]) -> Iterator[tuple[str, str]]:
    """The runs of a command on a recipe, and that recipe."""
    if words[1:2] and words[1] in ("run", "fit", "finetune", "distill"):
        yield from ((folder, words[2]) for folder in re.findall(r"runs/[\w.-]+", " ".join(words)))


def recipe_of(folder: str, words: list[str]) -> str:
    """The recipe of a run that the page did not make: its folder is named after it, or it is of the usual one."""
    if "score" in words:
        return "moe_lm"
    named = [recipe for recipe in recipe_names() if f"{Path(folder).name}-".startswith(f"{recipe}-")]
    return max(named, key=len, default="zcode_m3")


def stored(folder: Path, recipe: str) -> None:
    """A run as far as its settings go."""
    if not folder.exists():
        folder.mkdir(parents=True)
        found = find_recipe(recipe, "")
        variant = next(iter(found.variants))
        plain = {"recipe": recipe, "variant": variant, **as_plain(found.variants[variant].config)}
        (folder / "config.yaml").write_text(yaml.safe_dump(plain))


def test_commands_of_the_first_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its table, in its order, in small; but those that wait, need text, or start further processes."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "switch", *SIZES, *TINY]) == 0
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    more = {
        "run": [*SIZES, *TINY],
        "finetune": [*TINY, "--data.max_length", "200"],
        "distill": [*SIZES, "--model.num_experts", "0", *TINY],
    }
    done = []
    for words in (found[0] for row in rows if (found := commands(row))):
        if words[1] not in ("generate", "serve") and not {"FOLDER", "--devices"} & set(words):
            assert main([*words[1:], *more.get(words[1], [])]) == 0, words
            done.append(words[1])
    assert done == ["run", "report", "ablate", "finetune", "distill", "prune", "export", "run"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which a run was made by a shell, and what was printed."""
    work = tmp_path_factory.mktemp("a first hour")
    with contextlib.chdir(work):  # from where the program's path is given
        line = shell.command_line("run", "zcode_m3", "--data.cache", str(work / "cache"), *SIZES, *TINY)
    return work, in_shell(line, work)


def in_shell(line: str, folder: Path, text: str = "") -> str:
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, input=text, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def test_commands_that_a_run_prints_work(made: tuple[Path, str]) -> None:
    work, said = made
    with contextlib.chdir(work):
        start = re.escape(shell.program())
    shown = dict(re.findall(rf"^(\w+) +({start} .*)$", said, flags=re.MULTILINE))
    assert [*shown] == ["translate", "compare"]
    assert "report      runs/zcode_m3-tiny/report.html" in said
    assert in_shell(shown["translate"], work, "ta ko\nta\n").count("\n") == 2
    assert "comparison.html" in in_shell(shown["compare"].replace("OTHER_RUN", "runs/zcode_m3-tiny"), work)


def test_commands_of_a_report_work(made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    work, _ = made
    page = html.unescape((work / "runs/zcode_m3-tiny/report.html").read_text(encoding="utf-8"))
    monkeypatch.chdir(work)
    start = re.escape(shell.program())
    shown = re.findall(rf">({start} [^<]*)</", page)
    assert len(shown) == 2, shown
    for line in shown:
        words = shlex.split(line.removeprefix(shell.program()))
        assert words[0] in ("run", "report")
        assert main([*words, "--overwrite"] if words[0] == "run" else words) == 0
