"""What committed results say of a variant beside its dense twin, over several pairs of seeds."""

from __future__ import annotations

from pathlib import Path

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
    found = []
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        arms = result["arms"]
        as_it_is = result["variant"] == variant and all(key.startswith("evaluate.") for key in result["settings"])
        for claim in result["claims"]:
            sides = [arms.get(claim[name] or "", {}) for name in ("arm", "against")]
            settings = [side.get("settings") for side in sides]
            trained = not any(side.get("of") for side in sides)
            if as_it_is and settings == [{}, _DENSE] and trained and claim["pairs"]:
                found.append(
                    f"Over {claim['pairs']} pairs of seeds, {claim['metric']} differs by {ours(claim)} (95 % interval) "
                    f"from the dense twin's: {claim['verdict']}, table {result['table']}."
                )
    return found
