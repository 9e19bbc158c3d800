"""What results say of a variant beside its dense twin, over several pairs of seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.ablation.pages import ours
from moekit.ablation.result import read_result
from moekit.ablation.table import RECIPES

_DENSE = {"model.num_experts": 0}


def known_pairs(recipe: str, variant: str, recipes: Path | None = None) -> list[str]:
    """A sentence for each claim of a committed result that compares a variant as it is with its dense twin.

    Args:
        recipe: its name.
        variant: of it.
        recipes: where results lie; None = the checkout's, of which an installed package has none.

    Raises:
        UserError: a result cannot be read.
    """
    folder = (RECIPES if recipes is None else recipes) / recipe / "results" / "ablations"
    results = [read_result(path) for path in sorted(folder.glob("*.json"))]
    return [
        f"Over {claim['pairs']} pairs of seeds, {claim['metric']} differs by {ours(claim)} (95 % interval) "
        f"from the dense twin's: {claim['verdict']}, table {result['table']}."
        for result in results
        if result["variant"] == variant
        for claim in twin_claims(result)
    ]


def twin_claims(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The claims of a result that compare its variant, as it is, with that variant's dense twin."""
    if not all(key.startswith("evaluate.") for key in result["settings"]):
        return []
    arms = result["arms"]
    found = []
    for claim in result["claims"]:
        sides = [arms.get(claim[name] or "", {}) for name in ("arm", "against")]
        trained = not any(side.get("of") for side in sides)
        if [side.get("settings") for side in sides] == [{}, _DENSE] and trained and claim["pairs"]:
            found.append(claim)
    return found
