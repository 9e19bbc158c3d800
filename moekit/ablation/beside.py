"""Variants beside their dense twins, on the page of each recipe and on that of all claims: made of results alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.ablation.measures import floor_of
from moekit.ablation.pages import asked, link_to, ours, table_of, value_words
from moekit.ablation.pairs import twin_claims
from moekit.atomic import write_text
from moekit.errors import UserError
from moekit.shell import NAME
from moekit.wording import counted

BEGIN = (
    f"<!-- From here on written by `{NAME} ablate --claims` from results/ablations/*.json; edits of it are lost. -->"
)
END = "<!-- To here. -->"
PAGE = "README.md"
_PLAIN = "tiny"
"""The variant of each recipe on text without knowledge."""


def write_parts(recipes: Path, results: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Write that part of the page of every recipe whose page marks a place for it; returns these pages.

    Args:
        recipes: the folder of the recipes' folders.
        results: results of tables by ``RECIPE/TABLE``.

    Raises:
        UserError: a page has one mark without the other.
    """
    found = []
    for path in sorted(recipes.glob(f"*/{PAGE}")):
        page = path.read_text(encoding="utf-8")
        if BEGIN in page or END in page:
            write_text(path, with_part(page, path.parent.name, results, str(path)))
            found.append(path)
    return found


def with_part(page: str, recipe: str, results: Mapping[str, Mapping[str, Any]], where: str = PAGE) -> str:
    """A page with what lies between its two marks made anew.

    Raises:
        UserError: the marks are not there, each once and in order; `where` begins the message.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise UserError(f"{where}: must have {BEGIN!r} and, after it, {END!r}, each once. Put them there.")
    return f"{before}{BEGIN}\n\n{_part(recipe, results)}\n\n{END}{after}"


def all_beside(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The part of the page of claims: each variant by the first claim of its table, which is of the loss."""
    found = [(result, claims[0]) for result in results.values() if (claims := twin_claims(result))]
    if not found:
        return ""
    rows = [
        [
            f"{result['recipe']}, `{result['variant']}`",
            *_figures(claim),
            str(claim["pairs"]),
            "".join([claim["verdict"], *_reservations(result)]),
            link_to(result),
        ]
        for result, claim in found
    ]
    headers = ["recipe, variant", "loss", "sparse", "dense", "difference, 95 % interval", "pairs", "verdict", ""]
    plain = [(result, claim) for result, claim in found if result["variant"] == _PLAIN]
    knowing = [(result, claim) for result, claim in found if result["variant"] != _PLAIN]
    return (
        "## Sparse models beside their dense twins\n\n"
        "A dense twin has the operations for a token of the sparse model, and its text, steps and seeds. The variants "
        "`facts` and `lexicon` are of text that holds more facts, or words of languages, than a dense model of that "
        "size learns: [knowledge](guides/knowledge.md); there each has the best learning rate of one grid, by other "
        f"seeds. {_sides(knowing)} The variants `{_PLAIN}` are of text of a grammar and two hundred words. "
        f"{_sides(plain)}\n\n" + table_of(headers, rows)
    )


def _sides(found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """On whose side the whole interval lies, of how many recipes."""
    if not found:
        return "None is measured so."
    ahead: dict[str, list[str]] = {"sparse": [], "dense": []}
    for result, claim in found:
        low, high = claim["interval"]
        if low > 0 or high < 0:
            better = high < 0 if claim["direction"] == "lower" else low > 0
            ahead["sparse" if better else "dense"].append(result["recipe"])
    named = {side: f" ({', '.join(names)})" if names else "" for side, names in ahead.items()}
    said = [f"on the {side} side in {len(names)}{named[side]}" for side, names in ahead.items()]
    return f"Of {counted(len(found), 'recipe')} the whole interval lies {', and '.join(said)}."


def _figures(claim: Mapping[str, Any]) -> list[str]:
    """The metric, its means of the two models, and their difference."""
    means = [value_words(claim["means"][claim[side]]) for side in ("arm", "against")]
    return [f"`{claim['metric']}`", *means, ours(claim)]


def _reservations(result: Mapping[str, Any]) -> Iterator[str]:
    """What to know of a verdict, each to be written after it."""
    if _lacks_control(result):
        yield ", as the negative control is not shown to hold"
    if not _same_work(result):
        yield ", at unequal work"


def _same_work(result: Mapping[str, Any]) -> bool:
    """Whether a table asks for equal work; of a sparse model whose work changes in training it does not."""
    return "work" in result["matched"]


def _lacks_control(result: Mapping[str, Any]) -> bool:
    """Whether there is a negative control that is not shown to hold."""
    return bool(result["control"].get("verdict", "reproduced") != "reproduced")


def _part(recipe: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    measured = [
        _of_table(result, claims)
        for result in results.values()
        if result["recipe"] == recipe and (claims := twin_claims(result))
    ]
    if not measured:
        return f"No variant has been measured beside its dense twin over several seeds yet: see `{NAME} ablate --list`."
    return "\n\n".join(measured)


def _of_table(result: Mapping[str, Any], claims: list[Mapping[str, Any]]) -> str:
    name = result["table"].rpartition("/")[2]
    rates = "each at the best learning rate of one grid, " if result["learning_rates"] else ""
    pairs = counted(max(claim["pairs"] for claim in claims), "pair")
    rows = [[*_figures(claim), f"**{claim['verdict']}**"] for claim in claims]
    parts = [
        f"{result['title']}, variant `{result['variant']}` and its dense twin, {rates}over {pairs} of seeds "
        f"([the table](results/ablations/{name}.md), made by `{NAME} ablate {result['table']}`):",
        table_of(["", "sparse", "dense", "difference, 95 % interval", "verdict"], rows),
        " ".join(filter(None, [_floor(result, claims[0]), _work(result), _control(result)])),
    ]
    return "\n\n".join(part for part in parts if part)


def _floor(result: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    """What a model that knows everything would lose, where that is known."""
    runs = [run["metrics"] for run in result["arms"][claim["arm"]]["runs"].values()]
    key = floor_of(claim["metric"])
    known = [metrics[key] for metrics in runs if key in metrics]
    return f"A model that knows everything would lose {value_words(statistics.fmean(known))}." if known else ""


def _work(result: Mapping[str, Any]) -> str:
    if _same_work(result):
        return ""
    return "The work of the two is not equal: the table says why."


def _control(result: Mapping[str, Any]) -> str:
    control = result["control"]
    if "none" in control:
        return ""
    holds = "is not shown to hold, so that all is inconclusive" if _lacks_control(result) else "holds"
    return f"The negative control {holds}: {ours(control)}, {asked(control)}."
