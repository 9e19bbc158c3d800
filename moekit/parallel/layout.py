"""What is planned for: how devices share the model, and what one device does in a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from moekit.errors import UserError

Optimizer = Literal["adamw", "sgd", "momentum", "adafactor"]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How devices share a model, in the words of `ExpertParallelStrategy`.

    Attributes:
        devices: The number of processes, of one device each.
        expert_parallel_size: The number of devices among which the experts of a layer are divided.
        tensor_parallel_size: The number of devices among which attention heads, hidden channels (of experts too) and
            the vocabulary are divided.
        replicas: The number of copies of the model, among which nothing is divided.
        zero_stage: What data-parallel devices divide instead of repeating it: 0 nothing, 1 optimizer state, 2 that
            and gradients (and weights between steps), 3 weights in the step too.
        offload: What is kept in host memory: "none", the "optimizer" state, or all "parameters" with gradients and
            optimizer state.

    Raises:
        UserError: If the numbers do not fit together: sizes that do not divide the devices, or replicas with stage
            0 or 1, which repeat the weights on all data ranks anyway.
    """

    devices: int = 1
    expert_parallel_size: int = 1
    tensor_parallel_size: int = 1
    replicas: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 3
    offload: Offload = "none"

    def __post_init__(self) -> None:
        for name in ("devices", "expert_parallel_size", "tensor_parallel_size", "replicas"):
            if getattr(self, name) < 1:
                raise UserError(f"Layout.{name} must be at least 1: got {getattr(self, name)}.")
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"Layout.zero_stage must be 0, 1, 2 or 3: got {self.zero_stage!r}.")
        if self.offload not in ("none", "optimizer", "parameters"):
            raise UserError(f'Layout.offload must be "none", "optimizer" or "parameters": got {self.offload!r}.')
        if self.zero_stage < 2 and self.replicas > 1:
            raise UserError(
                f"replicas are for zero_stage 2 and 3: got {self.replicas} with zero_stage {self.zero_stage}, which "
                "repeats all weights on every data rank. Use replicas=1, or zero_stage=2."
            )
        size = self.replicas * self.expert_parallel_size * self.tensor_parallel_size
        if self.devices % size:
            free = max(self.devices // (self.replicas * self.tensor_parallel_size), 1)
            nearest = max(n for n in range(1, free + 1) if free % n == 0 and n <= self.expert_parallel_size)
            raise UserError(
                "expert_parallel_size * tensor_parallel_size * replicas must divide the number of processes: got "
                f"{self.expert_parallel_size} * {self.tensor_parallel_size} * {self.replicas} for {self.devices}. Use "
                f"expert_parallel_size={nearest}, or {size * max(1, self.devices // size)} processes."
            )

    @property
    def data_parallel_size(self) -> int:
        """Devices that read different tokens: all but tensor-parallel partners."""
        return self.devices // self.tensor_parallel_size

    @property
    def shard_size(self) -> int:
        """Devices among which ZeRO divides what every device would otherwise repeat (attention, tables, ...)."""
        return self.devices // (self.replicas * self.tensor_parallel_size)

    @property
    def expert_shard_size(self) -> int:
        """Devices that hold the same experts, among which ZeRO divides them."""
        return self.shard_size // self.expert_parallel_size

    def __str__(self) -> str:
        parts = ["1 device" if self.devices == 1 else f"{self.devices} devices"]
        sizes = {"expert": self.expert_parallel_size, "tensor": self.tensor_parallel_size, "replicas": self.replicas}
        parts += [f"{name} {size}" for name, size in sizes.items() if size > 1]
        parts.append(f"ZeRO {self.zero_stage}")
        if self.offload != "none":
            parts.append(f"{self.offload} offloaded")
        return ", ".join(parts)


def zero_dimension(shape: Sequence[int], taken: Collection[int], size: int) -> int | None:
    """Which dimension ZeRO divides among `size` ranks: an even one, not `taken` by experts or slices if possible.

    The first dimension may be uneven where it is free. None = there is no way.
    """
    even = [d for d, length in enumerate(shape) if length % size == 0]
    free = [d for d in even if d not in taken]
    if 0 in free:
        return 0
    if free:
        return max(free, key=lambda d: shape[d])
    if even:
        return max(even, key=lambda d: shape[d])
    return None if 0 in taken else 0


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes of a number, by its role.

    Attributes:
        name: The name that tables show.
        weight: Bytes of a weight between steps.
        compute: Bytes of an activation in a product.
        gathered: Bytes of a weight of a block while the block computes with it.
        converted: Bytes of the copy of a weight outside of blocks that products use, kept from forward to backward;
            0 = they use the weight.
        stream: Bytes of the residual stream, which norms read.
        gradient: Bytes of a gradient.
        master: Bytes of the master weight; 0 where the weight itself is that.
        state: Bytes of each of the optimizer's statistics.
    """

    name: str
    weight: int
    compute: int
    gathered: int
    converted: int = 0
    stream: int
    gradient: int
    master: int = 0
    state: int


PRECISIONS: dict[str, Precision] = {
    made.name: made
    for made in (
        Precision(name="32-true", weight=4, compute=4, gathered=4, stream=4, gradient=4, state=4),
        # Tables stay whole in the step, in float32, and autocast keeps a copy.
        Precision(name="bf16-mixed", weight=4, compute=2, gathered=2, converted=2, stream=4, gradient=4, state=4),
        Precision(name="bf16-true", weight=2, compute=2, gathered=2, stream=2, gradient=2, state=2),
    )
}
"""Lightning's precisions, as the Strategy runs them: the weights that an optimizer sees are what is stored."""

DEEPSPEED_FP16 = Precision(
    name="fp16 with master", weight=2, compute=2, gathered=2, stream=2, gradient=2, master=4, state=4
)
"""What DeepSpeed holds: half-precision weights and gradients, and float32 weights beside the optimizer's statistics.

Source: arXiv:1910.02054 section 3.1 (2 + 2 + 12 bytes a parameter with Adam).
"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one data-parallel device does in a step.

    Attributes:
        sequences: The number of sequences in a micro-batch.
        source_length: The tokens of an encoder's input, padding included.
        target_length: The tokens of a decoder's input.
        accumulate: The number of micro-batches per optimizer step.
        precision: "32-true", "bf16-mixed", "bf16-true", or a `Precision`.
        optimizer: "adamw" (two numbers a weight), "momentum" (one), "sgd" (none) or "adafactor" (a row and a column
            of a matrix).
        checkpointing: Whether blocks forget their activations and compute them again in backward.
        plain: Whether autocast converts the weights, as in training without the strategy; else `fully_shard` does.

    Raises:
        UserError: For unknown names and sizes below 1.
    """

    sequences: int = 8
    source_length: int = 256
    target_length: int = 256
    accumulate: int = 1
    precision: str | Precision = "bf16-mixed"
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.precision, str) and self.precision not in PRECISIONS:
            raise UserError(
                f"Training.precision must be one of {', '.join(PRECISIONS)} or a Precision: got {self.precision!r}."
            )
        if self.optimizer not in ("adamw", "sgd", "momentum", "adafactor"):
            raise UserError(f"Training.optimizer must be adamw, momentum, sgd or adafactor: got {self.optimizer!r}.")
        for name in ("sequences", "source_length", "target_length", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"Training.{name} must be at least 1: got {getattr(self, name)}.")

    @property
    def numbers(self) -> Precision:
        """The precision as an object."""
        return PRECISIONS[self.precision] if isinstance(self.precision, str) else self.precision

    @property
    def source_tokens(self) -> int:
        """Encoder tokens of a micro-batch."""
        return self.sequences * self.source_length

    @property
    def target_tokens(self) -> int:
        """Decoder tokens of a micro-batch."""
        return self.sequences * self.target_length
