"""Files of settings that are broken, hostile or merely odd: one line that says what is wrong with which."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.recipes import moe_lm
from moekit.runs.yaml_file import read_mapping

# Each level has its elder ten times: 10 ** 8 values in 300 bytes.
LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: {seed: 3}".encode("utf-16"), "a YAML file in UTF-8: .* has the byte 0xff at 0. Save it as"),
        (b"train: {seed: \xe9}", "has the byte 0xe9 at 14"),
        (b"train:\n\tseed: 3\n", r"cannot start any token.*line 2, column 1"),
        (b"train: {seed: 3, seed: 4}\n", "the key 'seed' is there twice, again in line 1"),
        (b"train: {seed: 3}\ndata: {}\ntrain: {}\n", "the key 'train' is there twice, again in line 3"),
        (b"train: &a\n  betas: *a\n", "holds itself"),
        (b"data: &a {directions: [x, [*a]]}\n", "holds itself"),
        (LAUGHS.encode(), "more than 20,000 values"),
        (b"train: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"train: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        (b"train: {seed: " + b"9" * 5000 + b"}", "integer string"),
        (b"a: 1\n---\nb: 2\n", "expected a single document"),
        (b"# " + b"x" * 2**20, "more than 1,048,576 bytes"),
        (b"- 1\n", "a file that holds a mapping: .* holds list"),
        (b"", "holds NoneType"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^--config must be .*{words}") as found:
        read_mapping(path, "--config")
    assert "\n" not in str(found.value)


def test_what_is_plain_yaml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufefftrain: &x {seed: 3}\ndata: *x\nagain: {<<: *x, é: [1, ~]}\n", encoding="utf-8")
    assert read_mapping(path, "") == {"train": {"seed": 3}, "data": {"seed": 3}, "again": {"seed": 3, "é": [1, None]}}
    for wrong in (tmp_path, tmp_path / "none.yaml", Path("")):
        with pytest.raises(UserError, match="must be a readable YAML file"):
            read_mapping(wrong, "--config")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: null\n", "model must be a mapping of settings: got None"),
        ("train:\n", "train must be a mapping of settings: got None"),
        ("data: [1]\n", "data must be a mapping of settings: got [1]"),
        ("tasks: {causal_lm: 3}\n", "tasks.causal_lm must be a mapping of settings: got 3"),
        ("model: {layers: null}\n", "model.layers must have a value: got null"),
        ("model: {load_balance: .nan}\n", "model.load_balance must be 0 or more: got nan"),
        ("train: {max_steps: 2001-01-01}\n", "train.max_steps must be a whole number"),
    ],
)
def test_groups_and_values_that_are_none(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert main(moe_lm.RECIPE, ["run", "--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_file_is_looked_at_and_groups_are_mappings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("model: null\n")
    (tmp_path / "good.yaml").write_text("train: {seed: 3}\n")
    files = [f"--config={tmp_path / 'bad.yaml'}", "--config", str(tmp_path / "good.yaml")]
    assert main(moe_lm.RECIPE, ["run", *files]) == 2
    assert "bad.yaml: model must be a mapping" in capsys.readouterr().err
    for option in ("--model", "--tasks.causal_lm", "--train"):
        assert main(moe_lm.RECIPE, ["run", option, "null"]) == 2
        assert f"{option[2:]} must be a mapping of settings: got 'null'" in capsys.readouterr().err
