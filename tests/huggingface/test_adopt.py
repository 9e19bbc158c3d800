"""Models of transformers, adopted: the same logits, gradients, texts and files, for every architecture."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit import AuxLosses
from moekit.errors import UserError
from moekit.huggingface import SPARSE_BLOCKS, AdoptedLayer, adopt, routings
from moekit.layer import MoELayer, MoEOutput
from moekit.routing import Capacity

transformers = pytest.importorskip("transformers", minversion="5.0", reason="adoption is of transformers 5")

V, PAD = 60, 0
COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "moe_intermediate_size": 20, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
GROUPED: dict[str, Any] = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
ONE: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}

# A plain one, then odd ones: one expert, k = E, one choice renormalised, several shared experts, no limit of groups.
CONFIGS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "MixtralSparseMoeBlock": (
        "MixtralConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {"num_local_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
            {"num_local_experts": 3, "num_experts_per_tok": 1, "hidden_act": "gelu", "sliding_window": 4},
        ],
    ),
    "OlmoeSparseMoeBlock": (
        "OlmoeConfig",
        [
            {"num_experts": 6, "num_experts_per_tok": 3},
            {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True},
            {"num_experts": 5, "num_experts_per_tok": 1, "hidden_act": "relu"},
        ],
    ),
    "Qwen2MoeSparseMoeBlock": (
        "Qwen2MoeConfig",
        [
            {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
            {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 12, "norm_topk_prob": True},
            {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
             "shared_expert_intermediate_size": 5},
        ],
    ),
    "Qwen3MoeSparseMoeBlock": (
        "Qwen3MoeConfig",
        [
            {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
            {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 8, "mlp_only_layers": [0]},
            {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "head_dim": 6},
        ],
    ),
    "DeepseekV2Moe": (
        "DeepseekV2Config",
        [
            {**LATENT, **GROUPED, "num_experts_per_tok": 2, "n_shared_experts": 2,
             "topk_method": "group_limited_greedy"},
            {**LATENT, **ONE, "num_experts_per_tok": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.0},
            {**LATENT, **ONE, "num_experts_per_tok": 1, "n_shared_experts": 1, "q_lora_rank": 12},
        ],
    ),
    "DeepseekV3MoE": (
        "DeepseekV3Config",
        [
            {**LATENT, **GROUPED, "num_experts_per_tok": 3, "n_shared_experts": 1},
            {**LATENT, **ONE, "num_experts_per_tok": 4, "n_shared_experts": 2, "norm_topk_prob": False},
            {**LATENT, **ONE, "num_experts_per_tok": 1, "n_shared_experts": 1, "first_k_dense_replace": 0},
        ],
    ),
    "GptOssMLP": (
        "GptOssConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
            {"num_local_experts": 3, "num_experts_per_tok": 3, "head_dim": 8, "swiglu_limit": 0.05},
            {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 6, "sliding_window": 4},
        ],
    ),
    "GraniteMoeMoE": (
        "GraniteMoeConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {"num_local_experts": 3, "num_experts_per_tok": 3, "residual_multiplier": 0.5},
            {"num_local_experts": 1, "num_experts_per_tok": 1},
        ],
    ),
    "PhimoeSparseMoeBlock": (
        "PhimoeConfig",
        [
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {"num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 1.0, "attention_bias": True},
            {"num_local_experts": 2, "num_experts_per_tok": 2},
        ],
    ),
}  # fmt: skip
CASES = [(block, n) for block, (_, made) in CONFIGS.items() for n in range(len(made))]


def model(block: str = "Qwen3MoeSparseMoeBlock", number: int = 0, **more: Any) -> Any:
    """One of the configurations, with weights that make all parts matter."""
    kind, made = CONFIGS[block]
    torch.manual_seed(number)
    config = getattr(transformers, kind)(**{**COMMON, **made[number], **more})
    found = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in (*found.parameters(), *(b for name, b in found.named_buffers() if "correction" in name)):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return found.eval()


def tokens(seed: int = 5, *shape: int) -> Tensor:
    return torch.randint(3, V, shape or (2, 9), generator=torch.Generator().manual_seed(seed))


def left_padded() -> tuple[Tensor, Tensor]:
    """Tokens, and their mask: the first row begins with four of padding."""
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :4], mask[0, :4] = PAD, 0
    return ids, mask


def gradients(found: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in found.named_parameters() if p.grad is not None}


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    a, b = gradients(one), gradients(other)
    assert list(a) == list(b)
    for name, grad in a.items():
        torch.testing.assert_close(b[name], grad, rtol=1e-4, atol=1e-5 * max(float(grad.abs().max()), 1e-3), msg=name)
        assert b[name].stride() == grad.stride(), f"{name}: another layout is copied by the optimizer"


def generated(found: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    out: Tensor = found.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return out


def test_every_known_block_has_cases() -> None:
    assert CONFIGS.keys() == SPARSE_BLOCKS.keys()
    assert all(len(made) == 3 for _, made in CONFIGS.values())


@pytest.mark.parametrize(("block", "number"), CASES, ids=[f"{block}-{n}" for block, n in CASES])
def test_adopted_equals_original(block: str, number: int, tmp_path: Path) -> None:
    theirs = model(block, number)
    ours = copy.deepcopy(theirs)
    before = {name: id(p) for name, p in ours.named_parameters()}
    assert adopt(ours, aux=None) is ours
    assert {name: id(p) for name, p in ours.named_parameters()} == before, "parameters are the same objects, in order"
    assert any(type(module) is AdoptedLayer for module in ours.modules())
    assert not any(type(module).__name__ in SPARSE_BLOCKS for module in ours.modules())

    ids = tokens()
    for found in (theirs, ours):
        found(ids, labels=ids).loss.backward()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert_same_gradients(theirs, ours)
    assert torch.equal(generated(ours, ids[:, :3]), generated(theirs, ids[:, :3]))

    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("block", CONFIGS)
def test_padding_is_not_routed(block: str) -> None:
    theirs = model(block)
    ours, (ids, mask) = adopt(copy.deepcopy(theirs), aux=None), left_padded()
    real = mask.bool()
    with routings(ours) as heard:
        got = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[real], theirs(ids, attention_mask=mask).logits[real], rtol=1e-5, atol=1e-5)
    assert torch.equal(generated(ours, ids, mask), generated(theirs, ids, mask))
    for routing in heard:
        kept = routing.token[routing.kept].unique()
        assert torch.equal(kept, real.flatten().nonzero().flatten())


@pytest.mark.parametrize("block", ["MixtralSparseMoeBlock", "DeepseekV3MoE", "DeepseekV2Moe"])
def test_checkpointed_blocks_keep_the_mask_of_their_own_forward(block: str) -> None:
    plain, (ids, mask) = adopt(model(block)).train(), left_padded()
    kept = copy.deepcopy(plain)
    kept.gradient_checkpointing_enable()
    others = mask.flip(1)
    for found in (plain, kept):
        one = found(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        two = found(tokens(7), labels=ids, use_cache=False).loss
        three = found(ids.flip(1), attention_mask=others, labels=ids, use_cache=False).loss
        (one + 2 * two + 3 * three).backward()  # three forwards before their backward
    assert_same_gradients(plain, kept)


def test_checkpoints_that_lose_the_losses_are_refused() -> None:
    ours, (ids, mask) = adopt(model()).train(), left_padded()
    ours.gradient_checkpointing_enable({"use_reentrant": True})
    ours.enable_input_require_grads()
    with pytest.raises(UserError, match="use_reentrant"):
        ours(ids, attention_mask=mask, labels=ids, use_cache=False)
    ours.eval()(ids, attention_mask=mask)


def test_a_recomputed_mask_is_not_that_of_the_next_call() -> None:
    theirs, (ids, mask) = model(), left_padded()
    ours, other = adopt(copy.deepcopy(theirs)).train(), tokens(9)
    ours.gradient_checkpointing_enable()
    ours(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        got, expected = (found.eval().model(other).last_hidden_state for found in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_threads_have_forwards_of_their_own() -> None:
    ours, (ids, mask) = adopt(model()), left_padded()
    with torch.no_grad():
        alone = ours(ids, attention_mask=mask).logits[mask.bool()]
    got: list[Tensor] = []

    def padded() -> None:
        with torch.no_grad():
            got.append(ours(ids, attention_mask=mask).logits[mask.bool()])

    def amid(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=padded)
        thread.start()
        thread.join()

    full = tokens(9)
    with torch.no_grad():
        expected = ours(full, attention_mask=torch.ones_like(full)).logits
        handle = ours.model.layers[1].register_forward_pre_hook(amid)
        with routings(ours) as heard:
            torch.testing.assert_close(ours(full).logits, expected)
    assert len(heard) == 2
    torch.testing.assert_close(got[0], alone)


def test_losses_are_added_to_a_tuple_too() -> None:
    ours, ids = adopt(model()).train(), tokens()
    expected = ours(ids, labels=ids)
    loss, logits = ours(ids, labels=ids, return_dict=False, use_cache=False)[:2]
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(ours(ids, return_dict=False)[0], expected.logits)


def test_losses_of_routers_are_added_in_training_alone() -> None:
    ids = tokens()
    plain, ours = model(), adopt(model())
    assert ours(ids, labels=ids).loss.item() == pytest.approx(plain(ids, labels=ids).loss.item(), rel=1e-6)
    ours.train()
    with routings(ours) as heard:
        out = ours(ids, labels=ids)
    assert len(heard) == 2
    total, terms = AuxLosses(layers="mean", load_balance=2 * ours.config.router_aux_loss_coef)(*heard)
    assert total.item() > 0
    assert (out.loss - total).item() == pytest.approx(plain(ids, labels=ids).loss.item(), rel=1e-6)
    assert out.aux_loss.item() == pytest.approx(terms["load_balance"].item())
    gate = [ours.get_parameter("model.layers.0.mlp.gate.weight")]
    (whole,) = torch.autograd.grad(out.loss, gate, retain_graph=True)
    (of_losses,) = torch.autograd.grad(total, gate)
    torch.testing.assert_close(
        whole - of_losses,
        torch.autograd.grad(plain(ids, labels=ids).loss, [plain.get_parameter("model.layers.0.mlp.gate.weight")])[0],
    )
    assert of_losses.abs().sum().item() > 0


def test_losses_of_ones_own() -> None:
    ids = tokens()
    ours = adopt(model(), aux=AuxLosses(load_balance=0.5)).train()
    with routings(ours) as heard:
        loss = ours(ids, labels=ids).loss
    plain = adopt(model(), aux=None).train()
    expected = AuxLosses(load_balance=0.5)(*heard)[0]
    assert (loss - plain(ids, labels=ids).loss).item() == pytest.approx(expected.item(), rel=1e-3)
    assert ours(ids).loss is None, "without labels there is no loss to add to"


def test_a_failed_forward_leaves_no_trace() -> None:
    ours, ids = adopt(model()).train(), tokens()
    expected = ours(ids, labels=ids).loss
    with pytest.raises(IndexError), routings(ours) as heard:
        ours(torch.full((1, 3), V))
    assert heard == []
    assert torch.equal(ours(ids, labels=ids).loss, expected)


def test_copies_and_pickles_hear_for_themselves() -> None:
    ours, ids = adopt(model()).train(), tokens()
    expected = ours(ids, labels=ids).loss
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with routings(ours) as mine, routings(other) as heard:
            assert torch.equal(other(ids, labels=ids).loss, expected)
        assert (len(mine), len(heard)) == (0, 2)


def test_layers_are_those_of_moekit() -> None:
    ours, ids = adopt(model("Qwen2MoeSparseMoeBlock")), tokens()
    layer = next(module for module in ours.modules() if isinstance(module, MoELayer))
    outputs: list[Any] = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    ours(ids)
    handle.remove()
    assert isinstance(outputs[0], MoEOutput)
    assert layer.router is layer.gate
    assert layer.shared is layer.shared_expert
    layer.router.capacity = Capacity(train=0.5, minimum=1)
    ours.train()
    with routings(ours) as heard:
        ours(ids, labels=ids).loss.backward()
    assert int((~heard[0].kept).sum()) > 0
    layer.router = copy.deepcopy(layer.router)
    assert "router" not in layer._modules
    del layer.shared
    assert not hasattr(layer, "shared_expert")


def test_jitter_is_that_of_the_original() -> None:
    theirs = model("MixtralSparseMoeBlock", router_jitter_noise=0.3).train()
    ours, ids = adopt(copy.deepcopy(theirs), aux=None), tokens()
    losses = []
    for found in (theirs, ours):
        torch.manual_seed(3)
        losses.append(found(ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert_same_gradients(theirs, ours)
    torch.manual_seed(4)
    assert not torch.equal(ours(ids, labels=ids).loss, losses[1])


@pytest.fixture
def repeated_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The same uniform and exponential numbers, whatever is drawn in between: a call begins anew."""
    drawn = {"n": 0}

    def uniform(like: Tensor) -> Tensor:
        drawn["n"] += 1
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(drawn["n"]))

    def begin() -> None:
        drawn["n"] = 0
        monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(-uniform(self).log()))
        monkeypatch.setattr(torch, "rand_like", uniform)
        monkeypatch.setattr(Tensor, "uniform_", lambda self, *_: self)  # transformers draws once more

    return begin


