"""``python -m moekit``: one program for recipes, trained models and reports."""

import sys

from moekit.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
