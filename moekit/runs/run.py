"""A run: the folder with everything that it leaves, or one checkpoint of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import nn

from moekit.atomic import (
    clear_drafts,
    replacing,
    replacing_folder,
    require_text,
    write_json,
    write_text,
    writing,
)
from moekit.data.cache import CorruptCacheError
from moekit.data.held_out import HeldOut
from moekit.data.tokenizer import Tokenizer
from moekit.environment import environment
from moekit.errors import UserError
from moekit.folder_kinds import kind_of, refuse_as_run, require_run_folder
from moekit.lock import LOCK_FILES
from moekit.runs.config import RunConfig
from moekit.runs.plain import plain, require_same
from moekit.runs.recipe import Recipe, RunText, find_recipe
from moekit.runs.record import STOPPED, TRANSLATIONS, RoutingRecord, Sample, Summary
from moekit.runs.yaml_file import read_mapping
from moekit.stored import parse_json
from moekit.surgery import SparseLayer, require_complete, sparse_layers
from moekit.surgery.adapters import merged_state
from moekit.training.callbacks.config import CONFIG_KEY
from moekit.training.checkpoint_state import LoadedState, load_rest, load_state
from moekit.training.monitoring.rules import WARNINGS

R = TypeVar("R")

SURGERY_FILE = "surgery.json"
"""What was done to other runs to make this one, where it was made so."""

CHECKPOINTS = ("average", "best", "last")
"""Names of a run's checkpoints; the first that is there is used."""

_CONFIG = "config.yaml"
_TOKENIZER = "tokenizer"
_HELD_OUT = "held_out.json.gz"
SUMMARY, ROUTING, SAMPLES, REPORT = "summary.json", "routing.json", "samples.json", "report.html"
ROUTING_TRACE = "routing_trace"
"""Folder of the routing that was recorded in training."""
TEST_TRACE = "routing_test.npz"
"""The routing of the test text."""
MECHANISMS = "mechanisms.json"
"""What was computed of them, see `moekit.mechanisms`."""
_FILES = (
    _CONFIG, _HELD_OUT, SURGERY_FILE, SUMMARY, ROUTING, SAMPLES, TRANSLATIONS, STOPPED, WARNINGS,
    "environment.json", "metrics.csv", REPORT, TEST_TRACE, MECHANISMS,
)  # fmt: skip
_FOLDERS = ("checkpoints", "tensorboard", "wandb", "mlflow", _TOKENIZER, ROUTING_TRACE)