@pytest.mark.parametrize("number", range(3))
def test_sparse_mixer_trains_as_the_original(number: int, repeated_draws: Callable[[], None]) -> None:
    theirs = model("PhimoeSparseMoeBlock", number).train()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if name.endswith("router.weight"):
                tensor.mul_(0.05)  # scores that are near each other, so that draws decide
    ours, ids = adopt(copy.deepcopy(theirs), aux=None), tokens(5, 6, 12)
    losses = []
    for found in (theirs, ours):
        repeated_draws()
        losses.append(found(ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)  # there a third is 0.3333
    for name, grad in gradients(theirs).items():
        close = 1e-3 * max(float(grad.abs().max()), 1e-3)
        torch.testing.assert_close(gradients(ours)[name], grad, rtol=1e-3, atol=close, msg=name)


def test_low_precision_keeps_scores_in_float32() -> None:
    theirs = model("OlmoeSparseMoeBlock")
    ours = adopt(copy.deepcopy(theirs).to(torch.bfloat16), aux=None)
    with routings(ours) as heard:
        logits = ours(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert heard[0].weight.dtype == torch.float32
    assert float((logits.float() - theirs(tokens()).logits).detach().abs().max()) < 0.2


def test_compiles_in_one_graph() -> None:
    ours, ids = adopt(model("DeepseekV3MoE"), aux=None), tokens()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, ours(ids, use_cache=False).logits)


def dense() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))


