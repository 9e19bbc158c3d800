"""Padding has no place in the order of tokens: wherever it stands in a row, results are those of the row without it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import POSITIONS, VOCAB, batch, language_model, seq2seq
from torch import Tensor

from moekit.inference import complete
from moekit.recurrent import RecurrentLM
from moekit.transformer import MLP, EncoderOnly, Positions, SplitSinusoidalPositions
from moekit.transformer.context import routing_context
from moekit.transformer.padding import count_real, next_real, previous_real

KINDS = {**POSITIONS, "split sinusoidal": lambda: SplitSinusoidalPositions(first=2), "none": Positions}
WHERE = {
    "left, longer than wide": torch.arange(20).expand(3, 20) >= torch.tensor([[3], [0], [7]]),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]).bool(),
    "both ends": torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]]).bool(),
    "inside": torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]).bool(),
}


def rows(mask: Tensor) -> Tensor:
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3))
    return ids.masked_fill(~mask, 17)  # an ordinary word: what stands under the mask must not matter


@torch.no_grad()
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_encoders(kind: str, where: str) -> None:
    model, mask = seq2seq(KINDS[kind]()).double(), WHERE[where]
    ids = rows(mask)
    if kind == "relative" and where == "inside":
        with pytest.raises(ValueError, match=r"RelativePositions see distances .* Move the padding to the ends"):
            model.encode(ids, mask)
        return
    memory = model.encode(ids, mask).hidden
    target = batch()[2]
    hidden = model.decode(target, memory, mask).hidden
    for row in range(len(ids)):
        alone = model.encode(ids[row : row + 1, mask[row]]).hidden
        torch.testing.assert_close(memory[row, mask[row]], alone[0])
        torch.testing.assert_close(hidden[row], model.decode(target[row : row + 1], alone).hidden[0])
    only = EncoderOnly(VOCAB, 16, 4, 1, 24, positions=KINDS[kind]()).double()
    alone = only.encode(ids[:1, mask[0]]).hidden
    torch.testing.assert_close(only.encode(ids, mask).hidden[0, mask[0]], alone[0])


@pytest.mark.parametrize("where", ["left", "inside"])
def test_causal_models_refuse_it(where: str) -> None:
    mask = WHERE[where]
    ids = rows(mask)
    lstm = RecurrentLM(VOCAB, 8, MLP(8, 16))
    for decode in (language_model().decode, lstm.decode):
        with pytest.raises(ValueError, match="padding on the right only"):
            decode(ids, mask)
    with pytest.raises(ValueError, match="padded on the right"):
        complete(language_model(), ids, mask)
    model = seq2seq()
    with pytest.raises(ValueError, match="padding on the right only"):
        model.decode(ids, model.encode(ids).hidden, None, mask)


def test_a_cache_refuses_padding_which_later_tokens_would_see() -> None:
    ids, mask = batch()[2:]
    model = language_model()
    with pytest.raises(ValueError, match="A cache keeps every token"):
        model.decode(ids, mask, cache=model.new_cache())
    model.decode(ids, torch.ones_like(mask), cache=model.new_cache())


def test_routers_are_told_neighbours_and_places_without_padding() -> None:
    ids = torch.tensor([[9, 5, 9, 6, 7, 9, 8]])
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1]]).bool()
    context = routing_context(ids, mask, None, pad_id=0)
    real = mask.flatten()
    assert context.previous_ids[real].tolist() == [0, 5, 6, 7]
    assert context.next_ids[real].tolist() == [6, 7, 8, 0]
    assert context.position[real].tolist() == [0, 1, 2, 3]
    assert count_real(mask).tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    assert count_real(torch.tensor([[True, True, False, False]])).tolist() == [[0, 1, 2, 3]]
    nobody = torch.zeros_like(mask)
    assert previous_real(ids, nobody, ids.new_full((1,), 4)).tolist() == [[4] * 7]
    assert next_real(ids, None, ids.new_full((1,), 4)).tolist() == [[5, 9, 6, 7, 9, 8, 4]]
