"""Our models in folders that transformers opens: same logits, same greedy texts, and the same bits when they return."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import T, as_their_router_means, our_logits, our_texts, sentences, shake, their_logits, their_texts
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from moekit import experts, routers
from moekit.data.tokenizer import SpecialTokens
from moekit.errors import UserError
from moekit.huggingface import Imported, describe, export_model, import_model
from moekit.layer import MoELayer
from moekit.mixing import ExpertOutputMasking
from moekit.routing import Capacity
from moekit.testing import assert_close
from moekit.transformer import (
    GLU,
    MLP,
    DecoderOnly,
    EncoderDecoder,
    FeedForwardFactory,
    LayerNorm,
    RelativePositions,
    RMSNorm,
    RMSNormWithoutScale,
    RotaryPositions,
    SinusoidalPositions,
    SparseDense,
    SplitSinusoidalPositions,
    at_layers,
    every_other,
)

V, D, H, F, E = 40, 24, 3, 20, 4


def sparse_layer(router: Any = None, bank: Any = None, **options: Any) -> MoELayer:
    return MoELayer(router or routers.switch(D, E), bank or experts.GroupedMLP(E, D, F), **options)


def second(make: Callable[[], MoELayer]) -> FeedForwardFactory:
    """That layer as every second feed-forward."""
    return every_other(lambda layer, side: make())


def like_t5(**options: Any) -> EncoderDecoder:
    """As recipes build it: RMS norms, relative positions, and everything scaled in our way."""
    given = {"feed_forward": second(sparse_layer), "norm": RMSNorm} | options
    return shake(EncoderDecoder(V, D, H, 4, 3, F, **given))  # type: ignore[arg-type,return-value]


def two_experts(bias: bool = False, **options: Any) -> MoELayer:
    router = routers.TopKRouter(D, E, 2, renormalise="before_drop", second_expert=routers.RandomChoice(0.5))
    return MoELayer(router, experts.GroupedMLP(E, D, F, bias=bias), **options)


def like_nllb(bias: bool = False, **options: Any) -> EncoderDecoder:
    given = {
        "feed_forward": second(lambda: two_experts(bias)),
        "positions": SplitSinusoidalPositions(first=1),
        "bias": bias,
    } | options
    return shake(EncoderDecoder(V, D, H, 4, 2, F, **given))  # type: ignore[arg-type,return-value]


T5S: dict[str, Callable[[], EncoderDecoder]] = {
    "scaled in our way": like_t5,
    "scaled in T5's way": lambda: like_t5(attention_scale=1.0, embedding_scale="output"),
    "three tables": lambda: like_t5(tied=False),
    "three tables, divided on the way out": lambda: like_t5(tied=False, embedding_scale="output"),
    "three tables, unscaled": lambda: like_t5(tied=False, embedding_scale="none", attention_scale=0.3),
    "every layer sparse": lambda: like_t5(feed_forward=lambda layer, side: sparse_layer()),
    "none sparse, gelu": lambda: like_t5(feed_forward=None, activation="gelu", norm=lambda n: RMSNorm(n, eps=1e-3)),
    "some sparse": lambda: like_t5(feed_forward=at_layers({"encoder": {1}}, lambda layer, side: sparse_layer())),
    "heads of their own size": lambda: like_t5(head_dim=5, positions=RelativePositions(H, num_buckets=8)),
    "by sequence": lambda: like_t5(
        feed_forward=every_other(
            lambda layer, side: sparse_layer(routers.TopKRouter(D, E, capacity=routers.SequenceCapacity(2)))
        )
    ),
}
NLLBS: dict[str, Callable[[], EncoderDecoder]] = {
    "biases": lambda: like_nllb(bias=True),
    "no biases": like_nllb,
    "divided on the way out": lambda: like_nllb(embedding_scale="output", attention_scale=1.0, bias=True),
    "unscaled": lambda: like_nllb(embedding_scale="none"),
    "three tables": lambda: like_nllb(tied=False, embedding_scale="output"),
    "masked outputs": lambda: like_nllb(
        feed_forward=second(lambda: two_experts(output_masking=ExpertOutputMasking(0.25)))
    ),
    "none sparse": lambda: like_nllb(feed_forward=None),
}


def opened(folder: Path, **options: Any) -> PreTrainedModel:
    model, notes = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(notes.values()), f"transformers found {notes}"
    return model.eval()


def same_bits(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def as_found(model: EncoderDecoder) -> Imported:
    return Imported(model, SpecialTokens(), describe(model))


@pytest.mark.parametrize("shape", T5S)
def test_as_switch_transformers(shape: str, tmp_path: Path) -> None:
    ours = T5S[shape]()
    theirs = opened(export_model(ours, tmp_path / "model"))
    assert type(theirs).__name__ == "SwitchTransformersForConditionalGeneration"
    assert_close(their_logits(theirs), our_logits(ours))
    assert their_texts(theirs) == our_texts(as_found(ours)).best()
    again = import_model(tmp_path / "model")
    same_bits(again.model, ours)
    assert torch.equal(our_logits(again.model), our_logits(ours))
    assert again.tokens == SpecialTokens()


@pytest.mark.parametrize("shape", NLLBS)
def test_as_nllb_moe(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = NLLBS[shape]()
    theirs = opened(export_model(ours, tmp_path / "model"))
    assert type(theirs).__name__ == "NllbMoeForConditionalGeneration"
    if shape != "none sparse":  # as import_model says: transformers' own sparse layer runs experts 0 and 1 only
        as_their_router_means(monkeypatch)
    assert_close(their_logits(theirs), our_logits(ours))
    assert their_texts(theirs) == our_texts(as_found(ours)).best()
    again = import_model(tmp_path / "model")
    same_bits(again.model, ours)
    assert torch.equal(our_logits(again.model), our_logits(ours))


def test_what_multiplication_rounds_is_kept_beside(tmp_path: Path) -> None:
    folder = export_model(like_t5(), tmp_path / "rounded")
    kept = set(load_file(folder / "moekit.safetensors"))
    assert "embedding.weight" in kept
    assert all(name == "embedding.weight" or name.endswith(("qkv.weight", "q.weight")) for name in kept)
    exact = export_model(like_t5(attention_scale=1.0, embedding_scale="output"), tmp_path / "exact")
    assert not (exact / "moekit.safetensors").exists()


def test_weights_that_were_trained_in_transformers_win_over_what_was_kept(tmp_path: Path) -> None:
    ours = like_t5()
    folder = export_model(ours, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["shared.weight"][3] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again = import_model(folder).model
    assert_close(again.embedding.weight[3], ours.embedding.weight[3] + D**-0.5)
    assert_close(our_logits(again), their_logits(opened(folder)))
    assert torch.equal(
        again.encoder.blocks[0].self_attention.qkv.weight, ours.encoder.blocks[0].self_attention.qkv.weight
    )


def test_biases_that_were_trained_in_transformers_are_there_afterwards(tmp_path: Path) -> None:
    folder = export_model(like_nllb(feed_forward=None), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.encoder.layers.1.ffn.fc1.bias"] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = import_model(folder)
    assert found.architecture.bias
    assert_close(our_logits(found.model), their_logits(opened(folder)))


def test_from_transformers_and_back_is_the_same_file(tmp_path: Path) -> None:
    """Weights that came from there go back bit for bit."""
    first = export_model(like_t5(), tmp_path / "first")
    config = json.loads((first / "config.json").read_text())
    del config["moekit"]
    (first / "config.json").write_text(json.dumps(config))
    found = import_model(first)
    assert found.architecture.attention_scale == 1.0
    second = export_model(found.model, tmp_path / "second", tokens=found.tokens)
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_several_files(tmp_path: Path) -> None:
    ours = like_t5()
    folder = export_model(ours, tmp_path / "model", max_shard_bytes=20_000)
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].endswith(f"-of-{len(shards):05d}.safetensors")
    assert_close(their_logits(opened(folder)), our_logits(ours))
    same_bits(import_model(folder).model, ours)


def test_other_marks_and_types(tmp_path: Path) -> None:
    tokens = SpecialTokens(pad=2, bos=0, eos=7)
    ours = like_nllb(feed_forward=None, positions=SplitSinusoidalPositions(first=3)).bfloat16()
    theirs = opened(export_model(ours, tmp_path / "model", tokens=tokens))
    assert next(theirs.parameters()).dtype == torch.bfloat16
    found = import_model(tmp_path / "model")
    same_bits(found.model, ours)
    assert found.tokens == tokens
    assert found.model.pad_id == 2
    found.model.float()
    wide = opened(tmp_path / "model", dtype=torch.float32)
    assert_close(their_logits(wide), our_logits(found.model))
    assert their_texts(wide) == our_texts(found).best()


def scheduled() -> MoELayer:
    return sparse_layer(phase=experts.DensePretraining(steps=10))


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "language model": (lambda: DecoderOnly(V, D, H, 2, F), "only an EncoderDecoder can be exported.*got DecoderOnly"),
    "rotary": (lambda: like_t5(positions=RotaryPositions()), "RelativePositions: the encoder .* has RotaryPositions"),
    "sinusoidal": (lambda: like_nllb(positions=SinusoidalPositions()), "has SinusoidalPositions"),
    "gated": (lambda: like_t5(feed_forward=lambda layer, side: GLU(D, F)), "no GLU .gated.*encoder.layers.0"),
    "gated experts": (
        lambda: like_t5(feed_forward=second(lambda: sparse_layer(bank=experts.GroupedGLU(E, D, F)))),
        "no GroupedGLU as experts: encoder.layers.1",
    ),
    "router": (
        lambda: like_t5(feed_forward=second(lambda: sparse_layer(routers.CosineRouter(D, E)))),
        "no CosineRouter: encoder.layers.1",
    ),
    "scorer": (
        lambda: like_t5(
            feed_forward=second(lambda: sparse_layer(routers.TopKRouter(D, E, scorer=routers.CosineScorer())))
        ),
        "no CosineScorer in a router: encoder.layers.1",
    ),
    "two experts": (lambda: like_t5(feed_forward=second(two_experts)), "2 experts per token"),
    "batch capacity": (
        lambda: like_t5(
            feed_forward=second(lambda: sparse_layer(routers.TopKRouter(D, E, capacity=Capacity(eval=2.0))))
        ),
        "capacity factor 2 in evaluation",
    ),
    "shared": (
        lambda: like_t5(feed_forward=second(lambda: sparse_layer(shared=MLP(D, F)))),
        "beside the experts",
    ),
    "sparse-dense": (
        lambda: like_t5(feed_forward=lambda layer, side: SparseDense(sparse_layer(), MLP(D, F))), "second feed-forward"
    ),
    "dense phase": (lambda: like_t5(feed_forward=second(scheduled)), "tied experts"),
    "norms": (
        lambda: like_t5(norm=lambda dim, made=[]: made.append(0) or (RMSNorm if len(made) % 2 else LayerNorm)(dim)),
        "no norm but RMSNorm",
    ),
    "norms without scale": (lambda: like_t5(norm=RMSNormWithoutScale), "no norm but RMSNorm: this model has RMSNormW"),
    "biases": (lambda: like_t5(feed_forward=None, bias=True), "no biases"),
    "mixed biases": (lambda: like_nllb(bias=True, feed_forward=second(two_experts)), "biases"),
    "unscaled table": (lambda: like_t5(embedding_scale="none"), "does neither"),
    "third layer": (
        lambda: like_t5(feed_forward=at_layers({2}, lambda layer, side: sparse_layer())), "encoder .* layers 2 of 4"
    ),
    "pyramid": (
        lambda: like_t5(
            feed_forward=lambda layer, side: sparse_layer(
                routers.switch(D, E + layer), experts.GroupedMLP(E + layer, D, F)
            )
        ),
        "one number of experts for the whole model: this one has 4, 5",
    ),
    "widths": (
        lambda: like_t5(feed_forward=lambda layer, side: MLP(D, F + layer)),
        "one hidden size in the encoder for the whole model",
    ),
    "positions": (lambda: like_nllb(positions=SplitSinusoidalPositions()), "counts positions from pad_token_id"),
    "epsilon": (lambda: like_nllb(norm=lambda dim: LayerNorm(dim, eps=1e-3)), "epsilon 1e-05"),
}  # fmt: skip


@pytest.mark.parametrize("feature", WRONG)
def test_what_transformers_cannot_say(feature: str, tmp_path: Path) -> None:
    make, message = WRONG[feature]
    with pytest.raises(UserError, match=message):
        export_model(make(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_parts_that_were_replaced(tmp_path: Path) -> None:
    model = like_t5()
    model.encoder.blocks[0].self_attention.out = nn.Sequential(model.encoder.blocks[0].self_attention.out)  # type: ignore[assignment]
    with pytest.raises(
        UserError,
        match=r"no Sequential: encoder\.layers\.0\.self_attention\.out of this model has\. Merge adapters first",
    ):
        export_model(model, tmp_path / "model")
    model = like_t5()
    model.encoder.register_parameter("extra", nn.Parameter(torch.ones(3)))
    with pytest.raises(UserError, match=r"no place for encoder\.extra"):
        export_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_where_it_is_written(tmp_path: Path) -> None:
    ours = like_t5(feed_forward=None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="must be a folder: it is a file"):
        export_model(ours, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"must be empty or not exist: it holds 'diary\.txt'"):
            export_model(ours, tmp_path / "full", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    folder = export_model(ours, tmp_path / "empty")
    with pytest.raises(UserError, match="an earlier export: overwrite"):
        export_model(ours, folder)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(UserError, match="id of eos must be below the vocabulary of 40: got 99"):
        export_model(ours, folder, tokens=SpecialTokens(eos=99), overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == before, "the earlier export is whole"
    export_model(shake(ours), folder, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"], "no draft is left"


def test_no_partial_output_when_the_disk_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekit import mapped

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write model in the folder .*: the disk is full"):
        export_model(like_t5(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_altered_export_is_refused(tmp_path: Path) -> None:
    """A number of it is another: transformers would take it, and so would we without the digests in its header."""
    file = export_model(like_t5(), tmp_path / "model") / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    assert load_file(file)
    with pytest.raises(UserError, match=r"model\.safetensors was altered after it was written: .* is not"):
        import_model(tmp_path / "model")


def test_sentences_are_long_enough_to_drop() -> None:
    """Of the model with a capacity by sequence, so that the comparison sees it."""
    source, mask, target = sentences(0)
    routing = T5S["by sequence"]().encode(source, mask).routings[0]
    assert int((routing.queued & ~routing.kept).sum()) > 0
    assert target.shape[1] == T
