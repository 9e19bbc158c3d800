"""A smaller model that starts from a larger one's weights: a dense student, or one with some of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moekit.errors import UserError
from moekit.surgery.sparse_layer import sparse_layers

_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?layers)\.(?P<number>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class StudentState:
    """What `initialize_student` did.

    Attributes:
        weights: The state dict of the student.
        inherited: The names of the student's tensors that are the teacher's; the others are as they were.
        layers: The layers of the teacher that those of the student are from, by stack (``decoder.layers``).
    """

    weights: dict[str, Tensor]
    inherited: tuple[str, ...]
    layers: Mapping[str, tuple[int, ...]]


def initialize_student(
    student: nn.Module,
    teacher: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    experts: bool = True,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> StudentState:
    """The student's state dict with every tensor of the teacher's that has the same name.

    A layer's name is that of the teacher's layer it is from. A dense student of a sparse teacher so gets everything but
    the experts (and learns its own feed-forwards there), a shallower one some of the layers, whole.

    Args:
        student: The student with its weights; what is not inherited stays.
        teacher: The model whose weights they are; it may be on the meta device.
        weights: The teacher's state dict.
        experts: Whether a sparse student gets experts and routers too.
        layers: the teacher's layers by stack, for example ``{"decoder.layers": (0, 1, 4, 5)}``; for a stack that is
            not named, `choose_layers`.

    Raises:
        UserError: if the layers are not of the teacher or not as many as the student's, a tensor of both has two
            shapes, or there is none of both.

    Source: arXiv:2101.03961 table 6 (non-expert weights); arXiv:2201.05596 section 4.2 (fewer layers; which ones is
        ours).
    """
    ours, theirs = _stacks(student), _stacks(teacher)
    unknown = sorted(set(layers or {}) - set(ours))
    if unknown:
        raise UserError(f"layers must name stacks of the student: got {unknown[0]}. There are: {', '.join(ours)}.")
    chosen: dict[str, tuple[int, ...]] = {}
    for stack, kinds in ours.items():
        if stack not in theirs:
            continue
        found = tuple((layers or {}).get(stack, ())) or choose_layers(kinds, theirs[stack])
        if len(found) != len(kinds) or not all(0 <= n < len(theirs[stack]) for n in found):
            raise UserError(
                f"the layers of {stack} must be {len(kinds)} numbers below {len(theirs[stack])}, the teacher's layers: "
                f"got {', '.join(map(str, found))}."
            )
        chosen[stack] = found
    sparse = {} if experts else sparse_layers(student)
    withheld = tuple(f"{layer.prefix}{part}." for layer in sparse.values() for part in ("experts", "router"))
    state = dict(student.state_dict())
    inherited = []
    for name, own in state.items():
        given = weights.get(_origin(name, chosen))
        if given is None or name.startswith(withheld):
            continue
        if given.shape != own.shape:
            raise UserError(
                f"a student that inherits must have the teacher's sizes: {name} is {tuple(own.shape)}, and "
                f"{tuple(given.shape)} in the teacher. Change the student, or inherit less."
            )
        state[name] = given.to(own.dtype)
        inherited.append(name)
    if not inherited:
        raise UserError("the student has no tensor of a name of the teacher's: nothing can be inherited.")
    return StudentState(state, tuple(inherited), chosen)


def choose_layers(student: Sequence[bool], teacher: Sequence[bool]) -> tuple[int, ...]:
    """For each of a student's layers one of the teacher's, in order and spread evenly, sparse from sparse if possible.

    The first is from the first and the last from the last, as far as kinds allow. Of a student with more layers than
    the teacher, neighbours share one.

    Args:
        student: Whether each layer of the student is sparse.
        teacher: Whether each layer of the teacher is sparse.

    Example:
        >>> choose_layers([False, True, False, True], [False, True, False, True, False, True])
        (0, 1, 4, 5)
    """
    last, ends_at = len(student) - 1, len(teacher) - 1
    wanted = [i * ends_at / last if last else ends_at for i in range(len(student))]
    step = 1 if len(student) <= len(teacher) else 0
    # Best choice for the first layers that ends in each of the teacher's: wrong kinds first, then distance.
    best: dict[int, tuple[tuple[int, float], tuple[int, ...]]] = {-step: ((0, 0.0), ())}
    for i, sparse in enumerate(student):
        room = (len(student) - 1 - i) * step
        reached = {}
        for place in range(len(teacher) - room):
            before = [found for end, found in best.items() if end + step <= place]
            if before:
                (wrong, far), path = min(before)
                cost = (wrong + (sparse != teacher[place]), far + abs(place - wanted[i]))
                reached[place] = cost, (*path, place)
        best = reached
    return min(best.values())[1] if best else ()


def _stacks(model: nn.Module) -> dict[str, list[bool]]:
    """Of every stack of layers, whether each is sparse."""
    sparse = sparse_layers(model)
    stacks: dict[str, list[bool]] = {}
    for name, _ in model.named_modules():
        found = _LAYER.match(f"{name}.x")
        if found and found["rest"] == "x":
            stacks.setdefault(found["stack"], []).append(any(path.startswith(f"{name}.") for path in sparse))
    return stacks


def _origin(name: str, layers: Mapping[str, tuple[int, ...]]) -> str:
    found = _LAYER.match(name)
    if found is None or found["stack"] not in layers:
        return name
    return f"{found['stack']}.{layers[found['stack']][int(found['number'])]}.{found['rest']}"
