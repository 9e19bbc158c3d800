"""Heads: what they compute, against the obvious form, and that each trains alone."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import moekit as mk
from moekit.data.batch import Batch
from moekit.errors import UserError
from moekit.heads import (
    CausalLMHead,
    DenoisingHead,
    Head,
    MaskedLMHead,
    ReplacedTokenHead,
    TranslationHead,
    predict,
)
from moekit.transformer import DecoderOnly, EncoderDecoder, EncoderOnly, every_other

VOCAB, DIM = 60, 16


def sparse(layer: int, side: str) -> mk.MoELayer:
    return mk.MoELayer(mk.routers.switch(DIM, 4), mk.experts.GroupedMLP(4, DIM, 32))


def seq2seq() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(VOCAB, DIM, 2, 2, 2, 32, feed_forward=every_other(sparse))


def make_batch(task: str, rows: int = 3, width: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([width, width - 2, width - 3])[:rows]
    mask = torch.arange(width) < lengths[:, None]
    source = torch.where(mask, torch.randint(45, VOCAB, (rows, width), generator=generator), 0)
    target = torch.where(mask, torch.randint(45, VOCAB, (rows, width), generator=generator), 0)
    labels = None
    has_target = task in ("translation", "denoising", "causal_lm")
    if task in ("masked_lm", "replaced_token"):
        places = torch.zeros_like(mask)
        places[:, 1::3] = True
        places &= mask
        labels = torch.where(places, source, -100)
        source = torch.where(places, 4, source)
    ids = torch.arange(rows) % 2
    return Batch(task, source, mask, target if has_target else None, mask if has_target else None, labels, ids, 1 - ids)


def make_head(task: str) -> tuple[Head, torch.nn.Module]:
    torch.manual_seed(3)
    model: torch.nn.Module = seq2seq()
    if task == "translation":
        return TranslationHead(label_smoothing=0.1), model
    if task == "denoising":
        return DenoisingHead(label_smoothing=0.0), model
    if task == "masked_lm":
        return MaskedLMHead(DIM), model
    if task == "replaced_token":
        return ReplacedTokenHead(EncoderOnly(VOCAB, 8, 2, 1, 16), DIM), model
    return CausalLMHead(), DecoderOnly(VOCAB, DIM, 2, 2, 32, feed_forward=every_other(sparse))


TASKS = ["translation", "denoising", "masked_lm", "replaced_token", "causal_lm"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_predict_equals_torch_cross_entropy(smoothing: float) -> None:
    logits = torch.randn(11, 9, dtype=torch.float32, requires_grad=True)
    labels = torch.randint(0, 9, (11,))
    out = predict(logits, labels, smoothing)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.nll, F.cross_entropy(logits, labels, reduction="sum").detach())
    assert int(out.correct) == int((logits.argmax(-1) == labels).sum())
    (ours,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs)


def test_predicting_nothing_is_zero_with_a_gradient_path() -> None:
    logits = torch.randn(0, 9, requires_grad=True)
    out = predict(logits, torch.zeros(0, dtype=torch.long))
    assert out.loss.item() == 0.0
    assert out.loss.requires_grad
    assert int(out.num_predictions) == 0


@pytest.mark.parametrize("task", TASKS)
def test_padding_is_irrelevant(task: str) -> None:
    """More padding, and other ids under it, change neither loss nor counts."""
    head, model = make_head(task)
    head.eval()
    model.eval()
    batch = make_batch(task)
    torch.manual_seed(5)
    before = head(batch, model)
    wider = {}
    for name in ("source", "source_mask", "target", "target_mask", "labels"):
        value = getattr(batch, name)
        if value is not None:
            fill = {"source": 57, "target": 58, "labels": -100}.get(name, 0)
            value = torch.where(batch.source_mask, value, torch.full_like(value, fill)) if fill else value
            value = F.pad(value, (0, 3), value=fill)
        wider[name] = value
    torch.manual_seed(5)
    after = head(
        Batch(task, source_language=batch.source_language, target_language=batch.target_language, **wider), model
    )
    torch.testing.assert_close(after.loss, before.loss)
    assert int(after.num_predictions) == int(before.num_predictions)
    assert int(after.correct) == int(before.correct)


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_every_parameter_that_takes_part(task: str) -> None:
    head, model = make_head(task)
    out = head(make_batch(task), model)
    out.loss.backward()
    idle = {"masked_lm": "decoder", "replaced_token": "decoder"}.get(task, "nothing")
    for owner in (head, model):
        for name, parameter in owner.named_parameters():
            if not name.startswith(idle) and "router" not in name and "experts" not in name:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
    routers = [p for name, p in model.named_parameters() if "router" in name and not name.startswith(idle)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)


def test_translation_equals_the_obvious_loop() -> None:
    head, model = make_head("translation")
    model.eval()
    batch = make_batch("translation")
    out = head(batch, model)
    assert batch.target is not None
    total, count = torch.zeros(()), 0
    memory = model.encode(batch.source, batch.source_mask, language=batch.source_language)
    decoded = model.decode(
        batch.target[:, :-1], memory.hidden, batch.source_mask, batch.source_mask[:, 1:], batch.target_language
    )
    logits = model.logits(decoded.hidden)
    for row in range(3):
        for place in range(6):
            if batch.source_mask[row, place + 1]:
                total = total - logits[row, place].log_softmax(-1)[batch.target[row, place + 1]]
                count += 1
    torch.testing.assert_close(out.nll, total.detach(), rtol=1e-5, atol=1e-5)
    assert int(out.num_predictions) == count
    assert list(out.routings) == ["encoder.1", "decoder.1"]


def test_masked_lm_predicts_masked_places_only() -> None:
    head, model = make_head("masked_lm")
    out = head(make_batch("masked_lm"), model)
    assert int(out.num_predictions) == int((make_batch("masked_lm").labels >= 0).sum())
    assert list(out.routings) == ["encoder.1"]


def test_replaced_token_labels_are_true() -> None:
    """A sample equal to the original counts as original; only masked places change."""
    head, model = make_head("replaced_token")
    assert isinstance(head, ReplacedTokenHead)
    batch = make_batch("replaced_token")
    assert batch.labels is not None
    filled, loss = head.fill(batch)
    masked = batch.labels >= 0
    assert torch.equal(filled[~masked], batch.source[~masked])
    assert not bool((filled[masked] == 4).all())
    assert loss.requires_grad
    out = head(batch, model)
    assert int(out.num_predictions) == int(batch.source_mask.sum())
    assert set(out.extra) == {"generator_loss", "discriminator_loss", "replaced", "detected"}
    expected = out.extra["generator_loss"] + 50 * out.extra["discriminator_loss"]
    torch.testing.assert_close(out.loss.detach(), expected)


def test_discriminator_does_not_train_the_generator() -> None:
    """Sampling cuts the gradient: the generator learns from its own masked LM loss alone."""
    head, model = make_head("replaced_token")
    assert isinstance(head, ReplacedTokenHead)
    grads = []
    for weight in (0.0, 50.0):
        head.zero_grad()
        head.discriminator_weight = weight
        torch.manual_seed(9)
        head(make_batch("replaced_token"), model).loss.backward()
        grads.append([p.grad.clone() for p in head.generator.parameters()])
    for without, beside in zip(*grads, strict=True):
        torch.testing.assert_close(without, beside)


@pytest.mark.parametrize("task", TASKS)
def test_every_head_trains_alone(task: str, tmp_path: object) -> None:
    head, model = make_head(task)
    head.backbone, head.aux, head.learning_rate = model, mk.AuxLosses(load_balance=1e-2), 1e-2
    batches = [{task: make_batch(task)}] * 30
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    torch.manual_seed(7)
    before = head(batches[0][task]).loss.item()
    trainer.fit(head, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    torch.manual_seed(7)
    after = head(batches[0][task]).loss.item()
    assert after < before
    names = set(trainer.callback_metrics)
    assert {f"train/{task}/loss", f"train/{task}/accuracy", f"valid/{task}/loss", "train/aux/load_balance"} <= names


def test_a_head_without_backbone_says_so() -> None:
    with pytest.raises(ValueError, match="needs a backbone"):
        TranslationHead()(make_batch("translation"))


@pytest.mark.parametrize(("task", "lacking"), [("translation", "target"), ("masked_lm", "labels")])
def test_a_batch_of_another_shape_is_refused(task: str, lacking: str) -> None:
    head, model = make_head(task)
    other = make_batch("masked_lm" if task == "translation" else "translation")
    with pytest.raises(ValueError, match=f"must have (a )?{lacking}"):
        head(other, model)


def test_label_smoothing_out_of_range() -> None:
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        TranslationHead(label_smoothing=1.0)


def literal_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Linear, GELU by tanh: the first half of BERT's and ELECTRA's heads, written out."""
    x = hidden @ weight.t() + bias
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def literal_norm(x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() * gain + shift


@torch.no_grad()
def stirred(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))


