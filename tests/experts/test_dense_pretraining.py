"""The dense phase: a dense feed-forward step for step, then experts that part."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from moekit import AuxLosses, MoELayer, RoutingContext, routers
from moekit.experts import (
    AddNoise,
    BASELayerStack,
    DensePretraining,
    Experts,
    GroupedGLU,
    GroupedMLP,
    MaskWeights,
    ZeroComputationExperts,
)
from moekit.parallel import Layout, build_meshes, parallelize
from moekit.routing import Capacity, Router
from moekit.testing import assert_close, run_distributed, seeded
from moekit.transformer import MLP, DecoderOnly

D, E, F, T = 6, 4, 10, 37
MASK = torch.arange(T) % 4 < 3
BANKS: dict[str, Callable[[], Experts]] = {
    "GroupedMLP": lambda: GroupedMLP(E, D, F, bias=True, init_scale=1.0),
    "GroupedGLU": lambda: GroupedGLU(E, D, F, hidden_bias="multiply", init_scale=1.0),
}
ROUTERS: dict[str, Callable[[], Router]] = {
    "capacity": lambda: routers.TopKRouter(D, E, 2, capacity=Capacity(train=0.5, minimum=1)),
    "dropless": lambda: routers.TopKRouter(D, E, 2),
    "loss free": lambda: routers.loss_free(D, E, k=2),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
}


def layer(bank: str = "GroupedMLP", router: str = "capacity", steps: int = 3, **phase: object) -> MoELayer:
    with seeded(1):
        return MoELayer(ROUTERS[router](), BANKS[bank](), phase=DensePretraining(steps, **phase))  # type: ignore[arg-type]


def dense_twin(moe: MoELayer) -> Experts:
    """The layer's expert 0, alone, as a bank of one."""
    with seeded(2):
        twin = type(moe.experts)(1, D, F, **_options(moe.experts))  # type: ignore[arg-type,call-arg]
    twin.to(next(moe.experts.parameters()).dtype)
    twin.load_state_dict({name: weight[:1] for name, weight in moe.experts.state_dict().items()})
    return twin


def _options(bank: Experts) -> dict[str, object]:
    return {"bias": True} if isinstance(bank, GroupedMLP) else {"hidden_bias": "multiply"}


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(2, T, D, generator=generator, dtype=torch.float64)) for _ in range(number)]  # type: ignore[misc]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("router", ["capacity", "loss free"])
def test_tied_experts_are_a_dense_feed_forward_step_for_step(bank: str, router: str, optimizer: str) -> None:
    """Outputs, gradients, weights and the optimizer's state, for every copy; then experts go on from there."""
    moe = layer(bank, router).double()
    twin = dense_twin(moe)
    steps = OPTIMIZERS[optimizer](moe), OPTIMIZERS[optimizer](twin)
    frozen = {name: p.clone() for name, p in moe.router.named_parameters()}
    for number, (x, target) in enumerate(batches(3), start=1):
        assert moe.phase.active
        assert moe.requires_whole_bank
        found, expected = moe(x).hidden, twin(x, torch.tensor([T]))
        assert_close(found, expected, f"output at step {number}")
        for hidden, step in zip((found, expected), steps, strict=True):
            step.zero_grad()
            (hidden - target).square().mean().backward()
        for name, parameter in moe.experts.named_parameters():
            for e in range(E):
                assert_close(parameter.grad[e], dict(twin.named_parameters())[name].grad[0], f"gradient of {name}[{e}]")
        assert all(p.grad is not None and not p.grad.any() for p in moe.router.parameters())
        for step in steps:
            step.step()
        moe.on_step_end(number)
    assert not moe.phase.active
    assert not moe.requires_whole_bank
    for name, parameter in moe.experts.named_parameters():
        dense = dict(twin.named_parameters())[name]
        for e in range(E):
            assert_close(parameter[e], dense[0], f"{name}[{e}] after the dense phase")
            for key, value in steps[0].state[parameter].items():
                other = steps[1].state[dense][key]
                if isinstance(value, Tensor) and value.ndim:
                    assert_close(value[e], other[0], f"{key} of {name}[{e}]")
    decay = (1 - 0.01 * 0.1) ** 3 if optimizer == "AdamW" else None
    for name, parameter in moe.router.named_parameters():
        assert decay is None or torch.allclose(parameter, decay * frozen[name]), "nothing but weight decay"
    x, target = batches(4)[-1]
    (moe(x).hidden - target).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in moe.router.parameters())
    steps[0].step()
    first = next(moe.experts.parameters())
    assert not torch.equal(first[0], first[1]), "routing parts the experts"


