"""Which recipes there are and what each is about, without importing one: a list needs no networks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from typing import Any

from moekit.errors import UserError, nearest

_RECIPES = "moekit.recipes"


def recipe_names() -> list[str]:
    """The recipes of the package; a module whose name begins with an underscore is none."""
    # By name, as a run's configuration has it: recipes import this room and are not imported by it.
    package = importlib.import_module(_RECIPES)
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def require_known(name: Any, where: str) -> None:
    """Make sure that there is a recipe with that name.

    Raises:
        UserError: there is none; `where` begins the message.
    """
    known = recipe_names()
    if name not in known:
        raise UserError(f"{where}: recipe must be a known one: got {name!r}. {nearest(str(name), known)}")


def recipe_about(name: str) -> str:
    """`Recipe.about` of a recipe, as its source has it; of one that does not say it as plain text it is imported."""
    module = f"{_RECIPES}.{name}"
    spec = importlib.util.find_spec(module)
    source = getattr(None if spec is None else spec.loader, "get_source", lambda _: None)(module)
    for statement in ast.parse(source or "").body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "RECIPE":
            for keyword in statement.value.keywords if isinstance(statement.value, ast.Call) else ():
                if keyword.arg == "about" and isinstance(keyword.value, ast.Constant):
                    return str(keyword.value.value)
    return str(importlib.import_module(module).RECIPE.about)
