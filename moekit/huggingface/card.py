"""The card of a folder: README.md, with the header that the Hub reads, and what is known of how the model came to be.

write_card(folder, base="allenai/OLMoE-1B-7B-0924", changes=["16 of 64 experts are kept in each layer."],
           metrics={"held-out loss": 2.31}, data=["1,200 sentences of Hausa"], language=["ha"])

Nothing is invented: what nobody says, and the folder does not show, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from moekit.atomic import write_text, writing
from moekit.errors import UserError
from moekit.huggingface.expert_layout import ExpertLayout, folder_layout
from moekit.stored import parse_json, parse_yaml
from moekit.wording import table_cell

CARD = "README.md"
_MARK = "<!-- written by moekit: another card in its place is kept -->"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")
_PATH = re.compile(r"(?<![\w:/.<~])~?(?:/[^\s/`'\"|,;()]+){2,}/?|\b[A-Za-z]:\\\S+")
_METRICS = ("accuracy", "bleu", "chrf", "perplexity", "rouge")
"""Metrics that the Hub has names for."""

Relation = Literal["finetune", "adapter", "merge", "quantized"]


def write_card(
    folder: Path | str,
    *,
    name: str | None = None,
    summary: str = "",
    base: str | Path | None = None,
    relation: Relation | None = None,
    changes: Sequence[str] = (),
    data: Sequence[str] = (),
    metrics: Mapping[str, float | str] | None = None,
    settings: Mapping[str, Any] | None = None,
    language: Sequence[str] = (),
    license: str | None = None,
    pipeline_tag: str | None = None,
    tags: Sequence[str] = (),
) -> Path | None:
    """Write the card of a folder of transformers, or of adapters for PEFT, from the folder and from what is given.

    A card that somebody else wrote stays. Paths of this machine are cut to their last part.

    Args:
        folder: with config.json, or adapter_config.json.
        name: the model's name; None = the folder's.
        summary: what it is, in a sentence or two.
        base: the model that it was made of: a name on the Hub, which the header names, or a folder, whose own card
            says what it is of, its license and its languages.
        relation: what the header says that it is of the base; None = for the Hub to find out.
        changes: what was done to the base, a sentence each.
        data: the text, a sentence each.
        metrics: numbers by name.
        settings: further values by name, for a table.
        language: codes of ISO 639; others are left out of the header.
        license: its identifier on the Hub; None = that of the base's card, if it is known.
        pipeline_tag: the Hub's name of what it does; None = text-generation of a decoder.
        tags: further tags.

    Returns:
        The card; None where another is there.

    Raises:
        UserError: the folder holds neither, or cannot be written.
    """
    place = Path(folder)
    file = place / CARD
    if file.is_file() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    adapter = _settings(place / "adapter_config.json")
    config = None if adapter is not None else _settings(place / "config.json")
    if adapter is None and config is None:
        raise UserError(f"a card is of a folder with config.json or adapter_config.json: {place} has neither.")
    inherited = _header_of(base)
    base_name = _hub_name(base) or inherited.get("base_model")
    decoder = _is_decoder(config or {}, adapter)
    header: dict[str, Any] = {
        "base_model": base_name,
        "base_model_relation": relation if base_name and not adapter else None,
        "library_name": "peft" if adapter is not None else "transformers",
        "pipeline_tag": pipeline_tag or ("text-generation" if decoder else None),
        "language": [code for code in language if _LANGUAGE.fullmatch(code)] or inherited.get("language"),
        "license": license or inherited.get("license"),
        "metrics": sorted({known for known in _METRICS for said in metrics or {} if known in said.lower()}),
        "tags": list(dict.fromkeys(["moe", "moekit", *(["lora"] if adapter else []), *tags])),
    }
    layout = None if adapter is not None else _layout(place)
    if layout is not None and not layout.layers:
        header["tags"].remove("moe")
    known = {key: value for key, value in header.items() if value}
    title = name or place.resolve().name
    parts = [
        f"# {title}",
        summary,
        _bullets("What was changed", changes),
        _adapters(adapter) if adapter is not None else _experts(layout),
        _bullets("Data", data),
        _table("Results", ("measure", "value"), {key: _number(value) for key, value in (metrics or {}).items()}),
        _table("Settings", ("setting", "value"), {key: str(value) for key, value in (settings or {}).items()}),
        _opening(place, title, base_name, decoder, peft=adapter is not None),
    ]
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    body = "\n\n".join(without_paths(part) for part in parts if part)
    with writing(file):
        write_text(file, f"---\n{text}---\n\n{_MARK}\n\n{body}\n")
    return file


def without_paths(text: str) -> str:
    """Text with absolute paths cut to their last part."""
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def _settings(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = parse_json(file.read_bytes())
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} must be JSON, as transformers and PEFT write it: {error}.") from None


def _header_of(base: str | Path | None) -> dict[str, Any]:
    """What a folder's own card says in its header, as far as it passes on."""
    if base is None or not (Path(base) / CARD).is_file():
        return {}
    try:
        found = re.match(r"---\n(.*?)\n---\s", (Path(base) / CARD).read_text(encoding="utf-8"), re.DOTALL)
        header = parse_yaml(found[1]) if found else {}
        return {key: header[key] for key in ("base_model", "language", "license") if header.get(key)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _hub_name(base: str | Path | None) -> str | None:
    text = "" if base is None else str(base)
    return text if _HUB_NAME.fullmatch(text) and not Path(text).exists() else None


def _is_decoder(config: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> bool:
    if adapter is not None:
        return adapter.get("task_type") == "CAUSAL_LM"
    return any(str(kind).endswith("ForCausalLM") for kind in config.get("architectures") or ())


def _layout(place: Path) -> ExpertLayout | None:
    """The experts, where transformers is here and knows the model."""
    try:
        return folder_layout(place)
    except (ImportError, UserError):
        return None


def _bullets(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]) if lines else ""


def _table(title: str, head: tuple[str, str], rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    cells = [f"| {table_cell(key)} | {table_cell(value)} |" for key, value in rows.items()]
    return "\n".join([f"## {title}", "", f"| {head[0]} | {head[1]} |", "| --- | ---: |", *cells])


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _experts(layout: ExpertLayout | None) -> str:
    if layout is None:
        return ""
    rows = {"architecture": layout.architecture, "parameters": f"{layout.parameters:,}"}
    if layout.layers:
        kinds = sorted({(layer.num_experts, layer.k) for layer in layout.layers})
        rows |= {
            "of experts": f"{layout.of_experts:,}",
            "active for a token": f"{layout.active:,}",
            "sparse layers": f"{len(layout.layers)}",
            "experts in a layer": ", ".join(str(experts) for experts, _ in kinds),
            "experts of a token": ", ".join(str(k) for k in sorted({k for _, k in kinds})),
        }
    return _table("Experts" if layout.layers else "Model", ("", ""), rows)


def _adapters(adapter: Mapping[str, Any]) -> str:
    names = [str(name) for key in ("target_modules", "target_parameters") for name in adapter.get(key) or ()]
    rows = {
        "kind": str(adapter.get("peft_type")),
        "rank": str(adapter.get("r")),
        "alpha": str(adapter.get("lora_alpha")),
        "adapted": ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})),
    }
    return _table("Adapters", ("", ""), rows)


def _opening(place: Path, title: str, base: Any, decoder: bool, *, peft: bool) -> str:
    kind = "AutoModelForCausalLM" if decoder else "AutoModelForSeq2SeqLM"
    words = any((place / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    of = base[0] if isinstance(base, list) else base or "the base model"
    lines = [f"from transformers import {kind}{', AutoTokenizer' if words else ''}", ""]
    if peft:
        lines = ["from peft import PeftModel", *lines, f'base = {kind}.from_pretrained("{of}")']
        lines += [f'model = PeftModel.from_pretrained(base, "{title}")']
    else:
        lines += [f'model = {kind}.from_pretrained("{title}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{title}")'] * words
    return "\n".join(["## How to open it", "", "```python", *lines, "```"])
