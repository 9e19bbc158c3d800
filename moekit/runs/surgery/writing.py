"""The result of an operation as a run folder, whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch

from moekit.atomic import flush, replacing, require_text, write_error, write_json
from moekit.errors import UserError
from moekit.lock import held
from moekit.parallel.checkpoint import Checkpointer
from moekit.runs.plain import as_plain
from moekit.runs.run import SURGERY_FILE, Run
from moekit.runs.surgery.operations import Result
from moekit.runs.surgery.optimizer import optimizer_names
from moekit.surgery import state_by_number
from moekit.training.callbacks.config import CONFIG_KEY
from moekit.training.callbacks.weights import AVERAGING


def write_run(result: Result, out: str | Path, *, restart: bool = False, overwrite: bool = False) -> Run:
    """Write a run folder that `test`, `generate` and ``fit --resume`` take.

    Its checkpoint is of the kind that the configuration's strategy resumes from: a file, or a folder of shards.
    Everything is written to a hidden folder beside `out`, which takes its name when it is whole.

    Args:
        result: what an operation made.
        out: the folder.
        restart: begin at step 0, with a new schedule and a new order of data; else the run that the result is from goes
            on at its step.
        overwrite: replace the run that is there.

    Raises:
        UserError: a run or other files are there, or they cannot be written.
    """
    place = Path(out)
    require_free(place, overwrite=overwrite)
    source = result.run
    settings = {"recipe": source.recipe.name, "variant": source.variant, **as_plain(result.config)}
    settings |= {"smoke": True} if result.smoke else {}
    checkpoint = _checkpoint(result, settings, restart=restart)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        run = Run.create(temporary, settings)
        write_json(temporary / SURGERY_FILE, result.record)
        run.keep(source.kept_tokenizer, source.held_out)
        last = run.checkpoints / "last.ckpt"
        if result.config.strategy.strategy() == "auto":
            with replacing(last) as file:
                torch.save(checkpoint, file)
        else:
            _save_sharded(result, checkpoint, last)
        if (place / "config.yaml").is_file():
            with held(place):
                Run(place).clear()
                for item in sorted(temporary.iterdir()):
                    os.replace(item, place / item.name)
            temporary.rmdir()
            flush(place)
        else:
            os.replace(temporary, place)
        flush(place.absolute().parent)
    except OSError as error:
        raise write_error(place, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Run(place)


def require_free(place: Path, *, overwrite: bool) -> None:
    """Raise UserError if `place` cannot become a run folder: before anything is computed."""
    require_text(place, "the run folder")
    if place.exists() and not place.is_dir():
        raise UserError(f"the run folder {place} must be a folder: it is a file. Choose another --out.")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not (place / "config.yaml").is_file():
        raise UserError(f"the folder {place} must be empty or hold a run: it has other files. Choose another --out.")
    if not overwrite:
        raise UserError(f"the folder {place} holds a run. Replace it (--overwrite), or choose another --out.")


def _checkpoint(result: Result, settings: dict[str, Any], *, restart: bool) -> dict[str, Any]:
    """As Lightning writes it."""
    rest = dict(result.run.loaded.rest)
    model = result.run.model(result.config)
    train = result.config.train
    optimizer = train.make_optimizer(model)
    schedule = train.make_schedule(optimizer, train.budget())
    former = (result.run.loaded.optimizer or {}).get("param_groups", [])
    if restart or "loops" not in rest:
        rest = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
        rest["lr_schedulers"] = [schedule.state_dict()]
        former = []
    else:
        # The best value of another model is none to be compared with, and its other weights are none to go on with.
        kept = {k: v for k, v in rest.get("callbacks", {}).items() if not k.startswith(("BestCheckpoint", "Patience"))}
        rest = {k: v for k, v in rest.items() if k not in AVERAGING} | {"callbacks": kept}
    # On the meta device, where this optimizer is, nothing is fused; where the run goes on, it is.
    groups = [{**group, "fused": True} for group in optimizer.state_dict()["param_groups"]]
    names = optimizer_names(result.run, result.config)
    state = state_by_number(result.slots or {}, names, groups, former)
    weights = {name: tensor.clone() for name, tensor in result.weights.items()}
    return {
        **rest,
        "state_dict": weights,
        "optimizer_states": [state],
        CONFIG_KEY: {**settings, "vocab_size": result.run.vocab_size},
    }


def _save_sharded(result: Result, checkpoint: dict[str, Any], path: Path) -> None:
    """As `ExpertParallelStrategy` writes it, from one process; it is read in any layout."""
    model = result.run.model(result.config, device="cpu")
    model.load_state_dict(checkpoint["state_dict"])
    optimizer = result.config.train.make_optimizer(model)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    Checkpointer().save(path, model, [optimizer], extra={"checkpoint": rest, "model_key": "state_dict"})
