"""`ExpertParallelStrategy`: expert parallelism, ZeRO, tensor slices and offload under any LightningModule."""

from __future__ import annotations

import atexit
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel

from moekit.errors import UserError
from moekit.parallel.annotation import Annotation, banks, check_model, read_annotations
from moekit.parallel.layout import Layout, Offload
from moekit.parallel.mesh import Meshes, World, build_meshes
from moekit.parallel.plan import ShardingPlan
from moekit.parallel.sharding import ShardedModel, parallelize, sharded
from moekit.routing import Router
from moekit.training.lightning_callbacks import divide_averages
from moekit.training.placement import move_unsharded_state
from moekit.training.refusals import check_callbacks, check_precision
from moekit.training.strategy_optimizers import NonFinite, OptimizingStrategy
from moekit.transformer.init import materialize_modules

ZeroStage = Literal[0, 1, 2, 3]


class ExpertParallelStrategy(OptimizingStrategy):
    """Spread any LightningModule that contains `MoELayer`s over many processes, without a change to it.

    Processes are arranged as ``replicas x data x tensor``; expert groups lie inside the data ranks, which read
    different batches. Whatever the layout, losses, gradients, the clipped norm and weights are those of one process on
    all batches together, up to rounding.

    Args:
        expert_parallel_size: ranks that divide the experts of every layer. "auto" = as many as divide both the data
            ranks and every layer's experts.
        tensor_parallel_size: ranks, next to each other, that divide heads, hidden channels (of dense layers and of
            each expert) and the vocabulary; they read the same batch.
        replicas: copies of the model within which ZeRO divides (HSDP). For zero_stage 2 and 3.
        zero_stage: what data ranks divide. 0 = nothing; 1 = optimizer state; 2 = that and gradients, with the weights
            gathered once a step; 3 = weights too, gathered layer by layer.
        offload: what is kept in host memory: "none", the "optimizer" (its state and copies of the weights), or all
            "parameters" (with gradients and optimizer).
        plan: which axes are divided, which modules gather together, whether the all-to-all goes in two levels.
        nonfinite_gradients: what to do when the gradient norm is NaN or infinite, on all ranks together: "raise", or
            "skip" the step.
        asynchronous_save: whether training goes on while a checkpoint's files are written.
        process_group_backend: None = gloo on CPUs; on GPUs "cpu:gloo,cuda:nccl", so that what ranks tell each other of
            the host's makes nobody wait for a device.
        timeout: of collectives.
        lockstep: how often ranks compare what they are about to do: "module" = at every batch, backward, optimizer's
            step and layer that communicates, a small message each over host memory; "batch" = not at layers, so that
            the host runs further ahead of a GPU, and a rank that skips a layer ends by the timeout or by an error of
            the communication library instead.
        accelerator: as in `ParallelStrategy`, as all that follow; usually the Trainer's affair.
        parallel_devices: the devices of this node.
        cluster_environment: where the processes run.
        precision_plugin: the precision.

    Raises:
        ValueError: here, for values that no number of processes makes right; in setup, before anything is sent, if the
            layout does not fit the processes or the model, naming the nearest one that does.

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
        nonfinite_gradients: NonFinite = "raise",
        asynchronous_save: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        lockstep: Literal["batch", "module"] = "module",
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            nonfinite_gradients,
            asynchronous_save=asynchronous_save,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        ParallelStrategy.__init__(
            self,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
        )
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
        expert = 1 if expert_parallel_size == "auto" else expert_parallel_size
        self._layout(max(expert, 1) * max(tensor_parallel_size, 1) * max(replicas, 1), expert)
        self.sharded: ShardedModel | None = None
        self._world: World | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Give Lightning the names ``expert_parallel`` and ``expert_parallel_zero0`` to ``3``, also ``_offload``."""
        named: dict[str, dict[str, Any]] = {"expert_parallel": {}}
        named |= {f"expert_parallel_zero{stage}": {"zero_stage": stage} for stage in range(4)}
        named |= {
            "expert_parallel_zero1_offload": {"zero_stage": 1, "offload": "optimizer"},
            "expert_parallel_zero2_offload": {"zero_stage": 2, "offload": "optimizer"},
            "expert_parallel_zero3_offload": {"zero_stage": 3, "offload": "parameters"},
        }
        for name, options in named.items():
            if name not in strategy_registry:
                strategy_registry.register(name, cls, description=f"{cls.__name__}({options})", **options)

    # -- processes and meshes ---------------------------------------------------------------------------------------

    def _layout(self, devices: int, expert: int) -> Layout:
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
        known = 1 if self.expert_parallel_size == "auto" else self.expert_parallel_size
        check_precision(self.precision_plugin)
        self.set_world_ranks()
        self._layout(self.num_nodes * self.num_processes, known)
        joined = dist.is_initialized()
        self._setup_distributed()
        if not joined and self.root_device.type == "cuda":
            atexit.register(_destroy_dist_connection)  # as Lightning does where it is nccl alone
        self._world = World(self.root_device.type, self.tensor_parallel_size, self._timeout)
        self._device_mesh = self._world.data
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _get_process_group_backend(self) -> str:
        default = "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else None
        return self._process_group_backend or default or super()._get_process_group_backend()

    @property
    def meshes(self) -> Meshes:
        """The meshes of the model.

        Raises:
            RuntimeError: before setup.
        """
        if self.sharded is None:
            raise RuntimeError("ExpertParallelStrategy has meshes after its setup: use them from on_fit_start on.")
        return self.sharded.meshes

    def check(self, model: nn.Module, devices: int) -> Layout:
        """The layout of a model over so many processes; nothing is sent, and no process group is needed.

        Raises:
            UserError: if the numbers, or the model, do not fit, naming the nearest layout that does.
        """
        found = read_annotations(model, self.plan)
        known = 1 if self.expert_parallel_size == "auto" else self.expert_parallel_size
        self._layout(devices, known)
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

    def _model_modules(self) -> list[nn.Module]:
        assert self.model is not None
        return list(self.model.modules())

    # -- setup ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer) -> None:
        """Divide the model, then make the optimizers."""
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if any(isinstance(module, FullyShardedDataParallel) for module in self._model_modules()):
            raise TypeError(
                "ExpertParallelStrategy divides a model with fully_shard: got modules wrapped in "
                "FullyShardedDataParallel. Remove the wrapping."
            )
        check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        self.check_trainer(trainer)
        self._divide_model()
        move_unsharded_state(self.model, self.root_device)
        self._keep_in_step()
        assert self.sharded is not None
        meshes = self.sharded.meshes
        divide_averages(trainer.callbacks, lambda model: self._parallelize(model, meshes))  # type: ignore[attr-defined]
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._take_over_clipping()

    def _divide_model(self) -> None:
        assert self.model is not None
        assert self._world is not None
        self.sharded = sharded(self.model)
        if self.sharded is not None:  # a second fit, or a test after it
            assert self.lightning_module is not None
            if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
                self._require_layout(self.sharded.meshes.layout)
            return
        layout = self.check(self.model, self.world_size)
        self._convert_precision()
        self.sharded = self._parallelize(self.model, build_meshes(layout, self.root_device.type, self._world))

    def _require_layout(self, there: Layout) -> None:
        """Refuse to train a model that another strategy has divided in another way.

        Raises:
            UserError: naming the first setting that differs.
        """
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
        """Lay a model over the ranks; one on the meta device gets its weights block by block."""
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
        assert self.model is not None
        routers = [module for module in self._model_modules() if isinstance(module, Router)]
        kept = [
            (tensor, tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)))
            for router in routers
            for tensor in [*router.parameters(), *router.buffers()]
            if tensor.is_floating_point()
        ]
        self.model = self.precision_plugin.convert_module(self.model)
        for tensor, value in kept:
            if torch.promote_types(tensor.dtype, value.dtype) != tensor.dtype:
                tensor.data = value

    def model_to_device(self) -> None:
        """Move the model to this process's device; offloaded weights stay where they are."""
        if self.offload != "parameters":
            super().model_to_device()

    # -- steps ------------------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank but tensor-parallel partners reads its own share of the data."""
        mesh = self.device_mesh["data_parallel"]
        return {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()}

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients to oneself: all but the last micro-batch of a step run inside."""
        assert self.sharded is not None
        self.sharded.communicate_gradients(False)
        try:
            yield
        finally:
            self.sharded.communicate_gradients(True)
