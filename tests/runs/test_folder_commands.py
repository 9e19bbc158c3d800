"""Commands on runs with a folder of transformers in the place of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0", reason="adoption is of transformers 5")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from moekit.cli.program import main  # noqa: E402
from moekit.errors import UserError  # noqa: E402
from moekit.folder_text.encoding import IGNORED  # noqa: E402
from moekit.huggingface import adopt_folder  # noqa: E402
from moekit.huggingface.pruning import adopted_layers  # noqa: E402
from moekit.runs.folders.measuring import held_out_loss, measured_use  # noqa: E402
from moekit.runs.folders.text import TextChoice, folder_text  # noqa: E402
from moekit.runs.surgery.curve import Curve, Point, table  # noqa: E402
from moekit.surgery import watch_experts  # noqa: E402

PLAIN = "a dog cat runs sleeps and the old small sees ein hund katze"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *PLAIN.split(" ")]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokenizer(place: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(place)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse and a dense decoder, an encoder-decoder, and text."""
    place = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    olmoe = transformers.OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2)
    transformers.OlmoeForCausalLM(olmoe).save_pretrained(place / "olmoe")
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)).save_pretrained(place / "dense")
    switch = transformers.SwitchTransformersConfig(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=12, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=3, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2, router_jitter_noise=0.0, dropout_rate=0.0,
    )  # fmt: skip
    transformers.SwitchTransformersForConditionalGeneration(switch).save_pretrained(place / "switch")
    for name in ("olmoe", "dense", "switch"):
        tokenizer(place / name)
    (place / "text").mkdir()
    (place / "text" / "train.en").write_text("the old dog runs and the cat sleeps\na small cat sees the dog\n" * 9)
    (place / "text" / "valid.en").write_text("the small dog sees a cat\nthe old cat runs\n")
    (place / "pairs").mkdir()
    for split in ("train", "valid"):
        (place / "pairs" / f"{split}.en").write_text("a dog\nthe old cat\n")
        (place / "pairs" / f"{split}.de").write_text("ein hund\nein katze\n")
    return place


def choice(room: Path, **changes: Any) -> TextChoice:
    return TextChoice(source="text", path=str(room / "text"), **{"length": 5, **changes})


def test_text_is_sequences_for_a_decoder(room: Path) -> None:
    text = folder_text(room / "olmoe", choice(room), "valid")
    ids = torch.cat([batch["input_ids"] for batch in text.batches])
    assert [[WORDS[i] for i in row] for row in ids.tolist()] == [
        ["the", "small", "dog", "sees", "a"],
        ["cat", "</s>", "the", "old", "cat"],
    ]
    assert text.predictions == [8]
    assert text.said == "10 tokens of validation text (text: en)"
    some = folder_text(room / "olmoe", choice(room, tokens=6, length=3), "train")
    assert sum(batch["input_ids"].numel() for batch in some.batches) == 6


def test_text_is_pairs_for_an_encoder_decoder(room: Path) -> None:
    text = folder_text(room / "switch", TextChoice(source="moses", path=str(room / "pairs")), "valid")
    assert len(text.batches) == 2
    first = next(b for b in text.batches if WORDS[int(b["input_ids"][0, 0])] == "a")
    assert first["labels"].tolist() == [[14, 15], [14, 16]]
    assert first["input_ids"].tolist() == [[4, 5, 0], [10, 11, 6]]
    other = next(b for b in text.batches if b is not first)
    assert other["labels"].tolist() == [[4, 5, IGNORED], [10, 11, 6]]
    assert sorted(text.predictions) == [4, 5]
    with pytest.raises(UserError, match="an encoder-decoder reads pairs, and text has none"):
        folder_text(room / "switch", choice(room), "train")


