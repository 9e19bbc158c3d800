"""The loss over a vocabulary by parts, against all scores at once: values, gradients, ties, types, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.kernels import TokenLoss, logits_loss, vocabulary_loss, vocabulary_loss_reference
from moekit.testing import assert_close
from moekit.transformer import DecoderOnly, EncoderOnly
from moekit.transformer.embedding import TokenEmbedding, Vocabulary

N, D, V = 11, 5, 13


def case(n: int = N, v: int = V, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, D, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, v, (n,))


def both(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, rows: int | None) -> None:
    found = []
    for loss in (
        vocabulary_loss(hidden, weight, labels, smoothing, rows=rows),
        vocabulary_loss_reference(hidden, weight, labels, smoothing),
    ):
        grads = torch.autograd.grad(loss.loss * 3, (hidden, weight))
        found.append((loss.loss, loss.nll, *grads))
        assert loss.correct.dtype == torch.int64
        assert not loss.nll.requires_grad
        found[-1] += (loss.correct,)
    for name, fast, slow in zip(("loss", "nll", "hidden", "weight"), *found, strict=False):
        assert fast.dtype == slow.dtype
        assert_close(fast, slow, name, floor=1e-3)
    assert int(found[0][-1]) == int(found[1][-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 11, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_reference(smoothing: float, rows: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both(*case(dtype=dtype), smoothing, rows)


@pytest.mark.parametrize(("n", "v"), [(1, 2), (3, 1), (0, 4), (300, 7)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_odd_sizes(n: int, v: int, smoothing: float) -> None:
    torch.manual_seed(1)
    both(*case(n, v), smoothing, None)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradcheck(smoothing: float) -> None:
    torch.manual_seed(2)
    hidden, weight, labels = case(6, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: vocabulary_loss(h, w, labels, smoothing, rows=4).loss, (hidden, weight)
    )


@pytest.mark.parametrize("learns", ["hidden", "weight", "neither"])
def test_only_what_learns_gets_a_gradient(learns: str) -> None:
    hidden, weight, labels = case()
    hidden.requires_grad_(learns == "hidden")
    weight.requires_grad_(learns == "weight")
    loss = vocabulary_loss(hidden, weight, labels, 0.1).loss
    assert loss.requires_grad == (learns != "neither")
    if learns != "neither":
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (learns == "hidden", learns == "weight")


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = case()
    with torch.no_grad():
        monkeypatch.setattr(Tensor, "scatter_add_", None)  # where gradients begin
        found = vocabulary_loss(hidden, weight, labels, 0.1)
    monkeypatch.undo()
    assert not found.loss.requires_grad
    assert_close(found.loss, vocabulary_loss_reference(hidden, weight, labels, 0.1).loss, "loss")


def test_of_equal_scores_the_first_counts() -> None:
    """As argmax has it: rows in which the label's score is the highest alone, first of two, second of two, lower."""
    weight = torch.eye(4)
    hidden = torch.tensor([[1.0, 5, 0, 0], [0, 5, 5, 0], [0, 5, 5, 0], [9.0, 5, 0, 0]])
    labels = torch.tensor([1, 1, 2, 1])
    for rows in (None, 1, 3):
        assert int(vocabulary_loss(hidden, weight, labels, rows=rows).correct) == 2
    assert int(logits_loss(hidden, labels).correct) == 2


