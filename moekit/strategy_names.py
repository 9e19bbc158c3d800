"""The names of `moekit.ExpertParallelStrategy` in Lightning's own table, known whichever is imported first.

So ``Trainer(strategy="expert_parallel")`` and command lines find it, and ``import moekit`` does not import Lightning.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

NAMES: Mapping[str, Mapping[str, Any]] = {
    "expert_parallel": {},
    **{f"expert_parallel_zero{stage}": {"zero_stage": stage} for stage in range(4)},
    **{
        f"expert_parallel_zero{stage}_offload": {"zero_stage": stage, "offload": offload}
        for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "parameters"))
    },
}
"""Arguments of the strategy by name."""

_TABLE = "lightning.pytorch.strategies"
"""Has the table, `StrategyRegistry`."""


def register_strategy_names() -> None:
    """Enter the names into Lightning's table: now if it is there, else as soon as it is."""
    if "lightning" in sys.modules:
        enter(importlib.import_module(_TABLE).StrategyRegistry)
    elif not any(isinstance(finder, _AfterTheTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTheTable())


def enter(table: Any, strategy: Any = None) -> None:
    """Enter the names into a table, for a class of strategies; None = `moekit.ExpertParallelStrategy`."""
    for name, options in NAMES.items():
        if name not in table:
            table.register(name, strategy or _make, description=f"ExpertParallelStrategy({dict(options)})", **options)


def _make(**options: Any) -> Any:
    return importlib.import_module("moekit.training.strategy").ExpertParallelStrategy(**options)


class _AfterTheTable(MetaPathFinder):
    """Finds what is found anyway, and has the names entered when the table's module has been run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        loader: Any = None if found is None else found.loader
        if loader is not None:
            run = loader.exec_module

            def run_and_enter(module: Any) -> None:
                run(module)
                enter(module.StrategyRegistry)

            loader.exec_module = run_and_enter
        return found
