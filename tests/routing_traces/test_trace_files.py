"""Files of routing: what is read is what routers returned, and damage is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moekit as mk
from moekit.errors import UserError
from moekit.routers import (
    ExpertChoiceRouter,
    GatingResidual,
    RandomChoice,
    ReLURouter,
    TopKRouter,
    UniformRouter,
)
from moekit.routing import Capacity, Routing, RoutingContext
from moekit.routing_traces import (
    RoutingTrace,
    TracedBatch,
    TracedLayer,
    TracedTokens,
    TraceWriter,
    read_trace,
    record,
    replay,
)
from moekit.routing_traces.recording import on_host
from moekit.routing_traces.trace import joined, part_of
from moekit.routing_traces.writing import comment, digest
from moekit.testing.cases import skewed_tokens, some_context, some_mask
from moekit.testing.routing import check_routing
from moekit.training.callbacks.routing_recorder import RoutingRecorder

D, E, T = 8, 4, 48
ROUTERS = {
    "one choice, dropless": lambda: TopKRouter(D, E),
    "two, position": lambda: TopKRouter(D, E, 2, capacity=Capacity(train=0.6)),
    "two, random, some not sent": lambda: TopKRouter(
        D, E, 2, capacity=Capacity(train=0.6, priority="random"), second_expert=RandomChoice(0.5)
    ),
    "probability, local groups": lambda: TopKRouter(
        D, E, 3, capacity=Capacity(train=0.5, priority="probability", group_size=16)
    ),
    "300 experts": lambda: TopKRouter(D, 300, 2),
    "no weights of its own": lambda: UniformRouter(E, 2, order="random"),
    "any number of experts": lambda: ReLURouter(D, E, 1.5),
    "experts choose": lambda: ExpertChoiceRouter(D, E),
}
FIELDS = ("token", "expert", "weight", "position", "kept")


def same(got: Routing, expected: Routing) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
        assert getattr(got, name).dtype == getattr(expected, name).dtype
    for name in ("num_tokens", "num_experts", "capacity", "choices", "all_kept"):
        assert getattr(got, name) == getattr(expected, name), name
    for name in ("losses", "statistics"):
        assert {k: float(v) for k, v in getattr(got, name).items()} == {
            k: float(v) for k, v in getattr(expected, name).items()
        }
    assert got.deviations.keys() == expected.deviations.keys()
    assert all(float(got.deviations[n].total) == float(d.total) for n, d in expected.deviations.items())


@pytest.mark.parametrize("part_bytes", [1, 1 << 22])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_what_is_read_is_what_was_returned(name: str, masked: bool, part_bytes: int, tmp_path: Path) -> None:
    """To the last bit, in one part or in one for every forward."""
    router = ROUTERS[name]()
    routings: list[Routing] = []
    with TraceWriter(tmp_path / "t.npz", part_bytes=part_bytes) as writer:
        for step, size in enumerate((T, 0, 16, T)):
            context = some_context(router, size, mask=some_mask(size) if masked else None, seed=step)
            routing = on_host(router(skewed_tokens(size, D, seed=step), context))
            routings.append(routing)
            tokens = TracedTokens(size, context.mask, context.token_ids, context.task, context.position)
            writer.add(TracedBatch(step, "lm", True, {"a": TracedLayer(routing, tokens)}, {"a": torch.rand(E)}))
    trace = read_trace(tmp_path / "t.npz")
    assert (trace.layers, trace.steps, trace.tasks) == ({"a": router.num_experts}, [0, 1, 2, 3], ["lm"] * 4)
    for number in (3, 0, 2, 1):
        batch = trace[number]
        same(batch.layers["a"].routing, routings[number])
        context = some_context(router, routings[number].num_tokens, seed=number)
        assert torch.equal(batch.layers["a"].tokens.ids, context.token_ids)
        assert torch.equal(batch.layers["a"].tokens.language, context.task)
        assert (batch.layers["a"].tokens.mask is not None) == masked
        assert len(batch.gradients["a"]) == E
    with zipfile.ZipFile(tmp_path / "t.npz") as archive:
        parts = sum(found.endswith("/a/expert.npy") for found in archive.namelist())
    assert parts == (3 if part_bytes == 1 else 1)  # the forward without tokens waits for the next


def test_what_follows_is_not_written(tmp_path: Path) -> None:
    """A byte and a weight for each choice of a dropless top-k router; NumPy reads it without moekit."""
    router = TopKRouter(D, E, 2)
    layer = TracedLayer(on_host(router(torch.randn(4096, D))), TracedTokens(4096))
    for weighed, most in ((True, 4096 * 2 * 5 + 4096), (False, 4096)):
        with TraceWriter(tmp_path / "t.npz") as writer:
            writer.add(TracedBatch(0, "", True, {"a": dataclasses.replace(layer, weighed=weighed)}))
        assert (tmp_path / "t.npz").stat().st_size < most
        with np.load(tmp_path / "t.npz") as arrays:
            names = {name for name in arrays.files if name.startswith("0/")}
            assert names == {"0/a/expert", "0/a/weight"} if weighed else {"0/a/expert"}
            assert arrays["0/a/expert"].dtype == np.uint8
            assert np.array_equal(arrays["0/a/expert"], layer.routing.expert.numpy())
    found = read_trace(tmp_path / "t.npz")[0].layers["a"]
    assert not found.weighed
    assert bool(found.routing.weight.isnan().all())


def test_the_same_routing_gives_the_same_bytes(tmp_path: Path) -> None:
    layer = TracedLayer(on_host(TopKRouter(D, E, 2)(torch.randn(64, D))), TracedTokens(64))
    for name in ("a", "b"):
        with TraceWriter(tmp_path / name) as writer:
            writer.add(TracedBatch(0, "", True, {"a": layer}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    layer = TracedLayer(on_host(TopKRouter(D, E, 2)(torch.randn(512, D))), TracedTokens(512))
    with TraceWriter(tmp_path / "t.npz", part_bytes=10_000) as writer:
        for _ in range(20):
            writer.add(TracedBatch(0, "", True, {"a": layer}))
            assert writer._bytes < 10_000
    trace = read_trace(tmp_path / "t.npz", verify=False)
    for number in range(20):
        trace[number]
        assert sum(array.nbytes for array in trace._files[0][0]._arrays.values()) < 2 * 10_000


@pytest.fixture
def written(tmp_path: Path) -> Path:
    layer = TracedLayer(on_host(TopKRouter(D, E, 2)(torch.randn(64, D))), TracedTokens(64))
    with TraceWriter(tmp_path / "t.npz", part_bytes=1) as writer:
        for _ in range(3):
            writer.add(TracedBatch(0, "", True, {"a": layer}))
    return tmp_path / "t.npz"


def rewritten(path: Path, change: Any) -> None:
    """The archive with other content of some entry, and right checksums of the archive itself."""
    with zipfile.ZipFile(path) as archive:
        entries, comment = {name: archive.read(name) for name in archive.namelist()}, archive.comment
    entries, comment = change(entries, comment)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.comment = comment


def opened(path: Path) -> tuple[RoutingTrace | None, str]:
    """The trace, or what is said of it."""
    try:
        return read_trace(path), ""
    except UserError as error:
        return None, str(error)


def test_damage_is_refused_by_name(written: Path) -> None:
    whole = written.read_bytes()
    for place in range(0, len(whole), 97):  # any byte
        written.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        trace, said = opened(written)
        assert (trace is None) == (str(written) in said)
        if trace is not None:  # a byte that nobody reads, as a date
            assert len(trace) == 3
            assert torch.equal(trace[0].layers["a"].routing.weight, trace[2].layers["a"].routing.weight)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        written.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"t\.npz must be a whole routing trace: it is damaged"):
            read_trace(written)


def test_what_is_changed_on_purpose_is_refused(written: Path) -> None:
    whole = written.read_bytes()

    def other_weights(entries: dict[str, bytes], comment: bytes) -> Any:
        return {**entries, "1/a/weight.npy": entries["1/a/weight.npy"][:-4] + b"\0\0\0\0"}, comment

    def other_index(entries: dict[str, bytes], comment: bytes) -> Any:
        return {**entries, "index.json": entries["index.json"].replace(b'"step":0', b'"step":1')}, comment

    def later(entries: dict[str, bytes], comment: bytes) -> Any:
        return entries, comment.replace(b"trace 1 ", b"trace 2 ")

    def missing(entries: dict[str, bytes], comment: bytes) -> Any:
        return {name: content for name, content in entries.items() if name != "2/a/expert.npy"}, comment

    def foreign(entries: dict[str, bytes], comment: bytes) -> Any:
        return entries, b""

    for change, words in (
        (other_weights, r"damaged in 1/a/weight \(it is not what was written\)"),
        (other_index, "its index was altered"),
        (later, "of version 2: this moekit reads version 1"),
        (missing, "damaged in 2/a/expert"),
        (foreign, "it is another archive"),
    ):
        written.write_bytes(whole)
        rewritten(written, change)
        with pytest.raises(UserError, match=words):
            read_trace(written)
    written.write_bytes(whole)
    rewritten(written, other_weights)
    lazy = read_trace(written, verify=False)
    same(lazy[0].layers["a"].routing, lazy[2].layers["a"].routing)
    with pytest.raises(UserError, match="it is not what was written"):
        lazy[1]


def resealed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """The trace with another index and other arrays, under digests that fit: what its author made so."""
    with zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read("index.json"))
        arrays = {name: np.load(archive.open(name)) for name in archive.namelist() if name.endswith(".npy")}
    change(index, arrays)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            part, _, key = name.partition("/")
            index["parts"][int(part)]["digests"][key.removesuffix(".npy")] = digest(array)
            with archive.open(name, "w") as file:
                np.save(file, array)
        content = json.dumps(index).encode()
        archive.writestr("index.json", content)
        archive.comment = comment(content)


def test_what_no_router_returned_is_refused(written: Path) -> None:
    """Under digests that fit: numbers out of range, huge ones, and an index of another shape."""
    whole = written.read_bytes()

    def layer(**changed: Any) -> Any:
        return lambda index, arrays: index["batches"][0]["layers"]["a"].update(changed)

    def tokens(count: int) -> Any:
        return lambda index, arrays: index["batches"][0]["tokens"][0].update(n=count)

    def array(name: str, change: Callable[[Any], Any]) -> Any:
        def changed(index: dict[str, Any], arrays: dict[str, Any]) -> None:
            arrays[f"0/a/{name}.npy"] = change(arrays[f"0/a/{name}.npy"])

        return changed

    for change, words in (
        (array("expert", lambda found: found.astype(np.int8) - 1), r"forward 0 \(expert is not in 0\.\.3 everywhere"),
        (array("expert", lambda found: found + 1), "expert is not in"),
        (array("expert", lambda found: found + 0.5), "expert must be whole numbers"),
        (layer(capacity=-1), "it says that all assignments are kept"),
        (layer(capacity="x"), "damaged in forward 0"),
        (layer(n=10**15), "a/expert is too short"),
        (layer(choices=10**15), r"it lists 128 assignments, and \d+ follow"),
        (tokens(10**15), r"it lists 128 assignments, and \d+ follow"),
        (layer(experts="many"), "it is damaged"),
        (lambda index, arrays: index.update(batches=[1]), "it is damaged"),
        (lambda index, arrays: index.update(notes=[1]), "it is damaged"),
        (lambda index, arrays: index["batches"][0].update(step=None), "it is damaged"),
        (lambda index, arrays: index["parts"][0].update(begin=7, end=8), "damaged in forward 0"),
    ):
        written.write_bytes(whole)
        resealed(written, change)
        with pytest.raises(UserError, match=words):
            list(read_trace(written))


def test_an_array_that_says_to_be_huge_is_refused(written: Path) -> None:
    def huge(entries: dict[str, bytes], comment: bytes) -> Any:
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**17,)})
        return {**entries, "0/a/expert.npy": file.getvalue()}, comment

    rewritten(written, huge)
    with pytest.raises(UserError, match="damaged in 0/a/expert"):
        read_trace(written)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no routing trace .*missing"):
        read_trace(tmp_path / "missing")
    with pytest.raises(UserError, match=r"must hold routing traces: there is no \.npz file"):
        read_trace(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="must be a whole routing trace"):
        read_trace(tmp_path / "a.json")


def test_after_an_exception_there_is_no_file(tmp_path: Path) -> None:
    moe = mk.MoELayer(TopKRouter(D, E), mk.experts.GroupedMLP(E, D, 8))

    def broken() -> None:
        with record(moe, tmp_path / "t.npz"):
            moe(torch.randn(4, D))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert not list(tmp_path.iterdir())
    assert not moe.router._forward_hooks


# -- recording ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two sparse layers, the first under activation checkpointing, and tokens of which routers know ids."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            mk.MoELayer(TopKRouter(D, E, 2, capacity=Capacity(train=0.7)), mk.experts.GroupedMLP(E, D, 8))
            for _ in range(2)
        )

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> tuple[Tensor, list[Routing]]:
        first = checkpoint(self.layers[0], x, context, use_reentrant=False)
        second = self.layers[1](x + first.hidden, context=context)
        return second.hidden, [first.routing, second.routing]


def test_every_forward_is_heard_once(tmp_path: Path) -> None:
    """In training with recomputed activations, in evaluation, with contexts by position and by name."""
    model, returned = Two(), []
    context = RoutingContext(token_ids=torch.arange(24).view(2, 12), task=torch.ones(2, 12, dtype=torch.int64))
    with record(model, tmp_path / "t.npz", notes={"by": "a test"}) as recording:
        for step in range(2):
            recording.tell(step=step, task=f"task {step}")
            hidden, routings = model(torch.randn(2, 12, D), context)
            hidden.sum().backward()
            returned.append(routings)
        model.eval()
        with torch.no_grad():
            returned.append(model(torch.randn(5, D))[1])
    model(torch.randn(5, D))
    trace = read_trace(tmp_path / "t.npz")
    assert trace.notes["by"] == "a test"
    assert trace.layers == {"layers.0": E, "layers.1": E}
    told = [(batch.step, batch.task, batch.training) for batch in trace]
    assert told == [(0, "task 0", True), (1, "task 1", True), (1, "task 1", False)]
    for batch, routings in zip(trace, returned, strict=True):
        for layer, routing in zip(batch.layers.values(), routings, strict=True):
            same(layer.routing, on_host(routing))
    first = trace[0].layers
    assert torch.equal(first["layers.1"].tokens.ids, torch.arange(24))
    assert first["layers.0"].tokens is first["layers.1"].tokens
    assert trace[2].layers["layers.0"].tokens.ids is None


def test_what_routers_are_not_told_can_be_told(tmp_path: Path) -> None:
    model = Two()
    with record(model, tmp_path / "t.npz") as recording:
        recording.tell(ids=torch.arange(6), language=torch.zeros(2, 3, dtype=torch.int32))
        model(torch.randn(6, D))
        with pytest.raises(UserError, match=r"told ids of 6 tokens, and layers\.0 routes 8"):
            model(torch.randn(8, D))
        with pytest.raises(UserError, match=r"got \['idz'\]"):
            recording.tell(idz=torch.arange(6))
    tokens = read_trace(tmp_path / "t.npz")[0].layers["layers.0"].tokens
    assert torch.equal(tokens.ids, torch.arange(6))
    assert torch.equal(tokens.language, torch.zeros(6, dtype=torch.int64))


def test_what_cannot_be_written_is_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    """And not when the file is finished, at the end of a long run."""
    model = Two()
    with (
        pytest.raises(UserError, match="must be text: place is a PosixPath"),
        record(model, tmp_path / "t.npz", notes={"place": tmp_path}),  # type: ignore[dict-item]
    ):
        pass
    with record(model, tmp_path / "t.npz", notes={"file": "\udcff.txt", "processes": "all"}) as recording:
        with pytest.raises(UserError, match=r"must be a whole number: got 1\.5"):
            recording.tell(step=1.5)  # type: ignore[arg-type]
        recording.tell(step=np.int64(7))
        model(torch.randn(2, D))
    with pytest.raises(UserError, match="'processes' must be the number of processes: got 'all'"):
        read_trace(tmp_path / "t.npz")


def test_a_copy_of_the_model_is_not_heard(tmp_path: Path) -> None:
    model = Two()
    with record(model, tmp_path / "t.npz") as recording:
        other = copy.deepcopy(model)
        model(torch.randn(2, D))
        other(torch.randn(3, D))
    other(torch.randn(3, D))
    assert not recording._found
    assert [batch.layers["layers.0"].routing.num_tokens for batch in read_trace(tmp_path / "t.npz")] == [2]


def test_layers_that_share_a_router_are_refused(tmp_path: Path) -> None:
    """Its calls do not say which layer made them."""
    model = Two()
    with record(model, tmp_path / "t.npz"):
        model(torch.randn(2, D))
    model.layers[1].router = model.layers[0].router
    with pytest.raises(UserError, match=r"layers\.0 and layers\.1 share one"), record(model, tmp_path / "u.npz"):
        pass
    with pytest.raises(UserError, match="share one"), replay(model, read_trace(tmp_path / "t.npz")):
        pass
    assert "forward" not in model.layers[0].router.__dict__


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Linear has no MoELayer"), record(nn.Linear(2, 2), tmp_path / "t.npz"):
        pass
    assert not list(tmp_path.iterdir())


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_parts_joined_are_the_whole(k: int, capacity: float | None) -> None:
    """Who was kept stays kept, in queues that are sound."""
    whole = on_host(TopKRouter(D, E, k, capacity=Capacity(train=capacity, priority="random"))(skewed_tokens(T, D)))
    parts = [part_of(whole, rank, 3) for rank in range(3)]
    for part in parts:
        assert part.num_tokens == T // 3
        check_routing(part)
    again = joined(parts)
    check_routing(dataclasses.replace(again, capacity=None if capacity is None else whole.capacity))
    for name in ("token", "expert", "weight", "kept"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert again.choices == k
    with pytest.raises(UserError, match="a batch of 48 tokens cannot be"):
        part_of(whole, 0, 5)


def test_processes_that_recorded_are_one_trace(tmp_path: Path) -> None:
    """Their tokens stand behind each other; a file that is missing is named."""
    routings = [on_host(TopKRouter(D, E, 2)(skewed_tokens(12, D, seed=rank))) for rank in range(2)]
    for step in (0, 5):
        for rank, routing in enumerate(routings):
            tokens = TracedTokens(12, ids=torch.arange(12) + 100 * rank, sequence=torch.arange(12) // 6)
            with TraceWriter(tmp_path / f"{step:09d}.rank{rank:05d}.npz", {"processes": "2"}) as writer:
                writer.add(TracedBatch(step, "", True, {"a": TracedLayer(routing, tokens)}))
    trace = read_trace(tmp_path)
    assert trace.steps == [0, 5]
    layer = trace[1].layers["a"]
    assert layer.routing.num_tokens == 24
    assert layer.tokens.ids is not None
    assert layer.tokens.sequence is not None
    assert layer.tokens.ids.tolist() == [*range(12), *range(100, 112)]
    assert layer.tokens.sequence.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(part_of(layer.routing, 1, 2).expert, routings[1].expert)
    (tmp_path / "000000005.rank00001.npz").unlink()
    with pytest.raises(UserError, match="step 000000005 must have a file of each of 2 processes: got 1"):
        read_trace(tmp_path)


def test_processes_that_recorded_other_layers_are_refused(tmp_path: Path) -> None:
    routing = on_host(TopKRouter(D, E)(torch.randn(4, D)))
    for rank in range(2):
        with TraceWriter(tmp_path / f"0.rank{rank}.npz", {"processes": "2"}) as writer:
            writer.add(TracedBatch(3, "", True, {"ab"[rank]: TracedLayer(routing, TracedTokens(4))}))
    trace = read_trace(tmp_path)
    with pytest.raises(UserError, match=r"must have recorded the same layers in a forward: got \['a', 'b'\] at step 3"):
        trace[0]


# -- the callback ------------------------------------------------------------------------------------------------------


class Trained(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.two = Two()
        self.fails_at = -1

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index == self.fails_at:
            raise ZeroDivisionError
        hidden: Tensor = self.two(batch)[0]
        return hidden.square().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.two(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(folder: Path, *callbacks: L.Callback, model: Trained | None = None, **options: Any) -> Trained:
    torch.manual_seed(0)
    model, data = model or Trained(), torch.randn(48, D)
    loader = torch.utils.data.DataLoader(data, batch_size=6)  # type: ignore[arg-type]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, callbacks=[*callbacks], **{**quiet, **options}
    )
    trainer.fit(model, loader, loader)
    return model


def test_training_is_recorded_now_and_then(tmp_path: Path) -> None:
    """All micro-batches of a step, with gradients of experts before clipping; validation is another record."""
    own = [RoutingRecorder(every=2), RoutingRecorder(tmp_path / "valid", of="valid", every=3, batches=2, weights=False)]
    trained(tmp_path, *own, accumulate_grad_batches=2, val_check_interval=4, gradient_clip_val=1e-6)
    found = read_trace(tmp_path / "routing_trace")
    assert found.steps == [0, 0, 2, 2]
    assert all(batch.training for batch in found)
    assert [sorted(batch.gradients) for batch in found] == [[], ["two.layers.0", "two.layers.1"]] * 2
    assert all(bool((values > 1e-6).any()) for values in found[1].gradients.values())
    valid = read_trace(tmp_path / "valid")
    assert valid.steps == [2, 2]  # that after step 4 comes too early
    assert not any(batch.training or batch.layers["two.layers.0"].weighed for batch in valid)


def test_chosen_steps_are_recorded_and_change_nothing(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    watched = trained(tmp_path / "watched", RoutingRecorder(steps=[1, 6, 99]))
    assert read_trace(tmp_path / "watched" / "routing_trace").steps == [1, 6]
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_fails_leaves_no_file(tmp_path: Path) -> None:
    model = Trained()
    model.fails_at = 4
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, RoutingRecorder(every=2), model=model)
    assert [path.name for path in (tmp_path / "routing_trace").iterdir()] == ["000000000.npz", "000000002.npz"]
    assert not any(layer.router._forward_hooks for _, layer in mk.layer.moe_layers(model))


def test_settings_of_the_recorder_are_checked() -> None:
    with pytest.raises(UserError, match="every and batches of a RoutingRecorder must be at least 1: got 0 and None"):
        RoutingRecorder(every=0)
    with pytest.raises(UserError, match='is of "train" or "valid"'):
        RoutingRecorder(of="test")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="leave them out for validation"):
        RoutingRecorder(of="valid", steps=[1])


def test_scores_of_the_layer_before_are_no_matter(tmp_path: Path) -> None:
    """A residual hands scores on; a trace does not keep them."""
    router = TopKRouter(D, E, residual=GatingResidual(E, E))
    moe = mk.MoELayer(router, mk.experts.GroupedMLP(E, D, 8))
    with record(moe, tmp_path / "t.npz"):
        routing = moe(torch.randn(6, D), RoutingContext(previous_logits=torch.randn(6, E))).routing
    assert routing.logits is not None
    found = read_trace(tmp_path / "t.npz")
    assert isinstance(found, RoutingTrace)
    same(found[0].layers["layer"].routing, on_host(routing))
    with zipfile.ZipFile(tmp_path / "t.npz") as archive:
        assert json.loads(archive.read("index.json"))["version"] == 1
