"""The list of claims, and the page that is made of it and of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from small_tables import TABLE, changed, run, write_table

from moekit.ablation.beside import BEGIN, END, with_part
from moekit.ablation.claims import claims_page, read_claims
from moekit.ablation.pages import markdown
from moekit.ablation.session import CLAIMS, committed_results, write_claims
from moekit.ablation.table import RECIPES, read_table, table_files
from moekit.ablation.verdict import VERDICTS
from moekit.errors import UserError

LISTED = read_claims(RECIPES / CLAIMS)
RESULTS = committed_results(RECIPES)
LIST = """
"A paper (2020)":
  many-better: {section: table 1, claim: More experts are better., published: "0.4", tier: A}
  unasked: {claim: Fewer layers | are worse., tier: B}
"Another (2021)":
  too-large: {claim: A trillion parameters are better., published: "7", tier: D, reason: a trillion parameters}
"""


def test_the_page_is_what_list_and_results_make() -> None:
    """`moekit ablate --claims` writes it; nothing is typed in."""
    page = RECIPES.parent / "docs" / "claims.md"
    assert page.read_text(encoding="utf-8") == claims_page(LISTED, RESULTS)


@pytest.mark.parametrize("page", sorted(RECIPES.glob("*/README.md")), ids=lambda page: page.parent.name)
def test_pages_of_recipes_say_of_dense_twins_what_results_make(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == with_part(text, page.parent.name, RESULTS)


@pytest.mark.parametrize("page", sorted(RECIPES.glob("*/README.md")), ids=lambda page: page.parent.name)
def test_what_pages_of_recipes_call_not_measured_yet_has_no_result(page: Path) -> None:
    for row in page.read_text(encoding="utf-8").splitlines():
        for recipe, name in re.findall(r"\((?:\.\./(\w+)/)?ablations/(\w+)\.yaml\)[^|]*?not measured yet", row):
            assert f"{recipe or page.parent.name}/{name}" not in RESULTS, row


def test_the_list_holds_every_paper_and_tier() -> None:
    assert len(LISTED) >= 60
    assert {claim.tier for claim in LISTED} == {"A", "B", "C", "D"}
    assert len({claim.paper for claim in LISTED}) >= 11
    for claim in LISTED:
        assert claim.claim.endswith("."), claim.id
        assert (claim.tier == "D") == bool(claim.reason), claim.id


def test_every_claim_that_can_be_tested_has_a_table() -> None:
    asked = {id for path in table_files().values() for id in read_table(path).claims}
    assert {claim.id for claim in LISTED if claim.tier != "D"} - asked <= {"SW-dense"}


def test_tables_ask_what_is_listed_or_say_it_themselves() -> None:
    known = {claim.id: claim for claim in LISTED}
    for path in table_files().values():
        for question in read_table(path).claims.values():
            assert question.id in known or question.claim, f"{path}: {question.id}"
            assert question.id not in known or known[question.id].tier != "D", question.id


@pytest.mark.parametrize("name", RESULTS)
def test_committed_results_are_of_the_tables_as_they_stand(name: str) -> None:
    """The hypothesis, the arms and the question are those that were written before the run."""
    found, table = RESULTS[name], read_table(table_files()[name])
    assert found["seeds"] == list(table.seeds)
    assert found["settings"] == dict(table.settings)
    assert {arm: got["settings"] for arm, got in found["arms"].items()} == {
        arm: dict(made.settings) for arm, made in table.arms.items()
    }
    assert [claim["id"] for claim in found["claims"]] == list(table.claims)
    for claim in found["claims"]:
        asked = table.claims[claim["id"]]
        for key in ("kind", "hypothesis", "metric", "arm", "smallest"):
            assert claim[key] == getattr(asked, key), (claim["id"], key)
        assert claim["verdict"] in VERDICTS
    page = RECIPES / found["recipe"] / "results" / "ablations" / f"{name.partition('/')[2]}.md"
    assert page.read_text(encoding="utf-8") == markdown(found)


def test_results_are_there() -> None:
    """So that no test above passes for want of them."""
    assert RESULTS


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder of recipes with a list of three claims."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (tmp_path / "docs").mkdir()
    (recipes / CLAIMS).write_text(LIST)
    return recipes


def test_a_claim_from_list_to_page(checkout: Path, tmp_path: Path) -> None:
    write_claims(checkout)
    page = (tmp_path / "docs" / "claims.md").read_text()
    assert "| not measured yet | 2 |" in page
    assert "| not testable here | 1 |" in page
    assert "A trillion parameters are better. Tier D. | 7 |" in page
    assert "a trillion parameters |" in page
    assert r"Fewer layers \| are worse." in page
    folder = checkout / "moe_lm" / "ablations"
    extra: dict[str, Any] = TABLE["claims"][0] | {"id": "of-the-method", "claim": "Ours alone."}
    path = write_table(folder, changed(claims=[TABLE["claims"][0], extra]), "size")
    found, _ = run(path, tmp_path / "runs", out=checkout / "moe_lm" / "results" / "ablations")
    assert found is not None
    write_claims(checkout)
    page = (tmp_path / "docs" / "claims.md").read_text()
    assert "| reproduced | 1 | many-better |" in page
    assert "Believe, for small models:\n\n- More experts are better. (many-better)" in page
    row = next(line for line in page.splitlines() if line.startswith("| many-better "))
    assert "More experts are better. (table 1) Tier A." in row
    assert "-0.1414 [-0.1414, -0.1414]" in row
    assert "../recipes/moe_lm/results/ablations/size.md" in row
    assert "| of-the-method | Ours alone. |" in page


def test_the_better_founded_of_two_answers_counts(checkout: Path) -> None:
    """That with more pairs, then the more precise one, in whatever order they are read; the other is shown too."""

    def answer(table: str, pairs: int, low: float, verdict: str) -> dict[str, Any]:
        claim = {
            "id": "many-better", "claim": "", "hypothesis": table, "kind": "better", "metric": "m", "arm": "a",
            "against": "b", "direction": "lower", "smallest": 0.1, "bound": None, "pairs": pairs, "verdict": verdict,
            "difference": -1.0, "interval": [low, -0.5],
        }  # fmt: skip
        return {
            "table": f"moe_lm/{table}", "recipe": "moe_lm", "claims": [claim], "made": {"minutes": 3.0},
            "settings": {"model.dim": 8},
        }  # fmt: skip

    few, wide, narrow = (
        answer("few", 5, -0.6, "direction only"),
        answer("wide", 8, -2.0, "reproduced"),
        answer("narrow", 8, -1.5, "contradicted"),
    )
    for order in ([few, wide, narrow], [narrow, few, wide], [wide, narrow, few]):
        page = claims_page(read_claims(checkout / CLAIMS), {each["table"]: each for each in order})
        assert "| contradicted | 1 | many-better |" in page
        assert "Do not believe, for small models:" in page
        assert "| reproduced |" not in page.split("\n\n## ")[0]
        others = page.split("claims that were asked twice\n")[1]
        assert [word for word in ("few", "wide", "narrow") if f"| many-better | {word} |" in others] == ["few", "wide"]


def beside_twin(recipe: str, high: float, settings: dict[str, Any], control: str) -> dict[str, Any]:
    """A result with two claims, whose interval ends there."""
    claim = {
        "id": f"OURS-{recipe}", "claim": "", "hypothesis": "h", "kind": "better", "metric": "test.causal_lm.loss",
        "arm": "a", "against": "b", "direction": "lower", "smallest": 0.1, "bound": None, "pairs": 5,
        "verdict": "inconclusive", "difference": -1.0, "interval": [-2.0, high], "means": {"a": 1.0, "b": 2.0},
    }  # fmt: skip
    floors = ({"floors.causal_lm.test.knowing": 0.25}, {"floors.causal_lm.test.knowing": 0.75})
    runs = {str(seed): {"metrics": metrics} for seed, metrics in enumerate(floors)}
    return {
        "table": f"{recipe}/size", "title": "Many", "recipe": recipe, "variant": "facts", "settings": settings,
        "arms": {"a": {"settings": {}, "runs": runs}, "b": {"settings": {"model.num_experts": 0}, "runs": runs}},
        "claims": [claim] * 2, "control": {**claim, "verdict": control, "interval": [-2.0, 2.0]},
        "made": {"minutes": 3.0}, "learning_rates": None, "matched": ["work", "tokens"],
    }  # fmt: skip


def test_the_part_of_a_recipes_page() -> None:
    results = {"moe_lm/size": beside_twin("moe_lm", -0.5, {}, "reproduced")}
    page = f"# A\n\n{BEGIN}\nof yesterday\n{END}\n\n## B\n"
    made = with_part(page, "moe_lm", results)
    assert made.startswith(
        f"# A\n\n{BEGIN}\n\nMany, variant `facts` and its dense twin, over 5 pairs of seeds ([the table]"
    )
    assert made.endswith(f"{END}\n\n## B\n")
    assert "| `test.causal_lm.loss` | 1 | 2 | -1 [-2, -0.5] | **inconclusive** |" in made
    assert "A model that knows everything would lose 0.5. The negative control holds: -1 [-2, +2]," in made
    assert "of yesterday" not in made
    assert "not equal" not in made
    unequal = with_part(page, "moe_lm", {"moe_lm/size": results["moe_lm/size"] | {"matched": ["tokens"]}})
    assert "0.5. The work of the two is not equal: the table says why. The negative control holds" in unequal
    assert with_part(made, "moe_lm", results) == made
    assert "No variant has been measured beside its dense twin" in with_part(made, "switch", results)
    for bad in ("# A\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", page + page):
        with pytest.raises(UserError, match=r"README\.md: must have .* each once"):
            with_part(bad, "moe_lm", results)


def test_variants_beside_their_dense_twins(checkout: Path) -> None:
    """Those as they are, by the first claim; the interval decides who is ahead, not the verdict."""
    results = [
        beside_twin("moe_lm", -0.5, {"evaluate.samples": 0}, "reproduced"),
        beside_twin("switch", -0.1, {}, "inconclusive"),
        beside_twin("gshard", 0.1, {}, "reproduced") | {"matched": ["tokens"]},
        beside_twin("st_moe", -0.1, {"model.dim": 8}, "reproduced"),
        beside_twin("base_layers", 2.0, {}, "reproduced") | {"variant": "tiny"},
    ]
    results[-1]["claims"][0]["interval"] = [0.5, 2.0]
    page = claims_page(read_claims(checkout / CLAIMS), {each["table"]: each for each in results})
    section = page.split("## Sparse models beside their dense twins")[1].split("\n\n## ")[0]
    told = "Of 3 recipes the whole interval lies on the sparse side in 2 (moe_lm, switch), and on the dense side in 0."
    assert told in section
    assert "Of 1 recipe the whole interval lies on the sparse side in 0, and on the dense side in 1 (base_" in section
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert [row.split(",")[0] for row in rows] == ["| moe_lm", "| switch", "| gshard", "| base_layers"]
    assert "| 1 | 2 | -1 [-2, -0.5] | 5 | inconclusive | [" in rows[0]
    assert "inconclusive, as the negative control is not shown to hold |" in rows[1]
    assert "inconclusive, at unequal work |" in rows[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"P":\n  a: {claim: X., tier: E}', r"P\.a\.tier: must be one of A, B, C, D: got 'E'"),
        ('"P":\n  a: {claim: X., tier: D}', r"P\.a\.reason: is missing"),
        ('"P":\n  a: {claim: X., tier: A, reason: none}', r"P\.a\.reason: unknown key"),
        ('"P":\n  a: {claim: X., tier: A}\n"Q":\n  a: {claim: Y., tier: A}', r"'a' is there twice"),
        ('"P":\n  a: [1]', r"P\.a: must be a mapping"),
    ],
)
def test_bad_lists_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / CLAIMS
    path.write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        read_claims(path)
    assert str(path) in str(refused.value)


def test_without_a_checkout_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--claims needs moekit's checkout"):
        write_claims(tmp_path / "wheel")
