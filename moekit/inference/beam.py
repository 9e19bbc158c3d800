"""Beam search, batched over sentences."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.inference.batching import to_device
from moekit.inference.interface import Generation, Start, longest_text
from moekit.inference.length_penalty import GNMTPenalty, LengthPenalty, best_possible
from moekit.inference.ranking import Ranking, top
from moekit.inference.session import Session

EarlyStopping = Literal[False, True, "never"]


@dataclass(frozen=True)
class BeamSearch:
    """Keeps the `size` most probable unfinished beginnings of each sentence.

    At each step the continuations of all beginnings are ranked by their sums of log-probabilities. Those among the
    first `size` that end, or that are cut at the limit, are set aside, with the length penalty applied; the beam goes
    on with the `size` best that do not end, so it stays full. The `size` best texts that were set aside are kept, and
    the best `num_return` of them returned, whether they ended or were cut. A beam of one is greedy search.

    Args:
        size: width of the beam.
        num_return: texts returned per sentence, best first; at most `size`.
        penalty: how texts of different lengths are compared.
        early_stopping: when a sentence stops. True = as soon as `size` texts are set aside. False = when moreover the
            best beginning, its penalty that of its present length, does not score above the worst of them. "never" =
            when no beginning can still lead into the `num_return` best, whatever its length becomes, so that stopping
            changes nothing.

    Raises:
        ValueError: if a number is out of its range, or `early_stopping` is unknown.

    Source: the search of fairseq and of transformers, whose names for the three rules these are; penalties applied to
        finished texts arXiv:1609.08144 section 7. With the same scores, width, penalty and rule the texts are those of
        transformers.
    Differs: fairseq forces the end upon what reaches the limit, here such a text competes as it is, as in transformers.
        transformers' "never" compares with the worst of `size` texts, and its bound holds for its own penalty.
    """

    size: int = 4
    num_return: int = 1
    penalty: LengthPenalty = field(default_factory=GNMTPenalty)
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.num_return <= self.size:
            raise ValueError(
                "BeamSearch needs size >= 1 and num_return from 1 to size: "
                f"got size {self.size} and num_return {self.num_return}."
            )
        if self.early_stopping not in (False, True, "never"):
            raise ValueError(f'BeamSearch.early_stopping must be False, True or "never": got {self.early_stopping!r}.')

    def run(self, session: Session, start: Start) -> Generation:
        """Search all sentences at once; finished ones leave the batch."""
        return _Run(self, session, start).finish()


class _Texts(NamedTuple):
    """c texts of each of b sentences: a token behind a slot of the beam.

    Attributes:
        total: Float[b, c], sums of log-probabilities; -inf = there is none.
        slot: Int64[b, c], of the beginning.
        token: Int64[b, c].
        score: Float[b, c], log-probability of the token.
    """

    total: Tensor
    slot: Tensor
    token: Tensor
    score: Tensor


class _Finished:
    """The best texts of B sentences that were set aside, as many as the beam is wide, best first.

    `end` is the length of the longest text, with what is given.
    """

    def __init__(self, start: Start, width: int, end: int, dtype: torch.dtype) -> None:
        shape, device = (start.prefix.shape[0], width), start.prefix.device
        self.start, self.width = start, width
        self.ids = torch.full((*shape, end), start.tokens.pad, dtype=torch.int64, device=device)  # what is given too
        self.scores = torch.zeros((*shape, end), dtype=dtype, device=device)
        self.length = torch.zeros(shape, dtype=torch.int64, device=device)  # without what is given; 0 = no text
        self.key = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)

    def add(self, sentence: Tensor, key: Tensor, ended: Tensor, text: Tensor, scores: Tensor) -> None:
        """Set texts [b, c] of `sentence` Int64[b] aside: those whose `key` Float64[b, c] is above -inf."""
        after = self.ids.shape[-1] - text.shape[-1]
        keys = torch.cat((self.key[sentence], key), dim=1)
        order = keys.argsort(dim=1, descending=True, stable=True)[:, : self.width]
        length = (text.shape[-1] - self.start.length[sentence])[:, None].expand_as(key)
        self.key[sentence] = keys.gather(1, order)
        self.ended[sentence] = torch.cat((self.ended[sentence], ended), dim=1).gather(1, order)
        self.length[sentence] = torch.cat((self.length[sentence], length), dim=1).gather(1, order)
        text = F.pad(text, (0, after), value=self.start.tokens.pad)
        self.ids[sentence] = _pick(torch.cat((self.ids[sentence], text), dim=1), order)
        self.scores[sentence] = _pick(torch.cat((self.scores[sentence], F.pad(scores, (0, after))), dim=1), order)

    def bar(self, sentence: Tensor, wanted: int) -> Tensor:
        """Float64[b]: the key of the wanted-th best text of each sentence; -inf where there are fewer."""
        return self.key[sentence, wanted - 1]

    def best(self, wanted: int) -> Generation:
        """The best texts of every sentence, padded."""
        key, ended = self.key[:, :wanted], self.ended[:, :wanted]
        length = self.length[:, :wanted].masked_fill(key == -torch.inf, 0)
        longest = longest_text(length, key[:, 0] == -torch.inf)
        column = torch.arange(longest, device=key.device)
        real = column < length[..., None]
        place = (self.start.length[:, None, None] + column).clamp_max(self.ids.shape[-1] - 1).expand(real.shape)
        ids, scores = self.ids[:, :wanted].gather(2, place), self.scores[:, :wanted].gather(2, place)
        return Generation(
            ids=torch.where(real, ids, self.start.tokens.pad),
            lengths=length,
            scores=key.to(scores.dtype),
            token_scores=scores.masked_fill(~real, 0.0),
            ended=ended & (length > 0),
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
        end, never = start.tokens.eos, start.suppressed()
        self.may_end = end != start.tokens.pad and end not in start.suppress
        self.ranking = Ranking(torch.cat((never, never.new_full((1,), end))))

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
        going_on, ending = self._candidates()
        written = self.place + 1 - self.start.length[self.sentence]  # [b], not positive while tokens are given
        limit = self.start.limit[self.sentence]
        going_on = self._set_aside(going_on, ending, written, limit)
        self.place += 1

        total, slot, token, score = going_on
        goes = self._goes_on(total[:, 0], written, limit)
        total = total.masked_fill(~goes[:, None], -torch.inf)
        keep: Tensor | None = None
        before, before_scores = self.text, self.scores
        if number % self.session.look_every(total.device) == 0:
            live = (total > -torch.inf).sum(1).tolist()  # host read: how many go on, at every look
            widest = max(live, default=0)
            total, slot, token, score = (t[:, :widest] for t in (total, slot, token, score))
            if not all(live):
                keep = to_device([row for row, slots in enumerate(live) if slots], total.device)
                total, slot, token, score, before, before_scores = (
                    t[keep] for t in (total, slot, token, score, before, before_scores)
                )
                self.sentence = self.sentence[keep]
        self.total = total
        self.text = torch.cat((_pick(before, slot), token[..., None]), dim=-1)
        self.scores = torch.cat((_pick(before_scores, slot), score[..., None]), dim=-1)
        if self.sentence.numel():
            first = torch.arange(len(slot), device=slot.device) if keep is None else keep
            self.session.keep((first[:, None] * width + slot).flatten(), keep)

    def _candidates(self) -> tuple[_Texts, _Texts]:
        """The best continuations that do not end, best first, and the ends of all slots."""
        logits, (count, width, _) = self.logits, self.text.shape
        each = min(self.search.size, logits.shape[-1])
        values, tokens, partition = self.ranking(logits, each)
        values, tokens = values.view(count, width, each), tokens.view(count, width, each)
        end = (logits[:, self.start.tokens.eos, None] - partition).view(count, width)
        if not self.may_end:
            end = torch.full_like(end, -torch.inf)
        if self.place < self.bounds.longest:
            given = self.place < self.start.length[self.sentence]
            # A given token costs nothing, and a sentence has one beginning until its prefix ends.
            column = min(self.place, self.start.prefix.shape[1] - 1)
            forced = self.start.prefix[self.sentence, column]
            tokens = torch.where(given[:, None, None], forced[:, None, None], tokens)
            only = torch.full_like(values, -torch.inf)
            only[:, 0, 0] = 0.0
            values = torch.where(given[:, None, None], only, values)
            end = end.masked_fill(given[:, None], -torch.inf)
        sums = (self.total[:, :, None] + values).flatten(1)
        total, index = top(sums, min(self.search.size, sums.shape[1]))
        going_on = _Texts(total, index // each, tokens.flatten(1).gather(1, index), values.flatten(1).gather(1, index))
        slots = torch.arange(width, device=end.device).expand_as(end)
        return going_on, _Texts(self.total + end, slots, torch.full_like(slots, self.start.tokens.eos), end)

    def _set_aside(self, going_on: _Texts, ending: _Texts, written: Tensor, limit: Tensor) -> _Texts:
        """Set aside what ends or is cut, if it is among the best of all; returns what goes on."""
        both = torch.cat((going_on.total, ending.total), dim=1)
        least = both.topk(min(self.search.size, both.shape[1]), dim=1).values[:, -1:]
        cut = (written >= limit)[:, None]
        ends = (ending.total >= least) & (ending.total > -torch.inf)
        over = torch.cat((cut & (going_on.total >= least) & (going_on.total > -torch.inf), ends), dim=1)
        if over.device.type == "cpu" and not bool(over.any()):
            return going_on
        key = (both.double() / self.search.penalty.divisor(written.clamp_min(1))[:, None]).masked_fill(
            ~over, -torch.inf
        )
        slot, token, score = (torch.cat(pair, dim=1) for pair in zip(going_on[1:], ending[1:], strict=True))
        text = torch.cat((_pick(self.text, slot), token[..., None]), dim=-1)
        scores = torch.cat((_pick(self.scores, slot), score[..., None]), dim=-1)
        is_end = torch.arange(over.shape[1], device=over.device) >= going_on.total.shape[1]
        self.done.add(self.sentence, key, is_end.expand_as(over), text, scores)
        return going_on._replace(total=going_on.total.masked_fill(cut, -torch.inf))

    def _goes_on(self, best: Tensor, written: Tensor, limit: Tensor) -> Tensor:
        """Bool[b]: whether a sentence whose best live sum is `best` is searched further."""
        search = self.search
        if search.early_stopping == "never":
            reach = best_possible(search.penalty, best, written.clamp_min(0), limit)
            improves = reach > self.done.bar(self.sentence, search.num_return)
        else:
            worst = self.done.bar(self.sentence, search.size)
            improves = worst == -torch.inf  # fewer texts than the beam is wide
            if not search.early_stopping:
                improves |= best.double() / search.penalty.divisor(written.clamp_min(1)) > worst
        return (best > -torch.inf) & improves


def _pick(values: Tensor, slot: Tensor) -> Tensor:
    """Rows `slot` Int64[b, c] of `values` [b, w, t]."""
    return values.gather(1, slot[..., None].expand(-1, -1, values.shape[2]))
