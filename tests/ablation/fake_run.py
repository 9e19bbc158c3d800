"""A run that takes no time: writes what a run writes, by its settings, and can be stopped and gone on with.

    python fake_run.py FOLDER SETTINGS

SETTINGS is JSON: `loss`, `cv`, `work`, `tokens`, and what happens: `steps` (0.02 seconds each, a checkpoint upon
SIGTERM), `text` (the fingerprint of the user's text, if it has one), `end` (done, diverged, killed: one of several
processes was, broken, refused).
"""

import json
import signal
import sys
import time
from pathlib import Path

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
checkpoint = folder / "checkpoint"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
with (folder / "began").open("a") as file:
    file.write(f"{step}\n")


def stop(number: int, frame: object) -> None:
    checkpoint.write_text(str(step))
    sys.exit(143)


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, signal.SIG_IGN)
while step < settings["steps"]:
    time.sleep(0.02)
    step += 1
    rows = "".join(f"{each},0\n" for each in range(step + 1))
    (folder / "metrics.csv").write_text(f"step,epoch\n{rows}")
if settings["end"] != "done":
    said = {
        "diverged": (1, "stopped: the loss of step 7 is not finite (NaN or infinite)."),
        "killed": (1, "stopped: rank 1 (process 7) has ended with code -9, and the others with it."),
        "broken": (1, "ZeroDivisionError: division by zero"),
        "refused": (2, "error: model.heads must divide model.dim: got 3 and 16."),
    }
    code, words = said[settings["end"]]
    if words.startswith("stopped:"):
        stopped = {"step": 7, "why": words, "not_finite": settings["end"] == "diverged"}
        (folder / "stopped.json").write_text(json.dumps(stopped))
    print(words, file=sys.stderr)
    sys.exit(code)
if "text" in settings:
    (folder / "environment.json").write_text(json.dumps({"commit": None, "python": "3", "text": settings["text"]}))
summary = {
    "tokens": settings["tokens"],
    "parameters": {"total": 100, "active": 50},
    "speed": {"flops_per_token": settings["work"] / settings["tokens"]},
    "loss": {"causal_lm": settings["loss"] - 0.01},
    "test": {"causal_lm": {"loss": settings["loss"]}},
    "routing": {"load_cv": settings["cv"], "layers": {"decoder.1": {"load_cv": settings["cv"]}}},
}
(folder / "summary.json").write_text(json.dumps(summary))
