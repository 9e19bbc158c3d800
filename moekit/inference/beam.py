"""Beam search, batched over sentences."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekit.inference.interface import Generation, Start
from moekit.inference.length_penalty import GNMTPenalty, LengthPenalty, best_possible
from moekit.inference.session import Session


@dataclass(frozen=True)
class BeamSearch:
    """Keeps the `size` most probable beginnings of each sentence.

    A text that ends keeps its place, so the beam narrows; a beam of one is greedy search, and a beam that never has to
    drop anything finds the best text there is. Texts are ranked by penalised score, those that ended before those
    that were cut at the limit. A sentence stops when none of its live beginnings can still enter the `num_return`
    best, which never changes the result.

    Args:
        size: width of the beam.
        num_return: texts returned per sentence, best first; at most `size`.
        penalty: how texts of different lengths are compared.

    Source: a beam that narrows is that of arXiv:1409.3215 section 3.2 and of Nematus and Marian; fairseq and Hugging
    Face refill it and stop by count.
    """

    size: int = 4
    num_return: int = 1
    penalty: LengthPenalty = field(default_factory=GNMTPenalty)

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.num_return <= self.size:
            raise ValueError(
                "BeamSearch needs size >= 1 and num_return from 1 to size: "
                f"got size {self.size} and num_return {self.num_return}."
            )

    def run(self, session: Session, start: Start) -> Generation:
        """Search all sentences at once; finished ones leave the batch."""
        return _Run(self, session, start).finish()


@dataclass
class _Text:
    """A finished hypothesis, with the key it is ranked by."""

    key: tuple[bool, float]
    ids: Tensor
    scores: Tensor


class _Run:
    """One search. Tensors with a leading b are of the sentences still searched, each with w slots."""

    def __init__(self, search: BeamSearch, session: Session, start: Start) -> None:
        self.search, self.session, self.start = search, session, start
        count, device = start.prefix.shape[0], start.prefix.device
        self.done: list[list[_Text]] = [[] for _ in range(count)]
        self.sentence = torch.arange(count, device=device)  # [b], the number of each in the whole batch
        self.used = torch.zeros(count, dtype=torch.int64, device=device)  # [b], places that finished texts hold
        self.place = int(start.length.min())
        self.text = start.prefix[:, None, : self.place]  # [b, w, t]
        self.total: Tensor | None = None  # [b, w], sums of log-probabilities; -inf = an empty slot
        self.scores: Tensor | None = None  # [b, w, t], log-probabilities of the tokens in `text`
        self.suppress = torch.tensor(sorted({start.tokens.pad, *start.suppress}), device=device)

    def finish(self) -> Generation:
        while self.sentence.numel():
            self._step()
        return self._collect()

    def _step(self) -> None:
        """Write one more token."""
        width = self.text.shape[1]
        logits = self.session.logits(self.text.flatten(0, 1))
        if self.total is None or self.scores is None:
            self.total = logits.new_zeros(self.text.shape[:2])
            self.scores = logits.new_zeros(self.text.shape)
        total, slot, token, score = self._candidates(logits, width)

        # Finished texts hold their places: only the best of the others go on.
        rank = torch.arange(total.shape[1], device=total.device)
        total = total.masked_fill(rank >= self.search.size - self.used[:, None], -torch.inf)
        alive = total > -torch.inf
        written = self.place + 1 - self.start.length[self.sentence]  # [b], not positive while tokens are given
        limit = self.start.limit[self.sentence]
        stop = alive & (written > 0)[:, None] & (token == self.start.tokens.eos)
        cut = alive & ~stop & (written >= limit)[:, None]

        text = torch.cat((_pick(self.text, slot), token[..., None]), dim=-1)
        scores = torch.cat((_pick(self.scores, slot), score[..., None]), dim=-1)
        self._retire(stop | cut, stop, text, scores, total)
        self.used = self.used + (stop | cut).sum(1)
        total = total.masked_fill(stop | cut, -torch.inf)

        # Live slots come first (they are already sorted), so that the beam can be cut to the widest that is left.
        order = (total == -torch.inf).long().argsort(dim=1, stable=True)
        total, slot = total.gather(1, order), slot.gather(1, order)
        going = self._can_improve(total[:, 0], written, limit)
        keep = going.nonzero()[:, 0]
        new_width = int((total[keep] > -torch.inf).sum(1).max()) if keep.numel() else 0
        order, slot = order[keep, :new_width], slot[keep, :new_width]
        self.total = total[keep, :new_width]
        self.text, self.scores = _pick(text[keep], order), _pick(scores[keep], order)
        self.sentence, self.used = self.sentence[keep], self.used[keep]
        self.place += 1
        if keep.numel():
            rows = (keep[:, None] * width + slot).flatten()
            self.session.keep(rows, None if bool(going.all()) else keep)

    def _candidates(self, logits: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best continuations, best first: sums, slots they continue, tokens, log-probabilities, each [b, c]."""
        assert self.total is not None
        count = self.sentence.numel()
        partition = logits.logsumexp(-1, keepdim=True)
        each = min(self.search.size, logits.shape[-1])
        values, tokens = _top(logits.index_fill(-1, self.suppress, -torch.inf), each)
        values, tokens = (values - partition).view(count, width, each), tokens.view(count, width, each)
        given = self.place < self.start.length[self.sentence]
        if bool(given.any()):
            # A given token costs nothing, and a sentence has one beginning until its prefix ends.
            column = min(self.place, self.start.prefix.shape[1] - 1)
            forced = self.start.prefix[self.sentence, column]
            tokens = torch.where(given[:, None, None], forced[:, None, None], tokens)
            only = torch.full_like(values, -torch.inf)
            only[:, 0, 0] = 0.0
            values = torch.where(given[:, None, None], only, values)
        sums = (self.total[:, :, None] + values).flatten(1)
        total, index = _top(sums, min(self.search.size, sums.shape[1]))
        return total, index // each, tokens.flatten(1).gather(1, index), values.flatten(1).gather(1, index)

    def _retire(self, finished: Tensor, ended: Tensor, text: Tensor, scores: Tensor, total: Tensor) -> None:
        """Note the finished texts."""
        where = finished.nonzero()
        if not where.numel():
            return
        row, slot = where.unbind(1)
        sentence = self.sentence[row]
        given = self.start.length[sentence]
        final = total[row, slot].double() / self.search.penalty.divisor(self.place + 1 - given)
        picked, values, ends = text[row, slot], scores[row, slot], ended[row, slot]
        facts = zip(sentence.tolist(), given.tolist(), ends.tolist(), final.tolist(), strict=True)
        for number, (owner, begin, end, key) in enumerate(facts):
            self.done[owner].append(_Text((end, key), picked[number, begin:], values[number, begin:]))

    def _can_improve(self, best: Tensor, written: Tensor, limit: Tensor) -> Tensor:
        """Bool[b]: whether the best live sum of a sentence can still lead into the texts to be returned."""
        wanted = self.search.num_return
        bar = []
        for owner in self.sentence.tolist():
            ended = sorted((t.key[1] for t in self.done[owner] if t.key[0]), reverse=True)
            bar.append(ended[wanted - 1] if len(ended) >= wanted else -torch.inf)
        reach = best_possible(self.search.penalty, best, written.clamp_min(0), limit)
        return (best > -torch.inf) & (reach > torch.tensor(bar, dtype=reach.dtype, device=reach.device))

    def _collect(self) -> Generation:
        """The best texts of every sentence, padded."""
        wanted, device = self.search.num_return, self.start.prefix.device
        ranked = [sorted(texts, key=lambda t: t.key, reverse=True)[:wanted] for texts in self.done]
        longest = max((t.ids.numel() for texts in ranked for t in texts), default=0)
        shape = (len(ranked), wanted)
        kind = next((t.scores.dtype for texts in ranked for t in texts), torch.float32)
        ids = torch.full((*shape, longest), self.start.tokens.pad, dtype=torch.int64, device=device)
        token_scores = torch.zeros((*shape, longest), dtype=kind, device=device)
        lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        scores = torch.full(shape, -torch.inf, dtype=kind, device=device)
        ended = torch.zeros(shape, dtype=torch.bool, device=device)
        for row, texts in enumerate(ranked):
            for rank, text in enumerate(texts):
                length = text.ids.numel()
                ids[row, rank, :length], token_scores[row, rank, :length] = text.ids, text.scores
                lengths[row, rank], scores[row, rank], ended[row, rank] = length, text.key[1], text.key[0]
        return Generation(ids, lengths, scores, token_scores, ended)


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first; for k = 1 the first of equals, as greedy search takes it."""
    if k == 1:
        best, index = values.max(-1, keepdim=True)
        return best, index
    best, index = values.topk(k, dim=-1)
    return best, index


def _pick(values: Tensor, slot: Tensor) -> Tensor:
    """Rows `slot` Int64[b, c] of `values` [b, w, t]."""
    return values.gather(1, slot[..., None].expand(-1, -1, values.shape[2]))
