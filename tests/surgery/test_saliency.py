"""What experts are measured by: their use, and REAP, beside a loop over tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.experts import GroupedMLP, ZeroComputationExperts
from moekit.layer import MoELayer
from moekit.routers import TopKRouter
from moekit.routing import Capacity, RoutingContext
from moekit.runs import Run
from moekit.runs.surgery.utilisation import measured_load, measured_saliency
from moekit.surgery import choose_experts, sparse_layers, watch_experts
from moekit.surgery.__main__ import main


def layer(**router: object) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(TopKRouter(8, 4, 2, **router), GroupedMLP(4, 8, 12)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def slow(made: MoELayer, x: Tensor, context: RoutingContext | None = None) -> tuple[list[int], list[float]]:
    """Tokens of each expert, and the mean of weight times norm over them, one assignment at a time."""
    routing = made.router(x, context)
    products: list[list[float]] = [[] for _ in range(4)]
    for token, expert, weight, kept, place in zip(
        routing.token, routing.expert, routing.weight, routing.kept, routing.position, strict=True
    ):
        if kept and place >= 0:
            out = made.experts.reference(int(expert), x[token][None])
            products[int(expert)].append(float(weight * out.norm()))
    return [len(p) for p in products], [sum(p) / len(p) if p else 0.0 for p in products]


@pytest.mark.parametrize("capacity", [None, Capacity(eval=0.5, minimum=1)], ids=["dropless", "dropped"])
def test_reap_is_the_mean_over_an_experts_tokens(capacity: Capacity | None) -> None:
    made = layer(capacity=capacity)
    x = torch.randn(2, 9, 8)
    with watch_experts(made) as use, torch.no_grad():
        before = made(x).hidden
        made(x)  # two batches are one text
    tokens, saliency = slow(made, x.flatten(0, 1))
    assert use[""].tokens.tolist() == [2 * count for count in tokens]
    assert sum(tokens) < 36 if capacity else sum(tokens) == 36
    torch.testing.assert_close(use[""].saliency, torch.tensor(saliency, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert float(use[""].load.sum()) == pytest.approx(1)
    with torch.no_grad():
        assert torch.equal(made(x).hidden, before)
    assert use[""].tokens.sum() == 2 * sum(tokens), "nothing is measured outside"


def test_padding_does_not_count_and_unused_experts_have_none() -> None:
    made = layer()
    with torch.no_grad():
        made.router.weight.zero_()[0, 0], made.router.weight[1, 0] = 5.0, 4.0  # type: ignore[operator]
    x = torch.rand(6, 8) + 0.5
    mask = torch.tensor([True, True, False, False, True, False])
    with watch_experts(made) as use, torch.no_grad():
        made(x, RoutingContext(mask=mask))
    assert use[""].tokens.tolist() == [3, 3, 0, 0]
    assert use[""].saliency[2:].tolist() == [0.0, 0.0]
    assert slow(made, x, RoutingContext(mask=mask))[0] == [3, 3, 0, 0]


def test_experts_without_matrix_products_are_measured_too() -> None:
    """The first parameter of the bank is the constants', which are fewer than the experts."""
    torch.manual_seed(0)
    made = MoELayer(TopKRouter(8, 8, 2, init_scale=2.0), ZeroComputationExperts(GroupedMLP(4, 8, 12))).eval()
    x = torch.randn(40, 8)
    with watch_experts(made) as use, torch.no_grad():
        routing = made(x).routing
    assert use[""].tokens.tolist() == torch.bincount(routing.expert, minlength=8).tolist()
    copied = routing.expert == 5  # four of the bank, zero, copy, two constants
    products = routing.weight[copied] * x[routing.token[copied]].norm(dim=1)
    assert copied.any()
    assert use[""].saliency[4] == 0
    torch.testing.assert_close(use[""].saliency[5], products.mean().to(torch.float64))


def test_a_bank_that_is_spread_is_refused() -> None:
    made = layer()
    made.experts.w_in = torch.nn.Parameter(made.experts.w_in[:2].detach())  # type: ignore[index]
    with pytest.raises(ValueError, match="must all be in this process: got 2"), watch_experts(made):
        pass


def test_choice_by_saliency_and_in_groups() -> None:
    layers = sparse_layers(layer())
    score = {"": torch.tensor([0.1, 0.9, 0.5, 0.7])}
    assert choose_experts(layers, 2, "reap", load=score)[""].tolist() == [1, 3]
    assert choose_experts(layers, 2, "reversed", load=score)[""].tolist() == [0, 2]
    high = {"": torch.tensor([0.8, 0.9, 0.1, 0.2])}
    assert choose_experts(layers, 2, "reap", load=high)[""].tolist() == [0, 1]
    assert choose_experts(layers, 2, "reap", load=high, groups=2)[""].tolist() == [1, 3]
    assert choose_experts(layers, 0.6, "random", groups=2)[""].tolist() in [[0, 2], [0, 3], [1, 2], [1, 3]]
    with pytest.raises(UserError, match=r"2 groups of experts, which must stay equal: got keep=3. Keep 2 or 4"):
        choose_experts(layers, 3, "random", groups=2)
    with pytest.raises(UserError, match="3 equal groups"):
        choose_experts(layers, 3, "random", groups=3)


def test_a_run_is_pruned_by_saliency(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.load(runs / "one")
    saliency, load = measured_saliency(run), measured_load(run)
    assert list(saliency) == list(run.layers()) == list(load)
    for path, score in saliency.items():
        assert torch.equal(score > 0, load[path] > 0), "who is used at all matters at all"
    out = tmp_path / "half"
    assert main(["prune", str(run.path), "--keep", "2", "--by", "reap", "--out", str(out)]) == 0
    kept = json.loads((out / "surgery.json").read_text())["experts"]
    assert kept == {path: sorted(score.argsort(descending=True)[:2].tolist()) for path, score in saliency.items()}
    words = ["prune", str(run.path), "--keep", "2", "--by", "reap", "--language", "aa", "--out", str(tmp_path / "no")]
    assert main(words) == 2
    assert "--by reap measures the text of all languages" in capsys.readouterr().err
