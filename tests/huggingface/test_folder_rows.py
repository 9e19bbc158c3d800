"""Rows of several examples: which share one, their order, and that a model reads each as if it were alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from adoptable import CONFIGS, gradients
from adoptable import model as adoptable
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.folder_text.encoding import Encoded
from moekit.folders.batches import Dealing, FolderBatch, HeldOutBatches, TrainingBatches, collate
from moekit.folders.packable import PACKABLE, require_packable
from moekit.folders.packing import pack
from moekit.huggingface import added_losses, adopt, packed, routings


def encoded(*lengths: int, seed: int = 0) -> list[Encoded]:
    """Examples of these lengths, of which about two tokens in three are learned."""
    draw = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids = draw.integers(3, 60, length)
        labels = np.where(draw.random(length) < 0.67, ids, -100)
        labels[0] = -100
        found.append(Encoded(ids, labels))
    return found


def test_rows_are_full_and_hold_every_example_once() -> None:
    draw = random.Random(0)
    for _ in range(20):
        lengths = [draw.randint(1, 32) for _ in range(draw.randint(1, 60))]
        rows = pack(lengths, 32)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        sums = [sum(lengths[number] for number in row) for row in rows]
        assert max(sums) <= 32
        # What begins a later row had no room in an earlier one.
        assert all(sums[a] + lengths[rows[b][0]] > 32 for b in range(len(rows)) for a in range(b))
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        pack([2, 5], 4)


def rows_of(batch: FolderBatch) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(batch.ids, batch.real, strict=True)]


def test_the_order_is_a_function_of_seed_and_step() -> None:
    """However many ranks and batches there are, a step has the same rows; each pass has every row once."""
    rows = [[example] for example in encoded(*range(2, 14))]
    plain = TrainingBatches(rows, Dealing(4), pad=0, seed=3)
    steps = [rows_of(plain[step]) for step in range(6)]
    assert sorted(row for step in steps[:3] for row in step) == sorted(row for step in steps[3:] for row in step)
    assert sorted(map(len, (row for step in steps[:3] for row in step))) == list(range(2, 14))
    assert steps[:3] != steps[3:]
    for ranks, accumulate in ((2, 1), (1, 2), (2, 2)):
        dealt = [
            TrainingBatches(rows, Dealing(4 // ranks // accumulate, rank, ranks, accumulate), pad=0, seed=3)
            for rank in range(ranks)
        ]
        for step in range(6):
            parts = [dealt[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(ranks)]
            assert [row for part in parts for row in rows_of(part)] == steps[step]
            assert {float(part.predictions) for part in parts} == {float(plain[step].predictions) / len(parts)}
    assert rows_of(TrainingBatches(rows, Dealing(4), pad=0, seed=4)[0]) != steps[0]


def test_held_out_rows_are_read_once() -> None:
    rows = [[example] for example in encoded(5, 3, 4, 2, 6)]
    total = sum(example.predicted for row in rows for example in row)
    for ranks in (1, 2):
        parts = [HeldOutBatches(rows, Dealing(2, rank, ranks), pad=0) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        labels = [part[n].labels for part in parts for n in range(len(part))]
        assert sum(int((found[:, 1:] != -100).sum()) for found in labels) == total


def losses(model: Any, batch: FolderBatch) -> tuple[Tensor, Tensor]:
    """Sum over the learned tokens, and the routers' losses, computed plainly."""
    several = {"position_ids": batch.positions}
    with routings(model) as heard, packed(model, batch.real, batch.sequence):
        logits = model(batch.ids, use_cache=False, **several).logits
    nll = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    weights = added_losses(model)
    assert weights is not None
    return nll, weights(*heard)[0]


@pytest.mark.parametrize("block", CONFIGS)
def test_a_packed_row_is_its_examples_one_by_one(block: str) -> None:
    """Losses and gradients, in float32; those of routers, of all tokens together, as in rows of their own."""
    examples = encoded(9, 4, 1, 6, 12)
    numbers = range(len(CONFIGS[block][1]))
    for number in numbers:
        made = adopt(adoptable(block, number, **({"attn_implementation": "eager"} if number else {})))
        # In evaluation, where nothing is drawn; losses of routers are computed there too.
        rows = [[examples[0], examples[1], examples[2]], [examples[4], examples[3]]]
        nll, aux = losses(made, collate(rows, pad=0, predictions=1.0))
        (nll + aux).backward()
        together = gradients(made)
        made.zero_grad()
        alone = [losses(made, collate([[example]], pad=0, predictions=1.0))[0] for example in examples]
        padded = collate([[example] for row in rows for example in row], pad=0, predictions=1.0)
        with routings(made) as heard:
            made(padded.ids, attention_mask=padded.real.long(), use_cache=False)
        weights = added_losses(made)
        assert weights is not None
        extra = weights(*heard)[0]
        (torch.stack(alone).sum() + extra).backward()
        if block == "GptOssMLP":  # whose texts see those before them in the row
            assert abs(float((nll - torch.stack(alone).sum()).detach())) > 1e-3
            with pytest.raises(UserError, match="GptOssForCausalLM is not known to do so"):
                require_packable(made)
            continue
        require_packable(made)
        torch.testing.assert_close(nll, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(aux, extra, rtol=1e-5, atol=1e-6)
        largest = max(float(expected.abs().max()) for expected in gradients(made).values())
        for name, expected in gradients(made).items():
            most = max(float(expected.abs().max()), 1e-2 * largest)  # one choice renormalised has none but rounding
            torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-5 * most, msg=name)
        assert torch.stack(alone).sum() > 1


def test_all_architectures_are_tried_and_others_refused() -> None:
    names = {type(adoptable(block)).__name__ for block in CONFIGS}
    assert names - {"GptOssForCausalLM"} == PACKABLE
    with pytest.raises(UserError, match=r"Linear is not known to do so\. Give --data\.pack false"):
        require_packable(nn.Linear(1, 1))


def test_balance_of_texts_is_told_apart() -> None:
    """A balance loss of each text by itself: packed as in rows of their own."""
    made = adopt(adoptable("OlmoeSparseMoeBlock"))
    for module in made.modules():
        if hasattr(module, "router"):
            module.router.balance = type(module.router.balance)(scope="sequence")
    examples = encoded(5, 7, 4)
    with torch.no_grad():
        one = losses(made, collate([[examples[0], examples[2]], [examples[1]]], pad=0, predictions=1.0))[1]
        apart = losses(made, collate([[example] for example in examples], pad=0, predictions=1.0))[1]
    torch.testing.assert_close(one, apart)


def test_packed_rows_need_an_adopted_model() -> None:
    with (
        pytest.raises(UserError, match="packed rows are those of an adopted model: got Linear"),
        packed(nn.Linear(1, 1), torch.ones(1, 1), torch.ones(1, 1)),
    ):
        pass
    with pytest.raises(UserError, match="losses of routers are those of an adopted model"):
        added_losses(nn.Linear(1, 1))
