"""Balanced assignment: every token to one expert, every expert equally many tokens, the sum of scores maximal.

The classic way expands each expert into T/E slots and solves a T x T assignment problem. But only E nodes matter: start
where every token has its best expert, and while some expert has too many, find the cheapest chain of moves
expert -> expert -> ... that ends at one with too few, and move one token along each step (successive shortest paths of
the transportation problem). Prices that nearly balance the loads, found first, leave a handful of chains to find.

Scores become whole numbers before anything is decided, so that sums are exact, ties are ties, and no rounding makes a
cycle of moves look profitable.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Longer than any chain, and small enough that two of them add up in 64 bits.
_FAR = 1 << 60
# Temperatures of the smoothed problem, in units of a token's typical spread of scores, and Newton steps at each.
_TEMPERATURES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_STEPS = 3


def balanced_assignment(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Assign each token to one expert so that loads differ by at most one and the sum of scores is as large as can be.

    n real tokens give each of E experts floor(n / E) or ceil(n / E) tokens; which experts get the one more is part of
    what is optimised. Any n and any E: also fewer tokens than experts, or none.

    Args:
        scores: Float[T, E]. NaN and -inf count as the lowest finite score, +inf as the highest.
        mask: Bool[T], real tokens; None = all are.

    Returns:
        Int64[T], the expert of each token, on the device of `scores`; -1 where it is masked. The same for the same
        scores, without any draw of random numbers. No gradient.

    Raises:
        ValueError: if `scores` is not a matrix with at least one column, or `mask` does not fit.

    The optimum is exact for scores rounded to 2**-50 of the largest difference within a token's row (2**-49 from 1,024
    experts on, and so forth). It is computed on the CPU.

    Source: arXiv:2103.16716 (assignment during training). Differs: exact, by successive shortest paths on the
        E experts, where the authors run an auction that ends near the optimum; T need not be a multiple of E.

    Example:
        >>> import torch
        >>> balanced_assignment(torch.tensor([[3.0, 0.0], [2.0, 1.0], [5.0, 4.5], [1.0, 0.0]]))
        tensor([0, 1, 1, 0])
    """
    check_scores(scores, mask)
    device = scores.device
    values = scores.detach().cpu()
    if mask is None:
        return _solve(whole_scores(finite_scores(values))).to(device)
    real = mask.cpu().nonzero().squeeze(1)
    out = torch.full((scores.shape[0],), -1, dtype=torch.int64, device="cpu")
    out[real] = _solve(whole_scores(finite_scores(values[real])))
    return out.to(device)


def check_scores(scores: Tensor, mask: Tensor | None) -> None:
    """Check that `scores` is a matrix with a column and that `mask` has one truth value per row.

    Raises:
        ValueError: if `scores` is no matrix, or the mask does not fit it.
    """
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(
            f"balanced_assignment needs scores Float[T, E] of at least one expert: got shape {tuple(scores.shape)}. "
            "Give one row per token and one column per expert."
        )
    if mask is not None and (mask.shape != scores.shape[:1] or mask.dtype != torch.bool):
        raise ValueError(
            f"balanced_assignment needs a mask Bool[T], True for a real token: got {mask.dtype} of shape "
            f"{tuple(mask.shape)} for {scores.shape[0]} tokens."
        )


def finite_scores(scores: Tensor) -> Tensor:
    """Float scores without NaN (lowest), -inf (lowest) and +inf (highest); zeros where nothing is finite."""
    finite = scores.isfinite()
    if bool(finite.all()):
        return scores
    if not bool(finite.any()):
        return torch.zeros_like(scores)
    lowest, highest = scores[finite].aminmax()
    return scores.nan_to_num(nan=float(lowest), posinf=float(highest), neginf=float(lowest))


def score_bits(num_experts: int) -> int:
    """Bits of a whole score, so few that the sum of a chain through all experts fits into 64."""
    return min(50, 60 - num_experts.bit_length())


def whole_scores(scores: Tensor) -> Tensor:
    """Int64[T, E]: how much worse than its best each expert is for each token; 0 is best, others are negative."""
    wide = scores.double()
    if wide.numel() == 0:
        return wide.to(torch.int64)
    # Halved first: the difference of two finite numbers may be infinite.
    regret = wide.amax(1, keepdim=True) / 2 - wide / 2
    span = float(regret.max())
    if span == 0.0:
        return torch.zeros(wide.shape, dtype=torch.int64, device="cpu")
    return (regret / span * -(2.0 ** score_bits(wide.shape[1]))).round().to(torch.int64)


