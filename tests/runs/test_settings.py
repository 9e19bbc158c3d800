"""Settings: lists and mappings in every form, ranges, where they may differ, and files of former versions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.data.held_out import left_out
from moekit.data.sources import open_source
from moekit.data.tokenizer import TokenizerOptions
from moekit.errors import UserError
from moekit.kernels.gpu import backend
from moekit.recipes import gshard, moe_lm, switch, zcode_m3
from moekit.runs import Run, RunConfig, RunText
from moekit.runs.known import recipe_names
from moekit.runs.plain import as_plain
from moekit.runs.recipe import find_recipe, structured
from moekit.runs.settings import DataConfig, EvaluateConfig, TrainConfig, setting
from moekit.runs.settings.fields import check_ranges, free_keys, settings_of
from moekit.runs.settings.tasks import active_tasks
from moekit.source import Direction
from moekit.training.callbacks.config import CONFIG_KEY


@pytest.mark.parametrize("sizes", ["kmb=2000,shl=500", " kmb = 2000, shl=500", {"kmb": 2000, "shl": 500}])
@pytest.mark.parametrize("directions", ["en-de, de-en", ["en-de", "de-en"], ("en-de", "de-en")])
def test_lists_and_mappings_are_taken_as_text_too(sizes: Any, directions: Any) -> None:
    found = DataConfig(babel_sizes=sizes, directions=directions)
    assert (found.babel_sizes, found.directions) == ({"kmb": 2000, "shl": 500}, ("en-de", "de-en"))
    written = as_plain(found)
    assert (written["babel_sizes"], written["directions"]) == ({"kmb": 2000, "shl": 500}, ["en-de", "de-en"])
    assert structured({"babel_sizes": sizes, "directions": directions}) == {
        "babel_sizes": {"kmb": 2000, "shl": 500},
        "directions": ["en-de", "de-en"],
    }


def test_what_differs_in_a_task_is_given_as_in_any_group() -> None:
    tiny = zcode_m3.TINY
    found = tiny.changed(tasks={"replaced_token": {"tokens": 32}}, data={"babel_sizes": {"kmb": 2000}})
    assert found.tasks == replace(tiny.tasks, replaced_token=replace(tiny.tasks.replaced_token, tokens=32))
    assert found.tasks.replaced_token.weight == tiny.tasks.replaced_token.weight != 1
    assert found.data == replace(tiny.data, babel_sizes={"kmb": 2000})
    with pytest.raises(TypeError, match="token_s"):
        tiny.changed(tasks={"translation": {"token_s": 32}})


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_tasks_of_every_variant_are_settings(recipe: str) -> None:
    for name, variant in find_recipe(recipe, "").variants.items():
        assert active_tasks(variant.config.tasks), name


def test_a_list_of_one_is_its_word() -> None:
    """A folder whose name has a comma is given as a list of one."""
    assert DataConfig(source="moses", path="a").path == "a"
    assert DataConfig(source=["moses"], path=["a"]) == DataConfig(source="moses", path="a")  # type: ignore[arg-type]
    several = DataConfig(source="moses,jsonl", path="a, b")
    assert (several.sources, several.path) == (("moses", "jsonl"), ("a", "b"))
    assert DataConfig(directions="", babel_sizes="", path="") == DataConfig()


def test_another_default_keeps_what_is_known_of_a_setting() -> None:
    @dataclass(frozen=True)
    class Base:
        rate: float = setting(0.5, at_least=0, below=1, free=["resume"])

    @dataclass(frozen=True)
    class Other(Base):
        rate: float = 0.25

    assert free_keys(Other(), "resume") == ["rate"]
    assert free_keys(Other(), "surgery") == []
    check_ranges(Other())
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="rate must be 0 or more and less than 1: got"):
            check_ranges(Other(wrong))


def test_what_may_differ_is_there() -> None:
    """Of every key that is free there is a setting; a group that is free stands for all of its settings."""
    config = zcode_m3.RECIPE.default
    known = {key for key, _, _ in settings_of(config)}
    resume, surgery = free_keys(config, "resume"), free_keys(config, "surgery")
    assert {*resume, *surgery} <= known
    assert {"strategy", "train.max_steps", "data.path", "evaluate.samples"} <= set(resume)
    assert {"train", "tasks", "model.num_experts", "model.capacity_factor", "model.jitter"} <= set(surgery)
    assert not {"train", "model.dim", "data.vocab_size", "data.seed"} & set(resume)
    assert not {"model.dim", "model.activation", "data.vocab_size", "data.seed", "data.path"} & set(surgery)


def test_a_configuration_of_a_former_version_is_brought_up_to_date() -> None:
    values = as_plain(zcode_m3.RECIPE.default.changed(data={"directions": ("tnd-avl",)}))
    now = zcode_m3.RECIPE.config(values, "now")
    values["data"] |= {"directions": "tnd-avl", "babel_sizes": None}
    del values["model"]["discriminator_weight"]
    values["discriminator_weight"] = 7.0
    current = zcode_m3.RECIPE.current(values)
    assert current["model"]["discriminator_weight"] == 7.0
    assert "discriminator_weight" not in current
    assert current["data"]["directions"] == ["tnd-avl"]
    found = zcode_m3.RECIPE.config(current, "then")
    assert found == now.changed(model={"discriminator_weight": 7.0})
    assert "discriminator_weight" in values, "what was given is as it was"


def test_a_configuration_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="here: not a configuration of this recipe"):
        gshard.RECIPE.config({"model": {"no_such": 1}, "data": 3}, "here")


def test_groups_are_changed_by_key_or_whole() -> None:
    config = gshard.RECIPE.default
    other = config.changed(train={"seed": 7}, data=DataConfig(seed=3))
    assert (other.train.seed, other.train.max_steps) == (7, config.train.max_steps)
    assert other.data == DataConfig(seed=3)
    assert other.model is config.model
    with pytest.raises(TypeError, match="no_such"):
        config.changed(train={"no_such": 1})


def test_recipes_are_found_by_name() -> None:
    assert len(recipe_names()) == 11
    assert "_networks" not in recipe_names()


@pytest.mark.parametrize("recorded", [True, False])
def test_the_size_of_the_vocabulary_is_recorded(recorded: bool, tmp_path: Path) -> None:
    """A checkpoint of a former version without a folder has the rows of its table."""
    config: RunConfig = gshard.RECIPE.default.changed(model={"dim": 8, "heads": 2, "hidden_dim": 8, "num_experts": 2})
    model = gshard.RECIPE.parts(config, RunText(77)).named()
    settings = {"recipe": "gshard", "variant": "tiny", **as_plain(config), **({"vocab_size": 77} if recorded else {})}
    torch.save({"state_dict": model.state_dict(), CONFIG_KEY: settings}, tmp_path / "x.ckpt")
    run = Run.load(tmp_path / "x.ckpt")
    assert (run.vocab_size, run.recipe.name, run.variant) == (77, "gshard", "tiny")
    assert run.config == config


@pytest.mark.parametrize("languages", ["src=en, tgt = de", {"src": "en", "tgt": "de"}])
def test_languages_and_columns_are_taken_as_text_too(languages: Any) -> None:
    found = DataConfig(languages=languages, columns="en, de,-")
    assert (found.languages, found.columns) == ({"src": "en", "tgt": "de"}, ("en", "de", "-"))
    assert structured(as_plain(found))["languages"] == {"src": "en", "tgt": "de"}
    assert DataConfig(languages="en,de") == DataConfig(languages=["en", "de"])  # type: ignore[arg-type]
    assert DataConfig(languages="pt_BR=pt,de").languages == {"pt_BR": "pt", "de": "de"}
    assert DataConfig(languages="", columns="") == DataConfig()


def test_languages_that_are_named_are_those_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "src-train.txt").write_text("a\n", encoding="utf-8")
    (tmp_path / "tgt-train.txt").write_text("A\n", encoding="utf-8")
    (tmp_path / "train.tsv").write_text("a\tA\n", encoding="utf-8")
    moses = {"source": "moses", "path": str(tmp_path)}
    assert DataConfig(**moses, languages="src=en,tgt=de").open().languages == ("en", "de")
    both = DataConfig(
        source="moses,tsv", path=(str(tmp_path), str(tmp_path)), languages="src=en,tgt=de,en,fr", columns="en,fr"
    )
    assert both.open().languages == ("en", "de", "fr")
    with pytest.raises(UserError, match=r"the language must be one of the data: got 'fr'\. .*There are: de, en"):
        DataConfig(**moses, languages="src=en,tgt=de,fr").open()
    with pytest.raises(UserError, match=r"data\.columns is for text of the kinds tsv: got data\.source moses"):
        DataConfig(**moses, columns="en,de").open()
    with pytest.raises(UserError, match=r"data\.languages is for text of the kinds .*moses.*: got data\.source babel"):
        DataConfig(languages="en,de").open()


def test_a_path_with_a_comma(tmp_path: Path) -> None:
    folder = tmp_path / "news, 2014"
    folder.mkdir()
    for code in ("en", "de"):
        (folder / f"train.{code}").write_text(f"{code}\n", encoding="utf-8")
    for path in (str(folder), [str(folder)], (str(folder),)):
        data = DataConfig(source="moses", path=path)  # type: ignore[arg-type]
        assert data.open().languages == ("de", "en")
        assert structured(as_plain(data))["path"] == [str(folder)]
    assert DataConfig(source="moses,jsonl", path=f"{folder},b").path == (f"{tmp_path}/news", "2014", "b")
    assert open_source("union", f"moses:{folder},babel:").languages[:2] == ("de", "en")
    assert DataConfig(source="moses", path=[str(folder) + "x"]).missing_paths() == [str(folder) + "x"]  # type: ignore[arg-type]


def test_settings_that_came_later_have_their_default() -> None:
    values = as_plain(zcode_m3.RECIPE.default.changed(data={"vocab_size": 77}))
    for name in ("languages", "max_length"):
        del values["data"][name]
    current = zcode_m3.RECIPE.current(values)["data"]
    assert (current["languages"], current["max_length"], current["vocab_size"]) == (None, 128, 77)


def test_settings_of_text_reach_the_data_module(tmp_path: Path) -> None:
    given = {"character_coverage": 0.99, "byte_fallback": False, "normalization_rule_name": "identity"}
    config = zcode_m3.RECIPE.default.changed(data={**given, "too_long": "error", "cache": str(tmp_path)})
    made = config.batches()
    assert made.too_long == "error"
    assert made.tokenizer_options == TokenizerOptions(
        character_coverage=0.99, byte_fallback=False, normalization="identity"
    )
    default = zcode_m3.RECIPE.default.batches()
    assert (default.tokenizer_options, default.too_long) == (TokenizerOptions(), "drop"), "as it always was"


def test_much_that_is_left_out_is_said() -> None:
    rows = {"translation": {"sentences": 980, "dropped": 20}, "denoising": {"sentences": 1990, "dropped": 10}}
    (line,) = left_out(rows, 50)
    assert line.startswith("translation: 20 of 1,000 training sentences are left out: they are empty, or longer than ")
    assert "data.max_length, 50 pieces" in line


def test_processes_must_have_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    cpu = TrainConfig(accelerator="cpu")
    replace(cpu, devices=16).check()
    with pytest.raises(UserError, match=r"train.devices must be at most 16 on this machine \(2 cores.*: got 2000"):
        replace(cpu, devices=2000).check()
    with pytest.raises(UserError, match=r"train.num_nodes 16 needs a process on every machine.*srun or torchrun"):
        replace(cpu, num_nodes=16).trainer()
    monkeypatch.setenv("MASTER_ADDR", "node0")
    replace(cpu, num_nodes=16).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    TrainConfig(devices=3).check()
    with pytest.raises(UserError, match=r"at most 3 on this machine \(3 GPUs\): got 4"):
        TrainConfig(devices=4).check()


def test_a_backend_must_be_there_and_have_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = TrainConfig(accelerator="cpu")
    for fine in ("auto", "torch"):
        replace(cpu, backend=fine).check()
    monkeypatch.setattr(backend, "PRESENT", True)
    with pytest.raises(UserError, match=r"train.backend=triton computes on a GPU: this run trains on a CPU"):
        replace(cpu, backend="triton").check()
    monkeypatch.setattr(backend, "PRESENT", False)
    with pytest.raises(UserError, match="needs the package triton, which is not installed"):
        replace(cpu, backend="triton").check()


@pytest.mark.parametrize(
    ("steps", "warmup", "kept", "fits"),
    [
        (20, 200, None, 4),
        (200, 200, None, 40),
        (201, 200, None, 200),
        (1, 200, None, 0),
        (0, 200, None, 200),
        (20, 4, None, 4),
        (2000, 200, {"train": {"warmup_steps": 4}}, 4),
        (20, 200, {"train": {}}, 4),
    ],
)
def test_a_warmup_that_fits(steps: int, warmup: int, kept: Any, fits: int) -> None:
    assert TrainConfig(max_steps=steps, warmup_steps=warmup).fitting_warmup(kept) == fits


def test_each_of_several_kinds_takes_the_directions_of_its_languages(tmp_path: Path) -> None:
    """Those of one kind are none of the other's, which knew of them before and refused them all."""
    for split in ("train", "valid", "test"):
        for code, line in (("en", "a cat"), ("de", "eine katze"), ("fr", "un chat")):
            (tmp_path / f"{split}.{code}").write_text(f"{line}\n" * 3)
    both: dict[str, Any] = {"source": ("facts", "moses"), "path": str(tmp_path), "pivot": "none"}
    sizes: dict[str, Any] = {"babel_languages": 3, "babel_sentences": 60, "facts_entities": 20}
    data = DataConfig(**both, **sizes, directions="en-de,avl-tnd,tnd-avl,de-fr")
    assert [*map(str, data.open().directions)] == ["avl-tnd", "tnd-avl", "en-de", "de-fr"]
    facts = data.knowledge()
    assert facts is not None
    assert [*map(str, facts.directions)] == ["avl-tnd", "tnd-avl"]
    assert facts.fingerprint() == DataConfig(source="facts", **sizes, directions="avl-tnd,tnd-avl").open().fingerprint()
    with pytest.raises(UserError, match=r"directions must be among those of the data: got avl-de\."):
        DataConfig(**both, **sizes, directions="en-de,avl-tnd,avl-de").open()
    with pytest.raises(UserError, match=r"data\.source facts: directions must be among .* got en-de\. There are: avl-"):
        DataConfig(**both, **sizes, directions="en-de").open()