def test_large_scores_neither_overflow_nor_lose_the_rest() -> None:
    hidden = torch.tensor([[300.0, 299.0, -300.0], [-300.0, -300.0, -300.0]], dtype=torch.float32, requires_grad=True)
    both(hidden, torch.eye(3, requires_grad=True), torch.tensor([1, 2]), 0.1, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    hidden, weight, labels = case()
    with torch.no_grad():
        hidden[3, 0] = bad
    found = vocabulary_loss(hidden, weight, labels, 0.1)
    assert not found.loss.isfinite()
    assert not found.nll.isfinite()
    found.loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad[3].isfinite().all()


def test_backward_twice_and_added_gradients() -> None:
    hidden, weight, labels = case()
    loss = vocabulary_loss(hidden, weight, labels).loss
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    expected = torch.autograd.grad(vocabulary_loss_reference(hidden, weight, labels).loss, (hidden, weight))
    assert_close(hidden.grad, 3 * expected[0], "hidden")
    assert_close(weight.grad, 3 * expected[1], "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_its_type(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    hidden, weight, labels = case(dtype=torch.float32)
    found = []
    for function in (vocabulary_loss, vocabulary_loss_reference):
        with torch.autocast("cpu", dtype):
            loss = function(hidden, weight, labels, 0.1)
        assert loss.loss.dtype == torch.float32
        found.append((loss.loss, *torch.autograd.grad(loss.loss, (hidden, weight))))
    with torch.autocast("cpu", dtype):
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == dtype
    for fast, slow in zip(*found, strict=True):
        assert fast.dtype == torch.float32
        torch.testing.assert_close(fast, slow, rtol=0.03, atol=4e-3)


def test_not_more_than_some_rows_of_scores_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the operation has more entries than a chunk of scores, or the states, or the table."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
            return out

    hidden, weight, labels = case(64, 50)
    with Sizes():
        vocabulary_loss(hidden, weight, labels, 0.1, rows=8).loss.backward()
    assert max(sizes) == 8 * 50
    sizes.clear()
    with Sizes():
        vocabulary_loss_reference(hidden, weight, labels, 0.1).loss.backward()
    assert max(sizes) == 64 * 50


def test_a_compiled_graph_has_the_plain_form() -> None:
    hidden, weight, labels = case(dtype=torch.float32)

    def function(h: Tensor, w: Tensor) -> TokenLoss:
        return vocabulary_loss(h, w, labels, 0.1)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for fast, slow in zip(compiled(hidden, weight), function(hidden, weight), strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels"), [((3, 4), (9, 5), 3), ((3, 4), (9, 4), 2), ((2, 3, 4), (9, 4), 2)]
)
def test_other_shapes_are_refused(hidden: tuple[int, ...], weight: tuple[int, ...], labels: int) -> None:
    with pytest.raises(ValueError, match="vocabulary_loss needs hidden"):
        vocabulary_loss(torch.ones(hidden), torch.ones(weight), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("scale", ["input", "output", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_of_a_model_it_is_that_of_its_logits(scale: str, tied: bool) -> None:
    torch.manual_seed(4)
    model = EncoderOnly(V, 8, 2, 1, 8, tied=tied, embedding_scale=scale)  # type: ignore[arg-type]
    ids, labels = torch.randint(3, V, (2, 4)), torch.randint(0, V, (8,))
    grads = []
    for way in ("fast", "slow"):
        model.zero_grad()
        hidden = model.encode(ids).hidden.flatten(0, 1)
        found = (
            model.cross_entropy(hidden, labels, 0.1)
            if way == "fast"
            else logits_loss(model.logits(hidden), labels, 0.1)
        )
        found.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()} | {"loss": found.loss.detach()})
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], name)


def test_a_model_and_a_table_with_logits_of_their_own_get_the_loss_of_those() -> None:
    class Doubled(DecoderOnly):
        def logits(self, hidden: Tensor) -> Tensor:
            return 2 * super().logits(hidden)

    class Halves(Vocabulary):
        def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
            return torch.cat([hidden @ half.t() for half in weight.chunk(2)], -1) / 3

    torch.manual_seed(5)
    hidden, labels = torch.randn(6, 8), torch.randint(0, V, (6,))
    model = Doubled(V, 8, 2, 1, 8)
    torch.testing.assert_close(model.cross_entropy(hidden, labels), logits_loss(model.logits(hidden), labels))
    table = TokenEmbedding(V, 8)
    torch.nn.init.normal_(table.weight)
    table.vocabulary = Halves()
    torch.testing.assert_close(table.cross_entropy(hidden, labels), logits_loss(table.logits(hidden), labels))
    assert not torch.allclose(
        table.cross_entropy(hidden, labels).loss, vocabulary_loss(hidden, table.weight, labels).loss
    )


def test_a_gradient_of_the_gradient_is_refused() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    loss = vocabulary_loss(hidden * hidden, torch.randn(11, 8), torch.arange(5)).loss
    with pytest.raises(RuntimeError, match="vocabulary_loss_reference"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_transformed_by_torch_func() -> None:
    """Gradients of each prediction alone, as one by one."""
    hidden, weight, labels = (t.detach() for t in case())

    def loss(hidden: Tensor, label: Tensor) -> Tensor:
        return vocabulary_loss(hidden[None], weight, label[None], 0.1).loss

    found = torch.vmap(torch.func.grad(loss))(hidden, labels)
    for row, label, grad in zip(hidden, labels, found, strict=True):
        leaf = row.clone().requires_grad_()
        assert_close(grad, torch.autograd.grad(loss(leaf, label), leaf)[0])


@pytest.mark.parametrize("rows", [0, -1])
def test_no_row_at_a_time_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows >= 1, or None for as many as the device likes: got {rows}"):
        vocabulary_loss(*case(), rows=rows)


@pytest.mark.parametrize(
    ("labels", "smoothing", "said"),
    [
        ([0, -100, 1], 0.0, r"labels must be in 0\.\.12, the numbers of the vocabulary: got -100"),
        ([0, 13, 1], 0.0, r"labels must be in 0\.\.12, the numbers of the vocabulary: got 13"),
        ([0, 1, 2], -0.1, r"label_smoothing must be in \[0, 1\]: got -0.1"),
        ([0, 1, 2], 1.5, r"label_smoothing must be in \[0, 1\]: got 1.5"),
        ([0, 1, 2], float("nan"), r"label_smoothing must be in \[0, 1\]: got nan"),
    ],
)
def test_what_is_no_label_and_no_smoothing_is_refused(labels: list[int], smoothing: float, said: str) -> None:
    hidden, weight, _ = case(3)
    for loss in (vocabulary_loss, vocabulary_loss_reference):
        with pytest.raises(ValueError, match=said):
            loss(hidden, weight, torch.tensor(labels), smoothing)


def test_all_of_the_target_may_be_even() -> None:
    both(*case(), 1.0, 4)


def test_shapes_alone() -> None:
    """On the meta device, which knows no autocast."""
    hidden, weight, labels = (t.detach().to("meta").requires_grad_(t.is_floating_point()) for t in case())
    found = vocabulary_loss(hidden, weight, labels, 0.1)
    assert found.loss.shape == ()
    assert [g.shape for g in torch.autograd.grad(found.loss, (hidden, weight))] == [hidden.shape, weight.shape]
