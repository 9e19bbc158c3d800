"""Dropout by packed random bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moekit.functional.activation import Activation, activation_function
from moekit.functional.dropout import activation_dropout, add_dropped, dropout, relu_dropout
from moekit.testing import seeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_share_scale_and_gradient(dtype: torch.dtype, probability: float) -> None:
    torch.manual_seed(0)
    x = torch.full((200, 300), 2.0, dtype=dtype, requires_grad=True)
    kept = dropout(x, probability, training=True)
    assert kept.dtype == dtype
    zero = kept == 0
    variance = probability * (1 - probability)
    step = 1 / 256 if probability > 0.05 else 1 / 65536  # between the two rates of a call
    assert abs(float(zero.double().mean()) - probability) < step + 6 * math.sqrt(variance / x.numel())
    (value,) = kept[~zero].unique().tolist()
    rate = 1 - 2 / value  # of this call
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert abs(rate - probability) < step + rounding
    assert abs(rate / step - round(rate / step)) < rounding / step
    kept.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, zero)
    torch.testing.assert_close(x.grad[~zero], kept[~zero].detach() / 2)
    # Entries are independent of their neighbours in both directions, and of those that share a word with them.
    share = zero.double().mean()
    centred = zero.double() - share
    for far in (1, 3, 7):
        for a, b in ((centred[far:], centred[:-far]), (centred[:, far:], centred[:, :-far])):
            assert abs(float((a * b).mean()) / variance) < 6 / math.sqrt(a.numel())
    # Each of the lanes of a word drops its share.
    for lane in range(8):
        part = zero.flatten()[lane::8].double()
        assert abs(float(part.mean() - share)) < 6 * math.sqrt(variance / part.numel())


@pytest.mark.parametrize("probability", [1 / 1024, 0.01, 1 / 32, 0.05, 0.1, 0.3, 0.5, 0.77, 0.99, 1023 / 1024])
def test_the_rate_is_exact(probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every random number once in each lane, and choices between two rates: their mean is the one asked for."""
    bits, dtype = (8, torch.int8) if 1 / 32 <= probability <= 31 / 32 else (16, torch.int16)
    numbers = torch.arange(-(1 << bits - 1), 1 << bits - 1).to(dtype)
    lanes = 64 // bits
    choices = torch.linspace(0, 2**53 - 1, 1001 if bits == 8 else 11, dtype=torch.float64).long()
    rates = []
    for choice in choices.tolist():

        def all_numbers(self: torch.Tensor, low: int, high: int | None, choice: int = choice) -> torch.Tensor:
            assert (low, high, self.dtype) == (-(1 << 63), None, torch.int64)
            self[:-1] = numbers.repeat_interleave(lanes).view(torch.int64)
            self[-1] = choice
            return self

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "random_", all_numbers)
            kept = dropout(torch.ones(len(numbers), lanes, dtype=torch.float64), probability, training=True)
        by_lane = (kept == 0).double().mean(0)
        assert by_lane.unique().numel() == 1
        rates.append(float(by_lane[0]))
        assert float(kept.mean()) == pytest.approx(1.0, abs=1e-12)
        assert abs(rates[-1] - probability) < 2**-bits
    assert sum(rates) / len(rates) == pytest.approx(probability, abs=1.5 * 2**-bits / len(rates))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0, 4), (2, 3, 9)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = 1 + torch.rand(shape, dtype=torch.float64)
    for probability in (0.4, 0.01):
        y = dropout(x, probability, training=True)
        assert y.shape == shape
        stayed = y[y != 0] / x[y != 0]
        assert stayed.numel() == 0 or float(stayed.max() - stayed.min()) < 1e-12


def test_rows_that_are_not_contiguous() -> None:
    x = torch.ones(6, 8).t()
    y = dropout(x, 0.5, training=True)
    assert y.shape == (8, 6)
    assert set(y.unique().tolist()) <= {0.0, 2.0}
    assert y.unique().numel() == 2


def test_the_residual_form_equals_the_plain_one() -> None:
    draws = []
    for form in (add_dropped, lambda x, y, p, training: x + dropout(y, p, training=training)):
        torch.manual_seed(3)
        x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
        out = form(x, y, 0.3, training=True)
        out.square().sum().backward()
        draws.append((out.detach(), x.grad, y.grad))
    torch.testing.assert_close(draws[0], draws[1])


