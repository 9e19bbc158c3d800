"""Annotated activations: the program of GShard's Algorithm 2, and others, on several processes as on one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.errors import UserError
from moekit.parallel import Activations, Layout, build_meshes, parallelize
from moekit.testing import assert_close, run_distributed, seeded

GROUPS, S, M, H, E = 4, 6, 8, 12, 4  # GROUPS of S tokens over all ranks


class Experts(nn.Module):
    """The experts of Algorithm 2, whose rows come divided by expert and leave divided by group."""

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "w_in": ("expert", "embed", "mlp"),
        "w_out": ("expert", "mlp", "embed"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(E, M, H) / M**0.5)
        self.w_out = nn.Parameter(torch.randn(E, H, M) / H**0.5)
        self.annotate = Activations()

    def forward(self, rows: Tensor) -> Tensor:
        note = self.annotate
        rows = note.split(rows, 0, "expert")  # the all-to-all
        hidden = (rows.flatten(1, 2) @ note.part(self.w_in, 0, "expert")).relu()  # EGCM,EMH->EGCH
        out = hidden @ note.part(self.w_out, 0, "expert")
        return note.split(out.view(rows.shape).transpose(0, 1), 0, "batch")  # EGCH,EHM->GECM


def gating(probs: Tensor) -> Tensor:
    """Float[G, S, E, C]: top-2 combine weights of each group, first choices first; nobody is sent at random."""
    groups, tokens, experts = probs.shape
    capacity = math.ceil(2 * tokens / experts)
    value, chosen = probs.topk(2, -1)
    value = value / value.sum(-1, keepdim=True)
    out = probs.new_zeros(groups, tokens, experts, capacity)
    for g in range(groups):
        count = [0] * experts
        for choice in range(2):
            for s in range(tokens):
                e = int(chosen[g, s, choice])
                if count[e] < capacity:
                    out[g, s, e, count[e]] = value[g, s, choice]
                count[e] += 1
    return out


class Layer(nn.Module):
    """Source: arXiv:2006.16668 Algorithm 2."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(M, M)
        self.gate = nn.Parameter(torch.randn(M, E))
        self.experts, self.annotate = Experts(), Activations()

    def forward(self, x: Tensor) -> Tensor:
        note = self.annotate
        inputs = note.part(self.before(x), 0, "batch")
        probs = (inputs @ note.replicate(self.gate)).softmax(-1)  # GSM,ME->GSE
        combine = note.part(gating(note.local(probs)), 0, "batch")
        mask = (combine > 0).to(x.dtype).flatten(2).transpose(1, 2)
        rows = (mask @ inputs).unflatten(1, combine.shape[2:]).transpose(0, 1)  # GSEC,GSM->EGCM
        return note.local(combine.flatten(2) @ self.experts(rows).flatten(1, 2))  # GSEC,GECM->GSM


class Centred(nn.Module):
    """Takes the mean over the tokens of all ranks away, and adds a row of a table that is split and gathered again."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.table, self.annotate = nn.Linear(M, M), nn.Parameter(torch.randn(E, M)), Activations()

    def forward(self, x: Tensor) -> Tensor:
        note, x = self.annotate, self.before(x)
        mean = note.local(note.replicate(note.part(x, 0, "batch").mean((0, 1))))
        doubled = note.local(note.replicate(note.split(self.table, 0, "expert") * 2))
        unfinished = note.local(note.part(x, 0, "batch").square().sum(0))
        return x - mean + doubled.square()[:1] + unfinished / GROUPS


class Megatron(nn.Module):
    """Hidden channels divided among partners that hold all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(M, H)), nn.Parameter(torch.randn(H, M))
        self.before, self.annotate = nn.Linear(M, M), Activations({"channels": "tensor"})

    def forward(self, x: Tensor) -> Tensor:
        note = self.annotate
        x = note.replicate(self.before(x), "channels")
        hidden = (x @ note.split(self.w_in, 1, "channels")).tanh()
        return note.local(hidden @ note.split(self.w_out, 0, "channels"))


def data() -> Tensor:
    return torch.randn(GROUPS, S, M, generator=torch.Generator().manual_seed(1))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with seeded(5):
        return kind()


def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    out = model(x)
    weight = torch.linspace(-1, 1, M)
    return out, (out * weight + 0.3 * out.square()).mean()


def compare(kind: Callable[[], nn.Module], layout: Layout) -> None:
    """Outputs of this rank's share, and gradients, as of one process with all groups."""
    plain, x = made(kind), data()
    expected, total = loss(plain, x)
    total.backward()
    model = made(kind)
    meshes = build_meshes(layout, "cpu")
    parallelize(model, meshes)
    share = slice(None)
    if meshes.data_size > 1:
        each = GROUPS // meshes.data_size
        share = slice(meshes.data_rank * each, (meshes.data_rank + 1) * each)
    out, mine = loss(model, x[share])
    assert_close(out, expected[share], f"output on {layout}")
    mine.backward()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        wanted = plain.get_parameter(name).grad
        assert wanted is not None
        assert float(wanted.abs().max()) > 0
        assert_close(parameter.grad.full_tensor(), wanted, f"gradient of {name} on {layout}")


def over(world: int) -> None:
    for experts in (n for n in (1, 2, 4) if n <= world):
        for stage in (0, 3):
            compare(Layer, Layout(devices=world, expert_parallel_size=experts, zero_stage=stage))  # type: ignore[arg-type]
    for stage in (0, 3):
        whole = Layout(devices=world, expert_parallel_size=world, zero_stage=stage)  # type: ignore[arg-type]
        compare(Centred, whole)
        compare(Megatron, Layout(devices=world, tensor_parallel_size=2, zero_stage=stage))  # type: ignore[arg-type]


def refused(world: int) -> None:
    model = made(Layer)
    parallelize(model, build_meshes(Layout(devices=world, expert_parallel_size=world), "cpu"))
    with pytest.raises(ValueError, match=r"dimension 0 of shape \(3, 2\) and 2 ranks\. Pad it"):
        model.annotate.split(torch.ones(3, 2), 0)  # type: ignore[operator, union-attr]
    bare: Any = made(Experts)
    del bare.annotate
    with pytest.raises(UserError, match=r"are not in a MoELayer.*annotate their rows by Activations"):
        parallelize(bare, build_meshes(Layout(devices=world, expert_parallel_size=world), "cpu"))


def both(world: int) -> int:
    over(world)
    if world == 2:
        refused(world)
    return dist.get_rank()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_one_process(world: int) -> None:
    assert run_distributed(both, world, world, timeout=200.0) == list(range(world))


def test_on_one_process_it_does_nothing() -> None:
    note, x = Activations(), torch.randn(3, 2)
    assert all(value is x for value in (note.split(x, 0), note.replicate(x), note.part(x, 0), note.local(x)))
    with pytest.raises(ValueError, match="axis must be one of batch, expert, mlp, heads, vocab: got 'token'"):
        note.split(x, 0, "token")
    with pytest.raises(ValueError, match='maps axes to the mesh dimensions "expert" and "tensor"'):
        Activations({"token": "data"})
