"""What a run folder says, and how its nested records are asked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moekit.report.wording import MISSING, short
from moekit.runs.record import Sample
from moekit.tasks import TASKS, SampleWording
from moekit.training.monitoring.rules import Warned

_TOTAL = {"title": "Total", "explanation": "The sum of all tasks and the routers' penalties."}
_UNSAID = {**{name: task.record() for name, task in TASKS.items()}, "": _TOTAL}  # summaries did not always say it


@dataclass(frozen=True)
class Series:
    """One column of metrics.csv: Float64[N] values at Float64[N] steps, rising and unique; values may be NaN or inf."""

    step: NDArray[np.float64]
    value: NDArray[np.float64]

    @property
    def finite(self) -> Series:
        """The same series without NaN and infinities."""
        good = np.isfinite(self.value)
        return Series(self.step[good], self.value[good])

    @property
    def last(self) -> float | None:
        """The last value, or None where there is none or it is not finite."""
        return float(self.value[-1]) if len(self.value) and math.isfinite(self.value[-1]) else None


@dataclass(frozen=True)
class DirectionScores:
    """A translation score on average and by direction.

    Attributes:
        average: mean over directions, or None.
        directions: score by direction, for example ``{"en-de": 31.2}``.
        signature: how it was computed (sacrebleu's signature), or "".
        origin: "test", or "valid" where it is the last validation's.
    """

    average: float | None = None
    directions: Mapping[str, float] = field(default_factory=dict)
    signature: str = ""
    origin: str = "test"


_RATES = ("lr", "train/lr", "learning_rate", "train/learning_rate")


@dataclass(frozen=True)
class TaskWording:
    """How a task is presented; `perplexity` says whether it predicts tokens, so that exp(loss) has a meaning."""

    title: str
    explanation: str = "Loss of this task."
    perplexity: bool = True
    samples: SampleWording = field(default_factory=SampleWording)


@dataclass(frozen=True)
class RunFolder:
    """What a run folder says; empty where a file is missing.

    Attributes:
        path: the folder.
        config: text of config.yaml.
        environment: environment.json.
        metrics: columns of metrics.csv by name, ``step`` and ``epoch`` excluded.
        summary: summary.json.
        routing: routing.json.
        samples: samples.json.
        stopped: why training stopped by itself, where it did.
        warned: what training was warned of, in the order of steps.
        notes: for every file that is missing, broken or partly unreadable, one sentence by file name.
        tuned: whether it is of a fine-tuning of a folder of transformers, which has no test and writes no samples.
    """

    path: Path
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Series] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    routing: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    stopped: str = ""
    warned: tuple[Warned, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    tuned: bool = False

    @property
    def recipe(self) -> str:
        """Name of the recipe, from the summary or the configuration; "" where neither says."""
        return self._said("recipe")

    @property
    def variant(self) -> str:
        """Name of the variant, from the summary or the configuration; "" where neither says."""
        return self._said("variant")

    @property
    def name(self) -> str:
        """Recipe and variant, or the folder's name where neither is known."""
        known = (self.recipe, self.variant, "smoke test" if self.smoke else "")
        return " · ".join(filter(None, known)) or self.path.resolve().name

    @property
    def settings(self) -> Mapping[str, Any]:
        """What config.yaml says; nothing where it is missing or broken."""
        try:
            found = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, Mapping) else {}

    @property
    def smoke(self) -> bool:
        """Whether this was a smoke test, whose numbers are no results."""
        return self._said("smoke").lower() == "true"

    @property
    def layers(self) -> tuple[Mapping[str, Any], ...]:
        """The MoE layers of routing.json that have a usable load; empty for a dense model."""
        found = self.routing.get("layers")
        return tuple(x for x in found if isinstance(x, Mapping) and loads(x)) if isinstance(found, list) else ()

    @property
    def dense(self) -> bool:
        """Whether the model has no Mixture-of-Experts layer, as far as a finished run tells."""
        broken = "routing.json" in self.notes and (self.path / "routing.json").exists()
        validated = numbers(self.summary, "held_out", "valid")  # where routing is measured
        measured = not validated or any(validated.values())
        return bool(self.summary) and measured and not self.layers and not self.summary.get("routing") and not broken

    @property
    def translates(self) -> bool:
        """Whether the run translates; also where nothing in the folder names a task."""
        if any(self.scores(metric).average is not None for metric in ("bleu", "chrf")):
            return True
        said = {t for key in ("test", "loss", "perplexity", "accuracy") for t in names_in(dig(self.summary, key))}
        said |= {t for phase in ("train", "valid", "test") for t in self.by_column(phase, "loss")}
        said = said or {*names_in(dig(self.summary, "held_out", "valid"))}
        said = said or {sample.task for sample in self.samples}
        return not said or "translation" in said

    @property
    def untestable(self) -> bool:
        """Whether the summary says that there was no text to test on."""
        tested = numbers(self.summary, "held_out", "test")
        return bool(tested) and not any(tested.values())

    @property
    def languages(self) -> list[str]:
        """The run's languages in its own order; [] where it does not say."""
        given = self.routing.get("languages") or dig(self.summary, "data", "languages")
        return [str(x) for x in given] if isinstance(given, list) else []

    @property
    def steps(self) -> int | None:
        """Optimizer steps taken: the summary's, else the last one in the metrics."""
        given = number(self.summary, "steps")
        if given is not None:
            return int(given)
        return self._last_logged

    @property
    def trained_since(self) -> int | None:
        """The last step in the metrics, where it lies behind the test of the summary: the run has gone on since."""
        tested, last = number(self.summary, "steps"), self._last_logged
        return last if tested is not None and last is not None and last > tested else None

    @property
    def _last_logged(self) -> int | None:
        ends = [s.step[-1] for s in self.metrics.values() if len(s.step)]
        return int(max(ends)) if ends else None

    @property
    def tokens_per_second(self) -> float | None:
        """The summary's speed, else the median of what was logged in training."""
        given = number(self.summary, "tokens_per_second")
        logged = self.logged("train/tokens_per_second")
        return float(np.median(logged.finite.value)) if given is None and logged is not None else given

    def logged(self, column: str, *, least: int = 1) -> Series | None:
        """A column of metrics.csv that holds at least so many finite numbers."""
        series = self.metrics.get(column)
        return series if series is not None and len(series.finite.value) >= least else None

    @property
    def learning_rate(self) -> Series | None:
        """What was logged of it, under whichever of the usual names; None where nothing was."""
        return self.logged(next((name for name in self.metrics if name in _RATES or name.startswith("lr-")), ""))

    def by_column(self, phase: str, quantity: str) -> dict[str, Series]:
        """By task, the column ``PHASE/TASK/QUANTITY`` of metrics.csv; what routing logs belongs to no task."""
        columns = ((column.split("/"), series) for column, series in self.metrics.items())
        found = {c[1]: series for c, series in columns if len(c) == 3 and (c[0], c[2]) == (phase, quantity)}
        return {task: series for task, series in found.items() if task not in ("aux", "routing")}

    def task(self, name: str) -> TaskWording:
        """How a task is presented, as the summary says; neutrally, what it leaves out."""
        kinds = {"title": str, "explanation": str, "perplexity": bool}
        found = TaskWording(name.replace("_", " ").capitalize())
        for said in (_UNSAID.get(name), dig(self.summary, "tasks", name)):
            given = {key: dig(said, key) for key, kind in kinds.items() if isinstance(dig(said, key), kind)}
            words = {f.name: dig(said, "samples", f.name) for f in fields(SampleWording)}
            words = {key: word for key, word in words.items() if isinstance(word, str)}
            found = replace(found, **given, samples=replace(found.samples, **words))
        return found

    def task_order(self, task: str) -> tuple[int, str]:
        """Sorts tasks as the summary names them, a task that nobody names by its name at the end."""
        order = [*names_in(self.summary.get("tasks")), *_UNSAID]
        return order.index(task) if task in order else len(order), task

    def by_task(self, quantity: str) -> dict[str, float]:
        """Final validation loss, perplexity or accuracy (`quantity`) by task: the summary's, else the last logged."""
        given = numbers(self.summary, quantity)
        if given:
            return given
        if quantity == "perplexity":
            return {t: math.exp(v) for t, v in self.by_task("loss").items() if v < 700 and self.task(t).perplexity}
        return {t: s.last for t, s in self.by_column("valid", quantity).items() if s.last is not None}

    def scores(self, metric: str) -> DirectionScores:
        """Scores by `metric`, such as "bleu", of the test, or else of the last validation, or nothing."""
        record = self.summary if metric in self.summary else dig(self.summary, "scores")
        directions, signature = numbers(record, metric, "directions"), str(dig(record, metric, "signature") or "")
        found = [DirectionScores(number(record, metric, "average"), directions, signature)]
        for origin in ("test", "valid"):
            prefix = f"{origin}/{metric}/"
            logged = {c.removeprefix(prefix): s.last for c, s in self.metrics.items() if c.startswith(prefix)}
            last = {name: value for name, value in logged.items() if value is not None}
            found.append(DirectionScores(last.pop("average", None), last, origin=origin))
        best = next((x for x in found if x.directions or x.average is not None), DirectionScores())
        values = best.directions.values()
        return best if best.average is not None or not values else replace(best, average=sum(values) / len(values))

    def _said(self, key: str) -> str:
        line = re.search(rf"^{key}:[ \t]*([\w.-]+)", self.config, flags=re.MULTILINE)
        return str(self.summary.get(key) or (line.group(1) if line else ""))


