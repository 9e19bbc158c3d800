"""How likely given texts are: scores of continuations, and by them zero-shot and few-shot answers to questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moekit.data.tokenizer import SpecialTokens, Tokenizer
from moekit.inference.batching import by_length, padded, to_device
from moekit.inference.generate import evaluating

Normalise = Literal["sum", "token", "character"]


@torch.no_grad()
def score_continuations(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 4096,
    tokens: SpecialTokens | None = None,
    forced: Sequence[int] = (),
    source_language: int | None = None,
    target_language: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """The log-probability of every token of each continuation, given its context and the tokens before.

    Rows of like length go through the model together, padded on the right, in evaluation mode; one forward a row.

    Args:
        model: a language model (with `decode`), whose row is context and continuation, or an encoder-decoder (also with
            `encode`), whose source is the context and whose target is the begin token and the continuation.
        contexts: ids, at least one each: a language model's with its begin token, a source with its tag and end.
        continuations: ids, at least one each, as many as contexts; with an end token where that is to count.
        batch_tokens: the most padded positions of a batch, both sides counted; a longer row goes alone.
        tokens: special ids.
        forced: what every target of an encoder-decoder begins with, after the begin token; not scored.
        source_language: told to the encoder's routers.
        target_language: told to the decoder's routers, of a language model too.
        advance: told, after every batch, how many continuations it held.

    Returns:
        Float32 (or wider) tensors of the continuations' lengths, on the CPU, in their order.

    Raises:
        ValueError: if there are not as many contexts as continuations, or one of them is empty.
    """
    if len(contexts) != len(continuations):
        raise ValueError(f"every continuation needs its context: got {len(contexts)} and {len(continuations)}.")
    for name, given in (("context", contexts), ("continuation", continuations)):
        if not all(len(row) for row in given):
            empty = [len(row) for row in given].index(0)
            raise ValueError(f"a {name} needs at least one token: number {empty} has none.")
    special = tokens or SpecialTokens()
    encodes = hasattr(model, "encode")
    contexts = [list(map(int, row)) for row in contexts]  # rows may be tensors or arrays
    continuations = [list(map(int, row)) for row in continuations]
    sources = contexts if encodes else [[] for _ in contexts]
    before = [[special.bos, *forced] if encodes else row for row in contexts]
    # Of the last token nothing is predicted: it is an answer and no question.
    inputs = [[*start, *row[:-1]] for start, row in zip(before, continuations, strict=True)]
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(inputs)
    with evaluating(model):
        for rows in by_length([(len(s), len(i)) for s, i in zip(sources, inputs, strict=True)], batch_tokens):
            ids, mask = padded([inputs[i] for i in rows], special.pad, device)
            spoken = None if target_language is None else torch.full((len(rows),), target_language, device=device)
            memory: tuple[Tensor, ...] = ()
            if encodes:
                source, source_mask = padded([sources[i] for i in rows], special.pad, device)
                heard = None if source_language is None else torch.full_like(source[:, 0], source_language)
                memory = (model.encode(source, source_mask, heard).hidden, source_mask)  # type: ignore[operator]
            hidden = model.decode(ids, *memory, mask, spoken).hidden  # type: ignore[operator]
            # Only where something is predicted, row after row: a whole batch of logits would be large.
            places = [range(len(before[i]) - 1, len(before[i]) - 1 + len(continuations[i])) for i in rows]
            asked = to_device([(row, place) for row, wanted in enumerate(places) for place in wanted], device)
            answer = to_device([token for i in rows for token in continuations[i]], device)
            logits = model.logits(hidden[asked[:, 0], asked[:, 1]])  # type: ignore[operator]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].cpu()  # host read: the scores
            for i, scores in zip(rows, chosen.split([len(continuations[i]) for i in rows]), strict=True):
                found[i] = scores
            advance(len(rows))
    return found


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations, and which one is right (a number from 0), where that is known.

    Raises:
        ValueError: if there is no continuation, one is empty, or `answer` is the number of none.
    """

    context: str
    continuations: tuple[str, ...]
    answer: int | None = None

    def __post_init__(self) -> None:
        if not self.continuations or not all(text.strip() for text in self.continuations):
            raise ValueError(f"a question needs continuations, and none may be empty: got {self.continuations!r}.")
        if self.answer is not None and not 0 <= self.answer < len(self.continuations):
            raise ValueError(
                f"answer must be the number of a continuation, 0..{len(self.continuations) - 1}: got {self.answer}."
            )


