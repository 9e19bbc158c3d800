"""``generate`` and ``score``: what is read from, what is written to, and a prompt at a terminal."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moekit.cli.program import main
from moekit.cli.prompt import converse
from moekit.cli.recipes import main as recipe_main
from moekit.data import lines
from moekit.data.lines import one_line, read_lines, write_lines
from moekit.data.sources import files
from moekit.errors import UserError
from moekit.inference.completer import Completer
from moekit.inference.interface import Hypothesis
from moekit.recipes import moe_lm
from moekit.runs.run import Run
from moekit.runs.writer import Writer, Written

OPTIONS = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "400",
    "--data.max_length", "16", "--tasks.causal_lm.tokens", "128", "--train.max_steps", "2",
    "--train.warmup_steps", "1", "--train.log_every", "1", "--train.validate_every", "0", "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "2", "--evaluate.valid_sentences", "4", "--evaluate.samples", "0",
    "--evaluate.beam_size", "1",
    "--model.dim", "16", "--model.heads", "2", "--model.hidden_dim", "8", "--model.num_experts", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    options = [*OPTIONS, "--data.cache", str(folder / "cache"), "--out", str(folder / "run")]
    assert recipe_main(moe_lm.RECIPE, ["fit", *options]) == 0
    return folder / "run"


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\r\nb", ["a", "b"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        ("a\u2028b\x85c\n".encode(), ["a\u2028b\x85c"]),
        ("\U0001f600\n".encode(), ["\U0001f600"]),
    ],
)
def test_lines(tmp_path: Path, standard_input: Callable[[bytes], None], data: bytes, found: list[str]) -> None:
    standard_input(data)
    assert read_lines("-") == found, "whatever the encoding of standard input"
    for name, pack in (("a", bytes), ("a.gz", gzip.compress), ("a.xz", lzma.compress), ("a.bz2", bz2.compress)):
        (tmp_path / name).write_bytes(pack(data))
        assert read_lines(str(tmp_path / name)) == found


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"ok\ncaf\xe9\n", "line 2, byte 4 of the line: text must be UTF-8: got the byte 0xe9"),
        (
            "a\n".encode("utf-16"),
            "line 1: text must be UTF-8: it begins as UTF-16 does",
        ),
        (
            "a\n".encode("utf-32"),
            "line 1: text must be UTF-8: it begins as UTF-32 does",
        ),
        (b"\xef\xbb\xbf", "line 1: a file must hold text: got a byte order mark and nothing else"),
        (b"a\nb\xed\xa0\x80\n", "line 2, byte 2 of the line: text must be UTF-8: got the byte 0xed"),
        (b"a\n\nbc\0d\n", "line 3, byte 3 of the line: text must be without NUL"),
    ],
)
def test_input_that_is_no_text(
    run: Path,
    tmp_path: Path,
    standard_input: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
    data: bytes,
    words: str,
) -> None:
    """One line names the place, and the exit code is 2, also of `score`."""
    standard_input(data)
    assert main(["generate", str(run), "--from", "avl"]) == 2
    assert f"error: standard input, {words}" in (message := capsys.readouterr().err)
    assert message.count("\n") == 1
    file = tmp_path / "file"
    file.write_bytes(data)
    for name in ("generate", "score"):
        assert main([name, str(run), "--from", "avl", "--input", str(file)]) == 2
        assert f"error: --input {file}, {words}" in (message := capsys.readouterr().err)
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"context": "a\\ud800", "continuations": ["b", "c"]}', "line 1: text must be whole characters: got half"),
        ('{"context": "a", "continuations": ["b", "\\u0000"]}', "line 1: text must be without NUL"),
        ("[" * 100_000, "line 1: the line must be JSON: it is nested"),
        ("1" * 10_000, "line 1: the line must be JSON"),
    ],
)
def test_questions_that_are_none(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    (tmp_path / "questions").write_text(line + "\n")
    assert main(["score", str(run), "--from", "avl", "--input", str(tmp_path / "questions")]) == 2
    assert words in capsys.readouterr().err


def test_archives_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(b"some text\n"), lzma.compress(b"some text\n"), bz2.compress(b"some text\n")
    for name, data in zip(("a.gz", "a.xz", "a.bz2"), whole, strict=True):
        for broken in (data[:-6], b"no archive"):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(UserError, match=rf"{name}: a file named \.\w+ must be a whole \w+ archive"):
                read_lines(str(tmp_path / name))
    (tmp_path / "a.zst").write_bytes(b"(\xb5/\xfd packed")

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(files, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(UserError, match=r"needs Python 3\.14 or the package backports\.zstd.*zstd -d a\.zst"):
        read_lines(str(tmp_path / "a.zst"))
    decoder = SimpleNamespace(decompress=lambda data: data[-6:] + b"\n", ZstdError=ValueError)
    monkeypatch.setattr(files, "importlib", SimpleNamespace(import_module=lambda name: decoder))
    assert read_lines(str(tmp_path / "a.zst")) == ["packed"]


def test_a_closed_stream_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input: it is closed"):
        read_lines("-")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UserError, match="standard output: it is closed"):
        write_lines("-", ["a"])


# -- output ------------------------------------------------------------------------------------------------------------


def test_a_written_line_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_line("a\nb\r\nc\x85d\u2028e\x0bf") == "a b c d e f"
    (tmp_path / "in").write_text("x\ny\n")
    monkeypatch.setattr(Completer, "complete", lambda self, prompts, **_: [f"{prompt}\n\r\n1" for prompt in prompts])
    assert (
        main(
            ["generate", str(run), "--from", "avl", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        )
        == 0
    )
    assert (tmp_path / "out").read_bytes() == b"x  1\ny  1\n"


def test_pieces_of_bytes_are_read_as_text(run: Path) -> None:
    tokenizer = Run.open(run).kept_tokenizer
    assert tokenizer is not None
    newline = next(i for i in range(tokenizer.vocab_size) if tokenizer._processor.id_to_piece(i) == "<0x0A>")
    word = tokenizer.encode("ba")
    assert tokenizer.decode([*word, newline, *word]) == "ba\n ba"


def test_output_goes_through_links_and_into_pipes(
    run: Path, tmp_path: Path, standard_input: Callable[[bytes], None]
) -> None:
    given = ["generate", str(run), "--from", "avl", "--output"]

    def write(output: Path) -> int:
        standard_input(b"ba\nto na\n")
        return main([*given, str(output)])

    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    assert write(file) == 0
    text = file.read_bytes()
    assert text.count(b"\n") == 2
    file.write_bytes(b"old")
    link.symlink_to("file")
    assert write(link) == 0
    assert link.is_symlink()
    assert file.read_bytes() == text
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert write(pipe) == 0
    reader.join(10)
    assert found == [text]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_output_that_cannot_be_written_is_said_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for room in ("writer", "score"):
        monkeypatch.setattr(f"moekit.runs.{room}.trained", lambda *_: pytest.fail("the run was opened"))
    (tmp_path / "file").write_text("a")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("generate", "score"):
        for output, words in (
            (tmp_path, "a folder is in the place"),
            ("file/x", "a file is in the place"),
            ("loop", "itself"),
        ):
            assert main([name, str(run), "--from", "avl", "--input", "x", "--output", str(tmp_path / output)]) == 2
            assert words in capsys.readouterr().err


def test_a_reader_that_leaves_ends_it_quietly(
    run: Path,
    standard_input: Callable[[bytes], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def left(*_: Any) -> None:
        raise BrokenPipeError

    standard_input(b"ba\n")
    monkeypatch.setattr("moekit.runs.generate.write_lines", left)
    monkeypatch.setattr("moekit.cli.command.discard", lambda stream: None)
    assert main(["generate", str(run), "--from", "avl"]) == 141
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_leaves_no_traceback() -> None:
    """Of a whole process: the interpreter flushes standard output once more when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from moekit.cli.program import main; sys.exit(main([]))"]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=300)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_leaves_no_half_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text("ba\n")
    out = tmp_path / "out"
    out.write_text("old\n")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for target in ("moekit.inference.completer.Completer.complete", "moekit.atomic.flush"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupt if target.endswith("flush") else lambda *_, **__: interrupt())
            assert (
                main(["generate", str(run), "--from", "avl", "--input", str(tmp_path / "in"), "--output", str(out)])
                == 130
            )
        assert capsys.readouterr().err == "interrupted\n"
        assert out.read_text() == "old\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# -- long lines --------------------------------------------------------------------------------------------------------


