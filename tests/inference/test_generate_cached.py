"""The cached, compacted, batched path against the uncached one and against one sentence at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moekit import experts, routers
from moekit.errors import UserError
from moekit.inference import (
    BeamSearch,
    Generation,
    GNMTPenalty,
    Greedy,
    LengthLimit,
    MeanLogProb,
    Sampling,
    complete,
    generate,
)
from moekit.layer import MoELayer
from moekit.transformer import (
    DecoderOnly,
    EncoderDecoder,
    Positions,
    RelativePositions,
    RotaryPositions,
    SinusoidalPositions,
    every_other,
)

VOCAB, DIM, HEADS = 23, 16, 4
SEARCHES = [
    Greedy(),
    BeamSearch(1),
    BeamSearch(3, num_return=2, penalty=GNMTPenalty(0.6)),
    BeamSearch(4, num_return=4, penalty=MeanLogProb()),
]


class _Ends:
    """Makes the end token likelier, or texts of untrained models would all be cut at the limit."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)  # type: ignore[misc]
        return logits + torch.nn.functional.one_hot(torch.tensor(2), VOCAB) * ENDING


class Translator(_Ends, EncoderDecoder):
    pass


class Language(_Ends, DecoderOnly):
    pass


ENDING = 2.5
SEEDS = {"dense": 3, "moe": 0}  # these write texts of many lengths and several words


def sparse(layer: int, side: str) -> nn.Module:
    return MoELayer(routers.switch(DIM, 4), experts.GroupedMLP(4, DIM, 24))


def make(kind: str, positions: Positions | None = None, seed: int | None = None) -> EncoderDecoder:
    torch.manual_seed(SEEDS[kind] if seed is None else seed)
    feed = every_other(sparse) if kind == "moe" else None
    model = Translator(
        VOCAB, DIM, HEADS, 2, 2, 24, feed_forward=feed, positions=positions, dropout=0.3, embedding_scale="output"
    )
    _liven(model)
    return model.double()


def make_lm(kind: str, positions: Positions | None = None, seed: int | None = None) -> DecoderOnly:
    torch.manual_seed(SEEDS[kind] if seed is None else seed)
    feed = every_other(sparse) if kind == "moe" else None
    model = Language(VOCAB, DIM, HEADS, 2, 24, feed_forward=feed, positions=positions, tied=False)
    _liven(model)
    return model.double()


