"""The bank's feed-forward as one operation against its reference: outputs, gradients, dropout, odd shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.experts import GroupedGLU, GroupedMLP
from moekit.functional.random_bits import LEVELS, jitter, random_int16
from moekit.kernels import grouped_feed_forward, grouped_feed_forward_reference
from moekit.testing import assert_close

module = __import__("sys").modules["moekit.kernels.grouped_feed_forward"]

D, F = 5, 7
COUNTS = {
    "even": [2, 2, 2],
    "expert 1 has no row": [3, 0, 2],
    "first and last without": [0, 0, 5, 0],
    "several blocks": [150, 1, 0, 140, 3],
    "no row": [0, 0],
}
KINDS = ("plain", "biases", "gated")
NAMES = ("rows", "w_in", "w_up", "w_out", "b_in", "b_out")


def case(counts: list[int], kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    e = len(counts)
    shapes: dict[str, tuple[int, ...]] = {"rows": (sum(counts), D), "w_in": (e, D, F), "w_out": (e, F, D)}
    if kind == "gated":
        shapes["w_up"] = (e, D, F)
    if kind == "biases":
        shapes |= {"b_in": (e, F), "b_out": (e, D)}
    return {
        name: torch.randn(shapes[name], dtype=dtype, requires_grad=True) if name in shapes else None for name in NAMES
    }


def fast(parts: dict[str, Tensor | None], counts: list[int], activation: str, dropout: float = 0.0) -> Tensor:
    return grouped_feed_forward(**parts, counts=torch.tensor(counts), activation=activation, dropout=dropout)  # type: ignore[arg-type]


def slow(parts: dict[str, Tensor | None], counts: list[int], activation: str, factor: Tensor | None = None) -> Tensor:
    return grouped_feed_forward_reference(**parts, counts=counts, activation=activation, factor=factor)  # type: ignore[arg-type]


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written shows as NaN."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        made = getattr(owner, name)

        def poisoned(*arguments: Any, made: Any = made, **options: Any) -> Tensor:
            found: Tensor = made(*arguments, **options)
            return found.fill_(float("nan")) if found.is_floating_point() else found

        monkeypatch.setattr(owner, name, poisoned)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_reference(counts: list[int], kind: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = case(counts, kind)
    inputs = [part for part in parts.values() if part is not None]
    wanted = slow(parts, counts, activation)
    probe = torch.cos(torch.arange(wanted.numel(), dtype=wanted.dtype)).view(wanted.shape)
    gradients = torch.autograd.grad(wanted, inputs, probe)
    poison(monkeypatch)
    out = fast(parts, counts, activation)
    assert_close(out, wanted)
    for name, got, exact in zip(NAMES, torch.autograd.grad(out, inputs, probe), gradients, strict=False):
        assert_close(got, exact, name)
    with torch.no_grad():
        assert torch.equal(fast(parts, counts, activation), out)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_first_and_second_order(kind: str) -> None:
    counts = [2, 0, 1]
    parts = case(counts, kind)
    names = [name for name, part in parts.items() if part is not None]

    def function(*inputs: Tensor) -> Tensor:
        return fast({**parts, **dict(zip(names, inputs, strict=True))}, counts, "gelu")

    inputs = tuple(parts[name] for name in names)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_a_factor_on_the_hidden_units(kind: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With known bits: those below the threshold are dropped, forward and backward, once and twice differentiated."""
    counts, probability = [3, 0, 130, 2], 0.25
    parts = case(counts, kind)
    inputs = [part for part in parts.values() if part is not None]
    bits = torch.randint(-LEVELS // 2, LEVELS // 2, (sum(counts), F)).to(torch.int16)
    drawn = iter(bits.split([3 + 130, 2]))
    monkeypatch.setattr(module, "random_int16", lambda count, device: next(drawn).flatten())
    factor = (bits >= probability * LEVELS - LEVELS // 2).double() / (1 - probability)
    out, wanted = fast(parts, counts, activation, probability), slow(parts, counts, activation, factor)
    assert_close(out, wanted)
    probe = torch.randn_like(out)
    exact = torch.autograd.grad(wanted, inputs, probe)
    for graph in (False, True):
        got = torch.autograd.grad(out, inputs, probe, create_graph=graph, retain_graph=True)
        for name, a, b in zip(NAMES, got, exact, strict=False):
            assert_close(a, b, name)


def test_only_the_gradients_that_are_asked_for() -> None:
    counts = [2, 0, 3]
    parts = case(counts, "biases")
    wanted = dict(
        zip(
            [n for n in NAMES if parts[n] is not None],
            torch.autograd.grad(slow(parts, counts, "relu").sum(), [p for p in parts.values() if p is not None]),
            strict=True,
        )
    )
    for name in wanted:
        alone = {n: None if p is None else p.detach().requires_grad_(n == name) for n, p in parts.items()}
        fast(alone, counts, "relu").sum().backward()
        for other, part in alone.items():
            assert part is None or (part.grad is not None) == (other == name)
        found = alone[name]
        assert found is not None
        assert found.grad is not None
        assert_close(found.grad, wanted[name], name)


def test_wrong_counts() -> None:
    parts = case([2, 3], "plain")
    with pytest.raises(ValueError, match="one count per matrix, none negative, that sum to the number of rows"):
        fast(parts, [2, 2], "relu")


@pytest.mark.parametrize("bank", [GroupedMLP(3, D, F, bias=True, dropout=0.3), GroupedGLU(3, D, F, dropout=0.3)])
def test_in_a_training_step(bank: nn.Module) -> None:
    """Accumulation, hooks on parameters, checkpointing and `torch.func` see the gradients that plain backward gives."""
    counts, rows = torch.tensor([4, 0, 3]), torch.randn(7, D, requires_grad=True)
    torch.manual_seed(0)
    bank(rows, counts).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in bank.named_parameters()}
    for name, p in bank.named_parameters():
        assert p.grad.is_contiguous(), name
    seen = []
    handle = bank.w_out.register_hook(lambda grad: seen.append(grad.clone()))
    torch.manual_seed(0)
    checkpoint(bank, rows, counts, use_reentrant=False).square().sum().backward()
    handle.remove()
    assert_close(seen[0], plain["w_out"])
    for name, p in bank.named_parameters():
        assert_close(p.grad, 2 * plain[name], name)
        p.grad = None

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(bank, parameters, (rows.detach(), counts))
        return out.square().sum()

    torch.manual_seed(0)
    pure = torch.func.grad(loss)({name: p.detach() for name, p in bank.named_parameters()})
    for name, grad in pure.items():
        assert_close(grad, plain[name], name)


def test_adapters_autocast_and_half_precision_go_the_other_way() -> None:
    bank, rows = GroupedMLP(2, D, F), torch.randn(3, D)
    assert module.takes(rows, bank.w_in)
    assert not module.takes(rows.bfloat16(), bank.w_in)
    assert not module.takes(rows.double(), bank.w_in)
    assert not module.takes(rows.to("meta"), bank.w_in)
    with torch.autocast("cpu", torch.bfloat16):
        assert not module.takes(rows, bank.w_in)


def test_random_bits_are_uniform() -> None:
    bits = random_int16(200_003, torch.device("cpu"))
    assert (bits.dtype, bits.numel()) == (torch.int16, 200_003)
    for lane in range(4):  # of a word
        tenths = ((bits[lane::4].float() + LEVELS / 2) / LEVELS * 10).long().bincount(minlength=10)
        assert tenths.numel() == 10
        assert float((tenths / tenths.sum() - 0.1).abs().max()) < 0.006


def test_jitter_stays_in_its_range_and_has_no_bias() -> None:
    x = torch.full((400, 100), 2.0, requires_grad=True)
    noisy = jitter(x, 0.1)
    factor = noisy.detach() / 2
    assert 0.9 <= float(factor.min()) < 0.9001
    assert 1.0999 < float(factor.max()) <= 1.1
    assert float(factor.mean()) == pytest.approx(1.0, abs=1.5e-3)
    assert float(factor.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)
    (grad,) = torch.autograd.grad(noisy.sum(), x)
    assert_close(grad, factor)