def test_long_lines_are_cut_and_said_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text("ba\n" + "ba na " * 20_000 + "\nto\n" + "ri " * 3_000 + "\n")
    seen: list[int] = []

    def complete(self: Completer, prompts: list[str], **_: Any) -> list[str]:
        seen.extend(len(self.tokenizer.encode(prompt)) for prompt in prompts)
        return ["x"] * len(prompts)

    monkeypatch.setattr(Completer, "complete", complete)
    given = ["generate", str(run), "--from", "avl", "--input", str(tmp_path / "in")]
    assert main(given) == 0
    assert capsys.readouterr().err == (
        f"--input {tmp_path}/in, line 2 has more than 1024 tokens and was cut there; --max_input_tokens sets the bound."
        " It is the first of 2 such lines.\n"
    )
    assert all(1000 < count <= 1024 for count in (seen[1], seen[3])), "pieces may join where the text ends now"
    assert seen[0] < 5
    assert main([*given, "--max_input_tokens", "100000"]) == 0
    assert capsys.readouterr().err == ""
    assert seen[5] > 20_000
    assert main([*given, "--max_input_tokens", "0"]) == 2
    assert "--max_input_tokens must be at least 1: got 0" in capsys.readouterr().err


# -- a prompt ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_prompt(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("xx\navl\nba\nto\ud800\nto na\n\nnever\n"))
    assert main(["generate", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    assert err.count("from (avl, tnd): ") == 2
    assert "Next word, avl. One line at a time" in err
    assert "error: line 2, character 3: text must be UTF-8" in err
    (tmp_path / "in").write_text("ba\nto na\n")
    assert main(["generate", str(run), "--from", "avl", "--input", str(tmp_path / "in")]) == 0
    assert capsys.readouterr().out == out, "the same text as from a file"
    monkeypatch.setattr(sys, "stdin", Terminal("ba\n"))
    assert main(["generate", str(run), "--from", "avl", "--input", "-"]) == 0
    assert ">" not in capsys.readouterr().err, "standard input was asked for by name"
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert main(["generate", str(run)]) == 0
    assert main(["generate", str(run), "--from", "xx"]) == 2


def test_text_drawn_at_a_terminal_is_that_of_a_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("ba\nba\nba\n"))
    given = ["generate", str(run), "--from", "avl", "--temperature", "1"]
    assert main(given) == 0
    typed = capsys.readouterr().out
    (tmp_path / "in").write_text("ba\nba\nba\n")
    assert main([*given, "--input", str(tmp_path / "in")]) == 0
    assert capsys.readouterr().out == typed
    assert len(set(typed.splitlines())) == 3, "a line that comes again is answered anew"


class Upper:
    """Stands for a run that answers in one language."""

    title, sources, targets = "Text to text", ("en",), ("en",)

    def targets_of(self, source: str) -> tuple[str, ...]:
        return self.targets

    def require_languages(self, source: str, target: str | None) -> tuple[str, str | None]:
        return source, target

    def write(
        self, given: list[str], source: str, target: str | None, n_best: int | None = None, first_number: int = 0
    ) -> Written:
        texts = [line.upper() + "\n!" for line in given]
        found = [[Hypothesis(text, -rank / 2) for rank in range(n_best or 1)] for text in texts]
        return Written(texts, [0] if len(given[0]) > 5 else [], found)

    def require_n_best(self, n_best: int) -> None:
        if n_best > 2:
            raise UserError("too many")

    warning = Writer.warning
    max_input_tokens = 5


def test_a_language_alone_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("a\nbbbbbb\n"))
    converse(Upper(), None, None)  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "A !\nBBBBBB !\n"
    assert "Text to text, en to en." in err
    assert "standard input, line 2 has more than 5 tokens" in err


