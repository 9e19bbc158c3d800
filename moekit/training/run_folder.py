"""The folder of a run: what is in it, who may write into it, and whether a checkpoint fits its configuration."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback

import moekit
from moekit.atomic import replacing, write_error, write_json, write_text
from moekit.data.cache import CorruptCacheError
from moekit.data.held_out import HeldOut
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.training.checkpoint_state import load_rest

CONFIG_KEY = "moekit_config"
"""Where a checkpoint keeps the resolved configuration of its run."""

SURGERY_FILE = "surgery.json"
"""What was done to other runs to make this one, where it was made so."""

_TOKENIZER = "tokenizer"
_HELD_OUT = "held_out.json.gz"

_FILES = (
    "config.yaml",
    _HELD_OUT,
    SURGERY_FILE,
    "environment.json",
    "metrics.csv",
    "summary.json",
    "routing.json",
    "samples.json",
    "report.html",
)
_FOLDERS = ("checkpoints", "tensorboard", _TOKENIZER)


@dataclass(frozen=True)
class RunFolder:
    """One folder with everything a run leaves: configuration, environment, metrics, checkpoints, summary, report.

    It is complete in itself: the tokenizer is in it, and the sentences that the run is evaluated on. So it can be
    tested, translated with and started from on another machine, without its corpus and without a cache.

    Make one with `create` (a new run, or one to go on with) or `open` (one to look at).
    """

    path: Path

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        may_differ: Sequence[str] = (),
    ) -> RunFolder:
        """Make the folder, or take up an existing one, and write ``config.yaml`` and ``environment.json``.

        Args:
            path: the folder.
            config: the resolved configuration, plain data.
            resume: go on with the run that is there, if any; its configuration must be the same.
            overwrite: remove the run that is there (its own files only), and start afresh.
            may_differ: dotted keys that a resumed run may change, for example ``"train.max_minutes"``.

        Raises:
            UserError: a run or foreign files are there and neither option was given, the configuration of the run to
                resume is another (every differing key is listed), or the folder cannot be written.
        """
        folder = cls(Path(path))
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other: give one of them.")
        if folder.path.exists() and not folder.path.is_dir():
            raise UserError(f"the run folder {folder.path} must be a folder: it is a file. Choose another --out.")
        content = set(os.listdir(folder.path)) if folder.path.is_dir() else set()
        if "config.yaml" in content:
            if overwrite:
                folder.clear()
            elif resume:
                folder.require_same(config, may_differ)
            else:
                state = "a finished" if folder.finished else "an unfinished"
                raise UserError(
                    f"the folder {folder.path} must be empty: it holds {state} run. Go on with it (--resume), replace "
                    "it (--overwrite), or choose another --out."
                )
        elif content:
            raise UserError(
                f"the folder {folder.path} must be empty or hold a run: it has {sorted(content)[0]!r} and no "
                "config.yaml. Choose another --out."
            )
        folder.write_text("config.yaml", yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        folder.write_json("environment.json", environment())
        try:
            folder.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(folder.checkpoints, error) from error
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            UserError: there is none.
        """
        folder = cls(Path(path))
        if not (folder.path / "config.yaml").is_file():
            raise UserError(f"{folder.path} holds no run: there is no config.yaml. Give the folder of a run.")
        return folder

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, None before the first."""
        path = self.checkpoints / "last.ckpt"
        return path if path.exists() else None  # a file, or the folder of a sharded one

    @property
    def best_checkpoint(self) -> Path | None:
        """The best checkpoint, else the last, None before the first."""
        path = self.checkpoints / "best.ckpt"
        return path if path.exists() else self.last_checkpoint

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: its summary is there."""
        return (self.path / "summary.json").is_file()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the run was trained with; None where a former version did not keep it.

        Raises:
            UserError: it is not as it was written.
        """
        place = self.path / _TOKENIZER
        if not place.is_dir():
            return None
        try:
            return Tokenizer.load(place)
        except CorruptCacheError as error:
            raise UserError(
                f"{error} The weights of the run mean nothing without it: take the folder from a copy of the run."
            ) from error

    @property
    def held_out(self) -> HeldOut | None:
        """The sentences that the run is evaluated on; None where a former version did not keep them.

        Raises:
            UserError: they are not as they were written.
        """
        path = self.path / _HELD_OUT
        return HeldOut.read(path) if path.exists() else None

    def keep(self, tokenizer: Tokenizer | None, held_out: HeldOut | None) -> None:
        """Write the tokenizer and the sentences for evaluation; of None nothing is written.

        Raises:
            UserError: they cannot be written.
        """
        if tokenizer is not None and not self._has(tokenizer):
            place = self.path / _TOKENIZER
            temporary = place.with_name(f".{_TOKENIZER}.{os.getpid()}.tmp")
            try:
                tokenizer.save(temporary)
                shutil.rmtree(place, ignore_errors=True)
                os.replace(temporary, place)
            except OSError as error:
                raise write_error(place, error) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        if held_out is not None:
            with replacing(self.path / _HELD_OUT) as file:
                held_out.write(file)

    def _has(self, tokenizer: Tokenizer) -> bool:
        with contextlib.suppress(UserError):
            found = self.tokenizer
            return found is not None and found.fingerprint == tokenizer.fingerprint
        return False

    def config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            UserError: it cannot be read.
        """
        path = self.path / "config.yaml"
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path} must be readable YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(data, dict):
            raise UserError(f"{path} must hold a mapping: got {type(data).__name__}.")
        return data

    def require_same(self, config: Mapping[str, Any], may_differ: Sequence[str] = ()) -> None:
        """Make sure that this is the configuration of the run, before it goes on.

        Raises:
            UserError: it is another: every differing key is listed.
        """
        _require_same(self.config(), config, may_differ, f"the run in {self.path}")

    def write_json(self, name: str, data: Any) -> None:
        """Write plain data, all or nothing."""
        write_json(self.path / name, data)

    def write_text(self, name: str, text: str) -> None:
        """Write text, all or nothing."""
        write_text(self.path / name, text)

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)


