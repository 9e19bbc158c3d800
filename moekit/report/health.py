"""What is well with a run and what is not, in sentences: the same ones on the page, the terminal and in markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moekit.report.predictions import main_task, predictions
from moekit.report.run_folder import RunFolder, Series, dig, loads, number
from moekit.report.series import specialisation
from moekit.report.wording import count, fixed, percent
from moekit.runs.smoke import WARNING
from moekit.training.metrics.routing import DEAD_SHARE, MAX_DROP_RATE, crowded
from moekit.training.monitoring.rules import Warned

STARVED = 0.10
"""Part of a fair share under which an expert hardly learns. Ours, as the other bounds, which training warns by too."""


@dataclass(frozen=True)
class LayerHealth:
    """Numbers of one MoE layer, each None where the folder does not say.

    Attributes:
        name: the layer.
        load: Float[E], share of the tokens that each expert got.
        by_language: the same by language.
        evenness: entropy of the load over experts divided by log E: 1 = all equally busy, 0 = one does everything.
        load_cv: standard deviation of the load divided by its mean.
        largest: load of the busiest expert, in fair shares.
        router_entropy: entropy as the run measured it, divided by log E.
        drop_rate: share of assignments that found their expert full.
        dead: experts that got next to no token.
        starved: experts that got under a tenth of a fair share, the dead included.
        specialisation: 0 = every language uses the experts alike, 1 = language decides.
        fixed: whether a rule that nobody trains assigns the tokens (a hash, a task id, a uniform draw): its load is
            the text's doing, so an uneven one is no failure.
        experts_per_token: how many experts a token used on average, where it is not the same whole number always.
        choices: the same in any case; 1 where nobody recorded it.
    """

    name: str
    load: Sequence[float]
    by_language: Mapping[str, Sequence[float]]
    evenness: float | None
    load_cv: float
    largest: float
    router_entropy: float | None
    drop_rate: float | None
    dead: int
    starved: int
    specialisation: float | None
    fixed: bool = False
    experts_per_token: float | None = None
    choices: float = 1.0

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.load)


@dataclass(frozen=True)
class Finding:
    """One sentence; `good` is False where somebody should look."""

    good: bool
    text: str


def layer_health(run: RunFolder) -> list[LayerHealth]:
    """Health of every MoE layer in routing.json."""
    return [_layer_health(run, i, layer) for i, layer in enumerate(run.layers)]


def _layer_health(run: RunFolder, i: int, layer: Mapping[str, Any]) -> LayerHealth:
    load = loads(layer)
    shares, size = np.array(load), len(load)
    by_language = {x: row for x in run.languages if len(row := loads(layer, x)) == size}
    said = number(run.summary, "routing", "layers", str(layer.get("name")), "experts_per_token")
    entropy, dead, used = (number(layer, key) for key in ("entropy", "dead_experts", "experts_per_token"))
    assignments, tokens = number(layer, "assignments"), number(layer, "tokens")
    fixed = layer.get("fixed_load")
    return LayerHealth(
        name=str(layer.get("name") or f"layer {i}"),
        load=load,
        by_language=by_language,
        evenness=float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum() / math.log(size)) if size > 1 else None,
        load_cv=float(shares.std() * size),
        largest=float(shares.max() * size),
        router_entropy=entropy / math.log(size) if entropy is not None and size > 1 else None,
        drop_rate=number(layer, "drop_rate"),
        dead=int((shares * size < DEAD_SHARE).sum() if dead is None else dead),
        starved=int((shares * size < STARVED).sum()),
        specialisation=specialisation([*by_language.values()]),
        # A layer of an older record does not say: a router that has no entropy to report is not learned.
        fixed=fixed if isinstance(fixed, bool) else "entropy" in layer and layer["entropy"] is None,
        experts_per_token=said if used is None else used,
        choices=assignments / tokens if assignments and tokens else said or used or 1.0,
    )


def by_rule(run: RunFolder) -> bool:
    """Whether a rule that nobody trains assigns the tokens of every layer."""
    health = layer_health(run)
    return bool(health) and all(x.fixed for x in health)


def experts_per_token(run: RunFolder) -> float | None:
    """Mean over the layers that say how many experts a token used, else the summary's; None where nobody says."""
    found = [x.experts_per_token for x in layer_health(run) if x.experts_per_token is not None]
    return sum(found) / len(found) if found else number(run.summary, "routing", "experts_per_token")