def test_the_only_language_may_be_left_out() -> None:
    writer = Writer.__new__(Writer)
    writer.writes, writer.sources, writer.targets, writer.directions = "continuation", ("en",), (), ()
    assert writer.require_languages(None, None) == ("en", None)
    writer.writes, writer.sources, writer.targets = "answer", ("de",), ("en",)
    writer.directions = (("de", "en"),)
    assert writer.require_languages(None, None) == ("de", "en")
    writer._tokenizer = SimpleNamespace(languages=("de", "en", "fr"))  # type: ignore[assignment]
    writer.sources = ("de", "fr")
    with pytest.raises(UserError, match="generate needs --from: one of de, en, fr"):
        writer.require_languages(None, None)


def test_n_best_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("a\n"))
    converse(Upper(), None, None, 2)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "0\tA !\n-0.5\tA !\n"
    with pytest.raises(UserError, match="too many"):
        converse(Upper(), None, None, 3)  # type: ignore[arg-type]


def test_a_folder_may_be_named_without_an_option(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr("moekit.runs.generate.generate", lambda found, *_, **__: seen.append(found.path))
    assert main(["generate", str(run), "--input", "x"]) == main(["generate", "--out", str(run), "--input", "x"]) == 0
    assert seen == [run, run]
    assert main(["generate", str(run / "nowhere"), "--input", "x"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert lines.STANDARD == "-"
