"""`Batch`: what a training or evaluation step of one task gets, and how sentences become one.

Sentences arrive as `Ragged` arrays (see `moekit.data.ragged`) without any special token; the functions here add the
language tag, bos and eos, pad, and build the masks. Which of them a batch needs is its task's affair (`moekit.tasks`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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

        return _pytree.tree_map_only(Tensor, move, self)

    def rows(self, numbers: Sequence[int]) -> Batch:
        """The batch of the rows of these numbers, padded as it is."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        chosen = torch.tensor(numbers, dtype=torch.int64, device=self.source.device)
        taken: dict[str, Any] = {name: part[chosen] for name, part in parts.items() if isinstance(part, Tensor)}
        return dataclasses.replace(self, **taken)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (asked for by `DataLoader(pin_memory=True)`)."""
        return _pytree.tree_map_only(Tensor, Tensor.pin_memory, self)


def _places(mask: Tensor) -> Tensor:
    return mask.reshape(-1).nonzero().squeeze(1)


_PLAIN = ("task", "direction", "one_text")
_LEAVES = tuple(f.name for f in dataclasses.fields(Batch) if f.name not in _PLAIN)


def _flatten(batch: Batch) -> tuple[list[Any], Any]:
    return [getattr(batch, name) for name in _LEAVES], tuple(getattr(batch, name) for name in _PLAIN)


def _unflatten(leaves: Any, context: Any) -> Batch:
    batch = object.__new__(Batch)  # of all its fields: places are not looked for again
    batch.__dict__.update(zip((*_LEAVES, *_PLAIN), (*leaves, *context), strict=True))
    return batch


_pytree.register_pytree_node(Batch, _flatten, _unflatten, serialized_type_name="moekit.Batch")


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
        cut: Bool[B] for each side, whether the sentence goes on behind what is here; empty = none does.
    """

    texts: tuple[Ragged, ...]
    lengths: tuple[NDArray[np.int64], ...]
    languages: tuple[NDArray[np.int64], NDArray[np.int64]]
    keys: Keys
    tokenizer: Tokenizer
    pad_multiple: int = 1
    direction: str | None = None
    cut: tuple[NDArray[np.bool_], ...] = ()

    def width(self, lengths: NDArray[np.int64]) -> int:
        """Padded length of a side whose longest of `lengths` tokens has its two specials."""
        return int(padded_length(lengths, self.pad_multiple).max(initial=SPECIALS))

    @property
    def tags(self) -> NDArray[np.int64]:
        """Int64[B], ids of the tags ``<2xx>`` of the targets' languages."""
        return self.tokenizer.first_tag_id + self.languages[1]

    def framed(
        self, text: Ragged, first: NDArray[np.int64] | int, width: int = 0, *, cut: NDArray[np.bool_] | bool = False
    ) -> tuple[Tensor, Tensor]:
        """``first text eos pad...`` and its mask, at least `width` positions wide; rows that are `cut` have no eos."""
        return framed(text, first, self.tokenizer.eos_id, self.tokenizer.pad_id, width, cut)

    def goes_on(self, side: int) -> NDArray[np.bool_] | bool:
        """Which sentences of a side go on behind what is here, so that nobody can learn from them where they end."""
        return self.cut[side] if self.cut else False

    def batch(
        self,
        task: str,
        source: tuple[Tensor, Tensor],
        target: tuple[Tensor, Tensor] | None = None,
        *,
        labels: Tensor | None = None,
        one_text: bool = False,
    ) -> Batch:
        """The batch of sides that are `framed`; see `Batch` for `labels` and `one_text`."""
        ids, mask = source
        target_ids, target_mask = target or (None, None)
        return Batch(
            task,
            ids,
            mask,
            target_ids,
            target_mask,
            labels,
            source_language=torch.from_numpy(self.languages[0]),
            target_language=torch.from_numpy(self.languages[1]),
            direction=self.direction,
            one_text=one_text,
        )


def padded_length(length: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Positions of a sentence of `length` tokens with its specials, rounded up to `multiple`."""
    return -(-(length + SPECIALS) // multiple) * multiple


def framed(
    text: Ragged,
    first: NDArray[np.int64] | int,
    eos: int,
    pad: int,
    width: int,
    cut: NDArray[np.bool_] | bool = False,
) -> tuple[Tensor, Tensor]:
    """``first text eos pad...`` and its mask; `first` and `cut` (no eos) are one for all rows or one per row."""
    rows, longest = len(text), int(text.lengths.max(initial=0)) + SPECIALS
    out = np.full((rows, max(longest, width)), pad, dtype=np.int64)
    columns = np.arange(out.shape[1])
    end = text.lengths[:, None] + 1
    if rows:
        out[(columns >= 1) & (columns < end)] = text.tokens
        out[:, 0] = first
        out[np.arange(rows), text.lengths + 1] = np.where(cut, pad, eos)
    return torch.from_numpy(out), torch.from_numpy(columns <= end - np.reshape(cut, (-1, 1)))


def pair_batch(
    task: str,
    rows: Sentences,
    source: Ragged,
    target: Ragged,
    width: tuple[int, int] = (0, 0),
    *,
    cut: NDArray[np.bool_] | bool = False,
) -> Batch:
    """``<2xx> source eos``, with the tag of the target's language, and ``bos target eos``; `width` is at least theirs.

    Targets that are `cut` have no eos, which would be learnt as their end.

    All ranks' shares of one global batch have the same shape if it is the padded length of the longest of them.
    """
    return rows.batch(
        task, rows.framed(source, rows.tags, width[0]), rows.framed(target, rows.tokenizer.bos_id, width[1], cut=cut)
    )


def labelled_batch(task: str, rows: Sentences, text: Ragged, labels: Ragged, width: int = 0) -> Batch:
    """``<2xx> text eos`` with a label for each of its tokens (-100 where nothing is predicted)."""
    wanted, _ = framed(labels, IGNORE, IGNORE, IGNORE, width)
    return rows.batch(task, rows.framed(text, rows.tags, width), labels=wanted)
