"""Who computes a layer: the rule of "auto", names that are refused, and a hub kernel that is not there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import moekit as mk
from moekit.errors import UserError
from moekit.experts import GroupedGLU, GroupedMLP
from moekit.kernels.gpu import backend, hub, language
from moekit.kernels.gpu.backend import choose
from moekit.routers import TopKRouter
from moekit.testing.pretended_gpu import pretended_gpu

X = torch.zeros(3, 8)


def test_the_word_reaches_router_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PRESENT", True)
    layer = mk.MoELayer(TopKRouter(8, 4), GroupedMLP(4, 8, 16), backend="triton")
    assert (layer.router.backend, layer.experts.backend) == ("triton", "triton")
    model = torch.nn.Sequential(mk.MoELayer(TopKRouter(8, 4), GroupedMLP(4, 8, 16)), layer)
    mk.use_backend(model, "torch")
    assert [part.backend for moe in model for part in (moe.router, moe.experts)] == ["torch"] * 4
    assert TopKRouter(8, 4).backend == GroupedMLP(4, 8, 16).backend == "auto"


def test_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = mk.MoELayer(TopKRouter(8, 4), GroupedMLP(4, 8, 16))
    with pytest.raises(UserError, match=r"There is no backend 'tritn'. Did you mean 'triton'\?"):
        mk.use_backend(layer, "tritn")  # type: ignore[arg-type]
    monkeypatch.setattr(backend, "PRESENT", False)
    with pytest.raises(UserError, match='backend="triton" needs the package triton, which is not installed'):
        mk.use_backend(layer, "triton")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='backend="sonicmoe" needs the package kernels of Hugging Face'):
        mk.use_backend(layer, "sonicmoe")
    assert layer.experts.backend == "auto"


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (X, "the tensors are on cpu" if language.PRESENT else "triton is not installed"),
        (X.double(), "it is torch.float64" if language.PRESENT else "triton is not installed"),
    ],
    ids=["CPU", "float64"],
)
def test_triton_by_name_says_why_it_cannot(x: Tensor, said: str) -> None:
    layer = mk.MoELayer(TopKRouter(8, 4), GroupedMLP(4, 8, 16)).to(x.dtype)
    layer.experts.backend = "triton"
    with pytest.raises(UserError, match=f'backend="triton" cannot compute this: {said}'):
        layer(x)


def test_shapes_without_numbers_are_computed_by_torch() -> None:
    assert choose("triton", X.to("meta"), "layer").name == "torch"


def test_auto_on_a_cpu_is_torch() -> None:
    assert choose("auto", X, "layer") == ("torch", "the tensors are on cpu")


H100, A100, T4 = (9, 0), (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "dtype", "precision", "what", "expected"),
    [
        (H100, torch.bfloat16, "highest", "layer", ""),
        (H100, torch.bfloat16, "highest", "product", "torch's grouped product is one kernel here"),
        (H100, torch.float16, "highest", "product", ""),
        (A100, torch.bfloat16, "highest", "product", ""),
        (A100, torch.float32, "highest", "layer", "float32 without TF32 is faster by torch"),
        (A100, torch.float32, "high", "layer", ""),
        (A100, torch.float32, "highest", "router", ""),
        (A100, torch.float64, "high", "layer", "it is torch.float64"),
        (T4, torch.float16, "high", "layer", "the GPU has compute capability 7.5"),
    ],
)
def test_the_rule_of_auto(
    monkeypatch: pytest.MonkeyPatch, capability: Any, dtype: torch.dtype, precision: str, what: Any, expected: str
) -> None:
    """By compute capability, type and what is computed; on a tensor that only says where it is."""
    monkeypatch.setattr(backend, "PRESENT", True)
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(backend, "capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(backend, "Tensor", SimpleNamespace)
    there: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
    tried: list[Any] = []
    monkeypatch.setattr(backend, "failure", lambda *where: tried.append(where) or "")
    found = choose("auto", there, what)
    assert found == ("torch" if expected else "triton", expected)
    assert tried == ([] if expected else [(there.device, dtype)])
    monkeypatch.setattr(backend, "failure", lambda *where: "they are off by 1.0e+00 of the result")
    assert choose("auto", there, what).name == "torch"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose("auto", there, what).name == "torch"


def test_auto_leaves_tensors_of_other_kinds_to_torch() -> None:
    layer = mk.MoELayer(TopKRouter(8, 4, 2), GroupedGLU(4, 8, 16))
    with pretended_gpu() as gpu:
        x = torch.ones(5, 8, device="cuda")
        chosen = choose("auto", x, "layer")
        layer.to("cuda")
        with gpu.watch() as waits:
            layer(x).hidden.sum().backward()
    assert chosen.name == "torch"
    assert len(waits) == 1, "float32 products read the counts, and nothing more is asked of the device"


class Sonic:
    """The hub's function as it is documented, in torch: the list token by token, w1 (2 F, D, E), w2 (D, F, E)."""

    class enums:  # noqa: N801
        ActivationType = SimpleNamespace(SWIGLU="swiglu", GEGLU="geglu", REGLU="reglu")

    def moe_general_routing_inputs(
        self, x: Tensor, scores: Tensor, token: Tensor, expert: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None,
        *, E: int, activation_type: str, is_inference_mode_enabled: bool, concat_layout: bool, stream_id: None,  # noqa: N803
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert (token.diff() >= 0).all(), "tokens must ascend"
        assert (token.dtype, expert.dtype, scores.dtype) == (torch.int32, torch.int32, x.dtype)
        assert (activation_type, concat_layout, is_inference_mode_enabled) == ("swiglu", True, False)
        out = torch.zeros_like(x)
        for t, e, score in zip(token.tolist(), expert.tolist(), scores, strict=True):
            if e < E:
                gate, up = (w1[:, :, e] @ x[t]).chunk(2)
                row = w2[:, :, e] @ (torch.nn.functional.silu(gate) * up)
                out = out.index_add(0, torch.tensor([t]), (score * row)[None])
        return out, None


def test_sonicmoe_gets_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter against the packed layer, by a stand-in for the hub's kernel; the kernel itself needs a GPU."""
    monkeypatch.setattr(hub, "_kernel", Sonic)
    monkeypatch.setattr(hub, "_require", lambda x: None)
    router = TopKRouter(8, 4, 2, capacity=mk.Capacity(1.0, 1.0, minimum=1))
    layer = mk.MoELayer(router, GroupedGLU(4, 8, 6, activation="silu"))
    x = torch.randn(9, 8)
    expected = layer(x).hidden
    layer.experts.backend = "sonicmoe"
    torch.testing.assert_close(layer(x).hidden, expected)
    layer.experts = GroupedMLP(4, 8, 6)
    layer.experts.backend = "sonicmoe"
    with pytest.raises(UserError, match='backend="sonicmoe" computes GroupedGLU without bias'):
        layer(x)


def test_sonicmoe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = mk.MoELayer(TopKRouter(8, 4, 2), GroupedGLU(4, 8, 16))
    layer.experts.backend = "sonicmoe"
    with pytest.raises(UserError, match="computes fp16 and bf16 on GPUs of Hopper and Blackwell: got"):
        layer(X)
    hub._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(UserError, match="could not load kernels-community/sonic-moe"):
        hub._kernel()
    other = SimpleNamespace(get_kernel=lambda name: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "kernels", other)
    with pytest.raises(UserError, match="has not the functions"):
        hub._kernel()
