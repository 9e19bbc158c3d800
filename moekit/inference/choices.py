"""Does a model know facts, words or grammar? Multiple choice: is the right sentence likelier than the others?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit.data.ragged import Ragged
from moekit.data.tokenizer import SpecialTokens, Tokenizer
from moekit.inference.batching import by_length, padded
from moekit.inference.generate import evaluating
from moekit.inference.scoring import Question, Scorer, score_continuations
from moekit.source import DECILES, QUESTION_KINDS, ChoiceQuestion
from moekit.tasks import TASKS, Task


class ChoiceScorer:
    """Scores the sentences of questions as a task makes it possible (`moekit.tasks.Task.recalls`).

    ========  ==================================================================================================
    sentence  log-probability of the sentence, its end included
    span      of the words that differ between the sentences, given the others around a sentinel; where the task cuts
              all salient words out, of these in their order, given the rest around their sentinels
    restored  of the sentence, given the words that do not differ around a mask
    masked    mean over the pieces of the words that differ, all of which are masked; how many pieces there are is
              given, so that a sum would favour short words
    target    log-probability of the sentence, its end included, given the one whose translation it is
    ========  ==================================================================================================

    Args:
        backbone: the model.
        heads: the heads of its tasks, by name.
        tokenizer: the one it was trained with.
        batch_tokens: the most padded positions of a batch.
        readers: tasks as they read the text (`moekit.tasks.Task.bound`), by name, where they seek words in it.
        sentinel: whether translation was trained with one (see `moekit.inference.scoring.Scorer`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: nn.ModuleDict,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 4096,
        readers: Mapping[str, Task] | None = None,
        sentinel: bool = False,
    ) -> None:
        self.backbone, self.heads, self.tokenizer, self.batch_tokens = backbone, heads, tokenizer, batch_tokens
        self._readers, self.sentinel = dict(readers or {}), sentinel
        self._ways: dict[str, Callable[[str, Sequence[ChoiceQuestion], str], list[float]]] = {
            "sentence": self._sentences,
            "span": self._spans,
            "restored": self._restored,
            "masked": self._masked,
            "target": self._targets,
        }

    def score(self, task: str, questions: Sequence[ChoiceQuestion]) -> list[list[float]]:
        """The score of every sentence of every question, the higher the likelier; all of one task's way.

        Raises:
            ValueError: the task has none, or asks for words and no sentence to translate is given, or the other way.
        """
        way = TASKS[task].recalls
        if way is None:
            raise ValueError(f"questions are for tasks that score sentences: got {task}, which does not.")
        if any((question.source is None) == (way == "target") for question in questions):
            about = "words, with" if way == "target" else "facts or agreement, without"
            raise ValueError(f"{task} is asked for {about} a source.")
        found: list[list[float]] = [[] for _ in questions]
        for source, language in dict.fromkeys((question.source_language, question.language) for question in questions):
            own = [i for i, q in enumerate(questions) if (q.source_language, q.language) == (source, language)]
            asked = [questions[i] for i in own]
            scores = iter(self._ways[way](language, asked, task))
            for i in own:
                found[i] = [next(scores) for _ in questions[i].sentences]
        return found

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def _sentences(self, language: str, questions: Sequence[ChoiceQuestion], _: str) -> list[float]:
        ids = self._encode([sentence for question in questions for sentence in question.sentences])
        return self._continued(language, [[self.tokenizer.bos_id]] * len(ids), ids)

    def _targets(self, language: str, questions: Sequence[ChoiceQuestion], _: str) -> list[float]:
        source = questions[0].source_language
        assert source is not None, "a sentence is given"
        scorer = Scorer(self.backbone, self.tokenizer, batch_tokens=self.batch_tokens, sentinel=self.sentinel)
        asked = [Question(question.source or "", question.sentences) for question in questions]
        return [score for scores in scorer.score(asked, source, language) for score in scores.log_probs]

    def _spans(self, language: str, questions: Sequence[ChoiceQuestion], task: str) -> list[float]:
        mark = self.tokenizer.sentinel_ids[0]
        sources: list[list[int]] = []
        answers: list[list[int]] = []
        for question in questions:
            found = self._as_trained(language, question, task)
            if found is None:
                before, gaps, after = self._parted([question])
                found = [[*b, mark, *a] for b, a in zip(before, after, strict=True)], gaps
            sources += [self._framed(language, source) for source in found[0]]
            answers += found[1]
        return self._continued(language, sources, answers, forced=(mark,))

    def _as_trained(
        self, language: str, question: ChoiceQuestion, task: str
    ) -> tuple[list[list[int]], list[list[int]]] | None:
        """The sentences with their salient words cut out, and what follows the first sentinel of these words.

        None where the task does not cut them all, or where the sentences differ in others: then what is left of them
        would not be the same question.
        """
        texts = Ragged.of(self._encode(question.sentences))
        languages = np.full(len(texts), self.tokenizer.language_id(language), dtype=np.int64)
        sides = self._readers[task].asked(texts, languages, self.tokenizer) if task in self._readers else None
        if sides is None:
            return None
        sources, answers = ([row.tolist() for row in side] for side in sides)
        same = all(source == sources[0] for source in sources) and len({tuple(row) for row in answers}) == len(answers)
        return (sources, [row[1:] for row in answers]) if same else None

    def _restored(self, language: str, questions: Sequence[ChoiceQuestion], _: str) -> list[float]:
        before, gaps, after = self._parted(questions)
        parts = list(zip(before, gaps, after, strict=True))
        sources = [self._framed(language, [*b, self.tokenizer.mask_id, *a]) for b, _, a in parts]
        return self._continued(language, sources, [[*b, *gap, *a] for b, gap, a in parts])

    @torch.no_grad()
    def _masked(self, language: str, questions: Sequence[ChoiceQuestion], task: str) -> list[float]:
        backbone: Any = self.backbone
        head: Any = self.heads[task]
        tokenizer, device = self.tokenizer, next(self.backbone.parameters()).device
        before, gaps, after = self._parted(questions)
        rows = [
            self._framed(language, [*b, *[tokenizer.mask_id] * len(gap), *a])
            for b, gap, a in zip(before, gaps, after, strict=True)
        ]
        found = [0.0] * len(rows)
        with evaluating(self.backbone), evaluating(head):
            for batch in by_length([(len(row),) for row in rows], self.batch_tokens):
                ids, mask = padded([rows[i] for i in batch], tokenizer.pad_id, device)
                spoken = torch.full_like(ids[:, 0], tokenizer.language_id(language))
                hidden = head.transform(backbone.encode(ids, mask, language=spoken).hidden)
                places = [(n, 1 + len(before[i]) + j) for n, i in enumerate(batch) for j in range(len(gaps[i]))]
                answers = torch.tensor([token for i in batch for token in gaps[i]], device=device)
                row, column = torch.tensor(places, device=device).T
                logits = backbone.logits(hidden[row, column]).float()
                scores = logits.log_softmax(-1).gather(1, answers[:, None])[:, 0].cpu()  # host read: the scores
                for i, own in zip(batch, scores.split([len(gaps[i]) for i in batch]), strict=True):
                    found[i] = float(own.double().mean())
        return found

    def _continued(
        self,
        language: str,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        forced: Sequence[int] = (),
    ) -> list[float]:
        tokenizer, number = self.tokenizer, self.tokenizer.language_id(language)
        scores = score_continuations(
            self.backbone,
            contexts,
            [[*ids, tokenizer.eos_id] for ids in continuations],
            batch_tokens=self.batch_tokens,
            tokens=SpecialTokens(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id),
            forced=forced,
            source_language=number,
            target_language=number,
        )
        return [float(row.double().sum()) for row in scores]

    def _framed(self, language: str, ids: Sequence[int]) -> list[int]:
        return [self.tokenizer.tag_id(language), *ids, self.tokenizer.eos_id]

    def _parted(self, questions: Sequence[ChoiceQuestion]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Ids before, of and after the words that differ, of every sentence."""
        parts = [part for question in questions for part in parted(question.sentences)]
        before, gaps, after = zip(*parts, strict=True)
        return self._encode(before), self._encode(gaps), self._encode(after)


def parted(sentences: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each sentence as the words that all begin with, those that differ, and those that all end with.

    Example:
        >>> parted(["he eats the pear now", "he eats an apple now"])
        [('he eats', 'the pear', 'now'), ('he eats', 'an apple', 'now')]
    """
    words = [sentence.split() for sentence in sentences]
    shortest = min(map(len, words)) - 1  # of each at least one word is its own
    first = next((i for i in range(shortest) if len({row[i] for row in words}) > 1), shortest)
    room = shortest - first
    last = next((i for i in range(room) if len({row[-1 - i] for row in words}) > 1), room)
    ends = [len(row) - last for row in words]
    return [
        (" ".join(row[:first]), " ".join(row[first:end]), " ".join(row[end:]))
        for row, end in zip(words, ends, strict=True)
    ]


def recall(questions: Sequence[ChoiceQuestion], scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The share of the questions whose right sentence has the highest score, by kind, decile and language.

    Of n sentences that share the highest score each is as good as a n-th of the choice.

    Args:
        questions: with as many sentences each.
        scores: what a model says of each of their sentences.

    Returns:
        Plain data of the `kinds` of a `moekit.runs.record.RecallRecord`.

    Raises:
        ValueError: a score is no number, or questions have different numbers of sentences.
    """
    numbers = {len(question.sentences) for question in questions}
    if len(numbers) > 1:
        raise ValueError(f"all questions must have as many sentences: got {sorted(numbers)}.")
    right = [_right(question, own) for question, own in zip(questions, scores, strict=True)]
    deciles = range(DECILES) if any(question.decile is not None for question in questions) else ()
    kinds: list[dict[str, Any]] = []
    for kind in QUESTION_KINDS:
        own = [(question, share) for question, share in zip(questions, right, strict=True) if question.kind == kind]
        if not own:
            continue
        languages = dict.fromkeys(question.language for question, _ in own)
        found = {
            "kind": kind,
            "recall": _mean([share for _, share in own]),
            "questions": len(own),
            "deciles": [_mean([s for q, s in own if q.decile == decile]) for decile in deciles],
            "languages": {code: _mean([s for q, s in own if q.language == code]) for code in languages},
        }
        kinds.append(found)
    return kinds


def _right(question: ChoiceQuestion, scores: Sequence[float]) -> float:
    best = [i for i, score in enumerate(scores) if score == max(scores)]
    if not best or any(score != score for score in scores):
        raise ValueError(f"a model must give numbers: it scores sentences {list(scores)}. Its weights may be NaN.")
    return (question.answer in best) / len(best)


def _mean(shares: Sequence[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None
