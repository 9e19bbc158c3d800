"""How training goes: its length, optimizer, schedule, the Trainer, and how the model is spread over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from moekit.errors import UserError
from moekit.kernels.gpu.backend import Backend, check_backend
from moekit.runs.settings.fields import RESUME, setting
from moekit.runs.settings.monitor import MonitorConfig
from moekit.training.budget import Budget
from moekit.training.checkpoint_io import AtomicCheckpointIO
from moekit.training.loggers import logger_names
from moekit.training.machine import require_machine, usable_accelerator
from moekit.training.optimizers import adafactor, adamw
from moekit.training.quiet import quiet
from moekit.training.schedules import ConstantWithWarmup, Cosine, InverseSquareRoot
from moekit.training.strategy import ExpertParallelStrategy

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, optimizer, schedule and devices of training.

    Attributes:
        max_steps: number of optimizer steps after which training ends; 0 = no limit.
        max_minutes: minutes after which training ends; 0 = no limit. With both limits the first one reached counts; the
            learning rate schedule follows max_steps if it is given, else max_minutes.
        optimizer: optimizer: adamw, or adafactor (used by T5; its steps are relative to the size of the weights).
        learning_rate: peak learning rate: 1e-3 to 3e-3 for small models with adamw; with adafactor T5 reaches 0.01 at
            the end of a warm-up of 10,000 steps.
        warmup_steps: optimizer steps over which the learning rate rises linearly to its peak. Not given, and no less
            than max_steps: a fifth of max_steps.
        schedule: shape of the learning rate after the warm-up: cosine (down to 5 percent of the peak),
            inverse_square_root or constant.
        weight_decay: weight decay, applied to matrices only; 0.01 to 0.1 is usual.
        betas: adamw's decay rates of the running averages of gradients and squared gradients; 0.9 and 0.98 are usual
            for transformers.
        clip: maximum gradient norm; larger gradients are scaled down to it. 1 is usual, 0 = no clipping.
        clip_update: maximum root mean square of an update with adafactor; 1 is usual, 0 = no clipping.
        label_smoothing: label smoothing of language modelling and sequence-to-sequence losses, as a share of
            probability; 0.1 is usual in translation, 0 in language modelling.
        accumulate: number of batches whose gradients are accumulated for one optimizer step.
        precision: number format as in Lightning: "32-true", "bf16-mixed", "bf16-true" or "auto" (bf16-mixed on GPUs
            that support bf16, else float32, with TF32 on GPUs that have it). A resumed run keeps the format it began
            with.
        expert_lr_multiplier: factor on the learning rate of expert weights; 1 = the same rate as other weights.
        scale_expert_gradients: whether gradients of experts are multiplied by the square root of the number of experts
            before clipping (arXiv:2112.10684). With adamw only the clipping is affected.
        validate_every: number of optimizer steps between validations; 0 = validate only at the end.
        best: validation metric by which the best checkpoint is chosen, as metrics.csv names it, such as valid/loss (of
            the first task, the default), valid/causal_lm/accuracy, or valid/bleu (which needs evaluate.score_valid).
        patience: number of validations in a row without a better value of that metric after which training ends; 0 =
            train to the end, 5 to 10 is usual.
        ema: decay of an exponential moving average of the weights, which is validated, tested and used in their place;
            0 = none, 0.999 is usual, 0.9999 for long training.
        average_last: number of validations, the last ones, whose weights are averaged at the end of training; the
            average is tested and used; 0 = none, 5 is usual in translation.
        loggers: where metrics go, as a list or joined by commas: csv (metrics.csv, always written), tensorboard, wandb
            and mlflow; auto = csv, and tensorboard where it is installed.
        checkpoint_minutes: minutes between checkpoints; 0 = by steps only. A checkpoint is also written on SIGTERM and
            at the end.
        checkpoint_steps: number of optimizer steps between checkpoints; 0 = by minutes only.
        on_non_finite: reaction to a loss or gradient that is NaN or infinite: stop ends the run and keeps the last good
            checkpoint, skip leaves out the step and stops after 10 of them in a row, ignore trains on.
        monitor: what is watched in training, and what a warning leads to.
        log_every: number of optimizer steps between rows of metrics.csv.
        record_routing: number of optimizer steps between records of routing, of validation text and of the batch that
            is trained on, which are kept in the folder routing_trace of the run and measured in its test, see `moekit
            routing`; 0 = none. The former are made in validations, so it needs validate_every.
        keep_memory: whether memory that tensors have freed is kept in the process, which saves page faults in
            every step on a CPU (glibc alone); false gives it back to the system.
        seed: random seed of initial weights, dropout, noise and routing.
        init_by_name: whether each module draws its initial weights from a random stream of its own, so that runs whose
            models differ in some modules begin alike in all others; for paired runs, as `ablate` makes them.
        devices: number of processes on each node, one per GPU; --devices is the short form.
        num_nodes: number of machines (nodes); --nodes is the short form.
        accelerator: hardware to train on: cpu, gpu, or auto = a CUDA or ROCm GPU if there is one, else the CPU. Apple's
            MPS is never used.
        backend: who computes sparse layers on a GPU: torch, triton, sonicmoe (a kernel of the Hugging Face hub, for
            gated experts in bf16), or auto = Triton where it is installed and expected to be faster.
    """

    max_steps: int = setting(1000, at_least=0, free=RESUME)
    max_minutes: float = setting(0.0, at_least=0, free=RESUME)
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = setting(2e-3, at_least=0)
    warmup_steps: int = setting(200, at_least=0)
    schedule: Literal["cosine", "inverse_square_root", "constant"] = "cosine"
    weight_decay: float = setting(0.01, at_least=0)
    betas: tuple[float, float] = setting((0.9, 0.98), at_least=0, below=1)
    clip: float = setting(1.0, at_least=0)
    clip_update: float = setting(1.0, at_least=0)
    label_smoothing: float = setting(0.1, at_least=0, below=1)
    accumulate: int = setting(1, at_least=1)
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    expert_lr_multiplier: float = setting(1.0, above=0)
    scale_expert_gradients: bool = False
    validate_every: int = setting(0, at_least=0)
    best: str | None = None
    patience: int = setting(0, at_least=0, free=RESUME)
    ema: float = setting(0.0, at_least=0, below=1)
    average_last: int = setting(0, at_least=0)
    loggers: str | tuple[str, ...] = setting("auto", free=RESUME)
    checkpoint_minutes: float = setting(5.0, at_least=0, free=RESUME)
    checkpoint_steps: int = setting(0, at_least=0, free=RESUME)
    on_non_finite: Literal["stop", "skip", "ignore"] = setting("stop", free=RESUME)
    monitor: MonitorConfig = setting(default_factory=MonitorConfig, free=RESUME)
    log_every: int = setting(10, at_least=1)
    record_routing: int = setting(0, at_least=0, free=RESUME)
    keep_memory: bool = setting(True, free=RESUME)
    seed: int = setting(1, at_least=0, at_most=2**32 - 1)
    init_by_name: bool = False
    devices: int = setting(1, at_least=1, free=RESUME)
    num_nodes: int = setting(1, at_least=1, free=RESUME)
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    backend: Backend = setting("auto", free=RESUME)

    # -- what training is made of --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Make sure that training ends, that a cosine has steps left when the warm-up ends, and of what is installed.

        Raises:
            UserError: there is no limit, the warm-up takes all steps, there is no such machine, a logger or a backend
                is unknown, not installed or not for this machine, or a setting of adafactor is given without it.
        """
        require_machine(self.devices, self.num_nodes, on_gpu=self.on_gpu)
        logger_names(self.loggers)
        check_backend(self.backend, on_gpu=self.on_gpu)
        if self.ema and self.precision == "bf16-true":
            raise UserError(
                "train.ema needs weights in float32: got bf16-true, which rounds its steps away. Leave it out."
            )
        if not self.max_steps and not self.max_minutes:
            raise UserError("training needs an end: set train.max_steps or train.max_minutes (both are 0).")
        if self.schedule == "cosine" and 0 < self.max_steps <= self.warmup_steps:
            raise UserError(
                f"train.warmup_steps must be less than train.max_steps: got {self.warmup_steps} of {self.max_steps}. "
                "Give a shorter warm-up or more steps."
            )
        self._check_optimizer()

    def fitting_warmup(self, kept: Mapping[str, Any] | None = None) -> int:
        """The warm-up where the user gave none: that of the run that goes on, or a fifth of the steps if it takes all.

        Args:
            kept: the configuration in the folder of the run that goes on.
        """
        if (recorded := (kept or {}).get("train", {}).get("warmup_steps")) is not None:
            return int(recorded)
        return self.max_steps // 5 if 0 < self.max_steps <= self.warmup_steps else self.warmup_steps

    def budget(self) -> Budget:
        """The limits, which the schedule follows."""
        return Budget(max_steps=self.max_steps or None, max_minutes=self.max_minutes or None)

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a run.

        Raises:
            UserError: a setting of adafactor without it.
        """
        shared: dict[str, Any] = {
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "expert_lr_multiplier": self.expert_lr_multiplier,
        }
        if self.optimizer == "adafactor":
            return adafactor(module, clip_update=self.clip_update or None, **shared)
        self._check_optimizer()
        return adamw(module, betas=self.betas, **shared)

    def _check_optimizer(self) -> None:
        if self.optimizer != "adafactor" and self.clip_update != 1.0:
            raise UserError(f"train.clip_update={self.clip_update} is of adafactor. Use --train.optimizer adafactor.")

    def make_schedule(self, optimizer: torch.optim.Optimizer, budget: Budget) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate schedule of a run, which follows its budget."""
        match self.schedule:
            case "cosine":
                # Where steps are given the learning rate is a function of the step alone, so that a resumed run
                # equals one that was never stopped; minutes then only end the run.
                length = Budget(max_steps=self.max_steps) if self.max_steps else budget
                return Cosine(optimizer, length, self.warmup_steps, minimum=0.05)
            case "inverse_square_root":
                return InverseSquareRoot(optimizer, self.warmup_steps)
            case "constant":
                return ConstantWithWarmup(optimizer, self.warmup_steps)

    def trainer(self, **options: Any) -> L.Trainer:
        """A Trainer with the settings that training and evaluation share.

        Args:
            **options: further arguments of the Trainer.

        Raises:
            UserError: if a GPU is asked for and there is none, or as `require_machine`.
        """
        require_machine(self.devices, self.num_nodes, on_gpu=self.on_gpu)
        divided = isinstance(options.get("strategy"), ExpertParallelStrategy)  # saves its checkpoints itself
        with quiet():
            return L.Trainer(
                accelerator=usable_accelerator(self.accelerator),
                devices=self.devices,
                num_nodes=self.num_nodes,
                precision=self.usable_precision,
                accumulate_grad_batches=self.accumulate,
                gradient_clip_val=self.clip or None,
                log_every_n_steps=self.log_every,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                plugins=[] if divided else [AtomicCheckpointIO()],
                use_distributed_sampler=False,
                **options,
            )

    @property
    def product_type(self) -> torch.dtype:
        """The number format of most products of a run with these settings."""
        name = str(self.usable_precision)
        return torch.bfloat16 if "bf16" in name else torch.float16 if name.startswith("16") else torch.float32

    # -- what "auto" is on this machine --------------------------------------------------------------------------------

    @property
    def on_gpu(self) -> bool:
        """Whether a run with these settings computes on a GPU here."""
        return usable_accelerator(self.accelerator) != "cpu"

    @property
    def usable_precision(self) -> Precision:
        """What "auto" is here: bf16-mixed on a GPU that computes in bf16 by itself, else 32-true."""
        if self.precision != "auto":
            return self.precision
        bf16 = self.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if bf16 else "32-true"

    def elsewhere(self) -> TrainConfig:
        """These settings on one device of this machine; a run that was kept to the CPU stays there."""
        accelerator: Literal["auto", "cpu"] = "cpu" if self.accelerator == "cpu" else "auto"
        return dataclasses.replace(self, devices=1, num_nodes=1, accelerator=accelerator)


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
        nonfinite_gradients: reaction to a gradient norm that is NaN or infinite, in the place of train.on_non_finite:
            raise ends the run, skip leaves out the step.
        asynchronous_save: whether training continues while a checkpoint is being written.
        empty_init: whether the model is built on the meta device and its weights are drawn block by block, for models
            too large for one process; the initial weights then differ from those of a run without it.
    """

    expert_parallel_size: int | Literal["auto"] | None = setting(None, at_least=1)
    tensor_parallel_size: int | None = setting(None, at_least=1)
    replicas: int | None = setting(None, at_least=1)
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
