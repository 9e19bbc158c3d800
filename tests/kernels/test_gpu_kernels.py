"""Kernels for GPUs where there is none: their values by Triton's interpreter, and what the compiler makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.kernels.gpu import feed_forward, hidden, language, products, router, rows, tiles

PROGRAM = Path(__file__).with_name("interpreted.py")
NEEDS_TRITON = pytest.mark.skipif(not language.PRESENT, reason="needs triton: pip install triton (Linux)")
QUICK = (
    "product some float32", "product_with", "bank 2 gelu True", "bank 1 silu",
    "permute_and_unpermute 2", "top_k 9", "top_k 40", "layer gated", "layer two-layer", "hooks", "auto",
    "right bfloat16",
)  # fmt: skip


def interpreted(*names: str) -> dict[str, str]:
    """What is wrong with each case of `interpreted.py`, by name; one process for all."""
    paths = os.pathsep.join([str(PROGRAM.parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])["results"]
    return found


@NEEDS_TRITON
def test_kernels_equal_their_references() -> None:
    """In the interpreter: one or two cases of each operation, forward and backward, into poisoned memory."""
    found = interpreted(*QUICK)
    assert len(found) >= len(QUICK)
    assert not {name: wrong for name, wrong in found.items() if wrong}


@NEEDS_TRITON
@pytest.mark.slow
def test_all_cases_of_kernels_equal_their_references() -> None:
    found = interpreted()
    assert len(found) > 2 * len(QUICK)
    assert not {name: wrong for name, wrong in found.items() if wrong}


SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that a program may have, by compute capability."""
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
# Strides of the matrices in memory of 16-byte multiples, which is what real models have.
T, E, D, F, K = 512, 4, 256, 512, 2


class Compiled:
    """Stands for `launch`: compiles each kernel for a GPU, as often as its types and constants differ."""

    def __init__(self, arch: int) -> None:
        self.arch, self.made = arch, {}

    def __call__(self, kernel: Any, grid: Any, *arguments: Any, warps: int = 4, stages: int = 2, **named: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names, signature, constants, hints = kernel.arg_names, {}, dict(named), {}
        for place, (name, value) in enumerate(zip(names, arguments, strict=False)):
            if isinstance(value, int) and value == 1:  # as Triton's own launcher specialises
                constants[name] = 1
            else:
                signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
                if isinstance(value, Tensor) or value % 16 == 0:
                    hints[(place,)] = [["tt.divisibility", 16]]
        signature = {name: signature.get(name, "constexpr") for name in names}
        key = (kernel.__name__, *signature.values(), *sorted(map(str, constants.items())), warps, stages)
        if key not in self.made:
            source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, hints)
            target = GPUTarget("cuda", self.arch, 32)
            self.made[key] = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


@pytest.fixture(params=[80, 90])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    launch = Compiled(request.param)
    for module in (hidden, products, rows, router):
        monkeypatch.setattr(module, "launch", launch)
    for module in (hidden, tiles):
        monkeypatch.setattr(module, "capability", lambda device: divmod(launch.arch, 10))
    yield launch
    for key, kernel in launch.made.items():
        ptx = kernel.asm["ptx"]
        assert f".target sm_{launch.arch}" in ptx
        assert kernel.metadata.shared <= SHARED[launch.arch], key
        if "*bf16" in key and key[0].removeprefix("_").startswith(("product", "hidden", "matrix")):
            assert len(re.findall("wgmma.mma_async" if launch.arch == 90 else r"\bmma\.sync", ptx)) >= 4, key
            assert "cp.async" in ptx, f"{key}: tiles are not loaded ahead"


def order(choices: int) -> rows.RowOrder:
    places = torch.zeros(T * choices, dtype=torch.int64)
    return rows.RowOrder(torch.full((E,), T * choices // E), places, places, places, choices)


def run_bank(activation: str, glu: bool, dtype: torch.dtype, choices: int) -> None:
    x = torch.zeros(T, D, dtype=dtype, requires_grad=True)
    w_in, w_up = torch.zeros(2, E, D, F, dtype=dtype, requires_grad=True).unbind(0)
    w_out = torch.zeros(E, F, D, dtype=dtype, requires_grad=True)
    weight = torch.zeros(T * choices, requires_grad=True)
    feed_forward.feed_forward(
        x, weight, w_in, w_up if glu else None, w_out, order(choices), activation
    ).sum().backward()


def run_router() -> None:
    found = router.topk(torch.zeros(T, 64, requires_grad=True), K, torch.ones(T, dtype=torch.bool))
    (found.weight.sum() + found.router_z).backward()


def run_rows() -> None:
    x = torch.zeros(T, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(T * K, requires_grad=True)
    rows.unpermute(rows.permute(x, order(K)), weight, order(K)).sum().backward()


@NEEDS_TRITON
@pytest.mark.parametrize("compiled", [90], indirect=True)
def test_the_largest_kernel_compiles_without_a_gpu(compiled: Compiled) -> None:
    """Backward of gated experts: the one whose epilogue has the most to hold."""
    units = torch.zeros(T, F, dtype=torch.bfloat16)
    kept = hidden.Hidden(units, units, units)
    grad, w_out = torch.zeros(T, D, dtype=torch.bfloat16), torch.zeros(E, F, D, dtype=torch.bfloat16)
    hidden.hidden_grads(grad, w_out, torch.zeros(T), kept, order(1).counts, order(1).token, "silu")
    assert [key[0] for key in compiled.made] == ["_hidden_grad_kernel"]


ALL: dict[str, tuple[Callable[[], None], set[str]]] = {
    **{
        f"{activation}{' gated' * glu} {dtype} {choices}": (
            lambda values=(activation, glu, dtype, choices): run_bank(*values),
            {"_hidden_kernel", "_product_kernel", "_hidden_grad_kernel", "_matrix_grad_kernel"},
        )
        for activation, glu, dtype, choices in (
            ("silu", True, torch.bfloat16, 2), ("gelu", False, torch.bfloat16, 1), ("relu", True, torch.float16, 2),
            ("silu", True, torch.float32, 2), ("relu", False, torch.float32, 1),
        )
    },
    "router": (run_router, {"_choose_kernel", "_place_kernel", "_scores_grad_kernel"}),
    "rows": (run_rows, {"_gather_kernel", "_dots_kernel"}),
}  # fmt: skip


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_kernel_compiles_without_a_gpu(name: str, compiled: Compiled) -> None:
    run, kernels = ALL[name]
    run()
    assert kernels <= {key[0] for key in compiled.made}
