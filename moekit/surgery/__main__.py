"""``python -m moekit.surgery``: look into trained models and change them, from checkpoint to checkpoint."""

import sys

from moekit.cli.program import surgery as main

if __name__ == "__main__":
    sys.exit(main())
