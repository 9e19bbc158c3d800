"""Text of one language in a dataset of Hugging Face's ``datasets``, on disk or streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moekit.data.sources.documents import Unit, check_unit
from moekit.data.sources.files import entries, split_called
from moekit.data.sources.names import LanguageNames
from moekit.data.sources.streamed import Streamed, units
from moekit.errors import UserError
from moekit.source import SPLITS, Split, digest, register_source

_ROWS = 256
_SAVED = ("state.json", "dataset_dict.json")


@register_source
class Datasets(Streamed):
    """The rows of a dataset, each a document, read some at a time each time they are needed.

    Args:
        path: a folder that ``save_to_disk`` wrote; a folder of parquet, JSON, CSV or text files, in which ``datasets``
            finds the splits by their names; or, in Python, a ``Dataset``, an ``IterableDataset``, or a mapping from
            split to one. A streamed dataset must give the same rows whenever it is walked through, which is checked.
        unit: see `Documents`.
        text_field: the column that holds text.
        valid_share: this share is held out for validation where the dataset has no such split; see `Streamed`.
        test_share: likewise for testing.
        languages: the language, alone.

    Raises:
        UserError: ``datasets`` is not installed; bad input, with the number of the row.
    """

    name = "datasets"

    def __init__(
        self,
        path: Any,
        *,
        unit: Unit = "line",
        text_field: str = "text",
        valid_share: float = 0.01,
        test_share: float = 0.01,
        languages: Sequence[str] | Mapping[str, str] | None = None,
    ) -> None:
        check_unit(self.name, unit)
        self.check_shares(valid_share, test_share)
        codes = LanguageNames(languages).codes
        if len(codes) != 1:
            got = ", ".join(codes) or "none"
            raise UserError(f"datasets: one language must be named, as --data.languages en: got {got}.")
        splits = _splits(path)
        walked = {split: _Walk(rows, split, text_field) for split, rows in splits.items()}
        for walk in walked.values():
            walk.check(unit)
        digests = [f"{split}:{walk.digest}" for split, walk in walked.items()]
        self._hold(
            {(codes[0], split): partial(walked[split].sentences, unit) for split in SPLITS if split in walked},
            valid_share=valid_share,
            test_share=test_share,
            fingerprint=digest("datasets", codes[0], unit, text_field, valid_share, test_share, *digests),
        )


class _Walk:
    """The texts of one split, which are the same each time."""

    def __init__(self, rows: Any, split: Split, text_field: str) -> None:
        self._rows, self._split, self._field = rows, split, text_field
        self.digest = ""

    def check(self, unit: str) -> None:
        """Read all rows once."""
        empty = True
        for text in self._texts():
            empty = empty and not text.strip()
        if empty:
            raise UserError(f"datasets: the split {self._split} must hold text: all of its rows are empty.")

    def sentences(self, unit: str) -> Iterator[str]:
        for text in self._texts():
            yield from units(text.split("\n"), unit)

    def _texts(self) -> Iterator[str]:
        state, number = hashlib.sha256(), 0
        for batch in self._rows.iter(_ROWS):
            if self._field not in batch:
                raise UserError(
                    f"datasets: rows must have text in the column {self._field!r}: got the columns {', '.join(batch)}. "
                    "data.text_field names another."
                )
            for text in batch[self._field]:
                number += 1
                state.update(_bytes(text, f"datasets: row {number} of {self._split}"))
                yield text
        found = f"{number}:{state.hexdigest()}"
        if self.digest not in ("", found):
            raise UserError(
                f"datasets: the rows of {self._split} must be the same each time they are read: they differ. Without "
                "shuffling they are, or save the dataset with save_to_disk and give that folder."
            )
        self.digest = found


def _bytes(text: object, where: str) -> bytes:
    if not isinstance(text, str):
        raise UserError(f"{where} must be text: got {type(text).__name__}. Leave such rows out.")
    if "\0" in text:
        raise UserError(f"{where} must be without NUL characters: got one. Remove it.")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} must be whole characters: got half a surrogate pair. Mend it.") from None
    return len(data).to_bytes(8, "little") + data


def _splits(path: Any) -> dict[Split, Any]:
    found = _open(Path(path)) if isinstance(path, str | Path) else path
    if not isinstance(found, Mapping):
        found = {"train": found}
    splits: dict[Split, Any] = {}
    for name, rows in found.items():
        split = split_called(str(name))
        if split is None or not hasattr(rows, "iter"):
            raise UserError(
                f"datasets: splits must be called train, validation or test and be datasets: got {name!r}, "
                f"{type(rows).__name__}."
            )
        splits[split] = rows
    if not splits:
        raise UserError("datasets: the dataset must have a split: got none.")
    return splits


def _open(folder: Path) -> Any:
    try:
        import datasets  # an extra
    except ImportError:
        raise UserError("datasets: the package datasets is required: install moekit[datasets].") from None
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing there"
        raise UserError(f"datasets: the path must be a folder: got {what}: {folder}.")
    try:
        if any(entry.name in _SAVED for entry in entries(folder)):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder), streaming=True)  # read where it lies, instead of copied to a cache
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"datasets: {folder} must hold a dataset: {str(error).splitlines()[0]}") from error
