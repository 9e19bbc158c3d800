"""`ExpertParallelStrategy`: expert parallelism, ZeRO, tensor slices and offload under any LightningModule."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric

from moekit.errors import UserError
from moekit.parallel.annotation import Annotation, banks, check_model, read_annotations
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.layout import Layout, Offload
from moekit.parallel.master_weights import model_parameter
from moekit.parallel.mesh import Meshes, World, build_meshes, forget_groups
from moekit.parallel.plan import ShardingPlan
from moekit.parallel.sharding import ShardedModel, parallelize, sharded
from moekit.routing import Router
from moekit.strategy_names import enter
from moekit.training.lightning_callbacks import divide_averages, on_several_meshes, restore_groups
from moekit.training.plain_data import plain_state
from moekit.training.refusals import check_batch_norms, check_callbacks, check_precision
from moekit.training.strategy_checkpoint import StrategyCheckpoints, check_checkpoints
from moekit.training.strategy_optimizers import OnNonFinite, OptimizerSteps
from moekit.training.strategy_steps import ManualOptimization, StepSync, call_as_forward
from moekit.transformer.init import materialize_modules

ZeroStage = Literal[0, 1, 2, 3]


class ExpertParallelStrategy(ModelParallelStrategy):
    """Train any LightningModule that contains `MoELayer`s on many processes, without a change to it.

    Processes are arranged as ``replicas x data x tensor``; expert groups lie inside the data ranks, which read
    different batches. Whatever the layout, losses, gradients, the clipped norm and weights are those of one process on
    all batches together, up to rounding.

    Args:
        expert_parallel_size: The number of ranks that divide the experts of every layer; "auto" = as many as divide
            both the data ranks and every layer's experts.
        tensor_parallel_size: The number of ranks, next to each other, that divide heads, hidden channels (of dense
            layers and of each expert) and the vocabulary; they read the same batch.
        replicas: The number of copies of the model within which ZeRO divides (HSDP), for zero_stage 2 and 3.
        zero_stage: What data ranks divide: 0 = nothing; 1 = optimizer state; 2 = that and gradients, with the weights
            gathered once a step; 3 = weights too, gathered layer by layer.
        offload: What is kept in host memory: "none", the "optimizer" (its state and copies of the weights), or all
            "parameters" (with gradients and optimizer).
        plan: Which axes are divided, which modules gather together, whether the all-to-all goes in two levels.
        nonfinite_gradients: What to do when the gradient norm is NaN or infinite, on all ranks together: "raise", or
            "skip" the step. A `NonFinite` callback of the Trainer decides in its place.
        asynchronous_save: Whether training goes on while a checkpoint's files are written.
        process_group_backend: The communication library; None = gloo on CPUs, and "cpu:gloo,cuda:nccl" on GPUs, so
            that ranks exchange host memory without waiting for a device.
        timeout: The time after which a collective that waits for other ranks gives up.
        lockstep: How often ranks compare what they are about to do: "module" = at every batch, backward, optimizer
            step and layer that communicates, a small message each over host memory; "batch" = not at layers, so that
            the host runs further ahead of a GPU, and a rank that skips a layer ends by the timeout or by an error of
            the communication library instead.
        accelerator: The kind of device; the Trainer sets it, as all arguments that follow.

    Raises:
        TypeError: If `expert_parallel_size` is no number and not "auto".
        ValueError: At construction, for values that no number of processes makes right; in setup, before anything is
            sent, if the layout does not fit the processes or the model, naming the nearest one that does.

    Gradient accumulation sends no gradients before the last micro-batch (stage 3 keeps them divided and sends); the
    norm of gradients is logged as ``train/grad_norm``. Under "bf16-true" routers keep float32 weights. A checkpoint is
    a folder that can be loaded in any other layout; `moekit.parallel.consolidate` makes one file of its weights.

    Source: E+D, E+Z, E+D+M, E+Z+M and E+Z-Off+M of arXiv:2109.10465 table 1. Differs: ZeRO reaches the experts too.

    Example:
        >>> L.Trainer(strategy=ExpertParallelStrategy(2, zero_stage=3), devices=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        expert_parallel_size: int | Literal["auto"] = "auto",
        *,
        tensor_parallel_size: int = 1,
        replicas: int = 1,
        zero_stage: ZeroStage = 3,
        offload: Offload = "none",
        plan: ShardingPlan | None = None,
        nonfinite_gradients: OnNonFinite = "raise",
        asynchronous_save: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        lockstep: Literal["batch", "module"] = "module",
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self._accelerator, self.precision_plugin = accelerator, precision_plugin
        self.parallel_devices, self.cluster_environment = parallel_devices, cluster_environment
        if expert_parallel_size != "auto" and (
            not isinstance(expert_parallel_size, int) or isinstance(expert_parallel_size, bool)
        ):
            raise TypeError(f'expert_parallel_size must be a number or "auto": got {expert_parallel_size!r}.')
        if lockstep not in ("batch", "module"):
            raise ValueError(f'lockstep must be "batch" or "module": got {lockstep!r}.')
        self.lockstep = lockstep
        self.expert_parallel_size, self.tensor_parallel_size = expert_parallel_size, tensor_parallel_size
        self.replicas, self.zero_stage, self.offload = replicas, zero_stage, offload
        self.plan = plan or ShardingPlan()
        # The smallest world on which the numbers could be right: whatever is wrong by itself is said now.
        expert = 1 if expert_parallel_size == "auto" else max(expert_parallel_size, 1)
        self._layout(expert * max(tensor_parallel_size, 1) * max(replicas, 1))
        self.sharded: ShardedModel | None = None
        self._world: World | None = None
        self._for_fit = ExitStack()  # what is changed outside of the strategy, until teardown
        self._sync, self._manual = StepSync(), ManualOptimization()
        self._optimization = OptimizerSteps(nonfinite_gradients)
        patience = (timeout or default_pg_timeout).total_seconds()
        self._checkpoints = StrategyCheckpoints(asynchronous=asynchronous_save, timeout=patience)

    inspects_gradients = True  # so that the callback `NonFinite` need not look for itself

    @property
    def gradient_norm(self) -> Tensor | None:
        """The norm of the gradients of the optimizer that is about to step, on all ranks; None outside of a step."""
        return self._optimization.norm

    @property
    def skipped_steps(self) -> int:
        """The number of optimizer steps that were skipped for their gradients."""
        return self._optimization.skipped

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Give Lightning the names ``expert_parallel`` and ``expert_parallel_zero0`` to ``3``, also ``_offload``."""
        enter(strategy_registry, cls)

    # -- processes and meshes ---------------------------------------------------------------------------------------

    def _layout(self, devices: int, expert: int | None = None) -> Layout:
        if expert is None:
            expert = 1 if self.expert_parallel_size == "auto" else self.expert_parallel_size
        return Layout(
            devices=devices,
            expert_parallel_size=expert,
            tensor_parallel_size=self.tensor_parallel_size,
            replicas=self.replicas,
            zero_stage=self.zero_stage,
            offload=self.offload,
        )

    def setup_environment(self) -> None:
        """Join the processes; `device_mesh` can be used from here on, also in ``configure_model``."""
        # Not the parent's own method, which arranges the processes in its way.
        check_precision(self.precision_plugin)
        self.set_world_ranks()
        self._layout(self.num_nodes * self.num_processes)
        joined = dist.is_initialized()
        self._setup_distributed()
        if not joined and self.root_device.type == "cuda":
            atexit.register(_destroy_dist_connection)  # as Lightning does where it is nccl alone
        self._world = World(self.root_device.type, self.tensor_parallel_size, self._timeout)
        self._device_mesh = self._module._device_mesh = self._world.data

    def _configure_launcher(self) -> None:
        """One process needs nobody who starts others, and so may live in a notebook."""
        if self.num_nodes * self.num_processes > 1:
            super()._configure_launcher()

    def _get_process_group_backend(self) -> str:
        default = "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else None
        return self._process_group_backend or default or super()._get_process_group_backend()

    @property
    def meshes(self) -> Meshes:
        """The meshes of the model; RuntimeError before setup."""
        return self._divided.meshes

    @property
    def _divided(self) -> ShardedModel:
        if self.sharded is None:
            raise RuntimeError("ExpertParallelStrategy has meshes after its setup: use them from on_fit_start on.")
        return self.sharded

    def check(self, model: nn.Module, devices: int) -> Layout:
        """The layout of a model over so many processes; nothing is sent, and no process group is needed.

        Raises:
            UserError: If the numbers, or the model, do not fit, naming the nearest layout that does.
        """
        found = read_annotations(model, self.plan)
        self._layout(devices)
        layout = self._layout(devices, self._choose_expert_size(model, found, devices))
        check_model(model, layout, self.plan, found)
        return layout

    def _choose_expert_size(self, model: nn.Module, found: list[Annotation], devices: int) -> int:
        """The largest size that divides the data ranks of a replica and the experts of every layer."""
        if self.expert_parallel_size != "auto":
            return self.expert_parallel_size
        whole = any(getattr(m, "requires_whole_bank", False) for m in model.modules())
        if whole or not banks(found):
            return 1
        sizes = [note.parameter.shape[note.axes.index("expert")] for note in found if note.of_expert]
        return math.gcd(devices // (self.tensor_parallel_size * self.replicas), *sizes)

    # -- setup ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer) -> None:
        """Divide the model, then make the optimizers."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if any(isinstance(module, FullyShardedDataParallel) for module in self._module.modules()):
            raise TypeError(
                "ExpertParallelStrategy divides a model with fully_shard: got modules wrapped in "
                "FullyShardedDataParallel. Remove the wrapping."
            )
        self._check_trainer(trainer)
        self._divide_model()
        move_unsharded_state(self._module, self.root_device)
        self._sync.start(self._divided, self.lockstep)
        divide_averages(trainer.callbacks, lambda model: self._parallelize(model, self.meshes))  # type: ignore[attr-defined]
        self.barrier()
        if self._fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._optimization.patch_clipping(self.precision_plugin)

    def _check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse what would be wrong, end training or be ignored; forget another model's optimizers."""
        module = self._module
        check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        if self._layer_sync is not None and self.world_size > 1:
            check_batch_norms(module)
        if self._fitting:
            check_checkpoints(trainer)
            return
        mine = set(map(id, module.parameters()))
        theirs = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        if not all(id(model_parameter(parameter)) in mine for parameter in theirs):
            self._reset_optimizers_and_schedulers()

    @property
    def _fitting(self) -> bool:
        return self._module.trainer.state.fn == TrainerFn.FITTING

    @property
    def _module(self) -> L.LightningModule:
        module = self.lightning_module
        assert module is not None
        return module

    def _divide_model(self) -> None:
        self.sharded = sharded(self._module)
        if self.sharded is not None:  # a second fit, or a test after it
            if self._fitting:
                self._require_layout(self.sharded.meshes.layout)
            return
        layout = self.check(self._module, self.world_size)
        self._convert_precision()
        assert self.model is not None
        assert self._world is not None
        self.sharded = self._parallelize(self.model, build_meshes(layout, self.root_device.type, self._world))

    def _require_layout(self, there: Layout) -> None:
        """Refuse to train a model that another strategy has divided in another way."""
        expert = there.expert_parallel_size if self.expert_parallel_size == "auto" else self.expert_parallel_size
        asked = self._layout(there.devices, expert)
        for name in ("expert_parallel_size", "tensor_parallel_size", "replicas", "zero_stage", "offload"):
            wanted, found = getattr(asked, name), getattr(there, name)
            optimizers_alone = {wanted, found} in ({0, 1}, {"none", "optimizer"})  # which have nothing to do with it
            if wanted != found and not optimizers_alone:
                raise UserError(
                    f"a model that was divided before must be trained in the same layout: {name} was {found!r}, got "
                    f"{wanted!r}. Save a checkpoint and load it into a new model, or make the new model from "
                    "moekit.parallel.gather_state_dict of this one."
                )

    def _parallelize(self, model: nn.Module, meshes: Meshes) -> ShardedModel:
        """Shard a model over the ranks; one on the meta device gets its weights block by block."""
        device = torch.device("cpu") if self.offload == "parameters" else self.root_device
        weights = None
        if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
            weights = materialize_modules(model, device)
        elif self.offload != "parameters":
            model.to(device)
        mixed = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        return parallelize(model, meshes, self.plan, compute_dtype=mixed, weights=weights)

    def _convert_precision(self) -> None:
        """What the precision asks for, except that routers stay in float32 where it is lower."""
        kept = [
            (tensor, tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)))
            for router in self._module.modules()
            if isinstance(router, Router)
            for tensor in [*router.parameters(), *router.buffers()]
            if tensor.is_floating_point()
        ]
        self.model = self.precision_plugin.convert_module(self._module)
        for tensor, value in kept:
            if torch.promote_types(tensor.dtype, value.dtype) != tensor.dtype:
                tensor.data = value

    def model_to_device(self) -> None:
        if self.offload != "parameters":  # which stay where they are
            super().model_to_device()

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Make the optimizers and schedulers, and bind them to the sharded parameters."""
        self._for_fit.enter_context(on_several_meshes(anomaly=trainer._detect_anomaly))
        super().setup_optimizers(trainer)
        if trainer.checkpoint_callbacks:
            for number, config in enumerate(trainer.lr_scheduler_configs):
                plain_state(config.scheduler.state_dict(), "lr_schedulers", number)
        device = torch.device("cpu") if self.offload == "optimizer" else None
        self._optimization.prepare(self.optimizers, self._divided, divide=self.zero_stage == 1, device=device)
        self.optimizers = self.optimizers  # Lightning's wrappers hold copies of the attributes

    def on_exception(self, exception: BaseException) -> None:
        """Note where this rank was; forget groups in which a message may be left, and a checkpoint that was refused."""
        if self.lightning_module is not None:  # the Trainer would load it into the next model that it is given
            self.lightning_module.trainer._checkpoint_connector._loaded_checkpoint = {}
        forget_groups()
        self._sync.note(exception)
        super().on_exception(exception)

    def teardown(self) -> None:
        self._for_fit.close()
        self._checkpoints.checkpointer.wait()
        self._sync.stop()
        super().teardown()

    # -- collectives ------------------------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        self._sync.meet("a barrier")
        super().barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self._sync.meet("a broadcast")
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if group is None and isinstance(tensor, Tensor):
            self._sync.meet("a reduction")
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if group is None:
            self._sync.meet("an all-gather")
        return super().all_gather(tensor, group, sync_grads)

    # -- steps ------------------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank but tensor-parallel partners reads its own share of the data."""
        mesh = self.device_mesh["data_parallel"]
        return {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()}

    def on_train_start(self) -> None:
        super().on_train_start()
        self._divided.forget_gradients()  # a fit before may have ended between two steps
        self._sync.require_equal_batches(self._module.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._sync.begin_batch("train", self._module.trainer)
        super().on_train_batch_start(batch, batch_idx)

    def on_train_end(self) -> None:
        self._sync.meet("the end of training")
        super().on_train_end()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        manual = self._manual.step(self._module, self._divided)
        with self._sync.watched(), manual, self.precision_plugin.train_step_context():
            return call_as_forward(self._module, self._divided.module, "training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validate", "validation_step", self.precision_plugin.val_step_context(), *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test", "test_step", self.precision_plugin.test_step_context(), *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("predict", "predict_step", self.precision_plugin.predict_step_context(), *args, **kwargs)

    def _evaluate(self, stage: str, name: str, precision: Any, *args: Any, **kwargs: Any) -> Any:
        self._sync.begin_batch(stage, self._module.trainer)
        with (
            precision,
            self._sync.watched(self._sync.evaluators),
            torch.inference_mode(False),  # weights gathered in inference mode could not be used in training again
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            result = call_as_forward(self._module, self._divided.module, name, *args, **kwargs)
        self._divided.release_weights()  # which backward does in training
        self._sync.end_evaluation_batch()
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients on their rank: all but the last micro-batch of a step run inside."""
        self._divided.communicate_gradients(False)
        try:
            yield
        finally:
            self._divided.communicate_gradients(True)

    def pre_backward(self, closure_loss: Tensor) -> None:
        self._sync.meet("backward")
        self._manual.gather_again(self._divided)  # for the second of two losses
        self._divided.join_backward(closure_loss)
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        self._manual.released = True  # by backward, the weights that were gathered for the step

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute gradients, inspect their norm on all ranks together, step."""
        module = self._module
        self._optimization.bind_new_groups(optimizer, self._divided)

        def inspected() -> Any:
            result = closure()
            if result is None and module.automatic_optimization:
                # training_step gave no loss, which Lightning refuses where there are several processes.
                self._divided.end_without_backward()
            self._sync.meet("the optimizer's step")
            self._optimization.inspect_gradients(optimizer, module)
            return result

        try:
            result = super().optimizer_step(optimizer, inspected, model, **kwargs)
        finally:
            self._optimization.forget_norm()
        if not module.automatic_optimization:
            self._divided.release_weights()  # what was gathered, perhaps after backward, is that of before the step
            self._manual.released = True
        return result

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Lightning's own, which is not used."""
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        raise TypeError(
            f"{type(self).__name__} writes checkpoints itself, as folders that every layout reads: got the plugin "
            f"{type(io).__name__}. Leave it out; asynchronous_save=True writes while training goes on."
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: Lightning hands back what `load_checkpoint` has returned, and hooks may have changed."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The sharded weights, for callbacks and hooks to look at and to change; nothing is gathered."""
        return self._divided.module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}  # `save_checkpoint` collects it

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any = None) -> None:
        """See `StrategyCheckpoints.save`."""
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes checkpoints itself and takes no storage_options.")
        self._checkpoints.save(checkpoint, self.broadcast(str(filepath)), self._divided.module, self.optimizers)

    def remove_checkpoint(self, filepath: PathLike) -> None:
        if self.is_global_zero:
            self._checkpoints.remove(filepath)

    def load_checkpoint(self, checkpoint_path: PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, for optimizers with the groups that they had. See `StrategyCheckpoints.read`."""
        if self._fitting:
            restore_groups(self._module.trainer, checkpoint_path)
        path = self.broadcast(str(checkpoint_path))
        return self._checkpoints.read(path, self._module, self.optimizers if self._fitting else [])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """See `StrategyCheckpoints.load_model`; what the optimizers cannot take is refused before it."""
        if self._fitting:
            self._checkpoints.check_optimizers(checkpoint, self.optimizers)
        self._checkpoints.load_model(checkpoint, self._module, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._checkpoints.load_optimizers(checkpoint, self.optimizers)


@torch.no_grad()
def move_unsharded_state(model: nn.Module, device: torch.device) -> None:
    """Move to `device` what stays behind where a strategy puts the weights in their places and never calls ``to``.

    That is where weights are kept in host memory, or the model was built on the meta device. Moved are the states of
    metrics, which are neither parameters nor buffers, and buffers that no unit of `fully_shard` has moved. A shared
    buffer stays shared. `device` of LightningModules and metrics then says where batches are.
    """
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Metric):
            module.to(device)
        if isinstance(module, _DeviceDtypeModuleMixin):
            module._device = device
        for name, buffer in module._buffers.items():
            if buffer is None or isinstance(buffer, DTensor) or buffer.is_meta or buffer.device == device:
                continue
            if buffer not in moved:
                moved[buffer] = buffer.to(device)
            module._buffers[name] = moved[buffer]