def test_the_residual_form_in_mixed_precision_and_without_dropout() -> None:
    x, y = torch.randn(5, 7), torch.randn(5, 7, dtype=torch.bfloat16)
    assert add_dropped(x, y, 0.3, training=True).dtype == torch.float32
    torch.testing.assert_close(add_dropped(x, y, 0.3, training=False), x + y)
    torch.testing.assert_close(add_dropped(x, y, 0.0, training=True), x + y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_after_a_relu_it_equals_the_plain_form(dtype: torch.dtype) -> None:
    draws = []
    for form in (relu_dropout, lambda x, p, training: dropout(F.relu(x), p, training=training)):
        torch.manual_seed(3)
        x = torch.randn(31, 7, dtype=dtype, requires_grad=True)
        out = form(x, 0.3, training=True)
        out.square().sum().backward()
        draws.append((out.detach(), x.grad))
    torch.testing.assert_close(draws[0], draws[1])


def test_after_a_relu_two_derivatives_and_no_dropout() -> None:
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.equal(relu_dropout(x, 0.3, training=False), F.relu(x))
    assert torch.equal(relu_dropout(x, 0.0, training=True), F.relu(x))

    def fixed(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return relu_dropout(x, 0.25, training=True)

    assert torch.autograd.gradcheck(fixed, (x,))
    assert torch.autograd.gradgradcheck(fixed, (x,))


def test_after_a_relu_only_the_result_is_kept() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = relu_dropout(torch.randn(8, 5, requires_grad=True), 0.4, training=True)
    assert [t.data_ptr() for t in kept] == [out.data_ptr()]


def test_gradients_by_differences() -> None:
    x, y = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def fixed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return add_dropped(dropout(x, 0.25, training=True), y, 0.5, training=True)

    assert torch.autograd.gradcheck(fixed, (x, y))


def test_the_same_again_from_the_same_seed_and_under_checkpointing() -> None:
    grads = []
    for again in (False, True):
        torch.manual_seed(2)
        x = torch.ones(40, 9, requires_grad=True)

        def part(x: torch.Tensor) -> torch.Tensor:
            return dropout(dropout(x.exp(), 0.3, training=True).sin(), 0.2, training=True)

        out = checkpoint(part, x, use_reentrant=False) if again else part(x)
        out.sum().backward()
        grads.append((out.detach(), x.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_elsewhere_it_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(F, "dropout", lambda x, p: calls.append((x.device.type, p)) or x)
    dropout(torch.ones(5, device="meta"), 0.5, training=True)
    dropout(torch.ones(5), 1e-4, training=True)
    dropout(torch.ones(5), 1 - 1e-4, training=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    dropout(torch.ones(5), 0.5, training=True)
    assert calls == [("meta", 0.5), ("cpu", 1e-4), ("cpu", 1 - 1e-4), ("cpu", 0.5)]


@pytest.mark.parametrize("form", [dropout, relu_dropout])
def test_transformed_by_torch_func(form: Callable[..., torch.Tensor]) -> None:
    """A draw of its own for each entry of the batch, or one for all, as vmap is told; and gradients."""
    x = torch.ones(6, 4000)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return form(x, 0.3, training=True)

    apart = torch.vmap(dropped, randomness="different")(x) == 0
    assert len({tuple(row.tolist()) for row in apart}) == 6
    assert abs(float(apart.double().mean()) - 0.3) < 0.02
    same = torch.vmap(dropped, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    grads = torch.vmap(torch.func.grad(lambda x: dropped(x).sum()), randomness="different")(x)
    assert set(grads.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}


def test_a_rate_that_is_none_is_refused() -> None:
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match="dropout probability"):
            dropout(torch.ones(3), rate, training=True)


def test_nothing_happens_outside_of_training() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert not dropout(x, 1.0, training=True).any()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_an_activation_with_dropout(activation: Activation) -> None:
    x = torch.randn(6, 50)
    plain = activation_function(activation)(x)
    assert torch.equal(activation_dropout(x, activation, 0.3, training=False), plain)
    with seeded(1):
        dropped = activation_dropout(x, activation, 0.3, training=True)
    with seeded(1):
        torch.testing.assert_close(dropped, dropout(plain, 0.3, training=True))
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu: got 'tanh'"):
        activation_dropout(x, "tanh", 0.0, training=False)  # type: ignore[arg-type]
