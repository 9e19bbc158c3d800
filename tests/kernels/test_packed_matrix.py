"""A packed matrix against the plain product, and searches with packed tables against searches without."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moekit.inference import BeamSearch, Generation, Greedy, LengthLimit, MeanLogProb, Search, complete, generate
from moekit.kernels import packed_matrix
from moekit.kernels.packed_matrix import PackedMatrix, can_pack, project_reference
from moekit.testing import assert_close
from moekit.transformer import DecoderOnly, EncoderDecoder
from moekit.transformer.embedding import TokenEmbedding, Vocabulary, packed_logits

VOCAB, DIM = 1100, 64
here = pytest.mark.skipif(not packed_matrix._is_here(), reason="torch without oneDNN's products, or another CPU")


@here
@torch.no_grad()
def test_it_is_the_plain_product() -> None:
    """For any number of rows, of rows that lie apart, and of any leading shape."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(VOCAB, DIM))
    packed = PackedMatrix(weight)
    for shape in ((1, DIM), (2, DIM), (33, DIM), (300, DIM), (2, 3, DIM), (DIM,)):
        x = torch.randn(shape)
        assert can_pack(x, weight)
        assert_close(packed(x), project_reference(x, weight), str(shape))
    apart = torch.randn(5, 7, DIM)[:, -1]
    assert_close(packed(apart), project_reference(apart, weight), "rows that lie apart")
    turned = torch.randn(DIM, VOCAB).t()
    assert_close(PackedMatrix(turned)(apart), project_reference(apart, turned), "a matrix that lies by columns")


@here
def test_where_it_is_not_taken() -> None:
    x, weight = torch.randn(4, DIM), nn.Parameter(torch.randn(VOCAB, DIM))
    assert not can_pack(x, weight), "gradients are wanted"
    with torch.inference_mode():
        assert can_pack(x, weight)
        assert not can_pack(x.double(), weight.double())
        assert not can_pack(x.bfloat16(), weight)
        assert not can_pack(x[:0], weight)
        assert not can_pack(x, weight[:8]), "a small matrix"
        assert not can_pack(x.to("meta"), weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert not can_pack(x, weight)


@here
def test_operations_that_do_not_work_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are torch's own business: gone, with other arguments, or with other results, logits are the plain ones."""
    x, weight = torch.randn(4, DIM), torch.randn(VOCAB, DIM)

    def taken() -> bool:
        packed_matrix._works.cache_clear()
        with torch.inference_mode():
            return can_pack(x, weight)

    def other_arguments() -> Tensor:
        raise AssertionError

    right = torch.ops.mkldnn._linear_pointwise
    try:
        assert taken()
        torch.backends.mkldnn.set_flags(_enabled=False)
        assert not taken(), "oneDNN is switched off"
        torch.backends.mkldnn.set_flags(_enabled=True)
        for name in ("_reorder_linear_weight", "_linear_pointwise"):
            with monkeypatch.context() as patch:
                patch.setattr(torch.ops.mkldnn, name, other_arguments)
                with pytest.warns(UserWarning, match="in another way than moekit expects: TypeError"):
                    assert not taken()
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: right(*given) * 1.1)
            with pytest.warns(UserWarning, match="a product is off by 1.0e-01 of its size"):
                assert not taken()
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "mkldnn", SimpleNamespace())
            assert not taken(), "the operations are gone"
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)
        packed_matrix._works.cache_clear()


def sequence_model() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(VOCAB, DIM, 4, 1, 1, 64, tied=False).eval()


def texts(model: nn.Module, search: Search) -> Generation:
    source = torch.randint(4, VOCAB, (5, 6), generator=torch.Generator().manual_seed(1))
    if isinstance(model, EncoderDecoder):
        return generate(model, source, search=search, limit=LengthLimit(9, 0.0))
    assert isinstance(model, DecoderOnly)
    return complete(model, source, search=search, max_new_tokens=9)


@here
@pytest.mark.parametrize("search", [Greedy(), BeamSearch(3, penalty=MeanLogProb())], ids=["greedy", "beams"])
def test_searches_write_the_same(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy for a search, none for its first call, and none is left."""
    torch.manual_seed(0)
    models: list[nn.Module] = [sequence_model(), DecoderOnly(VOCAB, DIM, 4, 2, 64).eval()]
    made, used = 0, 0

    class Counted(PackedMatrix):
        def __init__(self, weight: Tensor) -> None:
            nonlocal made
            made += 1
            super().__init__(weight)

        def __call__(self, x: Tensor) -> Tensor:
            nonlocal used
            used += 1
            return super().__call__(x)

    monkeypatch.setattr("moekit.transformer.embedding.PackedMatrix", Counted)
    for number, model in enumerate(models, 1):
        used = 0
        found = texts(model, search)
        assert (made, used) == (number, 8)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["moekit.inference.generate"], "packed_logits", lambda model: nullcontext())
            plain = texts(model, search)
        assert (made, used) == (number, 8)
        assert torch.equal(found.ids, plain.ids)
        assert_close(found.token_scores, plain.token_scores, "scores")
        tables = [module for module in model.modules() if isinstance(module, TokenEmbedding)]
        assert all(type(table.vocabulary) is Vocabulary for table in tables)


@here
@torch.no_grad()
def test_weights_that_move_between_searches_are_read_anew() -> None:
    model = sequence_model()
    before = texts(model, Greedy())
    assert model.output is not None
    model.output.weight.data.neg_()  # which no counter of versions notices
    after = texts(model, Greedy())
    with pytest.raises(KeyError), packed_logits(model):
        raise KeyError
    assert type(model.output.vocabulary) is Vocabulary
    assert not torch.equal(before.ids, after.ids)
    model.output.weight.data.neg_()
    assert torch.equal(texts(model, Greedy()).ids, before.ids)
