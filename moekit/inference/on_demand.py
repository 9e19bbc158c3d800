"""Experts that stay on disk until a token asks for them: a model larger than memory still answers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from moekit.component import Component
from moekit.dispatch import PackedDispatcher
from moekit.errors import UserError
from moekit.experts.base import Experts
from moekit.huggingface import Imported, open_folder
from moekit.kernels import on_host, remember
from moekit.layer import MoELayer
from moekit.mapped import MappedTensor, map_fake, read_safetensors
from moekit.training.checkpoint_io import load_checkpoint

Read = Callable[[int], Mapping[str, Tensor]]
"""Gives the tensors of one expert, without the dimension that counts experts."""


class ExpertsOnDemand(Component):
    """A bank of which at most `resident` experts are in memory: those that were asked for last.

    Stands in the place of a bank in evaluation. It computes one expert after another, by the bank's own forward.

    Args:
        bank: the bank it stands for; only its settings are used, so it may be on the meta device.
        read: gives an expert. Mapped tensors are read by the page as they are used, and given back to the system when
            they are forgotten. On a GPU, where the rows are, they are copied to it and kept there.
        resident: the most experts kept.

    Attributes:
        loads: how many experts have been fetched so far.

    Raises:
        ValueError: if `resident` is less than 1, or the bank's experts cannot be told apart.

    Source: arXiv:2110.03742 serves only the experts of one task, which a task router knows beforehand. Differs: here
        any router may have chosen them, and those of a language are found by use, the least recently used going first.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    requires_whole_bank: ClassVar[bool] = True

    def __init__(self, bank: Experts, read: Read, *, resident: int) -> None:
        super().__init__()
        if resident < 1:
            raise ValueError(f"resident must be at least 1: got {resident}.")
        shared = [name for name in bank.state_dict() if "." in name or "expert" not in bank.axes.get(name, ())]
        if shared or bank.requires_whole_bank:
            raise ValueError(
                f"experts of {type(bank).__name__} cannot be fetched one by one: "
                f"{shared[0] if shared else 'its forward'} needs all of them."
            )
        self.num_experts, self.dim, self.resident = bank.num_experts, bank.dim, resident
        self.loads = 0
        self._axis = {name: bank.axes[name].index("expert") for name in bank.state_dict()}
        # In a tuple it is no submodule: its parameters have no memory and belong to nobody.
        self._one = (_single(bank),)
        self._read = read
        self._held: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers of the experts in memory, the next to go first."""
        return tuple(self._held)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{type(self._one[0]).__name__}, num_experts={self.num_experts}, resident={self.resident}"

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute every row by its expert; see `moekit.experts.Experts.forward`.

        Padded rows do not say which experts have none, so all are fetched: use a `PackedDispatcher`.

        Raises:
            RuntimeError: in training.
        """
        if self.training:
            raise RuntimeError(
                "ExpertsOnDemand is for evaluation: call eval() first, or load the whole model to train."
            )
        numbers = [1] * self.num_experts if counts is None else on_host(counts).tolist()
        groups = rows.unbind(0) if counts is None else rows.split(numbers)
        out = torch.empty_like(rows)
        results = out.unbind(0) if counts is None else out.split(numbers)
        for expert, (group, result) in enumerate(zip(groups, results, strict=True)):
            if numbers[expert]:
                result.copy_(self.reference(expert, group))
        return out

    def reference(self, expert: int, x: Tensor) -> Tensor:
        """Expert number `expert` on Float[R, D]."""
        tensors = self._fetch(expert, x.device)
        number = torch.tensor([x.shape[0]], device="cpu")
        count = remember(torch.full((1,), x.shape[0], dtype=torch.int64, device=x.device), number)
        result: Tensor = functional_call(self._one[0], tensors, (x, count))
        return result

    def _fetch(self, expert: int, device: torch.device) -> dict[str, Tensor]:
        held = self._held.pop(expert, None)
        if held is not None and all(tensor.device == device for tensor in held.values()):
            self._held[expert] = held
            return held
        while len(self._held) >= self.resident:
            self._held.popitem(last=False)
        tensors = {
            name: tensor.unsqueeze(self._axis[name]).to(device)  # host read: of the disk
            for name, tensor in self._read(expert).items()
        }
        self._held[expert] = tensors
        self.loads += 1
        return tensors