def _liven(model: nn.Module) -> None:
    """Larger weights: an untrained model repeats one token, which would hide mistakes."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embedding" not in name:
                weight.mul_(3.0)


def sources(lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask


LENGTHS = [3, 7, 1, 5, 6, 2, 4, 7]
LANGUAGE = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
LIMIT = LengthLimit(4, 1.0)


def assert_same(a: Generation, b: Generation) -> None:
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.lengths, b.lengths)
    assert torch.equal(a.ended, b.ended)
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.token_scores, b.token_scores, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_cached_equals_uncached(kind: str, search: object) -> None:
    model = make(kind)
    ids, mask = sources(LENGTHS)
    common = {"search": search, "limit": LIMIT, "target_language": LANGUAGE}
    cached = generate(model, ids, mask, **common)
    assert_same(cached, generate(model, ids, mask, use_cache=False, **common))
    # The batch must contain both kinds, or leaving the batch was not exercised.
    assert cached.ended[:, 0].any()
    assert cached.lengths[:, 0].unique().numel() > 2


@pytest.mark.parametrize("positions", [RelativePositions(HEADS), RotaryPositions(), SinusoidalPositions()])
def test_cached_equals_uncached_for_every_kind_of_positions(positions: Positions) -> None:
    model = make("dense", positions)
    ids, mask = sources(LENGTHS)
    search = BeamSearch(3)
    assert_same(
        generate(model, ids, mask, search=search, limit=LIMIT),
        generate(model, ids, mask, search=search, limit=LIMIT, use_cache=False),
    )


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_batch_equals_its_sentences(kind: str, search: object) -> None:
    model = make(kind)
    ids, mask = sources(LENGTHS)
    batch = generate(model, ids, mask, search=search, limit=LIMIT, target_language=LANGUAGE)
    for row, length in enumerate(LENGTHS):
        alone = generate(
            model, ids[row : row + 1, :length], search=search, limit=LIMIT, target_language=LANGUAGE[row : row + 1]
        )
        assert alone.lists()[0] == batch.lists()[row]
        torch.testing.assert_close(alone.scores[0], batch.scores[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("seed", range(3))
def test_beam_of_one_is_greedy(kind: str, seed: int) -> None:
    model = make(kind, seed=seed)
    ids, mask = sources(LENGTHS, seed)
    greedy = generate(model, ids, mask, limit=LIMIT)
    beam = generate(model, ids, mask, search=BeamSearch(1), limit=LIMIT)
    assert torch.equal(greedy.ids, beam.ids)
    torch.testing.assert_close(greedy.token_scores, beam.token_scores, rtol=1e-10, atol=1e-10)
    divisor = ((5 + beam.lengths.double()) / 6) ** 0.6
    torch.testing.assert_close(greedy.scores / divisor, beam.scores, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("search", [*SEARCHES, Sampling(samples=2, seed=3)], ids=str)
def test_token_scores_are_the_models_own(search: object) -> None:
    """Every returned text is given to the model again, teacher-forced, without any machinery of decoding."""
    model = make("moe")
    ids, mask = sources(LENGTHS)
    found = generate(model, ids, mask, search=search, limit=LIMIT)
    model.eval()
    memory = model.encode(ids, mask).hidden
    for row, texts in enumerate(found.lists()):
        for rank, text in enumerate(texts):
            given = torch.tensor([[1, *text[:-1]]])
            hidden = model.decode(given, memory[row : row + 1], mask[row : row + 1]).hidden
            scores = model.logits(hidden).log_softmax(-1)[0].gather(1, torch.tensor(text)[:, None])[:, 0]
            torch.testing.assert_close(found.token_scores[row, rank, : len(text)], scores, rtol=1e-9, atol=1e-9)
            assert found.ended[row, rank] == (text[-1] == 2)
            assert 2 not in text[:-1]
            assert 0 not in text
            if not isinstance(search, BeamSearch):
                torch.testing.assert_close(found.scores[row, rank], scores.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("search", [*SEARCHES, Sampling(samples=3, seed=5)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_completion_cached_batched_and_ragged(kind: str, search: object) -> None:
    model = make_lm(kind)
    lengths = [2, 5, 1, 3]
    ids, mask = sources(lengths)
    ids[:, 0] = 1
    common = {"search": search, "max_new_tokens": 6}
    batch = complete(model, ids, mask, **common)
    assert_same(batch, complete(model, ids, mask, use_cache=False, **common))
    if not isinstance(search, Sampling):
        for row, length in enumerate(lengths):
            alone = complete(model, ids[row : row + 1, :length], **common)
            assert alone.lists()[0] == batch.lists()[row]


@pytest.mark.parametrize("search", [*SEARCHES, Sampling(samples=2, seed=5)], ids=str)
def test_forced_tokens_begin_every_text_and_cost_nothing(search: object) -> None:
    model = make("moe")
    ids, mask = sources(LENGTHS)
    forced = torch.arange(3, 3 + len(LENGTHS))[:, None].expand(-1, 2)
    found = generate(model, ids, mask, search=search, limit=LIMIT, forced=forced)
    assert torch.equal(found.ids[:, :, :2], forced[:, None].expand(-1, found.ids.shape[1], -1))
    assert (found.token_scores[:, :, :2] == 0).all()
    assert (found.lengths <= LIMIT(torch.tensor(LENGTHS))[:, None] + 2).all()
    memory = model.eval().encode(ids, mask).hidden
    text = found.lists()[0][0]
    hidden = model.decode(torch.tensor([[1, *text[:-1]]]), memory[:1], mask[:1]).hidden
    scores = model.logits(hidden).log_softmax(-1)[0].gather(1, torch.tensor(text)[:, None])[:, 0]
    torch.testing.assert_close(found.token_scores[0, 0, 2 : len(text)], scores[2:], rtol=1e-9, atol=1e-9)


def test_limit_follows_the_source_length() -> None:
    model = make("dense")
    ids, mask = sources(LENGTHS)
    limit = LengthLimit(1, 0.5)
    found = generate(model, ids, mask, search=BeamSearch(3, num_return=3), limit=limit)
    allowed = torch.tensor([1 + n // 2 for n in LENGTHS])[:, None]
    assert (found.lengths <= allowed).all()
    assert (found.lengths == allowed)[~found.ended].all()
    assert (~found.ended).any()


def test_suppressed_tokens_are_never_written() -> None:
    model = make("dense")
    ids, mask = sources(LENGTHS)
    plain = generate(model, ids, mask, limit=LIMIT)
    favourite = int(plain.ids[plain.ids > 2].mode().values)
    for search in (Greedy(), BeamSearch(3), Sampling(seed=0)):
        found = generate(model, ids, mask, search=search, limit=LIMIT, suppress=[favourite])
        assert not (found.ids == favourite).any()


def test_modes_are_restored_and_results_are_ordinary_tensors() -> None:
    model = make("moe").train()
    model.encoder.layers[0].eval()
    before = [module.training for module in model.modules()]
    ids, mask = sources(LENGTHS)
    found = generate(model, ids, mask, limit=LIMIT)
    assert [module.training for module in model.modules()] == before
    assert not found.ids.is_inference()
    nn.Embedding(VOCAB, 2)(found.ids).sum().backward()
    # Dropout was off, or two runs would differ.
    assert_same(found, generate(model, ids, mask, limit=LIMIT))


def test_a_step_of_decoding_measures_no_routing() -> None:
    """Nobody reads the router's losses there; what is computed is the same."""
    model = make("moe").eval()
    ids, mask = sources(LENGTHS)
    with torch.no_grad():
        memory = model.encode(ids, mask).hidden
        target = torch.full((len(LENGTHS), 1), 1)
        whole = model.decode(target, memory, mask)
        step = model.decode(target, memory, mask, None, None, model.new_cache())
    torch.testing.assert_close(step.hidden, whole.hidden, rtol=1e-10, atol=1e-10)
    for found, expected in zip(step.routings, whole.routings, strict=True):
        assert not found.losses
        assert not found.statistics
        assert {"load_balance", "router_z"} <= set(expected.losses)
        assert torch.equal(found.expert, expected.expert)