def test_the_generators_head_is_berts() -> None:
    """google-research/electra: dense, activation, layer norm, then the tied embedding's scores."""
    head, _ = make_head("replaced_token")
    assert isinstance(head, ReplacedTokenHead)
    head.eval()
    stirred(head)
    batch = make_batch("replaced_token")
    assert batch.labels is not None
    masked, generator = batch.labels >= 0, head.generator
    hidden = generator.encode(batch.source, batch.source_mask, language=batch.source_language).hidden[masked]  # type: ignore[operator]
    transform = head.generator_transform
    assert transform.dense.weight.shape == (8, 8)
    middle = literal_head(hidden, transform.dense.weight, transform.dense.bias)
    normed = literal_norm(middle, transform.norm.weight, transform.norm.bias)
    expected = predict(normed @ generator.embedding.weight.t(), batch.labels[masked]).loss  # type: ignore[union-attr,operator]
    torch.testing.assert_close(head.fill(batch)[1], expected)


def test_the_discriminators_head_is_electras() -> None:
    """google-research/electra: dense, activation, one score; no norm."""
    head, model = make_head("replaced_token")
    assert isinstance(head, ReplacedTokenHead)
    head.eval()
    model.eval()
    stirred(head)
    batch = make_batch("replaced_token")
    out, (filled, _) = head(batch, model), head.fill(batch)
    real = batch.source_mask
    hidden = model.encode(filled, real, language=batch.source_language).hidden[real]  # type: ignore[operator]
    score = literal_head(hidden, head.transform.weight, head.transform.bias) @ head.detect.weight.t() + head.detect.bias
    assert batch.labels is not None
    replaced = (filled != torch.where(batch.labels >= 0, batch.labels, batch.source))[real]
    chance = torch.sigmoid(score.squeeze(-1))
    expected = -torch.where(replaced, chance, 1 - chance).log().sum()
    torch.testing.assert_close(out.nll, expected.detach(), rtol=1e-4, atol=1e-4)


