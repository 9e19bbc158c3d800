"""Profiles: an entity and several of its facts in a row, as an encyclopedia has them.

Their text is nearly all knowledge, where most of a sentence about one fact is name and grammar. So a model reads more
facts in as many tokens, and what it can hold is soon scarce.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LENGTH = 6  # facts of a profile; fewer where fewer are known
NOT_TOLD = 2.0  # the key of a relation that stands in no profile of the entity


def steps(probs: Floats) -> Floats:
    """Cumulative probabilities that end at exactly 1, so that no rounding can choose what has none."""
    found = np.cumsum(probs)
    return np.asarray(found / found[-1])


def in_order(keys: Floats) -> Ints:
    """Int64[n, LENGTH], from 1, the first relations by their keys Float64[n, R] below 1; 0 = no more."""
    relation = np.argsort(keys, axis=1)[:, :LENGTH]
    listed = np.where(np.take_along_axis(keys, relation, axis=1) < 1, relation + 1, 0)
    return np.pad(listed, ((0, 0), (0, LENGTH - listed.shape[1])))


class Profiles:
    """The profiles of text that tells facts with given probabilities.

    An entity is drawn as often as its facts are told; of those of its facts that are told at all, up to `LENGTH` follow
    in any order, all as likely.

    Args:
        probs: Float64[R, E], how often each fact is told by itself, by relation and entity; 0 = not at all.

    Attributes:
        entity_probs: Float64[E], the probability of each entity in a profile.
        told: Float64[R, E], how often a profile tells each fact, in the mean.
    """

    def __init__(self, probs: Floats) -> None:
        self.relations, _ = probs.shape
        self._allowed = probs > 0
        self._known: Ints = self._allowed.sum(axis=0)
        self._length = np.minimum(self._known, LENGTH)
        weight = probs.sum(axis=0)
        self.entity_probs: Floats = weight / max(weight.sum(), np.finfo(float).tiny)
        self.told: Floats = self._allowed * (self.entity_probs * self._length / np.maximum(self._known, 1))
        # -ln of the probability of each entity's profiles, which are all as likely.
        falling = self._known[:, None] - np.arange(LENGTH)
        used = np.arange(LENGTH) < self._length[:, None]
        with np.errstate(divide="ignore"):
            self._cost: Floats = np.log(np.where(used, falling, 1)).sum(axis=1) - np.log(self.entity_probs)

    def draw(self, generator: np.random.Generator, size: int) -> tuple[Ints, Ints]:
        """Entities Int64[size], and the relations of each profile from 1, Int64[size, LENGTH]; 0 = no more."""
        # Only `random` is drawn from: the streams of the other methods may change between numpy versions.
        entity = np.searchsorted(steps(self.entity_probs), generator.random(size), side="right")
        keys = generator.random((size, self.relations))
        return entity, in_order(np.where(self._allowed[:, entity].T, keys, NOT_TOLD))

    def information(self, entity: Ints) -> Floats:
        """-ln of the probability of profiles of these entities, to one who knows their facts."""
        return self._cost[entity]

    def entropy(self) -> float:
        """Mean nats of a profile, to one who knows the facts."""
        used = self.entity_probs > 0
        return float((self.entity_probs[used] * self._cost[used]).sum())
