"""Cards of folders: what the Hub reads in them, what is passed on, and what must not stand there."""

from __future__ import annotations

from pathlib import Path

import pytest
from adoptable import model

from moekit.errors import UserError
from moekit.huggingface import adopt, write_adapters, write_card, write_folder
from moekit.huggingface.card import without_paths
from moekit.surgery import add_adapters

hub = pytest.importorskip("huggingface_hub", reason="cards are read as the Hub's library reads them")


def folder(place: Path, block: str = "OlmoeSparseMoeBlock") -> Path:
    model(block).save_pretrained(place)
    return place


def test_a_card_says_what_is_known_and_no_more(tmp_path: Path) -> None:
    place = folder(tmp_path / "mine")
    (place / "tokenizer.json").write_text("{}")
    card = hub.ModelCard.load(write_card(place), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "moekit"],
    }
    assert "# mine" in card.text
    assert "| experts in a layer | 6 |" in card.text
    assert "| experts of a token | 3 |" in card.text
    count = sum(parameter.numel() for parameter in model("OlmoeSparseMoeBlock").parameters())
    assert f"| parameters | {count:,} |" in card.text
    idle = 2 * 3 * 3 * 32 * 24  # layers, idle experts, matrices of D x F
    assert f"| active for a token | {count - idle:,} |" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("mine")' in card.text
    assert 'AutoTokenizer.from_pretrained("mine")' in card.text
    for absent in ("## Data", "## Results", "## What was changed", "None", str(tmp_path)):
        assert absent not in card.content


def test_numbers_data_and_changes_are_in_it(tmp_path: Path) -> None:
    place = folder(tmp_path / "mine")
    written = write_card(
        place,
        name="shown",
        base="allenai/OLMoE-1B-7B-0924",
        relation="finetune",
        changes=[f"Trained on {tmp_path}/text.en for 3 steps."],
        data=["Hausa | news"],
        metrics={"test BLEU": 12.3456, "perplexity": 7},
        settings={"learning rate": 1e-4},
        language=["ha", "made-up-language"],
        license="apache-2.0",
        tags=["translation"],
    )
    card = hub.ModelCard.load(written)
    data = card.data.to_dict()
    assert data["base_model"] == "allenai/OLMoE-1B-7B-0924"
    assert data["base_model_relation"] == "finetune"
    assert (data["license"], data["language"], data["metrics"]) == ("apache-2.0", ["ha"], ["bleu", "perplexity"])
    assert data["tags"] == ["moe", "moekit", "translation"]
    assert "- Trained on text.en for 3 steps." in card.text
    assert "| test BLEU | 12.35 |" in card.text
    assert "| learning rate | 0.0001 |" in card.text
    assert str(tmp_path) not in card.content


def test_license_and_base_pass_on_and_other_cards_stay(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nbase_model: a/b\nmetrics: [x]\n---\n# theirs\n")
    assert write_card(base) is None, "somebody else's card stays"
    assert "# theirs" in (base / "README.md").read_text()
    (base / "tokenizer_config.json").write_text("{}")
    out = write_folder(adopt(model(), aux=None), tmp_path / "out", like=base)
    data = hub.ModelCard.load(out / "README.md").data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == ("mit", ["en"], "a/b")
    assert "metrics" not in data
    assert (out / "tokenizer_config.json").is_file()
    assert write_card(out, license="apache-2.0", base=base) == out / "README.md"
    assert hub.ModelCard.load(out / "README.md").data.license == "apache-2.0"


def test_adapters_have_a_card_of_peft(tmp_path: Path) -> None:
    tuned = adopt(model("MixtralSparseMoeBlock"), aux=None)
    add_adapters(tuned, rank=4, targets=("experts", "routers", "attention"))
    write_adapters(tuned, tmp_path / "adapter", base="mistralai/Mixtral-8x7B-v0.1", card={"metrics": {"loss": 1.5}})
    card = hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("peft", "mistralai/Mixtral-8x7B-v0.1")
    assert data["tags"] == ["moe", "moekit", "lora"]
    assert "| rank | 4 |" in card.text
    assert "| adapted | down_proj, gate, gate_up_proj, k_proj, o_proj, q_proj, v_proj |" in card.text
    assert 'PeftModel.from_pretrained(base, "adapter")' in card.text
    assert "| loss | 1.5 |" in card.text
    write_adapters(tuned, tmp_path / "local", base=str(tmp_path))
    assert "base_model" not in hub.ModelCard.load(tmp_path / "local" / "README.md").data.to_dict()
    assert str(tmp_path) not in (tmp_path / "local" / "README.md").read_text()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json or adapter_config.json: .* has neither"):
        write_card(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="must be JSON"):
        write_card(tmp_path)
    (tmp_path / "file").write_text("")
    base = folder(tmp_path / "base")
    for place, words in (
        (base, "the folder that is read"),
        (tmp_path / "file", "it is a file"),
        (tmp_path, "other files"),
    ):
        with pytest.raises(UserError, match=words):
            write_folder(adopt(model(), aux=None), place, like=base)
    other = folder(tmp_path / "other")
    with pytest.raises(UserError, match="Replace it"):
        write_folder(adopt(model(), aux=None), other, like=base)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from /srv/me/my-model, and/or more", "from my-model, and/or more"),
        ("~/data/x.txt", "x.txt"),
        ("C:\\Users\\me\\model", "model"),
        ("https://huggingface.co/a/b and a/b", "https://huggingface.co/a/b and a/b"),
        ("3 / 4 of `/srv/a/b`", "3 / 4 of `b`"),
    ],
)
def test_paths_are_cut(text: str, found: str) -> None:
    assert without_paths(text) == found
