"""Where a run's numbers go: metrics.csv, which a resume continues, and the loggers that Lightning has."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from moekit.atomic import replacing, write_error, writing
from moekit.errors import UserError, nearest
from moekit.training.mlflow_logger import RunMlflowLogger

_FIRST = ("step", "epoch")


class CsvLogger(Logger):
    """Appends to ``metrics.csv``: one row a step, columns ``step``, ``epoch`` and the metrics, blank where not logged.

    Values of one step that are logged at different moments share a row. When a new metric appears the file is
    written anew with one more column, all or nothing. A run that goes on from step n (`continue_from`, which
    `Resumable` calls) drops the rows from n on, since it will write them again, and a row that a kill has torn.

    Args:
        folder: holds metrics.csv; made when the first row is written.

    Differs: Lightning's CSVLogger deletes the file of the run it resumes, and writes values of one step that are
    logged at different moments into several rows.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None
        self._row: dict[str, str] = {}
        self._offset: int | None = None  # where the current row begins in the file, once it is there
        self._unsaved = False

    @property
    def name(self) -> str:
        """Unused: the folder says it all."""
        return ""

    version = name

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    log_dir = save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration is a file of its own in the run folder."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`.

        Raises:
            UserError: full disk, read-only folder and the like.
        """
        number = str(int(step or 0))
        if self._columns is None:
            self.continue_from(math.inf)  # a test, not training: every row stays
        if self._row.get("step") != number:
            self.save()
            self._row, self._offset = {"step": number}, None
        values: dict[str, Any] = {name: value for name, value in metrics.items() if name != "step"}
        # A number so that reading it gives the same number.
        self._row |= {name: repr(v.item() if hasattr(v, "item") else v) for name, v in values.items()}
        self._unsaved = True

    @rank_zero_only
    def save(self) -> None:
        """Write the current row to the file."""
        if not self._unsaved or self._columns is None:
            return
        new = sorted(set(self._row) - set(self._columns))
        if new or not self.path.exists():
            rows = self._read()
            if self._offset is not None:
                rows.pop()
            self._columns += new
            self._rewrite([*rows, self._row])
        else:
            line = self._line([self._row.get(name, "") for name in self._columns])
            try:
                with self.path.open("r+b") as file:
                    self._offset = file.seek(0, io.SEEK_END) if self._offset is None else file.seek(self._offset)
                    file.write(line)
            except OSError as error:
                raise write_error(self.path, error) from error
        self._unsaved = False

    @rank_zero_only
    def continue_from(self, step: float) -> None:
        """Keep the rows of the file before `step`, drop the others."""
        self._columns = list(_FIRST)
        self._row, self._offset, self._unsaved = {}, None, False
        if not self.path.exists():
            return
        rows = self._read()
        kept = [row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) < step]
        if rows:
            self._columns += [name for name in rows[0] if name not in _FIRST]
        self._rewrite(kept)
        self._offset = None

    def _read(self) -> list[dict[str, str]]:
        """The whole rows of the file; one that is torn at the end is left out, as are those that are no rows.

        Raises:
            UserError: it cannot be read.
        """
        if not self.path.exists():
            return []
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        try:
            return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and None not in row]
        except csv.Error as error:
            raise UserError(f"{self.path} must hold rows of numbers: {error}. Mend it, or move it away.") from None

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        with replacing(self.path) as file:
            file.write(self._line(self._columns))
            for row in rows:
                self._offset = file.tell()
                file.write(self._line([row.get(name, "") for name in self._columns]))

    @staticmethod
    def _line(values: list[str]) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(values)
        return buffer.getvalue().encode("utf-8")


def logger_names(given: str | Sequence[str]) -> list[str]:
    """The loggers that are meant: ``csv`` first, and of ``auto`` TensorBoard where it is installed.

    Raises:
        UserError: one is unknown, or its package is not installed.
    """
    names = given.split(",") if isinstance(given, str) else given
    wanted = [name.strip() for name in names if name.strip()]
    if wanted == ["auto"]:
        return ["csv", *(["tensorboard"] if importlib.util.find_spec("tensorboard") else [])]
    for name in wanted:
        if name not in ("csv", *_MAKERS):
            raise UserError(f"train.loggers has an unknown logger {name!r}. {nearest(name, ('auto', 'csv', *_MAKERS))}")
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise UserError(f"train.loggers {name} needs a package that is not installed: pip install {name}")
    return list(dict.fromkeys(["csv", *wanted]))


def run_loggers(folder: str | Path, names: str | Sequence[str] = "auto") -> list[Logger]:
    """The loggers of a run: `CsvLogger` and those of `names`, which are Lightning's; see `logger_names`.

    Raises:
        UserError: see `logger_names`.
    """
    place = Path(folder)
    return [CsvLogger(place) if name == "csv" else _MAKERS[name](place) for name in logger_names(names)]


def make_logger_folders(folder: str | Path, names: str | Sequence[str] = "auto") -> None:
    """Make the folder of TensorBoard, whose own error would come in the middle of training.

    Raises:
        UserError: it cannot be made.
    """
    place = Path(folder) / "tensorboard"
    if place.name in logger_names(names):
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)


# What they write goes into a folder of their name in the run's, or where the user has told the package to send it.
_MAKERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda place: TensorBoardLogger(save_dir=str(place), name="tensorboard", version=""),
    "wandb": lambda place: WandbLogger(save_dir=place, project="moekit", name=place.name, group=place.name),
    "mlflow": lambda place: RunMlflowLogger(place / "mlflow", place.name),
}
