"""Names of a package that are imported when they are first used, as PEP 562 allows it.

A help text, or the refusal of a mistyped command, needs neither torch nor Lightning, which take seconds to import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package: names of its modules, and the modules themselves, on demand.

    The package lists the same imports under ``if TYPE_CHECKING``, for who reads types.

    Args:
        package: its name, ``__name__``.
        modules: the module below the package that each name is of.
    """

    def find(name: str) -> Any:
        if name in modules:
            value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next time it is simply there
        return value

    return find
