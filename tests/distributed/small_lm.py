"""A small sparse language model for the tests of this folder, its data, and what one process makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moekit as mk
from moekit.experts import GroupedMLP
from moekit.parallel import global_mean
from moekit.routers import Balance, TopKRouter
from moekit.routing import Router, Routing, RoutingContext
from moekit.testing import JoinedProcesses, seeded
from moekit.training.optimizers import adafactor
from moekit.transformer import GLU, MLP, DecoderOnly

VOCABULARY, DIM, HEADS, HIDDEN, EXPERTS, LENGTH, GLOBAL_BATCH, STEPS = 16, 8, 4, 8, 4, 5, 8, 5
CLIP = 0.5


# Three ways for two processes to share the model.
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"expert_parallel_size": 2, "zero_stage": 3},
    {"expert_parallel_size": 2, "zero_stage": 0},
    {"expert_parallel_size": 1, "tensor_parallel_size": 2, "zero_stage": 1},
)


# Every stage, a divided tensor and offloading; and the few of them that keep an optimizer's state in unlike places.
MORE_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"expert_parallel_size": 2, "zero_stage": 0},
    {"expert_parallel_size": 1, "zero_stage": 1},
    {"expert_parallel_size": 2, "zero_stage": 3},
    {"expert_parallel_size": 1, "tensor_parallel_size": 2, "zero_stage": 1},
    {"expert_parallel_size": 1, "zero_stage": 2, "offload": "optimizer"},
)
FEW_LAYOUTS = (MORE_LAYOUTS[1], MORE_LAYOUTS[2], MORE_LAYOUTS[4])


def top_two() -> Router:
    """Two choices, and a balance loss over all processes."""
    return TopKRouter(DIM, EXPERTS, 2, balance=Balance(count="all", scope="global"), init_scale=1.0)


class AllToOne(Router):
    """Sends every token to the expert before the last, with a learned weight."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        place = torch.arange(x.shape[0])
        return Routing(
            token=place,
            expert=torch.full_like(place, EXPERTS - 2),
            weight=(x.float() @ self.weight).sigmoid(),
            position=place,
            kept=torch.ones_like(place, dtype=torch.bool),
            num_tokens=x.shape[0],
            num_experts=EXPERTS,
        )


