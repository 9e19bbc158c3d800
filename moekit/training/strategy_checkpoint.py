"""What a strategy does with checkpoints: folders written by all ranks, for any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.parallel.checkpoint import Checkpointer, is_checkpoint, remove_checkpoint
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.checkpoint.optimizer_state import OtherOptimizersError, shard_optimizer_state
from moekit.parallel.checkpoint.state import clean, require_same_model
from moekit.parallel.master_weights import swapped_in
from moekit.parallel.shards import shard_like
from moekit.training.checkpoint_io import load_checkpoint, local_path
from moekit.training.plain_data import plain_checkpoint, plain_state, unplain


class StrategyCheckpoints:
    """Saves and loads Lightning's checkpoints of a sharded model with `moekit.parallel.Checkpointer`.

    What `on_save_checkpoint` and `on_load_checkpoint` change in a checkpoint is what is saved and loaded, and
    ``strict_loading`` holds, as in any Lightning strategy. A checkpoint of plain Lightning, a file, is loaded as well.

    Args:
        asynchronous: Whether training goes on while a checkpoint's files are written.
        timeout: Seconds after which a rank that waits for others in a save gives up.
    """

    def __init__(self, *, asynchronous: bool, timeout: float) -> None:
        self.checkpointer = Checkpointer(asynchronous=asynchronous, timeout=timeout)
        self._source = ""  # of what was read last, for messages
        self._other_optimizers: tuple[list[Any], UserError] | None = None

    def save(
        self, checkpoint: Mapping[str, Any], path: PathLike, model: nn.Module, optimizers: Sequence[Optimizer]
    ) -> None:
        """Save to the folder `path`; all ranks write.

        Hooks may leave none of the optimizers. Hyperparameters that are no plain data are kept as text.

        Raises:
            TypeError: If a hook has added something that is no plain data, changed an optimizer's state, or removed
                the state dict.
            UserError: If `path` is a URL, or cannot be written.
        """
        state = checkpoint.get("state_dict")
        if not isinstance(state, Mapping):
            raise TypeError(
                'on_save_checkpoint must leave a state dict in checkpoint["state_dict"]; its entries may be changed, '
                f"added and removed: got {type(state).__name__}."
            )
        states = checkpoint.get("optimizer_states", [])
        if states and states != [{} for _ in optimizers]:
            raise TypeError(
                'on_save_checkpoint must leave checkpoint["optimizer_states"] as it is, or empty it: '
                "ExpertParallelStrategy collects the states itself, and what was put there would be lost."
            )
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        extra = {"checkpoint": plain_checkpoint(rest), "model_key": "state_dict"}
        self.checkpointer.save(local_path(path), model, optimizers if states else [], extra=extra, state=state)

    def remove(self, path: PathLike) -> None:
        """Delete a checkpoint; for one rank.

        Raises:
            UserError: If it cannot be deleted.
        """
        self.checkpointer.wait()
        place = Path(local_path(path))
        if place.is_file():  # of plain Lightning, by which this run was begun
            place.unlink()
        remove_checkpoint(place)

    def read(self, path: PathLike, module: L.LightningModule, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """Read a checkpoint, each rank its part of the tensors; nothing is filled, and nothing in it is executed.

        Where the module has an `on_load_checkpoint`, tensors that it has not in this shape are read too, whole, so that
        the hook can rename and resize them. Outside of fit there are no `optimizers` to go on with.

        Raises:
            UserError: If it is no checkpoint of the strategy or of Lightning, or is broken.
        """
        self._source, self._other_optimizers = local_path(path), None
        self.checkpointer.wait()
        if not is_checkpoint(self._source):
            return _read_file(self._source)
        others = _changes_what_it_loads(module)
        try:
            content = self.checkpointer.read(self._source, module, optimizers, others=others)
            states = content.optimizers
        except OtherOptimizersError as error:  # which is raised unless a hook drops them
            content, states = self.checkpointer.read(self._source, module, others=others), []
            self._other_optimizers = (states, error)
        if not isinstance(content.extra, Mapping) or not {"checkpoint", "model_key"} <= set(content.extra):
            raise UserError(
                f"{self._source} must be a checkpoint of a Trainer to go on from: it is one of "
                "moekit.parallel.Checkpointer alone, whose load fills a model."
            )
        found: dict[str, Any] = {**content.extra["checkpoint"], content.extra["model_key"]: content.state}
        return found | ({"optimizer_states": states} if "lr_schedulers" in found else {})

    def load_model(self, checkpoint: Mapping[str, Any], module: L.LightningModule, *, strict: bool) -> None:
        """Fill the model with ``checkpoint["state_dict"]``, whole or sharded, as `load_state_dict` does.

        Raises:
            UserError: If it is of another model; the model is as it was then.
        """
        own = module.state_dict()
        names = {clean(name): name for name in own}
        state = {names.get(clean(name), name): value for name, value in checkpoint["state_dict"].items()}
        state = {name: shard_like(value, own.get(name)) for name, value in state.items()}
        refused = None
        try:
            require_same_model(own, state, self._source, strict=strict)
        except UserError as error:
            refused = error
        # Hooks of the modules may yet make it fit.
        former = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in own.items()} if refused else {}
        try:
            module.load_state_dict(state, strict=strict)
        except RuntimeError:
            if refused is None:
                raise
            module.load_state_dict(former)
            raise refused from None

    def check_optimizers(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Check that a checkpoint holds the state of these optimizers, before anything is filled.

        Raises:
            UserError: If it holds none, or that of others.
        """
        where = f"the checkpoint {self._source}"
        states = checkpoint.get("optimizer_states")
        if states is None:
            raise UserError(
                f"{where} must have the state of {len(optimizers)} optimizers to go on from: it has weights only. "
                "Load them into the model before fit (moekit.parallel.Checkpointer().load(path, model) for a folder)."
            )
        if self._other_optimizers is not None and states is self._other_optimizers[0]:
            raise self._other_optimizers[1]
        if states and len(states) != len(optimizers):
            raise UserError(
                f"{where} must have the state of {len(optimizers)} optimizers: it has that of {len(states)}."
            )
        for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=False)):
            here = [len(group["params"]) for group in optimizer.param_groups]
            there = [len(group["params"]) for group in state["param_groups"]]
            if here != there:
                raise UserError(
                    f"{where} groups the parameters of optimizer {number} otherwise: groups of {there} there, {here} "
                    "here. Configure the optimizer as it was."
                )

    @staticmethod
    def load_optimizers(checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Fill the optimizers, each with its part; those of an emptied list stay as they are, as in Lightning."""
        with swapped_in(*optimizers):
            for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=False):
                optimizer.load_state_dict(shard_optimizer_state(optimizer, state))


def _read_file(path: str) -> dict[str, Any]:
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


def check_checkpoints(trainer: L.Trainer) -> None:
    """Before training, refuse what would end it at the first checkpoint; warn of hyperparameters kept as text.

    Raises:
        UserError: If a checkpoint callback saves to a URL.
        TypeError: If the state of a callback or of the data is no plain data.
    """
    if not trainer.checkpoint_callbacks:
        return
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "dirpath", None):
            local_path(callback.dirpath)  # type: ignore[attr-defined]
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