def test_a_kind_with_both_languages_of_a_direction_need_not_have_the_direction(tmp_path: Path) -> None:
    """As MAFAND has English and French, each with others; the kind was asked for en-fr and refused."""
    for split in ("train", "valid", "test"):
        for code, line in (("en", "a cat"), ("fr", "un chat")):
            (tmp_path / f"{split}.{code}").write_text(f"{line}\n" * 3)
        for pair, texts in (
            ("en-hau", {"en": "a cat", "hau": "kyanwa"}),
            ("fr-bam", {"fr": "un chat", "bam": "jakuma"}),
        ):
            folder = tmp_path / "pairs" / pair
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}.json").write_text(json.dumps({"translation": texts}) + "\n")
    both: dict[str, Any] = {"source": ("moses", "jsonl"), "path": (str(tmp_path), str(tmp_path / "pairs"))}
    data = DataConfig(**both, directions="en-fr,hau-en,bam-fr").open()
    assert [*map(str, data.directions)] == ["en-fr", "hau-en", "bam-fr"]
    assert [*data.parallel(Direction("hau", "en"), "train")] == [("kyanwa", "a cat")]
    with pytest.raises(
        UserError, match=r"directions must be among those of the data: got en-bam\. There are: en-fr, hau"
    ):
        DataConfig(**both, directions="en-fr,hau-en,en-bam").open()
    with pytest.raises(
        UserError, match=r"data\.source jsonl: directions must be among .* got en-fr\. .*There are: bam-"
    ):
        DataConfig(**both, directions="en-fr").open()


