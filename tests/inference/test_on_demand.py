"""Experts on disk: the same answers as with all of them in memory, and no more of them in memory than allowed."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moekit import MoELayer, routers
from moekit.errors import UserError
from moekit.experts import BASELayerStack, Experts, GroupedGLU, GroupedMLP, ZeroComputationExperts
from moekit.huggingface import export_model, import_model
from moekit.inference import BeamSearch, ExpertsOnDemand, generate, load_on_demand, open_on_demand
from moekit.routing import Capacity
from moekit.testing import assert_close, skewed_tokens
from moekit.transformer import EncoderDecoder, RMSNorm, SplitSinusoidalPositions, every_other

D, F, E, T = 8, 12, 6, 20
BANKS: dict[str, Callable[[], Experts]] = {
    "mlp": lambda: GroupedMLP(E, D, F, bias=True),
    "mlp, no bias": lambda: GroupedMLP(E, D, F, activation="gelu"),
    "glu": lambda: GroupedGLU(E, D, F, hidden_bias="multiply"),
    "base": lambda: BASELayerStack(E, D, F, num_layers=2),
}


def read(bank: Experts) -> Callable[[int], dict[str, Tensor]]:
    return lambda expert: {n: t.select(bank.axes[n].index("expert"), expert) for n, t in bank.state_dict().items()}


def bank_of(name: str) -> Experts:
    bank = BANKS[name]()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.ndim))
    return bank.eval()


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("resident", [1, E])
def test_the_same_as_the_whole_bank(name: str, resident: int) -> None:
    bank = bank_of(name)
    on_demand = ExpertsOnDemand(bank, read(bank), resident=resident).eval()
    assert not on_demand.state_dict(), "it has no weights of its own"
    rows, counts = skewed_tokens(T, D, seed=1), torch.tensor([5, 0, 9, 1, 0, 5])
    assert_close(on_demand(rows, counts), bank(rows, counts))
    assert on_demand.loads == 4, "experts without rows stay on disk"
    padded = skewed_tokens(E * 3, D, seed=2).view(E, 3, D)
    assert_close(on_demand(padded), bank(padded))
    assert len(on_demand.held) == min(resident, E)


def test_the_least_recently_used_goes() -> None:
    bank = bank_of("mlp")
    on_demand = ExpertsOnDemand(bank, read(bank), resident=3).eval()
    x = torch.ones(1, D)
    for expert in (0, 1, 2, 0, 3):
        on_demand.reference(expert, x)
    assert on_demand.held == (2, 0, 3)
    assert on_demand.loads == 4
    on_demand.reference(1, x)
    assert on_demand.held == (0, 3, 1)
    assert on_demand.loads == 5
    assert "num_experts=6, resident=3" in repr(on_demand)


def test_what_it_refuses() -> None:
    bank = bank_of("mlp")
    with pytest.raises(ValueError, match="resident must be at least 1: got 0"):
        ExpertsOnDemand(bank, read(bank), resident=0)
    with pytest.raises(ValueError, match="ZeroComputationExperts cannot be fetched one by one"):
        ExpertsOnDemand(ZeroComputationExperts(GroupedMLP(2, D, F)), read(bank), resident=1)
    with pytest.raises(RuntimeError, match="is for evaluation"):
        ExpertsOnDemand(bank, read(bank), resident=1).train()(torch.ones(1, D), torch.tensor([1, 0, 0, 0, 0, 0]))


def layer(k: int = 1) -> MoELayer:
    if k == 1:
        capacity = Capacity(train=1.0, eval=1.0)
        return MoELayer(routers.TopKRouter(16, E, capacity=capacity, init_scale=4.0), GroupedMLP(E, 16, F))
    router = routers.TopKRouter(16, E, 2, renormalise="after_drop", init_scale=4.0)
    return MoELayer(router, GroupedMLP(E, 16, F, bias=True))


def seq2seq(k: int = 1) -> EncoderDecoder:
    options: dict[str, object] = {"norm": RMSNorm} if k == 1 else {"positions": SplitSinusoidalPositions(first=1)}
    return EncoderDecoder(
        40, 16, 2, 2, 2, F, feed_forward=every_other(lambda i, side: layer(k)), bias=k == 2, **options
    )  # type: ignore[arg-type]


def maps(path: Path) -> int:
    """How many pieces of a file this process has mapped."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_a_model_whose_experts_stay_in_its_file(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = seq2seq().eval()
    state = {f"backbone.{name}": tensor for name, tensor in whole.state_dict().items()}
    path = tmp_path / ("last.ckpt" if kind == "checkpoint" else "model.safetensors")
    if kind == "checkpoint":
        torch.save({"state_dict": {**state, "heads.bias": torch.ones(2)}, "epoch": 3}, path)
    else:
        save_file(state, path)
    with torch.device("meta"):
        small = seq2seq()
    load_on_demand(small, path, resident=2, prefix="backbone.")
    assert not any(p.is_meta for p in small.parameters())
    source = torch.randint(3, 40, (3, 9))
    for search in (None, BeamSearch(3)):
        a, b = (generate(model, source, search=search) for model in (whole, small))
        assert torch.equal(a.ids, b.ids)
        assert_close(a.token_scores, b.token_scores)
    banks = [m for m in small.modules() if isinstance(m, ExpertsOnDemand)]
    assert [bank.resident for bank in banks] == [2, 2]
    assert all(len(bank.held) == 2 and bank.loads > 2 for bank in banks)
    if Path("/proc/self/maps").exists():
        gc.collect()
        assert 0 < maps(path) <= 2 * 2 * 2, "two layers, two experts, two matrices"
        del small, banks
        gc.collect()
        assert maps(path) == 0, "what is forgotten is given back"


