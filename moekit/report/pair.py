"""A run beside its dense twin: what one pair of runs can say, and what is known of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moekit.report.view import PageSection, heading

_EXPERTS = "model.num_experts"
_NAMES = ("variant",)
"""What says how a run is called, not how it is made."""


def pair_section(different: Mapping[str, Sequence[str]], known: Sequence[str] = ()) -> PageSection | None:
    """The section, where two runs differ in their experts alone, and one has none; else None.

    Args:
        different: both values of every setting that differs, by dotted key.
        known: what is known over several pairs of seeds, in sentences.
    """
    keys = {key for key in different if key not in _NAMES}
    if keys != {_EXPERTS} or "0" not in different[_EXPERTS]:
        return None
    one = (
        "One pair of runs shows what happened with one seed. It cannot say how large the difference is on average, nor "
        "whether it has this sign with other first weights or another order of the text."
    )
    none = "No result of several pairs is known of this variant; moekit ablate makes one."
    return PageSection(*heading("pair"), [one, *(known or [none])])
