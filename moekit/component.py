"""`Component`: the thin base of everything a user composes.

A component is an ordinary `nn.Module` until a Trainer runs the LightningModule it sits in. From then on it can read
`self.trainer` and `self.global_step`, and `self.log("entropy", value)` reaches the loggers of the outermost
LightningModule under the component's own dotted path, for example ``decoder.layers.1.feed_forward.router/entropy``.

Lightning hands its Trainer only to *direct* LightningModule children, so a component inside an `nn.ModuleList` would
get nothing. `bind` walks the whole tree instead; `moekit.training.callbacks.binding` calls it for every Trainer.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.connectors.logger_connector.fx_validator import _FxValidator
from torch import nn

# What wrappers insert into a module's dotted path; a log must bear the same name with and without them.
_WRAPPER_NAMES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def _can_log(root: L.LightningModule) -> bool:
    """Whether Lightning takes a log now, and it would not be a repetition.

    Activation checkpointing runs forward a second time inside autograd's backward, and a value must not be counted
    twice. Outside the hooks that may log (``predict_step``, ``configure_optimizers``, ...) Lightning would raise.
    """
    return (
        root._trainer is not None
        and root._trainer._results is not None
        and _FxValidator.functions.get(root._current_fx_name) is not None  # type: ignore[arg-type]
        and torch._C._current_graph_task_id() == -1
    )


class LoadedFromFile(L.LightningModule):
    """A LightningModule that says what to do where `load_from_checkpoint` is given a folder."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's.

        Raises:
            ValueError: `checkpoint_path` is a folder.
        """
        if isinstance(checkpoint_path, str | os.PathLike) and os.path.isdir(checkpoint_path):
            raise ValueError(
                f"load_from_checkpoint needs a file: {os.fspath(checkpoint_path)} is a folder. Of a run's folder give "
                "checkpoints/best.ckpt, or open it with moekit.runs.Run.load; of a sharded checkpoint make a file with "
                "moekit.training.whole_checkpoint.consolidate_checkpoint(folder, file)."
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


class Component(LoadedFromFile):
    """Base class of routers, experts, MoE layers, transformers and heads.

    Adds nothing to `LightningModule` but the way home: `log` from any depth. Without a Trainer, in a hook
    that may not log, and in the second forward of activation checkpointing, `log` does nothing.

    Attributes:
        frozen: a frozen component is not told of steps and of routings, so that nothing in it moves. Its parameters are
            another matter (`requires_grad`).
        path: dotted path from the outermost LightningModule, empty for the outermost itself or before binding.
    """

    frozen: bool = False
    path: str = ""
    _root: weakref.ReferenceType[L.LightningModule] | None = None  # the outermost LightningModule, once bound
    _steps_told: int = 0

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far; 0 where there is no Trainer."""
        return 0 if self._trainer is None and self._fabric is None else int(super().global_step)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log `value` through the outermost LightningModule as ``<path>/<name>``; arguments as in Lightning."""
        root = self if self._root is None else self._root()
        if root is not None and _can_log(root):
            if root is self:
                super().log(name, value, *args, **kwargs)
            else:
                root.log(f"{self.path}/{name}", value, *args, **kwargs)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Log each item of `dictionary` as `log` does."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    @property
    def steps_done(self) -> int:
        """Optimizer steps that `moekit.step_end` told of so far; a component whose state knows better says so."""
        return self._steps_told

    def on_step_end(self, step: int) -> None:
        """Called once after every optimizer step with the number of steps taken: the place where schedules move.

        Never called twice for a step, whatever gradient accumulation or activation checkpointing do. Lightning's
        Trainers call it by themselves, loops of your own with `moekit.step_end`.
        """

    def __getstate__(self) -> dict[str, Any]:
        # Weak references can be neither pickled nor moved to a copy, and a copy has another root anyway. Nobody has
        # asked to listen to a copy's routers.
        return {name: value for name, value in super().__getstate__().items() if name not in ("_root", "path", "_ear")}


def components(root: nn.Module) -> dict[str, Component]:
    """Every `Component` in `root` by dotted path, `root` itself excluded, shared ones once."""
    return {name: module for name, module in root.named_modules() if name and isinstance(module, Component)}


def bind(root: L.LightningModule) -> None:
    """Tell every component under `root`, at any depth, its Trainer, its root and its path."""
    if isinstance(root, Component):
        root._root, root.path = None, ""
    for path, component in components(root).items():
        component._root, component._trainer = weakref.ref(root), root._trainer
        component.path = ".".join(part for part in path.split(".") if part not in _WRAPPER_NAMES)


def unbind(root: L.LightningModule) -> None:
    """Undo `bind`: the components are plain modules again."""
    for component in components(root).values():
        component._root, component.path, component._trainer = None, "", None