def test_it_is_the_dense_layer_of_a_transformer() -> None:
    """The same function as `MLP`, with its weights transposed."""
    moe, x = layer(), torch.randn(2, 7, D)
    mlp = MLP(D, F, bias=True)
    with torch.no_grad():
        mlp.w_in.weight.copy_(moe.experts.w_in[0].t())
        mlp.w_out.weight.copy_(moe.experts.w_out[0].t())
        mlp.w_in.bias.copy_(moe.experts.b_in[0])
        mlp.w_out.bias.copy_(moe.experts.b_out[0])
    assert_close(moe(x).hidden, mlp(x))
    assert_close(moe.eval()(x).hidden, mlp(x))


def test_experts_that_did_not_start_equal_learn_as_one() -> None:
    """As after drawing all weights anew: expert 0 counts, the others are overwritten when the phase ends."""
    moe = layer().double()
    moe.experts.reset_parameters()
    assert not torch.equal(moe.experts.w_in[0], moe.experts.w_in[1])
    twin = dense_twin(moe)
    x, _ = batches(1)[0]
    assert_close(moe(x).hidden, twin(x, torch.tensor([T])))
    moe.on_step_end(3)
    for name, parameter in moe.experts.named_parameters():
        assert all(torch.equal(parameter[e], twin.get_parameter(name)[0]) for e in range(E))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_routing_of_the_dense_phase(router: str) -> None:
    """Every real token once with weight 1, load even, losses 0 under the router's names; padding gets zeros."""
    moe = layer(router=router)
    x = torch.randn(T, D).masked_fill(~MASK[:, None], float("nan"))
    hidden, routing = moe(x, RoutingContext(mask=MASK))
    assert hidden.isfinite().all()
    assert not hidden[~MASK].any()
    assert torch.equal(routing.kept, MASK)
    assert (routing.weight == 1).all()
    load = torch.bincount(routing.expert[MASK], minlength=E)
    assert int(load.max() - load.min()) <= 1
    for e in range(E):
        places = routing.position[MASK & (routing.expert == e)]
        assert places.tolist() == list(range(len(places)))
    assert (routing.position[~MASK] == -1).all()
    moe.on_step_end(3)
    assert moe(x, RoutingContext(mask=MASK)).routing.losses.keys() == routing.losses.keys()
    assert not any(loss.any() for loss in routing.losses.values())
    names = dict.fromkeys(routing.losses, 1.0)
    total, _ = AuxLosses(**names)(routing)
    assert float(total.detach()) == 0.0


def test_a_router_that_does_not_act_observes_nothing() -> None:
    """A bias that follows load stays where it is, though the router is told what its forwards returned."""
    moe = layer(router="loss free")
    moe.router.register_forward_hook(lambda router, _, routing: router.observe(routing))
    for step, moves in ((3, False), (4, True)):
        moe(torch.randn(T, D))
        moe.router.on_step_end(step)
        assert moe.router.bias.any() == moves
        moe.on_step_end(step)


