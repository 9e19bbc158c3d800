"""Adopted models with fewer experts, for every architecture: transformers opens them, and they are the chosen ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adoptable import CONFIGS, model, tokens
from hf_models import nllb, switch
from torch import Tensor

from moekit.errors import UserError
from moekit.huggingface import adopt, adopt_folder, choose_kept, layout_of, prune, write_folder
from moekit.huggingface.pruning import adopted_layers
from moekit.surgery import add_adapters, watch_experts

transformers = pytest.importorskip("transformers", minversion="5.0", reason="adoption is of transformers 5")
OTHERS = {"switch": switch, "nllb": lambda: nllb(dropout=0.0, attention_dropout=0.0)}
FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")


def made(block: str) -> tuple[Any, dict[str, Tensor]]:
    ids = tokens(5).clamp(max=39)
    if block in OTHERS:
        return adopt(OTHERS[block](), aux=None), {"input_ids": ids, "decoder_input_ids": ids}
    wide = {"n_routed_experts": 16} if block.startswith("Deepseek") else {}
    return adopt(model(block, 0, **wide), aux=None), {"input_ids": ids}


@pytest.mark.parametrize("block", [*CONFIGS, *OTHERS])
def test_transformers_opens_a_pruned_folder(block: str, tmp_path: Path) -> None:
    whole, given = made(block)
    with watch_experts(whole) as use, torch.no_grad():
        before = whole(**given).logits
    of = next(iter(adopted_layers(whole).values())).num_experts
    keep = of - 1 if of < 8 else of // 2
    kept = choose_kept(whole, keep, "reap", load={path: one.saliency for path, one in use.items()})
    fewer = prune(whole, kept)
    state, was = fewer.state_dict(), whole.state_dict()
    for path, layer in adopted_layers(whole).items():
        for name, dim in layer.dims.items():
            assert torch.equal(state[name], was[name].index_select(dim, kept[path])), name
    assert {layer.num_experts for layer in layout_of(fewer).layers} == {keep}
    fewer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config[name] for name in FIELDS if name in config] == [keep]
    again = type(whole).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours = fewer(**given).logits
        theirs = (adopt(again, aux=None) if block == "nllb" else again)(**given).logits
        assert torch.equal(whole(**given).logits, before), "the first is as it was"
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, before)


def test_pruned_of_every_expert_it_is_the_same_and_tied_tables_stay_tied(tmp_path: Path) -> None:
    theirs = model("MixtralSparseMoeBlock", 2, tie_word_embeddings=True).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    whole = adopt_folder(tmp_path, aux=None)
    same = prune(whole, choose_kept(whole, 1.0, "random"))
    ids = tokens(3)
    with torch.no_grad():
        assert torch.equal(same(ids).logits, whole(ids).logits)
    assert same.lm_head.weight is same.model.embed_tokens.weight
    assert same.dtype == torch.bfloat16


def test_a_written_folder_names_no_code_that_is_left_behind(tmp_path: Path) -> None:
    """Of the model, and of the tokenizer beside it; all else is as it was."""
    base, said = tmp_path / "base", {}
    model("OlmoeSparseMoeBlock").save_pretrained(base)
    (base / "modeling_mine.py").write_text("raise SystemExit('executed')")
    (base / "tokenizer.json").write_text("{}")
    (base / "processor_config.json").write_text("[")
    (base / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    for file in ("config.json", "tokenizer_config.json"):
        said[file] = json.loads((base / file).read_text())
        auto = {"AutoModelForCausalLM": "modeling_mine.Mine"}
        (base / file).write_text(json.dumps({**said[file], "auto_map": auto}))
    whole = adopt_folder(base, aux=None)
    out = write_folder(prune(whole, choose_kept(whole, 4, "random")), tmp_path / "out", like=base)
    assert not (out / "modeling_mine.py").exists()
    assert (out / "processor_config.json").read_text() == "["
    for file, expected in said.items():
        found = json.loads((out / file).read_text())
        assert "auto_map" not in found
        assert found == {**expected, **({"num_experts": 4} if file == "config.json" else {})}
    again = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(again).__name__ == "OlmoeForCausalLM"


def test_groups_keep_as_many_experts_each() -> None:
    whole = adopt(model("DeepseekV3MoE", 0, n_routed_experts=16), aux=None)  # four groups
    load = {path: torch.arange(16.0) for path in adopted_layers(whole)}
    kept = choose_kept(whole, 8, "utilisation", load=load)
    assert [numbers.tolist() for numbers in kept.values()] == [[2, 3, 6, 7, 10, 11, 14, 15]]
    with pytest.raises(UserError, match="4 groups of experts, which must stay equal"):
        choose_kept(whole, 6, "random")
    with pytest.raises(
        UserError, match=r"a token chooses 3 in 2 of them: got 4 experts. Keep a multiple of 4, at least 8"
    ):
        choose_kept(whole, 4, "random")
    free = adopt(model("DeepseekV2Moe", 1), aux=None)  # greedy: no groups
    assert next(iter(choose_kept(free, 4, "random").values())).numel() == 4


def test_what_cannot_be_pruned_is_refused() -> None:
    whole = adopt(model("Qwen3MoeSparseMoeBlock"), aux=None)
    first, second = adopted_layers(whole)
    uneven = {first: torch.arange(4), second: torch.arange(3)}
    with pytest.raises(UserError, match=r"one number of experts for all layers \(num_\w+\): got 3 for .* and 4"):
        prune(whole, uneven)
    with pytest.raises(UserError, match="chosen for every sparse layer"):
        prune(whole, {first: torch.arange(4)})
    with pytest.raises(UserError, match="keep at least 2 experts, a token of Qwen3MoeForCausalLM chooses as many"):
        prune(whole, {first: torch.arange(1), second: torch.arange(1)})
    with pytest.raises(UserError, match="keep at least 2 experts of"):
        choose_kept(whole, 1, "random")
    with pytest.raises(UserError, match=r"an adopted model is required.*adopt\(model\) first"):
        choose_kept(model("OlmoeSparseMoeBlock"), 4, "random")
    add_adapters(whole, rank=2, targets=("experts",))
    with pytest.raises(UserError, match="merge them first"):
        choose_kept(whole, 4, "random")
