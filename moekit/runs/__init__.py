"""Runs: recipes and their settings, and what is done with them: trained, tested, used, started from, changed."""

from moekit.runs.config import RunConfig
from moekit.runs.recipe import ModelParts, Recipe, Text, Variant
from moekit.runs.run import Run

__all__ = ["ModelParts", "Recipe", "Run", "RunConfig", "Text", "Variant"]
