"""Runs: recipes and their settings, and what is done with them: trained, tested, used, started from, changed."""

from typing import TYPE_CHECKING

from moekit.lazy import lazy_names

if TYPE_CHECKING:
    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import ModelParts, Recipe, RunText, Variant
    from moekit.runs.run import Run

__all__ = ["ModelParts", "Recipe", "Run", "RunConfig", "RunText", "Variant"]

if not TYPE_CHECKING:  # where every name would be one
    __getattr__ = lazy_names(
        __name__,
        {
            "RunConfig": "config",
            "Run": "run",
            **dict.fromkeys(("ModelParts", "Recipe", "RunText", "Variant"), "recipe"),
        },
    )
