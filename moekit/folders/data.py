"""The text of fine-tuning as a data module: read, encoded, held out in part, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L

from moekit.data.batching import Loader
from moekit.data.module import batches_so_far, on_cuda
from moekit.errors import UserError
from moekit.folder_text.chat import writes_date
from moekit.folder_text.encoding import Encoded, EncodedExamples, Encoder
from moekit.folder_text.examples import Example, divided, fingerprint, read_examples
from moekit.folders.batches import Dealing, FolderBatch, HeldOutBatches, Row, TrainingBatches
from moekit.folders.packing import pack
from moekit.folders.settings import FolderConfig
from moekit.huggingface.folder import weights_digest
from moekit.source import digest
from moekit.wording import counted

_DATED = (
    " The chat template writes the date, which is {} here: give --data.date if training began on another day, and its "
    "settings do not say so."
)


@dataclass(frozen=True)
class Split:
    """Rows of training or of held-out text, and what was made of the examples."""

    examples: EncodedExamples
    rows: list[Row]


class FolderData(L.LightningDataModule):
    """Batches of a file of examples.

    Args:
        config: the settings.
        encoder: makes tokens of examples.

    Raises:
        UserError: the text is at fault, or there is not enough of it.
    """

    def __init__(self, config: FolderConfig, encoder: Encoder) -> None:
        super().__init__()
        text = config.data
        self.config, self.encoder = config, encoder
        training, held_out = _divided(config)
        self.train, self.valid = (self._split(examples) for examples in (training, held_out))
        read = [part.tobytes() for split in (self.train, self.valid) for one in split.examples.examples
                for part in (one.ids, one.labels)]  # fmt: skip
        self.digest = digest(fingerprint(training), fingerprint(held_out), *read)[:16]
        for split, option in ((self.train, "data.path"), (self.valid, "data.valid_path or data.held_out")):
            if not split.rows:
                raise UserError(
                    f"the text of {option} must have something to learn within data.max_length tokens: got "
                    f"{text.max_length}, and of {counted(split.examples.empty, 'example')} nothing is left. Raise it."
                )
        self.pad = encoder.pad

    def _split(self, examples: Sequence[Example]) -> Split:
        encoded = self.encoder.encode(examples)
        if not self.config.data.pack:
            return Split(encoded, [[example] for example in encoded.examples])
        rows = pack([len(example) for example in encoded.examples], self.config.data.max_length)
        return Split(encoded, [[encoded.examples[number] for number in row] for row in rows])

    def train_dataloader(self) -> Loader[FolderBatch]:
        """Batches from the Trainer's current one on."""
        batches = TrainingBatches(self.train.rows, self._dealing(), pad=self.pad, seed=self.config.data.seed)
        length = batches.steps_per_pass * self.config.train.accumulate
        return Loader(batches, length, lambda: batches_so_far(self.trainer), pin_memory=on_cuda(self.trainer))

    def val_dataloader(self) -> Loader[FolderBatch] | list[Any]:
        """Held-out batches; in training none unless it is to be validated."""
        if self.trainer is not None and self.trainer.state.fn == "fit" and not self.config.train.validate_every:
            return []
        batches = HeldOutBatches(self.valid.rows, self._dealing(), pad=self.pad)
        return Loader(batches, len(batches), pin_memory=on_cuda(self.trainer))

    def state_dict(self) -> dict[str, Any]:
        """What the order of training depends on."""
        return {"text": self.digest, "examples": len(self.train.examples.examples), "model": self._model}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with another model or other text.

        Raises:
            UserError: model, text or its tokens differ from the checkpoint's.
        """
        if state_dict.get("model", self._model) != self._model:
            raise UserError(
                f"a resumed run must have the model that it began with: {self.config.model} has other weights. Give "
                "that one, or start a new run."
            )
        if state_dict.get("text") != self.digest:
            raise UserError(
                f"a resumed run must have the text of its checkpoint: {self.config.data.path}, the held-out text, or "
                "what the tokenizer makes of them has changed. Restore it, or start a new run."
                + (_DATED.format(self.config.data.date) if writes_date(self.encoder.tokenizer) else "")
            )

    @cached_property
    def _model(self) -> str:
        return weights_digest(Path(self.config.model))

    def _dealing(self) -> Dealing:
        # The strategy knows which processes read the same rows: with tensor parallelism some do.
        sharing = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        ranks, rank = (sharing["num_replicas"], sharing["rank"]) if sharing else (1, 0)
        rows = self.config.rows_of_a_rank(ranks)
        return Dealing(rows, rank, ranks, self.config.train.accumulate)


def _divided(config: FolderConfig) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples."""
    text = config.data
    found = read_examples(text.path, text.source)
    if text.valid_path is not None:
        return found, read_examples(text.valid_path, text.source, "--data.valid_path")
    if len(found) < 2:
        raise UserError(
            f"{text.path} must hold at least two examples, of which one is held out: got {len(found)}. Give "
            "data.valid_path, or more examples."
        )
    return divided(found, text.held_out, text.seed)


def num_tokens(examples: Sequence[Encoded]) -> int:
    """Tokens of all examples."""
    return sum(map(len, examples))