class RunConfig(Callback):
    """Keeps the resolved configuration in every checkpoint, so that `check_checkpoint` can compare."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = plain(config)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the configuration in."""
        checkpoint[CONFIG_KEY] = self.config


def check_checkpoint(path: str | Path, config: Mapping[str, Any], *, may_differ: Sequence[str] = ()) -> None:
    """Make sure that the checkpoint is of a run with this configuration, before a model is loaded from it.

    Raises:
        UserError: it cannot be read, or its configuration is another: every differing key is listed.
    """
    saved = load_rest(path).get(CONFIG_KEY)
    if saved is None:
        raise UserError(f"The checkpoint {path} must hold the configuration of its run: it has none.")
    _require_same(saved, config, may_differ, f"the checkpoint {path}")


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; a missing one is None."""
    flat_saved, flat_current = _flatten(plain(saved)), _flatten(plain(current))
    keys = [*flat_saved, *(key for key in flat_current if key not in flat_saved)]
    pairs = {key: (flat_saved.get(key), flat_current.get(key)) for key in keys}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _require_same(saved: Mapping[str, Any], current: Mapping[str, Any], may_differ: Sequence[str], what: str) -> None:
    different = {
        key: values
        for key, values in differences(saved, current).items()
        if not any(key == free or key.startswith(free + ".") for free in may_differ)
    }
    if different:
        lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
        raise UserError(
            f"the configuration must be that of {what} to resume it. These keys differ:{lines}\n"
            "Give the same values, or start a new run in another folder."
        )


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain(data: Any) -> Any:
    """Mappings, sequences and paths as dictionaries, lists and strings; numbers and strings as they are.

    Raises:
        TypeError: anything else.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    raise TypeError(f"A configuration must be plain data: got {type(data).__name__} ({data!r}).")


def environment() -> dict[str, Any]:
    """What the run ran on: versions, machine, threads, commit, command; neither user nor host name."""
    home = os.path.expanduser("~")
    command = ["python", *sys.orig_argv[1:]]
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": [part.replace(home, "~") if len(home) > 1 else part for part in command],
        "moekit": moekit.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {
            name: _version(name) for name in ("torch", "lightning", "torchmetrics", "sacrebleu", "sentencepiece")
        },
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "accelerator": accelerator,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """The commit of moekit's own checkout and whether files were changed since; None where it is installed."""
    package = Path(moekit.__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return result.stdout.strip()

    try:
        # In somebody else's repository (a virtual environment inside one) moekit's files are not tracked.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"id": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
