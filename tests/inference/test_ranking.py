"""The fast ranking of next tokens against its obvious twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.inference.ranking import Ranked, Ranking, ranked_reference

LEFT_OUT = torch.tensor([0, 2, 1500])


def logits_of(rows: int, size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 5 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("k", [1, 2, 5, 80])
@pytest.mark.parametrize("size", [1600, 1601, 4099])
def test_it_equals_its_twin(size: int, k: int) -> None:
    ranking = Ranking(LEFT_OUT)
    # Rows come and go, and memory is kept: each step must find its own.
    for seed, rows in enumerate((3, 5, 1, 2, 0)):
        logits = logits_of(rows, size, seed)
        before = logits.clone()
        found, expected = ranking(logits, k), ranked_reference(logits, k, LEFT_OUT)
        assert torch.equal(logits, before)
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.partition, expected.partition, rtol=1e-12, atol=1e-12)


def test_what_is_left_out_keeps_its_probability() -> None:
    logits = logits_of(2, 1600, 0)
    logits[:, 2] = 2000.0  # far above all others: their exponentials would overflow beside a smaller peak
    found = Ranking(LEFT_OUT)(logits, 1)
    torch.testing.assert_close(found.partition, logits.logsumexp(-1, keepdim=True))
    assert (found.tokens != 2).all()
    assert found.values.isfinite().all()


@pytest.mark.parametrize("k", [1, 3])
def test_equals_and_infinities(k: int) -> None:
    ranking = Ranking(LEFT_OUT)
    level = torch.zeros(2, 1700)
    assert ranking(level, 1).tokens.flatten().tolist() == [1, 1]  # the first that is not left out
    level[:] = -torch.inf
    level[0, 1699] = 3.0
    found = ranking(level, k)
    assert int(found.tokens[0, 0]) == 1699
    assert float(found.values[0, 0]) == 0.0
    assert (found.tokens < 1700).all()
    assert torch.equal(found.values[0, 1:], torch.full((k - 1,), -torch.inf))
    spoilt = logits_of(1, 1700, 0)
    spoilt[0, 7] = torch.nan
    assert ranking(spoilt, k).values.isnan().any()
    after, twin = ranking(logits_of(2, 1700, 1), k), ranked_reference(logits_of(2, 1700, 1), k, LEFT_OUT)
    torch.testing.assert_close(after.values, twin.values)  # nothing is left of the NaN


def test_logits_that_must_not_be_written() -> None:
    ranking, left_out = Ranking(torch.tensor([0])), torch.tensor([0])
    weight = torch.randn(2, 2000, requires_grad=True)
    kept = weight.exp()
    for logits in (weight, kept):
        assert_same(ranking(logits, 2), ranked_reference(logits, 2, left_out))
    kept.sum().backward()  # what the backward saved is as it was
    with torch.inference_mode():
        logits = torch.randn(2, 2000)
        found = ranking(logits, 2)
    for again in (ranking(logits, 2), ranking(logits.clone(), 2)):
        assert_same(again, found)


def assert_same(found: Ranked, expected: Ranked) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
