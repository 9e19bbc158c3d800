"""Options of commands that are numbers or places: refused in one line, before anything is read or made."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.cli.program import main

OPTIONS: dict[tuple[str, ...], dict[str, list[str]]] = {
    ("curve", "x", "--out", "y"): {
        "--draws": ["-1", "nan", "1.5"], "--recover": ["-1", str(10**20)], "--recover-rate": ["-1", "inf", "nan"],
        "--seed": ["-1", str(10**20), "word"], "--keep": ["word"],
    },
    ("upcycle", "x", "--out", "y"): {
        "--experts": ["0", "-1", "nan"], "--noise": ["-1", "nan", "1e30"], "--scale": ["nan", "inf", ""],
    },
    ("split", "x", "--out", "y"): {"--parts": ["0", str(10**20)]},
    ("export", "x", "--out", "y"): {"--max-shard-gb": ["0", "inf", "nan"]},
    ("plan", "moe_lm"): {
        "--memory": ["0", "nan", "inf", "word"], "--sequences": ["0", str(10**20)], "--length": ["-1", "0", "1e30"],
    },
}  # fmt: skip
# An empty text, as of a variable of the shell that is not set, would be the folder of the shell.
OPTIONS |= {(c, "x"): {"--out": ["", "a\0b"]} for c in ("curve", "prune", "export", "report")}
OPTIONS |= {("run", "gshard"): {"--out": [""]}, ("score", "gshard"): {"--examples": [""]}}
CASES = [(c, option, value) for c, options in OPTIONS.items() for option, values in options.items() for value in values]


@pytest.mark.parametrize(("command", "option", "value"), CASES, ids=[f"{c[0]}{o}={v}" for c, o, v in CASES])
def test_senseless_values_are_refused_by_option(
    command: tuple[str, ...],
    option: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, f"{option}={value}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert option.removeprefix("--") in message
    assert repr(value)[1:-1] in message
    assert any(words in message for words in ("must be a", "a number of experts (4)", "a file or a folder"))
    assert not list(tmp_path.iterdir())
