"""Where master weights are, and when they are swapped in; that they are right is tested in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moekit.parallel import Layout, MasterWeights, build_meshes, parallelize
from moekit.parallel.checkpoint.optimizer_state import _empty_statistic
from moekit.parallel.shards import dtensor_from_shard
from moekit.planner import Training, TransformerShape, plan
from moekit.transformer.init import materialize


@pytest.fixture
def processes() -> Iterator[None]:
    """Two that say nothing to each other."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("divide", [False, True])
def test_host_copies_of_weights_on_gpus_are_in_host_memory(divide: bool) -> None:
    """The optimizer's tensors, their gradients and their state; no GPU is needed to see where they are made."""
    mesh = DeviceMesh("cuda", torch.arange(2), mesh_dim_names=("replicate",))
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.empty(4, 6, device="cuda")
        parameter = nn.Parameter(dtensor_from_shard(weight, mesh, [Replicate()], weight.shape, weight.stride()))
        assert parameter.device.type == "cuda"
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        master = MasterWeights(optimizer, divide=divide, device=torch.device("cpu"))
        (entry,) = master.entries.values()
        assert isinstance(entry.tensor, DTensor)
        assert entry.tensor.to_local().device.type == "cpu"
        assert entry.tensor.to_local().shape == ((2, 6) if divide else (4, 6))
        gradient = torch.empty(4, 6, device="cuda")
        parameter.grad = dtensor_from_shard(gradient, mesh, [Replicate()], gradient.shape, gradient.stride())
        master.swap_in()
        master.load_from_model()
        assert isinstance(entry.tensor.grad, DTensor)
        assert entry.tensor.grad.to_local().device.type == "cpu"
        assert torch.zeros_like(entry.tensor).to_local().device.type == "cpu"  # as optimizers make their state
        # As a checkpoint's are read: of the parameter's shape, and Adafactor's, which have another.
        for shape in ((4, 6), (4,)):
            read: Any = _empty_statistic(entry.tensor, "exp_avg_sq", shape, torch.float32)
            assert read.to_local().device.type == "cpu"


def parameters(number: int) -> list[nn.Parameter]:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("replicate",))
    return [nn.Parameter(distribute_tensor(torch.full((2, 2), float(n)), mesh, [Replicate()])) for n in range(number)]


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_master_weights_are_swapped_in_only_during_the_step() -> None:
    """Whoever looks before and after, in a hook or in the closure, finds the model's parameters and gradients."""
    (parameter,) = parameters(1)
    optimizer: Any = torch.optim.SGD([parameter], lr=1.0, momentum=0.5)
    kind, seen = type(optimizer), []
    optimizer.register_step_post_hook(lambda *_: seen.append(float(parameter.full_tensor().detach().sum())))
    MasterWeights(optimizer, divide=True)
    assert type(optimizer) is kind

    def closure() -> float:
        assert optimizer.param_groups[0]["params"] == [parameter]
        parameter.grad = torch.ones_like(parameter)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert optimizer.param_groups[0]["params"] == [parameter]
    assert list(optimizer.state) == [parameter]
    assert seen == [-4.0]  # the hook sees the weights after the step, though it was there before the master weights
    optimizer.zero_grad()
    assert parameter.grad is None


@pytest.mark.usefixtures("alone")
def test_a_step_that_fails_leaves_the_parameters_in_place_for_the_next() -> None:
    first, second = parameters(2)
    optimizer: Any = torch.optim.SGD([first], lr=1.0)
    MasterWeights(optimizer, divide=True)
    first.grad = torch.ones_like(first)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert [group["params"] for group in optimizer.param_groups] == [[first], [second]]
    assert [float(p.full_tensor().detach().sum()) for p in (first, second)] == [-4.0, 0.0]


@pytest.mark.usefixtures("alone")
def test_two_kinds_of_master_weights_are_refused() -> None:
    optimizer = torch.optim.SGD(parameters(1), lr=1.0)
    master = MasterWeights(optimizer, divide=True)
    assert MasterWeights.of(optimizer, divide=True) is master
    with pytest.raises(ValueError, match="one kind of master weights: SGD has some already"):
        MasterWeights.of(optimizer, divide=False)


SHAPE = TransformerShape(
    vocab_size=64,
    dim=32,
    heads=4,
    hidden_dim=64,
    encoder_layers=2,
    decoder_layers=2,
    num_experts=8,
    capacity_factor=None,
)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("stage", "expert"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_bytes_of_a_gpu_and_of_its_host_are_the_planned(stage: Any, expert: int) -> None:
    """With an offloaded optimizer; weights are laid out as `parallelize` does it, and shown on a mesh of GPUs."""
    layout = Layout(devices=2, expert_parallel_size=expert, zero_stage=stage, offload="optimizer")
    model: Any = SHAPE.module()
    materialize(model, "cpu")
    parallelize(model, build_meshes(layout, "cpu"))
    parameters: list[Any] = list(model.parameters())
    meshes = {p.device_mesh: DeviceMesh("cuda", p.device_mesh.mesh, mesh_dim_names=p.device_mesh.mesh_dim_names)
              for p in parameters}  # fmt: skip

    def on_gpus(like: Any) -> DTensor:
        local = torch.empty(like.to_local().shape, device="cuda")
        return dtensor_from_shard(
            local, meshes.get(like.device_mesh, like.device_mesh), like.placements, like.shape, like.stride()
        )

    found = {"cuda": 0, "cpu": 0}

    def count(*tensors: Tensor | None) -> None:
        for tensor in tensors:
            assert isinstance(tensor, DTensor)
            found[tensor.to_local().device.type] += tensor.to_local().nbytes

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        weights = [nn.Parameter(on_gpus(parameter)) for parameter in parameters]
        optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
        master = MasterWeights(optimizer, divide=stage == 1, device=torch.device("cpu"))
        for weight in weights:
            weight.grad = on_gpus(weight)
        count(*weights, *(weight.grad for weight in weights))
        master.swap_in()
        master.load_from_model()
        for entry in master.entries.values():
            count(entry.tensor, entry.tensor.grad, torch.zeros_like(entry.tensor))
    memory = plan(SHAPE, layout, Training(precision="32-true", optimizer="momentum")).memory
    assert memory.optimizer == 0
    assert found == {"cuda": memory.weights + memory.gradients, "cpu": memory.host}
