"""The padded path under the compiler that users get by default."""

from __future__ import annotations

import shutil

import pytest
import torch

from moekit import routers
from moekit.experts import GroupedGLU, GroupedMLP
from moekit.layer import MoELayer
from moekit.testing import assert_same, skewed_tokens, some_context, some_mask, trace

T, D, E = 48, 8, 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bank", [GroupedMLP, GroupedGLU])
def test_inductor_equals_eager(bank: type) -> None:
    """Forward and backward in one graph, compiled once."""
    torch._dynamo.reset()
    layer = MoELayer(routers.switch(D, E, jitter=0.0, capacity_factor=0.8), bank(E, D, 6)).train()
    context = some_context(layer.router, T, mask=some_mask(T))
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for seed, stance in ((0, "default"), (1, "fail_on_recompile")):
        x = skewed_tokens(T, D, seed=seed)
        with torch.compiler.set_stance(stance):
            fast = trace(lambda x: compiled(x, context), layer, x)
        assert_same(fast, trace(lambda x: layer(x, context), layer, x), "inductor")