def open_on_demand(folder: Path | str, *, resident: int, dropless: bool = False) -> Imported:
    """Open a folder of transformers with its experts left on disk, at most `resident` of each layer in memory.

    `folder` and `dropless` are those of `moekit.huggingface.import_model`, which raises the same errors.
    """
    found = open_folder(folder, dropless=dropless)
    state = {name: found.tensor(name) for name in found.links if ".experts." not in name}
    found.model.load_state_dict(state, assign=True, strict=False)

    def reader(start: str, bank: Experts) -> Read:
        names = tuple(bank.state_dict())
        return lambda expert: {name: found.entry(start + name, expert) for name in names}

    _exchange(found.model, reader, resident)
    return Imported(found.model.eval(), found.tokens, found.architecture)


def load_on_demand(model: nn.Module, path: Path | str, *, resident: int, prefix: str = "") -> nn.Module:
    """Give a model the weights of a file, and leave its experts there.

    Args:
        model: built under ``torch.device("meta")``, so that it has no memory yet; changed in place.
        path: a checkpoint (its ``state_dict``) or a safetensors file, with the names of the model.
        resident: the most experts of a layer in memory.
        prefix: what names in the file begin with, for example ``"backbone."``; others are passed over.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: if the file cannot be read, lacks a tensor, or has one of another shape.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from moekit import MoELayer, routers
        >>> from moekit.experts import GroupedMLP
        >>> make = lambda: MoELayer(routers.switch(8, 4), GroupedMLP(4, 8, 16))
        >>> whole = make().eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": whole.state_dict()}, Path(folder, "last.ckpt"))
        ...     with torch.device("meta"):
        ...         small = make()
        ...     _ = load_on_demand(small, Path(folder, "last.ckpt"), resident=2)
        ...     x = torch.randn(5, 8)
        ...     torch.allclose(small(x).hidden, whole(x).hidden, atol=1e-6)
        True
    """
    path = Path(path)
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name, wanted in model.state_dict().items():
        if name not in mine:
            raise UserError(f"{path} must hold {prefix}{name}: it does not.")
        if mine[name].shape != tuple(wanted.shape):
            raise UserError(
                f"{path}: {prefix}{name} must have the shape {list(wanted.shape)}: got {list(mine[name].shape)}."
            )
    inside = tuple(_layers(model))
    state = {n: mine[n].tensor().clone() for n in model.state_dict() if not n.startswith(inside)}
    model.load_state_dict(state, assign=True, strict=False)

    def take(tensor: MappedTensor, axis: int, expert: int) -> Tensor:
        return tensor[expert].tensor() if axis == 0 else tensor.tensor().select(axis, expert)

    def reader(start: str, bank: Experts) -> Read:
        found = {name: (mine[start + name], bank.axes[name].index("expert")) for name in bank.state_dict()}
        return lambda expert: {name: take(*place, expert) for name, place in found.items()}

    _exchange(model, reader, resident)
    return model.eval()


def _read_checkpoint(path: Path) -> dict[str, MappedTensor]:
    """Where the weights of a checkpoint lie; they are not read."""
    with FakeTensorMode():
        state = load_checkpoint(path).get("state_dict")
    if not isinstance(state, dict):
        raise UserError(f"{path} must hold a state_dict: it has none.")
    return map_fake(path, {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)})


def _layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers by what the names of their banks' tensors begin with."""
    return {
        f"{name}.experts.".removeprefix("."): module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and isinstance(module.experts, Experts)
    }


def _exchange(model: nn.Module, reader: Callable[[str, Experts], Read], resident: int) -> None:
    """Put banks on demand in the place of all banks."""
    for start, layer in _layers(model).items():
        bank = layer.experts
        layer.experts = ExpertsOnDemand(bank, reader(start, bank), resident=resident)  # type: ignore[assignment]
        layer.dispatcher = PackedDispatcher()  # with a capacity as well: padded rows would fetch every expert


def _single(bank: Experts) -> Experts:
    """The bank's settings with room for one expert and no memory."""
    one = copy.copy(bank)
    one._parameters = {name: None for name, value in bank._parameters.items() if value is None}
    for name, parameter in bank.named_parameters(recurse=False):
        axis = bank.axes[name].index("expert")
        shape = [1 if i == axis else size for i, size in enumerate(parameter.shape)]
        room = torch.empty(shape, dtype=parameter.dtype, device="meta")
        one.register_parameter(name, nn.Parameter(room, requires_grad=False))
    one.num_experts = 1
    return one.eval()
