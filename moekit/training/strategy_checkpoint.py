"""What a strategy does with checkpoints: folders written by all ranks, for any layout."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.parallel.checkpoint import Checkpointer, is_checkpoint, remove_checkpoint

PathLike = str | os.PathLike[str]


class ShardedCheckpointStrategy(ModelParallelStrategy):
    """Saves and loads with `moekit.parallel.Checkpointer`; the base of `ExpertParallelStrategy`.

    Args:
        asynchronous_save: whether training goes on while a checkpoint's files are written.
        **kwargs: for `ModelParallelStrategy`.
    """

    def __init__(self, asynchronous_save: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        patience = self._timeout or default_pg_timeout
        self._checkpointer = Checkpointer(asynchronous=asynchronous_save, timeout=patience.total_seconds())
        self._model_state: dict[str, Any] | None = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The divided weights, for callbacks to look at; nothing is gathered."""
        assert self.model is not None
        self._model_state = self.model.state_dict()
        return self._model_state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: `save_checkpoint` collects it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any = None) -> None:
        """Save to the folder `filepath`; all ranks write.

        Raises:
            TypeError: if `storage_options` are given, or a hook has removed entries from the state dict.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes checkpoints itself and takes no storage_options.")
        assert self.model is not None
        # A callback may have put other weights (an average) in place of the model's and moved these elsewhere.
        place = next((key for key, value in checkpoint.items() if value is self._model_state), None)
        if place is None or set(checkpoint[place]) != set(self.model.state_dict()):
            raise TypeError(
                "on_save_checkpoint must leave the model's state dict whole, under any key: all of it is saved. Keep "
                "what should not be saved out of the module."
            )
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []
        extra = {key: value for key, value in checkpoint.items() if key not in (place, "optimizer_states")}
        self._model_state = None
        path = self.broadcast(str(filepath))
        self._checkpointer.save(path, self.model, optimizers, extra={"checkpoint": extra, "model_key": place})

    def load_checkpoint(self, checkpoint_path: PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and optimizers, each rank its part; return the rest. Nothing in the checkpoint is executed.

        Raises:
            UserError: if it is no checkpoint of this strategy, or of another model.
        """
        assert self.model is not None
        path = self.broadcast(str(checkpoint_path))
        if not is_checkpoint(path):
            raise UserError(
                f"{path} must be a folder that ExpertParallelStrategy wrote. For weights of another kind use "
                "moekit.parallel.import_safetensors in configure_model, or load_state_dict before fit."
            )
        extra = self._checkpointer.load(path, self.model, self.optimizers)
        found: dict[str, Any] = extra["checkpoint"]
        return {**found, extra["model_key"]: self.model.state_dict()}

    def remove_checkpoint(self, filepath: PathLike) -> None:
        """Delete a checkpoint; rank 0 does."""
        if self.is_global_zero:
            self._checkpointer.wait()
            remove_checkpoint(filepath)

    def teardown(self) -> None:
        """Wait for a checkpoint that is still being written."""
        self._checkpointer.wait()
        super().teardown()
