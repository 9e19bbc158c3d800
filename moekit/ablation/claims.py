"""Every claim of the papers, and the page that says what became of each: made of a list and of results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moekit.ablation.beside import all_beside
from moekit.ablation.pages import MISSING, asked, link_to, ours, table_of
from moekit.ablation.part import Part
from moekit.ablation.verdict import VERDICTS, count_verdicts
from moekit.runs.yaml_file import read_mapping

Tier = Literal["A", "B", "C", "D"]

TIERS: Mapping[str, str] = {
    "A": "clear in minutes, with five seeds",
    "B": "a direction, with eight seeds and a wide interval",
    "C": "an equality only",
    "D": "not testable on a small machine",
}
UNMEASURED = "not measured yet"
UNTESTABLE = "not testable here"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of a paper.

    Attributes:
        id: its name in tables.
        paper: whose it is.
        section: where it stands there.
        claim: what is claimed, in our words.
        published: the paper's number, "" where it gives none.
        tier: how far a small machine can test it: see `TIERS`.
        reason: of tier D, why it cannot be tested here.
    """

    id: str
    paper: str
    section: str
    claim: str
    published: str
    tier: Tier
    reason: str


def read_claims(path: Path) -> list[Claim]:
    """The list of claims: a mapping from papers, as the page names them, to the claims of each by id.

    Raises:
        UserError: naming the file and the key that is at fault.
    """
    found: list[Claim] = []
    top = Part(read_mapping(path, "the list of claims"), str(path))
    for paper in top.values:
        for id, part in top.parts(paper).items():
            tier: Tier = part.one_of("tier", part.text("tier"), Tier)
            claim = Claim(
                id=id,
                paper=paper,
                section=part.text("section", ""),
                claim=part.text("claim"),
                published=part.text("published", ""),
                tier=tier,
                reason=part.text("reason") if tier == "D" else "",
            )
            part.end()
            if any(id == other.id for other in found):
                raise part.fault("claim", f"{id!r} is there twice")
            found.append(claim)
    return found


def listed_words(claims: Sequence[Claim]) -> dict[str, dict[str, str]]:
    """The words of claims by id, as results take them."""
    return {claim.id: {k: v for k, v in asdict(claim).items() if k in _WORDS} for claim in claims}


_WORDS = ("claim", "paper", "section", "published")