def test_checkpointing_and_copies_in_the_dense_phase() -> None:
    moe, x = layer().double(), batches(1)[0][0]
    moe(x).hidden.square().sum().backward()
    expected = [p.grad.clone() for p in moe.experts.parameters()]
    moe.zero_grad()
    checkpoint(lambda x: moe(x).hidden, x, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(moe.experts.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient)
    twin = copy.deepcopy(moe)
    twin.on_step_end(3)
    assert moe.phase.active
    assert not twin.phase.active


@pytest.mark.parametrize("perturb", [MaskWeights(0.3), AddNoise(0.5)])
def test_perturbation_at_the_end(perturb: object) -> None:
    """Of matrices only, in every expert other, by the seed alone; moments stay."""
    parted = []
    for seed in (7, 7, 8):
        moe = layer(perturb=perturb, seed=seed)
        before = moe.experts.w_in[0].clone()
        torch.manual_seed(seed)  # the global generator does not matter
        torch.rand(seed)
        moe.on_step_end(3)
        parted.append(moe.experts)
        changed = (moe.experts.w_in != before).float().mean((1, 2))
        if isinstance(perturb, MaskWeights):
            assert torch.equal(moe.experts.w_in == 0, moe.experts.w_in != before)
            assert ((changed > 0.05) & (changed < 0.6)).all()
        else:
            assert (changed == 1).all()
            assert float(((moe.experts.w_in - before).std() / before.std()).detach()) == pytest.approx(0.5, rel=0.2)
        assert not torch.equal(moe.experts.w_in[0], moe.experts.w_in[1])
        assert not moe.experts.b_in.any()  # untouched zeros
    assert torch.equal(parted[0].w_in, parted[1].w_in)
    assert not torch.equal(parted[0].w_in, parted[2].w_in)


def test_perturbation_leaves_norms_and_biases_of_stacks_alone() -> None:
    """Their parameters have an axis of layers before that of channels, and are no matrices for all that."""
    bank = BASELayerStack(E, D, F, num_layers=3)
    moe = MoELayer(routers.base_layers(D, E), bank, phase=DensePretraining(1, perturb=MaskWeights(0.3)))
    moe.on_step_end(1)
    assert bool((bank.norm_gain == 1).all())
    bank = BASELayerStack(E, D, F, num_layers=3, output_scale=1.0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    moe = MoELayer(routers.base_layers(D, E), bank, phase=DensePretraining(1, perturb=AddNoise(0.5)))
    moe.on_step_end(1)
    alike = {name for name, parameter in bank.named_parameters() if torch.equal(parameter[0], parameter[1])}
    assert alike == {"norm_gain", "norm_shift", "b_in", "b_out"}


def test_a_gating_residual_behind_the_dense_phase_is_given_scores_that_say_nothing() -> None:
    def sparse(layer: int, side: str) -> MoELayer:
        router = routers.TopKRouter(D, E, 2, residual=routers.GatingResidual(E, None if layer == 0 else E))
        phase = DensePretraining(2) if layer == 0 else None
        return MoELayer(router, GroupedMLP(E, D, F), phase=phase)

    model = DecoderOnly(20, D, 2, 2, F, feed_forward=sparse)
    output = model.decode(torch.arange(10).view(2, 5))
    first, second = output.routings
    assert first.logits is not None
    assert first.logits.shape == (10, E)
    assert not first.logits.any()
    output.hidden[..., 0].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "router" in name}
    assert all(gradient is not None for gradient in gradients.values())
    assert not gradients["decoder.layers.1.feed_forward.router.residual.weight"].any()  # type: ignore[union-attr]
    assert second.logits is not None
    assert bool(second.logits.any())


def test_it_ends_once() -> None:
    moe = layer(perturb=AddNoise(0.5))
    moe.on_step_end(2)
    assert moe.phase.active
    moe.on_step_end(3)
    after = moe.experts.w_in.clone()
    moe.on_step_end(4)
    assert torch.equal(moe.experts.w_in, after)
    assert not layer(steps=0).phase.active


def test_state_dict_says_whether_it_is_over() -> None:
    moe, fresh = layer(perturb=MaskWeights(0.3)), layer()
    moe.on_step_end(3)
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert not fresh.phase.active
    x = torch.randn(T, D)
    assert torch.equal(fresh.eval()(x).hidden, moe.eval()(x).hidden)
    fresh.load_state_dict(layer().state_dict())
    assert fresh.phase.active
    fresh.on_step_end(3)
    fresh.phase.reset_parameters()
    assert fresh.phase.active


def test_from_the_meta_device() -> None:
    with torch.device("meta"):
        moe = layer()
    moe.to_empty(device="cpu")
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert moe.phase.active
    assert not moe.phase.done
    assert moe(torch.randn(T, D)).hidden.isfinite().all()


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.moe = layer(steps=2, perturb=MaskWeights(0.2)).double()
        self.phases: list[bool] = []

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        self.phases.append(self.moe.phase.active)
        x, target = batches(8)[2 * self.current_epoch + number]
        return (self.moe(x).hidden - target).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Saver(Callback):
    """Saves after every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def fit(folder: Path, resume: str | None = None) -> Module:
    """Four epochs of one optimizer step of two batches each, saved after each."""
    module = Module()
    torch.manual_seed(0)
    L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=4,
        accumulate_grad_batches=2,
        callbacks=[] if resume else [Saver(folder)],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(torch.zeros(2)), ckpt_path=resume, weights_only=True)  # type: ignore[arg-type]
    return module


def test_under_a_trainer_and_resumed(tmp_path: Path) -> None:
    """Two optimizer steps of two batches each are dense; resumed before and after the parting, all goes on the same."""
    whole = fit(tmp_path)
    assert whole.phases == [True] * 4 + [False] * 4
    for epoch in (0, 1, 2):
        resumed = fit(tmp_path, str(tmp_path / f"{epoch}.ckpt"))
        assert resumed.phases == whole.phases[2 * epoch + 2 :]
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), f"{name}, resumed after epoch {epoch}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DensePretraining(-1), "steps must not be negative: got -1"),
        (lambda: MaskWeights(1.0), "probability must be in"),
        (lambda: AddNoise(-0.1), "scale must not be negative"),
        (
            lambda: MoELayer(
                routers.switch(D, 6), ZeroComputationExperts(GroupedMLP(2, D, F)), phase=DensePretraining(1)
            ),
            "a bank of 6 experts that are all alike: ZeroComputationExperts has others",
        ),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_experts_spread_over_processes_are_refused() -> None:
    """A bank that sees two of its four experts, as under expert parallelism."""
    moe = layer()
    for name in ("w_in", "w_out", "b_in", "b_out"):
        moe.experts.__dict__[name] = getattr(moe.experts, name)[:2]
    with pytest.raises(
        RuntimeError, match=r"got Tensor of shape \(2, 6, 10\) for 4 experts. Use expert_parallel_size=1"
    ):
        moe(torch.randn(T, D))
    assert moe.experts.w_in.shape == (2, D, F), "what was shown is hidden again"
    for name in ("w_in", "w_out", "b_in", "b_out"):
        del moe.experts.__dict__[name]
    assert moe(torch.randn(T, D)).hidden.shape == (T, D)


# -- on several processes -----------------------------------------------------------------------------------------


class Model(nn.Module):
    """A residual around the layer, and a dense weight beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = layer("GroupedGLU", "dropless", steps=2, perturb=MaskWeights(0.3))
        with seeded(4):
            self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.moe(x).hidden)


