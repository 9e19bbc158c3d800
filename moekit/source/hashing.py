"""What belongs to a text for good: its digest, and a number that is as good as drawn at random."""

from __future__ import annotations

import hashlib


def digest(*parts: object) -> str:
    """Hex digest of the text forms of `parts`, kept apart from each other; bytes are taken as they are."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def chance(text: str) -> float:
    """A number in [0, 1) that belongs to the text: its hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
