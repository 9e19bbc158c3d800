"""Recording the routing of a model while it is used: hooks on its routers, which change nothing."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.component import _WRAPPER_NAMES
from moekit.errors import UserError
from moekit.layer import MoELayer, moe_layers
from moekit.routing import Deviation, Routing, RoutingContext
from moekit.routing_traces.trace import TracedBatch, TracedLayer, TracedTokens
from moekit.routing_traces.writing import TraceWriter
from moekit.stepping import in_backward
from moekit.transformer import routed_layers
from moekit.transformer.models import TokenModel


def named_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The sparse layers of a model by the names that traces give them.

    Those of moekit's transformers are called as in reports, ``encoder.1``; others by their dotted path, without what
    wrappers insert into it. Both are the same under every strategy.

    Raises:
        UserError: there is none.
    """
    known: dict[int, str] = {}
    for part in model.modules():
        if isinstance(part, TokenModel):
            for name, layer in routed_layers(part).items():
                if name not in known.values():
                    known.setdefault(id(layer), name)
    found = {}
    for path, layer in moe_layers(model):
        plain = ".".join(part for part in path.split(".") if part not in _WRAPPER_NAMES)
        found[known.get(id(layer), plain or "layer")] = layer  # the model may be a layer itself
    if not found:
        raise UserError(f"routing can be recorded of sparse layers: {type(model).__name__} has no MoELayer.")
    return found


def require_own_routers(layers: Mapping[str, MoELayer]) -> None:
    """Check that every layer has a router of its own.

    Raises:
        UserError: two layers share one, whose calls do not say which layer made them.
    """
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if (other := owners.setdefault(id(layer.router), name)) != name:
            raise UserError(
                f"routing is recorded and played by router: {other} and {name} share one. Give each layer a router of "
                "its own."
            )


