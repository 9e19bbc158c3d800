"""The segmented bank of MultiHash: how it starts."""

from __future__ import annotations

import pytest
import torch

from moekit.experts import GroupedMLP, MultiHashMLP


def test_starts_like_one_feed_forward() -> None:
    """The segments of a token together have the spread of a whole expert of hidden size F."""
    torch.manual_seed(0)
    whole, cut = GroupedMLP(4, 64, 256), MultiHashMLP(4, 64, 256, num_segments=4)
    assert cut.num_experts == 16
    assert cut.w_in.shape == (16, 64, 64)
    for name in ("w_in", "w_out"):
        ours, theirs = float(getattr(cut, name).detach().std()), float(getattr(whole, name).detach().std())
        assert ours == pytest.approx(theirs, rel=0.05)


def test_segments_must_divide() -> None:
    with pytest.raises(ValueError, match="divisible by num_segments: got 10 and 3"):
        MultiHashMLP(4, 8, 10, num_segments=3)
    with pytest.raises(ValueError, match="got 10 and 0"):
        MultiHashMLP(4, 8, 10, num_segments=0)
