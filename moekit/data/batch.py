"""`Batch`: what a training or evaluation step of one task gets, and how sentences become one.

Sentences arrive as `Ragged` arrays (see `moekit.data.ragged`) without any special token; the functions here add the
language tag, bos and eos, pad, and build the masks. Which of them a batch needs is its task's affair (`moekit.tasks`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree

from moekit.data.keyed import Keys
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer

IGNORE = -100  # the label of a place that is not predicted, as in torch.nn.functional.cross_entropy
SPECIALS = 2  # a tag and eos, or bos and eos, stand around every sentence


@dataclass(eq=False)
class Batch:
    """Padded sentences of one task. B sequences, S source positions, T target positions.

    A pytree whose leaves are the tensors. It is not a frozen dataclass only because Lightning's precision plugins
    copy batches field by field and refuse frozen ones; treat it as frozen all the same.

    Attributes:
        task: its name, such as those of `moekit.tasks.TASKS`.
        source: Int64[B, S], padded with pad_id. Begins with a language tag (the target's) and ends with eos; of one
            text it equals `target`.
        source_mask: Bool[B, S], True = a real token.
        target: Int64[B, T] = bos ... eos, padded; decoder input ``target[:, :-1]``, labels ``target[:, 1:]``.
        target_mask: Bool[B, T].
        labels: Int64[B, S], -100 where nothing is predicted, the original id at masked places.
        source_language: Int64[B] language ids.
        target_language: Int64[B] language ids.
        direction: ``"en-de"`` (or ``"en"`` for monolingual tasks) where all rows share it (evaluation), else None.
        index: Int64[B], in evaluation the place of each row in what the source gave for this direction and split,
            for looking up the original sentences; else None.
        one_text: whether source and target are the same text, as for a decoder alone, which counts once.
        predicted: Int64[N], the places that are predicted, row by row: in the flattened ``labels``, or without labels
            in the flattened ``target[:, 1:]``. Made with the batch, from its masks, so that on a GPU nobody has to
            wait for their number.
        real: Int64[R], the places of real tokens in the flattened source; only with labels.
    """

    task: str
    source: Tensor
    source_mask: Tensor
    target: Tensor | None
    target_mask: Tensor | None
    labels: Tensor | None
    source_language: Tensor
    target_language: Tensor
    direction: str | None = None
    index: Tensor | None = None
    one_text: bool = False
    predicted: Tensor | None = field(init=False, default=None)
    real: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.labels is not None:
            self.predicted, self.real = _places(self.labels >= 0), _places(self.source_mask)
        elif self.target_mask is not None:
            self.predicted = _places(self.target_mask[:, 1:])

    def __len__(self) -> int:
        """Number of sequences."""
        return self.source.shape[0]

    @property
    def num_tokens(self) -> int:
        """Real tokens, tags and eos included, of both sides; of one text once."""
        count = int(self.source_mask.sum())
        if self.target_mask is not None and not self.one_text:
            count += int(self.target_mask.sum())
        return count

    @property
    def num_positions(self) -> int:
        """Padded positions of both sides: what the batch costs."""
        count = self.source.numel()
        if self.target is not None and not self.one_text:
            count += self.target.numel()
        return count

    def to(self, device: torch.device | str, *, non_blocking: bool | None = None) -> Batch:
        """The same batch with every tensor on `device`.

        Args:
            device: where to.
            non_blocking: whether the host goes on before the copies have ended; None = for tensors in pinned memory,
                from which that is safe.
        """
        target = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            ahead = non_blocking
            if ahead is None:
                ahead = target.type == "cuda" and tensor.device.type == "cpu" and tensor.is_pinned()
            return tensor.to(target, non_blocking=ahead)

        return self._each(move)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (asked for by `DataLoader(pin_memory=True)`)."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            changed[f.name] = function(value) if isinstance(value, Tensor) else value
        return _whole(changed)


def _whole(values: dict[str, Any]) -> Batch:
    """A batch of all its fields: places are not looked for again."""
    batch = object.__new__(Batch)
    batch.__dict__.update(values)
    return batch


def _places(mask: Tensor) -> Tensor:
    return mask.reshape(-1).nonzero().squeeze(1)


_PLAIN = ("task", "direction", "one_text")
_LEAVES = tuple(f.name for f in dataclasses.fields(Batch) if f.name not in _PLAIN)


def _flatten(batch: Batch) -> tuple[list[Any], Any]:
    return [getattr(batch, name) for name in _LEAVES], tuple(getattr(batch, name) for name in _PLAIN)


def _unflatten(leaves: Any, context: Any) -> Batch:
    return _whole({**dict(zip(_PLAIN, context, strict=True)), **dict(zip(_LEAVES, leaves, strict=True))})


_pytree.register_pytree_node(Batch, _flatten, _unflatten, serialized_type_name="moekit.Batch")


@dataclass(frozen=True)
class Width:
    """Least padded lengths of a batch, so that every rank's share of one global batch has the same shape."""

    source: int = 0
    target: int = 0


@dataclass(frozen=True, eq=False)
class Sentences:
    """The rows of a batch before they become one: what a task collates. B rows of this rank, of 1 or 2 sides.

    Attributes:
        texts: the sentences on each side, without special tokens.
        lengths: Int64[all rows] for each side, tokens of the rows of all ranks together.
        languages: Int64[B] ids of source and target language, the same for text of one language.
        keys: UInt64[B], a random key of each row, for noise.
        tokenizer: whose specials are used.
        pad_multiple: padded lengths are rounded up to a multiple of this.
        direction: ``"en-de"`` or ``"en"`` where all rows share it, else None.
    """

    texts: tuple[Ragged, ...]
    lengths: tuple[NDArray[np.int64], ...]
    languages: tuple[NDArray[np.int64], NDArray[np.int64]]
    keys: Keys
    tokenizer: Tokenizer
    pad_multiple: int = 1
    direction: str | None = None

    def width(self, lengths: NDArray[np.int64]) -> int:
        """Padded length of a side whose longest of `lengths` tokens has its two specials."""
        return int(padded_length(lengths, self.pad_multiple).max(initial=SPECIALS))


def padded_length(length: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Positions of a sentence of `length` tokens with its specials, rounded up to `multiple`."""
    return -(-(length + SPECIALS) // multiple) * multiple


def framed(text: Ragged, first: NDArray[np.int64] | int, eos: int, pad: int, width: int) -> tuple[Tensor, Tensor]:
    """``first text eos pad...`` and its mask; `first` is one id or one per row."""
    rows, longest = len(text), int(text.lengths.max(initial=0)) + SPECIALS
    out = np.full((rows, max(longest, width)), pad, dtype=np.int64)
    columns = np.arange(out.shape[1])
    end = text.lengths[:, None] + 1
    if rows:
        out[(columns >= 1) & (columns < end)] = text.tokens
        out[:, 0] = first
        out[np.arange(rows), text.lengths + 1] = eos
    return torch.from_numpy(out), torch.from_numpy(columns <= end)


def _tags(tokenizer: Tokenizer, languages: NDArray[np.int64]) -> NDArray[np.int64]:
    return tokenizer.first_tag_id + languages


def pair_batch(
    task: str,
    source: Ragged,
    target: Ragged,
    *,
    source_language: NDArray[np.int64],
    target_language: NDArray[np.int64],
    tokenizer: Tokenizer,
    width: Width | None = None,
    direction: str | None = None,
) -> Batch:
    """``<2xx> source eos``, with the tag of the target's language, and ``bos target eos``."""
    width = width or Width()
    ids, mask = framed(source, _tags(tokenizer, target_language), tokenizer.eos_id, tokenizer.pad_id, width.source)
    to, to_mask = framed(target, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, width.target)
    return Batch(
        task=task,
        source=ids,
        source_mask=mask,
        target=to,
        target_mask=to_mask,
        labels=None,
        source_language=torch.from_numpy(source_language),
        target_language=torch.from_numpy(target_language),
        direction=direction,
    )


def labelled_batch(
    task: str,
    text: Ragged,
    labels: Ragged,
    *,
    language: NDArray[np.int64],
    tokenizer: Tokenizer,
    width: Width | None = None,
    direction: str | None = None,
) -> Batch:
    """``<2xx> text eos`` with a label for each of its tokens (-100 where nothing is predicted)."""
    width = width or Width()
    ids, mask = framed(text, _tags(tokenizer, language), tokenizer.eos_id, tokenizer.pad_id, width.source)
    wanted, _ = framed(labels, IGNORE, IGNORE, IGNORE, width.source)
    return Batch(
        task=task,
        source=ids,
        source_mask=mask,
        target=None,
        target_mask=None,
        labels=wanted,
        source_language=torch.from_numpy(language),
        target_language=torch.from_numpy(language.copy()),
        direction=direction,
    )
