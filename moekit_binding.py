"""What Lightning loads into every Trainer of an environment in which moekit is installed.

It stands beside the package and imports nothing of it: a Trainer that trains something else must not pay for moekit,
nor fail with it. Only where moekit has been imported, and the model holds a component of it, the work begins, and is
done by `moekit.training.callbacks.binding.ComponentBinding`.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

# What ComponentBinding acts on, in both of Lightning's packages.
_HOOKS = (
    "setup", "on_fit_start", "on_validation_start", "on_test_start", "on_predict_start", "on_train_start",
    "on_train_batch_start", "on_train_batch_end", "on_exception", "teardown",
)  # fmt: skip


# Class by package; made when it is asked for, under a name of this module, so that processes can be spawned with it.
_BASES = {"LightningBinding": "lightning.pytorch.callbacks", "PytorchLightningBinding": "pytorch_lightning.callbacks"}


def lightning_callbacks() -> list[Any]:
    """Entry point of the package ``lightning``."""
    return _callbacks("LightningBinding")


def pytorch_lightning_callbacks() -> list[Any]:
    """Entry point of the package ``pytorch_lightning``."""
    return _callbacks("PytorchLightningBinding")


def __getattr__(name: str) -> Any:
    if name not in _BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = import_module(_BASES[name]).Callback
    body = {"binding": None, "__module__": __name__, "__doc__": "Hands on to `ComponentBinding` where it is needed."}
    globals()[name] = type(name, (base,), body | {hook: _passed_on(hook) for hook in _HOOKS})
    return globals()[name]


def _callbacks(name: str) -> list[Any]:
    try:
        return [getattr(sys.modules[__name__], name)()]
    except Exception as error:  # an unknown Lightning: other people's runs go on, ours are told
        warnings.warn(f"moekit cannot bind to {_BASES[name]}: {error!r}. Its routers will not move.", stacklevel=2)
        return []


def _passed_on(name: str) -> Any:
    def hook(self: Any, trainer: Any, pl_module: Any, *arguments: Any, **named: Any) -> None:
        if self.binding is None and _needs_binding(trainer, pl_module):
            self.binding = import_module("moekit.training.callbacks.binding").ComponentBinding()
        if self.binding is not None:
            getattr(self.binding, name)(trainer, pl_module, *arguments, **named)

    hook.__name__ = name
    return hook


def _needs_binding(trainer: Any, model: Any) -> bool:
    """Whether the model holds something of moekit's, and nobody brought the real callback along."""
    component = getattr(sys.modules.get("moekit.component"), "Component", None)
    if component is None or not any(isinstance(module, component) for module in model.modules()):
        return False
    real = getattr(sys.modules.get("moekit.training.callbacks.binding"), "ComponentBinding", ())
    return not any(isinstance(callback, real) for callback in trainer.callbacks)