def _solve(scores: Tensor) -> Tensor:
    """The optimum for Int64[T, E] scores on the CPU."""
    t, e = scores.shape
    if t == 0 or e == 1:
        return torch.zeros(t, dtype=torch.int64, device="cpu")
    price = torch.zeros(e, dtype=torch.int64, device="cpu")
    load = torch.bincount(scores.argmax(1), minlength=e)
    if int((load - -(-t // e)).clamp_min(0).sum()) > e:
        price = _prices(scores)
    return _Transport(scores, price).run()


def _prices(scores: Tensor) -> Tensor:
    """Int64[E]: prices under which the tokens' best choices are nearly balanced.

    They minimise the dual sum_t max_e(score - price) + T/E sum_e price with the maximum smoothed by a temperature that
    falls: a few damped Newton steps at each, of an E x E system. Nothing hangs on their exactness.
    """
    t, e = scores.shape
    unit = float(scores.double().std(1).mean())
    if unit == 0.0:
        return torch.zeros(e, dtype=torch.int64, device="cpu")
    values = (scores.double() / unit).float()
    share = t / e
    ridge = torch.eye(e, dtype=torch.float64, device="cpu") * share * 1e-2
    price = torch.zeros(e, dtype=torch.float64, device="cpu")
    for temperature in _TEMPERATURES:
        for _ in range(_STEPS):
            probs = ((values - price.float()) / temperature).softmax(1)
            load = probs.sum(0).double()
            curvature = (load.diag() - (probs.t() @ probs).double() + ridge) / temperature
            step = torch.linalg.solve(curvature, load - share)
            largest = float(step.abs().max())
            price += step * min(1.0, 4.0 * temperature / max(largest, 1e-300))
    price = (price - price.min()).nan_to_num(0.0) * unit
    return price.round().to(torch.int64)


class _Transport:
    """Successive shortest paths on E experts and, where T is no multiple of E, one more node.

    Every expert has a target: floor(T / E), or one more for T mod E of them. Node E passes that one more on: reaching
    it from an expert raises that expert's target, leaving it to an expert lowers that one's, at no cost.

    The start is optimal for its own loads, whatever the prices: every token sits at its best expert under the prices,
    and the dearest experts have the higher targets. Each shortest chain keeps that so.
    """

    def __init__(self, scores: Tensor, price: Tensor) -> None:
        self.scores = scores
        t, e = scores.shape
        self.num_experts = e
        self.floor, self.extra = divmod(t, e)
        self.expert = (scores - price).argmax(1)
        self.target = torch.full((e,), self.floor, dtype=torch.int64, device="cpu")
        self.target[price.argsort(descending=True, stable=True)[: self.extra]] += 1
        nodes = e + (self.extra > 0)
        # cost[u, v]: what is lost by moving that token of u to v which loses least.
        self.cost = torch.full((nodes, nodes), _FAR, dtype=torch.int64, device="cpu")
        for u in range(e):
            self._update_costs(u)
        self._update_targets()

    def run(self) -> Tensor:
        """Int64[T]: the optimal experts."""
        surplus = self._surplus()
        while bool((surplus > 0).any()):
            self._move_along(self._shortest_chain(surplus), surplus)
            surplus = self._surplus()
        return self.expert

    def _surplus(self) -> Tensor:
        return torch.bincount(self.expert, minlength=self.num_experts) - self.target

    def _members(self, u: int) -> tuple[Tensor, Tensor]:
        """The tokens of expert u, and what each loses by moving to each expert."""
        token = (self.expert == u).nonzero().squeeze(1)
        rows = self.scores.index_select(0, token)
        return token, rows[:, u : u + 1] - rows

    def _update_costs(self, u: int) -> None:
        token, loss = self._members(u)
        e = self.num_experts
        self.cost[u, :e] = loss.amin(0) if token.numel() else _FAR
        self.cost[u, u] = _FAR

    def _update_targets(self) -> None:
        if self.extra:
            raised, e = self.target > self.floor, self.num_experts
            self.cost[:e, e] = torch.where(raised, _FAR, 0)
            self.cost[e, :e] = torch.where(raised, 0, _FAR)

    def _shortest_chain(self, surplus: Tensor) -> list[int]:
        """Nodes of the cheapest chain from an expert with too many tokens to one with too few (Bellman-Ford)."""
        e, nodes = self.num_experts, self.cost.shape[0]
        distance = torch.full((nodes,), _FAR, dtype=torch.int64, device="cpu")
        distance[:e][surplus > 0] = 0
        before = torch.full((nodes,), -1, dtype=torch.int64, device="cpu")
        while True:
            through, last = (distance[:, None] + self.cost).min(0)
            better = through < distance
            if not bool(better.any()):
                break
            distance, before = torch.where(better, through, distance), torch.where(better, last, before)
        chain = [int(torch.where(surplus < 0, distance[:e], _FAR).argmin())]
        previous = before.tolist()
        while previous[chain[-1]] >= 0:
            chain.append(previous[chain[-1]])
        return chain[::-1]

    def _move_along(self, chain: list[int], surplus: Tensor) -> None:
        """Move a token along every step of the chain; several where equally good ones are at hand."""
        steps = list(itertools.pairwise(chain))
        many = min(int(surplus[chain[0]]), -int(surplus[chain[-1]]))
        moved: list[Tensor | None] = []
        for u, v in steps:
            if self.num_experts in (u, v):
                many = 1
                moved.append(None)
                continue
            token, loss = self._members(u)
            token = token[loss[:, v] == self.cost[u, v]]
            many = min(many, token.numel())
            moved.append(token)
        for (u, v), tokens in zip(steps, moved, strict=True):
            if tokens is not None:
                self.expert[tokens[:many]] = v
            elif v == self.num_experts:
                self.target[u] += 1
            else:
                self.target[v] -= 1
        for u in chain:
            if u < self.num_experts:
                self._update_costs(u)
        self._update_targets()