def train(model: nn.Module, moe: MoELayer, share: slice) -> list[Tensor]:
    """Four steps, two of them dense, on the share of each batch that this process reads."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for number, (x, target) in enumerate(batches(4), start=1):
        optimizer.zero_grad()
        loss = (model(x[:36][share]) - target[:36][share]).square().mean()
        loss.backward()
        optimizer.step()
        moe.on_step_end(number)
        losses.append(loss.detach())
    return losses


def on_two_ranks(zero_stage: int, tensor: int) -> dict[str, Tensor]:
    layout = Layout(devices=2, zero_stage=zero_stage, tensor_parallel_size=tensor)  # type: ignore[arg-type]
    model = Model().double()
    meshes = build_meshes(layout, "cpu")
    parallelize(model, meshes)
    half = slice(None) if tensor > 1 else slice(18 * dist.get_rank(), 18 * (dist.get_rank() + 1))
    train(model, model.moe, half)
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


def every_layout() -> dict[str, dict[str, Tensor]]:
    found = {f"ZeRO {stage}": on_two_ranks(stage, 1) for stage in (0, 3)}
    found["tensor parallel"] = on_two_ranks(3, 2)
    with pytest.raises(ValueError, match="needs all its experts in one process"):
        parallelize(Model(), build_meshes(Layout(devices=2, expert_parallel_size=2), "cpu"))
    return found


def test_on_two_processes_as_on_one() -> None:
    """The dense phase, the parting and what follows: ZeRO and tensor parallelism change no weight."""
    model = Model().double()
    train(model, model.moe, slice(None))
    for name, found in run_distributed(every_layout, 2)[0].items():
        for key, weight in model.named_parameters():
            assert_close(found[key], weight, f"{key}, {name}")
