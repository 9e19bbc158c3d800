"""The planner's forecasts of memory, traffic and operations against hand-made sums, and its searches for what fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_shape import TINY

from moekit.layer import MoELayer
from moekit.planner import (
    DEEPSPEED_3_5T,
    DEEPSPEED_FP16,
    GIB,
    ZCODE_M3_10B,
    Forecast,
    Layout,
    Training,
    compare,
    fewest_devices,
    largest,
    plan,
    take_census,
)
from moekit.planner.forecast import number


def by_hand(layout: Layout) -> tuple[int, int]:
    """Numbers of a device, whole and as ZeRO divides them, of a model all of whose sizes divide evenly."""
    whole = divided = 0
    model = TINY.module()
    banks = {id(p) for m in model.modules() if isinstance(m, MoELayer) for p in m.experts.parameters()}
    sliced = ("qkv", "q.weight", "kv", "out.weight", "w_in", "w_out", "embedding")
    for name, p in model.named_parameters():
        if id(p) in banks:
            n = p.numel() // (layout.expert_parallel_size * layout.tensor_parallel_size)
            divided += n // layout.expert_shard_size
        else:
            n = p.numel() // (layout.tensor_parallel_size if any(part in name for part in sliced) else 1)
            divided += n // layout.shard_size
        whole += n
    return whole, divided


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("expert", "tensor", "replicas"), [(1, 1, 1), (4, 1, 1), (2, 1, 2), (4, 2, 1), (8, 1, 1)])
def test_bytes_by_stage(stage: int, expert: int, tensor: int, replicas: int) -> None:
    layout = Layout(
        devices=8,
        expert_parallel_size=expert,
        tensor_parallel_size=tensor,
        replicas=replicas if stage >= 2 else 1,
        zero_stage=stage,  # type: ignore[arg-type]
    )
    whole, divided = by_hand(layout)
    memory = plan(TINY, layout, Training(precision="32-true")).memory
    assert memory.weights == 4 * (divided if stage >= 2 else whole)
    assert memory.gradients == 4 * (divided if stage >= 2 else whole)
    assert memory.optimizer == 8 * (divided if stage >= 1 else whole)
    assert memory.host == 0
    # Stage 2 holds them whole until the last micro-batch.
    later = plan(TINY, layout, Training(precision="32-true", accumulate=4)).memory
    assert later.gradients == 4 * (divided if stage == 3 else whole)


@pytest.mark.parametrize(("precision", "copied"), [("32-true", 0), ("bf16-true", 0), ("bf16-mixed", 2)])
def test_without_the_strategy_there_are_autocasts_copies_alone(precision: str, copied: int) -> None:
    whole, _ = by_hand(layout := Layout(zero_stage=0))
    assert plan(TINY, layout, Training(precision=precision, plain=True)).memory.working == copied * whole


def test_offload_moves_bytes_to_the_host() -> None:
    training = Training(precision="32-true")
    base = plan(TINY, Layout(devices=4), training).memory
    optimizer = plan(TINY, Layout(devices=4, offload="optimizer"), training).memory
    parameters = plan(TINY, Layout(devices=4, offload="parameters"), training).memory
    # The optimizer works on copies of weights and gradients there: as many bytes as AdamW's two statistics.
    assert (optimizer.optimizer, optimizer.host) == (0, base.optimizer * 2)
    fp16 = Training(precision=DEEPSPEED_FP16)  # whose optimizer has a copy of the weights anyway
    owned = plan(TINY, Layout(devices=4), fp16).memory.optimizer
    assert plan(TINY, Layout(devices=4, offload="optimizer"), fp16).memory.host == owned * 14 / 12
    assert (optimizer.weights, optimizer.gradients) == (base.weights, base.gradients)
    assert parameters.weights == parameters.gradients == parameters.optimizer == 0
    assert parameters.host == base.weights + base.gradients + base.optimizer
    assert parameters.working == base.working > 0


def test_optimizers_and_precisions() -> None:
    def bytes_of(**kwargs: Any) -> tuple[float, float, float]:
        memory = plan(TINY, Layout(zero_stage=0), Training(**kwargs)).memory
        return memory.weights, memory.gradients, memory.optimizer

    n = plan(TINY, Layout()).parameters
    assert bytes_of(precision="32-true") == (4 * n, 4 * n, 8 * n)
    assert bytes_of(precision="bf16-true") == (2 * n, 2 * n, 4 * n)
    assert bytes_of(precision=DEEPSPEED_FP16) == (2 * n, 2 * n, 12 * n)
    assert bytes_of(precision="32-true", optimizer="sgd") == (4 * n, 4 * n, 0)
    assert bytes_of(precision="32-true", optimizer="momentum") == (4 * n, 4 * n, 4 * n)
    # A bank of eight 64 x 128 matrices: 64 + 128 numbers for each instead of 64 * 128.
    adafactor = bytes_of(precision="32-true", optimizer="adafactor")[2]
    model = TINY.module()
    factored = sum(sum(p.numel() // n for n in p.shape[-2:]) if p.dim() > 1 else p.numel() for p in model.parameters())
    assert adafactor == 4 * factored < 0.2 * n


def test_checkpointing_trades_memory_for_operations() -> None:
    shape = replace(ZCODE_M3_10B, vocab_size=8000)  # logits take the same either way
    plain = plan(shape, Layout(), Training())
    again = plan(shape, Layout(), Training(checkpointing=True))
    assert again.memory.activations < plain.memory.activations / 5
    assert plain.flops_per_step < again.flops_per_step < 4 / 3 * plain.flops_per_step
    assert again.flops_per_token == plain.flops_per_token


def test_traffic_by_hand() -> None:
    training = Training(sequences=4, source_length=12, target_length=10, precision="32-true", accumulate=3)
    layout = Layout(devices=8, expert_parallel_size=4, replicas=2, zero_stage=3)
    whole = {True: 0, False: 0}
    for unit in take_census(TINY, training).units:
        for w in unit.weights:
            whole[w.is_expert] += unit.count * w.numel
    dense, experts = whole[False], whole[True] / 4
    traffic = plan(TINY, layout, training).traffic
    # Capacity factor 1: as many slots as tokens (48 and 40 are multiples of 8); two encoder layers and one decoder's.
    rows = 2 * 48 + 40
    assert traffic.all_to_all == pytest.approx(3 * 2 * 2 * rows * 64 * 4 * 3 / 4)  # micro, ways, passes
    # Dense weights are shared by 4 devices of a replica; experts, 4 times 1 device, by nobody but the other replica.
    assert traffic.all_gather == pytest.approx(3 * 2 * dense * 4 * 3 / 4)
    assert traffic.reduce_scatter == pytest.approx(3 * dense * 4 * 3 / 4)  # in every micro-batch
    assert traffic.all_reduce == pytest.approx(2 * (dense / 4 + experts) * 4 / 2)

    stage_2 = plan(TINY, replace(layout, zero_stage=2), training).traffic
    assert stage_2.all_gather == traffic.all_gather / 2
    assert stage_2.reduce_scatter == traffic.reduce_scatter / 3
    stage_0 = plan(TINY, replace(layout, zero_stage=0, replicas=1), training).traffic
    assert stage_0.all_gather == stage_0.reduce_scatter == 0
    assert stage_0.all_reduce == pytest.approx(2 * 4 * (dense * 7 / 8 + experts / 2))
    alone = plan(TINY, Layout(), training).traffic
    assert alone.total == 0


def test_mixed_precision_gathers_blocks_in_two_bytes() -> None:
    """Tables go in four, and autocast keeps a copy of them in two; gradients and what is stored stay in four."""
    wide, mixed = Training(precision="32-true"), Training(precision="bf16-mixed")
    sizes = {True: 0, False: 0}
    largest = 0
    for unit in take_census(TINY, wide).units:
        size = sum(w.numel for w in unit.weights)
        sizes[unit.kind == "block"] += unit.count * size
        largest = max(largest, size if unit.kind == "block" else 0)
    blocks, others = sizes[True], sizes[False]
    layout = Layout(devices=4)
    before, after = plan(TINY, layout, wide), plan(TINY, layout, mixed)
    assert before.traffic.all_gather == pytest.approx(2 * 4 * (blocks + others) * 3 / 4)
    assert after.traffic.all_gather == pytest.approx(2 * (2 * blocks + 4 * others) * 3 / 4)
    assert after.traffic.reduce_scatter == before.traffic.reduce_scatter
    assert before.memory.working - after.memory.working == pytest.approx(2 * (2 * largest) - 2 * others)
    stage_2 = replace(layout, zero_stage=2)
    saved = plan(TINY, stage_2, wide).memory.working - plan(TINY, stage_2, mixed).memory.working
    assert saved == pytest.approx(2 * blocks - 2 * others)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(after.memory, name) == getattr(before.memory, name)


def test_tensor_parallelism_adds_sums() -> None:
    training = Training(sequences=4, source_length=12, target_length=10, precision="32-true")
    layout = Layout(devices=2, tensor_parallel_size=2, zero_stage=0)
    flat = plan(TINY, Layout(devices=2, zero_stage=0), training)
    sliced = plan(TINY, layout, training)
    # Two sums in an encoder block, three in a decoder block; forward and backward, where the gradient of the memory is
    # summed too; vectors of both sides forward, the gradient before the logits backward. A ring of two sends each once.
    forward = 4 * 2 * 48 + 2 * 3 * 40 + (48 + 40)
    backward = 4 * 2 * 48 + 2 * (3 * 40 + 48) + 40
    assert sliced.traffic.all_reduce == pytest.approx((forward + backward) * 64 * 4)
    assert sliced.traffic.all_gather == 40 * 96 * 4 / 2
    assert sliced.flops_per_step == flat.flops_per_step / 2
    assert sliced.memory.weights < flat.memory.weights
    assert sliced.tokens_per_step == flat.tokens_per_step / 2


@pytest.mark.parametrize("grow", ["experts", "layers", "width"])
def test_the_largest_fits_and_the_next_does_not(grow: Any) -> None:
    layout, training = Layout(devices=8, expert_parallel_size=8), Training(checkpointing=True, sequences=1)
    found = largest(ZCODE_M3_10B, layout, training, 16 * GIB, grow=grow)
    assert found.fits(16 * GIB)
    bank = next(w for u in found.census.units for w in u.weights if w.is_expert)
    table = next(w for u in found.census.units if u.kind == "vocabulary" for w in u.weights)
    layers = {u.name.split()[0]: 0 for u in found.census.units if u.kind == "block"}
    for unit in found.census.units:
        if unit.kind == "block":
            layers[unit.name.split()[0]] += unit.count
    dim = table.shape[1]
    shape = replace(
        ZCODE_M3_10B,
        num_experts=bank.shape[0],
        dim=dim,
        hidden_dim=4 * dim,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
    )
    assert plan(shape, layout, training).memory == found.memory
    more = {
        "experts": {"num_experts": shape.num_experts + 8},
        "layers": {"encoder_layers": layers["encoder"] + 4, "decoder_layers": layers["decoder"] + 2},
        "width": {"dim": dim + 16, "hidden_dim": 4 * (dim + 16)},
    }[grow]
    assert not plan(replace(shape, **more), layout, training).fits(16 * GIB)  # type: ignore[arg-type]
    assert layers["encoder"] == 2 * layers["decoder"]


def test_fewest_devices() -> None:
    training = Training(checkpointing=True, sequences=2)
    found = fewest_devices(ZCODE_M3_10B, training, 20 * GIB)
    assert found.fits(20 * GIB)
    n = found.layout.devices
    for size in (1, 2, 4, 8, 16, 32, 64):
        if (n - 1) % size == 0:
            try:
                assert not plan(ZCODE_M3_10B, Layout(devices=n - 1, expert_parallel_size=size), training).fits(20 * GIB)
            except ValueError:
                continue  # experts cannot be divided so
    nodes = fewest_devices(ZCODE_M3_10B, training, 20 * GIB, node=8)
    assert nodes.layout.devices >= n
    assert nodes.layout.devices <= 8 or nodes.layout.devices % 8 == 0
    assert fewest_devices(TINY, Training(sequences=1), 1 * GIB).layout.devices == 1
    # Numbers that many experts can divide are tried, however sparse those are that few can.
    assert fewest_devices(ZCODE_M3_10B, Training(checkpointing=True), 12 * GIB).layout.devices == 64
    three = fewest_devices(
        ZCODE_M3_10B, Training(checkpointing=True), 16 * GIB, like=Layout(devices=3, replicas=3), node=8
    )
    assert three.layout.devices % 24 == 0
    # Experts that divide the devices' number are the only ones tried; the module says it as well as the shape.
    assert fewest_devices(ZCODE_M3_10B.module(), training, 20 * GIB).layout == found.layout


def test_more_of_each_dimension_is_less_memory() -> None:
    """Every parallel dimension buys something where the one before has run out."""
    training = Training(checkpointing=True, sequences=1, precision=DEEPSPEED_FP16)

    def need(**kwargs: Any) -> float:
        return plan(DEEPSPEED_3_5T, Layout(devices=512, **kwargs), training).memory.device

    steps = [
        need(zero_stage=0),
        need(zero_stage=0, expert_parallel_size=64),
        need(zero_stage=0, expert_parallel_size=512),
        need(zero_stage=1, expert_parallel_size=512),
        need(zero_stage=1, expert_parallel_size=64, tensor_parallel_size=8),
        need(zero_stage=1, expert_parallel_size=64, tensor_parallel_size=8, offload="optimizer"),
    ]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == len(steps)
    assert steps[-1] < 38 * GIB < steps[-2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"devices": 6, "expert_parallel_size": 4}, r"got 4 \* 1 \* 1 for 6\. Use expert_parallel_size=3, or 4 proc"),
        ({"devices": 4, "replicas": 2, "tensor_parallel_size": 4}, r"got 1 \* 4 \* 2 for 4\. Use .*=1, or 8 processes"),
        (
            {"devices": 4, "replicas": 2, "zero_stage": 1},
            r"replicas are for zero_stage 2 and 3: got 2 with zero_stage 1",
        ),
        ({"devices": 0}, "devices must be at least 1: got 0"),
        ({"zero_stage": 4}, "must be 0, 1, 2 or 3: got 4"),
        ({"offload": "disk"}, "got 'disk'"),
    ],
)
def test_layouts_that_cannot_be(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**kwargs)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"got 8 experts and 16\. Use expert_parallel_size 8, or 16 experts"):
        plan(TINY, Layout(devices=16, expert_parallel_size=16))
    with pytest.raises(ValueError, match=r"tiny has no experts\. Use 1"):
        plan(replace(TINY, num_experts=0), Layout(devices=2, expert_parallel_size=2))
    with pytest.raises(ValueError, match=r"axis 'vocab' of the tables and logits .*got 97 and 2\. Use 98"):
        plan(replace(TINY, vocab_size=97), Layout(devices=2, tensor_parallel_size=2))
    with pytest.raises(
        ValueError, match=r"ZeRO stage 3 must divide a weight of shape \(4, 64, 128\) .* among 3 devices"
    ):
        plan(TINY, Layout(devices=6, expert_parallel_size=2))
    whole = plan(TINY, Layout(devices=6, expert_parallel_size=2, zero_stage=1), Training(precision="32-true")).memory
    assert whole.optimizer > 8 * TINY.num_experts / 2 * 3 * 2 * 64 * 128  # repeated, as it cannot be divided
    with pytest.raises(ValueError, match=r"got 'fp8'"):
        Training(precision="fp8")
    with pytest.raises(ValueError, match=r"got 'lion'"):
        Training(optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sequences must be at least 1"):
        Training(sequences=0)
    with pytest.raises(ValueError, match=r"needs layers"):
        replace(TINY, encoder_layers=0, decoder_layers=0)
    with pytest.raises(ValueError, match=r"the smallest tiny needs .* GiB a device"):
        largest(TINY, Layout(), Training(), 1000)
    with pytest.raises(ValueError, match=r"has no experts to grow"):
        largest(replace(TINY, num_experts=0), Layout(), Training(), GIB)
    with pytest.raises(ValueError, match=r"still fits"):
        largest(TINY, Layout(), Training(sequences=1), GIB, limit=4)
    with pytest.raises(ValueError, match=r"fits on no number of devices up to 4"):
        fewest_devices(ZCODE_M3_10B, Training(sequences=1), GIB, limit=4)
    with pytest.raises(ValueError, match=r"axis 'vocab'"):
        fewest_devices(replace(TINY, vocab_size=97), Training(), GIB, like=Layout(devices=2, tensor_parallel_size=2))
    with pytest.raises(ValueError, match=r'must be "experts", "layers" or "width": got \'depth\''):
        largest(TINY, Layout(), Training(), GIB, grow="depth")  # type: ignore[arg-type]


def test_tables() -> None:
    made = plan(ZCODE_M3_10B, Layout(devices=64, expert_parallel_size=64), Training(checkpointing=True))
    text, page = made.table(), made.markdown()
    for part in ("Z-code M3 10B", "10.3 B", "761 M", "64 devices, expert 64, ZeRO 3", "all-to-all"):
        assert part in text
        assert part in page
    assert page.splitlines()[1] == "| --- | ---: |"
    both = compare({"one": made, "two": made}, markdown=True)
    assert both.startswith("| | one | two |")
    assert all(line.count("|") == 4 for line in both.splitlines())
    assert isinstance(made, Forecast)


def test_rows_that_one_of_two_forecasts_needs() -> None:
    """What is the same as another row is left out, unless a forecast beside it has something to say there."""
    fully, partly = TINY.module(), TINY.module()
    for parameter in partly.embedding.parameters():
        parameter.requires_grad_(False)
    frozen = sum(p.numel() for p in partly.embedding.parameters())
    one, two = plan(fully, Layout()), plan(partly, Layout())
    assert "trained" not in compare({"one": one}, markdown=True)
    for pair in ({"one": one, "two": two}, {"two": two, "one": one}):
        row = next(line for line in compare(pair, markdown=True).splitlines() if line.startswith("| trained"))
        both = {"one": number(one.parameters), "two": number(one.parameters - frozen)}
        assert row == f"| trained | {' | '.join(both[name] for name in pair)} |"
        assert "at most" not in compare(pair, markdown=True)


@pytest.mark.parametrize(
    ("value", "said"),
    [(999, "999"), (1_234_567, "1.23 M"), (999_600, "1 M"), (999_400, "999 k"), (9.996e8, "1 B"), (5e18, "5,000 P")],
)
def test_large_numbers_in_three_digits(value: float, said: str) -> None:
    assert number(value) == said
