"""What a terminal gets to see of hostile paths, names and samples."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from moekit.cli import program
from moekit.cli.command import execute, say
from moekit.cli.recipes import COMMANDS
from moekit.terminal import Terminal, visible

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "a[/b] [red]x\x1b[2J\x07\rover\u202eright\x9b1m:smile:"
SHOWN = r"a[/b] [red]x\x1b[2J\x07\rover\u202eright\x9b1m:smile:"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printed(*objects: object, **options: object) -> str:
    file = io.StringIO()
    Terminal(file=file, width=200).print(*objects, **options)
    return file.getvalue()


def test_what_acts_is_shown() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("a\tb\nÅ日本語 שלום \u200d") == "a\tb\nÅ日本語 שלום \u200d", "text of every script stays"
    assert visible("\x7f\x85\u2028\u2066\udc80\0") == r"\x7f\x85\u2028\u2066\udc80\x00"


def test_a_string_is_text_and_a_text_has_styles() -> None:
    assert printed(HOSTILE) == f"{SHOWN}\n"
    assert printed(Text.assemble((visible(HOSTILE), "bold"))) == f"{SHOWN}\n"
    escape = printed(Text("a\x1b]0;title\x1b\\"))
    assert escape == "a\\x1b]0;title\\x1b\\\n", "also where nobody asked for it"
    table = Table("head")
    table.add_row("x\x1b[2J")
    assert "\x1b" not in printed(table)
    coloured = io.StringIO()
    Terminal(file=coloured, force_terminal=True, color_system="standard").print(Text("red", style="red"))
    assert coloured.getvalue() == "\x1b[31mred\x1b[0m\n", "a style is no text"


def test_what_the_encoding_lacks_becomes_an_escape() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", newline="")
    say(Terminal(file=file), "ä \udc80")
    file.flush()
    assert raw.getvalue() == rb"\xe4 \udc80" + b"\n"


def test_everything_is_printed_by_it() -> None:
    """A console of rich's own would take a path for markup."""
    for path in (ROOT / "moekit").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "terminal.py" or path.parent.name != "moekit":
            assert not re.search(r"(?<![\w.])Console\(", text), path
            assert not re.search(r"""["']\[(bold|red|yellow|green|dim)\b""", text), path
        assert not re.search(r"""TextColumn\((?!"[^"]*", markup=False\))""", text), path


def test_remarks_of_a_command_are_shown_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of files and columns, which warnings and log records hold."""
    logger = logging.getLogger("moekit.nobody_handles_it")
    monkeypatch.setattr(logger, "propagate", False)

    def remark() -> None:
        logger.warning("left out: %s", HOSTILE)
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "file.py", 3))  # as showwarning does

    assert execute(remark) == 0
    err = capsys.readouterr().err
    assert err.count(SHOWN) == 2
    assert not ACTS.search(err), err
    remark()
    assert ACTS.search(capsys.readouterr().err), "outside of a command everything is as it was"


ABOUT_RUNS = [*program.SURGERY, *program.REPORTS, *program.STUDIES]
OPTIONS = {
    "aggregate": ["--out", "x"], "prune": ["--keep", "2", "--out", "x"], "upcycle": ["--experts", "4", "--out", "x"],
    "merge": ["--out", "x"], "split": ["--parts", "2", "--out", "x"], "change": ["--set", "model.k=1", "--out", "x"],
    "curve": ["--out", "x"], "export": ["--out", "x"], "import": ["--like", HOSTILE, "--out", "x"],
    "compare": [HOSTILE],
}  # fmt: skip


@pytest.mark.parametrize("name", [*ABOUT_RUNS, *COMMANDS])
def test_mistakes_of_every_command_show_what_was_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ABOUT_RUNS:
        more = [HOSTILE] if name == "aggregate" else []
        arguments = [name, HOSTILE, *more, *OPTIONS.get(name, [])]
    elif name in ("test", "generate", "serve", "score"):
        arguments = [name, "moe_lm", "--out", HOSTILE]
    else:
        arguments = [name, "moe_lm", f"--{HOSTILE}"]
    assert program.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not ACTS.search(out + err), out + err
    assert SHOWN in err
    assert not list(tmp_path.iterdir())


def test_unknown_words_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moekit.recipes.__main__ import main

    monkeypatch.setattr(sys, "argv", ["recipes", HOSTILE])
    assert main() == 2
    assert program.main([HOSTILE]) == 2
    assert program.main(["run", HOSTILE]) == 2
    assert program.main(["run", "moe_lm", "--variant", HOSTILE]) == 2
    assert program.main(["prune", "x", "--out", "y", "--keep", HOSTILE]) == 2
    err = capsys.readouterr().err
    assert not ACTS.search(err), err
