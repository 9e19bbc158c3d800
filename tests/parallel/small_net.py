"""A small network that has every kind of saved state, its optimizers, and steps of training it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekit.experts import GroupedMLP
from moekit.layer import MoELayer
from moekit.routers import switch


class Net(nn.Module):
    """Experts, a norm with buffers, a shared table, a scalar, a bf16 weight, something that is saved and no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.moe = MoELayer(switch(8, 4, capacity_factor=None, jitter=0.0), GroupedMLP(4, 8, 16))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.low = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        self.calls = {"number": 0}

    def forward(self, ids: Tensor) -> Tensor:
        self.calls["number"] += 1
        hidden = self.norm(self.moe(self.table(ids)).hidden * self.low) * self.scale
        return self.head(hidden)

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


def trained(steps: int = 2, seed: int = 0, optimizer: str = "adamw") -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    weights, scalars = [p for p in net.parameters() if p.ndim], [net.scale]
    groups = [{"params": weights, "lr": 1e-2}, {"params": scalars, "lr": 1e-3, "weight_decay": 0.0}]
    made: torch.optim.Optimizer
    match optimizer:
        case "adamw":
            made = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        case "sgd":
            made = torch.optim.SGD(groups, momentum=0.9)
        case "adafactor":
            made = torch.optim.Adafactor(groups)
        case _:
            made = torch.optim.AdamW(groups, amsgrad=True)
    run(net, made, steps)
    return net, made


def run(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        ids = torch.arange(24).remainder(12).roll(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(ids).float(), ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