@dataclass(frozen=True)
class Run:
    """A run of a recipe.

    Its folder is complete in itself: configuration, environment, metrics, checkpoints, records and report are in it,
    the tokenizer, and the sentences that the run is evaluated on. So it can be tested, translated with and started from
    on another machine, without its corpus and without a cache.

    Make one with `create` (a new run, or one to go on with), `open` (a folder) or `load` (a folder or a checkpoint
    whose model is looked at). What is read is read when it is asked for.

    Attributes:
        path: the folder; of a checkpoint that lies in none, the checkpoint.
        chosen: the checkpoint that was asked for; None = the average of the last weights, else the best, else the last.
        described_by: config.yaml of a run with such a model, for a checkpoint that does not say what it is of.
    """

    path: Path
    chosen: Path | None = None
    described_by: Path | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        free: Collection[str] = (),
        measured: Mapping[str, Any] | None = None,
    ) -> Run:
        """Make the folder, or take up an existing one, and write ``config.yaml`` and ``environment.json``.

        Args:
            path: the folder.
            config: the resolved configuration, plain data.
            resume: go on with the run that is there, if any; its configuration must be the same.
            overwrite: remove the run that is there (its own files only), and start afresh.
            free: dotted keys that a resumed run may change, for example ``"train.max_minutes"``.
            measured: what was measured of the machine, for ``environment.json``.

        Raises:
            UserError: a run or foreign files are there and neither option was given, the configuration of the run to
                resume is another (every differing key is listed), or the folder cannot be written.
        """
        run = cls(Path(path))
        content = run.require_free(resume=resume, overwrite=overwrite)
        if content and resume:
            run.require_same(config, free)
        elif content:
            run.clear()
        write_text(run.path / _CONFIG, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        write_json(run.path / "environment.json", environment() | dict(measured or {}))
        with writing(run.checkpoints):
            run.checkpoints.mkdir(exist_ok=True)
            clear_drafts(run.checkpoints)
        return run

    @classmethod
    def open(cls, path: str | Path, checkpoint: str | None = None) -> Run:
        """The run in a folder, with one of its checkpoints by name, such as "last"; None = see `chosen`.

        Raises:
            UserError: there is none.
        """
        run = cls(Path(path))
        require_run_folder(run.path)
        if checkpoint is None:
            return run
        names = [name for name in CHECKPOINTS if (run.checkpoints / f"{name}.ckpt").exists()]
        if checkpoint not in names:
            raise UserError(f"{run.path} has no checkpoint {checkpoint}: it has {', '.join(names) or 'none'}.")
        return cls(run.path, run.checkpoints / f"{checkpoint}.ckpt")

    @classmethod
    def load(cls, path: str | Path, config: str | Path | None = None) -> Run:
        """A run whose model is looked at: a folder, a checkpoint, or a plain state dict of one.

        Args:
            path: the file; of a folder the best checkpoint is taken, else the last, as `test` and `generate` do.
            config: a run's config.yaml; needed where the checkpoint holds none and none lies beside it.

        Raises:
            UserError: naming the file, and the key where there is one: it cannot be read, is of no recipe, or its
                weights are not of the model that the configuration describes.
        """
        place = Path(path)
        refuse_as_run(place)
        described_by = None if config is None else Path(config)
        if (place / _CONFIG).is_file():
            run = cls(place, cls(place).checkpoint, described_by)
        elif place.parent.name == "checkpoints" and (place.parent.parent / _CONFIG).is_file():
            run = cls(place.parent.parent, place, described_by)
        else:
            run = cls(place, place, described_by)
        require_complete(run.loaded.weights, run.model(), str(run.checkpoint))
        return run

    # -- the folder ----------------------------------------------------------------------------------------------------

    @property
    def in_folder(self) -> bool:
        """Whether there is a folder of the run, and not a checkpoint alone."""
        return (self.path / _CONFIG).is_file()

    def require_free(self, *, resume: bool, overwrite: bool) -> bool:
        """Make sure that the folder can become that of a run; whether there is a run already.

        Raises:
            UserError: as `create`.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other: give one of them.")
        require_text(self.path, "the run folder")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"the run folder {self.path} must be a folder: it is a file. Choose another --out.")
        content = sorted({*os.listdir(self.path)} - {*LOCK_FILES}) if self.path.is_dir() else []
        if content and kind_of(self.path) != "run":
            raise UserError(
                f"the folder {self.path} must be empty or hold a run: it has {content[0]!r} and no config.yaml of a "
                "run. Choose another --out."
            )
        if content and not (resume or overwrite):
            state = "a finished" if (self.path / SUMMARY).is_file() else "an unfinished"
            raise UserError(
                f"the folder {self.path} must be empty: it holds {state} run. Go on with it (--resume), replace it "
                "(--overwrite), or choose another --out."
            )
        return bool(content)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, a file or the folder of a sharded one; None before the first.

        Raises:
            UserError: it is a link to nothing.
        """
        return _present(self.checkpoints / "last.ckpt")

    @property
    def best_checkpoint(self) -> Path | None:
        """The average of the last weights, else the best checkpoint, else the last, None before the first.

        Raises:
            UserError: one is a link to nothing.
        """
        return next(filter(None, (_present(self.checkpoints / f"{name}.ckpt") for name in CHECKPOINTS)), None)

    @property
    def kept_tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder; None where a former version did not keep it, and beside a checkpoint alone.

        Raises:
            UserError: it is not as it was written.
        """
        place = self.path / _TOKENIZER
        if _present(place) is None:
            return None
        try:
            return Tokenizer.load(place)
        except CorruptCacheError as error:
            raise UserError(
                f"{error} The weights of the run mean nothing without it: take the folder from a copy of the run."
            ) from error

    def _keeps(self, tokenizer: Tokenizer) -> bool:
        with contextlib.suppress(UserError):  # a damaged one is replaced
            kept = self.kept_tokenizer
            return kept is not None and kept.fingerprint == tokenizer.fingerprint
        return False

    @property
    def held_out(self) -> HeldOut | None:
        """The sentences that the run is evaluated on; None where a former version did not keep them.

        Raises:
            UserError: they are not as they were written.
        """
        path = self.path / _HELD_OUT
        return None if _present(path) is None else HeldOut.read(path)

    def keep(self, tokenizer: Tokenizer | None, held_out: HeldOut | None) -> None:
        """Write the tokenizer and the sentences for evaluation; of None nothing is written.

        Raises:
            UserError: they cannot be written.
        """
        place = self.path / _TOKENIZER
        if tokenizer is not None and not (place.exists() and self._keeps(tokenizer)):
            with writing(place), replacing_folder(place) as draft:
                tokenizer.save(draft)
        if held_out is not None:
            with replacing(self.path / _HELD_OUT) as file:
                held_out.write(file)

    @property
    def summary(self) -> Summary | None:
        """The summary of the test; None where it was not tested."""
        return self._record(SUMMARY, Summary.from_json)

    @property
    def routing(self) -> RoutingRecord | None:
        """The routing in validation; None where it was not tested, and of a dense model."""
        return self._record(ROUTING, RoutingRecord.from_json)

    @property
    def samples(self) -> list[Sample]:
        """What the model wrote in the test."""
        return self._record(SAMPLES, lambda data: [Sample.from_json(item) for item in data]) or []

    def _record(self, name: str, made: Callable[[Any], R]) -> R | None:
        path = self.path / name
        try:
            return made(parse_json(path.read_text(encoding="utf-8"))) if path.is_file() else None
        except (OSError, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{path} cannot be read ({error}). Write it again: test.") from None

    def require_same(self, config: Mapping[str, Any], free: Collection[str] = ()) -> None:
        """`moekit.runs.plain.require_same` for the folder, before the run goes on.

        Raises:
            UserError: its configuration is another.
        """
        require_same(self.settings, config, free, f"the run in {self.path}")

    def checkpoint_to_resume(self, config: Mapping[str, Any], free: Collection[str] = ()) -> Path | None:
        """The last checkpoint, if it is of a run with this configuration, but for keys `free`; None before the first.

        Raises:
            UserError: it cannot be read, or its configuration is another: every differing key is listed.
        """
        last = self.last_checkpoint
        if last is not None:
            saved = load_rest(last).get(CONFIG_KEY)
            if saved is None:
                raise UserError(f"The checkpoint {last} must hold the configuration of its run: it has none.")
            require_same(self._current(saved), config, free, f"the checkpoint {last}")
        return last

    def clear(self) -> None:
        """Remove what a run writes, and nothing else.

        Raises:
            UserError: it cannot be removed.
        """
        for name in _FILES:
            with writing(self.path / name):
                (self.path / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    # -- the configuration ---------------------------------------------------------------------------------------------

    @property
    def _described(self) -> tuple[Path, Any]:
        """Where the configuration is from, and what it says: the given file, the chosen checkpoint, the folder."""
        if self.described_by is None and self.chosen is not None and CONFIG_KEY in self.rest:
            return self.chosen, self.rest[CONFIG_KEY]
        path = self.described_by or self.path / _CONFIG
        if self.described_by is None and not path.is_file():
            raise UserError(f"{self.path} does not say what model it is of: give the config.yaml of a run (--config).")
        return path, read_mapping(path, str(path))

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as plain data, recipe and variant included, as this version writes it.

        Raises:
            UserError: it cannot be read, or the checkpoint holds none.
        """
        path, values = self._described
        if not isinstance(values, Mapping):
            raise UserError(f"{path} must hold a mapping: got {type(values).__name__}.")
        return self._current(values)

    @staticmethod
    def _current(values: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(UserError):  # of no recipe: whoever needs one says so
            return find_recipe(values.get("recipe"), "").current(values)
        return dict(values)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the configuration names."""
        return find_recipe(self.settings.get("recipe"), str(self._described[0]))

    @property
    def variant(self) -> str:
        """The recipe's variant."""
        return str(self.settings.get("variant"))

    @cached_property
    def config(self) -> RunConfig:
        """The configuration.

        Raises:
            UserError: there is none, or it does not fit the recipe.
        """
        where = str(self._described[0])
        try:
            return self.recipe.config(self.settings, where)
        except UserError as error:  # of a setting by itself, which knows no file
            raise UserError(str(error) if where in str(error) else f"{where}: {error}") from None

    # -- the model -----------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that is looked at.

        Raises:
            UserError: nothing was trained there.
        """
        found = self.chosen or self.best_checkpoint
        if found is None:
            raise UserError(f"{self.path} holds no checkpoint: train first (run or fit).")
        return found

    @property
    def rest(self) -> Mapping[str, Any]:
        """What the checkpoint holds beside weights and optimizer; nothing where there is no checkpoint."""
        if self.chosen is not None or "loaded" in self.__dict__:
            return self.loaded.rest
        found = self.best_checkpoint
        return {} if found is None else load_rest(found)

    @cached_property
    def loaded(self) -> LoadedState:
        """What the checkpoint holds; adapters of fine-tuning are part of their matrices."""
        loaded = load_state(self.checkpoint)
        return dataclasses.replace(loaded, weights=merged_state(loaded.weights))

    @cached_property
    def vocab_size(self) -> int:
        """V, as recorded; of former versions that of the tokenizer in the folder, or the rows of the token table.

        Raises:
            UserError: nothing says it.
        """
        inside = self.rest.get(CONFIG_KEY)
        if isinstance(inside, Mapping) and "vocab_size" in inside:
            return int(inside["vocab_size"])
        if (tokenizer := self.kept_tokenizer) is not None:
            return tokenizer.vocab_size
        table = self.loaded.weights.get("backbone.embedding.weight")
        if table is None:
            raise UserError(f"{self.checkpoint} must hold a table of tokens, backbone.embedding.weight: it has none.")
        return table.shape[0]

    def model(self, config: RunConfig | None = None, *, device: str = "meta") -> nn.ModuleDict:
        """The network and its heads under the names that a checkpoint has; by `config` in the place of the run's."""
        return self.recipe.parts(config or self.config, RunText(self.vocab_size), device).named()

    def layers(self) -> dict[str, SparseLayer]:
        """Its sparse layers by dotted path."""
        return sparse_layers(self.model())


def _present(path: Path) -> Path | None:
    """The path, if something is there: what lies on a disk that is away today is no reason to do without it."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} must be what the run has written: it is a link to {os.readlink(path)}, which is away.")
    return path if path.exists() else None
