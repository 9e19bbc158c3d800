"""Every value of a published model says where it is from: a paper, released code, or "ours".

Held by the table "Where the values are from" of each recipe's README. A setting that is new, or a value that changes,
fails here until its row says so; what says nothing about a model or its training is listed in OPERATION.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import moekit.recipes

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(info.name for info in pkgutil.iter_modules(moekit.recipes.__path__) if not info.name.startswith("_"))

OPERATION = {
    "data": {
        "source", "path", "pivot", "directions", "max_languages", "tokenizer", "sentinel", "cache", "num_workers",
        "babel_languages", "babel_sentences", "babel_sizes", "seed", "order_seed", "languages", "columns", "too_long",
        "facts_entities", "facts_relations", "facts_values", "facts_power", "facts_one_language", "facts_profiles",
        "babel_concepts", "babel_cognates", "unit", "text_field", "salient", "salient_share", "character_coverage",
        "byte_fallback",
        "normalization_rule_name",
    },
    "model": {"checkpoint", "embeddings"},
    "train": {
        "max_minutes", "accumulate", "validate_every", "checkpoint_minutes", "checkpoint_steps", "log_every", "seed",
        "devices", "num_nodes", "accelerator", "backend", "loggers", "on_non_finite", "best", "patience", "ema",
        "average_last", "keep_memory", "record_routing", "monitor",
    },
    "evaluate": {
        "max_sentences", "valid_sentences", "batch_tokens", "samples", "bleu_tokenizer", "score_valid", "domains",
        "score_valid_every", "score_valid_beam", "facts", "choices", "words", "agreement",
    },
}  # fmt: skip
"""Settings of where, how long and how often: which text, which machine, which rhythm; and what no variant turns on."""

ONLY_FOR = {
    "data.mask_shares": "masked_lm",
    "data.span_ratio": "span_corruption",
    "data.mean_span": "span_corruption",
    "data.packed": "span_corruption",
}
"""Settings of a task, which recipes without it need not speak of."""

SOURCE = re.compile(
    r"arXiv:\d{4}\.\d{4,5}|\bours\b|released (code|scripts)|fairseq|flaxformer|Mesh-TensorFlow"
    r"|DeepSpeed|Megatron|ParlAI"
)


def published(name: str) -> dict[str, Any]:
    """The published variants of a recipe; `small` of one that has none."""
    variants: Mapping[str, Any] = importlib.import_module(f"moekit.recipes.{name}").RECIPE.variants
    papers = {v: variant.config for v, variant in variants.items() if v.startswith("paper")}
    return papers or {"small": variants["small"].config}


def settings_of(config: Any) -> Iterator[str]:
    """Dotted names of what bears on the model or its training."""
    own = {task.name for task in dataclasses.fields(config.tasks) if not task.metadata.get("offered")}
    for field in dataclasses.fields(config):
        if field.name == "strategy":
            continue
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            yield field.name
            continue
        for inner in dataclasses.fields(value):
            if inner.name in OPERATION.get(field.name, ()):
                continue
            if field.name == "tasks":
                yield from (f"tasks.{inner.name}.{key}" for key in ("tokens", "weight") if inner.name in own)
            elif (task := ONLY_FOR.get(f"{field.name}.{inner.name}")) is None or task in own:
                yield f"{field.name}.{inner.name}"


def shown(configs: Iterable[Any], setting: str) -> str:
    """The different values of a setting, in the order of the variants."""
    values = []
    for config in configs:
        for part in setting.split("."):
            config = getattr(config, part)
        plain = isinstance(config, bool) or config is None
        values.append({None: "null", True: "true", False: "false"}[config] if plain else str(config))
    return " / ".join(dict.fromkeys(values))


def table(name: str) -> list[tuple[list[str], str, str]]:
    """Rows of the README's table: settings, values, source."""
    text = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Where the values are from\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"recipes/{name}/README.md has no section 'Where the values are from'"
    rows = [line for line in section[1].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [(re.findall(r"`([^`]+)`", first), values, source) for first, values, source in cells]


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_a_source(name: str) -> None:
    variants = published(name)
    wanted = Counter(setting for setting in settings_of(next(iter(variants.values()))))
    rows = table(name)
    found = Counter(setting for settings, _, _ in rows for setting in settings)
    assert not wanted - found, f"no row for {sorted(wanted - found)}: add their source, or 'ours'"
    assert not found - wanted, f"no such setting, or twice: {sorted(found - wanted)}"
    for settings, values, source in rows:
        assert values == "; ".join(shown(variants.values(), setting) for setting in settings), settings
        assert SOURCE.search(source), f"{settings}: {source!r} names neither a paper nor code, nor says 'ours'"


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_no_source_is_there(name: str) -> None:
    """A setting that is renamed leaves the list of those without a source."""
    config = next(iter(published(name).values()))
    for part in ("data", "train", "evaluate"):
        assert OPERATION[part] <= {field.name for field in dataclasses.fields(getattr(config, part))}


def test_a_value_without_a_row_is_found() -> None:
    """The test above can fail: a new setting, and a changed value."""
    switch = published("switch")
    assert "train.weight_decay" in set(settings_of(switch["paper_c"]))
    assert shown(switch.values(), "model.num_experts") == "64 / 128 / 256 / 2048"
    changed = [dataclasses.replace(c, model=dataclasses.replace(c.model, load_balance=0.5)) for c in switch.values()]
    rows = {setting: values for settings, values, _ in table("switch") if len(settings) == 1 for setting in settings}
    assert rows["model.load_balance"] == "0.01" != shown(changed, "model.load_balance")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_to_be_missing_that_is_there(name: str) -> None:
    """Distillation and fine-tuning are commands of every recipe."""
    page = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    code = (ROOT / "moekit" / "recipes" / f"{name}.py").read_text(encoding="utf-8")
    for phrase in ("not part of this recipe", "none yet", "is not here", "does not fine-tune"):
        assert phrase not in page + code, f"{name}: {phrase!r}"
