"""What a strategy does in a step: run the module's step as its forward, on all ranks together or on none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from moekit.layer import moe_layers
from moekit.parallel.lockstep import Lockstep, Place
from moekit.parallel.mesh import EXPERT, SHARD, TENSOR, forget_groups
from moekit.parallel.sharding import ShardedModel

# What ranks meet at, beside the modules that communicate.
_BATCHES = {"train": "training batch", "validate": "validation batch", "test": "test batch", "predict": "batch"}
_POINTS = (
    *(f"{which} {batch}" for batch in _BATCHES.values() for which in ("a", "the last")),
    *("backward", "the optimizer's step", "the end of training"),
    *("a barrier", "a broadcast", "a reduction", "an all-gather"),
)
_STAGES = ("setup", "train", "validate", "test", "predict", "sanity_check")


class SteppingStrategy(ModelParallelStrategy):
    """Runs steps, and ends them with a message where ranks part; the base of `ExpertParallelStrategy`.

    Before every batch, backward, optimizer's step, unit that gathers weights, layer that exchanges rows, and every call
    of this class that waits for all ranks, ranks compare what they are about to do: see `Lockstep`. With
    ``lockstep="batch"`` they compare which units and layers they have passed afterwards. In evaluation only those
    compare whose forwards communicate, so the others may have other numbers of batches.
    """

    sharded: ShardedModel | None
    lockstep: Literal["batch", "module"] = "module"
    _lockstep: Lockstep | None = None
    _watching: tuple[RemovableHandle, ...] = ()
    _evaluators: tuple[int, ...] = ()
    _by_hand = _left_behind = False

    def _configure_launcher(self) -> None:
        """One process needs nobody who starts others, and so may live in a notebook."""
        if self.num_nodes * self.num_processes > 1:
            super()._configure_launcher()

    # -- together -----------------------------------------------------------------------------------------------------

    def _keep_in_step(self) -> None:
        """From here on ranks compare what they do, until `teardown`."""
        assert self.sharded is not None
        if self._watching or self.world_size == 1:
            return
        model, meshes = self.sharded.module, self.sharded.meshes
        names = {module: path for path, module in model.named_modules()}
        watched: dict[Any, str] = {}
        if meshes.layout.expert_parallel_size > 1:
            watched |= {layer: path for path, layer in moe_layers(model) if path}
        watched |= {unit: names[unit] for unit in self.sharded.units if names.get(unit)}
        each = self.lockstep == "module"
        lockstep = Lockstep((*_POINTS, *watched.values()), _STAGES, meshes.timeout, each)
        self._watching = tuple(lockstep.watch(module, path) for module, path in watched.items())
        self._lockstep = lockstep
        together = meshes.dense[SHARD, TENSOR] if meshes.layout.zero_stage > 1 else meshes.sparse[EXPERT, TENSOR]
        self._evaluators = tuple(together.mesh.flatten().tolist())

    def _meet(self, point: str, ring: Sequence[int] | None = None) -> None:
        if self._lockstep is not None:
            self._lockstep.meet(point, ring)

    def _begin(self, stage: str, ring: Sequence[int] | None = None) -> None:
        """Meet at a batch, and say whether another one follows: Lightning waits for all ranks before it takes that."""
        if self._lockstep is None:
            return
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        loop = trainer._active_loop
        progress = getattr(loop, "epoch_loop", loop).batch_progress
        self._lockstep.place = Place(
            "sanity_check" if trainer.sanity_checking else stage,
            trainer.current_epoch,
            progress.current.ready - 1,
            trainer.global_step,
        )
        # Training that ends by its number of steps ends on all ranks, whatever they have left.
        ends = stage == "train" and -1 < trainer.max_steps <= trainer.global_step + 1
        which = "the last" if progress.is_last_batch and not ends else "a"
        self._lockstep.meet(f"{which} {_BATCHES[stage]}", ring)

    @contextmanager
    def _watched(self, ring: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, ranks meet before every module that communicates."""
        if self._lockstep is None:
            yield
            return
        with self._lockstep.step(ring):
            yield

    def on_train_start(self) -> None:
        """Refuse loaders of different lengths before the first step.

        Raises:
            UserError: naming ranks and numbers, if the shortest would end before training does.
        """
        super().on_train_start()
        if self._lockstep is None:
            return
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        batches = float(trainer.num_training_batches)
        steps = batches // trainer.accumulate_grad_batches
        enough = trainer.max_steps != -1 and trainer.global_step + steps >= trainer.max_steps
        self._lockstep.require_equal(
            float("inf") if enough else batches,
            "training batches",
            "Use limit_train_batches={least}, drop_last=True, or a sampler that gives every rank as much.",
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """No rank has a batch that others do not have."""
        self._begin("train")
        super().on_train_batch_start(batch, batch_idx)

    def on_train_end(self) -> None:
        """No rank goes on when others have ended."""
        self._meet("the end of training")
        super().on_train_end()

    def on_exception(self, exception: BaseException) -> None:
        """Note where this rank was; groups in which a message may be left are not used again."""
        forget_groups()
        if self._lockstep is not None:
            exception.add_note(f"Rank {self.global_rank} of {self.world_size} was at: {self._lockstep.place}.")
        super().on_exception(exception)

    def teardown(self) -> None:
        """Let go of the model's hooks."""
        for handle in self._watching:
            handle.remove()
        self._watching, self._lockstep = (), None
        super().teardown()

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        self._meet("a barrier")
        super().barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What rank `src` has, on all ranks."""
        self._meet("a broadcast")
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean (or another reduction) over all ranks, or those of `group`."""
        if group is None and isinstance(tensor, Tensor):
            self._meet("a reduction")
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all ranks, or those of `group`."""
        if group is None:
            self._meet("an all-gather")
        return super().all_gather(tensor, group, sync_grads)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """No rank computes gradients alone."""
        self._meet("backward")
        if self._by_hand and self._left_behind:  # the second of two losses
            self._gather_again()
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """What was gathered for the step has been let go of."""
        super().post_backward(closure_loss)
        self._left_behind = True

    # -- steps --------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step as its forward, so that weights are gathered for it."""
        with self._watched(), self._in_several_passes(), self.precision_plugin.train_step_context():
            return self._as_forward("training_step", *args, **kwargs)

    @contextmanager
    def _in_several_passes(self) -> Iterator[None]:
        """A step by hand may go forward again after a backward or an optimizer's step, and toggle optimizers."""
        module: L.LightningModule | None = self.lightning_module
        assert module is not None
        if module.automatic_optimization:
            yield
            return
        inside = set(module.modules()) - {module}

        def gather(called: nn.Module, args: Any) -> None:
            if self._left_behind and called in inside:
                self._gather_again()

        self._by_hand = self._left_behind = True
        handle = register_module_forward_pre_hook(gather)
        try:
            yield
        finally:
            self._by_hand = False
            handle.remove()

    def _gather_again(self) -> None:
        assert self.sharded is not None
        self._left_behind = False
        self.sharded.gather_again()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step as its forward."""
        with self._evaluating("validate"), self.precision_plugin.val_step_context():
            return self._as_forward("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step as its forward."""
        with self._evaluating("test"), self.precision_plugin.test_step_context():
            return self._as_forward("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step as its forward."""
        with self._evaluating("predict"), self.precision_plugin.predict_step_context():
            return self._as_forward("predict_step", *args, **kwargs)

    @contextmanager
    def _evaluating(self, stage: str) -> Iterator[None]:
        """Weights gathered in inference mode could never be used in training again; and nothing else releases them."""
        assert self.sharded is not None
        self._begin(stage, self._evaluators)
        with (
            self._watched(self._evaluators),
            torch.inference_mode(False),
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            yield
        self.sharded.release_weights()
        if self._lockstep is not None and len(self._evaluators) < self.world_size:
            self._lockstep.place = dataclasses.replace(self._lockstep.place, batch=-1)  # others may have other numbers
            self._lockstep.forget()

    def _as_forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module: L.LightningModule | None = self.lightning_module
        assert module is not None
        assert self.model is not None
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
            return self.model(*args, **kwargs)
        finally:
            restore()
