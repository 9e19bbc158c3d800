"""BASE layers: a linear assignment gives every expert equally many tokens in training; no loss is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from moekit.functional.means import masked_mean
from moekit.functional.precision import float32_linear
from moekit.kernels.balanced_assignment import balanced_assignment
from moekit.routers.queueing import clear_padding, routing_of_choices
from moekit.routers.rank_shuffle import RankShuffle
from moekit.routing import Capacity, Compensation, Router, Routing, RoutingContext

EvalAssignment = Literal["greedy", "balanced"]
"""How evaluation chooses: each token its best expert, or by the assignment of training."""


class BASELayerRouter(Router):
    """One expert per token: in training by balanced assignment, in evaluation the one with the best score.

    scores = x W_r. Training: the experts a_t that maximise sum_t scores[t, a_t] while every expert gets T / E of the
    batch's real tokens (floor or ceil where E does not divide T). Evaluation: a_t = argmax. Weight = sigmoid(score of
    a_t). The assignment has no gradient: x and W_r learn through the weight alone. Which of the two it is depends on
    ``self.training`` and on nothing else; ``eval_assignment="balanced"`` makes evaluation balance as well.

    With `moekit.experts.BASELayerStack`, which returns what its blocks add, and the residual around the layer:

        y_t = x_t + sigmoid(x_t . w_{a_t}) (f_{a_t}(x_t) - x_t)

    Causality: in training the assignment weighs a token against later ones, so `looks_ahead` is True and a causal
    decoder wants ``allow_future=True``. The paper trains language models so and accepts it; its evaluation, like the
    default of this one, is greedy, where a token's expert depends on that token alone. A balanced evaluation looks
    ahead too: it tells how much the greedy choice costs a trained model, and is no score of a language model.

    A balanced routing has a capacity of ceil(T / E), at which nothing is ever dropped: shapes are static. With a
    `shuffle` over several ranks the load of training is balanced over them together, and the routing of one rank is
    dropless; in evaluation, where ranks may have different numbers of batches, each rank balances its own tokens.

    Args:
        dim: D.
        num_experts: E.
        init_gain: the rows of W_r, one centroid per expert, start orthogonal with this norm.
        shuffle: mixes the assignment problems of several ranks in training; None = each rank balances its own tokens.
        eval_assignment: "greedy" (the paper's) or "balanced" in evaluation.
        allow_future: accept the balanced assignment in a causal decoder.

    Returns in `Routing.losses`: nothing; in `Routing.statistics`: ``greedy_agreement``, the share of real tokens that
    are at their best expert (1 where the choice is greedy).

    Raises:
        ValueError: if `dim` or `num_experts` is less than 1, or `eval_assignment` is neither.

    Source: arXiv:2103.16716 eq. 1 and assignment in training and at test; sigmoid, initialisation (gain 0.1) and the
        form of y as in the authors' code. Differs: eq. 1 adds x once more, outside; the code does not. The assignment
        is exact (theirs is an auction that ends near it), and padding takes no part in it. Their code takes the
        assignment in training from whether its input requires a gradient, so a frozen trunk makes it greedy.
    """

    expert_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    shown = ("dim", "num_experts", "shuffle", "eval_assignment")
    looks_ahead = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        init_gain: float = 0.1,
        shuffle: RankShuffle | None = None,
        eval_assignment: EvalAssignment = "greedy",
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1 or num_experts < 1:
            raise ValueError(f"BASELayerRouter needs dim and num_experts of at least 1: got {dim} and {num_experts}.")
        if eval_assignment not in get_args(EvalAssignment):
            raise ValueError(
                f'BASELayerRouter.eval_assignment must be "greedy" or "balanced": got {eval_assignment!r}.'
            )
        self.dim, self.num_experts, self.init_gain = dim, num_experts, init_gain
        self.shuffle, self.eval_assignment, self.allow_future = shuffle, eval_assignment, allow_future
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the centroids anew: orthogonal, of norm `init_gain`."""
        if not self.weight.is_meta:
            drawn = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
            self.weight.copy_(nn.init.orthogonal_(drawn, gain=self.init_gain))

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: one expert, with the sigmoid of its own score; nothing is needed."""
        return Compensation.of_best(1, copies, divided=False)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        mask = None if context is None else context.mask
        logits = float32_linear(clear_padding(x, mask), self.weight)
        scores = logits.detach()
        best = scores.argmax(-1)
        capacity, expert = Capacity(), best
        if self.training and self.shuffle is not None and self.shuffle.num_ranks > 1:
            expert = self._assign_shuffled(self.shuffle, scores, mask).clamp_min(0)
        elif self.training or self.eval_assignment == "balanced":
            expert = balanced_assignment(scores, mask).clamp_min(0)
            capacity = Capacity(train=1.0, eval=1.0, minimum=1)
        return routing_of_choices(
            expert,
            logits.gather(1, expert[:, None]).sigmoid().squeeze(1),
            self.num_experts,
            mask=mask,
            capacity=capacity,
            training=self.training,
            statistics={"greedy_agreement": masked_mean((expert == best).to(torch.float32), mask)},
        )

    @staticmethod
    def _assign_shuffled(shuffle: RankShuffle, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Int64[T], -1 at padding; balanced over the ranks of `shuffle` together."""
        if mask is None:
            return shuffle.assign(scores, balanced_assignment)
        real = mask.nonzero().squeeze(1)  # host read: how many scores are sent
        chosen = shuffle.assign(scores[real], balanced_assignment)
        return torch.full(mask.shape, -1, dtype=torch.int64, device=scores.device).scatter(0, real, chosen)


def base_layers(
    dim: int,
    num_experts: int,
    *,
    shuffle: RankShuffle | None = None,
    eval_assignment: EvalAssignment = "greedy",
    allow_future: bool = False,
) -> BASELayerRouter:
    """BASE layers: balanced assignment in training, greedy at test (`eval_assignment`), sigmoid gate, no loss.

    Its bank is `moekit.experts.BASELayerStack`. The paper has one expert per worker, mixes the tokens of all ranks
    before the assignment (``shuffle=RankShuffle()``), trains causal decoders so (``allow_future=True``), and clips
    gradients by the norm of shared parameters alone.

    Source: arXiv:2103.16716.

    Example:
        >>> import torch
        >>> import moekit as mk
        >>> moe = mk.MoELayer(mk.routers.base_layers(16, 4), mk.experts.BASELayerStack(4, 16, 64, num_layers=2))
        >>> x = torch.randn(2, 20, 16)
        >>> y = x + moe.train()(x).hidden
        >>> mk.routing_stats(moe(x).routing).load
        tensor([10, 10, 10, 10])
    """
    return BASELayerRouter(
        dim, num_experts, shuffle=shuffle, eval_assignment=eval_assignment, allow_future=allow_future
    )
