"""What a strategy does with checkpoints: folders written by all ranks, for any layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.parallel.checkpoint import Checkpointer, is_checkpoint, remove_checkpoint
from moekit.parallel.checkpoint.optimizer_state import OtherOptimizersError, shard_optimizer_state
from moekit.parallel.checkpoint.state import clean, require_same_model
from moekit.parallel.master_weights import model_parameter, swapped_in
from moekit.parallel.shards import shard_like
from moekit.training.checkpoint_io import load_checkpoint, local_path
from moekit.training.plain_data import plain_checkpoint, plain_state, unplain

PathLike = str | os.PathLike[str]


class ShardedCheckpointStrategy(ModelParallelStrategy):
    """Saves and loads with `moekit.parallel.Checkpointer`; the base of `ExpertParallelStrategy`.

    What `on_save_checkpoint` and `on_load_checkpoint` change in a checkpoint is what is saved and loaded, and
    ``strict_loading`` holds, as in any Lightning strategy. A checkpoint of plain Lightning, a file, is loaded as well.

    Args:
        asynchronous_save: whether training goes on while a checkpoint's files are written.
        **kwargs: for `ModelParallelStrategy`.
    """

    def __init__(self, asynchronous_save: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        patience = self._timeout or default_pg_timeout
        self._checkpointer = Checkpointer(asynchronous=asynchronous_save, timeout=patience.total_seconds())
        self._layer_sync: Any = None  # the Trainer puts it where it finds the attribute
        self._loaded_from = ""
        self._other_optimizers: tuple[list[Any], UserError] | None = None

    # -- before training --------------------------------------------------------------------------------------------

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Lightning's own, which is not used."""
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        raise TypeError(
            f"{type(self).__name__} writes checkpoints itself, as folders that every layout reads: got the plugin "
            f"{type(io).__name__}. Leave it out; asynchronous_save=True writes while training goes on."
        )

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse what would end training, or be ignored, at the first checkpoint; forget another model's optimizers.

        Raises:
            UserError: for a place of checkpoints that is no path, and for ``sync_batchnorm``.
            TypeError: for a callback's or scheduler's state that is no plain data.
        """
        module = self.lightning_module
        assert module is not None
        norms = [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [n for n in norms if not isinstance(module.get_submodule(n), nn.SyncBatchNorm)]
        if self._layer_sync is not None and norms and self.world_size > 1:
            raise UserError(
                f"sync_batchnorm=True is not supported by {type(self).__name__}, which would leave {norms[0]} to "
                "normalise each rank's batch by itself. Use a norm of one row (LayerNorm, RMSNorm), or call "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm on your model, on GPUs, and leave the argument out."
            )
        if trainer.state.fn != TrainerFn.FITTING:
            mine = set(map(id, module.parameters()))
            if not all(id(p) in mine for o in self.optimizers for p in _parameters(o)):
                self._reset_optimizers_and_schedulers()
            return
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "dirpath", None):
                local_path(callback.dirpath)  # type: ignore[attr-defined]
        if trainer.checkpoint_callbacks:
            _check_states(trainer)

    # -- saving -----------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The divided weights, for callbacks and hooks to look at and to change; nothing is gathered."""
        assert self.model is not None
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: `save_checkpoint` collects it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any = None) -> None:
        """Save to the folder `filepath`; all ranks write.

        What hooks have made of ``checkpoint["state_dict"]`` is saved. Of optimizers they may leave none.
        Hyperparameters that are no plain data are kept as text.

        Raises:
            TypeError: if `storage_options` are given, or a hook has put something in that is no plain data, changed an
                optimizer's state, or removed the state dict.
            UserError: if `filepath` is a URL, or cannot be written.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes checkpoints itself and takes no storage_options.")
        assert self.model is not None
        path = local_path(self.broadcast(str(filepath)))
        state = checkpoint.get("state_dict")
        if not isinstance(state, Mapping):
            raise TypeError(
                'on_save_checkpoint must leave a state dict in checkpoint["state_dict"]; its entries may be changed, '
                f"added and removed: got {type(state).__name__}."
            )
        states = checkpoint.get("optimizer_states", [])
        if states and states != [{} for _ in self.optimizers]:
            raise TypeError(
                f'on_save_checkpoint must leave checkpoint["optimizer_states"] as it is, or empty it: '
                f"{type(self).__name__} collects the states itself, and what was put there would be lost."
            )
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        extra = {"checkpoint": plain_checkpoint(rest), "model_key": "state_dict"}
        self._checkpointer.save(path, self.model, self.optimizers if states else [], extra=extra, state=state)

    def remove_checkpoint(self, filepath: PathLike) -> None:
        """Delete a checkpoint; rank 0 does."""
        if self.is_global_zero:
            self._checkpointer.wait()
            path = Path(local_path(filepath))
            if path.is_file():  # of plain Lightning, by which this run was begun
                path.unlink()
            remove_checkpoint(path)

    # -- loading ----------------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: Lightning hands back what `load_checkpoint` has returned, and hooks may have changed."""
        return True

    def load_checkpoint(self, checkpoint_path: PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, each rank its part of the tensors; nothing is filled, and nothing in it is executed.

        Where the module has an `on_load_checkpoint`, tensors that it has not in this shape are read too, whole, so that
        the hook can rename and resize them.

        Raises:
            UserError: if it is no checkpoint of this strategy or of Lightning, or is broken.
        """
        assert self.lightning_module is not None
        path = self._loaded_from = local_path(self.broadcast(str(checkpoint_path)))
        self._other_optimizers = None
        self._checkpointer.wait()
        if not is_checkpoint(path):
            return self._load_file(path)
        optimizers = self.optimizers if self._fitting else []
        others = _changes_what_it_loads(self.lightning_module)
        try:
            content = self._checkpointer.read(path, self.lightning_module, optimizers, others=others)
            states = content.optimizers
        except OtherOptimizersError as error:  # which is raised unless a hook drops them
            content, states = self._checkpointer.read(path, self.lightning_module, others=others), []
            self._other_optimizers = (states, error)
        if not isinstance(content.extra, Mapping) or not {"checkpoint", "model_key"} <= set(content.extra):
            raise UserError(
                f"{path} must be a checkpoint of a Trainer to go on from: it is one of moekit.parallel.Checkpointer "
                "alone, whose load fills a model."
            )
        found: dict[str, Any] = {**content.extra["checkpoint"], content.extra["model_key"]: content.state}
        return found | ({"optimizer_states": states} if "lr_schedulers" in found else {})

    def _load_file(self, path: str) -> dict[str, Any]:
        if Path(path).is_dir():
            raise UserError(
                f"{path} must be a checkpoint of ExpertParallelStrategy or of Lightning: it is a folder of something "
                "else. For weights of another kind use moekit.parallel.import_safetensors in configure_model, or "
                "load_state_dict before fit."
            )
        checkpoint = load_checkpoint(path, mmap=True)
        if not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
            raise UserError(
                f"{path} must be a checkpoint of ExpertParallelStrategy or of Lightning: it has no state_dict and "
                "version of Lightning. Load a plain state dict with load_state_dict before fit."
            )
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fill the model with ``checkpoint["state_dict"]``, whole or divided, as `load_state_dict` does.

        Raises:
            UserError: if it is of another model, or the optimizers' states are; the model is as it was then.
        """
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        names = {clean(name): name for name in own}
        state = {names.get(clean(name), name): value for name, value in checkpoint["state_dict"].items()}
        state = {name: shard_like(value, own.get(name)) for name, value in state.items()}
        if self._fitting:
            self._check_optimizers(checkpoint)
        refused = None
        try:
            require_same_model(own, state, self._loaded_from, strict=strict)
        except UserError as error:
            refused = error
        # Hooks of the modules may yet make it fit.
        former = {} if refused is None else {name: _copy(value) for name, value in own.items()}
        try:
            module.load_state_dict(state, strict=strict)
        except RuntimeError:
            if refused is None:
                raise
            module.load_state_dict(former)
            raise refused from None

    def _check_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        where = f"the checkpoint {self._loaded_from}"
        states = checkpoint.get("optimizer_states")
        if states is None:
            raise UserError(
                f"{where} must have the state of {len(self.optimizers)} optimizers to go on from: it has weights only. "
                "Load them into the model before fit (moekit.parallel.Checkpointer().load(path, model) for a folder)."
            )
        if self._other_optimizers is not None and states is self._other_optimizers[0]:
            raise self._other_optimizers[1]
        if states and len(states) != len(self.optimizers):
            raise UserError(
                f"{where} must have the state of {len(self.optimizers)} optimizers: it has that of {len(states)}."
            )
        for number, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=False)):
            here = [len(group["params"]) for group in optimizer.param_groups]
            there = [len(group["params"]) for group in state["param_groups"]]
            if here != there:
                raise UserError(
                    f"{where} groups the parameters of optimizer {number} otherwise: groups of {there} there, {here} "
                    "here. Configure the optimizer as it was."
                )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Fill the optimizers, each with its part; those of an emptied list stay as they are, as in Lightning."""
        with swapped_in(*self.optimizers):
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
                optimizer.load_state_dict(shard_optimizer_state(optimizer, state))

    @property
    def _fitting(self) -> bool:
        module = self.lightning_module
        assert module is not None
        return module.trainer.state.fn == TrainerFn.FITTING

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Make the optimizers and schedulers, whose state checkpoints must be able to hold.

        Raises:
            TypeError: if it is no plain data.
        """
        super().setup_optimizers(trainer)
        if trainer.checkpoint_callbacks:
            for number, config in enumerate(trainer.lr_scheduler_configs):
                plain_state(config.scheduler.state_dict(), "lr_schedulers", number)

    def on_exception(self, exception: BaseException) -> None:
        """Forget a checkpoint that was refused: the Trainer would load it into the next model that it is given."""
        if self.lightning_module is not None:
            self.lightning_module.trainer._checkpoint_connector._loaded_checkpoint = {}
        super().on_exception(exception)

    def teardown(self) -> None:
        """Wait for a checkpoint that is still being written."""
        self._checkpointer.wait()
        super().teardown()


