"""Translating or continuing lines of text with a trained run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from moekit.atomic import write_text
from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.inference.completer import Completer
from moekit.inference.on_demand import load_on_demand
from moekit.inference.translator import Translator, search_for
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import trained_module
from moekit.runs.recipe import RunText
from moekit.runs.run import Run
from moekit.runs.text import evaluation_data


def generate(
    run: Run,
    source: str | None,
    target: str | None = None,
    *,
    config: RunConfig | None = None,
    input: str = "-",
    output: str = "-",
    experts_in_memory: int = 0,
) -> None:
    """Translate a file or standard input, line by line, in order; a language model continues each line.

    Args:
        run: a trained run.
        source: language of the input.
        target: language wanted, of runs that translate.
        config: settings that are not the run's: another beam, for example.
        input: the file; - = standard input.
        output: the file; - = standard output.
        experts_in_memory: so many experts of each layer at most, the others mapped from disk; 0 = all.

    Raises:
        UserError: a language is missing, unknown or without use, the input cannot be read, or the run writes no text.
    """
    config = config or run.config
    backbone, data = trained(run, experts_in_memory)
    backbone = to_gpu(backbone, config.train.accelerator)
    tokenizer = data.tokenizer
    search = search_for(config.evaluate.beam_size, config.evaluate.length_penalty)
    source = _language(source, "--from", tokenizer)
    write: Callable[..., list[str]]
    if data.directions:
        target = _language(target, "--to", tokenizer)
        what = f"{source} to {target}"
        translator = Translator(
            backbone, tokenizer, search=search, batch_tokens=config.evaluate.batch_tokens, sentinel=config.data.sentinel
        )
        write = partial(translator.translate, source=source, target=target)
    elif any(data.task(name).writes == "continuation" for name in data.tasks):
        if target is not None:
            raise UserError(
                f"--to is for runs that translate: {run.path} continues text in the language of --from. Leave --to out."
            )
        what = source
        completer = Completer(backbone, tokenizer, search=search, max_new_tokens=config.data.max_length)
        write = partial(completer.complete, language=source)
    else:
        raise UserError(
            f"generate needs a run that translates or continues text: {run.path} was trained on "
            f"{', '.join(data.tasks)} only."
        )
    with reading(input) as file:
        sentences = [line.rstrip("\r\n") for line in file]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=len(sentences))
        lines = write(sentences, advance=lambda n: bar.advance(task, n))
    write_lines(output, lines)


def trained(run: Run, resident: int = 0) -> tuple[nn.Module, MultitaskData]:
    """The network of a run with all of its experts in memory (`resident` 0), or so many of each layer, and its data.

    Raises:
        UserError: nothing was trained there, or its checkpoint is of several processes.
    """
    if resident < 0:
        raise UserError(f"--experts_in_memory must be at least 0, which means all: got {resident}.")
    path = run.checkpoint
    if not resident:
        data = evaluation_data(run)
        return trained_module(run, data).backbone, data
    if path.is_dir():
        raise UserError(f"--experts_in_memory needs a checkpoint in one file: {path} is of several processes.")
    data = evaluation_data(run)
    built = run.recipe.parts(run.config, RunText(data.tokenizer.vocab_size), "meta")
    return load_on_demand(built.backbone, path, resident=resident, prefix="backbone."), data


def to_gpu(model: nn.Module, accelerator: str) -> nn.Module:
    """The model on a GPU where there is one, unless the run keeps to the CPU."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return model
    return model.to(torch.device("cuda", torch.cuda.current_device()))


def _language(language: str | None, option: str, tokenizer: Tokenizer) -> str:
    if language is None:
        raise UserError(f"generate needs {option}: one of {', '.join(tokenizer.languages)}.")
    tokenizer.language_id(language)
    return language


def write_lines(name: str, lines: Iterable[str]) -> None:
    """Lines into a text file, or to standard output for "-"."""
    text = "".join(line + "\n" for line in lines)
    if name == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(name), text)


@contextlib.contextmanager
def reading(name: str, option: str = "--input") -> Iterator[TextIO]:
    """A text file, or standard input for "-"; what is wrong with it is said of `option`.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    if name == "-":
        yield sys.stdin
        return
    try:
        with Path(name).open(encoding="utf-8", newline="\n") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {option} {name}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {name} must be UTF-8: byte {error.start} is not.") from None
