"""What makes up for copies lies in the weights: in transformers an aggregate answers as the model it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_models import our_logits, shake, their_logits
from transformers import AutoModelForSeq2SeqLM

from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.huggingface import export_model
from moekit.layer import MoELayer
from moekit.routers import RandomChoice, TopKRouter, switch
from moekit.surgery import aggregate, sparse_layers
from moekit.testing import assert_close
from moekit.transformer import EncoderDecoder, RMSNorm, SplitSinusoidalPositions, every_other

V, D, H, F, E = 40, 24, 3, 20, 4


def test_an_aggregate_is_exported_with_what_makes_up_for_it(tmp_path: Path) -> None:
    def model(num_experts: int) -> EncoderDecoder:
        layers = every_other(lambda layer, side: MoELayer(switch(D, num_experts), GroupedMLP(num_experts, D, F)))
        return shake(EncoderDecoder(V, D, H, 2, 2, F, feed_forward=layers, norm=RMSNorm))  # type: ignore[return-value]

    one, both = model(E), model(2 * E)
    both.load_state_dict(aggregate([one.state_dict()] * 2, [sparse_layers(one)] * 2))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(export_model(both, tmp_path / "model")).eval()
    assert theirs.config.num_experts == 2 * E
    assert_close(their_logits(theirs), our_logits(one))


def test_four_choices_are_refused_by_the_family_that_has_two(tmp_path: Path) -> None:
    def sparse(layer: int, side: str) -> MoELayer:
        router = TopKRouter(D, 2 * E, 4, renormalise="before_drop", second_expert=RandomChoice(0.5))
        return MoELayer(router, GroupedMLP(2 * E, D, F))

    positions = SplitSinusoidalPositions(first=1)
    model = EncoderDecoder(V, D, H, 2, 2, F, feed_forward=every_other(sparse), positions=positions)
    with pytest.raises(UserError, match=r"choice of 4 experts per token \(it has 2\)"):
        export_model(model, tmp_path / "model")
