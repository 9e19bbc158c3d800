"""A run on text whose facts are known: its floor is that of its very sentences, and the test asks for facts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moekit.babel import Facts, facts
from moekit.cli import program
from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.recipes import moe_lm, switch, zcode_m3
from moekit.runs import Recipe, Run
from moekit.runs.record import Summary
from moekit.runs.settings import DataConfig, EvaluateConfig


def trained(recipe: Recipe, folder: Path, **given: Any) -> dict[str, Any]:
    options = {
        "variant": "tiny", "model.dim": 16, "model.hidden_dim": 16, "model.num_experts": 2, "data.vocab_size": 280,
        "data.byte_fallback": False, "data.cache": folder / "cache", "data.source": "facts", "data.babel_languages": 2,
        "data.babel_sentences": 1_500, "data.facts_entities": 40, "data.facts_relations": 2, "data.facts_values": 12,
        "train.accelerator": "cpu", "train.max_steps": 2, "train.warmup_steps": 1, "train.max_minutes": 0,
        "train.validate_every": 1, "evaluate.beam_size": 1, "evaluate.max_sentences": 40,
        "evaluate.valid_sentences": 30, "evaluate.samples": 1, "evaluate.facts": 1, "evaluate.choices": 4,
        "out": folder / "run", **given,
    }  # fmt: skip
    assert main(recipe, ["run", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))


def test_a_language_model_has_its_floor_and_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Summary.from_json(trained(moe_lm.RECIPE, tmp_path))
    source = Facts(languages=2, entities=40, relations=2, values=12, train_sentences=1_500)
    tokenizer = Run.open(tmp_path / "run").kept_tokenizer
    assert tokenizer is not None
    assert found.floors is not None
    for split, number, floor in zip(("valid", "test"), (30, 40), found.floors, strict=True):
        cost = tokens = 0.0
        for code in source.languages:
            known = source.information(code, split)  # type: ignore[arg-type]
            assert known is not None
            texts = source.monolingual(code, split)[:number]  # type: ignore[arg-type]
            cost += sum(known.knowing[:number])
            tokens += sum(len(tokenizer.encode(text)) + 1 for text in texts)
        assert (floor.task, floor.split) == ("causal_lm", split)
        assert floor.knowing == pytest.approx(cost / tokens)
        assert floor.guessing > floor.knowing
    assert found.test["causal_lm"]["loss"] > found.floors[1].guessing, "after two steps a model knows nothing"
    (record,) = found.recall or ()
    assert (record.task, record.choices, record.chance) == ("causal_lm", 4, 0.25)
    assert {kind.kind for kind in record.kinds} == {"known", "composed", "unknowable"}
    for kind in record.kinds:
        assert kind.recall < 0.7
    said = capsys.readouterr().out
    assert "chance 25.0 %" in said
    assert "above it" in said


def test_domains_have_losses_and_floors(tmp_path: Path) -> None:
    """Text of the run under another name costs what the test costs; other text is compared with it."""
    domains = {"home": {}, "plain": {"source": "babel"}, "even": {"facts_power": 0}}
    found = Summary.from_json(trained(moe_lm.RECIPE, tmp_path, **{"evaluate.domains": json.dumps(domains)}))
    home, plain, even = found.domains or ()
    test, floors = found.test["causal_lm"], found.floors or ()
    assert home.loss == pytest.approx(test["loss"], rel=1e-6)
    assert home.above_test == pytest.approx(0, abs=1e-5)
    assert (home.knowing, home.guessing) == (pytest.approx(floors[1].knowing), pytest.approx(floors[1].guessing))
    assert [each.sentences for each in (home, plain, even)] == [80, 80, 80]
    assert (plain.name, plain.knowing) == ("plain", None)
    assert plain.above_test == pytest.approx(plain.loss - test["loss"])
    assert even.knowing not in (None, home.knowing)
    # The same from the folder, and no other number changes.
    before = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert program.main(["test", str(tmp_path / "run")]) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert {key for key in before if before[key] != after[key]} <= {"evaluation_seconds"}


def test_domains_that_cannot_be_measured_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for domains, said in (
        ({"x": {"vocab_size": 3}}, r"domains\.x\.vocab_size must be a setting of data that says which text is read"),
        ({"x": 3}, r"domains must be settings of data by name, as .*got 'x': 3"),
        ({"": {}}, r"domains must be settings of data by name"),
    ):
        with pytest.raises(UserError, match=said):
            EvaluateConfig(domains=domains).check()  # type: ignore[arg-type]
    for given, said in (
        ({"babel_languages": 3}, "evaluate.domains.x must be in languages of the run: got kmb"),
        ({"source": "text", "path": "nowhere"}, "evaluate.domains.x: .*nowhere"),
        ({"source": "babbel"}, "evaluate.domains.x: .*babbel"),
    ):
        with pytest.raises(AssertionError):
            trained(moe_lm.RECIPE, tmp_path, **{"evaluate.domains": json.dumps({"x": given})})
        assert re.search(said, " ".join(capsys.readouterr().err.split()))
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_tasks_of_an_encoder_decoder_are_asked_their_ways(tmp_path: Path) -> None:
    found = Summary.from_json(trained(zcode_m3.RECIPE, tmp_path, **{"model.generator_dim": 8}))
    assert found.floors is None, "no task of this run scores whole sentences"
    assert [record.task for record in found.recall or ()] == ["denoising", "masked_lm"]
    for record in found.recall or ():
        assert all(kind.questions for kind in record.kinds)


def test_text_that_is_another_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose text the source does not make any more, as after a change of its code: no questions and no floor."""
    trained(moe_lm.RECIPE, tmp_path)
    monkeypatch.setattr(facts, "_TEXT", 9)  # which draws begin with
    assert program.main(["test", str(tmp_path / "run")]) == 0
    found = Summary.from_json(json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8")))
    assert found.test
    assert found.recall is None
    assert found.floors is None


def test_the_source_that_knows_facts_is_found_among_others(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("a b\n", encoding="utf-8")
        (tmp_path / f"{split}.de").write_text("c d\n", encoding="utf-8")
    sizes: dict[str, Any] = {"babel_languages": 3, "facts_entities": 9, "babel_sentences": 10}
    assert DataConfig(source="babel").knowledge() is None
    alone = DataConfig(source="facts", directions="avl-tnd", **sizes).knowledge()
    assert alone is not None
    assert alone.languages == ("avl", "tnd")
    both = DataConfig(source="moses,facts", path=str(tmp_path), **sizes)
    assert both.open().languages == ("de", "en", "avl", "tnd", "kmb")
    among = both.knowledge()
    assert isinstance(among, Facts)
    assert among.languages == ("avl", "tnd", "kmb")


def test_salient_words_are_kept_in_the_folder(tmp_path: Path) -> None:
    """A test needs neither the corpus nor the file of words, and gives the same numbers."""
    words = tmp_path / "words.txt"
    values = DataConfig(source="facts", babel_languages=2, facts_entities=40, facts_relations=2, facts_values=12).open()
    named = {code: values.salient(code) or frozenset() for code in values.languages}
    words.write_text("\n".join(sorted(named["avl"] | named["tnd"])), encoding="utf-8")
    found = {}
    for name, salient in (("source", "source"), ("file", words)):
        given = {"data.salient": salient, "data.packed": False, "data.max_length": 48}
        before = trained(switch.RECIPE, tmp_path / name, **given)
        run = Run.open(tmp_path / name / "run")
        assert run.held_out is not None
        assert run.held_out.salient("avl") == (named["avl"] if name == "source" else named["avl"] | named["tnd"])
        words.unlink(missing_ok=name == "source")
        assert program.main(["test", str(run.path)]) == 0
        after = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
        assert {key for key in before if before[key] != after[key]} <= {"evaluation_seconds"}
        assert "floors" not in before
        assert {kind["kind"] for kind in before["recall"][0]["kinds"]} == {"known", "composed", "unknowable"}
        found[name] = before["test"]["span_corruption"]["loss"]
        words.write_text("\n".join(sorted(named["avl"] | named["tnd"])), encoding="utf-8")
    assert found["source"] == pytest.approx(found["file"], rel=1e-6), "no word of one language is a value of the other"


def test_salient_words_that_cannot_be_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("nothing\n", encoding="utf-8")
    for given, said in (
        ({"data.salient": "source", "data.source": "babel"}, "got babel, which has none. Give a file"),
        ({"data.salient": tmp_path / "none.txt"}, "cannot read data.salient .*none.txt"),
        ({"data.salient": tmp_path / "words.txt"}, "texts looked at none has. Write the words of data.salient"),
        ({"data.salient": "source", "data.salient_share": 0}, "salient_share must be greater than 0"),
    ):
        with pytest.raises(AssertionError):
            trained(switch.RECIPE, tmp_path, **given)
        assert re.search(said, " ".join(capsys.readouterr().err.split()))
        assert not (tmp_path / "run" / "checkpoints").exists()