def dig(tree: Any, *keys: str) -> Any:
    """``tree[key][key]...``, or None where a level is missing or no mapping."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number(tree: Any, *keys: str) -> float | None:
    """The finite number at ``tree[key][key]...``, or None."""
    value = dig(tree, *keys)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def numbers(tree: Any, *keys: str) -> dict[str, float]:
    """The finite numbers of the mapping at ``tree[key]...``, by name."""
    mapping = dig(tree, *keys)
    found = {str(k): number(mapping, k) for k in mapping} if isinstance(mapping, Mapping) else {}
    return {k: v for k, v in found.items() if v is not None}


def names_in(tree: Any) -> list[str]:
    """The names in a mapping, in its order; [] where it is none."""
    return [str(name) for name in tree] if isinstance(tree, Mapping) else []


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves of a nested mapping by dotted name."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list):
            found[name] = ", ".join(map(str, value))
        else:
            long = isinstance(value, float) and abs(value) >= 1e6
            found[name] = short(value) if long else MISSING if value is None else str(value)
    return found


def sides(direction: str) -> tuple[str, str]:
    """Source and target of a direction such as "en-de"; the target is "" where it has only one part."""
    source, _, target = direction.partition("-")
    return source, target


def loads(layer: Any, language: str | None = None) -> list[float]:
    """Share of tokens that each expert of a routing.json layer got, overall or from one language; [] if unusable."""
    values = dig(layer, "load") if language is None else dig(layer, "load_by_language", language)
    if not isinstance(values, list) or not values:
        return []
    clean = [v for value in values if (v := number(value)) is not None and v >= 0]
    total = sum(clean)
    return [v / total for v in clean] if len(clean) == len(values) and total > 0 else []
