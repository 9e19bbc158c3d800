"""Translating files and standard input with a trained run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.inference.translator import Translator, search_for
from moekit.recipes._evaluation import load
from moekit.recipes._parts import Build
from moekit.training.atomic import write_text
from moekit.training.run_folder import RunFolder


def generate(build: Build, config: Any, folder: RunFolder, options: Namespace) -> None:
    """Translate a file or standard input, line by line, in order."""
    module, data, _ = load(build, config, folder)
    tokenizer = data.tokenizer
    source, target = (_language(options[f"{side}_language"], side, tokenizer) for side in ("source", "target"))
    with _reading(options.input) as file:
        sentences = [line.rstrip("\r\n") for line in file]
    translator = Translator(
        module.backbone,
        tokenizer,
        search=search_for(config.evaluate.beam_size, config.evaluate.length_penalty),
        batch_tokens=config.evaluate.batch_tokens,
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(f"{source} to {target}", total=len(sentences))
        lines = translator.translate(sentences, source, target, advance=lambda n: bar.advance(task, n))
    text = "".join(line + "\n" for line in lines)
    if options.output == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(options.output), text)


def _language(language: str | None, side: str, tokenizer: Tokenizer) -> str:
    if language is None:
        option = "--from" if side == "source" else "--to"
        raise UserError(f"generate needs {option}: one of {', '.join(tokenizer.languages)}.")
    tokenizer.language_id(language)
    return language


@contextlib.contextmanager
def _reading(name: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdin
        return
    try:
        with Path(name).open(encoding="utf-8", newline="\n") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read --input {name}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--input {name} must be UTF-8: byte {error.start} is not.") from None
