"""Lower precision under the Strategy, and models that are built without memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from case_group import in_one_group
from lightning.pytorch.plugins import MixedPrecision
from small_lm import (
    DIM,
    EXPERTS,
    GLOBAL_BATCH,
    Sentences,
    SmallLM,
    close,
    differences,
    fit,
    one_process,
    sentences,
    trainer_for,
)
from torch import Tensor, nn

import moekit as mk
from moekit import ExpertParallelStrategy
from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.parallel import Layout, build_meshes, parallelize
from moekit.testing import seeded
from moekit.transformer import TokenEmbedding, materialize, materialize_modules

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"expert_parallel_size": 2, "zero_stage": 3},
    {"expert_parallel_size": 2, "zero_stage": 0},
    {"expert_parallel_size": 1, "zero_stage": 2},
    {"expert_parallel_size": 1, "tensor_parallel_size": 2, "zero_stage": 1},
    {"expert_parallel_size": 1, "zero_stage": 3, "offload": "parameters"},
)
DATA = sentences(3)


class Watched(SmallLM):
    """Notes the types of weights as modules see them, and what autograd keeps."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.seen: dict[str, torch.dtype] = {}
        self.stream: set[torch.dtype] = set()
        self.kept: list[Tensor] = []
        for path, module in self.model.named_modules():
            module.register_forward_pre_hook(self._look(path))

    def _look(self, path: str) -> Callable[[nn.Module, Any], None]:
        def look(module: nn.Module, args: Any) -> None:
            if path in ("decoder.layers.0", "decoder.layers.1", "decoder.layers.2"):
                self.stream.add(args[0].dtype)
            for name in module._parameters:
                value = getattr(module, name)
                if value is not None:
                    self.seen[f"{path}.{name}"] = value.dtype

        return look

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.kept = []

        def pack(tensor: Tensor) -> Tensor:
            self.kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return super().training_step(batch, batch_idx)


class Copies(L.Callback):
    """Counts the matrices of blocks, in bf16, that autograd keeps for backward and that have memory."""

    found = 0

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        matrices = set()
        for name, p in module.model.decoder.named_parameters():
            if p.ndim > 1 and "layers" in name and ".router." not in name:
                whole = p.full_tensor().detach().bfloat16()
                for matrix in whole if whole.ndim == 3 else [whole]:
                    matrices |= {tuple(matrix.flatten().tolist()), tuple(matrix.T.flatten().tolist())}
                matrices.add(tuple(whole.flatten().tolist()))
        assert matrices
        assert module.kept
        for kept in module.kept:
            if kept.dtype == torch.bfloat16 and kept.untyped_storage().nbytes():
                self.found += tuple(kept.flatten().tolist()) in matrices


