"""`torch.export` and `torch.compile(fullgraph=True)` of layers and models in evaluation, for any number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_contract import ROUTERS
from torch import Tensor, nn

import moekit as mk
from moekit.kernels import onnx_translations
from moekit.testing import assert_same, skewed_tokens, some_context, some_mask, trace
from moekit.transformer import DecoderOnly, EncoderOnly

pytestmark = pytest.mark.filterwarnings("ignore")
D, E, V = 8, 4, 50
ANY = torch.export.Dim.DYNAMIC
CLASSES = sorted(name for name in ROUTERS if name.endswith("Router"))  # an example of each class
FIELDS = ("token_ids", "previous_ids", "next_ids", "position", "task", "sequence")
Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]


class Layer(nn.Module):
    """A layer whose padding, of any content, is given by a mask; the context is made in the graph."""

    def __init__(self, router: mk.Router, experts: mk.experts.Experts) -> None:
        super().__init__()
        self.layer = mk.MoELayer(router, experts)

    def forward(self, x: Tensor, mask: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, routing = self.layer(x, mk.RoutingContext(mask=mask, **known))
        return hidden, mk.routing_stats(routing).load


def inputs(layer: Layer, tokens: int) -> Inputs:
    mask = some_mask(tokens)
    x = skewed_tokens(tokens, layer.layer.experts.dim, seed=tokens).masked_fill(~mask[:, None], float("nan"))
    context = some_context(layer.layer.router, tokens)
    return x, mask, {name: value for name in FIELDS if (value := getattr(context, name)) is not None}


def layer_of(name: str) -> Layer:
    torch.manual_seed(0)
    router = ROUTERS[name]()
    width = getattr(router, "dim", 0) or D
    return Layer(router, mk.experts.GroupedMLP(router.num_experts, width, 5, bias=True)).eval()


def assert_equal(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], wanted[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[1], wanted[1])


@pytest.fixture(autouse=True)
def evaluation() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def check_exported(layer: Layer, *, strict: bool) -> None:
    """Also with another number of tokens than it was exported with, and padding that holds NaN."""
    given, other = inputs(layer, 22), inputs(layer, 37)
    shapes = ({0: ANY}, {0: ANY}, {name: {0: ANY} for name in given[2]})
    graph = torch.export.export(layer, given, dynamic_shapes=shapes, strict=strict).module()
    for batch in (given, other):
        assert_equal(graph(*batch), layer(*batch))


@pytest.mark.parametrize("name", CLASSES)
def test_every_router_exported_equals_eager(name: str) -> None:
    check_exported(layer_of(name), strict=False)


@pytest.mark.parametrize(
    "name",
    [
        "TopKRouter",
        pytest.param("gshard, local groups", marks=pytest.mark.slow),
        pytest.param("hash_layers", marks=pytest.mark.slow),
    ],
)
def test_exported_strictly_and_compiled_in_one_graph_equal_eager(name: str) -> None:
    layer = layer_of(name)
    check_exported(layer, strict=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (22, 37):
        batch = inputs(layer, tokens)
        assert_equal(compiled(*batch), layer(*batch))


class Model(nn.Module):
    """A small sparse transformer with its logits."""

    def __init__(self, kind: type[EncoderOnly] | type[DecoderOnly]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = kind(V, D, 2, layers=2, hidden_dim=16, feed_forward=self.sparse)

    @staticmethod
    def sparse(number: int, side: str) -> mk.MoELayer | None:
        bank = mk.experts.GroupedMLP(E, D, 16, bias=True)
        return mk.MoELayer(mk.routers.gshard(D, E), bank) if number == 1 else None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        run = self.model.encode if isinstance(self.model, EncoderOnly) else self.model.decode
        return self.model.logits(run(ids, mask).hidden)


def sentences(rows: int, length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randint(3, V, (rows, length)), torch.arange(length) < torch.randint(2, length + 1, (rows, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strict"), [(EncoderOnly, True), (DecoderOnly, False)])
def test_exported_models_equal_eager(kind: type, strict: bool) -> None:
    """Batch and length may both differ."""
    model = Model(kind).eval()
    given, sizes = sentences(3, 7), {0: ANY, 1: ANY}
    graph = torch.export.export(model, given, dynamic_shapes=(sizes, sizes), strict=strict).module()
    for batch in (given, sentences(5, 11)):
        torch.testing.assert_close(graph(*batch), model(*batch), atol=1e-5, rtol=1e-5)


def test_onnx_model_equals_eager(tmp_path: Path) -> None:
    """Products by expert become slices and products of ONNX."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = Model(EncoderOnly).eval()
    given, sizes = sentences(3, 7), {0: ANY, 1: ANY}
    program = torch.onnx.export(
        model,
        given,
        dynamo=True,
        dynamic_shapes=(sizes, sizes),
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (given, sentences(5, 11)):
        feed = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), batch, strict=True)}
        (found,) = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(found), model(*batch), atol=1e-5, rtol=1e-5)


def test_gradients_of_a_compiled_dropless_layer_with_padding_equal_eager() -> None:
    """Rows that stand in for padding leave no trace in the last expert's gradients."""
    router = mk.routers.TopKRouter(D, E, k=2, init_scale=1.0)
    layer = mk.MoELayer(router, mk.experts.GroupedMLP(E, D, 5, bias=True, activation="silu")).train()
    context = mk.RoutingContext(mask=some_mask(37))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x = skewed_tokens(37, D)
    with torch.enable_grad():
        fast = trace(lambda x: compiled(x, context), layer, x)
        assert_same(fast, trace(lambda x: layer(x, context), layer, x), "compiled")
