"""The result of an operation as a run folder, whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch

from moekit.atomic import replacing, write_error
from moekit.errors import UserError
from moekit.parallel.checkpoint import Checkpointer
from moekit.recipes._command import as_plain
from moekit.recipes._parts import make_optimizer, make_schedule, make_strategy
from moekit.recipes._surgery.operations import Result
from moekit.recipes._surgery.subject import optimizer_names
from moekit.surgery import by_number
from moekit.training.budget import Budget
from moekit.training.run_folder import CONFIG_KEY, SURGERY_FILE, RunFolder


def write_run(result: Result, out: str | Path, *, restart: bool = False, overwrite: bool = False) -> RunFolder:
    """Write a run folder that `test`, `generate` and ``fit --resume`` take.

    Its checkpoint is of the kind that the configuration's strategy resumes from: a file, or a folder of shards.
    Everything is written to a hidden folder beside `out`, which takes its name when it is whole.

    Args:
        result: of an operation.
        out: the folder.
        restart: begin at step 0, with a new schedule and a new order of data; else the run that the result is from goes
            on at its step.
        overwrite: replace the run that is there.

    Raises:
        UserError: a run or other files are there, or they cannot be written.
    """
    place = Path(out)
    require_free(place, overwrite=overwrite)
    settings = {"recipe": result.subject.recipe.name, "variant": result.subject.variant, **as_plain(result.config)}
    checkpoint = _checkpoint(result, settings, restart=restart)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        folder = RunFolder.create(temporary, settings)
        folder.write_json(SURGERY_FILE, result.record)
        if result.subject.folder is not None:
            folder.keep(result.subject.folder.tokenizer, result.subject.folder.held_out)
        last = folder.checkpoints / "last.ckpt"
        if make_strategy(result.config.strategy) == "auto":
            with replacing(last) as file:
                torch.save(checkpoint, file)
        else:
            _save_sharded(result, checkpoint, last)
        if overwrite and (place / "config.yaml").is_file():
            RunFolder(place).clear()
        if place.is_dir() and any(place.iterdir()):
            for item in sorted(temporary.iterdir()):
                os.replace(item, place / item.name)
            temporary.rmdir()
        else:
            os.replace(temporary, place)
    except OSError as error:
        raise write_error(place, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return RunFolder(place)


def require_free(place: Path, *, overwrite: bool) -> None:
    """Raise UserError if `place` cannot become a run folder: before anything is computed."""
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
    rest = dict(result.subject.loaded.rest)
    model = result.subject.model(result.config)
    train = result.config.train
    optimizer = make_optimizer(train, model)
    budget = Budget(max_steps=train.max_steps or None, max_minutes=train.max_minutes or None)
    schedule = make_schedule(train, optimizer, budget)
    former = (result.subject.loaded.optimizer or {}).get("param_groups", [])
    if restart or "loops" not in rest:
        rest = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
        rest["lr_schedulers"] = [schedule.state_dict()]
        former = []
    else:
        # The best value of another model is none to be compared with.
        rest["callbacks"] = {k: v for k, v in rest.get("callbacks", {}).items() if not k.startswith("BestCheckpoint")}
    # On the meta device, where this optimizer is, nothing is fused; where the run goes on, it is.
    groups = [{**group, "fused": True} for group in optimizer.state_dict()["param_groups"]]
    names = optimizer_names(result.config, model)
    state = by_number(result.slots or {}, names, groups, former)
    weights = {name: tensor.clone() for name, tensor in result.weights.items()}
    return {**rest, "state_dict": weights, "optimizer_states": [state], CONFIG_KEY: settings}


def _save_sharded(result: Result, checkpoint: dict[str, Any], path: Path) -> None:
    """As `ExpertParallelStrategy` writes it, from one process; it is read in any layout."""
    model = result.subject.model(result.config, device="cpu")
    model.load_state_dict(checkpoint["state_dict"])
    optimizer = make_optimizer(result.config.train, model)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    Checkpointer().save(path, model, [optimizer], extra={"checkpoint": rest, "model_key": "state_dict"})
