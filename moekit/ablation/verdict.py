"""What is said of a claim, by a rule that was written before any number was there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moekit.ablation.comparison import PairedDifferences, holm

Verdict = Literal["reproduced", "direction only", "inconclusive", "contradicted", "not testable here"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "direction only", "inconclusive", "contradicted", "not testable here")

LEVEL = 0.05
"""Of every test; the claims of one table share it."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of a claim.

    Attributes:
        effect: by seed how far the measure lies on the claimed side: positive where the claim says so. For equality,
            the plain difference. None where there are fewer than two seeds.
        smallest: the smallest effect of interest; for equality the margin.
        equality: whether the claim is that there is no difference.
        failed: number of runs that the claim needs and that diverged or failed.
        unmeasured: why the numbers say nothing of the effect, if so; it is neither reproduced nor contradicted then.
        at_most: why the effect may be less than what is given, if so; nothing is reproduced then.
        at_least: why it may be more, if so; nothing is contradicted then.
        origin: the words for where the claimed side begins.
        beyond: those for where the smallest effect of interest lies; "" = that effect.
    """

    effect: PairedDifferences | None
    smallest: float
    equality: bool = False
    failed: int = 0
    unmeasured: str = ""
    at_most: str = ""
    at_least: str = ""
    origin: str = "zero"
    beyond: str = ""


@dataclass(frozen=True)
class Judged:
    """A verdict.

    Attributes:
        verdict: one of `VERDICTS`.
        why: the rule that gave it, in one sentence.
        p: of the claim, not adjusted; None where nothing could be computed.
        adjusted_p: the same, adjusted for the claims of the table.
    """

    verdict: Verdict
    why: str
    p: float | None = None
    adjusted_p: float | None = None


def judge(claims: Mapping[str, Evidence], controlled: str = "") -> dict[str, Judged]:
    """The verdicts of the claims of one table.

    - A claim of effect is *reproduced* where the 95 % interval lies beyond the smallest effect of interest on the
      claimed side, *contradicted* where it lies on the other side of zero, *direction only* where its mean has the
      claimed sign, else *inconclusive*.
    - A claim of equality is *reproduced* where two one-sided tests place the difference within the margin,
      *contradicted* where the 95 % interval lies outside of it, else *inconclusive*.
    - A number that is only known to be at least a bound contradicts nothing; one at most a bound reproduces nothing.
    - Both are decided at a level that the claims of the table share (Holm).
    - Where a run has failed, or the table's negative control does not show what it must, a claim is *inconclusive*.

    Args:
        claims: by id.
        controlled: why the negative control does not hold; "" where it does, or there is none.
    """
    known = {name: found.effect for name, found in claims.items() if found.effect is not None}
    for_it = dict(zip(known, holm([_p_for(claims[name]) for name in known]), strict=True))
    against = dict(zip(known, holm([_p_against(claims[name]) for name in known]), strict=True))
    return {
        name: _judged(found, for_it.get(name, 1.0), against.get(name, 1.0), controlled)
        for name, found in claims.items()
    }


def _p_for(found: Evidence) -> float:
    assert found.effect is not None
    return found.effect.p_equivalent(found.smallest) if found.equality else found.effect.p_above(found.smallest)


def _p_against(found: Evidence) -> float:
    """Of the effect not lying on the other side: below zero, or outside of the margin."""
    assert found.effect is not None
    if not found.equality:
        return found.effect.p_below(0.0)
    return min(found.effect.p_above(found.smallest), found.effect.p_below(-found.smallest))


def _judged(found: Evidence, p_for: float, p_against: float, controlled: str) -> Judged:
    if found.effect is None:
        return Judged("inconclusive", f"{_runs(found.failed)}fewer than two pairs of runs are left.")
    p = _p_for(found)
    verdict, why = _by_rule(found, found.effect, p_for, p_against)
    if verdict in ("reproduced", "contradicted"):
        if found.failed:
            verdict, why = "inconclusive", f"{_runs(found.failed)}{_not_counted(why)}"
        elif controlled:
            verdict, why = "inconclusive", f"the negative control does not hold ({controlled}); {_not_counted(why)}"
    return Judged(verdict, why, p, p_for)


_NOT_SHARED = "not at the level that the claims of the table share"


def _by_rule(found: Evidence, effect: PairedDifferences, p_for: float, p_against: float) -> tuple[Verdict, str]:
    if found.equality:
        if p_for < LEVEL:
            return "reproduced", f"the difference is within plus and minus {found.smallest:g}."
        if p_against < LEVEL:
            return "contradicted", f"the interval lies outside of plus and minus {found.smallest:g}."
        margin = f"of plus and minus {found.smallest:g}"
        if effect.p_equivalent(found.smallest) < LEVEL:
            return "inconclusive", f"the difference is inside {margin}, but {_NOT_SHARED}."
        if _p_against(found) < LEVEL:
            return "inconclusive", f"the interval lies outside {margin}, but {_NOT_SHARED}."
        return "inconclusive", f"the difference is shown neither within nor outside {margin}."
    if found.unmeasured:
        return "inconclusive", f"{found.unmeasured}."
    beyond = found.beyond or f"{found.smallest:g}"
    if p_for < LEVEL and not found.at_most:
        return "reproduced", f"the interval lies beyond {beyond} on the claimed side."
    if p_against < LEVEL and not found.at_least:
        return "contradicted", f"the interval lies on the other side of {found.origin}."
    if found.at_most:
        return "inconclusive", f"{found.at_most}."
    low, high = effect.interval()
    ruled_out = found.smallest > 0 and high < found.smallest and not found.at_least
    no_more = f", and rules out an effect of {found.smallest:g}" if ruled_out else ""
    if effect.mean > 0:
        said = f"includes {found.origin}" if low <= 0 else f"does not lie beyond {beyond}"
        if low > found.smallest:
            said = f"lies beyond {beyond}, but {_NOT_SHARED}"
        return "direction only", f"the mean is on the claimed side, its interval {said}{no_more}."
    if found.at_least:
        return "inconclusive", f"{found.at_least}."
    said = f"includes {found.origin}" if high >= 0 else f"lies on the other side of {found.origin}, but {_NOT_SHARED}"
    return "inconclusive", f"the mean is not on the claimed side, and its interval {said}{no_more}."


def _not_counted(why: str) -> str:
    return f"else: {why}"


def _runs(failed: int) -> str:
    return f"{failed} {'run' if failed == 1 else 'runs'} diverged or failed; " if failed else ""


def count_verdicts(found: Sequence[str]) -> dict[str, int]:
    """How often each verdict is there, in the order of `VERDICTS`; those that are not are left out."""
    return {verdict: found.count(verdict) for verdict in VERDICTS if verdict in found}
