"""Which parameters decay, which are experts', and that the fused step is the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moekit.training.optimizers import adamw, fused_adamw, parameter_groups


class Bank(nn.Module):
    axes: ClassVar[dict[str, tuple[str, ...]]] = {"up": ("expert", "embed", "mlp"), "up_bias": ("expert", "mlp")}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.up_bias = nn.Parameter(torch.zeros(4, 16))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.proj = nn.Linear(8, 8)
        self.moe = nn.Module()
        self.moe.experts = Bank()
        self.moe.router = nn.Linear(8, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.position_bias = nn.Parameter(torch.zeros(32, 4))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed.weight


def names(model: nn.Module, group: dict[str, list[nn.Parameter]]) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is candidate for candidate in group["params"])}


def test_parameters_fall_into_groups_by_the_rule() -> None:
    model = Model()
    groups = {g["name"]: g for g in parameter_groups(model, lr=0.1, weight_decay=0.5, expert_lr_multiplier=3.0)}
    assert {name: names(model, g) for name, g in groups.items()} == {
        "shared": {"embed.weight", "proj.weight", "moe.router.weight"},
        "shared_no_decay": {"norm.weight", "norm.bias", "proj.bias", "scale", "position_bias"},
        "expert": {"moe.experts.up"},
        "expert_no_decay": {"moe.experts.up_bias"},
    }
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "shared": (0.1, 0.5),
        "shared_no_decay": (0.1, 0.0),
        "expert": (pytest.approx(0.3), 0.5),
        "expert_no_decay": (pytest.approx(0.3), 0.0),
    }


def test_a_bank_as_the_whole_model() -> None:
    assert [g["name"] for g in parameter_groups(Bank(), lr=1.0)] == ["expert_no_decay", "expert"]


def test_adamw_equals_the_plain_loop() -> None:
    torch.manual_seed(0)
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    ours = adamw(model, lr=1e-2, weight_decay=0.1, expert_lr_multiplier=2.0)
    assert ours.param_groups[0]["fused"]
    plain = torch.optim.AdamW(
        parameter_groups(twin, lr=1e-2, weight_decay=0.1, expert_lr_multiplier=2.0),
        betas=(0.9, 0.98),
        foreach=False,
        fused=False,
    )
    for _ in range(5):
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            if a.requires_grad:
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
        ours.step()
        plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_multiplier_acts_where_a_gradient_factor_does_not() -> None:
    def after(gradient_factor: float, multiplier: float) -> Tensor:
        torch.manual_seed(0)
        bank = Bank()
        optimizer = adamw(bank, lr=1e-2, weight_decay=0.0, expert_lr_multiplier=multiplier)
        start = bank.up.detach().clone()
        for _ in range(3):
            for p in bank.parameters():
                p.grad = gradient_factor * torch.ones_like(p)
            optimizer.step()
        return (bank.up.detach() - start).abs().mean()

    torch.testing.assert_close(after(8.0, 1.0), after(1.0, 1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(after(1.0, 2.0), 2 * after(1.0, 1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("model", "multiplier", "message"),
    [(nn.Linear(2, 2), 0.0, "must be positive .* got 0.0"), (nn.ReLU(), 1.0, "require a gradient: got none")],
)
def test_bad_input_is_refused(model: nn.Module, multiplier: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw(model, lr=1.0, expert_lr_multiplier=multiplier)


def test_a_model_on_the_meta_device_is_not_fused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert not adamw(model, lr=1.0).param_groups[0]["fused"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_gradient_clipping_works_in_every_precision(tmp_path: Path, precision: str) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return 1e4 * self.layer(batch.to(self.layer.weight.dtype)).square().mean()

        def on_before_zero_grad(self, *_: object) -> None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if gradients:
                self.norm = torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self, lr=1e-3)

    module = Module()
    L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=3,
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(torch.randn(16, 4), batch_size=4))  # type: ignore[arg-type]
    assert module.norm <= 0.51


def test_fused_where_all_parameters_can_be() -> None:
    here, nowhere = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))
    assert fused_adamw([{"params": [here]}], lr=0.1).param_groups[0]["fused"]
    assert not fused_adamw([{"params": [here]}, {"params": [nowhere]}], lr=0.1).param_groups[0]["fused"]
