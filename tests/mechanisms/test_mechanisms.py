"""Mechanisms of a trace against loops over assignments, and where their values are known."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

import moekit as mk
from moekit.ablation.measures import measure
from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.mechanisms import (
    Mechanisms,
    active_experts,
    coactivation,
    drops_by_place,
    effective_experts,
    expert_gradients,
    mechanisms,
    mutual_information,
    saturation,
)
from moekit.mechanisms.quantities import places
from moekit.report import mechanism_figures, mechanism_table
from moekit.routers import RandomChoice, TopKRouter
from moekit.routing import Capacity, Routing
from moekit.routing_traces import TracedBatch, TracedLayer, TracedTokens, TraceWriter, read_trace
from moekit.routing_traces.recording import on_host
from moekit.testing.cases import random_routing, skewed_tokens, some_context, some_mask

D, E, T = 8, 6, 60


def routed(seed: int = 0, *, masked: bool = True, k: int = 2) -> tuple[Routing, Tensor | None]:
    """With padding, drops, and choices that were not sent."""
    torch.manual_seed(seed)
    router = TopKRouter(D, E, k, capacity=Capacity(train=0.7), second_expert=RandomChoice(0.5), init_scale=1.0)
    mask = some_mask(T) if masked else None
    context = some_context(router, T, mask=mask)
    return on_host(router(skewed_tokens(T, D, seed=seed), context)), mask


def asked(routing: Routing) -> list[tuple[int, int, bool]]:
    """Token, expert and whether it was kept, of every assignment that asked for room."""
    rows = zip(*(getattr(routing, n).tolist() for n in ("token", "expert", "kept", "position")), strict=True)
    return [(token, expert, kept) for token, expert, kept, position in rows if position >= 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_quantities_are_those_of_a_loop(seed: int, masked: bool) -> None:
    routing, mask = routed(seed, masked=masked)
    chosen: dict[int, set[int]] = {}
    for token, expert, _ in asked(routing):
        chosen.setdefault(token, set()).add(expert)
    together = [[sum(a in both and b in both for both in chosen.values()) for b in range(E)] for a in range(E)]
    assert coactivation(routing).tolist() == together
    real = [t for t in range(T) if mask is None or bool(mask[t])]
    tenth = {token: 10 * number // len(real) for number, token in enumerate(real)}
    found = drops_by_place(routing, places(mask, T, 10), 10)
    wanted, lost = (
        Counter(tenth[t] for t, _, _ in asked(routing)),
        Counter(tenth[t] for t, _, kept in asked(routing) if not kept),
    )
    assert [values.tolist() for values in found] == [[wanted[n] for n in range(10)], [lost[n] for n in range(10)]]
    assert sum(lost.values()) > 0
    other, _ = routed(seed + 10, masked=masked)
    later: dict[int, set[int]] = {}
    for token, expert, _ in asked(other):
        later.setdefault(token, set()).add(expert)
    same = sum(len(experts & chosen.get(token, set())) for token, experts in later.items())
    assert saturation(routing, other) == (same, sum(map(len, later.values())))
    assert saturation(routing, routing)[0] == saturation(routing, routing)[1]


def test_saturation_needs_the_same_tokens() -> None:
    with pytest.raises(ValueError, match="got 60 tokens and 6 experts, and 10 and 6"):
        saturation(routed()[0], random_routing(10, E))


@pytest.mark.parametrize(
    ("load", "active", "effective"),
    [([5, 5, 5, 5], 4, 4.0), ([20, 0, 0, 0], 1, 1.0), ([0, 0, 0, 0], 0, 0.0), ([1000, 1000, 2, 1], 2, 2.0)],
)
def test_experts_that_work(load: list[int], active: int, effective: float) -> None:
    assert active_experts(torch.tensor(load)) == active
    assert effective_experts(torch.tensor(load)) == pytest.approx(effective, abs=0.03)


def entropy(values: Sequence[Any]) -> float:
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


@pytest.mark.parametrize("shape", [(2, 3), (40, 8), (1, 5)])
def test_information_is_that_of_entropies(shape: tuple[int, int]) -> None:
    """I(label; expert) = H(label) + H(expert) - H(both)."""
    table = np.random.default_rng(0).integers(0, 9, shape)
    pairs = [(a, b) for a, b in np.ndindex(*shape) for _ in range(table[a, b])]
    known = entropy([a for a, _ in pairs]) + entropy([b for _, b in pairs]) - entropy(pairs)
    found = mutual_information(table)
    assert found.nats == pytest.approx(known, abs=1e-12)
    assert found.above == found.nats - found.chance
    assert found.assignments == len(pairs)
    assert mutual_information(table, shuffles=0).chance == 0


def test_information_of_nothing_is_nothing() -> None:
    """Of independent labels the plug-in estimate is large where cells are few, and what is above chance is not."""
    random = np.random.default_rng(0)
    table = random.multinomial(3000, np.full(1000 * 8, 1 / 8000)).reshape(1000, 8)
    found = mutual_information(table)
    assert found.nats > 0.5
    assert abs(found.above) < 0.02
    whole = mutual_information(np.diag([50, 50, 50, 50]))
    assert whole.nats == pytest.approx(math.log(4))
    assert whole.share > 0.95
    assert mutual_information(np.zeros((3, 3), np.int64)).share == 0
    assert mutual_information(np.array([[7, 0], [5, 0]])).share == 0


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = mk.MoELayer(TopKRouter(D, E, 2), GroupedMLP(E, D, 5, bias=True))
        self.frozen = mk.MoELayer(TopKRouter(D, E, 2), GroupedMLP(E, D, 5)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.moe(x).hidden
        hidden: Tensor = self.frozen(x).hidden
        return hidden


def test_gradients_of_experts_are_those_of_their_tensors() -> None:
    model = Pair()
    model(torch.randn(40, D)).square().sum().backward()
    found = expert_gradients(model)
    assert [*found] == ["moe"]
    for expert in range(E):
        parts = [p.grad[expert] for p in model.moe.experts.parameters() if p.grad is not None]
        assert float(found["moe"][expert]) == pytest.approx(
            math.sqrt(sum(float(g.square().sum()) for g in parts)), 1e-5
        )


# -- a whole trace -----------------------------------------------------------------------------------------------------


def traced(path: Path, steps: Sequence[int] = (0, 10, 20), *, other_text: bool = False) -> Mechanisms:
    """Two batches of two tasks at every step; experts of layer a go by language at the last, of b by chance."""
    mask = some_mask(T)
    with TraceWriter(path) as writer:
        for number, step in enumerate(steps):
            for turn, task in enumerate(("translation", "denoising")):
                torch.manual_seed(turn)
                ids, language = torch.randint(0, 30, (T,)), torch.randint(0, E, (T,))
                if other_text and turn == 1:
                    ids = ids + number
                torch.manual_seed(1000 + 100 * number + turn)
                learned = torch.rand(T) < number / max(1, len(steps) - 1)
                expert = torch.where(learned, language, torch.randint(0, E, (T,)))
                routings = {
                    "a": mk.routers.routing_of_choices(expert, torch.ones(T), E, mask=mask, training=True),
                    "b": mk.routers.routing_of_choices(
                        torch.rand(T, E).topk(2).indices, torch.ones(T, 2), E, mask=mask,
                        capacity=Capacity(train=0.5), training=True, statistics={"logsumexp": torch.tensor(step + 1.0)},
                    ),
                }  # fmt: skip
                tokens = TracedTokens(T, mask, ids, language)
                layers = {name: TracedLayer(routing, tokens) for name, routing in routings.items()}
                gradients = {"a": torch.arange(E) + 1.0} if turn else {}
                writer.add(TracedBatch(step, task, False, layers, gradients))
    return mechanisms(read_trace(path))


def test_a_trace_has_all_mechanisms(tmp_path: Path) -> None:
    found = traced(tmp_path / "t.npz")
    assert found.steps == [0, 10, 20]
    a, b = found.layers["a"], found.layers["b"]
    assert a.saturation is not None
    assert b.saturation is not None
    assert a.saturation[2] == b.saturation[2] == 1.0
    assert a.saturation[0] < 0.4 < a.saturation[1] < 0.8
    assert a.information["language"].share > 0.8
    assert abs(b.information["language"].above) < 0.15
    assert set(a.information) == {"language", "task", "token"}
    assert abs(a.information["task"].above) < 0.05
    assert a.drop_rate == [0.0, 0.0, 0.0]
    assert b.drop_rate[-1] is not None
    assert b.drop_rate[-1] > 0.3
    early, late = b.drops_by_place[0], b.drops_by_place[-1]
    assert early is not None
    assert late is not None
    assert late > early, "later tokens find full experts"
    assert sum(b.load) == pytest.approx(1)
    assert b.experts_per_token == [2.0] * 3
    assert found.means["experts_per_token"] == 1.5, "a's tokens pass one expert, b's two"
    assert b.logits == [1.0, 11.0, 21.0]
    assert a.logits == [None] * 3
    assert a.gradients == [3.5] * 3
    assert a.gradient_spread[-1] == pytest.approx(6 / 3.5)
    assert all(row[n] == 1.0 for n, row in enumerate(b.coactivation))
    assert sum(b.coactivation[0]) == pytest.approx(2.0), "two experts a token"
    means = found.means
    assert means["saturation"] == pytest.approx(np.mean([np.mean(a.saturation[:2]), np.mean(b.saturation[:2])]))
    assert means["mutual_information"]["language"] > 0.5
    assert means["late_drops"] > 0
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["layers"]["a"]["information"]["language"]["assignments"] > 0


def test_saturation_counts_forwards_of_the_same_text(tmp_path: Path) -> None:
    """A forward whose tokens differ between steps is left out at all steps; one step has no saturation."""
    whole, part = traced(tmp_path / "a.npz"), traced(tmp_path / "b.npz", other_text=True)
    assert whole.layers["a"].saturation != part.layers["a"].saturation
    assert part.layers["a"].saturation is not None
    once = traced(tmp_path / "c.npz", [5])
    assert once.layers["a"].saturation is None
    assert "saturation" not in once.means
    with TraceWriter(tmp_path / "empty.npz"):
        pass
    with pytest.raises(UserError, match="at least one forward"):
        mechanisms(read_trace(tmp_path / "empty.npz"))


def test_mechanisms_are_drawn_and_listed(tmp_path: Path) -> None:
    found = traced(tmp_path / "t.npz")
    figures = mechanism_figures(found)
    assert set(figures) == {
        "saturation", "active_experts", "effective_experts", "drop_rate", "logits", "gradients", "drops_by_place",
        "information", "coactivation",
    }  # fmt: skip
    for name, figure in figures.items():
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / f"{name}.png")
    many = Mechanisms(found.steps, {f"decoder.{n}": found.layers["b"] for n in range(12)})
    for figure in mechanism_figures(many).values():
        figure.savefig(tmp_path / "many.png")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(mechanism_table(found))
    said = console.export_text()
    assert "Routing at step 20" in said
    row = next(line for line in said.splitlines() if line.strip().startswith("b "))
    assert "6 of 6" in row
    assert "█" in row
    assert "mutual information with the expert" in said
    bare = dataclasses.replace(found.layers["a"], information={}, saturation=None)
    console.print(mechanism_table(Mechanisms([0], {"a": bare})))
    assert "language" not in console.export_text()
    assert not mechanism_figures(Mechanisms([], {}))


def test_tables_of_an_ablation_find_mechanisms(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"loss": {"lm": 1.0}}')
    with pytest.raises(
        UserError, match=r"mechanisms\.json cannot be read .*train\.record_routing and train\.validate_ev"
    ):
        measure(tmp_path, "mechanisms.valid.saturation")
    found = traced(tmp_path / "t.npz")
    (tmp_path / "mechanisms.json").write_text(json.dumps({"valid": found.to_json()}))
    assert measure(tmp_path, "mechanisms.valid.saturation") == found.means["saturation"]
    language = found.means["mutual_information"]["language"]
    assert measure(tmp_path, "mechanisms.valid.mutual_information.language") == language
    token = found.layers["a"].information["token"].above
    assert measure(tmp_path, "mechanisms.valid.layers.a.information.token.above") == token
    assert measure(tmp_path, "loss.lm") == 1.0
    with pytest.raises(
        UserError, match=r"no number 'mechanisms\.valid\.saturated'.*It has mechanisms\.valid\.active_experts"
    ):
        measure(tmp_path, "mechanisms.valid.saturated")
