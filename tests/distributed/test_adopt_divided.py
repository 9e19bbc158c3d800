"""Folders of transformers, divided while they are read: each rank its part, trained and made a folder again."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_lm import CLIP, GLOBAL_BATCH, VOCABULARY, Sentences, quiet, sentences, trainer_for, whole_weights
from torch import Tensor, nn

import moekit as mk
from moekit.errors import UserError
from moekit.huggingface import (
    AdoptedLayer,
    adopt,
    adopt_folder,
    consolidate_folder,
    read_adapters,
    write_adapters,
)
from moekit.huggingface.folder import _Files
from moekit.parallel import build_meshes, gather_state_dict, parallelize
from moekit.parallel.layout import Layout
from moekit.parallel.mesh import World
from moekit.surgery import add_adapters
from moekit.testing import run_distributed, seeded
from moekit.training.fine_tuning import subset, train_only
from moekit.transformer.init import materialize_modules

transformers = pytest.importorskip("transformers", minversion="5.0", reason="folders are those of transformers 5")

STEPS = 3
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"expert_parallel_size": 2, "zero_stage": 3},
    {"expert_parallel_size": 2, "zero_stage": 0},
    {"expert_parallel_size": 1, "zero_stage": 2, "offload": "optimizer"},
)
LAYOUTS_OF = {"mixtral": LAYOUTS, "switch": LAYOUTS[:1]}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True)
    return transformers.MixtralForCausalLM(config)


def switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, decoder_start_token_id=0,
        dropout_rate=0.0, router_jitter_noise=0.0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def written(room: Path) -> None:
    """Both as folders, with weights that matter."""
    torch.manual_seed(0)
    for name, made in (("mixtral", mixtral()), ("switch", switch())):
        with torch.no_grad():
            for tensor in made.parameters():
                tensor.add_(0.3 * torch.randn_like(tensor))
        made.save_pretrained(room / name)


class FineTune(L.LightningModule):
    """A folder as a LightningModule, built on the meta device when the Trainer asks for it."""

    def __init__(self, folder: Path, device: str = "meta", *, adapters: bool = False) -> None:
        super().__init__()
        self.folder, self.device_of_model, self.adapters, self.model = folder, device, adapters, None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = adopt_folder(self.folder, device=self.device_of_model, aux=None)
        if self.adapters:
            with seeded(3):
                add_adapters(self.model, rank=2, targets=("experts", "routers", "attention"))
            train_only(self, subset("adapters"))

    def loss(self, ids: Tensor) -> Tensor:
        assert self.model is not None
        given = {"decoder_input_ids": ids[:, :-1]} if self.model.config.is_encoder_decoder else {}
        logits = self.model(input_ids=ids[:, :-1], use_cache=False, **given).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def in_one_process(folder: Path, *, adapters: bool = False) -> dict[str, Tensor]:
    """Weights of plain PyTorch."""
    module = FineTune(folder, "cpu", adapters=adapters)
    module.configure_model()
    module.train()
    optimizer = module.configure_optimizers()
    for ids in sentences(STEPS).split(GLOBAL_BATCH):
        optimizer.zero_grad()
        module.loss(ids).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def peak(memory: str = "VmHWM") -> int:
    """KiB of this process: the peak since it was last forgotten, or VmRSS now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(memory)).split()[1])


def memory_of_dividing(folder: str) -> tuple[int, int, list[str], bool]:
    """KiB of the model, KiB of the peak while it is divided and read, keys read, and whether what is held is right."""
    read: list[str] = []
    former = _Files._read

    def noted(self: _Files, chunk: Any) -> Tensor:
        read.append(chunk.key)
        return former(self, chunk)

    _Files._read = noted  # type: ignore[method-assign]
    model = adopt_folder(folder, device="meta", aux=None)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) // 1024
    meshes = build_meshes(Layout(devices=2, expert_parallel_size=2, zero_stage=3), "cpu", World("cpu", 1, None))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak("VmRSS")
    parallelize(model, meshes, weights=materialize_modules(model, "cpu"))
    most = peak() - before
    right = True
    for path, layer in ((p, m) for p, m in model.named_modules() if isinstance(m, AdoptedLayer)):
        bank = layer.experts.down_proj.to_local()
        number = int(path.split(".")[2])
        first = dist.get_rank() * 4
        right &= bool((bank[:, 0, 0] == torch.arange(first, first + 4) + 100.0 * number).all())
    return size, most, sorted(set(read)), right


