"""The configuration of a run in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

CONFIG_KEY = "moekit_config"
"""Where a checkpoint keeps the resolved configuration of its run."""


class ConfigInCheckpoints(Callback):
    """Keeps the resolved configuration in every checkpoint, so that it says what model it is of.

    Args:
        config: plain data.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.config
