"""Thresholds of what is watched, and what is said where one is passed: once, and again after it went away."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moekit.training.metrics.routing import CROWDED, DEAD_SHARE, MAX_DROP_RATE, crowded
from moekit.training.monitoring.spikes import Spike

Kind = Literal["dead", "collapse", "drops", "logits", "balance_loss", "loss_spike", "gradient_spike"]
WARNINGS = "warnings.json"
"""What training was warned of, in the folder of a run; of a run without warnings there is none."""
_NAMED = 8  # experts of a list


class MonitorWarning(UserWarning):
    """Something in training that somebody should look at."""


@dataclass(frozen=True)
class Warned:
    """One warning.

    Attributes:
        step: optimizer steps that were done.
        kind: what it is of.
        layer: the sparse layer; "" for what is of the whole model.
        text: one line with layer, number, threshold and what to do.
    """

    step: int
    kind: Kind
    layer: str
    text: str

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, data: Any) -> Warned:
        """From plain data.

        Raises:
            ValueError: it is not that of a warning.
        """
        if not isinstance(data, Mapping) or data.get("kind") not in get_args(Kind):
            raise ValueError(
                f"a warning must be a mapping with a kind among {', '.join(get_args(Kind))}: got {data!r}."
            )
        return cls(int(data["step"]), data["kind"], str(data["layer"]), str(data["text"]))


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """From where on somebody is warned. The defaults are ours.

    Attributes:
        window: optimizer steps over which layers are judged.
        dead_share: part of a fair share (1 / num_experts) under which an expert is dead; 0 = never.
        max_load: fair shares of the busiest expert from which on a layer has collapsed; less in a layer that cannot
            have as many, see `moekit.training.metrics.routing.crowded`.
        min_evenness: entropy of the load under which a layer has collapsed; 1 = even, 0 = all tokens go to the same
            experts.
        max_drop_rate: share of the assignments that may be dropped for capacity, from the second window on.
        max_logsumexp: mean logsumexp of the router's logits, in nats, that is allowed. Logits of 50 leave a softmax in
            bfloat16 no digits.
        loss_spike: spreads above the running median from which on a loss is a spike, if it is above all of twice as
            many steps too, by a spread. The spread is a tenth of the median or more.
        gradient_spike: the same of the gradient norm, whose spread is half of the median or more.
        spike_window: steps that median and spread are of.

    Raises:
        ValueError: one is out of its range.
    """

    window: int = 100
    dead_share: float = DEAD_SHARE
    max_load: float = CROWDED
    min_evenness: float = 0.5
    max_drop_rate: float = MAX_DROP_RATE
    max_logsumexp: float = 50.0
    loss_spike: float = 6.0
    gradient_spike: float = 10.0
    spike_window: int = 100

    def __post_init__(self) -> None:
        ranges = {
            "window": (1, math.inf), "dead_share": (0, 1), "max_load": (1, math.inf), "min_evenness": (0, 1),
            "max_drop_rate": (0, 1), "max_logsumexp": (0, math.inf), "loss_spike": (0, math.inf),
            "gradient_spike": (0, math.inf), "spike_window": (2, math.inf),
        }  # fmt: skip
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"Thresholds.{name} must be {bound}: got {value}.")


@dataclass(frozen=True)
class LayerFigures:
    """What was counted of one sparse layer over some steps, on all processes together.

    Attributes:
        name: the layer.
        load: Float[E], share of the assignments of each expert, dropped ones included; all 0 where nothing was routed.
        learned: whether its router has parameters.
        experts_per_token: K, assignments for each token that has one.
        drop_rate: share of the assignments dropped.
        entropy: mean entropy of the router's probabilities, in nats; None where it reports none.
        logsumexp: mean logsumexp of the router's logits; None where it reports none.
        balance_losses: names of its losses for balance.
        balance_gradient: sum of the absolute gradients that came back to these; None where no gradient could.
    """

    name: str
    load: tuple[float, ...]
    learned: bool
    experts_per_token: float
    drop_rate: float
    entropy: float | None
    logsumexp: float | None
    balance_losses: tuple[str, ...]
    balance_gradient: float | None

    @property
    def routed(self) -> bool:
        """Whether there was an assignment at all."""
        return any(self.load)

    @property
    def largest(self) -> float:
        """Load of the busiest expert in fair shares."""
        return max(self.load) * len(self.load)

    @property
    def evenness(self) -> float:
        """Entropy of the load, from 0 where K experts get everything to 1 where all get the same."""
        entropy = -sum(share * math.log(share) for share in self.load if share > 0)
        least, most = math.log(max(1.0, self.experts_per_token)), math.log(len(self.load))
        return min(1.0, max(0.0, (entropy - least) / (most - least))) if most - least > 1e-6 else 1.0

    def dead(self, share: float) -> list[int]:
        """Experts with less than `share` of a fair share."""
        return [expert for expert, load in enumerate(self.load) if load * len(self.load) < share]


def troubles(layer: LayerFigures, allowed: Thresholds) -> Iterator[tuple[Kind, str]]:
    """Kind and text of every threshold that a layer has passed over a whole window."""
    steps, size = f"over the last {allowed.window} steps", len(layer.load)
    if layer.learned and layer.routed:
        most = crowded(size, layer.experts_per_token, allowed.max_load)
        if dead := layer.dead(allowed.dead_share):
            text = (
                f"{layer.name}: {len(dead)} of {size} experts {'is' if len(dead) == 1 else 'are'} dead "
                f"({_listed(dead)}): each got under {allowed.dead_share:.4g} of a fair share {steps}. Raise the weight "
                "of the balance loss, lower the learning rate, or add noise to the router."
            )
            yield "dead", text
        if layer.largest >= most or layer.evenness < allowed.min_evenness:
            busiest = layer.load.index(max(layer.load))
            text = (
                f"{layer.name}: routing has collapsed: expert {busiest} of {size} got {layer.largest:.2f} fair shares "
                f"(threshold {most:.4g}), evenness of the load {layer.evenness:.2f} (threshold: below "
                f"{allowed.min_evenness:.4g}), {steps}. Raise the weight of the balance loss, or lower the learning "
                "rate."
            )
            yield "collapse", text
    if layer.drop_rate > allowed.max_drop_rate:
        text = (
            f"{layer.name}: {layer.drop_rate:.1%} of the assignments were dropped {steps} (threshold "
            f"{allowed.max_drop_rate:.4g}). Raise the capacity factor or the weight of the balance loss."
        )
        yield "drops", text
    if layer.logsumexp is not None and layer.logsumexp > allowed.max_logsumexp:
        text = (
            f"{layer.name}: the router's logits are large: mean logsumexp {layer.logsumexp:.1f} {steps} (threshold "
            f"{allowed.max_logsumexp:.4g}). Weigh the router's z-loss (router_z=1e-3), or lower the learning rate."
        )
        yield "logits", text


def unweighed(layer: LayerFigures) -> str | None:
    """What is said of a balance loss that exists and weighs nothing."""
    if layer.balance_gradient != 0 or not layer.balance_losses:  # NaN is none either
        return None
    if len(layer.load) == 1:  # one expert is always balanced
        return None
    names = ", ".join(layer.balance_losses)
    return (
        f"{layer.name}: the router returns a balance loss ({names}) that weighs nothing: its gradient was 0 "
        f"(threshold: more than 0). Add moekit.AuxLosses({layer.balance_losses[0]}=0.01) of the routings to the loss; "
        "recipes have --model.load_balance, and folders of transformers router_aux_loss_coef in config.json."
    )


def spike_text(what: str, step: int, spike: Spike, factor: float, done: str) -> str:
    """What is said of a spike; `done` is what was done about it."""
    if spike.largest is None:
        why = f"the median {spike.median:.4g} of the last {spike.known} steps and {factor:.4g} times their spread"
    else:
        why = f"the largest {spike.largest:.4g} of the steps before and the spread"
    return (
        f"{what} {spike.value:.4g} of step {step} is a spike: above {spike.bound:.4g}, {why} {spike.spread:.4g}. {done}"
    )


class Said:
    """Which troubles there are, so that each is said once, and again after it went away.

    Attributes:
        warned: everything that was said so far.
    """

    def __init__(self) -> None:
        self.warned: list[Warned] = []
        self._there: dict[tuple[str, str], int] = {}  # the step at which it was last seen

    def see(self, step: int, kind: Kind, layer: str, text: str | None, patience: int = 0) -> Warned | None:
        """Note whether a trouble is there (`text`) or not (None); the warning, where it has just come.

        It is gone once it was not there for more than `patience` steps: figures near a threshold go to and fro.
        """
        key = (kind, layer)
        if text is None:
            if key in self._there and step - self._there[key] > patience:
                del self._there[key]
            return None
        known = key in self._there
        self._there[key] = step
        if known:
            return None
        self.warned.append(Warned(step, kind, layer, text))
        return self.warned[-1]

    def state(self) -> dict[str, Any]:
        """As plain data."""
        there = [[kind, layer, step] for (kind, layer), step in self._there.items()]
        return {"warned": [one.plain() for one in self.warned], "there": there}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.warned = [Warned.of(one) for one in state["warned"]]
        self._there = {(str(kind), str(layer)): int(step) for kind, layer, step in state["there"]}


def _listed(experts: list[int]) -> str:
    more = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
    return ", ".join(map(str, experts[:_NAMED])) + more
