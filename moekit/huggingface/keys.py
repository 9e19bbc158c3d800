"""Tables of keys: where each of our tensors lies in a checkpoint of transformers, for reading and for writing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES, Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """One of our tensors and theirs.

    Attributes:
        ours: The name in our state dict, or "" where we have no such tensor and theirs are zeros (biases).
        theirs: Their names: one, or one for each entry of our first dimension.
        shape: The shape of ours.
        stacked: Whether theirs are the entries of our first dimension.
        transposed: Whether the matrices of an entry are transposed there.
        factor: The first of theirs is ours times this.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: Shape
    stacked: bool = False
    transposed: bool = False
    factor: float = 1.0

    def shapes(self) -> dict[str, Shape]:
        """Shapes of theirs by name."""
        one = self.shape[1:] if self.stacked else self.shape
        return dict.fromkeys(self.theirs, one[::-1] if self.transposed else one)

    def to_theirs(self, tensor: Tensor) -> dict[str, Tensor]:
        """Theirs, contiguous, from ours."""
        pieces = dict(zip(self.theirs, tensor.unbind(0) if self.stacked else (tensor,), strict=True))
        if self.factor != 1:
            pieces[self.theirs[0]] = pieces[self.theirs[0]] * self.factor
        return {name: (piece.t() if self.transposed else piece).contiguous() for name, piece in pieces.items()}

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Ours, in memory of its own, from theirs by name."""
        pieces = [self.entry(n, tensors[name]) for n, name in enumerate(self.theirs)]
        return torch.stack(pieces) if self.stacked else pieces[0].clone()

    def entry(self, number: int, tensor: Tensor) -> Tensor:
        """Entry `number` of ours from that of theirs."""
        scaled = tensor / self.factor if number == 0 and self.factor != 1 else tensor
        return scaled.t() if self.transposed else scaled


@dataclass(frozen=True)
class KeyMap:
    """The keys of an encoder-decoder of transformers.

    A row is a pattern of our names and one of theirs:

    - ``{side}`` is the encoder or the decoder, ``{i}`` the number of a layer, ``{p}`` weight or bias;
    - ``{1|2}`` is 1 in the encoder and 2 in the decoder;
    - ``{q,k,v}`` are three tensors, the entries of our first dimension;
    - ``{e}`` is the number of an expert, likewise, and its matrices are transposed.

    A row counts where our model has a tensor of that name. Where it has only the weight, their bias is zero.

    Attributes:
        of_side: Rows of a side, in the order in which files are written.
        of_layer: Rows of a layer, likewise, which come after those of its side; without the beginnings of the names.
        layer: The beginning of their names of a layer's tensors.
        prefix: The beginning of the names of tables of embeddings.
    """

    of_side: Mapping[str, str]
    of_layer: Mapping[str, str]
    layer: str
    prefix: str = ""

    def tables(self, *, tied: bool) -> dict[str, str]:
        """Rows of the tables of embeddings."""
        if tied:
            return {"embedding.weight": self.shared}
        names = {"embedding": "encoder", "target_embedding": "decoder"}
        rows = {f"{ours}.weight": f"{self.prefix}{side}.embed_tokens.weight" for ours, side in names.items()}
        return rows | {"output.weight": "lm_head.weight"}

    @property
    def shared(self) -> str:
        """The table of tied embeddings. Where they are not tied it is in files, and not used."""
        return f"{self.prefix}shared.weight"

    def synonyms(self, *, tied: bool) -> dict[str, tuple[str, ...]]:
        """Other names under which a file may hold a table, or hold it once more."""
        ends = tuple(f"{self.prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
        return {self.shared: (*ends, "lm_head.weight")} if tied else dict.fromkeys(ends, (self.shared,))

    def links(self, ours: Architecture, theirs: Architecture, state: Mapping[str, Tensor]) -> Iterator[Link]:
        """A link for every tensor of theirs.

        Args:
            ours: Our architecture.
            theirs: The same with their scales.
            state: Our tensors by name, for their shapes.

        Raises:
            UserError: if one table would have to be multiplied by two factors.
        """
        factors = _factors(ours, theirs)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for mine, yours in self.tables(tied=ours.tied).items():
            yield Link(mine, (yours,), shapes[mine], factor=factors[mine])
        for side, count in ours.layers.items():
            rows = list(self.of_side.items())
            for i in range(count):
                layer = self.layer.replace("{i}", str(i))
                rows += [(f"{side}.layers.{i}.{mine}", f"{layer}{yours}") for mine, yours in self.of_layer.items()]
            for mine, yours in rows:
                for part in ("weight", "bias") if "{p}" in mine else ("",):
                    names = {"side": side, "p": part}
                    yield from _link(_fill(mine, names), _fill(yours, names), ours, shapes, factors)


def _link(
    mine: str, yours: str, ours: Architecture, shapes: Mapping[str, Shape], factors: Mapping[str, float]
) -> Iterator[Link]:
    experts = "{e}" in yours
    shape = shapes.get(mine)
    if shape is None:  # perhaps a bias that we do not have, beside a weight that we do
        weight = shapes.get(re.sub(r"bias$", "weight", re.sub(r"\.b_(\w+)$", r".w_\1", mine)))
        if weight is None:
            return
        shape = (*weight[:-2], weight[-1 if experts else -2])
        mine = mine if ours.bias else ""
    options = re.search(r"\{(\w(?:,\w)*)\}", yours)
    theirs: tuple[str, ...] = (yours,)
    if options is not None:
        parts = map(str, range(shape[0])) if experts else options[1].split(",")
        theirs = tuple(yours.replace(options[0], part) for part in parts)
    scaled = re.search(r"(self_attention\.qkv|cross_attention\.q)\.\w+$", mine)
    factor = factors["queries"] if scaled else 1.0
    yield Link(mine, theirs, shape, options is not None, experts and len(shape) == 3, factor)


def _fill(pattern: str, names: Mapping[str, str]) -> str:
    """A name from its pattern, but for what stands for several tensors."""
    for name, text in names.items():
        pattern = pattern.replace(f"{{{name}}}", text)
    return re.sub(r"\{(\w+)\|(\w+)\}", r"\1" if names["side"] == "encoder" else r"\2", pattern)


def _factors(ours: Architecture, theirs: Architecture) -> dict[str, float]:
    """What tables and queries are multiplied by, so that theirs, used as theirs are, give the same results."""

    def scale(value: float | None) -> float:
        return ours.head_dim**-0.5 if value is None else value

    # What vectors are multiplied by on the way in, and hidden states on the way out.
    ends = {"input": (ours.dim**0.5, 1.0), "output": (1.0, ours.dim**-0.5), "none": (1.0, 1.0)}
    both = zip(ends[ours.embedding_scale], ends[theirs.embedding_scale], strict=True)
    embedding, output = (mine / yours for mine, yours in both)
    if ours.tied and not math.isclose(embedding, output):
        raise UserError(
            f"transformers' {NAMES[ours.kind]} scales the one table of tied embeddings on the way in or on the way "
            f"out: this model does neither (embedding_scale={ours.embedding_scale!r})."
        )
    same = ours.attention_scale == theirs.attention_scale
    return {
        "embedding.weight": embedding,
        "target_embedding.weight": embedding,
        "output.weight": output,
        "queries": 1.0 if same else scale(ours.attention_scale) / scale(theirs.attention_scale),
    }