def test_modes_are_restored_after_an_error() -> None:
    model = make("dense").train()
    with pytest.raises(IndexError):
        generate(model, torch.full((1, 2), VOCAB + 5))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("search", [Greedy(), BeamSearch(3), Sampling(seed=0, samples=2)], ids=str)
def test_a_model_that_gives_no_numbers_writes_nothing(search: Greedy | BeamSearch | Sampling) -> None:
    """One of two sentences is broken; without a word it would be answered by any token, or by none."""
    model, (ids, mask) = make("dense"), sources([3, 2])
    with torch.no_grad():
        model.embedding.weight[ids[0, 0]] = torch.nan
    texts = 2 if isinstance(search, Sampling) else 1
    said = rf"it gave none for (1 of 2|{texts} of {2 * texts}|2 of 2|4 of 4)\. Its weights may be NaN"
    with pytest.raises(UserError, match=said):
        generate(model, ids, mask, search=search, limit=LengthLimit(4, 0.0))


@pytest.mark.parametrize("search", [Greedy(), BeamSearch(3), Sampling(seed=0)], ids=str)
def test_where_every_token_is_suppressed_none_is_written(search: Greedy | BeamSearch | Sampling) -> None:
    model, (ids, mask) = make("dense"), sources([3, 2])
    with pytest.raises(UserError, match=r"it gave none for 2 of 2\..*or all of its tokens suppressed"):
        generate(model, ids, mask, search=search, suppress=range(VOCAB))


def test_no_sentence_gives_no_text() -> None:
    empty = torch.zeros(0, 3, dtype=torch.int64)
    assert generate(make("dense"), empty).lists() == []
    assert complete(make_lm("dense"), empty).lists() == []


def test_bad_shapes_are_refused() -> None:
    model, (ids, mask) = make("dense"), sources([3, 2])
    with pytest.raises(ValueError, match="source_mask must have shape"):
        generate(model, ids, mask[:1])
    with pytest.raises(ValueError, match="forced must be"):
        generate(model, ids, mask, forced=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="target_language must have shape"):
        generate(model, ids, mask, target_language=torch.tensor([0]))
    language_model = make_lm("dense")
    with pytest.raises(ValueError, match="padded on the right"):
        complete(language_model, ids, mask.flip(1))
    with pytest.raises(ValueError, match="at least one token"):
        complete(language_model, ids, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="max_new_tokens"):
        complete(language_model, ids, mask, max_new_tokens=0)
    with pytest.raises(ValueError, match="BeamSearch needs"):
        BeamSearch(2, num_return=3)
    with pytest.raises(ValueError, match="suppress must be ids of tokens, which begin at 0: got -1"):
        generate(model, ids, mask, suppress=[3, -1])
    for constant, ratio in ((-1, 1.0), (1, -1.0), (0, 0.0), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(ValueError, match="LengthLimit needs"):
            LengthLimit(constant, ratio)
