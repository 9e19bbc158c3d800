"""`adopt_folder`: a folder of transformers as an adopted model, of which each process reads its own part.

class FineTune(lightning.LightningModule):
    def configure_model(self):
        self.model = adopt_folder("OLMoE-1B-7B", device="meta")   # the Strategy divides it and then reads it

`moekit.huggingface.consolidating` makes such a folder again of what was trained.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.folder_kinds import require_model
from moekit.huggingface.adopt import adopt
from moekit.layer import AuxLosses
from moekit.mapped import MappedTensor, StoredWeights, read_safetensors
from moekit.parallel.checkpoint.checkpointer import PathLike, read_into
from moekit.parallel.checkpoint.index import Chunk, Index, StoredTensor
from moekit.parallel.checkpoint.reader import StoredCheckpoint
from moekit.parallel.checkpoint.state import aliases, model_tensors
from moekit.source import digest
from moekit.stored import parse_json

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_SAMPLED, _BYTES = 512, 4096

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
)  # fmt: skip
"""One of them is in a folder with a tokenizer; of a folder without, transformers makes an empty one."""


def adopt_folder(
    folder: PathLike,
    *,
    device: torch.device | str = "cpu",
    aux: AuxLosses | Literal["default"] | None = "default",
    dtype: torch.dtype | None = None,
) -> Any:
    """The model of a folder of transformers, adopted; see `adopt`.

    On the meta device nothing is read yet: `moekit.parallel.parallelize`, and with it `ExpertParallelStrategy`, divides
    the model first, and then each rank reads its part of every tensor out of the files. So no rank ever holds the whole
    model, and none sends weights to another.

    Args:
        folder: config.json and safetensors files, as `save_pretrained` or a download makes them.
        device: where the weights are; "meta" in `configure_model` under the Strategy. The model evaluates, as that of
            `from_pretrained` does: call ``train()``, which a Trainer does not.
        aux: weights of the routers' losses, as `adopt` takes them.
        dtype: the type of the weights; None = what the configuration says, else that of most of the stored weights.

    Raises:
        UserError: something is missing, pickled or of another shape, the class is unknown to transformers, or the model
            is not adopted.
    """
    place = Path(os.path.abspath(folder))
    files = folder_files(place)
    model = on_meta(place, dtype)
    adopt(model, aux=aux)
    compute_buffers(model)
    stored = FolderWeights(place, model, files)
    model.eval()
    if torch.device(device).type == "meta":
        stored.mark(model)
        return model
    give_memory(model, torch.device(device))
    stored.fill_module(model)
    return model


class FolderWeights(StoredWeights):
    """The tensors of an adopted model in the files of its folder.

    Args:
        folder: which has the files.
        model: adopted, on the meta device or not; its names and shapes are those of the index.
        files: tensors by name in the files.

    Raises:
        UserError: tensors are missing or of other shapes, or transformers changes them in a way that is not known here.
    """

    def __init__(self, folder: Path, model: nn.Module, files: Mapping[str, MappedTensor]) -> None:
        self._transposed: set[str] = set()
        self._stored = _Files(folder, self._index_of(folder, model, files), files, self._transposed)

    def fill_module(self, module: nn.Module) -> None:
        """Read the tensors of the adopted model, divided or whole; all ranks call it together."""
        tensors, _, shared = model_tensors(module)
        there = self._stored.index.entries
        targets = {name: tensor for name, tensor in tensors.items() if f"model/{name}" in there}
        for name, first in shared.items():  # of a shared tensor a file may have any of the names
            if first not in targets and f"model/{name}" in there:
                targets[name] = tensors[first]
        read_into({f"model/{name}": tensor for name, tensor in targets.items()}, self._stored)

    def _index_of(self, folder: Path, model: nn.Module, files: Mapping[str, MappedTensor]) -> Index:
        wanted = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        chunks: dict[str, list[Chunk]] = {}
        for name, parts in _by_target(model, files, wanted).items():
            if name not in wanted:
                _require_unused(folder, model, name, parts[0].key)
                continue
            chunks[name] = [
                Chunk(part.offsets, part.sizes, files[part.key].path.name, part.key, None) for part in parts
            ]
            self._transposed.update(part.key for part in parts if part.transposed)
        known = aliases(model)
        for name, tensor in wanted.items():
            first = known.get(name, name)
            same = [name, *(other for other, of in known.items() if of == first), first]
            held = sum(chunk.numel for other in (name, *same) if other in chunks for chunk in chunks[other]) > 0
            if not held and tensor.numel():
                raise UserError(f"{folder} has no tensor for {name} of shape {tuple(tensor.shape)}.")
            if name in chunks:
                _require_whole(folder, name, tuple(tensor.shape), chunks[name])
        entries = {
            f"model/{name}": StoredTensor(tuple(wanted[name].shape), wanted[name].dtype, tuple(found))
            for name, found in chunks.items()
        }
        return Index(entries)


class _Files(StoredCheckpoint):
    """Files of transformers, whose tensors are boxes of the model's, some of them transposed."""

    def __init__(
        self, folder: Path, index: Index, places: Mapping[str, MappedTensor], transposed: Collection[str]
    ) -> None:
        super().__init__(folder, index)
        self._places, self._transposed = places, transposed

    def _read(self, chunk: Chunk) -> Tensor:
        whole = self._places[chunk.key].tensor()
        whole = whole.t() if chunk.key in self._transposed else whole
        return whole[None] if whole.ndim < len(chunk.sizes) else whole


