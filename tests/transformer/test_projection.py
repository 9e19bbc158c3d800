"""Several projections in one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moekit.transformer.projection import FusedLinear


def test_equals_separate_maps() -> None:
    fused, x = FusedLinear(3, 4, 5), torch.randn(2, 7, 4)
    assert fused(x).shape == (2, 7, 3, 5)
    for part in range(3):
        torch.testing.assert_close(fused(x)[:, :, part], F.linear(x, fused.weight[part], fused.bias[part]))
    plain = FusedLinear(2, 4, 5, bias=False)
    torch.testing.assert_close(plain(x)[:, :, 1], x @ plain.weight[1].T)


def test_starts_like_one_linear() -> None:
    torch.manual_seed(0)
    fused = FusedLinear(3, 4, 5)
    torch.manual_seed(0)
    plain = nn.Linear(4, 15)
    torch.testing.assert_close(fused.weight.flatten(0, 1), plain.weight)
    torch.testing.assert_close(fused.bias.flatten(), plain.bias)
    assert FusedLinear(2, 3, 4).to("meta").weight.is_meta


def test_reads_the_weights_of_one_linear() -> None:
    plain, fused = nn.Linear(4, 15), FusedLinear(3, 4, 5)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(fused(x).flatten(-2), plain(x))
    fused.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(x).flatten(-2), plain(x))
