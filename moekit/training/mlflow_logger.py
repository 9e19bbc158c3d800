"""MLflow as a logger of runs: a database in the folder of the run."""

from __future__ import annotations

from argparse import Namespace
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only


class RunMlflowLogger(Logger):
    """Lightning's `MLFlowLogger` on a database in a folder, opened by the first process when it has something to write.

    ``mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db`` shows it. Where ``MLFLOW_TRACKING_URI`` is set, numbers
    go there instead, as with Lightning's.

    Args:
        folder: gets the database and artifacts; made when they are.
        run_name: what MLflow calls the run.

    Differs: Lightning's writes folders of files, which MLflow refuses from 3.18 on, and opens its place on all
    processes when it is built, which is before a run's folder is cleared.
    """

    def __init__(self, folder: Path, run_name: str) -> None:
        super().__init__()
        self.folder, self._run_name = folder.absolute(), run_name
        self._opened: MLFlowLogger | None = None

    @property
    def _logger(self) -> MLFlowLogger:
        if self._opened is None:
            told = signature(MLFlowLogger).parameters["tracking_uri"].default  # where MLflow was told to go, or None
            own = {"artifact_location": str(self.folder / "artifacts")}
            self._opened = MLFlowLogger(
                "moekit",
                run_name=self._run_name,
                tracking_uri=told or f"sqlite:///{self.folder / 'mlflow.db'}",
                **({} if told else own),  # type: ignore[arg-type]
            )
        return self._opened

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client."""
        return self._logger.experiment

    @property
    def name(self) -> str:
        """Unused: the folder says it all."""
        return ""

    version = name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """As Lightning's."""
        self._logger.log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """As Lightning's."""
        self._logger.log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """As Lightning's, of what was opened."""
        if self._opened is not None:
            self._opened.finalize(status)
