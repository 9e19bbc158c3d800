"""Mutual information of experts with what tokens are: how far experts specialise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHUFFLES = 10


@dataclass(frozen=True)
class MutualInformation:
    """Mutual information of a label and the expert, over assignments.

    Attributes:
        nats: the plug-in estimate from the table of counts, which is too large where cells are few.
        chance: its mean over tables whose experts were dealt to labels at random, rows and columns summing to the same:
            what an estimate of none comes to.
        above: nats - chance, the information that is reported.
        share: above over the entropy of the load: 0 = the label says nothing of the expert, 1 = it decides it.
        assignments: their number.
    """

    nats: float
    chance: float
    above: float
    share: float
    assignments: int


def mutual_information(counts: NDArray[np.int64], *, shuffles: int = SHUFFLES, seed: int = 0) -> MutualInformation:
    """Mutual information in nats, above a shuffled baseline.

    The baseline takes away the bias of the plug-in estimate, also where most cells of the table are empty, as those of
    a vocabulary are, for which corrections by the number of cells fail. It takes assignments for independent: those of
    one sentence are not, so a small positive rest is no proof.

    Args:
        counts: Int64[L, E], assignments by label and expert.
        shuffles: tables at random; 0 = no baseline.
        seed: of the shuffles.

    Source: shuffled baseline as in Panzeri et al., Journal of Neurophysiology 98 (2007), 1064-1072.
    """
    table = np.asarray(counts, dtype=np.int64)
    rows, columns = table.sum(1), table.sum(0)
    total = int(table.sum())
    nats = _plug_in(table)
    chance = 0.0
    if total and shuffles:
        labels = np.repeat(np.arange(len(rows)), rows)
        experts = np.repeat(np.arange(len(columns)), columns)
        random = np.random.default_rng(seed)
        found = []
        for _ in range(shuffles):
            cells = labels * len(columns) + random.permutation(experts)
            found.append(_plug_in(np.bincount(cells, minlength=table.size).reshape(table.shape)))
        chance = float(np.mean(found))
    share = columns[columns > 0] / max(total, 1)
    entropy = float(-(share * np.log(share)).sum())
    above = nats - chance
    return MutualInformation(nats, chance, above, above / entropy if entropy > 0 else 0.0, total)


def _plug_in(table: NDArray[np.int64]) -> float:
    total = table.sum()
    if not total:
        return 0.0
    rows, columns = np.nonzero(table)
    joint = table[rows, columns] / total
    expected = table.sum(1)[rows] / total * (table.sum(0)[columns] / total)
    return max(0.0, float((joint * np.log(joint / expected)).sum()))