def test_a_language_into_itself_is_a_direction_beside_others(tmp_path: Path) -> None:
    """As it is where examples are all there is."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a cat", "target": "cat"}\n')
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("en\tde\na cat\teine Katze\n")
    both: dict[str, Any] = {"source": ("examples", "tsv"), "path": (str(rows), str(pairs))}
    assert [*map(str, DataConfig(**both, directions="en-en,en-de").open().directions)] == ["en-en", "en-de"]
    with pytest.raises(UserError, match=r"directions must be among those of the data: got de-de\."):
        DataConfig(**both, directions="en-en,en-de,de-de").open()


def test_a_domain_of_another_kind_has_its_own_units(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("one\n\ntwo\n")
    of_rows = DataConfig(source="documents", unit="document", text_field="body")
    text = of_rows.of_domain({"source": "text", "path": str(tmp_path)})
    assert (text.unit, text.text_field) == ("line", "text")
    assert [*text.open().monolingual("en", "train")] == ["one", "two"]
    assert of_rows.of_domain({"path": "elsewhere"}).text_field == "body"
    EvaluateConfig(domains={"talks": {"source": "text", "path": str(tmp_path), "unit": "paragraph"}}).check()


@pytest.mark.parametrize("source", ["babel", "facts", "headlines"])
def test_every_seed_has_its_text(source: str) -> None:
    made = [DataConfig(source=source, seed=seed, babel_sentences=60, facts_entities=20).open() for seed in (0, 1, 2)]
    assert len({corpus.fingerprint() for corpus in made}) == 3
    assert len(made[0].monolingual(made[0].languages[0], "test")) > 0


def test_salient_words_that_no_task_cuts_out_are_refused() -> None:
    """A run that leaves a setting unread would say it had it."""
    lm = moe_lm.RECIPE.default.changed(data={"source": "facts", "salient": "source"})
    with pytest.raises(UserError, match=r"data\.salient says .* no task is span corruption: got causal_lm\. Leave"):
        lm.batches()
    spans = switch.RECIPE.default.changed(data={"salient_share": 0.5})
    with pytest.raises(
        UserError, match=r"data\.salient_share is a share .* there are none: got 0\.5\. Give data\.salient"
    ):
        spans.batches()
