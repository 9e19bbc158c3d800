"""What a run that does not translate learned: its headline numbers, and its quality by language."""

from __future__ import annotations

import numpy as np

from moekit.report import page, plots, wording
from moekit.report.answers import answers
from moekit.report.plots import Line
from moekit.report.predictions import TaskScores, languages_by_perplexity, main_task, predictions
from moekit.report.run_folder import RunFolder, Series, number
from moekit.report.series import milestones
from moekit.report.tasks import task_title

_ORIGIN = {"test": "test set", "valid": "last validation"}
_NEAR = 5


def tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """Headline numbers as (label, value, remark), the perplexity first."""
    found = main_task(run)
    measured = found.perplexity is not None
    answered = [(label, average, x.title.lower()) for x in answers(run) for label, average in x.averages[:2]]
    return [
        *answered,
        ("Perplexity", wording.perplexity(found.perplexity), where_measured(found) if measured else "not measured"),
        ("Accuracy", wording.percent(found.accuracy), f"of {task_title(found.task).lower()}" if found.task else ""),
        ("Loss", wording.significant(found.loss), "nats per token"),
    ]


def where_measured(found: TaskScores) -> str:
    """``test set, 4 languages``; one language is named."""
    names = list(found.languages)
    spoken = wording.count(len(names), "language") if len(names) > 1 else "".join(names)
    return ", ".join(filter(None, (_ORIGIN[found.origin], spoken)))


def lead(run: RunFolder) -> str:
    """What a perplexity is, in words."""
    size = number(run.summary, "data", "vocab_size")
    blind = f" Blind guessing would score {wording.fixed(size, 0)}, the size of the vocabulary." if size else ""
    return (
        "Perplexity: among how many equally likely tokens the model hesitates, on average, at each token it predicts "
        f"of text it never saw. 1 is certainty, lower is better.{blind}"
    )


def scores(run: RunFolder) -> str:
    """Test scores of every task, perplexity by language, and how validation perplexity fell."""
    found = predictions(run)
    if not found:
        why = f"Nothing was tested yet: the command test does it. {run.notes.get('summary.json', '')}".strip()
        return page.section("scores", "Quality on held-out text", lead(run), page.note(why))
    several = len(found) > 1
    left = [_by_language(x, several) for x in found if len(x.languages) > 1]
    right = [_table(found), *(_decline(run, x.task, several) for x in found if x.perplexity is not None)]
    cells = [f'<div class="stack">{"".join(part)}</div>' for part in (left, right)] if left else right
    remark = ""
    if found[0].origin == "valid":
        remark = '<p class="signatures">These are scores of the last validation, not of the test set.</p>'
    return page.section(
        "scores", "Quality on held-out text", lead(run), f'<div class="grid">{"".join(cells)}</div>{remark}'
    )


def _by_language(found: TaskScores, several: bool) -> str:
    names = languages_by_perplexity(found)
    title = "Perplexity by language"
    return page.figure(
        f"{title}: {task_title(found.task)}" if several else title,
        "One row for each language, best first; shorter bars are better. The tokenizer cuts languages into tokens of "
        "different lengths, so compare a language with itself in another run rather than with its neighbours.",
        "one language is several times worse than all others: it may have too little data or weight in the mixture.",
        plots.perplexity_bars(
            names,
            [found.languages[name] for name in names],
            description=f"Perplexity of {len(names)} languages; the numbers are in the table below",
        ),
        table=page.table(
            ["language", "perplexity"], [(name, wording.perplexity(found.languages[name])) for name in names]
        ),
    )


def _table(found: tuple[TaskScores, ...]) -> str:
    rows = [
        (
            task_title(x.task),
            wording.significant(x.loss),
            wording.perplexity(x.perplexity),
            wording.percent(x.accuracy),
        )
        for x in found
    ]
    return page.figure(
        f"Scores of the {_ORIGIN[found[0].origin]}",
        "Loss in nats per predicted token; perplexity is its exponential; accuracy is the share of predictions that "
        "hit the right token.",
        "",
        page.table(["task", "loss", "perplexity", "accuracy"], rows),
    )


def _decline(run: RunFolder, task: str, several: bool) -> str:
    logged = run.metrics.get(f"valid/{task}/loss")
    if logged is None or len(logged.finite.value) < 2:
        return ""
    fallen = Series(logged.finite.step, np.exp(np.minimum(logged.finite.value, 700.0)))
    near = fallen.value <= _NEAR * fallen.value[-1]  # an untrained model would squeeze all the rest flat
    series = Series(fallen.step[near], fallen.value[near])
    if len(series.value) < 2:
        return ""
    values = dict(zip(series.step.tolist(), series.value.tolist(), strict=True))
    title = "Validation perplexity during training"
    return page.figure(
        f"{title}: {task_title(task)}" if several else title,
        "All languages together"
        + ("." if near.all() else f", without the first steps, where it was over {_NEAR} times that of the end."),
        "the line is still steep at the end (train longer) or rises (overfitting).",
        plots.curves([Line("", series, "blue", "points")], description="Validation perplexity over steps"),
        table=page.table(
            ["step", "perplexity"],
            [(f"{step:,.0f}", wording.perplexity(values[step])) for step in milestones([series])],
        ),
    )
