"""What the routers did: load by expert and by language, drops, dead experts, evenness."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.parallel.host_memory import to_host
from moekit.routing import Routing, routing_stats
from moekit.training.metrics.wide import WideMetric

_STATES = ("load", "kept", "tokens", "entropy")  # of each layer
_MEANS = ("drop_rate", "entropy", "load_entropy", "load_cv", "load_max_ratio")  # over layers
_OF_LAYERS = ("drop_rate", "entropy", "experts_per_token")  # logged of each that has them

DEAD_SHARE = 0.01
"""An expert is dead if it gets less than this part of an even share (1 / num_experts) of all assignments."""
CROWDED = 4.0
"""Fair shares from which on an expert is a bottleneck. Ours."""
MAX_DROP_RATE = 0.10
"""Share of dropped assignments from which on somebody should look. Ours: papers train at a few percent."""


class RoutingStatistics(WideMetric):
    """Statistics of every MoE layer over all batches and processes, from `Routing` objects.

    Load counts assignments that asked for an expert, dropped ones included; padding is never counted.

    Args:
        layers: number of experts by layer name, for example ``{"encoder.1": 8}``, in the order of the report.
        languages: names by language id; the load is also counted by language.
        fixed: layers whose router has nothing to learn (hash, uniform): an uneven load is no fault of training there.

    Raises:
        ValueError: no layer, or a fixed one that is not among them.

    Definitions, for a layer with loads ``n_e`` (sum N) over E experts:
        load: ``n_e / N``.
        drop_rate: assignments dropped for capacity / N.
        load_entropy: entropy of the load / log E; 1 = even, 0 = collapse.
        load_cv: standard deviation of ``n_e`` (over E, not E - 1) / mean.
        load_max_ratio: ``max n_e * E / N``; the excess over 1 is MaxVio of arXiv:2408.15664.
        dead_experts: experts with less than `DEAD_SHARE` of an even share.
        experts_per_token: assignments for each token that has one; only where it is not a whole number, that is where
            it varies from token to token.
        entropy: mean of the router's own ``statistics["entropy"]`` (of its probabilities, in nats), weighted by
            assignments; None where a router reports none.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self, layers: Mapping[str, int], languages: Sequence[str] = (), fixed: Collection[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if unknown := sorted(set(fixed) - set(layers)):
            raise ValueError(f"fixed must name layers of {list(layers)}: got {unknown}.")
        if not layers:
            raise ValueError("RoutingStatistics needs at least one layer: got none. Leave it out of dense models.")
        self.layers = dict(layers)
        self.languages = tuple(languages)
        self.fixed = frozenset(fixed)
        rows = max(1, len(self.languages))
        for index, num_experts in enumerate(self.layers.values()):
            zeros = torch.zeros(rows, num_experts, dtype=torch.int64)
            self.add_state(f"load_{index}", zeros, dist_reduce_fx="sum")
            self.add_state(f"kept_{index}", zeros[0].clone(), dist_reduce_fx="sum")
            self.add_state(f"tokens_{index}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            # Sum of entropy * assignments, and the assignments it was reported for.
            self.add_state(f"entropy_{index}", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routings: Mapping[str, Routing], language: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            routings: routings by layer name; layers may be updated in separate calls (an encoder's with the source
                language, a decoder's with the target language).
            language: Int[T] or Int[B] language ids, per token or per sequence of equal padded length.

        Raises:
            ValueError: an unknown layer, a wrong number of experts, or language ids that are missing or do not
                fit the tokens.
        """
        if self.languages and language is None:
            raise ValueError("RoutingStatistics was made with languages and needs `language` ids: got None.")
        for name, routing in routings.items():
            if self.layers.get(name) != routing.num_experts:
                raise ValueError(
                    f"routings must fit the layers {self.layers}: got {name!r} with {routing.num_experts} experts. "
                    "Make RoutingStatistics with the names and sizes of the model's MoE layers."
                )
            index = list(self.layers).index(name)
            group = None if language is None or not self.languages else _per_token(language, routing)
            stats = routing_stats(routing, group, len(self.languages))
            load = stats.load[None] if stats.load_by_group is None else stats.load_by_group
            getattr(self, f"load_{index}").add_(load)
            getattr(self, f"kept_{index}").add_(stats.kept)
            getattr(self, f"tokens_{index}").add_(_routed_tokens(routing))
            if "entropy" in routing.statistics:
                count = stats.load.sum().to(torch.float64)
                entropy = routing.statistics["entropy"].detach().to(torch.float64)
                # A batch without a real token has no entropy; 0 * nan would spoil the sum.
                weighted = torch.where(count > 0, entropy * count, torch.zeros_like(count))
                getattr(self, f"entropy_{index}").add_(torch.stack([weighted, count]))

    def packed(self) -> Tensor:
        """Float64[n], all that was counted here, where it lies: may be added to that of others (`unpack`)."""
        return torch.cat([state.reshape(-1).double() for state in self._states()])

    def unpack(self, packed: Tensor) -> None:
        """Take the place of what was counted by Float64[n], which `packed` or a sum of several made."""
        sizes = [state.numel() for state in self._states()]
        for state, values in zip(self._states(), packed.split(sizes), strict=True):
            state.copy_(values.view(state.shape))
        self._update_count, self._computed = 1, None

    def _states(self) -> list[Tensor]:
        return [getattr(self, f"{state}_{n}") for n in range(len(self.layers)) for state in _STATES]

    def compute(self) -> dict[str, Any]:
        """The form of routing.json: plain data.

        Returns:
            ``{"languages": [...], "layers": [{"name", "num_experts", "load": [E], "load_by_language": {language:
            [E]}, "fixed_load", "experts_per_token" (where it varies), "entropy", "load_entropy", "drop_rate",
            "dead_experts", "load_cv", "load_max_ratio", "assignments"}]}``. Loads sum to 1, or are all 0 where nothing
            was routed.
        """
        found = to_host(self._states())  # waits for the device once
        rows = zip(*[iter(found)] * len(_STATES), strict=True)
        return {
            "languages": list(self.languages),
            "layers": [self._layer(name, *row) for name, row in zip(self.layers, rows, strict=True)],
        }

    def summary(self) -> dict[str, Any]:
        """The form of summary.json: means over the layers (dead experts: their sum), and each layer by name."""
        layers = {
            layer["name"]: {key: value for key, value in layer.items() if key != "name"}
            for layer in self.compute()["layers"]
        }

        def mean(name: str) -> float | None:
            values = [layer[name] for layer in layers.values() if layer[name] is not None]
            return sum(values) / len(values) if values else None

        dead = sum(layer["dead_experts"] for layer in layers.values())
        return {**{name: mean(name) for name in _MEANS}, "dead_experts": dead, "layers": layers}

    def log_names(self) -> frozenset[str]:
        """All names that `log_values` may have."""
        names = {*_MEANS, "dead_experts", *(f"{layer}/{name}" for layer in self.layers for name in _OF_LAYERS)}
        return frozenset(f"routing/{name}" for name in names)

    def log_values(self) -> dict[str, float]:
        """For `log_dict`: means over the layers, ``routing/drop_rate``, ..., and ``routing/<layer>/drop_rate``,
        ``entropy`` and ``experts_per_token`` of each layer that has them.
        """
        summary = self.summary()
        values = {name: value for name, value in summary.items() if name != "layers"}
        for layer, found in summary["layers"].items():
            values |= {f"{layer}/{name}": found.get(name) for name in _OF_LAYERS}
        return {f"routing/{name}": float(value) for name, value in values.items() if value is not None}

    def _layer(self, name: str, *states: Tensor) -> dict[str, Any]:
        """Of a layer's states in host memory, in the order of `_STATES`."""
        counts, kept, tokens = states[0].to(torch.float64), int(states[1].sum()), int(states[2])
        weighted, reported = states[3].tolist()
        load, num_experts = counts.sum(0), counts.size(1)
        total = load.sum().item()
        share = load / max(total, 1)
        return {
            "name": name,
            "num_experts": num_experts,
            "assignments": int(total),
            "tokens": tokens,
            "load": share.tolist(),
            "load_by_language": {
                language: (row / max(row.sum().item(), 1)).tolist()
                for language, row in zip(self.languages, counts, strict=False)
            },
            "fixed_load": name in self.fixed,
            **({"experts_per_token": total / tokens} if tokens and total % tokens else {}),
            "entropy": weighted / reported if reported else None,
            "load_entropy": (
                torch.special.entr(share).sum().item() / math.log(num_experts) if num_experts > 1 else 1.0
            ),
            "drop_rate": 1 - kept / total if total else 0.0,
            "dead_experts": int((share < DEAD_SHARE / num_experts).sum()) if total else 0,
            "load_cv": share.std(correction=0).item() * num_experts,
            "load_max_ratio": share.max().item() * num_experts,
        }


def crowded(num_experts: int, experts_per_token: float = 1.0, most: float = CROWDED) -> float:
    """Fair shares from which on the busiest expert of a layer does too much.

    An expert can have E / K fair shares at most, where it is chosen by every token. Of that it is three fifths, not
    less than 1.6, and not more than `most`.
    """
    return min(most, max(1.6, 0.6 * num_experts / max(1.0, experts_per_token)))


def learns(layer: nn.Module) -> bool:
    """Whether the layer's router has parameters; one that is no `MoELayer` is taken to learn."""
    router = getattr(layer, "router", None)
    return router is None or any(True for _ in router.parameters())


def _routed_tokens(routing: Routing) -> Tensor:
    """Int64 scalar: tokens with at least one assignment."""
    has = torch.zeros(routing.num_tokens, dtype=torch.int64, device=routing.token.device)
    return has.index_add_(0, routing.token, routing.queued.to(torch.int64)).gt(0).sum()


def _per_token(language: Tensor, routing: Routing) -> Tensor:
    """Language ids as Int[T], from ids per token or per sequence."""
    count = language.numel()
    if not count or routing.num_tokens % count:
        raise ValueError(
            f"language must have one id per token or per sequence: got {count} ids for {routing.num_tokens} tokens."
        )
    return language.reshape(-1).repeat_interleave(routing.num_tokens // count)
