"""Presets named after papers: `TopKRouter` with the values of the paper, each cited or called ours."""

from __future__ import annotations

from moekit.routers.exploration import InputJitter
from moekit.routers.second_expert import RandomChoice
from moekit.routers.topk import Balance, TopKRouter
from moekit.routing import Capacity, Priority, Share


def switch(
    dim: int,
    num_experts: int,
    *,
    capacity_factor: float | None = 1.25,
    eval_capacity_factor: float | None = None,
    jitter: float = 1e-2,
) -> TopKRouter:
    """Switch Transformer: one expert per token, served in token order, input jitter 1e-2.

    Weigh its losses with ``AuxLosses(load_balance=1e-2)``.

    Args:
        dim: D.
        num_experts: E.
        capacity_factor: 1.0, 1.25 and 2.0 are compared in arXiv:2101.03961 table 1; None = dropless.
        eval_capacity_factor: None = dropless evaluation (ours).
        jitter: arXiv:2101.03961 appendix C; value as in Mesh-TensorFlow. 0 = none.

    Source: arXiv:2101.03961.
    """
    return TopKRouter(
        dim,
        num_experts,
        capacity=Capacity(train=capacity_factor, eval=eval_capacity_factor, share="tokens"),
        exploration=InputJitter(jitter) if jitter else None,
    )


def gshard(
    dim: int,
    num_experts: int,
    *,
    capacity_factor: float | None = 1.0,
    eval_capacity_factor: float | None = None,
    group_size: int | None = None,
) -> TopKRouter:
    """GShard: two experts, weights renormalised before any drop, the second sent at random by its weight.

    Weigh its losses with ``AuxLosses(load_balance=1e-2)``.

    Args:
        dim: D.
        num_experts: E.
        capacity_factor: 1.0 gives the paper's C = 2 T / E (k = 2 is already in the formula); None = dropless.
        eval_capacity_factor: None = dropless evaluation (ours).
        group_size: S, tokens of a local group, each with 2 S / E slots and a balance loss of its own, of which the mean
            is taken (section 2.2); None = all tokens of a process are one group.

    Source: arXiv:2006.16668 Algorithm 1. Differs: its balance loss is ours divided by E**2.
    """
    return TopKRouter(
        dim,
        num_experts,
        k=2,
        capacity=Capacity(train=capacity_factor, eval=eval_capacity_factor, group_size=group_size),
        renormalise="before_drop",
        second_expert=RandomChoice(0.5),
        balance=Balance(scope="batch" if group_size is None else "group"),
        init_scale=1.0,
    )


def st_moe(
    dim: int,
    num_experts: int,
    *,
    k: int = 2,
    capacity_factor: float | None = 1.25,
    eval_capacity_factor: float | None = 2.0,
    capacity_share: Share = "tokens",
    threshold: float = 0.2,
    jitter: float = 0.0,
    batch_prioritised: bool = False,
    allow_future: bool = False,
) -> TopKRouter:
    """ST-MoE: two experts, the second sent with probability min(1, weight / threshold).

    Weigh its losses with ``AuxLosses(load_balance=1e-2, router_z=1e-3)``.

    Args:
        dim: D.
        num_experts: E.
        k: experts per token: 2 (section 4.2); 1 and 3 are compared in the same section. One expert's weight is its
            probability.
        capacity_factor: 1.25 (arXiv:2202.08906 section 4.2); None = dropless.
        eval_capacity_factor: 2.0, as in the paper; None = dropless.
        capacity_share: "tokens" = an expert has factor * T / E slots, as in the paper; "choices" = factor * k * T / E.
        threshold: 0.2 (appendix C).
        jitter: range of the noise that multiplies the router's input; 1e-2 is an arm of the paper's stability study
            (section 3), 0 the default.
        batch_prioritised: serve tokens by probability instead of position (appendix D; encoders only).
        allow_future: accept batch priority in a causal decoder.

    Source: arXiv:2202.08906. Differs: in evaluation the second expert is always sent; the authors' Mesh-TensorFlow
        code keeps it random.
    """
    return TopKRouter(
        dim,
        num_experts,
        k=k,
        capacity=Capacity(
            train=capacity_factor,
            eval=eval_capacity_factor,
            priority="probability" if batch_prioritised else "position",
            share=capacity_share,
        ),
        renormalise="before_drop" if k > 1 else "none",
        second_expert=RandomChoice(threshold),
        exploration=InputJitter(jitter) if jitter else None,
        balance=Balance(count="first"),
        allow_future=allow_future,
    )


def zcode_m3(
    dim: int,
    num_experts: int,
    *,
    capacity_factor: float | None = 1.0,
    eval_capacity_factor: float | None = None,
    jitter: float = 1e-2,
    priority: Priority = "random",
    allow_future: bool = False,
) -> TopKRouter:
    """Z-code M3: one expert per token, input jitter, random token selection when an expert overflows.

    Weigh its losses with ``AuxLosses(load_balance=1e-2)``. In a causal decoder random selection lets a token's
    survival depend (weakly) on later tokens, as in the original system: say ``allow_future=True`` there.

    Args:
        dim: D.
        num_experts: E.
        capacity_factor: 1.0, DeepSpeed's default; None = dropless, and then nothing is selected at random.
        eval_capacity_factor: None = dropless evaluation (ours).
        jitter: 1e-2 (DeepSpeed's "Jitter" policy). 0 = none.
        priority: "random" = random token selection; "position" = the first tokens stay, for comparison.
        allow_future: accept random selection in a causal decoder.

    Source: arXiv:2109.10465; minimum capacity 4 and random selection as in DeepSpeed's top-1 gate.
        Differs: in evaluation nothing is selected at random (DeepSpeed keeps it on).
    """
    return TopKRouter(
        dim,
        num_experts,
        capacity=Capacity(train=capacity_factor, eval=eval_capacity_factor, priority=priority),
        exploration=InputJitter(jitter) if jitter else None,
        allow_future=allow_future,
    )
