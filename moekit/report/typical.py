"""What each expert likes: the pieces of the vocabulary that it gets more often than their frequency explains."""

from __future__ import annotations

import contextlib

from moekit.report import wording
from moekit.report.run_folder import RunFolder
from moekit.report.view import Figure, Table, caption
from moekit.runs.record import ExpertRecord, TypicalPiece

_MAX_ROWS = 64  # experts of all layers that a page shows
_MAX_PIECES = 8


def typical(run: RunFolder) -> dict[str, list[ExpertRecord]]:
    """Experts with typical pieces by layer, as routing.json has them; none of former versions."""
    found: dict[str, list[ExpertRecord]] = {}
    for number, layer in enumerate(run.layers):
        said = layer.get("typical")
        for entry in said if isinstance(said, list) else ():
            with contextlib.suppress(ValueError):
                expert = ExpertRecord.from_json(entry)
                found.setdefault(str(layer.get("name") or f"layer {number}"), []).append(expert)
    return {name: experts for name, experts in found.items() if any(expert.pieces for expert in experts)}


def typical_table(run: RunFolder) -> Table:
    """One row for each expert; of many, in each layer those that like something most."""
    layers = typical(run)
    rows = []
    for name, experts in layers.items():
        keenest = sorted(experts, key=lambda expert: -max((piece.lift for piece in expert.pieces), default=0))
        shown = keenest[: max(1, _MAX_ROWS // len(layers))]
        rows += [
            (f"{name}, expert {expert.expert}", " \u00b7 ".join(map(_said, expert.pieces[:_MAX_PIECES])))
            for expert in sorted(shown, key=lambda expert: expert.expert)
        ]
    return Table(["expert", "typical pieces"], rows, "What experts like", kind="text")


def typical_figure(run: RunFolder) -> Figure | None:
    """The table with what it shows; None where nobody counted."""
    table, every = typical_table(run), sum(len(experts) for experts in typical(run).values())
    left_out = f" Shown are {len(table.rows)} of {every} experts." if len(table.rows) < every else ""
    return Figure(*caption("typical", left_out=left_out), table=table, wide=True) if table.rows else None


def typical_line(run: RunFolder) -> str:
    """The keenest liking of each of some experts, for a line of a terminal: ``encoder.1/3 ▁the``; "" = none."""
    liked = [
        (expert.pieces[0].lift, f"{name}/{expert.expert} {expert.pieces[0].piece}")
        for name, experts in typical(run).items()
        for expert in experts
        if expert.pieces
    ]
    return " · ".join(words for _, words in sorted(liked, reverse=True)[:4])


def _said(piece: TypicalPiece) -> str:
    return f"{piece.piece} \u00d7{wording.fixed(piece.lift)}"