class _Part:
    """A tensor of a file as a box of one of the model."""

    def __init__(self, key: str, shape: Sequence[int]) -> None:
        self.key, self.sizes, self.offsets, self.transposed = key, tuple(shape), (0,) * len(shape), False


def _by_target(model: Any, files: Mapping[str, MappedTensor], wanted: Mapping[str, Tensor]) -> dict[str, list[_Part]]:
    """What transformers' conversions make of the tensors of files: parts, by the name in the adopted model.

    Raises:
        UserError: a conversion is of another kind than stacking, concatenating and transposing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = [*get_model_conversion_mapping(model), *(getattr(model, "_weight_conversions", None) or ())]
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, list[_Part]] = {}
    grouped: dict[str, dict[str, list[_Part]]] = {}
    for key in sorted(files, key=dot_natural_key):
        part = _Part(key, files[key].shape)
        if key in wanted:  # as it is called here
            found[key] = [part]
            continue
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(wanted))
        if pattern is None:
            found[name] = [part]
        else:
            grouped.setdefault(name, {}).setdefault(pattern, []).append(part)
    for name, patterns in grouped.items():
        converter = by_pattern[next(iter(patterns))]
        given = [patterns.get(pattern, []) for pattern in converter.source_patterns]
        found[name] = _joined(name, given, converter.operations)
    return found


def _joined(name: str, given: list[list[_Part]], operations: Iterable[Any]) -> list[_Part]:
    for operation in operations:
        match type(operation).__name__:
            case "MergeModulelist" if operation.dim == 0:
                for parts in given:
                    for number, part in enumerate(parts):
                        part.sizes, part.offsets = (1, *part.sizes), (number, *part.offsets)
            case "Concatenate":
                start, dim = 0, operation.dim
                for parts in given:
                    for part in parts:
                        part.offsets = (*part.offsets[:dim], start, *part.offsets[dim + 1 :])
                    start += parts[0].sizes[dim] if parts else 0
                given = [[part for parts in given for part in parts]]
            case "Transpose" if {operation.dim0, operation.dim1} in ({0, 1}, {1, 2}):
                for part in (part for parts in given for part in parts):
                    part.sizes = (*part.sizes[:-2], part.sizes[-1], part.sizes[-2])
                    part.offsets = (*part.offsets[:-2], part.offsets[-1], part.offsets[-2])
                    part.transposed = not part.transposed
            case other:
                raise UserError(
                    f"{name} is made by transformers' {other}, which is not known here. Load the model by "
                    "from_pretrained, and give it to adopt."
                )
    return [part for parts in given for part in parts]


def _require_unused(folder: Path, model: Any, name: str, key: str) -> None:
    """Raise UserError unless transformers knows a tensor as one that the model makes no use of."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    computed = name in {buffer for buffer, _ in model.named_buffers()}
    if not computed and not any(re.search(pattern, name) for pattern in ignored):
        raise UserError(
            f"{folder} has a tensor {key}, and {type(model).__name__} as config.json describes it has no place for it."
        )


def _require_whole(folder: Path, name: str, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    inside = all(
        len(chunk.sizes) == len(shape)
        and all(o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True))
        for chunk in chunks
    )
    boxes = {chunk.offsets for chunk in chunks}
    if not inside or len(boxes) < len(chunks) or sum(chunk.numel for chunk in chunks) != math.prod(shape):
        parts = ", ".join(f"{chunk.key} {list(chunk.sizes)}" for chunk in chunks[:3])
        raise UserError(f"{folder}: {name} must have shape {shape}: got {len(chunks)} parts, {parts}, ...")