class SmallLM(L.LightningModule):
    """Three blocks: dense with biases, sparse with biases, gated; a tied table; a scalar; losses of the router.

    Args:
        optimizer: "adamw", "sgd" or "adafactor".
        aux: weights of the router's losses.
        by_tokens: whether the loss is a mean over the tokens of all ranks, not over each rank's.
        checkpoint: whether blocks are computed again in backward.
        router: makes the router.
    """

    def __init__(
        self,
        optimizer: str = "adamw",
        *,
        aux: dict[str, float] | None = None,
        by_tokens: bool = False,
        checkpoint: bool = False,
        router: Callable[[], Router] = top_two,
    ) -> None:
        super().__init__()

        def feed_forward(layer: int, side: Any) -> nn.Module:
            if layer == 0:
                return MLP(DIM, HIDDEN, bias=True, activation="silu")
            if layer == 2:
                return GLU(DIM, HIDDEN)
            bank = GroupedMLP(EXPERTS, DIM, HIDDEN, bias=True, activation="silu", init_scale=1.0)
            return mk.MoELayer(router(), bank)

        with seeded(7):
            self.model = DecoderOnly(
                VOCABULARY, DIM, HEADS, 3, HIDDEN, feed_forward=feed_forward, checkpoint=checkpoint
            )
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name.endswith(("bias", "b_in", "b_out", "positions.weight")):
                        parameter.normal_(std=0.3)
        self.temperature = nn.Parameter(torch.tensor(0.9))
        self.optimizer, self.by_tokens = optimizer, by_tokens
        self.aux = mk.AuxLosses(**({"load_balance": 0.1, "router_z": 0.01} if aux is None else aux))
        self.losses: list[Tensor] = []

    def loss(self, ids: Tensor) -> Tensor:
        """Token 0 is padding."""
        inputs, labels = ids[:, :-1], ids[:, 1:]
        out = self.model.decode(inputs, inputs != 0)
        logits = self.model.logits(out.hidden * self.temperature)
        real = (labels != 0).flatten()
        nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        total = (nll * real).sum()
        mean = global_mean(total, real.sum()) if self.by_tokens else total / real.sum().clamp_min(1)
        return mean + self.aux(*out.routings)[0]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("valid", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.optimizer == "adafactor":
            return adafactor(self, lr=3e-2, min_factored_size=1)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def sentences(steps: int = STEPS, seed: int = 3) -> Tensor:
    """Int64[steps * GLOBAL_BATCH, LENGTH + 1] without padding."""
    return torch.randint(
        1, VOCABULARY, (steps * GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed)
    )


@dataclass
class Outcome:
    """What training gave: the mean loss and the norm of each step, and all weights at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {"losses": self.losses, "norms": self.norms, "weights": self.weights}


def one_process(module: SmallLM, data: Tensor, *, batch: int = GLOBAL_BATCH, clip: float = CLIP) -> dict[str, Any]:
    """Plain PyTorch: no Trainer, no strategy, no mesh."""
    optimizer, found = module.configure_optimizers(), Outcome()
    for ids in data.split(batch):
        loss = module.loss(ids)
        optimizer.zero_grad()
        loss.backward()
        found.losses.append(float(loss.detach()))
        found.norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), clip)))
        optimizer.step()
    found.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return found.plain()


class Watch(L.Callback):
    """Keeps the norm of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > len(self.norms):
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def trainer_for(strategy: Any, *, more_plugins: Sequence[Any] = (), **options: Any) -> L.Trainer:
    """A Trainer over the processes of `run_distributed` that writes nothing."""
    defaults: dict[str, Any] = {
        "gradient_clip_val": CLIP,
        "max_epochs": 1,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        plugins=[JoinedProcesses(), *more_plugins],
        **{**defaults, **options},
    )


class Sentences(L.LightningDataModule):
    """Batches of which all data ranks together have `batch` sentences a step, in order."""

    def __init__(self, data: Tensor, *, batch: int = GLOBAL_BATCH, micro: int = 1) -> None:
        super().__init__()
        self.data, self.batch, self.micro = data, batch, micro

    def train_dataloader(self) -> Any:
        share = self.trainer.strategy.distributed_sampler_kwargs
        sampler = torch.utils.data.DistributedSampler(self.data, shuffle=False, **share)  # type: ignore[arg-type]
        size = self.batch // share["num_replicas"] // self.micro
        return torch.utils.data.DataLoader(self.data, batch_size=size, sampler=sampler)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def fit(module: SmallLM, strategy: Any, data: Any, *, micro: int = 1, **options: Any) -> dict[str, Any]:
    """Train under the strategy; losses are means over all ranks and micro-batches."""
    data = Sentences(data, micro=micro) if isinstance(data, Tensor) else data
    watch = Watch()
    trainer = trainer_for(
        strategy, callbacks=[watch, *options.pop("callbacks", [])], accumulate_grad_batches=micro, **options
    )
    trainer.fit(module, datamodule=data)
    losses = torch.stack(module.losses)
    dist.all_reduce(losses)
    losses = (losses / dist.get_world_size()).view(-1, micro).mean(1)
    return Outcome(losses.tolist(), watch.norms, whole_weights(module)).plain()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered."""
    found = {}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor), name
        found[name] = parameter.full_tensor().detach().clone()
    return found


def differences(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of losses, norms and weights."""
    assert got["weights"].keys() == expected["weights"].keys()
    assert len(got["losses"]) == len(expected["losses"]) == len(got["norms"]) == len(expected["norms"])

    def numbers(name: str) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(got[name], expected[name], strict=True))

    weights = {name: float((got["weights"][name] - p).norm() / p.norm()) for name, p in expected["weights"].items()}
    return {"loss": numbers("losses"), "norm": numbers("norms"), "weight": max(weights.values())}


def close(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 2e-6) -> None:
    """Fail where losses, norms or weights differ."""
    found = differences(got, expected)
    assert max(found.values()) < tolerance, found


def alike(module: nn.Module, expected: nn.Module | dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Fail where a weight differs, by the norm: the first step of Adam makes a whole one of a rounding error's sign."""
    weights = dict(expected.named_parameters()) if isinstance(expected, nn.Module) else expected
    for name, value in whole_weights(module).items():
        assert float((value - weights[name]).norm() / weights[name].norm()) < tolerance, name


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks."""
    import logging

    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
