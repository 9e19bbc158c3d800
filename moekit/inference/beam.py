"""Beam search, batched over sentences."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekit.inference.batching import to_device
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

    Raises:
        ValueError: if a number is out of its range.

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


class _Finished:
    """The finished texts of B sentences, up to as many as the beam is wide, and a scratch slot behind them.

    `end` is the length of the longest text, with what is given.
    """

    def __init__(self, start: Start, width: int, end: int, dtype: torch.dtype) -> None:
        shape, device = (start.prefix.shape[0], width + 1), start.prefix.device
        self.start, self.width = start, width
        self.ids = torch.full((*shape, end), start.tokens.pad, dtype=torch.int64, device=device)  # what is given too
        self.scores = torch.zeros((*shape, end), dtype=dtype, device=device)
        self.length = torch.zeros(shape, dtype=torch.int64, device=device)  # without what is given; 0 = no text
        self.key = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self.used = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def add(self, sentence: Tensor, finished: Tensor, ended: Tensor, text: Tensor, scores: Tensor, key: Tensor) -> None:
        """Note texts [b, c] of `sentence` Int64[b], where `finished`."""
        row, used = sentence[:, None], self.used[sentence]
        slot = torch.where(finished, used[:, None] + finished.cumsum(1) - 1, self.width)
        length = text.shape[-1]
        self.ids[row, slot, :length], self.scores[row, slot, :length] = text, scores
        self.length[row, slot] = (length - self.start.length[sentence])[:, None].expand_as(slot)
        self.key[row, slot], self.ended[row, slot] = key, ended
        self.used[sentence] = used + finished.sum(1)

    def bar(self, wanted: int) -> Tensor:
        """Float64[B]: the key of the wanted-th best text that ended; -inf where there are fewer."""
        key = self.key[:, :-1].masked_fill(~self.ended[:, :-1], -torch.inf)
        return key.topk(wanted, dim=1).values[:, -1]

    def best(self, wanted: int) -> Generation:
        """The best texts of every sentence, padded: those that ended before those that were cut."""
        key, ended, length = self.key[:, :-1], self.ended[:, :-1], self.length[:, :-1]
        order = key.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, ended.gather(1, order).long().argsort(dim=1, descending=True, stable=True))[:, :wanted]
        key, ended, length = key.gather(1, order), ended.gather(1, order), length.gather(1, order)
        longest = int(length.max())  # host read: once for a search
        column = torch.arange(longest, device=order.device)
        real = column < length[..., None]
        place = (self.start.length[:, None, None] + column).clamp_max(self.ids.shape[-1] - 1).expand(real.shape)
        ids, scores = _pick(self.ids, order).gather(2, place), _pick(self.scores, order).gather(2, place)
        return Generation(
            ids=torch.where(real, ids, self.start.tokens.pad),
            lengths=length,
            scores=key.to(scores.dtype),
            token_scores=scores.masked_fill(~real, 0.0),
            ended=ended,
        )


class _Run:
    """One search. Tensors with a leading b are of the sentences still searched, each with w slots."""

    def __init__(self, search: BeamSearch, session: Session, start: Start) -> None:
        self.search, self.session, self.start, self.bounds = search, session, start, start.bounds()
        count, device = start.prefix.shape[0], start.prefix.device
        self.sentence = torch.arange(count, device=device)  # [b], the number of each in the whole batch
        self.place = self.bounds.shortest
        self.text = start.prefix[:, None, : self.place]  # [b, w, t]
        self.logits = session.logits(self.text.flatten(0, 1))  # [b * w, V]
        self.total = self.logits.new_zeros(self.text.shape[:2])  # sums of log-probabilities; -inf = an empty slot
        self.scores = self.logits.new_zeros(self.text.shape)  # log-probabilities of the tokens in `text`
        self.done = _Finished(start, search.size, self.bounds.end, self.logits.dtype)
        self.suppress = start.suppressed()

    def finish(self) -> Generation:
        for number in itertools.count(1):
            self._step(number)
            if not self.sentence.numel() or self.place == self.bounds.end:
                break
            self.logits = self.session.logits(self.text.flatten(0, 1))
        return self.done.best(self.search.num_return)

    def _step(self, number: int) -> None:
        """Write one more token; only after a look do finished sentences and empty slots leave the batch."""
        width = self.text.shape[1]
        total, slot, token, score = self._candidates()

        # Finished texts hold their places: only the best of the others go on.
        rank = torch.arange(total.shape[1], device=total.device)
        total = total.masked_fill(rank >= self.search.size - self.done.used[self.sentence][:, None], -torch.inf)
        alive = total > -torch.inf
        written = self.place + 1 - self.start.length[self.sentence]  # [b], not positive while tokens are given
        limit = self.start.limit[self.sentence]
        stop = alive & (written > 0)[:, None] & (token == self.start.tokens.eos)
        over = stop | (alive & (written >= limit)[:, None])

        text = torch.cat((_pick(self.text, slot), token[..., None]), dim=-1)
        scores = torch.cat((_pick(self.scores, slot), score[..., None]), dim=-1)
        if over.device.type != "cpu" or bool(over.any()):
            key = total.double() / self.search.penalty.divisor(written.clamp_min(1))[:, None]
            self.done.add(self.sentence, over, stop, text, scores, key)
            total = total.masked_fill(over, -torch.inf)

        # Live slots come first (they are already sorted), so that the beam can be cut to the widest that is left.
        order = (total == -torch.inf).long().argsort(dim=1, stable=True)
        total, slot = total.gather(1, order), slot.gather(1, order)
        going = self._can_improve(total[:, 0], written, limit)
        total = total.masked_fill(~going[:, None], -torch.inf)
        self.place += 1
        keep: Tensor | None = None
        if number % self.session.look_every(total.device) == 0:
            live = (total > -torch.inf).sum(1).tolist()  # host read: how many go on, at every look
            widest = max(live, default=0)
            total, order, slot = total[:, :widest], order[:, :widest], slot[:, :widest]
            if not all(live):
                keep = to_device([row for row, slots in enumerate(live) if slots], total.device)
                total, order, slot, text, scores = (t[keep] for t in (total, order, slot, text, scores))
                self.sentence = self.sentence[keep]
        self.total, self.text, self.scores = total, _pick(text, order), _pick(scores, order)
        if self.sentence.numel():
            first = torch.arange(len(slot), device=slot.device) if keep is None else keep
            self.session.keep((first[:, None] * width + slot).flatten(), keep)

    def _candidates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best continuations, best first: sums, slots they continue, tokens, log-probabilities, each [b, c]."""
        logits, (count, width, _) = self.logits, self.text.shape
        partition = logits.logsumexp(-1, keepdim=True)
        each = min(self.search.size, logits.shape[-1])
        values, tokens = _top(logits.index_fill(-1, self.suppress, -torch.inf), each)
        values, tokens = (values - partition).view(count, width, each), tokens.view(count, width, each)
        if self.place < self.bounds.longest:
            given = self.place < self.start.length[self.sentence]
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

    def _can_improve(self, best: Tensor, written: Tensor, limit: Tensor) -> Tensor:
        """Bool[b]: whether the best live sum of a sentence can still lead into the texts to be returned."""
        reach = best_possible(self.search.penalty, best, written.clamp_min(0), limit)
        return (best > -torch.inf) & (reach > self.done.bar(self.search.num_return)[self.sentence])


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