def large(folder: Path) -> None:
    """A Mixtral of 200 MB, whose experts say which they are."""
    config = transformers.MixtralConfig(
        **{**SIZES, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8},
        num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        made = transformers.MixtralForCausalLM(config)
    made.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.fill_(1.0)
        for number, layer in enumerate(made.model.layers):
            layer.mlp.experts.down_proj += torch.arange(8)[:, None, None] + 100.0 * number - 1
    made.save_pretrained(folder)


def train_all(room: str, expected: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    """What went wrong, by case."""
    wrong: dict[str, str] = {}
    place = Path(room)
    for name, weights in expected.items():
        for number, layout in enumerate(LAYOUTS_OF[name]):
            try:
                module = FineTune(place / name)
                with quiet():
                    trainer = trainer_for(mk.ExpertParallelStrategy(**layout))
                    trainer.fit(module, datamodule=Sentences(sentences(STEPS)))
                    trainer.save_checkpoint(place / f"{name}-{number}.ckpt")
                for key, value in whole_weights(module).items():
                    torch.testing.assert_close(
                        value, weights[key], rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
                    )
            except BaseException:
                wrong[name] = f"{layout}\n{traceback.format_exc()}"
    return wrong


def train_adapters(room: str, expected: dict[str, Tensor]) -> str:
    """What went wrong with adapters of a divided model."""
    try:
        place = Path(room)
        module = FineTune(place / "mixtral", "cpu", adapters=True)
        with quiet():
            trainer = trainer_for(mk.ExpertParallelStrategy(**LAYOUTS[0]))
            trainer.fit(module, datamodule=Sentences(sentences(STEPS)))
        for key, value in whole_weights(module).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
        write_adapters(module.model, place / "adapter", base="mixtral")

        drawn = adopt_folder(place / "mixtral", device="meta", aux=None)
        add_adapters(drawn, rank=2, alpha=6.0, targets=("experts", "routers"))
        meshes = build_meshes(Layout(devices=2, expert_parallel_size=2, zero_stage=3), "cpu", World("cpu", 1, None))
        parallelize(drawn, meshes, weights=materialize_modules(drawn, "cpu"))
        state = gather_state_dict(drawn)
        plain = adopt_folder(place / "mixtral", aux=None).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in plain.items()), "what was read"
        pairs = {name: tensor for name, tensor in state.items() if name not in plain}
        assert len(pairs) == 2 * 3 * 3
        for name, tensor in pairs.items():
            assert {"down": tensor.std() > 0, "up": not tensor.any(), "scale": float(tensor.max()) == 3}[
                name.rpartition(".")[2]
            ], name
    except BaseException:
        return traceback.format_exc()
    return ""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folders")
    written(place)
    large(place / "large")
    return place


@pytest.fixture(scope="module")
def expected(room: Path) -> dict[str, dict[str, Tensor]]:
    found = {name: in_one_process(room / name) for name in ("mixtral", "switch")}
    return {**found, "adapters": in_one_process(room / "mixtral", adapters=True)}


@pytest.fixture(scope="module")
def outcome(room: Path, expected: dict[str, dict[str, Tensor]]) -> list[Any]:
    return run_distributed(all_cases, 2, str(room), expected, timeout=240.0)


def all_cases(room: str, expected: dict[str, dict[str, Tensor]]) -> tuple[Any, Any, str]:
    whole = {name: weights for name, weights in expected.items() if name != "adapters"}
    return memory_of_dividing(f"{room}/large"), train_all(room, whole), train_adapters(room, expected["adapters"])


def test_no_rank_holds_the_whole_model(outcome: list[Any]) -> None:
    (size, first, keys, right), (_, second, other, also) = (memory for memory, _, _ in outcome)
    assert size > 190_000
    assert right
    assert also
    assert max(first, second) < 0.85 * size, f"peaks of {first} and {second} KiB for a model of {size}"
    experts = [{key for key in read if ".experts." in key} for read in (keys, other)]
    assert len(experts[0]) == len(experts[1]) == 8 * 4 * 3
    assert not experts[0] & experts[1], "each rank reads its own experts"


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_trains_as_in_one_process(name: str, outcome: list[Any]) -> None:
    for rank, (_, wrong, _) in enumerate(outcome):
        assert name not in wrong, f"on rank {rank}: {wrong[name]}"


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_a_checkpoint_becomes_a_folder_again(
    name: str, room: Path, outcome: list[Any], expected: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    (room / name / "tokenizer.json").write_text("{}")
    for number in range(len(LAYOUTS_OF[name])):
        out = tmp_path / str(number)
        consolidate_folder(room / f"{name}-{number}.ckpt", room / name, out)
        assert (out / "tokenizer.json").read_text() == "{}"
        kind = {"mixtral": transformers.AutoModelForCausalLM, "switch": transformers.AutoModelForSeq2SeqLM}[name]
        theirs = adopt(kind.from_pretrained(out), aux=None)
        for key, value in theirs.named_parameters():
            torch.testing.assert_close(value, expected[name][f"model.{key}"], rtol=1e-4, atol=2e-6)
    with pytest.raises(UserError, match="empty folder"):
        consolidate_folder(room / f"{name}-0.ckpt", room / name, tmp_path)
    with pytest.raises(UserError, match="must hold the tensors"):
        consolidate_folder(room / f"{name}-0.ckpt", room / "large", tmp_path / "other")


def test_adapters_of_a_divided_model(room: Path, outcome: list[Any], expected: dict[str, dict[str, Tensor]]) -> None:
    assert [wrong for _, _, wrong in outcome] == ["", ""]
    whole = adopt_folder(room / "mixtral", aux=None)
    for name in read_adapters(whole, room / "adapter"):
        torch.testing.assert_close(
            whole.get_parameter(name), expected["adapters"][f"model.{name}"], rtol=1e-4, atol=2e-6
        )