def claims_page(claims: Sequence[Claim], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: what to believe, then a row for each claim.

    Args:
        claims: the list.
        results: results of tables by ``RECIPE/TABLE``.
    """
    answers = _answers(claims, results)
    parts = [
        "# What the papers claim, and what was measured",
        "<!-- Written by `moekit ablate --claims` from recipes/claims.yaml and recipes/*/results/ablations/*.json; "
        "edits here are lost. -->",
        _first_screen(claims, answers),
        all_beside(results),
        *_papers(claims, answers),
        _others(answers, results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _answers(
    claims: Sequence[Claim], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """By id the answer, and the result that it is of; of several, the one with most pairs, then the most precise."""
    found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for result in results.values():
        for answer in result["claims"]:
            if answer["id"] not in found or _precision(found[answer["id"]][0]) < _precision(answer):
                found[answer["id"]] = (answer, result)
    return {claim.id: found[claim.id] for claim in claims if claim.id in found}


def _precision(answer: Mapping[str, Any]) -> tuple[int, float]:
    """What orders answers to a claim, whatever they say."""
    low, high = answer["interval"] or (-math.inf, math.inf)
    return answer["pairs"], low - high


def verdict_of(claim: Claim, answers: Mapping[str, Any]) -> str:
    """The verdict of a claim, or why there is none."""
    if claim.id in answers:
        return str(answers[claim.id][0]["verdict"])
    return UNTESTABLE if claim.tier == "D" else UNMEASURED


def _first_screen(claims: Sequence[Claim], answers: Mapping[str, Any]) -> str:
    verdicts = [verdict_of(claim, answers) for claim in claims]
    counts = count_verdicts(verdicts)
    counts |= {UNMEASURED: verdicts.count(UNMEASURED)} if UNMEASURED in verdicts else {}
    rows = []
    for verdict in (*VERDICTS, UNMEASURED):
        if verdict in counts:
            ids = [claim.id for claim, said in zip(claims, verdicts, strict=True) if said == verdict]
            listed = ", ".join(ids) if verdict not in (UNTESTABLE, UNMEASURED) else ""
            rows.append(f"| {verdict} | {counts[verdict]} | {listed} |")
    measured = len(answers)
    return (
        f"{len(claims)} claims of papers on Mixture-of-Experts, of which {measured} "
        f"{'is' if measured == 1 else 'are'} measured so far. A verdict follows from "
        "numbers by a [rule](guides/ablate.md#the-rule) that was written before them: paired seeds, 95 % intervals, "
        "a smallest effect of interest for each claim, and a negative control in each table. It is about models of a "
        "few million parameters on generated text: a claim that is not reproduced here may hold at scale.\n\n"
        "| verdict | claims | which |\n| --- | --- | --- |\n" + "\n".join(rows) + f"\n\n{_believe(claims, answers)}"
    )


def _believe(claims: Sequence[Claim], answers: Mapping[str, Any]) -> str:
    """What a reader should believe: the claims that were shown, and those that were shown not to hold."""
    lines = []
    for verdict, heading in (
        ("reproduced", "Believe, for small models:"),
        ("contradicted", "Do not believe, for small models:"),
        (
            "direction only",
            "On the claimed side, and no more; half of all claims without effect would be here:",
        ),
    ):
        said = [claim for claim in claims if verdict_of(claim, answers) == verdict]
        if said:
            lines += [heading, "", *(f"- {claim.claim} ({claim.id})" for claim in said), ""]
    lines.append("Everything else on this page is open, or beyond a small machine.")
    return "\n".join(lines)


def _papers(claims: Sequence[Claim], answers: Mapping[str, Any]) -> list[str]:
    found = []
    headers = [
        "claim",
        "",
        "the paper",
        "here, 95 % interval",
        "verdict",
        "pairs of seeds",
        "minutes",
        "table, or why not",
    ]
    for paper in dict.fromkeys(claim.paper for claim in claims):
        rows = [_row(claim, answers) for claim in claims if claim.paper == paper]
        found.append(f"## {paper}\n\n" + table_of(headers, rows))
    tiers = "; ".join(f"{tier}: {words}" for tier, words in TIERS.items())
    return [
        "## How to read what follows\n\n"
        f"Tiers say how far a small machine can go: {tiers}. Minutes are of one processor, for the whole table, which "
        "may answer several claims. `moekit ablate TABLE` makes it again.",
        *found,
    ]


def _row(claim: Claim, answers: Mapping[str, Any]) -> list[str]:
    where = f" ({claim.section})" if claim.section else ""
    first = [claim.id, f"{claim.claim}{where} Tier {claim.tier}.", claim.published or MISSING]
    if claim.id not in answers:
        why = claim.reason if claim.tier == "D" else ""
        return [*first, MISSING, verdict_of(claim, answers), MISSING, MISSING, why or MISSING]
    answer, result = answers[claim.id]
    measured = f"{ours(answer)}: {asked(answer)}"
    minutes = f"{result['made']['minutes']:.0f}"
    return [*first, measured, answer["verdict"], str(answer["pairs"]), minutes, link_to(result)]


def _others(answers: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """What tables show beside: of the method itself, mostly; and of a paper's claim that another table says more of."""
    rows = []
    for result in results.values():
        for answer in result["claims"]:
            if answer["id"] not in answers or answers[answer["id"]][0] is not answer:
                words, measured = answer["claim"] or answer["hypothesis"], f"{ours(answer)}: {asked(answer)}"
                rows.append([answer["id"], words, measured, answer["verdict"], str(answer["pairs"]), link_to(result)])
    if not rows:
        return ""
    headers = ["check", "", "here, 95 % interval", "verdict", "pairs of seeds", "table"]
    return "## Checks of the method, and claims that were asked twice\n\n" + table_of(headers, rows)
