"""Writes with the runs of a folder in several ways, into files of it, with so many processes.

python generate_program.py FOLDER DEVICES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moekit.inference.sampling import Sampling
from moekit.layer import MoELayer
from moekit.runs import spread
from moekit.runs.generate import generate
from moekit.runs.run import Run
from moekit.training.processes import is_first_process

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"evaluate": {"beam_size": 1}},
    "beam": {"evaluate": {"beam_size": 3, "batch_tokens": 24}, "n_best": 2},
    "sampling": {"evaluate": {"batch_tokens": 8}, "sampling": Sampling(1.3, top_p=0.9, seed=5)},
}
RUNS = {"moe_lm": None, "zcode_m3": "tnd"}


def write(folder: Path, devices: int) -> None:
    for name, target in RUNS.items():
        run = Run.open(folder / name)
        for way, options in WAYS.items():
            given = dict(options)
            changed = {"train": {"devices": devices, "accelerator": "cpu"}, "evaluate": given.pop("evaluate", {})}
            out = folder / f"{name}-{way}-{devices}"
            generate(
                run, "avl", target, config=run.config.changed(**changed), input=str(folder / "prompts"),
                output=str(out), **given,
            )  # fmt: skip


if __name__ == "__main__":
    place, held = Path(sys.argv[1]), []
    start = spread._Together.__init__

    def noted(self: Any, backbone: Any) -> None:
        start(self, backbone)
        banks = [module.experts for module in backbone.modules() if isinstance(module, MoELayer)]
        held.extend(next(iter(bank.parameters())).to_local().shape[0] for bank in banks)

    spread._Together.__init__ = noted  # type: ignore[method-assign]
    write(place, int(sys.argv[2]))
    if is_first_process():
        (place / "held").write_text(json.dumps(held))