def folder_files(place: Path) -> dict[str, MappedTensor]:
    """All tensors of a folder by the names that they have there.

    Raises:
        UserError: it is no folder of transformers, or its weights are no safetensors, or not whole.
    """
    require_model(place)
    if (place / _WEIGHTS).is_file():
        return read_safetensors(place / _WEIGHTS, verify=False)
    if not (place / _INDEX).is_file():
        raise UserError(
            f"{place} must have its weights as safetensors ({_WEIGHTS}, or several and {_INDEX}). Pickles are not read."
        )
    try:
        named = {str(key): str(file) for key, file in parse_json((place / _INDEX).read_bytes())["weight_map"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{place / _INDEX} must be an index of safetensors files: {error}.") from None
    found: dict[str, MappedTensor] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise UserError(f"{place / _INDEX} must name files of its own folder: got {file!r}.")
        found |= read_safetensors(place / file, verify=False)
    if absent := next((key for key in named if key not in found), None):
        raise UserError(f"{place} has no tensor {absent}, which its index names.")
    return found


def weights_digest(place: Path) -> str:
    """Hex digest that tells folders of weights apart: by names, types and shapes of all, and some bytes of many.

    Not of all bytes, which are gigabytes: of `_SAMPLED` tensors at equal distances in the order of their names, those
    in the middle.

    Raises:
        UserError: as `folder_files`.
    """
    files = sorted(folder_files(place).items())
    parts: list[object] = [(name, mapped.dtype, mapped.shape) for name, mapped in files]
    for _, mapped in files[:: -(-len(files) // _SAMPLED) or 1]:
        size = mapped.numel * mapped.dtype.itemsize
        with mapped.path.open("rb") as file:
            file.seek(mapped.offset + max(size - _BYTES, 0) // 2)
            parts.append(file.read(min(size, _BYTES)))
    return digest(*parts)[:16]


def read_config(place: Path) -> tuple[dict[str, Any], Any]:
    """A folder's config.json, as it is written and as transformers' configuration. Nothing in the folder is executed.

    Raises:
        UserError: there is none, or transformers does not know it.
    """
    import transformers

    require_model(place)
    try:
        raw = parse_json((place / "config.json").read_bytes(), repeated=True)
        if not isinstance(raw, dict):
            raise ValueError(f"it holds {type(raw).__name__}, and no object")
        return raw, transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises of values
        raise UserError(
            f"{place / 'config.json'} is no configuration that transformers knows: {_reason(error)}"
        ) from None


def on_meta(place: Path, dtype: torch.dtype | None) -> Any:
    """The model that a folder's config.json describes, without memory. Nothing in the folder is executed.

    Args:
        place: the folder.
        dtype: the type of the weights; None = what the configuration says, else that of most of the stored weights.

    Raises:
        UserError: transformers does not know it, or it is quantized.
    """
    import transformers

    raw, config = read_config(place)
    names = raw.get("architectures") or []
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and len(names) == 1 else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(
            f"{place / 'config.json'} must name one class of transformers as its architecture: got {names}."
        )
    if raw.get("quantization_config") is not None:
        raise UserError(f"{place} is quantized, which is not adopted. Use a folder of floating-point weights.")
    try:
        with torch.device("meta"):
            model: Any = kind._from_config(config, dtype=dtype or config.dtype or _stored_dtype(place))
    except Exception as error:  # whatever transformers raises of values
        raise UserError(f"{place / 'config.json'} describes no {kind.__name__}: {_reason(error)}") from None
    if (place / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(place)
    return model


def _stored_dtype(place: Path) -> torch.dtype:
    """The floating-point type that most elements of a folder's weights have; float32 where there are no weights."""
    try:
        files = folder_files(place).values()
    except UserError:  # who reads weights says so
        return torch.float32
    counts: Counter[torch.dtype] = Counter()
    for mapped in files:
        if mapped.dtype.is_floating_point and mapped.dtype.itemsize > 1:  # no model computes in a type of 8 bits
            counts[mapped.dtype] += mapped.numel
    return max(counts, key=lambda kind: counts[kind], default=torch.float32)


def _reason(error: Exception) -> str:
    """What an error of transformers says first, in a line."""
    return " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__


@torch.no_grad()
def compute_buffers(model: Any) -> None:
    """Give memory and values to buffers that are in no file: tables of positions, a bias that stays zero."""
    for module in model.modules():
        own = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        if not any(module._buffers[name].is_meta for name in own):
            continue
        for name in own:
            module._buffers[name] = torch.zeros_like(module._buffers[name], device="cpu")
        model._init_weights(module)


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory for what is on the meta device; shared tensors stay so."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    new = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                    made[tensor] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                holder[name] = made[tensor]  # type: ignore[assignment]


def copy_beside(place: Path, target: Path) -> None:
    """The tokenizer and other small files of a folder; not its card, which is of another model."""
    for file in sorted(place.iterdir()):
        left = re.search(r"\.(safetensors|bin|pt|pth|h5|msgpack|index\.json|py)$|^README\.md$", file.name)
        if file.is_file() and not left and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
