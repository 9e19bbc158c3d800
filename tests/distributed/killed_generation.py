"""The command line of moe_lm, whose second process is killed in the middle of its first text."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from moekit.cli.recipes import main
from moekit.recipes import moe_lm
from moekit.runs import spread

if __name__ == "__main__":
    logits, asked = spread._Together.logits, []

    def killed(self: Any, hidden: Any) -> Any:
        asked.append(hidden)
        if len(asked) > 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return logits(self, hidden)

    spread._Together.logits = killed  # type: ignore[method-assign]
    sys.exit(main(moe_lm.RECIPE, sys.argv[1:]))
