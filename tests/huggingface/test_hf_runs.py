"""The commands export and import: a run goes to transformers and comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import save, switch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from moekit.cli.recipes import main as recipe_main
from moekit.data.tokenizer import Tokenizer
from moekit.huggingface import import_model, read_tokenizer
from moekit.inference import LengthLimit, generate
from moekit.recipes import switch as switch_recipe
from moekit.runs import Run
from moekit.surgery.__main__ import main

OPTIONS = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "400",
    "--data.max_length", "64", "--tasks.span_corruption.tokens", "128", "--train.max_steps", "2",
    "--train.warmup_steps", "1", "--train.log_every", "1", "--train.validate_every", "0", "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "2", "--evaluate.valid_sentences", "4", "--evaluate.samples", "0",
    "--model.dim", "24", "--model.heads", "2", "--model.hidden_dim", "16", "--model.num_experts", "3",
]  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    return Run.load(folder).loaded.weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    options = [*OPTIONS, "--data.cache", str(folder / "cache"), "--out", str(folder / "run")]
    assert recipe_main(switch_recipe.RECIPE, ["fit", *options]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert main(["export", str(run), "--out", str(run.parent / "exported")]) == 0
    return run.parent / "exported"


def test_transformers_writes_what_the_run_writes(run: Path, exported: Path) -> None:
    subject = Run.load(run)
    ours = subject.model(device="cpu")
    ours.load_state_dict(subject.loaded.weights)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(exported).eval()
    words = AutoTokenizer.from_pretrained(exported)
    tokenizer = read_tokenizer(exported)
    texts = ["a short one", "another sentence that is longer than the first"]
    batch = words(texts, padding=True, return_tensors="pt")
    never = [i for i in range(tokenizer.first_text_id) if i != Tokenizer.eos_id]
    found = generate(
        ours["backbone"],  # type: ignore[index]
        batch.input_ids,
        batch.attention_mask.bool(),
        limit=LengthLimit(15, 0),
        suppress=never,
    ).best()
    written = theirs.generate(**batch, max_new_tokens=15, do_sample=False, num_beams=1)[:, 1:]
    assert words.batch_decode(written, skip_special_tokens=True) == [tokenizer.decode(ids) for ids in found]
    assert [row[: len(ids)].tolist() for row, ids in zip(written, found, strict=True)] == found


def test_back_to_a_run_bit_for_bit(run: Path, exported: Path, tmp_path: Path) -> None:
    assert main(["import", str(exported), "--like", str(run), "--out", str(tmp_path / "back")]) == 0
    before, after = weights(run), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    record = json.loads((tmp_path / "back" / "surgery.json").read_text())
    assert record["operation"] == "import"
    options = ["--config", str(tmp_path / "back" / "config.yaml"), "--out", str(tmp_path / "back"), "--resume"]
    assert recipe_main(switch_recipe.RECIPE, ["fit", *options, "--train.max_steps", "3"]) == 0
    assert not torch.equal(weights(tmp_path / "back")["backbone.embedding.weight"], before["backbone.embedding.weight"])


def test_a_folder_that_was_saved_by_transformers(run: Path, exported: Path, tmp_path: Path) -> None:
    """As after training there: config.json is theirs, and what we kept beside is gone."""
    model = AutoModelForSeq2SeqLM.from_pretrained(exported)
    with torch.no_grad():
        model.encoder.final_layer_norm.weight[0] = 3.0
    model.save_pretrained(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--like", str(run), "--out", str(tmp_path / "back")]) == 0
    before, after = weights(run), weights(tmp_path / "back")
    assert after["backbone.encoder.norm.weight"][0] == 3.0
    torch.testing.assert_close(after["backbone.embedding.weight"], before["backbone.embedding.weight"])
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del config["moekit"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert import_model(tmp_path / "theirs").architecture.embedding_scale == "output"
    arguments = ["import", str(tmp_path / "theirs"), "--like", str(run), "--out", str(tmp_path / "again")]
    assert main(arguments) == 0
    again = weights(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_mistakes(run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save(switch(expert_capacity=2), tmp_path / "other")
    roomy = tmp_path / "roomy"
    roomy.mkdir()
    for file in exported.iterdir():
        (roomy / file.name).write_bytes(file.read_bytes())
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps({**config, "expert_capacity": 4}))
    there = sorted(p.name for p in tmp_path.iterdir())
    like = ["--like", str(run), "--out", str(tmp_path / "new")]
    for arguments, message in (
        (["import", str(tmp_path / "nowhere"), *like], "there is no such folder"),
        (["import", str(other), *like], "its vocab_size is 40, and the run's 400"),
        (["import", str(roomy), *like], "its limit is 4, and the run's None. Import it dropless"),
        (["import", str(exported), "--like", str(run), "--out", str(run)], "holds a run"),
        (["export", str(run), "--out", str(exported)], "must be empty or not exist"),
        (
            ["export", str(run), "--out", str(tmp_path / "new"), "--as", "nllb-moe"],
            "no norm but LayerNorm: this model has RMSNorm",
        ),
        (
            ["export", str(run), "--out", str(tmp_path / "new"), "--max-shard-gb", "0"],
            "must be a number, greater than 0: got 0",
        ),
        (["export", str(tmp_path), "--out", str(tmp_path / "new")], ""),
    ):
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == there, "nothing was written"
    assert main(["import", str(roomy), *like, "--dropless"]) == 0
    bare = tmp_path / "bare"
    assert main(["export", str(run), "--out", str(bare), "--no-tokenizer", "--max-shard-gb", "0.00002"]) == 0
    assert not (bare / "tokenizer.json").exists()
    assert (bare / "model.safetensors.index.json").exists()


def test_weights_that_do_not_fit_the_run(run: Path, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    found = load_file(folder / "model.safetensors")
    del found["encoder.final_layer_norm.weight"]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["import", str(folder), "--like", str(run), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