def _changes_what_it_loads(module: L.LightningModule) -> bool:
    """Whether a module may rename, resize or drop tensors when it is loaded: by Lightning's hook, or by torch's."""
    if is_overridden("on_load_checkpoint", module) or type(module).load_state_dict is not nn.Module.load_state_dict:
        return True
    for part in module.modules():
        hooks = part._load_state_dict_pre_hooks.values()
        if any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp") for hook in hooks):
            return True
        if type(part)._load_from_state_dict is not nn.Module._load_from_state_dict:
            return True
    return False


def _check_states(trainer: L.Trainer) -> None:
    """Say which hyperparameters will be kept as text, and refuse states of callbacks and data that cannot be kept."""
    text: dict[str, str] = {}
    for part in (trainer.lightning_module, trainer.datamodule):  # type: ignore[attr-defined]
        text |= unplain(getattr(part, "hparams", None) or {})
    if text:
        named = ", ".join(f"{name} ({kind})" for name, kind in text.items())
        rank_zero_warn(f"hyperparameters that are no plain data are kept as text in checkpoints: {named}.")
    states: dict[tuple[str, ...], Any] = {("callbacks", c.state_key): c.state_dict for c in trainer.callbacks}  # type: ignore[attr-defined]
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        data = trainer.datamodule  # type: ignore[attr-defined]
        states[(type(data).__qualname__,)] = data.state_dict
    for path, state in states.items():
        try:
            found = state()
        except Exception:  # some have a state only when training has begun
            continue
        plain_state(found, *path)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from map(model_parameter, group["params"])


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
