"""`Writer`: a trained run that writes text, opened once and used for any number of lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.inference.completer import Completer
from moekit.inference.interface import Hypothesis, Search
from moekit.inference.on_demand import load_on_demand
from moekit.inference.sampling import Sampling, one_seed
from moekit.inference.translator import Translator, search_for
from moekit.inference.watched import Watched
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import trained_module
from moekit.runs.recipe import RunText
from moekit.runs.run import Run
from moekit.runs.text import evaluation_data
from moekit.tasks import TASKS

_MAX_INPUT_TOKENS = 1024


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        texts: one for every line, in their order; they may hold line breaks.
        cut: numbers, from 0, of the lines that were longer than `Writer.max_input_tokens` and were cut.
        hypotheses: where several texts of each line were asked for, these with their scores, best first.
    """

    texts: list[str]
    cut: list[int]
    hypotheses: list[list[Hypothesis]] = field(default_factory=list)


class Writer:
    """Translates or continues lines with a trained run.

    Args:
        run: the run.
        config: its settings, where they are not the run's: another beam, for example.
        experts_in_memory: so many experts of each layer at most, the others mapped from disk; 0 = all.
        max_input_tokens: most tokens of a line, which is cut there; None = 1024, or ``data.max_length`` if that is
            more.
        sampling: draws tokens, instead of the search that the settings describe.

    Attributes:
        model: what computes.
        writes: "answer" (to a text, in another language or in its own, such as a translation), or "continuation".
        title: the title of the task, as in "Translation".
        sources: languages of lines.
        targets: languages that can be written; none where text is continued in its own.
        directions: pairs of source and target that it was trained on; it can be asked for others.
        max_input_tokens: most tokens of a line.
        sampling: how text is drawn; None = it is searched for.

    Raises:
        UserError: nothing was trained there, or it writes no text.
    """

    writes: Literal["answer", "continuation"]

    def __init__(
        self,
        run: Run,
        config: RunConfig | None = None,
        *,
        experts_in_memory: int = 0,
        max_input_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        config = config or run.config
        if max_input_tokens is not None and max_input_tokens < 1:
            raise UserError(f"--max_input_tokens must be at least 1: got {max_input_tokens}.")
        self.max_input_tokens = max_input_tokens or max(_MAX_INPUT_TOKENS, config.data.max_length)
        backbone, data = trained(run, experts_in_memory)
        self._config, self.sampling = config, sampling
        several = config.train.devices * config.train.num_nodes > 1  # a strategy divides and moves it
        self.model = backbone if several else to_gpu(backbone, config.train.accelerator)
        self._tokenizer = data.tokenizer
        known = data.tokenizer.languages
        continued = [name for name in data.tasks if data.task(name).writes == "continuation"]
        if data.directions:
            self.writes = "answer"
            self.directions = tuple((direction.source, direction.target) for direction in data.directions)
            sources, targets = ({pair[side] for pair in self.directions} for side in (0, 1))
            self.sources = tuple(language for language in known if language in sources)
            self.targets = tuple(language for language in known if language in targets)
            titled = [name for name in data.tasks if TASKS[name].pairs]
        elif continued:
            self.writes, self.sources, self.targets, self.directions = "continuation", known, (), ()
            titled = continued
        else:
            raise UserError(
                f"generate needs a run that translates or continues text: {run.path} was trained on "
                f"{', '.join(data.tasks)} only."
            )
        self.title = ", ".join(TASKS[name].title for name in titled)

    def targets_of(self, source: str) -> tuple[str, ...]:
        """The targets that it was trained on from a language; all targets for another language."""
        return tuple(to for to in self.targets if (source, to) in self.directions) or self.targets

    def require_languages(self, source: str | None, target: str | None) -> tuple[str, str | None]:
        """The languages, once they are known to be ones that the run knows; one that is the only one may be left out.

        Raises:
            UserError: one is missing, unknown, or without use.
        """
        source = self._known(source, "--from", self.sources)
        if self.writes != "continuation":
            return source, self._known(target, "--to", self.targets_of(source))
        if target is not None:
            raise UserError(
                "--to is for runs that translate: this one continues text in the language of --from. Leave --to out."
            )
        return source, None

    def _known(self, language: str | None, option: str, possible: tuple[str, ...]) -> str:
        if language is None and len(possible) == 1:
            return possible[0]
        if language is None:
            raise UserError(f"generate needs {option}: one of {', '.join(self._tokenizer.languages)}.")
        self._tokenizer.language_id(language)
        return language

    def write(
        self,
        lines: Sequence[str],
        source: str,
        target: str | None = None,
        *,
        n_best: int | None = None,
        first_number: int = 0,
        advance: Callable[[int], None] = lambda done: None,
        watch: Callable[[], None] | None = None,
    ) -> Written:
        """Translate or continue lines.

        Args:
            lines: one sentence or prompt each.
            source: language of the lines.
            target: language wanted, of runs that translate.
            n_best: texts wanted of each line with their scores, at most the width of the beam; a search may find fewer.
                None = the best one alone.
            first_number: number of the first line in the whole input, on which drawn text depends.
            advance: told, after every batch, how many lines it held.
            watch: called before each token; what it raises ends the writing.

        Raises:
            UserError: a language is missing or unknown, or more texts are wanted than the beam is wide.
        """
        source, target = self.require_languages(source, target)
        search = one_seed(self._search(1 if n_best is None else n_best))
        shortened = [self._shortened(line) for line in lines]
        cut = [number for number, text in enumerate(shortened) if text is not None]
        given = [line if text is None else text for line, text in zip(lines, shortened, strict=True)]
        evaluate, data = self._config.evaluate, self._config.data
        search = search if watch is None else Watched(search, watch)
        options: dict[str, Any] = {"first_number": first_number, "advance": advance}
        if target is None:
            completer = Completer(
                self.model,
                self._tokenizer,
                search=search,
                max_new_tokens=data.max_length,
                batch_tokens=evaluate.batch_tokens,
            )
            if n_best is None:
                return Written(completer.complete(given, language=source, **options), cut)
            found = completer.hypotheses(given, language=source, **options)
            return Written([texts[0].text for texts in found], cut, found)
        translator = Translator(
            self.model,
            self._tokenizer,
            search=search,
            batch_tokens=evaluate.batch_tokens,
            sentinel=data.sentinel,
        )
        if n_best is None:
            return Written(translator.translate(given, source=source, target=target, **options), cut)
        found = translator.hypotheses(given, source=source, target=target, **options)
        return Written([texts[0].text for texts in found], cut, found)

    @property
    def beam_size(self) -> int:
        """The width of the beam: the most texts of a line that can be asked for."""
        return self._config.evaluate.beam_size

    def require_n_best(self, n_best: int) -> None:
        """Raise UserError if more texts of a line are wanted than the beam is wide."""
        self._search(n_best)

    def _search(self, n_best: int) -> Search:
        if self.sampling is not None:
            if n_best != 1:
                raise UserError(f"--n_best must be 1 where tokens are drawn (--temperature): got {n_best}.")
            return self.sampling
        return search_for(self._config.evaluate.beam_size, self._config.evaluate.length_penalty, n_best)

    def _shortened(self, line: str) -> str | None:
        """The beginning of a line that is too long, else None."""
        ids = self._tokenizer.encode(line)
        return self._tokenizer.decode(ids[: self.max_input_tokens]) if len(ids) > self.max_input_tokens else None

    def warning(self, cut: Sequence[int], place: str) -> str:
        """One line about the lines that were cut; empty where none was."""
        if not cut:
            return ""
        others = f" It is the first of {len(cut)} such lines." if len(cut) > 1 else ""
        return (
            f"{place}, line {cut[0] + 1} has more than {self.max_input_tokens} tokens and was cut there; "
            f"--max_input_tokens sets the bound.{others}"
        )


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