def drop_rate(run: RunFolder) -> float | None:
    """Share of assignments dropped late in training: the mean of the last tenth that was logged.

    routing.json and summary.json are measured in evaluation, which is dropless unless a run asks for a capacity there,
    so they are asked only where training logged nothing.
    """
    logged = _logged_drops(run)
    if logged is None:
        return number(run.summary, "routing", "drop_rate")
    values = logged.finite.value
    return float(values[-max(1, len(values) // 10) :].mean())


def _logged_drops(run: RunFolder) -> Series | None:
    """The rate in training. A run of a few steps logs none, and a model fresh from surgery has not trained."""
    return run.logged("train/routing/drop_rate")


def dropped(run: RunFolder) -> str:
    """``1.2 %`` of training, ``0.0 % (eval)`` where training logged nothing; a dash where nobody says."""
    rate = drop_rate(run)
    return percent(rate) + ("" if rate is None or _logged_drops(run) else " (eval)")


def findings(run: RunFolder) -> list[Finding]:
    """Everything worth a sentence, troubles first; of a run that has learned nothing, the troubles alone."""
    translation, guessed = [*_translation(run)], _guessed(run)
    said = dig(run.summary, "held_out", "remarks")
    held_out = [Finding(False, str(text)) for text in said] if isinstance(said, list) else []
    found = [*translation, *guessed.values(), *held_out, *_blind(run), *_losses(run), *_routing(run), *_warned(run)]
    nothing_learned = bool(translation) or (not run.translates and main_task(run).task in guessed)
    smoke = [Finding(False, f"This was a {WARNING}.")] if run.smoke else []
    return [*smoke, *sorted((f for f in found if not (f.good and nothing_learned)), key=lambda f: f.good)]


def _translation(run: RunFolder) -> Iterator[Finding]:
    """A BLEU that says that nothing was translated."""
    bleu, copied = run.scores("bleu"), number(run.summary, "copied", "bleu", "average")
    if bleu.average is not None and not max(bleu.directions.values(), default=bleu.average):
        yield Finding(False, "BLEU is 0 in every direction: nothing of the references was written.")
    elif bleu.average is not None and bleu.origin == "test" and copied is not None and bleu.average <= copied:
        yield Finding(False, f"BLEU {fixed(bleu.average)} is not above that of copying the source, {fixed(copied)}.")


def _guessed(run: RunFolder) -> dict[str, Finding]:
    """By task, an accuracy that needs no look at the text."""
    found = {}
    for x in predictions(run):
        if x.accuracy is not None and x.majority is not None and x.accuracy <= x.majority:
            text = f"{run.task(x.task).title}: accuracy {percent(x.accuracy)}; always the most frequent answer would "
            found[x.task] = Finding(False, f"{text}get {percent(x.majority)}.")
    return found


def _blind(run: RunFolder) -> Iterator[Finding]:
    """Tasks that guess worse than somebody who knows nothing but the vocabulary."""
    size = number(run.summary, "data", "vocab_size")
    worse = [run.task(task).title for task, found in run.by_task("perplexity").items() if size and found > size]
    if worse and size:
        yield Finding(False, f"{', '.join(worse)}: perplexity above {size:,.0f}, that of blind guessing.")


def _losses(run: RunFolder) -> Iterator[Finding]:
    broken = {name: int((~np.isfinite(s.value)).sum()) for name, s in run.metrics.items() if "loss" in name}
    worst = max(broken, key=lambda name: broken[name], default="")
    if worst and broken[worst]:
        yield Finding(False, f"{worst} was not a number at {count(broken[worst], 'logged step')}.")
    elif worst:
        yield Finding(True, "Every logged loss was a number.")


def _warned(run: RunFolder) -> Iterator[Finding]:
    """What training was warned of: of each kind the last time, how often, and where."""
    kinds: dict[str, list[Warned]] = {}
    for one in run.warned:
        kinds.setdefault(one.kind, []).append(one)
    for warnings in kinds.values():
        last, often = warnings[-1], ""
        if len(warnings) > 1:
            layers = [*dict.fromkeys(one.layer for one in warnings if one.layer)]
            where = f" in {', '.join(layers)}" if len(layers) > 1 else ""
            often = f" Training was warned of it {len(warnings)} times{where}, first after step {warnings[0].step:,}."
        yield Finding(False, f"After step {last.step:,}, {last.text}{often}")


def _routing(run: RunFolder) -> Iterator[Finding]:
    layers, rate = layer_health(run), drop_rate(run)
    if rate is not None:
        when = "late in training" if _logged_drops(run) else "in evaluation"
        text = f"{percent(rate)} of the assignments dropped {when}."
        yield Finding(rate <= MAX_DROP_RATE, f"No token was dropped {when}." if rate == 0 else text)
    fixed, learned = [x for x in layers if x.fixed], [x for x in layers if not x.fixed]
    if fixed:
        busiest = max(x.largest for x in fixed)
        which = f"{count(len(fixed), 'layer')} {'assigns' if len(fixed) == 1 else 'assign'} tokens by a fixed rule"
        yield Finding(True, f"{which.capitalize()}; the busiest expert got {busiest:.1f} fair shares.")
    if learned:
        yield from _learned(learned)
    elif not layers:
        # As logged in training; of routers without an entropy nobody knows whether they learn.
        dead = run.metrics.get("train/routing/dead_experts")
        learning = any(name.startswith("train/routing/") and name.endswith("/entropy") for name in run.metrics)
        if dead is not None and dead.last is not None and (not dead.last or learning):
            yield Finding(dead.last == 0, f"{count(int(dead.last), 'dead expert').capitalize()} when last counted.")


def _learned(layers: list[LayerHealth]) -> Iterator[Finding]:
    dead, total = sum(x.dead for x in layers), sum(x.num_experts for x in layers)
    starved = sum(max(0, x.starved - x.dead) for x in layers)
    busiest = max(layers, key=lambda x: x.largest / crowded(x.num_experts, x.choices))
    yield Finding(dead == 0, f"{count(dead, 'dead expert').capitalize()} of {total} in {count(len(layers), 'layer')}.")
    if starved:
        yield Finding(False, f"{count(starved, 'expert').capitalize()} got under a tenth of a fair share.")
    text = f"The busiest expert got {busiest.largest:.1f} fair shares ({busiest.name})."
    yield Finding(busiest.largest < crowded(busiest.num_experts, busiest.choices), text)