def with_unknown_block() -> Any:
    class NewExperts(nn.Linear):
        pass

    found = model()
    found.model.layers[1].extra = NewExperts(2, 2)
    return found


def as_of_old() -> Any:
    found = model("MixtralSparseMoeBlock")
    block = found.model.layers[1].mlp
    block.experts = nn.ModuleList([nn.Linear(2, 2)])
    return found


def quantized() -> Any:
    found = model()
    experts = found.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    return found


def loaded_by_parts() -> Any:
    found = model()
    found.model.layers[1].mlp.experts._hf_hook = object()
    return found


def wanting_logits() -> Any:
    return model(output_router_logits=True)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dense": (dense, "no sparse block"),
    "unknown": (with_unknown_block, "NewExperts"),
    "older": (as_of_old, "transformers>=5"),
    "quantized": (quantized, "quantization"),
    "by parts": (loaded_by_parts, "device_map"),
    "router logits": (wanting_logits, "output_router_logits"),
    "twice": (lambda: adopt(model()), "adopted already"),
    "a block": (lambda: model().model.layers[0].mlp, "the sparse block"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_stay_as_they_are(name: str) -> None:
    make, words = REFUSED[name]
    found = make()
    kinds = [type(module) for module in found.modules()]
    hooks = len(found._forward_pre_hooks)
    with pytest.raises(UserError, match=words):
        adopt(found)
    assert [type(module) for module in found.modules()] == kinds
    assert len(found._forward_pre_hooks) == hooks


def test_switch_is_read_from_its_folder() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, num_decoder_layers=1, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="import_model"):
        adopt(transformers.SwitchTransformersForConditionalGeneration(config))


def test_what_cannot_be_asked_of_an_adopted_model() -> None:
    ours = adopt(model())
    with pytest.raises(UserError, match="routings"):
        ours(tokens(), output_router_logits=True)
    with pytest.raises(UserError, match="adopt"), routings(model()):
        pass