class Recording:
    """Hears every router of a model and writes what it returned, forward by forward.

    A forward of the model ends where the model, a head (a module that names its ``task``) or one of its layers is
    called again. What activation checkpointing computes again in backward is not heard. `record` makes one.

    Args:
        model: any module with `MoELayer` inside.
        writer: gets the forwards.
        weights: whether the combine weights are kept, which are most of a file.

    Attributes:
        paused: whether nothing is heard for now.
    """

    def __init__(self, model: nn.Module, writer: TraceWriter, *, weights: bool = True) -> None:
        self.layers, self._writer, self._weights = named_layers(model), writer, weights
        require_own_routers(self.layers)
        self._step, self._task, self.paused = 0, "", False
        self._told: dict[str, Tensor] = {}
        self._found: dict[str, TracedLayer] = {}
        self._training = False
        self._handles: list[RemovableHandle] = []
        for name, layer in self.layers.items():
            self._handles.append(layer.router.register_forward_hook(self._hear(name), with_kwargs=True))
        for part in model.modules():
            task = getattr(part, "task", None)
            if part is model or isinstance(task, str):
                self._handles.append(part.register_forward_pre_hook(self._begins(part, task)))

    def tell(self, *, step: int | None = None, task: str | None = None, **tokens: Tensor) -> None:
        """Say what the model does not tell its routers, of the forwards to come.

        Args:
            step: optimizer steps that are done.
            task: name of the training task; heads say it themselves.
            **tokens: ``ids``, ``language``, ``place`` or ``sequence``, Int of as many entries as tokens are routed, in
                the place of what a `RoutingContext` says.

        Raises:
            UserError: an unknown name, or a step that is no whole number.
        """
        unknown = sorted(set(tokens) - {"ids", "language", "place", "sequence"})
        if unknown:
            raise UserError(f"a recording can be told ids, language, place and sequence of tokens: got {unknown}.")
        try:
            step = self._step if step is None else operator.index(step)
        except TypeError:
            raise UserError(f"the step of a recording must be a whole number: got {step!r}.") from None
        self.end_forward()
        self._step = step
        self._task = self._task if task is None else task
        self._told |= tokens

    def end_forward(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Write what was heard since the last forward ended.

        Args:
            gradients: Float32[E] by layer, gradient norm of every expert; see `moekit.mechanisms.expert_gradients`.
        """
        if self._found:
            batch = TracedBatch(self._step, self._task, self._training, self._found, dict(gradients or {}))
            self._found = {}
            self._writer.add(batch)

    def close(self) -> None:
        """Hear no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begins(self, part: nn.Module, task: str | None) -> Any:
        @torch.compiler.disable
        def begins(module: nn.Module, arguments: Any) -> None:
            if module is part and not in_backward():  # a copy of the part has a copy of its hooks
                self.end_forward()
                self._task = task if isinstance(task, str) else self._task

        return begins

    def _hear(self, name: str) -> Any:
        @torch.compiler.disable
        @torch.no_grad()
        def heard(router: nn.Module, arguments: Any, named: Mapping[str, Any], routing: Routing) -> None:
            if self.paused or router is not self.layers[name].router or in_backward():
                return
            if name in self._found:
                self.end_forward()
            context = arguments[1] if len(arguments) > 1 else named.get("context")
            tokens = self._tokens(name, routing.num_tokens, context or RoutingContext())
            self._training = router.training
            self._found[name] = TracedLayer(on_host(routing), tokens, self._weights)

        return heard

    def _tokens(self, name: str, count: int, context: RoutingContext) -> TracedTokens:
        known = {
            "ids": context.token_ids, "language": context.task, "place": context.position, "sequence": context.sequence,
        }  # fmt: skip
        host = {}
        for what, values in {**known, **self._told}.items():
            if values is None:
                continue
            if values.numel() != count:
                raise UserError(
                    f"the recording was told {what} of {values.numel()} tokens, and {name} routes {count}: tell those "
                    "of the next forward, one for each token, padding included."
                )
            host[what] = values.detach().reshape(-1).to("cpu", torch.int64, copy=True)  # host read: to be written
        mask = None if context.mask is None else context.mask.detach().cpu()  # host read: to be written
        found = TracedTokens(count, mask, **host)
        return next((layer.tokens for layer in self._found.values() if layer.tokens.same(found)), found)


def on_host(routing: Routing) -> Routing:
    """The routing in host memory, without gradients and logits."""

    def moved(value: Tensor) -> Tensor:
        return value.detach().to("cpu", copy=True)  # host read: to be written

    return Routing(
        token=moved(routing.token),
        expert=moved(routing.expert),
        weight=moved(routing.weight),
        position=moved(routing.position),
        kept=moved(routing.kept),
        losses={name: moved(value) for name, value in routing.losses.items()},
        statistics={name: moved(value) for name, value in routing.statistics.items()},
        num_tokens=routing.num_tokens,
        num_experts=routing.num_experts,
        capacity=routing.capacity,
        deviations={n: Deviation(moved(d.total), moved(d.count)) for n, d in routing.deviations.items()},
        choices=routing.choices,
        all_kept=routing.all_kept,
    )


@contextlib.contextmanager
def record(
    model: nn.Module, file: str | Path, *, weights: bool = True, notes: Mapping[str, str] | None = None
) -> Iterator[Recording]:
    """Write down what the routers of a model return, as long as the block lasts.

    ``with record(model, "routing.npz") as recording:`` and use the model in whatever way: training loops, evaluation,
    a Trainer. The file is there when the block has ended, whole; after an exception there is none. It is read with
    `read_trace`, and ``numpy.load`` opens it too.

    Args:
        model: any module with `MoELayer` inside.
        file: where to write, ``.npz`` by custom.
        weights: whether the combine weights are kept; without them a file is a fifth as large, and cannot be replayed
            with ``weights="recorded"``.
        notes: text to keep beside it, by name.

    Raises:
        UserError: the model has no sparse layer, two of them share a router, a note is no text, or the file cannot be
            written.

    Example:
        >>> import tempfile, torch, moekit as mk
        >>> moe = mk.MoELayer(mk.routers.switch(8, 4), mk.experts.GroupedMLP(4, 8, 16))
        >>> from moekit.routing_traces import read_trace
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with record(moe, f"{folder}/routing.npz"):
        ...         _ = moe(torch.randn(32, 8))
        ...     trace = read_trace(f"{folder}/routing.npz")
        >>> len(trace), trace[0].layers["layer"].routing.num_tokens
        (1, 32)
    """
    with TraceWriter(file, notes) as writer:
        recording = Recording(model, writer, weights=weights)
        try:
            yield recording
            recording.end_forward()
        finally:
            recording.close()