@dataclass(frozen=True)
class ContinuationScores:
    """What a model says of the continuations of one question.

    Attributes:
        log_probs: log-probability of each continuation, summed over its tokens.
        tokens: how many tokens each has.
        characters: how many characters each has.
    """

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    def normalised(self, by: Normalise) -> tuple[float, ...]:
        """Log-probabilities as they are ("sum"), or divided by the number of tokens or of characters.

        Source: "token" arXiv:2005.14165 section 2.4; "character" as ``acc_norm`` of the LM evaluation harness. Zero-
            and few-shot priming of models with experts: arXiv:2112.10684.

        Raises:
            ValueError: if `by` is none of these.
        """
        if by not in get_args(Normalise):
            raise ValueError(f"scores are normalised by one of {', '.join(get_args(Normalise))}: got {by!r}.")
        sizes = {"sum": (1,) * len(self.log_probs), "token": self.tokens, "character": self.characters}[by]
        return tuple(score / size for score, size in zip(self.log_probs, sizes, strict=True))

    def best(self, by: Normalise = "sum") -> int:
        """Number of the likeliest continuation; of equal ones the first.

        Raises:
            ValueError: if a score is no number, or `by` is unknown.
        """
        scores = self.normalised(by)
        if any(map(math.isnan, scores)):
            raise ValueError(
                f"a model must give numbers: it scores the continuations {scores}. Its weights may be NaN."
            )
        return scores.index(max(scores))


def few_shot(question: Question, examples: Iterable[Question], separator: str = "\n\n") -> Question:
    """The question with answered examples before it, each as its context, a space and its right continuation.

    Raises:
        ValueError: if an example has no answer.

    Source: arXiv:2005.14165 section 2 (in-context examples; separator of the LM evaluation harness).
    """
    shown = []
    for example in examples:
        if example.answer is None:
            raise ValueError(f"an example needs an answer: {example.context!r} has none.")
        shown.append(f"{example.context} {example.continuations[example.answer]}".strip())
    return Question(separator.join([*shown, question.context]), question.continuations, question.answer)


class Scorer:
    """Scores continuations of text with a language model, or whole targets with an encoder-decoder.

    Context and continuation are tokenised apart, so a continuation begins a word, and its tokens do not depend on what
    stands before. A language model's row is ``bos context continuation``, of which nothing is expected after the
    continuation. An encoder-decoder reads ``<2xx> context eos`` and is scored on ``continuation eos``.

    Args:
        model: such as `moekit.transformer.DecoderOnly` or `EncoderDecoder`.
        tokenizer: the one it was trained with.
        batch_tokens: the most padded positions of a batch (`score_continuations`).
        sentinel: whether an encoder-decoder was trained with one (see `Translator`).
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, *, batch_tokens: int = 4096, sentinel: bool = False
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self._forced = tokenizer.sentinel_ids[:1] if sentinel else ()

    def score(
        self,
        questions: Sequence[Question],
        source: str,
        target: str | None = None,
        *,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[ContinuationScores]:
        """Scores of every question, in their order.

        Args:
            questions: with examples before them where wanted (`few_shot`).
            source: language of the contexts.
            target: language of the continuations; None = the same.
            advance: told, after every batch, how many continuations it held.

        Raises:
            UserError: if the tokenizer does not know a language.
            ValueError: if the tokenizer makes nothing of a continuation.
        """
        tokenizer, target = self.tokenizer, source if target is None else target
        languages = tokenizer.language_id(source), tokenizer.language_id(target)
        first, last, end = [tokenizer.bos_id], list[int](), list[int]()
        if hasattr(self.model, "encode"):
            first, last, end = [tokenizer.tag_id(target)], [*self._forced, tokenizer.eos_id], [tokenizer.eos_id]
        encoded = tokenizer.encode_batch([question.context for question in questions])
        contexts = [[*first, *ids, *last] for ids, q in zip(encoded, questions, strict=True) for _ in q.continuations]
        texts = [text for question in questions for text in question.continuations]
        continuations = [[*ids, *end] if ids else [] for ids in tokenizer.encode_batch(texts)]
        scores = iter(
            score_continuations(
                self.model,
                contexts,
                continuations,
                batch_tokens=self.batch_tokens,
                tokens=SpecialTokens(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id),
                forced=self._forced,
                source_language=languages[0],
                target_language=languages[1],
                advance=advance,
            )
        )
        by_question = [[next(scores) for _ in question.continuations] for question in questions]
        return [
            ContinuationScores(
                log_probs=tuple(float(row.double().sum()) for row in rows),
                tokens=tuple(map(len, rows)),
                characters=tuple(map(len, question.continuations)),
            )
            for question, rows in zip(questions, by_question, strict=True)
        ]


def accuracy(questions: Sequence[Question], scores: Sequence[ContinuationScores], by: Normalise = "sum") -> float:
    """Share of the questions with an answer whose likeliest continuation is that one; NaN where there is none."""
    right = [s.best(by) == q.answer for q, s in zip(questions, scores, strict=True) if q.answer is not None]
    return sum(right) / len(right) if right else float("nan")
