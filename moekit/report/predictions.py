"""Scores of the tasks that do not translate: they predict tokens, so they are judged by perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moekit.report.run_folder import RunFolder, dig, names_in, number, numbers


@dataclass(frozen=True)
class TaskScores:
    """How well a task other than translation does on held-out text; None where the folder does not say.

    Attributes:
        task: its name, for example "causal_lm".
        loss: nats per predicted token.
        perplexity: exp(loss); None for a task that does not predict tokens of a vocabulary.
        accuracy: share of predictions that are right.
        majority: what that share would be if the most frequent answer were always given.
        chance: what it would be if answers were drawn evenly.
        languages: perplexity by language, in the run's order.
        origin: "test"; "valid" where it is the last validation's; "held-out" where there is no other held-out text.
    """

    task: str
    loss: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    majority: float | None = None
    chance: float | None = None
    languages: Mapping[str, float] = field(default_factory=dict)
    origin: str = "test"


def predictions(run: RunFolder) -> tuple[TaskScores, ...]:
    """Scores of the tasks other than translation, of the test or else of the last validation.

    The order is the run's, tasks with a perplexity first: the first one is what the run is about.
    """
    tested = dig(run.summary, "test")
    found = [_tested(run, task, tested[task]) for task in names_in(tested) if isinstance(dig(tested, task), Mapping)]
    if not found:
        for task in run.by_column("test", "loss"):
            prefix = f"test/{task}/"
            tree: dict[str, Any] = {
                n.removeprefix(prefix): s.last for n, s in run.metrics.items() if n.startswith(prefix)
            }
            inner = {n.partition("/")[2]: value for n, value in tree.items() if n.startswith("perplexity/")}
            found.append(_tested(run, task, {**tree, "languages": inner}))
    if not found:
        origin = "held-out" if run.tuned else "valid"
        losses, perplexities, accuracies = map(run.by_task, ("loss", "perplexity", "accuracy"))
        for t in dict.fromkeys([*losses, *perplexities]):
            majority, chance = (number(run.summary, key, t) for key in ("majority", "chance"))
            shares = (accuracies.get(t), majority, chance)
            found.append(TaskScores(t, losses.get(t), perplexities.get(t), *shares, origin=origin))
    return tuple(sorted((x for x in found if x.task != "translation"), key=lambda x: x.perplexity is None))


def main_task(run: RunFolder) -> TaskScores:
    """The scores in the headline of a run that does not translate; empty where nothing was measured."""
    return next(iter(predictions(run)), TaskScores(""))


def languages_by_perplexity(scores: TaskScores) -> list[str]:
    """The languages of a task, the least perplexed first."""
    return sorted(scores.languages, key=lambda language: scores.languages[language])


def _tested(run: RunFolder, task: str, tree: Mapping[str, Any]) -> TaskScores:
    loss, perplexity = number(tree, "loss"), number(tree, "perplexity")
    shares = (number(tree, "accuracy"), number(tree, "majority"), number(tree, "chance"))
    if not run.task(task).perplexity:
        return TaskScores(task, loss, None, *shares)
    if perplexity is None and loss is not None and loss < 700:
        perplexity = math.exp(loss)
    return TaskScores(task, loss, perplexity, *shares, numbers(tree, "languages"))
