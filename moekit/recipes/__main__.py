"""``python -m moekit.recipes``: which recipes there are, and how one is started."""

from __future__ import annotations

import sys

from moekit.runs.known import recipe_about, recipe_names
from moekit.shell import command_line, program, recipe_command
from moekit.terminal import visible


def main() -> int:
    """Print the name of every recipe and what it is about; return the exit code: 2 where more was asked."""
    names = recipe_names()
    given = sys.argv[1:]
    if given and given[0] not in ("-h", "--help"):
        words = recipe_command(given[0] if given[0] in names else "NAME", given[1:])
        print(f"error: a recipe is started by its name: {visible(words)}", file=sys.stderr)
        return 2
    print(f"usage: {program()} COMMAND NAME [--variant NAME] [--config FILE] [--key value ...]\n\nrecipes:")
    for name in names:
        print(f"  {name:<19} {recipe_about(name)}")
    print(f"\n{command_line('run', 'NAME', '--help')} lists commands, variants and settings.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
