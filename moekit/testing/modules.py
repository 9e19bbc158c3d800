"""Checks that every module of moekit passes, whatever it computes: copies, files, the meta device, memory.

Checks of a factory also take ``run(module)``, which returns tensors that depend on all that the module does.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from moekit.testing.cases import seeded, trace
from moekit.testing.closeness import assert_same, rule

M = TypeVar("M", bound=nn.Module)
Factory = Callable[[], M]
Run = Callable[[M], dict[str, Tensor]]


def build(factory: Factory[M], *, dtype: torch.dtype = torch.float32, training: bool = True, seed: int = 0) -> M:
    """A module of `factory`, its random start fixed by `seed`."""
    with seeded(seed):
        return factory().to(dtype).train(training)


def check_has_a_source(factory: Factory[M]) -> None:
    """The class says where its idea comes from."""
    cls = type(build(factory))
    rule(
        "Source:" in (inspect.getdoc(cls) or ""),
        f"{cls.__name__} has no `Source:` line in its docstring: cite paper and section, or say that it is yours.",
    )


def check_copies(factory: Factory[M], run: Run[M]) -> None:
    """`copy.deepcopy` and pickle give the same module, with parameters of its own."""
    module = build(factory)
    before = run(module)
    try:
        pickled = pickle.loads(pickle.dumps(module))
    except Exception as error:
        name = type(module).__name__
        raise AssertionError(
            f"{name} cannot be pickled, as multiprocessing needs: {error}. Keep no lambda, local function, open file, "
            "process group or generator on the module."
        ) from error
    for how, twin in (("copy.deepcopy", copy.deepcopy(module)), ("pickle", pickled)):
        assert_same(run(twin), before, f"a module copied by {how} computes something else")
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
        assert_same(run(module), before, f"a change of a copy made by {how} changed the original")


def check_state_dict(factory: Factory[M], run: Run[M]) -> None:
    """The state dict holds all that a module has learned: loaded into another start, it gives the same results."""
    module, other = build(factory, seed=0), build(factory, seed=1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(run(other), run(module), "after load_state_dict a module computes something else")


def check_meta_device(factory: Factory[M]) -> None:
    """Built on the meta device, then `to_empty` and `reset_parameters`: nothing is left as it was in memory."""
    module = build(factory)
    name = type(module).__name__
    with torch.device("meta"):
        empty = factory()
    tensors = [*empty.named_parameters(), *empty.named_buffers()]
    real = [n for n, tensor in tensors if not tensor.is_meta]
    rule(not real, f"{name} built under torch.device('meta') still allocates {real}: make them without a device.")
    empty = empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*empty.parameters(), *empty.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    with seeded(0):
        for part in empty.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
    expected = dict(module.named_parameters()) | dict(module.named_buffers())
    found = dict(empty.named_parameters()) | dict(empty.named_buffers())
    rule(found.keys() == expected.keys(), f"{name} has other tensors when built on the meta device.")
    for key, tensor in expected.items():
        if not tensor.is_floating_point():
            rule(
                torch.equal(found[key], tensor),
                f"{name}.{key} is not what the constructor makes it after to_empty and reset_parameters(): set it "
                "in reset_parameters().",
            )
            continue
        rule(
            bool(found[key].isfinite().all()),
            f"{name}.{key} is left uninitialised by reset_parameters(): set every parameter and buffer there.",
        )
        have, want = float(found[key].detach().norm()), float(tensor.detach().norm())
        rule(
            (have == want) if want == 0 else want / 4 < have < want * 4,
            f"{name}.{key} has norm {have:.3g} after reset_parameters() and {want:.3g} after construction: both must "
            "draw from one distribution.",
        )


def check_forward_stores_nothing(factory: Factory[M], run: Run[M]) -> None:
    """Forward and backward change no buffer and leave nothing on the module: recomputation runs forward twice."""
    module = build(factory, training=True)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    before = {
        name: {key: (value, _size(value)) for key, value in vars(m).items()} for name, m in module.named_modules()
    }
    run(module)
    for name, buffer in module.named_buffers():
        rule(
            torch.equal(buffer, buffers[name]),
            f"forward changes the buffer {name}. Under activation checkpointing forward runs twice a step: move "
            "state in on_step_end, and return what you want to report.",
        )
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            was, size = before[name].get(key, (None, None))
            attribute = f"{name}.{key}" if name else key
            rule(
                was is value or not isinstance(value, Tensor | list | dict | int | float),
                f"forward sets {attribute}. Return results, do not store them: a module is the same after forward.",
            )
            rule(
                size == _size(value),
                f"forward changes {attribute}. Return results, do not collect them: forward may run twice a step.",
            )


def _size(value: object) -> int | None:
    return len(value) if isinstance(value, list | dict | set) else None


def checks_of_any_module(run: Run[M]) -> tuple[Callable[[Factory[M]], None], ...]:
    """All of the above, as checks that take a factory alone."""

    def bound(check: Callable[[Factory[M], Run[M]], None]) -> Callable[[Factory[M]], None]:
        @wraps(check)
        def of_factory(factory: Factory[M]) -> None:
            check(factory, run)

        return of_factory

    return (
        check_has_a_source,
        bound(check_copies),
        bound(check_state_dict),
        check_meta_device,
        bound(check_forward_stores_nothing),
    )


def check_compiles(module: M, inputs: Sequence[Tensor], **arguments: object) -> None:
    """`module` compiles to one graph, with the results of eager, and is not compiled again for other values.

    Args:
        module: what to compile.
        inputs: two or more tensors of one shape.
        **arguments: passed to forward.
    """
    name = type(module).__name__
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    stance = "default"
    for x in inputs:
        try:
            with torch.compiler.set_stance(stance):
                fast = trace(partial(compiled, **arguments), module, x)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            raise AssertionError(
                f"{name} does not compile to one graph, once for all values: {error}\nRead no number from a tensor "
                "(.item(), .tolist(), if tensor:), and let no shape depend on data."
            ) from error
        assert_same(fast, trace(partial(module, **arguments), module, x), f"compiled {name} differs from eager")
        stance = "fail_on_recompile"


def check_checkpointing(module: M, x: Tensor, **arguments: object) -> None:
    """Activation checkpointing (recomputing forward in the backward) changes nothing, randomness included."""

    def recomputed(x: Tensor) -> Any:
        return checkpoint(partial(module, **arguments), x, use_reentrant=False)

    plain = trace(partial(module, **arguments), module, x)
    what = "activation checkpointing changes the result"
    try:
        again = trace(recomputed, module, x)
    except CheckpointError as error:
        raise AssertionError(f"{what}: forward does something else the second time. {error}") from error
    assert_same(again, plain, what)
