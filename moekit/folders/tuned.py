"""What fine-tuning of a folder leaves behind: a folder with settings, metrics, checkpoints, results and the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from moekit.atomic import clear_drafts, require_apart, require_text, write_error, write_json, write_text, writing
from moekit.data.lines import STANDARD
from moekit.environment import environment
from moekit.errors import UserError
from moekit.folders.settings import UNUSED, FolderConfig
from moekit.lock import LOCK_FILES
from moekit.runs.plain import plain, require_same
from moekit.runs.settings.fields import free_keys
from moekit.runs.yaml_file import read_mapping
from moekit.stored import parse_json
from moekit.training.callbacks.config import CONFIG_KEY
from moekit.training.checkpoint_state import load_rest
from moekit.training.monitoring.rules import WARNINGS

_CONFIG, _RESULTS, _ENVIRONMENT, _STOPPED = "config.yaml", "results.json", "environment.json", "stopped.json"
_FORMER_PAGE = "routing.html"  # which earlier versions wrote
_FREE = ("model", "data.path", "data.valid_path")
"""Paths may change where content, which is compared, does not."""


class TunedFolder:
    """A folder of fine-tuning.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.stopped = self.path / _STOPPED
        self.page = self.path / "report.html"
        self.warnings = self.path / WARNINGS
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return self.last.exists()

    def require_free(self, *, resume: bool, overwrite: bool) -> None:
        """Make sure that the folder can become, or go on as, one of fine-tuning.

        Raises:
            UserError: something is in the way.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other: give one of them.")
        require_text(self.path, "the folder of --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} must be a folder: it is a file. Choose another.")
        content = sorted({*os.listdir(self.path)} - {*LOCK_FILES}) if self.path.is_dir() else []
        if content and "model" not in self.settings:
            raise UserError(
                f"--out {self.path} must be empty or of a former fine-tuning of a folder: it holds {content[0]!r}. "
                "Choose another."
            )
        if content and not (resume or overwrite):
            raise UserError(
                f"--out {self.path} must be empty: it holds a fine-tuned folder. Go on with it (--resume), replace it "
                "(--overwrite), or choose another."
            )

    def require_apart(self, config: FolderConfig) -> None:
        """Make sure that neither model nor text lie in what training writes anew.

        Raises:
            UserError: one does.
        """
        text = {"--data.path": config.data.path, "--data.valid_path": config.data.valid_path}
        files = {option: name for option, name in text.items() if name != STANDARD}
        require_apart({"--model": config.model, **files}, [*self._files, *self._folders])

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the folder, as plain data; nothing where there are none."""
        path = self.path / _CONFIG
        found = read_mapping(path, str(path)) if path.is_file() else {}
        return found if isinstance(found.get("model"), str) else {}

    def create(self, config: FolderConfig, *, overwrite: bool) -> None:
        """Make the folder, and write settings and environment.

        Raises:
            UserError: it cannot be written.
        """
        if overwrite:
            self.clear()
        self.path.mkdir(parents=True, exist_ok=True)
        given = as_settings(config)
        given["train"] = {name: value for name, value in given["train"].items() if name not in UNUSED}  # as options are
        text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
        write_text(self.path / _CONFIG, text)
        write_json(self.path / _ENVIRONMENT, environment())
        try:
            self.checkpoints.mkdir(exist_ok=True)
            clear_drafts(self.checkpoints)
        except OSError as error:
            raise write_error(self.checkpoints, error) from error

    def checkpoint_to_resume(self, config: FolderConfig) -> Path | None:
        """The last checkpoint, of these settings; None before the first.

        Raises:
            UserError: it is of others, which are listed, or cannot be read.
        """
        if not self.has_checkpoint:
            return None
        saved = load_rest(self.last).get(CONFIG_KEY)
        if saved is None:
            raise UserError(f"the checkpoint {self.last} must hold the settings of its training: it has none.")
        free = [*free_keys(config, "resume"), *_FREE]
        require_same(saved, as_settings(config), free, f"the checkpoint {self.last}")
        return self.last

    @property
    def results(self) -> dict[str, Any]:
        """What was measured so far.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / _RESULTS
        if not path.is_file():
            return {}
        try:
            found = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} must be readable JSON: {error}. Remove it.") from None
        found = found if isinstance(found, dict) else {}
        for name in ("before", "after", "steps"):
            if not isinstance(found.get(name), float | int | None):  # null = it was not finite
                raise UserError(f"{path}: {name} must be a number: got {found[name]!r}. Remove the file.")
        return found

    def add_results(self, found: Mapping[str, Any]) -> None:
        """Keep results beside those that are there.

        Raises:
            UserError: they cannot be written.
        """
        write_json(self.path / _RESULTS, {**self.results, **found})

    def clear(self) -> None:
        """Remove what fine-tuning writes, and nothing else.

        Raises:
            UserError: it cannot be removed.
        """
        for path in self._files:
            with writing(path):
                path.unlink(missing_ok=True)
        for path in self._folders:
            shutil.rmtree(path, ignore_errors=True)

    @property
    def _files(self) -> list[Path]:
        """Those that fine-tuning writes."""
        names = [self.path / name for name in (_CONFIG, _RESULTS, _ENVIRONMENT, "metrics.csv")]
        return [*names, self.page, self.path / _FORMER_PAGE, self.stopped, self.warnings]

    @property
    def _folders(self) -> list[Path]:
        """Those that fine-tuning writes."""
        loggers = [self.path / name for name in ("tensorboard", "wandb", "mlflow")]
        return [self.checkpoints, self.adapter, self.model, *loggers]


def as_settings(config: FolderConfig) -> dict[str, Any]:
    """Settings as plain data."""
    found: dict[str, Any] = plain(asdict(config))
    return found
