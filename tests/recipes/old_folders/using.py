"""What the public commands make of run folders, as plain values: to record them, and to compare."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

LANGUAGES = {"zcode_m3": ["--from", "avl", "--to", "tnd"], "switch": ["--from", "avl"], "moe_lm": ["--from", "avl"]}
"""Recipes whose runs are kept, and the languages that their models write in."""
WRITE = ("zcode_m3", "moe_lm")
"""Those that `generate` can be used with."""
EXPORTED = ("switch",)
"""Those that are kept as a folder of transformers too."""
SHARDED = "sharded"
"""A checkpoint of `ExpertParallelStrategy`, the same in one file, and its weights alone."""
STEPS = 300
MORE = ["--train.validate_every", "0", "--train.log_every", "1"]


def command(module: str, *arguments: str) -> str:
    """What ``python -m MODULE ARGUMENTS`` prints, run in this process.

    Raises:
        RuntimeError: its exit code is not 0.
    """
    said, complaints = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [module, *arguments]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    if code:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {code}:\n{complaints.getvalue()}")
    return said.getvalue()


def recipe(name: str, *arguments: str) -> str:
    return command(f"moekit.recipes.{name}", *arguments)


def generated(name: str, folder: Path) -> list[str]:
    """What a run writes for the sources of its samples, and with experts mapped from disk."""
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    texts = [sample["source"] for sample in samples if sample.get("direction", "avl").startswith("avl")]
    source = folder.parent / f"{name}.txt"
    source.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    arguments = ["generate", "--out", str(folder), *LANGUAGES[name], "--input", str(source)]
    whole = recipe(name, *arguments).splitlines()
    mapped = recipe(name, *arguments, "--experts_in_memory", "1").splitlines()
    assert whole == mapped, "generate --experts_in_memory"
    return whole


def inspected(path: Path) -> Any:
    """What `surgery inspect` says."""
    return json.loads(command("moekit.surgery", "inspect", str(path), "--json"))


def weights(folder: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    """Those of a run's checkpoint, read without moekit."""
    found: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / checkpoint, weights_only=True)["state_dict"]
    return found


def fine_tuned(name: str, folder: Path, out: Path) -> Path:
    """A run of two steps that starts from another."""
    steps = ["--train.max_steps", "2", "--train.warmup_steps", "1"]
    recipe(name, "finetune", "--init_from", str(folder), "--out", str(out), *steps, *MORE)
    return out


def resumed(name: str, folder: Path) -> Path:
    """The run, three steps further."""
    further = ["--config", f"{folder}/config.yaml", "--out", str(folder), "--resume"]
    recipe(name, "run", *further, "--train.max_steps", str(STEPS + 3))
    return folder
