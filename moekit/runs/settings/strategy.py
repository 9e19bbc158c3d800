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
        expert_parallel_size: number of processes that divide the experts of every layer; "auto" = as many as fit.
        tensor_parallel_size: number of processes that divide heads, hidden channels and vocabulary; they read the same
            batch.
        replicas: number of copies of the model, within each of which ZeRO divides.
        zero_stage: what the processes of a replica divide: 0 nothing, 1 optimizer state, 2 and gradients, 3 and
            weights.
        offload: what is kept in host memory: none, the optimizer, or all parameters.
        nonfinite_gradients: what happens when the gradient norm is not a number: raise = the run ends, skip = the step
            is left out.
        asynchronous_save: whether training goes on while a checkpoint is written.
        empty_init: build the model without memory and draw its weights block by block, for a model that no process
            could hold; its weights then begin with other draws than those of a run without.
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