def test_the_loss_is_of_predictions_alone(room: Path) -> None:
    model = adopt_folder(room / "olmoe")
    text = folder_text(room / "olmoe", choice(room, length=4), "valid")
    ids = torch.cat([batch["input_ids"] for batch in text.batches])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    wanted = -logits.gather(-1, ids[:, 1:, None]).mean()
    assert held_out_loss(model, text) == pytest.approx(float(wanted), rel=1e-5)
    with watch_experts(model) as use, torch.no_grad():
        model(ids)
    found = measured_use(model, text)
    for path, one in use.items():
        assert torch.equal(found[path].tokens, one.tokens)
        torch.testing.assert_close(found[path].saliency, one.saliency)


def test_prune_by_saliency(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "half"
    options = ["--data.path", str(room / "text"), "--length", "5", "--out", str(out)]
    assert main(["prune", str(room / "olmoe"), "--keep", "50%", "--by", "reap", *options]) == 0
    shown = capsys.readouterr().out
    assert "3 experts in a layer" in shown
    assert "OlmoeForCausalLM.from_pretrained" in shown
    model = adopt_folder(room / "olmoe", aux=None)
    use = measured_use(model, folder_text(room / "olmoe", choice(room), "train"))
    fewer = transformers.OlmoeForCausalLM.from_pretrained(out).state_dict()
    was = model.state_dict()
    for path in adopted_layers(model):
        best = sorted(sorted(range(6), key=lambda e: -float(use[path].saliency[e]))[:3])
        assert torch.equal(fewer[f"{path}.gate.weight"], was[f"{path}.gate.weight"][best])
        assert torch.equal(fewer[f"{path}.experts.down_proj"], was[f"{path}.experts.down_proj"][best])
    card = (out / "README.md").read_text()
    assert "3 of 6 experts are kept in each of 2 sparse layers: those of the highest REAP saliency" in card
    assert str(room) not in card
    assert transformers.AutoTokenizer.from_pretrained(out)("a dog")["input_ids"] == [4, 5]
    assert main(["prune", str(room / "olmoe"), "--keep", "50%", "--by", "reap", *options]) == 2
    assert "Replace it (--overwrite)" in capsys.readouterr().err
    for inner in ("six", "text"):  # what is read, in the folder that would be replaced
        shutil.copytree(room / ("text" if inner == "text" else "olmoe"), out / inner)
    by_text = ["--by", "reap", "--data.path", str(out / "text")]
    for source, by, said in ((out / "six", ["--by", "random"], "the folder"), (room / "olmoe", by_text, "--data.path")):
        assert main(["prune", str(source), "--keep", "3", *by, "--out", str(out), "--overwrite"]) == 2
        assert f"error: {said} {out}/" in (shown := " ".join(capsys.readouterr().err.split()))
        assert "which is replaced: it would be lost" in shown
        assert (out / "six" / "config.json").is_file()
        assert (out / "text").is_dir()


def test_inspect_and_curve(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--data.path", str(room / "text"), "--length", "5"]
    assert main(["inspect", str(room / "olmoe"), "--json", *text]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["num_experts"], row["k"]) for row in found["layers"]] == [
        ("layers.0", 6, 2),
        ("layers.1", 6, 2),
    ]
    assert found["layers"][0]["expert_parameters"] == 3 * 16 * 12
    assert sum(found["layers"][0]["load"]) == pytest.approx(1)
    assert main(["inspect", str(room / "dense")]) == 0
    assert "a dense model: no experts" in capsys.readouterr().out
    assert main(["curve", str(room / "olmoe"), *text, "--keep", "4", "2", "--draws", "2", "--out", str(tmp_path)]) == 0
    assert "by REAP saliency" in capsys.readouterr().out
    curve = json.loads((tmp_path / "pruning.json").read_text())
    assert [point["order"] for point in curve["points"]] == 2 * ["utilisation", "reap", "random", "random"]
    model = adopt_folder(room / "olmoe", aux=None)
    valid = folder_text(room / "olmoe", choice(room), "valid")
    assert curve["whole"]["loss"] == pytest.approx(held_out_loss(model, valid), rel=1e-6)
    assert curve["points"][0]["parameters"] == curve["whole"]["parameters"] - 2 * 2 * (3 * 16 * 12 + 16)
    table = (tmp_path / "pruning.md").read_text()
    assert "Validation loss of next tokens, nats per prediction, of 10 tokens of validation text (text: en);" in table
    assert (tmp_path / "pruning.svg").is_file()
    assert "equally many" not in table


def test_shares_of_the_same_number_of_experts_are_said() -> None:
    def point(keep: float, kept: int) -> Point:
        return Point(keep, "utilisation", None, {"layers.0": list(range(kept))}, 10, 1.0)

    found = table(Curve("run", "next tokens", point(1.0, 4), [point(0.75, 3), point(0.5, 2), point(0.25, 2)], None))
    said = "50% and 25% keep equally many experts: shares are rounded, to no fewer than a token chooses."
    assert found.endswith(f" {said}\n")


def test_upcycle_and_merge(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse, again = tmp_path / "sparse", tmp_path / "again"
    assert main(["upcycle", str(room / "dense"), "--experts", "3", "--k", "2", "--out", str(sparse)]) == 0
    assert "3 experts in a layer" in capsys.readouterr().out
    assert main(["merge", str(sparse), "--out", str(again)]) == 0
    assert "dense" in capsys.readouterr().out
    first, back = (transformers.Qwen3ForCausalLM.from_pretrained(p).state_dict() for p in (room / "dense", again))
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())
    assert "copies of them" in (sparse / "README.md").read_text()
    assert main(["merge", str(room / "olmoe"), "--out", str(tmp_path / "no")]) == 2
    assert "no dense model that OlmoeForCausalLM could become" in capsys.readouterr().err
    assert main(["upcycle", str(room / "olmoe"), "--experts", "3", "--out", str(tmp_path / "no")]) == 2
    assert "no sparse model that OlmoeForCausalLM could become" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


REFUSED = {
    "no text": (["prune", "olmoe", "--keep", "3"], "--by utilisation needs text"),
    "text at random": (["prune", "olmoe", "--keep", "3", "--by", "random", "--data.path", "text"], "leave it out with"),
    "a run's option": (["prune", "olmoe", "--keep", "3", "--by", "random", "--restart"], "--restart is for runs"),
    "a folder's option": (["upcycle", "run", "--experts", "2", "--k", "2"], "--k is for folders of transformers"),
    "a size without text": (["prune", "olmoe", "--keep", "3", "--tokens", "9"], "--tokens is of the text that is read"),
    "too few": (["prune", "olmoe", "--keep", "1", "--by", "random"], "keep at least 2 experts"),
    "load without text": (["merge", "olmoe", "--by-load"], "give --by-load and --data.path both"),
    "a curve of nothing": (["curve", "olmoe"], "needs text"),
    "itself": (["prune", "olmoe", "--keep", "3", "--by", "random", "--out", "olmoe"], "the folder that is read"),
    "a split that is not there": (["prune", "olmoe", "--keep", "3", "--data.path", "only"], "must have training text"),
    "no tokenizer": (["prune", "bare", "--keep", "3", "--data.path", "text"], "must have a tokenizer"),
    "generated": (
        ["prune", "olmoe", "--keep", "3", "--data.source", "babel", "--data.languages", "en"],
        "has no languages to choose from",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(room)
    (room / "only").mkdir(exist_ok=True)
    (room / "only" / "test.en").write_text("a dog\n")
    (room / "run").mkdir(exist_ok=True)
    (room / "run" / "config.yaml").write_text("recipe: switch\n")
    if name == "no tokenizer" and not (room / "bare").exists():
        (room / "bare").mkdir()
        for file in ("config.json", "model.safetensors"):
            (room / "bare" / file).write_bytes((room / "olmoe" / file).read_bytes())
    arguments, words = REFUSED[name]
    out = [] if "--out" in arguments else ["--out", "refused"]
    assert main([*arguments, *out]) == 2
    assert words in capsys.readouterr().err
    assert not (room / "refused").exists()
