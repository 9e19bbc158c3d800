"""How a model is spread over processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from moekit.errors import UserError
from moekit.training.strategy import ExpertParallelStrategy


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How a model is spread over processes (see --train.devices).

    Nothing given: every process holds the whole model (distributed data parallel). Anything given: the experts, and
    more, are divided; what is left open is then as in `moekit.ExpertParallelStrategy`.

    Attributes:
        expert_parallel_size: number of processes that share the experts of each layer (expert parallelism); "auto" =
            the largest that fits.
        tensor_parallel_size: number of processes that share attention heads, hidden channels and the vocabulary (tensor
            parallelism); they read the same batch, so keep them within a node.
        replicas: number of copies of the model (hybrid sharding, HSDP): ZeRO shards within each copy. For zero_stage 2
            and 3.
        zero_stage: what ZeRO shards over data-parallel processes: 0 = nothing, 1 = optimizer state, 2 = also gradients,
            3 = also weights.
        offload: what is kept in host memory: none, optimizer (its state and weight copies), or parameters (with
            gradients and optimizer state).
        nonfinite_gradients: reaction to a gradient norm that is NaN or infinite: raise ends the run, skip leaves out
            the step.
        asynchronous_save: whether training continues while a checkpoint is being written.
        empty_init: whether the model is built on the meta device and its weights are drawn block by block, for models
            too large for one process; the initial weights then differ from those of a run without it.
    """

    expert_parallel_size: int | Literal["auto"] | None = None
    tensor_parallel_size: int | None = None
    replicas: int | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload: Literal["none", "optimizer", "parameters"] | None = None
    nonfinite_gradients: Literal["raise", "skip"] | None = None
    asynchronous_save: bool | None = None
    empty_init: bool | None = None

    def strategy(self) -> ExpertParallelStrategy | Literal["auto"]:
        """The strategy of training; "auto" where nothing about it is set.

        Raises:
            UserError: values that do not go together.
        """
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if not given:
            return "auto"
        given.pop("empty_init", None)  # which says how the model is made
        try:
            return ExpertParallelStrategy(**given)
        except (ValueError, TypeError) as error:
            raise UserError(f"strategy: {error}") from None
