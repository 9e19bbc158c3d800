"""Models that know nothing of the strategy: a plain LightningModule, a Hugging Face model, a bank of one's own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from small_lm import CLIP, GLOBAL_BATCH, VOCABULARY, Sentences, Watch, quiet, sentences, trainer_for, whole_weights
from torch import Tensor, nn

import moekit as mk
from moekit.experts import Experts
from moekit.huggingface import adopt, routings
from moekit.mixing import ConditionalMix, SoftmaxMix
from moekit.routers import Balance, TopKRouter
from moekit.soft_moe import SoftMoELayer
from moekit.testing import run_distributed, seeded
from moekit.transformer import GLU, MLP, EncoderDecoder, every_other

DIM, EXPERTS, STEPS = 8, 4, 3
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"expert_parallel_size": 2},
    {"expert_parallel_size": "auto", "zero_stage": 1},
    {"expert_parallel_size": 1, "tensor_parallel_size": 2, "zero_stage": 2},
)


def router() -> TopKRouter:
    return TopKRouter(DIM, EXPERTS, 2, balance=Balance(scope="global"), init_scale=1.0)


class Step(L.LightningModule):
    """Loss and optimizer of all models here."""

    def logits(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        raise NotImplementedError

    def loss(self, batch: Tensor) -> Tensor:
        logits, routings = self.logits(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss + (mk.AuxLosses(load_balance=1e-1)(*routings)[0] if routings else 0.0)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class SparseLM(Step):
    """The module that docs/ and the design show: four lines of model, nothing of parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY)
        self.moe = mk.MoELayer(router(), mk.experts.GroupedMLP(EXPERTS, DIM, 4 * DIM))

    def logits(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        hidden, routing = self.moe(self.embed(ids))
        return self.head(hidden), [routing]


class InPlaceOfMLP(nn.Module):
    """A MoELayer where Hugging Face has a feed-forward: returns the hidden states alone."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = mk.MoELayer(router(), mk.experts.GroupedGLU(EXPERTS, DIM, 12, activation="silu", init_scale=1.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.moe(x).hidden
        return hidden


class Llama(Step):
    """A Hugging Face model whose feed-forwards were replaced."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        self.model = transformers.LlamaForCausalLM(config)
        for layer in self.model.model.layers:
            layer.mlp = InPlaceOfMLP()

    def logits(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        return self.model(input_ids=ids, use_cache=False).logits, []


class Adopted(Step):
    """DeepSeek-V3 as transformers has it, adopted: grouped choice, a shared expert, a loss of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers", minversion="5.0")
        config = transformers.DeepseekV3Config(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            intermediate_size=12,
            moe_intermediate_size=6,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            kv_lora_rank=4,
            q_lora_rank=None,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=4,
            max_position_embeddings=16,
            pad_token_id=None,
            initializer_range=0.5,
        )
        self.model = adopt(transformers.DeepseekV3ForCausalLM(config), aux=None)

    def logits(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        with routings(self.model) as heard:
            return self.model(input_ids=ids, use_cache=False).logits, heard


class LowRankExperts(Experts):
    """A bank of one's own: y = gelu(x A) B + c, two small matrices and a bias for each expert, written as einsum.

    Source: ours.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a": ("expert", "embed", "mlp"),
        "b": ("expert", "mlp", "embed"),
        "c": ("expert", "embed"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.dim = EXPERTS, DIM
        self.a = nn.Parameter(torch.randn(EXPERTS, DIM, 4) / 3)
        self.b = nn.Parameter(torch.randn(EXPERTS, 4, DIM) / 2)
        self.c = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        assert counts is not None
        expert = torch.repeat_interleave(torch.arange(counts.numel()), counts)
        hidden = F.gelu(torch.einsum("rd,rdf->rf", rows, self.a[expert]))
        return torch.einsum("rf,rfd->rd", hidden, self.b[expert]) + self.c[expert]

    def reference(self, expert: int, x: Tensor) -> Tensor:
        return F.gelu(x @ self.a[expert]) @ self.b[expert] + self.c[expert]


class OwnBank(SparseLM):
    def __init__(self) -> None:
        super().__init__()
        self.moe = mk.MoELayer(router(), LowRankExperts())


class TwoTasks(Step):
    """An encoder-decoder run twice in one step, with cross-attention, gated layers and sparse ones on both sides."""

    def __init__(self) -> None:
        super().__init__()
        sparse = every_other(
            lambda layer, side: mk.MoELayer(router(), mk.experts.GroupedMLP(EXPERTS, DIM, 8, init_scale=1.0)),
            lambda layer, side: GLU(DIM, 8),
        )
        self.model = EncoderDecoder(VOCABULARY, DIM, 2, 2, 2, 8, feed_forward=sparse, tied=False)

    def logits(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        found, routings = [], []
        for source, target in ((ids, ids.flip(1)), (ids.flip(1), ids)):
            memory = self.model.encode(source)
            out = self.model.decode(target, memory.hidden)
            routings += [*memory.routings, *out.routings]
            found.append(self.model.logits(out.hidden))
        return (found[0] + found[1]) / 2, routings


class Residual(SparseLM):
    """DeepSpeed's residual layer, whose branches are mixed by a gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        bank = mk.experts.GroupedMLP(EXPERTS, DIM, 8, init_scale=1.0)
        self.moe = mk.MoELayer(router(), bank, shared=MLP(DIM, 8), mix=SoftmaxMix(DIM))


class Conditional(SparseLM):
    """NLLB's conditional routing, two layers in a list, so that each gathers its weights itself."""

    def __init__(self) -> None:
        super().__init__()

        def layer() -> nn.Module:
            bank = mk.experts.GroupedMLP(EXPERTS, DIM, 8, init_scale=1.0)
            return Residue(mk.MoELayer(router(), bank, shared=GLU(DIM, 8), mix=ConditionalMix(DIM)))

        self.layers = nn.ModuleList(layer() for _ in range(2))
        del self.moe

    def logits(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        hidden, routings = self.embed(ids), []
        for layer in self.layers:
            hidden, routing = layer(hidden)
            routings.append(routing)
        return self.head(hidden), routings


class Residue(nn.Module):
    def __init__(self, moe: mk.MoELayer) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        hidden, routing = self.moe(x)
        return x + hidden, routing


class Soft(SparseLM):
    """Mixtures of tokens: its bank stays whole, ZeRO divides it."""

    def __init__(self) -> None:
        super().__init__()
        bank = mk.experts.GroupedMLP(EXPERTS, DIM, 8, init_scale=1.0)
        self.moe = SoftMoELayer(bank, 2, allow_future=True)

    def logits(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        hidden, _ = self.moe(self.embed(ids))
        return self.head(hidden), []


MODELS: dict[str, Callable[[], Step]] = {
    c.__name__: c for c in (SparseLM, Llama, Adopted, OwnBank, TwoTasks, Residual, Conditional, Soft)
}
# Llama's own layers name no axes to slice; mixtures of tokens need all experts.
OTHER_LAYOUTS = {
    "Llama": LAYOUTS[:2],
    "Adopted": LAYOUTS[:2],
    "Soft": ({"expert_parallel_size": "auto"}, *LAYOUTS[2:]),
}


def build(name: str) -> Step:
    with seeded(3):
        return MODELS[name]()


def in_one_process(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Norms and weights of plain PyTorch."""
    module = build(name)
    optimizer, norms = module.configure_optimizers(), []
    for ids in sentences(STEPS).split(GLOBAL_BATCH):
        optimizer.zero_grad()
        module.loss(ids).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        optimizer.step()
    return norms, {n: p.detach().clone() for n, p in module.named_parameters()}


def train_all(expected: dict[str, Any]) -> dict[str, str]:
    """What went wrong, by model."""
    wrong = {}
    for name, (norms, weights) in expected.items():
        for layout in OTHER_LAYOUTS.get(name, LAYOUTS):
            try:
                module, watch = build(name), Watch()
                strategy = mk.ExpertParallelStrategy(**layout)
                with quiet():
                    trainer_for(strategy, callbacks=[watch]).fit(module, datamodule=Sentences(sentences(STEPS)))
                if layout["expert_parallel_size"] == "auto":
                    assert strategy.meshes.layout.expert_parallel_size == (1 if name == "Soft" else 2)
                torch.testing.assert_close(torch.tensor(watch.norms), torch.tensor(norms), rtol=1e-5, atol=0.0)
                for key, value in whole_weights(module).items():
                    torch.testing.assert_close(
                        value, weights[key], rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
                    )
            except BaseException:
                wrong[name] = f"{layout}\n{traceback.format_exc()}"
    return wrong


@pytest.fixture(scope="module")
def outcome() -> list[dict[str, str]]:
    return run_distributed(train_all, 2, {name: in_one_process(name) for name in MODELS}, timeout=200.0)


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_in_one_process(name: str, outcome: list[dict[str, str]]) -> None:
    for rank, wrong in enumerate(outcome):
        assert name not in wrong, f"on rank {rank}: {wrong[name]}"
