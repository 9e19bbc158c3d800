"""``python -m moekit.recipes``: which recipes there are, and how one is started."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import moekit.recipes


def main() -> int:
    """Print the name of every recipe and what it is about; return the exit code: 2 where more was asked."""
    names = sorted(info.name for info in pkgutil.iter_modules(moekit.recipes.__path__) if not info.name.startswith("_"))
    given = sys.argv[1:]
    if given and given[0] not in ("-h", "--help"):
        words = " ".join(given) if given[0] in names else "NAME"
        print(f"error: a recipe is a module of its own: python -m moekit.recipes.{words}", file=sys.stderr)
        return 2
    print(
        "usage: python -m moekit.recipes.NAME [command] [--variant NAME] [--config FILE] [--key value ...]\n\nrecipes:"
    )
    for name in names:
        print(f"  {name:<19} {importlib.import_module(f'moekit.recipes.{name}').RECIPE.about}")
    print("\npython -m moekit.recipes.NAME --help lists commands, variants and settings.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
