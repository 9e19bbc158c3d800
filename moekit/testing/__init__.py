"""Test harness for moekit and for what you build on it: contract checks, closeness, several processes.

Does your own router obey every rule that the package relies on? With pytest:

    from moekit.testing import ROUTER_CHECKS

    @pytest.mark.parametrize("check", ROUTER_CHECKS, ids=lambda check: check.__name__)
    def test_my_router(check):
        check(lambda: MyRouter(dim=8, num_experts=4))

or all at once, ``check_router(lambda: MyRouter(dim=8, num_experts=4))``. A check takes a factory, builds what it
needs and raises AssertionError with the rule that was broken. Routers must have the attribute ``dim`` (the width of
their input); one that reads ids may have ``vocab_size`` and ``num_tasks``. `EXPERTS_CHECKS` and `DISPATCHER_CHECKS`
do the same for expert banks and dispatchers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from moekit.dispatch import Dispatcher
from moekit.experts.base import Experts
from moekit.routing import Router
from moekit.testing.cases import random_routing, seeded, skewed_tokens, some_context, some_mask, trace
from moekit.testing.closeness import TOLERANCES, assert_close, assert_same
from moekit.testing.dispatchers import DISPATCHER_CHECKS
from moekit.testing.distributed import JoinedProcesses, run_distributed
from moekit.testing.experts import EXPERTS_CHECKS
from moekit.testing.routers import ROUTER_CHECKS
from moekit.testing.routing import check_routing

T = TypeVar("T")

__all__ = [
    "DISPATCHER_CHECKS",
    "EXPERTS_CHECKS",
    "ROUTER_CHECKS",
    "TOLERANCES",
    "JoinedProcesses",
    "assert_close",
    "assert_same",
    "check_dispatcher",
    "check_experts",
    "check_router",
    "check_routing",
    "random_routing",
    "run_distributed",
    "seeded",
    "skewed_tokens",
    "some_context",
    "some_mask",
    "trace",
]


def check_router(factory: Callable[[], Router]) -> None:
    """Run every router check on what `factory` builds.

    Raises:
        AssertionError: listing every check that failed, with the rule that was broken.
    """
    _run_all(ROUTER_CHECKS, factory)


def check_experts(factory: Callable[[], Experts]) -> None:
    """Run every expert-bank check on what `factory` builds; raises as `check_router` does."""
    _run_all(EXPERTS_CHECKS, factory)


def check_dispatcher(factory: Callable[[], Dispatcher]) -> None:
    """Run every dispatcher check on what `factory` builds; raises as `check_router` does."""
    _run_all(DISPATCHER_CHECKS, factory)


def _run_all(checks: Sequence[Callable[[Callable[[], T]], None]], factory: Callable[[], T]) -> None:
    broken = []
    for check in checks:
        try:
            check(factory)
        except AssertionError as error:
            broken.append(f"{check.__name__}: {error}")
    if broken:
        raise AssertionError(f"{len(broken)} of {len(checks)} checks failed.\n" + "\n".join(broken))
