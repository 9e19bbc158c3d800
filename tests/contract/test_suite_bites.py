"""The contract suite itself: what is sound passes, and each broken rule is found by its check, in plain words."""

from __future__ import annotations

import broken
import pytest

from moekit import dispatch
from moekit.testing import (
    DISPATCHER_CHECKS,
    EXPERTS_CHECKS,
    ROUTER_CHECKS,
    check_dispatcher,
    check_experts,
    check_router,
)

ROUTERS = [
    (broken.RoutesPadding, "check_invariants", "assignments of padding are queued"),
    (broken.LeavesGaps, "check_invariants", "must be 0..n-1, each once"),
    (broken.Overfills, "check_invariants", "an expert keeps .* assignments, capacity is"),
    (broken.NegativeWeights, "check_invariants", "weights must be finite and not negative"),
    (broken.LosesGradient, "check_invariants", "statistic 'mass' carries a gradient"),
    (broken.VectorLoss, "check_invariants", "'mine' must be a scalar"),
    (broken.DividesByZero, "check_edge_batches", "no token|NaN|0 tokens"),
    (broken.MultipliesByMask, "check_padding_content", "with NaN in the padding"),
    (broken.CountsPadding, "check_more_padding", "adding padding changes results: loss mine"),
    (broken.PrefersEarly, "check_order_of_tokens", "tokens in another order"),
    (broken.DecodesOtherwise, "check_decoding", "changes the routing's `expert`"),
    (broken.NoisyEvaluation, "check_randomness", "evaluation draws random numbers"),
    (broken.OwnGenerator, "check_randomness", "training does not follow torch.manual_seed"),
    (broken.ImposesItself, "check_imposed", "imposed must keep the `expert` of the choice"),
    (broken.ImposesOtherWeights, "check_imposed", "must give the same `weight` to the last digit"),
    (broken.PeeksAhead, "check_future", "set looks_ahead = True"),
    (broken.LowPrecision, "check_low_precision", "the router computes in low precision"),
    (broken.Recomputed, "check_checkpointing", "checkpointing"),
    (broken.BreaksGraph, "check_compiles", "does not compile to one graph"),
    (broken.NoSource, "check_has_a_source", "has no `Source:` line"),
    (broken.Unpicklable, "check_copies", "cannot be pickled"),
    (broken.Forgetful, "check_state_dict", "after load_state_dict a module computes something else"),
    (broken.HalfReset, "check_meta_device", "offset is left uninitialised by reset_parameters"),
    (broken.Counts, "check_forward_stores_nothing", "forward changes the buffer load"),
    (broken.Stores, "check_forward_stores_nothing", "forward sets loss"),
    (broken.Appends, "check_forward_stores_nothing", "forward changes seen"),
    (broken.NoDim, "check_invariants", "set `self.dim`"),
]
EXPERTS = [
    (broken.UnnamedAxes, "check_axes", "does not name the parameter b_in"),
    (broken.WrongAxes, "check_axes", r"has 2 names .* for a parameter of shape \(4, 8, 6\)"),
    (broken.ExpertElsewhere, "check_axes", "has 8 entries along its expert axis"),
    (broken.PackedWithoutBias, "check_packed_equals_reference", "packed forward differs .*: output"),
    (broken.PaddedGradient, "check_padded_equals_reference", "padded forward differs .*: gradient of x"),
    (broken.TouchesIdle, "check_no_rows", "gradient of b_in"),
    (broken.MixesRows, "check_row_independence", "changing one row changes the results of others"),
    (broken.DropsInEvaluation, "check_row_independence", "two forwards in evaluation differ"),
    (broken.Widens, "check_low_precision", "must return bf16 on bf16 rows"),
    (broken.BankBreaksGraph, "check_compiles", "does not compile to one graph"),
]
DISPATCHERS = [
    (broken.IgnoresWeights, "check_equals_reference", "k=1.*: gradient of weight"),
    (broken.TrustsTheList, "check_any_list", "another order|unequal numbers"),
    (broken.WrongCounts, "check_rows", "counts must be Int64"),
    (broken.SpillsIntoSlots, "check_rows", "a slot without a token must hold zeros"),
    (broken.KeepsResidual, "check_identity", "a token of which nothing was kept must get zeros"),
    (broken.MultipliesDropped, "check_masked_content", "NaN in rows that are not kept leaks"),
    (broken.KeepsResidual, "check_edge_sizes", "nothing kept"),
    (broken.HalfCombine, "check_combine_is_wide", "must return float32"),
]


def named(checks: tuple, name: str):  # type: ignore[type-arg, no-untyped-def]
    return next(check for check in checks if check.__name__ == name)


@pytest.mark.parametrize(("cls", "check", "message"), ROUTERS, ids=lambda value: getattr(value, "__name__", None))
def test_broken_router_is_found(cls: type, check: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        named(ROUTER_CHECKS, check)(cls)


@pytest.mark.parametrize(("cls", "check", "message"), EXPERTS, ids=lambda value: getattr(value, "__name__", None))
def test_broken_bank_is_found(cls: type, check: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        named(EXPERTS_CHECKS, check)(cls)


@pytest.mark.parametrize(("cls", "check", "message"), DISPATCHERS, ids=lambda value: getattr(value, "__name__", None))
def test_broken_dispatcher_is_found(cls: type, check: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        named(DISPATCHER_CHECKS, check)(cls)


def test_what_is_sound_passes() -> None:
    """The base classes of the broken ones pass all checks at once, so it is the break that is found above."""
    check_router(broken.Sound)
    check_experts(broken.Bank)
    check_dispatcher(dispatch.PackedDispatcher)


def test_all_at_once_lists_what_is_broken() -> None:
    with pytest.raises(AssertionError, match=r"1 of 18 checks failed.\ncheck_has_a_source: NoSource has no `Source:`"):
        check_router(broken.NoSource)
    with pytest.raises(AssertionError, match=r"(?s)2 of 13 checks failed.\ncheck_low_precision.*\ncheck_has_a_source"):
        check_experts(_Both)
    with pytest.raises(AssertionError, match=r"(?s)check_equals_reference: .*\ncheck_identity: "):
        check_dispatcher(broken.IgnoresWeights)


class _Both(broken.Widens):
    """No citation, and too wide."""