@pytest.mark.parametrize("k", [1, 2])
def test_a_folder_of_transformers(k: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = seq2seq(k)
    for module in model.modules():
        if isinstance(module, routers.TopKRouter):
            module.capacity = Capacity()
    folder = export_model(model, tmp_path / "model", max_shard_bytes=10_000)
    whole, small = import_model(folder).model, open_on_demand(folder, resident=2).model
    source = torch.randint(3, 40, (3, 9))
    a, b = generate(whole, source), generate(small, source)
    assert torch.equal(a.ids, b.ids)
    assert_close(a.token_scores, b.token_scores)
    assert not any(".experts." in name for name in small.state_dict())


LIMITED = """
import resource, sys
import torch
from moekit import MoELayer, routers
from moekit.experts import GroupedMLP
from moekit.inference import load_on_demand
from safetensors.torch import load_file

torch.set_num_threads(1)
path, whole = sys.argv[1], sys.argv[2] == "whole"
with torch.device("meta"):
    layer = MoELayer(routers.switch(256, 64), GroupedMLP(64, 256, 1024))
x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
with torch.inference_mode():
    if whole:
        layer.load_state_dict(load_file(path), assign=True)
    else:
        load_on_demand(layer, path, resident=4)
    print(float(layer.eval()(x).hidden.double().sum()), getattr(layer.experts, "loads", 0))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from /proc")
def test_a_model_larger_than_memory_answers(tmp_path: Path) -> None:
    """128 MB of experts in 64 MB: read as a whole they do not fit, on demand all 64 are used in turn."""
    torch.manual_seed(0)
    layer = MoELayer(routers.switch(256, 64), GroupedMLP(64, 256, 1024)).eval()
    path = tmp_path / "layer.safetensors"
    save_file(layer.state_dict(), path)
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = float(layer(x).hidden.double().sum())
    done = {
        kind: subprocess.run(
            [sys.executable, "-c", LIMITED, str(path), kind], capture_output=True, text=True, check=False
        )
        for kind in ("whole", "on demand")
    }
    assert done["whole"].returncode
    assert "allocate memory" in done["whole"].stderr or "MemoryError" in done["whole"].stderr
    assert done["on demand"].returncode == 0, done["on demand"].stderr
    found, loads = done["on demand"].stdout.split()
    assert float(found) == pytest.approx(wanted, abs=1e-2)
    assert int(loads) > 32


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(UserError, match="no checkpoint at"):
        load_on_demand(layer(), path, resident=1)
    torch.save({"weights": {}}, path)
    with pytest.raises(UserError, match="must hold a state_dict"):
        load_on_demand(layer(), path, resident=1)
    state = layer().state_dict()
    torch.save({"state_dict": {**state, "experts.w_in": torch.zeros(E, 16, F + 1)}}, path)
    with pytest.raises(UserError, match=r"experts\.w_in must have the shape \[6, 16, 12\]: got \[6, 16, 13\]"):
        load_on_demand(layer(), path, resident=1)
    del state["router.weight"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match=r"must hold router\.weight: it does not"):
        load_on_demand(layer(), path, resident=1)
