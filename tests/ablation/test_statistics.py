"""Student's t, intervals, TOST, Holm, verdicts and the compute-equivalent factor, on numbers with known answers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from moekit.ablation.comparison import PairedDifferences, holm
from moekit.ablation.ladder import Factor, bounds, compute_factor, log_factors
from moekit.ablation.student import t_cdf, t_quantile
from moekit.ablation.verdict import Evidence, Judged, count_verdicts, judge

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 9, 29, 300, 2.5])
def test_student_is_scipys(df: float) -> None:
    for t in (-60.0, -8.3, -2.0, -0.4, -1e-6, 0.0, 0.1, 1.0, 2.7, 12.0, 400.0):
        assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9, abs=1e-14)
    for p in (1e-4, 0.025, 0.3, 0.5, 0.6, 0.9, 0.975, 0.99999):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8, abs=1e-12)


def test_student_by_the_table() -> None:
    """Values that every printed table has."""
    assert [round(t_quantile(0.975, df), 3) for df in (1, 2, 4, 9)] == [12.706, 4.303, 2.776, 2.262]
    assert (t_cdf(math.inf, 3), t_cdf(-math.inf, 3)) == (1.0, 0.0)


def test_paired_is_scipys() -> None:
    draw = random.Random(0)
    for n in (2, 5, 8, 20):
        found = [draw.gauss(0.3, 1) for _ in range(n)]
        paired = PairedDifferences(found)
        low, high = paired.interval()
        peer = stats.t.interval(0.95, n - 1, loc=paired.mean, scale=stats.sem(found))
        assert (low, high) == pytest.approx(peer, rel=1e-9)
        for bound in (-0.4, 0.0, 0.5):
            one_sided = stats.ttest_1samp(found, bound, alternative="greater").pvalue
            assert paired.p_above(bound) == pytest.approx(min(1, 2 * one_sided), rel=1e-8)
            assert paired.p_below(bound) == pytest.approx(min(1, 2 * (1 - one_sided)), rel=1e-8)
        lower = stats.ttest_1samp(found, -0.5, alternative="greater").pvalue
        upper = stats.ttest_1samp(found, 0.5, alternative="less").pvalue
        assert paired.p_equivalent(0.5) == pytest.approx(max(lower, upper), rel=1e-8)


def test_an_interval_and_its_p_say_the_same() -> None:
    draw = random.Random(1)
    for _ in range(200):
        paired = PairedDifferences([draw.gauss(draw.choice((0.0, 0.5)), 0.5) for _ in range(5)])
        low, high = paired.interval()
        assert (low > 0.1) == (paired.p_above(0.1) < 0.05)
        assert (high < 0) == (paired.p_below(0) < 0.05)
        low, high = paired.interval(0.90)
        assert (low > -0.6 and high < 0.6) == (paired.p_equivalent(0.6) < 0.05)


def test_one_number_again_and_again() -> None:
    """Equal runs differ by nothing, and that is no division by nothing."""
    same = PairedDifferences([0.0] * 5)
    assert (same.mean, same.interval()) == (0.0, (0.0, 0.0))
    assert (same.p_equivalent(0.01), same.p_equivalent(0.0), same.p_above(0.0), same.p_below(0.0)) == (0, 1, 1, 1)
    off = PairedDifferences([0.5] * 5)
    assert (off.p_above(0.1), off.p_below(0.1), off.p_equivalent(0.1)) == (0, 1, 1)
    with pytest.raises(ValueError, match="at least two differences: got 1"):
        PairedDifferences([1.0])


def test_holm_by_hand() -> None:
    # Holm 1979's step-down: 4 * .005, 3 * .01, 2 * .03, then .04 is no less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def evidence(values: list[float], smallest: float = 0.1, **more: object) -> Evidence:
    return Evidence(PairedDifferences(values), smallest, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "equality", "verdict"),
    [
        ([0.50, 0.52, 0.48, 0.51, 0.49], False, "reproduced"),
        ([0.05, 0.06, 0.05, 0.04, 0.05], False, "direction only"),  # sure, and too small to matter
        ([0.9, -0.4, 0.8, -0.3, 0.5], False, "direction only"),  # large, and unsure
        ([0.12, 0.10, 0.15, 0.09, 0.14], False, "direction only"),  # the interval reaches below the smallest effect
        ([-0.9, 0.4, -0.8, 0.3, -0.5], False, "inconclusive"),
        ([-0.50, -0.52, -0.48, -0.51, -0.49], False, "contradicted"),
        ([-0.01, -0.02, -0.01, -0.02, -0.01], False, "contradicted"),  # however small
        ([0.01, -0.02, 0.02, 0.0, -0.01], True, "reproduced"),
        ([0.0, 0.0, 0.0, 0.0, 0.0], True, "reproduced"),
        ([0.05, 0.06, 0.05, 0.06, 0.05], True, "reproduced"),  # a difference that does not matter
        ([0.9, -0.4, 0.8, -0.3, 0.5], True, "inconclusive"),  # not significant is not equal
        ([0.50, 0.52, 0.48, 0.51, 0.49], True, "contradicted"),
        ([-0.50, -0.52, -0.48, -0.51, -0.49], True, "contradicted"),
        ([0.08, 0.12, 0.09, 0.13, 0.10], True, "inconclusive"),  # at the margin
    ],
)
def test_the_rule(values: list[float], equality: bool, verdict: str) -> None:
    found = judge({"claim": evidence(values, equality=equality)})["claim"]
    assert found.verdict == verdict, found.why


def test_an_effect_that_is_ruled_out_is_said() -> None:
    """Else "direction only" of next to nothing reads as weak support."""
    assert judge({"a": evidence([0.05, 0.06, 0.05, 0.04, 0.05])})["a"].why.endswith("and rules out an effect of 0.1.")
    assert judge({"a": evidence([-0.01, 0.005, -0.002, 0.001, -0.003])})["a"].why.endswith("an effect of 0.1.")
    assert "rules out" not in judge({"a": evidence([0.9, -0.4, 0.8, -0.3, 0.5])})["a"].why


def test_claims_of_a_table_share_the_level() -> None:
    """p = 0.03 is enough alone, and not beside three others that say nothing."""
    alone = evidence([0.20, 0.35, 0.15, 0.30, 0.25], smallest=0.12)
    assert 0.0125 < alone.effect.p_above(0.12) < 0.05  # type: ignore[union-attr]
    noise = evidence([0.9, -0.9, 0.8, -0.8, 0.1])
    assert judge({"a": alone})["a"].verdict == "reproduced"
    several = judge({"a": alone, "b": noise, "c": noise, "d": noise})
    assert several["a"].verdict == "direction only"
    assert several["a"].adjusted_p == pytest.approx(4 * several["a"].p)


@pytest.mark.parametrize(
    ("values", "smallest", "equality", "said"),
    [
        ([0.20, 0.35, 0.15, 0.30, 0.25], 0.12, False, "the mean is on the claimed side, its interval lies beyond 0.12"),
        ([-0.10, -0.25, -0.02, -0.20, -0.15], 0.12, False, "and its interval lies on the other side of zero"),
        ([0.20, 0.35, 0.15, 0.30, 0.25], 0.12, True, "the interval lies outside of plus and minus 0.12"),
        ([0.10, 0.25, 0.05, 0.20, 0.15], 0.26, True, "the difference is inside of plus and minus 0.26"),
    ],
)
def test_what_an_interval_alone_would_show_is_said(
    values: list[float], smallest: float, equality: bool, said: str
) -> None:
    """The page prints the interval beside it; that it includes zero, or not, must be true of that one."""
    one = evidence(values, smallest=smallest, equality=equality)
    noise = evidence([0.9, -0.9, 0.8, -0.8, 0.1])
    assert judge({"a": one})["a"].verdict in ("reproduced", "contradicted")
    found = judge({"a": one} | {str(i): noise for i in range(9)})["a"]
    assert found.verdict in ("direction only", "inconclusive")
    assert said in found.why
    assert "not at the level that the claims of the table share" in found.why


def test_what_cannot_be_relied_on_is_inconclusive() -> None:
    sure = [0.50, 0.52, 0.48, 0.51, 0.49]
    failed = judge({"a": evidence(sure, failed=2)})["a"]
    assert failed.verdict == "inconclusive"
    assert "2 runs diverged or failed" in failed.why
    uncontrolled = judge({"a": evidence(sure)}, "shuffled tokens did as well")["a"]
    assert uncontrolled.verdict == "inconclusive"
    assert "shuffled tokens did as well" in uncontrolled.why
    assert judge({"a": Evidence(None, 0.1, failed=1)})["a"].verdict == "inconclusive"
    assert judge({"a": evidence([0.05, -0.01, 0.06], failed=1)})["a"].verdict == "direction only", "not made worse"


def test_verdicts_are_counted() -> None:
    assert count_verdicts(["contradicted", "reproduced", "reproduced"]) == {"reproduced": 2, "contradicted": 1}


def test_false_alarms_are_as_rare_as_the_level_says() -> None:
    """Of 2,000 tables without any effect, at most the level is called an effect, and none of noise is called equal."""
    draw = random.Random(3)
    verdicts = []
    for _ in range(2000):
        claims = {str(i): evidence([draw.gauss(0, 1) for _ in range(5)], smallest=0.0) for i in range(3)}
        verdicts.append({found.verdict for found in judge(claims).values()})
    # Each side is tested at 2.5 %, for three claims together; 0.01 is three standard errors of 2,000 draws.
    assert sum("reproduced" in found for found in verdicts) / 2000 == pytest.approx(0.025, abs=0.0105)
    assert sum("contradicted" in found for found in verdicts) / 2000 == pytest.approx(0.025, abs=0.0105)


LADDER = [(1.0, 4.0), (2.0, 3.0), (4.0, 2.0), (8.0, 1.0)]


def test_a_factor_by_hand() -> None:
    assert compute_factor(LADDER, 1.0, 3.0) == Factor(pytest.approx(2.0))
    assert compute_factor(LADDER, 2.0, 2.5).value == pytest.approx(math.sqrt(2 * 4) / 2)
    assert compute_factor(LADDER[::-1], 1.0, 4.0).value == pytest.approx(1.0)
    assert compute_factor(LADDER, 1.0, 1.0).value == pytest.approx(8.0)


def test_a_power_law_is_found_again() -> None:
    """loss = 2 + 3 w^-0.3 at sizes near each other: a sparse model with the loss of twice its work has factor 2,

    to what straight lines between sizes that double are worth.
    """
    sizes = [2**i for i in range(-1, 5)]
    ladder = [(w, 2 + 3 * w**-0.3) for w in sizes]
    assert compute_factor(ladder, 1.5, 2 + 3 * 3**-0.3).value == pytest.approx(2.0, rel=0.02)


def test_nothing_is_extrapolated() -> None:
    assert compute_factor(LADDER, 1.0, 0.5) == Factor(8.0, "at least")
    assert compute_factor(LADDER, 1.0, 5.0) == Factor(1.0, "at most")
    with pytest.raises(ValueError, match="4 or more dense models"):
        compute_factor(LADDER[:3], 1.0, 3.5)


def test_noise_in_a_ladder_is_pooled() -> None:
    noisy = [(1.0, 4.0), (2.0, 2.5), (4.0, 3.5), (8.0, 1.0)]  # the middle two become 3
    assert compute_factor(noisy, 1.0, 3.5).value == pytest.approx(math.sqrt(2))
    assert 2.0 <= compute_factor(noisy, 1.0, 3.0).value <= 4.0


def judged_factors(found: Mapping[int, Factor], smallest: float, **more: Any) -> Judged:
    at_most, at_least = bounds(found)
    effect = PairedDifferences(log_factors(found, smallest))
    return judge({"a": Evidence(effect, 0.0, at_most=at_most, at_least=at_least, **more)})["a"]


def test_bounds_support_nothing_that_they_do_not_say() -> None:
    some = {1: Factor(4.0, "at least"), 2: Factor(2.0)}
    assert log_factors(some, 2.0) == pytest.approx([math.log(2), 0.0])
    assert bounds(some)[0] == ""
    assert "1 of 2 seeds the sparse model is better than the whole ladder" in bounds(some)[1]
    found = judged_factors({1: Factor(3.0, "at most"), 2: Factor(3.1), 3: Factor(3.2)}, 1.0)
    assert found.verdict == "inconclusive"
    assert "1 of 3 seeds" in found.why


def test_a_bound_from_below_contradicts_nothing() -> None:
    """The ladder ends at 1.5 times the work of a model that is better than all of it: 2 is not refuted."""
    ends = {seed: Factor(1.5 + seed / 1000, "at least") for seed in range(5)}
    found = judged_factors(ends, 2.0)
    assert found.verdict == "inconclusive"
    assert "in 5 of 5 seeds the sparse model is better than the whole ladder" in found.why
    assert "rules out" not in found.why
    assert judged_factors({seed: Factor(one.value) for seed, one in ends.items()}, 2.0).verdict == "contradicted"
    assert judged_factors(ends, 1.2).verdict == "reproduced"  # more than the bound is more than 1.2


@pytest.mark.parametrize("value", [0.5, 4.0])
def test_a_ladder_that_is_no_measure_decides_nothing(value: float) -> None:
    found = judged_factors({seed: Factor(value + seed / 1000) for seed in range(5)}, 2.0, unmeasured="it is none")
    assert (found.verdict, found.why) == ("inconclusive", "it is none.")


def test_a_reason_is_in_the_units_of_the_claim() -> None:
    """Of a number beyond a bound by itself, and of a factor, nothing is said of zero."""
    effect = PairedDifferences([-2.0, -2.1, -1.9])
    for sign, said in ((1, "on the other side of 2."), (-1, "the interval lies beyond 2 on the claimed side.")):
        found = Evidence(PairedDifferences([sign * x for x in effect.differences]), 0.0, origin="2", beyond="2")
        assert judge({"a": found})["a"].why.endswith(said)
    wide = Evidence(PairedDifferences([-1.0, 1.2, 0.1]), 0.0, origin="2", beyond="2")
    assert "its interval includes 2." in judge({"a": wide})["a"].why
