"""A run on generated languages: the test asks for agreement, beside facts and words, or says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekit.babel import Babel
from moekit.cli import program
from moekit.cli.recipes import main
from moekit.recipes import gshard, moe_lm, zcode_m3
from moekit.runs import Recipe
from moekit.runs.record import RecallRecord, Summary
from moekit.runs.settings import DataConfig

KINDS = {"verb": 8, "verb_attractor": 4, "adjective": 4, "article": 4, "undetermined": 8}


def run(recipe: Recipe, folder: Path, **given: Any) -> int:
    options = {
        "variant": "tiny", "model.dim": 16, "model.hidden_dim": 16, "model.num_experts": 2, "data.vocab_size": 400,
        "data.byte_fallback": False, "data.cache": folder / "cache", "data.babel_languages": 2,
        "data.babel_sentences": 600, "data.babel_sizes": "null", "data.directions": "null",
        "data.facts_entities": 40, "data.facts_relations": 2, "data.facts_values": 12, "train.accelerator": "cpu",
        "train.max_steps": 2, "train.warmup_steps": 1, "train.max_minutes": 0, "train.validate_every": 1,
        "evaluate.beam_size": 1, "evaluate.max_sentences": 4, "evaluate.valid_sentences": 4, "evaluate.samples": 1,
        "evaluate.facts": 0, "evaluate.agreement": 4, "evaluate.choices": 4, "out": folder / "run", **given,
    }  # fmt: skip
    return main(recipe, ["run", *(f"--{name}={value}" for name, value in options.items())])


def recorded(folder: Path) -> list[RecallRecord]:
    found = Summary.from_json(json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8")))
    return list(found.recall or ())


def test_a_language_model_is_asked_for_agreement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(moe_lm.RECIPE, tmp_path) == 0
    (record,) = recorded(tmp_path)
    assert (record.task, record.about, record.choices, record.chance) == ("causal_lm", "agreement", 2, 0.5)
    assert {kind.kind: kind.questions for kind in record.kinds} == KINDS
    assert {kind.kind: set(kind.languages) for kind in record.kinds} == {
        "verb": {"avl", "tnd"}, "verb_attractor": {"tnd"}, "adjective": {"avl"}, "article": {"avl"},
        "undetermined": {"avl", "tnd"},
    }  # fmt: skip
    assert "agreement   verb" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Agreement by language and kind" in page
    assert "Recall of" not in page
    # The same from the folder; and of text that the source does not make any more nothing is asked.
    assert program.main(["test", str(tmp_path / "run")]) == 0
    assert recorded(tmp_path) == [record]
    drawn = Babel._draw_held_out
    monkeypatch.setattr(Babel, "_draw_held_out", lambda *given: drawn(*given)[::-1])
    assert program.main(["test", str(tmp_path / "run")]) == 0
    assert recorded(tmp_path) == []


def test_facts_and_agreement_are_asked_of_one_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(moe_lm.RECIPE, tmp_path, **{"data.source": "facts", "data.vocab_size": 280, "evaluate.facts": 1}) == 0
    facts, agreement = recorded(tmp_path)
    assert (facts.about, facts.choices, facts.task) == ("facts", 4, agreement.task)
    assert (agreement.about, agreement.choices) == ("agreement", 2)
    assert "article" in {kind.kind for kind in agreement.kinds}
    said = capsys.readouterr().out
    assert "recall      known" in said
    assert "agreement   article" in said


def test_tasks_that_score_sentences_are_asked(tmp_path: Path) -> None:
    """Of an encoder-decoder denoising and masked words; translation has words to be asked for."""
    given = {"model.generator_dim": 8, "evaluate.words": 1, "data.babel_concepts": 600}
    assert run(zcode_m3.RECIPE, tmp_path, **given) == 0
    assert {(record.task, record.about) for record in recorded(tmp_path)} == {
        ("translation", "words"), ("denoising", "agreement"), ("masked_lm", "agreement")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        (gshard, {}, "a task must score sentences of one language, as causal_lm does: got babel and translation."),
        (
            moe_lm,
            {"data.source": "headlines"},
            "as causal_lm does: got headlines and causal_lm. Set evaluate",
        ),
        (
            moe_lm,
            {"data.babel_languages": 7, "data.directions": "shl-ori"},
            "the text must have some: got babel in shl, ori, where no verb, adjective or article has forms",
        ),
        (moe_lm, {"evaluate.agreement": -1}, "evaluate.agreement must be 0 or more: got -1"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    recipe: Any, given: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe.RECIPE, tmp_path, **given) != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_languages_that_have_other_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "valid", "test"):
        for code in ("avl", "tnd"):
            (tmp_path / f"{split}.{code}").write_text("a b\nc d\n" * 9, encoding="utf-8")
    assert run(moe_lm.RECIPE, tmp_path, **{"data.source": "moses,babel", "data.path": tmp_path}) != 0
    said = "whose languages must have no other: got moses, babel. Choose one of these"
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_source_that_knows_its_grammar_is_found_among_others(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("a b\n", encoding="utf-8")
        (tmp_path / f"{split}.de").write_text("c d\n", encoding="utf-8")
    assert DataConfig(source="headlines").grammar() is None
    facts = DataConfig(source="facts", babel_languages=2, directions="avl-tnd").grammar()
    assert facts is not None
    assert facts.name == "facts"
    both = DataConfig(source="moses,babel", path=str(tmp_path), babel_languages=2).grammar()
    assert both is not None
    assert both.languages == ("avl", "tnd")
