"""A run that translates generated languages: the test asks for words, of its own directions, or says why it cannot."""

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
from moekit.runs.record import Summary
from moekit.runs.settings import DataConfig


def run(recipe: Recipe, folder: Path, **given: Any) -> int:
    options = {
        "variant": "tiny", "model.dim": 16, "model.hidden_dim": 16, "model.num_experts": 2, "data.vocab_size": 400,
        "data.byte_fallback": False, "data.cache": folder / "cache", "data.babel_languages": 2,
        "data.babel_sentences": 600, "data.babel_sizes": "null", "data.directions": "null",
        "data.babel_concepts": 600, "train.accelerator": "cpu", "train.max_steps": 2, "train.warmup_steps": 1,
        "train.max_minutes": 0, "train.validate_every": 1, "evaluate.beam_size": 1, "evaluate.max_sentences": 4,
        "evaluate.valid_sentences": 4, "evaluate.samples": 1, "evaluate.words": 2, "evaluate.choices": 4,
        "out": folder / "run", **given,
    }  # fmt: skip
    return main(recipe, ["run", *(f"--{name}={value}" for name, value in options.items())])


def summary(folder: Path) -> Summary:
    return Summary.from_json(json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8")))


def test_translation_is_asked_for_the_words_of_its_directions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(gshard.RECIPE, tmp_path, **{"data.directions": "tnd-avl"}) == 0
    (record,) = summary(tmp_path).recall or ()
    assert (record.task, record.about, record.choices, record.chance) == ("translation", "words", 4, 0.25)
    assert {kind.kind: kind.questions for kind in record.kinds} == {"known": 20, "unknowable": 20}
    for kind in record.kinds:
        assert set(kind.languages) == {"avl"}
        assert kind.recall < 0.7, "after two steps a model knows nothing"
    assert "known" in capsys.readouterr().out
    assert "Recall of words" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    # Of text that the source does not make any more, as after a change of its code, nothing is asked.
    drawn = Babel._draw_held_out
    monkeypatch.setattr(Babel, "_draw_held_out", lambda *given: drawn(*given)[::-1])
    assert program.main(["test", str(tmp_path / "run")]) == 0
    assert summary(tmp_path).recall is None


def test_of_several_tasks_translation_alone_is_asked(tmp_path: Path) -> None:
    assert run(zcode_m3.RECIPE, tmp_path, **{"model.generator_dim": 8, "evaluate.words": 1}) == 0
    (record,) = summary(tmp_path).recall or ()
    assert record.task == "translation"
    assert set(record.kinds[0].languages) == {"avl", "tnd"}


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        (moe_lm, {}, "source must be babel and a task must be translation: got babel and causal_lm"),
        (gshard, {"data.source": "facts"}, "source must be babel and a task must be translation: got facts and trans"),
        (gshard, {"evaluate.choices": 100}, "choices must be from 2 to 32: got 100"),
        (gshard, {"data.babel_concepts": 20}, "data.babel_concepts must be 47 or more: got 20"),
        (gshard, {"data.babel_cognates": 1.5}, "data.babel_cognates must be 0 or more and at most 1: got 1.5"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    recipe: Any, given: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe.RECIPE, tmp_path, **given) != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_the_source_that_knows_meanings_is_found_among_others(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("a b\n", encoding="utf-8")
        (tmp_path / f"{split}.de").write_text("c d\n", encoding="utf-8")
    assert DataConfig(source="facts", babel_languages=2).dictionary() is None
    both = DataConfig(source="moses,babel", path=str(tmp_path), babel_languages=2, directions="en-de,avl-tnd")
    among = both.dictionary()
    assert among is not None
    assert among.knows_meanings
    assert among.languages == ("avl", "tnd")


def test_words_of_the_corpus_are_as_the_settings_have_them() -> None:
    config = DataConfig(babel_languages=2, babel_concepts=100, babel_cognates=0.5)
    corpus = config.open()
    assert len(corpus.concepts) == pytest.approx(100, abs=5)  # type: ignore[attr-defined]
    assert corpus.settings.cognates == 0.5  # type: ignore[attr-defined]
    assert {"data.babel_concepts", "data.babel_cognates"} <= set(config.which_text())
    assert "data.babel_concepts" not in DataConfig().which_text(), "folders of former versions do not have it"
