"""What a strategy does in a step: ranks compare what they are about to do, and weights are gathered for the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import lightning as L
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from moekit.layer import moe_layers
from moekit.parallel.lockstep import Lockstep, Position
from moekit.parallel.mesh import EXPERT, SHARD, TENSOR
from moekit.parallel.sharding import ShardedModel

# The points at which ranks meet, beside the modules that communicate.
_BATCHES = {"train": "training batch", "validate": "validation batch", "test": "test batch", "predict": "batch"}
_POINTS = (
    *(f"{which} {batch}" for batch in _BATCHES.values() for which in ("a", "the last")),
    *("backward", "the optimizer's step", "the end of training"),
    *("a barrier", "a broadcast", "a reduction", "an all-gather"),
)
_STAGES = ("setup", "train", "validate", "test", "predict", "sanity_check")


class StepSync:
    """Ends a job with a message where its ranks would wait for each other in vain.

    Before every batch, backward, optimizer step, FSDP unit, layer that exchanges rows, and every call of the strategy
    that waits for all ranks, ranks compare what they are about to do: see `Lockstep`. In evaluation only those ranks
    compare whose forwards communicate, so the others may have other numbers of batches. Nothing is compared before
    `start`.
    """

    def __init__(self) -> None:
        self.lockstep: Lockstep | None = None  # the ring of ranks that compare; none before `start`, and in one process
        self.evaluators: tuple[int, ...] = ()  # the ranks that evaluate together with this one
        self._hooks: tuple[RemovableHandle, ...] = ()

    def start(self, sharded: ShardedModel, mode: Literal["batch", "module"]) -> None:
        """Compare from here on, until `stop`; in a job of one process do nothing.

        The units and sparse layers of the model are points at which ranks meet too; or, in the mode "batch", compare
        afterwards which ones they have passed.
        """
        model, meshes = sharded.module, sharded.meshes
        if self.lockstep is not None or meshes.layout.devices == 1:
            return
        names = {module: path for path, module in model.named_modules()}
        watched: dict[Any, str] = {}
        if meshes.layout.expert_parallel_size > 1:
            watched |= {layer: path for path, layer in moe_layers(model) if path}
        watched |= {unit: names[unit] for unit in sharded.units if names.get(unit)}
        lockstep = Lockstep((*_POINTS, *watched.values()), _STAGES, meshes.timeout, mode == "module")
        self._hooks = tuple(lockstep.watch(module, path) for module, path in watched.items())
        self.lockstep = lockstep
        together = meshes.dense[SHARD, TENSOR] if meshes.layout.zero_stage > 1 else meshes.sparse[EXPERT, TENSOR]
        self.evaluators = tuple(together.mesh.flatten().tolist())

    def stop(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.lockstep = (), None

    def meet(self, point: str) -> None:
        """Compare with all ranks what comes next; OutOfStepError if another does something else, or has stopped."""
        if self.lockstep is not None:
            self.lockstep.meet(point)

    def begin_batch(self, stage: str, trainer: Any) -> None:
        """Meet at a batch, and say whether another one follows: Lightning waits for all ranks before it takes that."""
        if self.lockstep is None:
            return
        loop = trainer._active_loop
        progress = getattr(loop, "epoch_loop", loop).batch_progress
        self.lockstep.position = Position(
            "sanity_check" if trainer.sanity_checking else stage,
            trainer.current_epoch,
            progress.current.ready - 1,
            trainer.global_step,
        )
        # Training that ends by its number of steps ends on all ranks, whatever they have left.
        ends = stage == "train" and -1 < trainer.max_steps <= trainer.global_step + 1
        which = "the last" if progress.is_last_batch and not ends else "a"
        self.lockstep.meet(f"{which} {_BATCHES[stage]}", None if stage == "train" else self.evaluators)

    def watched(self, ring: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """A context in which the ranks of `ring` (None = all) meet before every module that communicates."""
        return nullcontext() if self.lockstep is None else self.lockstep.step(ring)

    def end_evaluation_batch(self) -> None:
        """Forget the batch where only some ranks evaluate together: others may have other numbers of batches."""
        if self.lockstep is not None and len(self.evaluators) < self.lockstep.size:
            self.lockstep.position = dataclasses.replace(self.lockstep.position, batch=-1)
            self.lockstep.forget()

    def require_equal_batches(self, trainer: Any) -> None:
        """Refuse data loaders of different lengths before the first step.

        Raises:
            UserError: Naming ranks and numbers, if the shortest would end before training does.
        """
        if self.lockstep is None:
            return
        batches = float(trainer.num_training_batches)
        steps = batches // trainer.accumulate_grad_batches
        enough = trainer.max_steps != -1 and trainer.global_step + steps >= trainer.max_steps
        self.lockstep.require_equal(
            float("inf") if enough else batches,
            "training batches",
            "Use limit_train_batches={least}, drop_last=True, or a sampler that gives every rank as much.",
        )

    def note(self, exception: BaseException) -> None:
        """Add to an exception where this rank was."""
        if self.lockstep is not None:
            rank, size, position = self.lockstep.rank, self.lockstep.size, self.lockstep.position
            exception.add_note(f"Rank {rank} of {size} was at: {position}.")


class ManualOptimization:
    """Gathers weights again in a training step that goes forward after a backward or an optimizer step.

    Only a module with ``automatic_optimization = False`` does that. It may also toggle optimizers in between.
    """

    def __init__(self) -> None:
        self.active = False  # whether such a training step is running
        self.released = False  # whether the weights that were gathered for the step have been released since

    @contextmanager
    def step(self, module: L.LightningModule, sharded: ShardedModel) -> Iterator[None]:
        """Around a training step: forwards inside gather weights again where they were released."""
        if module.automatic_optimization:
            yield
            return
        inside = set(module.modules()) - {module}

        def gather(called: nn.Module, args: Any) -> None:
            if self.released and called in inside:
                self.gather_again(sharded)

        self.active = self.released = True
        handle = register_module_forward_pre_hook(gather)
        try:
            yield
        finally:
            self.active = False
            handle.remove()

    def gather_again(self, sharded: ShardedModel) -> None:
        """Gather the weights if such a step is running and they have been released."""
        if self.active and self.released:
            self.released = False
            sharded.gather_again()


def call_as_forward(module: L.LightningModule, model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of `module` as the forward of `model`, itself or a wrapper, so that weights are gathered for it."""
    before = module.__dict__.get("forward")

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.forward = before  # type: ignore[method-assign]

    def step(*args: Any, **kwargs: Any) -> Any:
        restore()  # the step may call the real forward
        return getattr(module, name)(*args, **kwargs)

    module.forward = step  # type: ignore[method-assign]
    try:
        return model(*args, **kwargs)
    finally:
        restore()