def mixed() -> None:
    """As one process under autocast, where blocks gather their weights in bf16: not routers, not the table."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_process(SmallLM("sgd"), DATA)
    for layout in LAYOUTS:
        module = Watched()
        got = fit(module, ExpertParallelStrategy(**layout), DATA, precision="bf16-mixed")
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        found = differences(got, expected)
        assert found["loss"] < 1e-2, found
        assert found["weight"] < 2e-2, found
        narrow = {name for name, dtype in module.seen.items() if dtype == torch.bfloat16}
        banks = {f"decoder.layers.1.feed_forward.experts.{name}" for name in ("w_in", "w_out", "b_in", "b_out")}
        assert banks <= narrow, module.seen
        assert "decoder.layers.0.self_attention.qkv.weight" in narrow, module.seen
        wide = set(module.seen) - narrow
        assert {name for name in module.seen if ".router." in name or "layers" not in name} <= wide, module.seen
        assert module.stream == {torch.float32}


def mixed_keeps_no_copies() -> None:
    """With ZeRO 3 no whole matrix is left between the forward and the backward of a block, in no precision."""
    for precision in ("32-true", "bf16-mixed"):
        copies = Copies()
        strategy = ExpertParallelStrategy(1, zero_stage=3)
        fit(Watched(), strategy, DATA, precision=precision, callbacks=[copies])
        assert copies.found == 0, precision


def mixed_with_norms_of_torch() -> None:
    """A user's blocks with torch's LayerNorm, which takes no narrow weights on a CPU."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
            self.moe = mk.MoELayer(mk.routers.switch(DIM, EXPERTS), GroupedMLP(EXPERTS, DIM, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.linear(self.norm(x))
            return x + self.moe(x).hidden

    class User(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            with seeded(3):
                self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.losses: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            x = torch.sin(batch[:, :1] * torch.arange(1.0, DIM + 1))
            for block in self.blocks:
                x = block(x)
            loss = (x - 1).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = User()
    trainer_for(ExpertParallelStrategy(2), precision="bf16-mixed", gradient_clip_val=None, max_epochs=4).fit(
        module, datamodule=Sentences(DATA)
    )
    assert module.losses[-1] < module.losses[0]


def true() -> None:
    """All weights are bfloat16 but the routers', which keep what bfloat16 would round away."""
    expected = one_process(SmallLM("sgd"), DATA)
    for layout in LAYOUTS:
        module = SmallLM("sgd")
        got = fit(module, ExpertParallelStrategy(**layout), DATA, precision="bf16-true")
        types = {name: p.dtype for name, p in module.named_parameters()}
        routers = {name for name in types if ".router." in name}
        assert routers
        assert all((types[name] == torch.float32) == (name in routers) for name in types), types
        router = got["weights"][routers.pop()]
        assert not torch.equal(router, router.bfloat16().float())
        assert max(abs(a - b) / b for a, b in zip(got["losses"], expected["losses"], strict=True)) < 3e-2


def half() -> None:
    """Weights are float16 but the routers'; as one process in float16, up to its rounding."""
    expected = one_process(SmallLM("sgd"), DATA)
    for layout in LAYOUTS:
        module = SmallLM("sgd")
        got = fit(module, ExpertParallelStrategy(**layout), DATA, precision="16-true")
        types = {name: p.dtype for name, p in module.named_parameters()}
        assert all(t == (torch.float32 if ".router." in name else torch.float16) for name, t in types.items()), types
        assert max(abs(a - b) / b for a, b in zip(got["losses"], expected["losses"], strict=True)) < 4e-3


def double() -> None:
    """By name, since Lightning refuses it for strategy objects; the norm of gradients is float64 too."""
    expected = one_process(SmallLM("sgd").double(), DATA)
    for stage in range(4):
        module = SmallLM("sgd")
        got = fit(module, f"expert_parallel_zero{stage}", DATA, precision="64-true")
        assert {p.dtype for p in module.parameters()} == {torch.float64}
        found = differences(got, expected)
        assert max(found.values()) < 1e-6, found  # routers compute in float32 in any precision


def precisions_that_are_refused() -> None:
    """A scaler for each rank, and layers of other libraries."""
    scaler = torch.amp.GradScaler("cpu")
    for strategy in ("expert_parallel_zero2", ExpertParallelStrategy(2)):
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = trainer_for(strategy, more_plugins=[plugin])
        with pytest.raises(UserError, match=r"needs a precision among 32-true, .*: got 16-mixed; its loss scale"):
            trainer.fit(SmallLM(), datamodule=Sentences(DATA))


class Deferred(SmallLM):
    """Built without memory."""

    def __init__(self, optimizer: str = "adamw") -> None:
        with torch.device("meta"):
            super().__init__(optimizer)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.temperature, 0.9)


def built_without_memory() -> None:
    """Weights are drawn block by block, and are those that one process draws for the whole model."""
    whole = Deferred("sgd")
    torch.manual_seed(5)
    materialize(whole, "cpu")
    expected = one_process(whole, DATA)
    for layout in LAYOUTS:
        module = Deferred("sgd")
        torch.manual_seed(5 if dist.get_rank() == 0 else 6)  # what counts is the first rank's
        close(fit(module, ExpertParallelStrategy(**layout), DATA), expected)


def built_without_memory_in_bf16() -> None:
    """Drawn in float32 and rounded, as the model that is drawn whole and then converted."""
    whole = Deferred("sgd")
    torch.manual_seed(5)
    materialize(whole, "cpu")
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for layout in LAYOUTS:
        module = Frozen()
        torch.manual_seed(5)
        got = fit(module, ExpertParallelStrategy(**layout), DATA[:GLOBAL_BATCH], precision="bf16-true")
        for name, value in got["weights"].items():
            kept = before[name] if ".router." in name else before[name].bfloat16()
            assert torch.equal(value, kept), name


class Frozen(Deferred):
    """Learns nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Bytes by which this process's resident memory grows at its fullest."""

    def read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    found: list[int] = []
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**18)  # so that what is freed goes back at once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = read("VmRSS")
    yield found
    found.append(read("VmHWM") - before)


def never_whole() -> None:
    """Laying a model without memory over ranks takes a rank's share and one block, not the model."""
    with torch.device("meta"):
        blocks = [
            nn.Sequential(mk.MoELayer(mk.routers.switch(256, 8), GroupedMLP(8, 256, 1024)), TokenEmbedding(16, 256))
            for _ in range(12)
        ]
        model = nn.Sequential(nn.ModuleList(blocks))
    size = 4 * sum(p.numel() for p in model.parameters())
    meshes = build_meshes(Layout(devices=2, expert_parallel_size=2, zero_stage=3), "cpu")
    with peak_growth() as found:
        parallelize(model, meshes, weights=materialize_modules(model, "cpu"))
    assert found[0] < 0.5 * size + 2.5 * size / 12, (found, size)
    assert found[0] > 0.4 * size, (found, size)  # else nothing was measured


CASES, outcome, test_case = in_one_group(
    __name__,
    2,
    mixed,
    mixed_keeps_no_copies,
    mixed_with_norms_of_torch,
    true,
    half,
    double,
    precisions_that_are_refused,
    built_without_memory,
    built_without_memory_in_bf16,
    never_whole,
)
