"""What is written when training has ended: an adapter for PEFT, a folder of transformers, or both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from moekit.errors import UserError
from moekit.folders.data import FolderData, num_tokens
from moekit.folders.module import FolderModule
from moekit.folders.settings import FolderConfig, TuneConfig
from moekit.folders.tuned import TunedFolder
from moekit.huggingface import consolidate_folder, consolidate_model, write_adapters, write_card
from moekit.wording import counted


def exports(tuned: TunedFolder, tune: TuneConfig, *, merge: bool) -> dict[str, Path]:
    """The folders to write: "adapter" where adapters alone train, "model" where weights change or are merged.

    Raises:
        UserError: there are no adapters to merge.
    """
    alone = tune.subset.replace(" ", "") == "adapters"
    if merge and not tune.rank:
        raise UserError(
            "--merge is of adapters: give --fine_tune.rank, or leave it out, as weights are written anyway."
        )
    found = {"adapter": tuned.adapter} if alone else {}
    return found if alone and not merge else {**found, "model": tuned.model}


class AdaptersAtEnd(Callback):
    """Writes the adapters for PEFT while all processes have their parts.

    Args:
        folder: gets them.
        base: the folder of the model.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder, self.base = folder, os.path.abspath(base)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        assert isinstance(pl_module, FolderModule)
        write_adapters(pl_module.model, self.folder, base=self.base)


def write_model(
    wanted: Mapping[str, Path], module: FolderModule, like: str, tuned: TunedFolder, *, divided: bool
) -> None:
    """Write the folder of transformers, if one is wanted, in one process; adapters are merged there.

    Args:
        wanted: what `exports` gives.
        module: trained.
        like: the folder that training began with.
        tuned: which has the last checkpoint.
        divided: whether no process holds the whole model, so that it is read from the checkpoint.

    Raises:
        UserError: it cannot be written.
    """
    target = wanted.get("model")
    if target is None:
        return
    if target.exists():
        shutil.rmtree(target)  # of the same training, before it was resumed
    with _without_bar():
        if divided:
            consolidate_folder(tuned.last, like, target)
        else:
            consolidate_model(module.model, like, target)


def write_cards(wanted: Mapping[str, Path], config: FolderConfig, data: FolderData, tuned: TunedFolder) -> None:
    """Write what is known of the training into the card of each folder, in one process.

    Args:
        wanted: what `exports` gives.
        config: the settings.
        data: the text.
        tuned: whose results are told.

    Raises:
        UserError: a card cannot be written.
    """
    found, train = tuned.results, config.train
    examples, valid = data.train.examples.examples, data.valid.examples.examples
    metrics = {
        "held-out loss before training, nats for a learned token": found["before"],
        "held-out loss, nats for a learned token": found["after"],
    }
    settings = {"optimizer steps": found["steps"], "learning rate": train.learning_rate, "seed": train.seed}
    tune = config.fine_tune
    what = f"adapters of rank {tune.rank} on {', '.join(tune.targets)}" if tune.rank else tune.subset
    for kind, folder in wanted.items():
        write_card(
            folder,
            base=config.model,
            relation="adapter" if kind == "adapter" else "finetune",
            changes=[f"Fine-tuned with moekit from {Path(config.model).absolute().name}: {what}."],
            data=[
                f"{counted(len(examples), 'example')} of {num_tokens(examples):,} tokens; {len(valid):,} more "
                f"{'was' if len(valid) == 1 else 'were'} held out."
            ],
            metrics=metrics,
            settings=settings,
        )


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without transformers' bar, which is one more line in a log for each file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