def test_the_masked_lm_head_is_berts() -> None:
    head, model = make_head("masked_lm")
    assert isinstance(head, MaskedLMHead)
    model.eval()
    stirred(head)
    batch = make_batch("masked_lm")
    scores = head.score(batch, model)
    assert batch.labels is not None
    hidden = model.encode(batch.source, batch.source_mask, language=batch.source_language).hidden  # type: ignore[operator]
    transform = head.transform
    middle = literal_head(hidden[batch.labels >= 0], transform.dense.weight, transform.dense.bias)
    normed = literal_norm(middle, transform.norm.weight, transform.norm.bias)
    torch.testing.assert_close(scores.logits, normed @ model.embedding.weight.t())  # type: ignore[union-attr,operator]


def test_weights_of_a_generator_without_its_head_are_refused_by_name() -> None:
    head, _ = make_head("replaced_token")
    heads = torch.nn.ModuleDict({"replaced_token": head})
    old = {name: tensor for name, tensor in heads.state_dict().items() if "generator_transform" not in name}
    with pytest.raises(UserError, match=r"replaced_token\.generator_transform\.dense\.weight is missing"):
        heads.load_state_dict(old)
    assert isinstance(head, ReplacedTokenHead)
    fresh = head.generator_transform.state_dict(prefix="replaced_token.generator_transform.")
    heads.load_state_dict({**old, **fresh})  # the way that the message names
    heads.load_state_dict(heads.state_dict())
