"""Greedy decoding and sampling: one token per row and step, rows independent of each other."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekit.inference.interface import Generation, Search, Start, longest_text
from moekit.inference.ranking import Ranking
from moekit.inference.session import Session

# Chooses tokens Int64[R] by logits Float[R, V] for rows Int64[R] of [B * N] at a step; with their log-probabilities.
_Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Greedy:
    """The most probable token at every step. The score is the sum of log-probabilities."""

    def run(self, session: Session, start: Start) -> Generation:
        """Write one text per sentence."""
        ranking = Ranking(start.suppressed())

        def choose(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
            found = ranking(logits, 1)
            return found.tokens[:, 0], found.values[:, 0]

        return _write(session, start, 1, choose)


@dataclass(frozen=True)
class Sampling:
    """Tokens drawn from the model's distribution, sharpened and cut.

    A draw is a function of (seed, sentence number, sample number, step) alone: neither the cache nor sentences that
    finish change it, nor, where sentences come with their numbers in the whole input (`Start.numbers`), the batches
    that they are written in. The score is the sum of the model's own log-probabilities, without temperature and cuts.

    Args:
        temperature: logits are divided by it, a finite number above 0; the smallest ones leave the most probable token
            alone.
        top_k: only the k most probable tokens.
        top_p: then only the smallest set of most probable tokens that holds this much probability (nucleus,
            arXiv:1904.09751 section 3.1).
        samples: texts per sentence.
        seed: None = drawn from torch's global generator, for every batch or, of an input in batches, once.

    Raises:
        ValueError: if a number is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature):
            raise ValueError(f"Sampling.temperature must be a finite number above 0: got {self.temperature}.")
        if not self.temperature > 0:
            raise ValueError(f"Sampling.temperature must be positive: got {self.temperature}. Use Greedy() for 0.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampling.top_k must be at least 1 or None: got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p must be in (0, 1] or None: got {self.top_p}.")
        if self.samples < 1:
            raise ValueError(f"Sampling.samples must be at least 1: got {self.samples}.")

    def run(self, session: Session, start: Start) -> Generation:
        """Write `samples` texts per sentence, in the order drawn."""
        seed = self._some_seed()
        suppress = start.suppressed()
        sentences = start.prefix.shape[0]
        numbers = torch.arange(sentences, device=start.prefix.device) if start.numbers is None else start.numbers

        def choose(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
            allowed = logits.index_fill(-1, suppress, -torch.inf)
            uniform = _uniform(seed, numbers[rows // self.samples], step, rows % self.samples)
            token = self.pick(allowed, uniform)
            return token, allowed.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)

        return _write(session, start, self.samples, choose)

    def seeded(self) -> Sampling:
        """The same search with a seed, drawn now from torch's global generator if it has none."""
        return replace(self, seed=self._some_seed())

    def _some_seed(self) -> int:
        return int(torch.randint(2**62, ())) if self.seed is None else self.seed

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The tokens at which the cumulated probability passes `uniform` Float64[R] in [0, 1).

        Args:
            logits: Float[R, V].
            uniform: one number per row.
        """
        # With the maximum taken off, a quotient overflows only to -inf, whose probability is 0, as it should be. A GPU
        # multiplies by the reciprocal, which overflows for subnormal temperatures; the least normal one draws alike.
        values = logits.double()
        values = (values - values.amax(-1, keepdim=True)) / max(self.temperature, sys.float_info.min)
        if self.top_k is not None:
            values, order = values.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        elif self.top_p is not None:
            values, order = values.sort(dim=-1, descending=True, stable=True)
        else:
            order = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        total = values.softmax(-1).cumsum(-1)
        if self.top_p is not None:
            # A token stays while the more probable ones have not reached top_p; those after it add nothing.
            stays = torch.cat((torch.ones_like(total[:, :1], dtype=torch.bool), total[:, :-1] < self.top_p), -1)
            total = torch.where(stays, total, total.masked_fill(~stays, 0).amax(-1, keepdim=True))
        target = uniform[:, None].to(total.dtype) * total[:, -1:]
        place = torch.searchsorted(total, target, right=True).clamp_max(total.shape[-1] - 1)
        return order.gather(-1, place)[:, 0]


def one_seed(search: Search) -> Search:
    """The search for an input in several batches: a seed that is still to be drawn is drawn now, for all of them."""
    return search.seeded() if isinstance(search, Sampling) else search


def _uniform(seed: int, sentences: Tensor, step: int, samples: Tensor | None = None) -> Tensor:
    """Float64[R] in [0, 1): a hash of seed, sentence, sample (None = 0) and step.

    It is splitmix64, applied once for sentence and step; each sample begins with a seed of its own.
    """
    x = torch.full_like(sentences, seed % 2**63)
    if samples is not None:
        x = x + samples * -3372029247567499371
    for part in (sentences, torch.full_like(sentences, step)):
        x = x + (part + 1) * -7046029254386353131
        x = (x ^ _shift(x, 30)) * -4658895280553007687
        x = (x ^ _shift(x, 27)) * -7723592293110705685
        x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift Int64 to the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _write(session: Session, start: Start, samples: int, choose: _Choose) -> Generation:
    """Write `samples` texts for every sentence, a token at a time.

    Finished rows leave the batch when somebody looks (`Session.look_every`); until then what they write goes into a
    scratch column behind the texts.
    """
    tokens, device = start.tokens, start.prefix.device
    sentences = start.prefix.shape[0]
    bounds = start.bounds()

    # What every sentence has been given is read once, before its samples part.
    place = bounds.shortest
    text = start.prefix[:, :place]
    logits = session.logits(text)
    look = session.look_every(device)
    live = torch.arange(sentences * samples, device=device)
    owner = live // samples
    if samples > 1:
        session.keep(owner)
        logits, text = logits.index_select(0, owner), text.index_select(0, owner)
    prefix, given, limit = start.prefix[owner], start.length[owner], start.limit[owner]

    ids = torch.full((live.numel(), bounds.most + 1), tokens.pad, dtype=torch.int64, device=device)
    scores = torch.zeros(ids.shape, dtype=logits.dtype, device=device)
    wrote = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    last = given + limit  # where a text is cut
    going = torch.ones_like(live, dtype=torch.bool)
    for step in itertools.count(1):
        token, score = choose(logits, live, place)
        writes, stop = going, token == tokens.eos
        if place < bounds.longest:
            free = given <= place
            token = torch.where(free, token, prefix[:, min(place, prefix.shape[1] - 1)])
            writes, stop = going & free, free & stop
        column = torch.where(writes, place - given, bounds.most)
        ids[live, column], scores[live, column], wrote[live, column] = token, score, writes
        going = going & ~stop & (last > place + 1)
        place += 1
        if place == bounds.end:
            break
        text = torch.cat((text, token[:, None]), dim=1)
        if step % look == 0:
            keep = going.nonzero()[:, 0]  # host read: how many go on, at every look
            if not keep.numel():
                break
            if keep.numel() < live.numel():
                live, text, going = live[keep], text[keep], going[keep]
                prefix, given, last = prefix[keep], given[keep], last[keep]
                session.keep_each(keep)
        logits = session.logits(text)
    ids, scores, wrote = ids[:, : bounds.most], scores[:, : bounds.most], wrote[:, : bounds.most]
    lengths = wrote.sum(1)
    longest = longest_text(lengths, ~scores.isfinite().all(1))
    shape = (sentences, samples)
    return Generation(
        ids=ids[:, :longest].reshape(*shape, -1),
        lengths=lengths.reshape(shape),
        scores=scores.sum(-1).reshape(shape),
        token_scores=scores[:, :longest].reshape(*shape, -1),
        ended=(wrote & (ids == tokens.eos)).any(1).reshape(shape),
    )
