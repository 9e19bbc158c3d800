"""Run folders as training would leave them: a small babel run, fifteen languages through English, and broken ones."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

BABEL = ("en", "vo", "ka", "zu")
WORLD = ("en", "de", "fr", "cs", "bam", "ewe", "fon", "hau", "ibo", "lug", "luo", "mos", "swa", "twi", "wol")
TASKS = {"translation": (6.9, 1.1), "denoising": (6.8, 1.9), "masked_lm": (6.7, 2.3), "replaced_token": (0.69, 0.21)}
TEXT_TASKS = {"causal_lm": (6.9, 2.5), "denoising": (6.8, 1.9)}

CONFIG = """\
recipe: zcode_m3
variant: tiny   # 2 > 1 & "quotes"
data:
  source: babel
  vocab_size: 1024
train:
  max_minutes: 8
  learning_rate: 0.002
"""

SENTENCES = {
    "en": ("three dogs see a green house near the river .", "three dogs see a green tree near a river ."),
    "de": ("drei Hunde sehen ein grünes Haus am Fluss .", "drei Hunde sahen ein grünes Haus an dem Fluss ."),
    "fr": ("trois chiens voient une maison verte près de l'eau .", "trois chien voient la maison près de l'eau ."),
    "ar": ("ثلاثة كلاب صغيرة ترى بيتا أخضر قرب النهر", "ثلاثة كلاب صغيرة ترى منزلا أخضر قرب النهر"),
    "hi": ("तीन छोटे कुत्ते नदी के पास हरा घर देखते हैं", "तीन छोटे कुत्ते नदी के पास एक घर देखते हैं"),
    "zh": ("三只小狗看见河边的绿房子。", "三只小狗看到河边绿色的房子。"),
    "yo": ("àwọn ajá kékeré mẹ́ta rí ilé aláwọ̀ ewé", "àwọn ajá kékeré mẹ́ta rí igi aláwọ̀ ewé"),
}  # fmt: skip


def directions(languages: tuple[str, ...], *, pivot: str | None = None) -> list[str]:
    pairs = [(s, t) for s in languages for t in languages if s != t]
    return [f"{s}-{t}" for s, t in pairs if pivot is None or pivot in (s, t)]


def make_run(
    folder: Path,
    *,
    languages: tuple[str, ...] = BABEL,
    pivot: str | None = None,
    variant: str = "tiny",
    steps: int = 2400,
    layers: int = 4,
    experts: int = 8,
    seed: int = 0,
    gain: float = 0.0,
    without: tuple[str, ...] = (),
) -> Path:
    """Write a realistic run folder; `without` names files to leave out."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = directions(languages, pivot=pivot)
    names = [f"encoder.{2 * i + 1}" for i in range(layers // 2)] + [f"decoder.{2 * i + 1}" for i in range(layers // 2)]
    bleu = {d: min(99.0, max(0.4, rng.gauss(62 if len(languages) < 8 else 18, 11) + gain)) for d in pairs}
    chrf = {d: min(99.0, 22 + 0.86 * v + rng.uniform(-2, 2)) for d, v in bleu.items()}
    final = {task: low - 0.01 * gain + rng.uniform(-0.05, 0.05) for task, (_, low) in TASKS.items()}
    routing = make_routing(names, experts, languages, rng) if experts else {"languages": [], "layers": []}
    dead = sum(x["dead_experts"] for x in routing["layers"])
    summary: dict[str, Any] = {
        "recipe": "zcode_m3",
        "variant": variant,
        "data": {"source": "babel", "languages": list(languages), "fingerprint": "5f2c"},
        "steps": steps,
        "tokens": steps * 8192,
        "wall_seconds": steps * 0.2,
        "tokens_per_second": 39812.5 + 300 * gain,
        "parameters": {"total": 18_734_080 if experts else 7_431_000, "active": 7_411_200},
        "bleu": {
            "average": sum(bleu.values()) / len(bleu),
            "signature": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
            "directions": bleu,
        },
        "chrf": {
            "average": sum(chrf.values()) / len(chrf),
            "signature": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
            "directions": chrf,
        },
        "perplexity": {t: math.exp(v) for t, v in final.items() if t != "replaced_token"},
        "loss": final,
        "routing": {
            "drop_rate": 0.0132,
            "entropy": 0.61,
            "dead_experts": dead,
            "load_cv": 0.34,
            "layers": {x["name"]: {"drop_rate": x["drop_rate"]} for x in routing["layers"]},
        }
        if experts
        else {},
    }
    environment = {
        "python": "3.11.9",
        "packages": {"torch": "2.13.0", "lightning": "2.6.6"},
        "platform": "Linux-6.1-x86_64",
        "processors": 2,
        "command": ["python", "-m", "moekit.recipes.zcode_m3", "run", "--out", "runs/a name"],
        "commit": None,
    }
    texts = {
        "config.yaml": CONFIG,
        "environment.json": json.dumps(environment),
        "summary.json": json.dumps(summary),
        "routing.json": json.dumps(routing),
        "samples.json": json.dumps(make_samples(pairs, rng)),
    }
    for name, content in texts.items():
        if name not in without:
            (folder / name).write_text(content, encoding="utf-8")
    if "metrics.csv" not in without:
        write_metrics(folder / "metrics.csv", steps, final, bleu, names if experts else [], rng)
    return folder


def make_text_run(
    folder: Path,
    *,
    task: str = "causal_lm",
    languages: tuple[str, ...] = BABEL,
    recipe: str = "moe_lm",
    variant: str = "tiny",
    steps: int = 200,
    layers: int = 4,
    experts: int = 8,
    seed: int = 0,
    gain: float = 0.0,
    by_rule: bool = False,
    experts_per_token: float | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write the folder of a run that does not translate: a language model, or span corruption alone.

    `gain` is taken off the loss; `by_rule` makes an uneven load with idle experts by a router that is not learned.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    loss = TEXT_TASKS[task][1] - gain
    spread = 0.4 if len(languages) > 1 else 0.0
    by_language = {x: math.exp(loss + rng.uniform(-spread, spread)) for x in languages}
    side = "decoder" if task == "causal_lm" else "encoder"
    names = [f"{side}.{2 * i + 1}" for i in range(layers)] if experts else []
    routing = make_routing(names, experts, languages, rng)
    for layer in routing["layers"]:
        if by_rule:
            crowd = [6.0, 0.0, *[1.0] * (experts - 2)]
            layer |= {"load": [x / sum(crowd) for x in crowd], "entropy": None, "dead_experts": 1, "drop_rate": 0.0}
            layer["load_by_language"] = dict.fromkeys(languages, layer["load"])
        if experts_per_token is not None:
            layer["experts_per_token"] = experts_per_token
    per_layer = {x["name"]: {k: v for k, v in x.items() if k != "name"} for x in routing["layers"]}
    learned = [x["entropy"] for x in routing["layers"] if x["entropy"] is not None]
    summary: dict[str, Any] = {
        "recipe": recipe,
        "variant": variant,
        "data": {"source": "babel", "languages": list(languages), "vocab_size": 1024, "directions": []},
        "steps": steps,
        "tokens": steps * 8192,
        "wall_seconds": steps * 0.2,
        "tokens_per_second": 51_200.0,
        "parameters": {"total": 18_734_080 if experts else 7_431_000, "active": 7_411_200},
        "bleu": None,
        "chrf": None,
        "test": {task: {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.475, "languages": by_language}},
        "perplexity": {task: math.exp(loss + 0.02)},
        "loss": {task: loss + 0.02},
        "accuracy": {task: 0.46},
        "routing": {
            "drop_rate": None if by_rule else 0.0,
            "entropy": sum(learned) / len(learned) if learned else None,
            "dead_experts": sum(x["dead_experts"] for x in routing["layers"]),
            "load_cv": 0.34,
            "layers": per_layer,
        }
        if experts
        else None,
    }
    texts = {
        "config.yaml": f"recipe: {recipe}\nvariant: {variant}\n",
        "environment.json": json.dumps({"python": "3.11.9", "command": ["python", "-m", f"moekit.recipes.{recipe}"]}),
        "summary.json": json.dumps(summary),
        "routing.json": json.dumps(routing),
        "samples.json": json.dumps(make_texts(task, languages)),
    }
    for name, content in texts.items():
        if name not in without and (experts or name != "routing.json"):
            (folder / name).write_text(content, encoding="utf-8")
    if "metrics.csv" not in without:
        write_metrics(folder / "metrics.csv", steps, {task: loss}, {}, [] if by_rule else names, rng)
    return folder


def make_texts(task: str, languages: tuple[str, ...]) -> list[dict[str, str]]:
    """Four samples of each language: a prompt and its continuation, or a damaged text and its original."""
    found = []
    for language in languages:
        reference, hypothesis = SENTENCES.get(language, SENTENCES["en"])
        words = reference.split()
        if task == "causal_lm":
            given, right, written = " ".join(words[:3]), " ".join(words[3:]), " ".join(hypothesis.split()[3:])
        else:
            given, right, written = " ".join([words[0], "<extra_0>", *words[3:]]), reference, hypothesis
        texts = {"source": given, "reference": right, "hypothesis": written}
        found += [{"task": task, "direction": language, **texts}] * 4
    return found


def make_routing(names: list[str], experts: int, languages: tuple[str, ...], rng: random.Random) -> dict[str, Any]:
    layers = []
    for depth, name in enumerate(names):
        keen = 0.4 + 3.2 * depth / max(1, len(names) - 1)
        table = {}
        for i, language in enumerate(languages):
            home = [math.exp(keen * (e % len(languages) == i % experts) + rng.gauss(0, 0.45)) for e in range(experts)]
            table[language] = [h / sum(home) for h in home]
        load = [sum(row[e] for row in table.values()) / len(table) for e in range(experts)]
        layers.append(
            {
                "name": name,
                "num_experts": experts,
                "load": load,
                "load_by_language": table,
                "entropy": rng.uniform(0.3, 0.9) * math.log(experts),
                "drop_rate": rng.uniform(0.0, 0.03),
                "dead_experts": 0,
            }
        )
    return {"languages": list(languages), "layers": layers}


def make_samples(pairs: list[str], rng: random.Random) -> list[dict[str, str]]:
    found = []
    for pair in pairs:
        target = pair.split("-")[1]
        reference, hypothesis = SENTENCES.get(target, SENTENCES["en"])
        for _ in range(4):
            words = hypothesis.split()
            if rng.random() < 0.5 and len(words) > 2:
                words[rng.randrange(len(words) - 1)] = rng.choice(words)
            found.append(
                {
                    "direction": pair,
                    "source": "lomi ta keru vantosil .",
                    "reference": reference,
                    "hypothesis": " ".join(words),
                }
            )
    return found


def write_metrics(
    path: Path, steps: int, final: dict[str, float], bleu: dict[str, float], layers: list[str], rng: random.Random
) -> None:
    """One row for every step in training, and one in twenty validations; blanks where nothing was logged."""
    rows: list[dict[str, float]] = []
    starts = {task: high for task, (high, _) in (TASKS | TEXT_TASKS).items()}
    validate = max(1, steps // 20)
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-4 * step / steps)
        row: dict[str, float] = {"step": step, "epoch": 0, "lr": 0.002 * min(step / 200, (200 / step) ** 0.5)}
        for task in final:
            high = starts[task]
            row[f"train/{task}/accuracy"] = min(1.0, max(0.0, 0.75 * progress + rng.gauss(0, 0.02)))
            row[f"train/{task}/loss"] = high + (final[task] - high) * progress + rng.gauss(0, 0.06 * high / 6)
        row["train/loss"] = sum(row[f"train/{t}/loss"] for t in final)
        row["train/tokens_per_second"] = rng.gauss(39_800, 1500)
        if layers:
            row["train/aux/load_balance"] = 1.02 + 0.5 * math.exp(-step / 60) + rng.gauss(0, 0.01)
        if layers and step % 10 == 0:
            for i, layer in enumerate(layers):
                row[f"train/routing/{layer}/drop_rate"] = abs(0.25 * math.exp(-step / 200) + rng.gauss(0.012, 0.004))
                row[f"train/routing/{layer}/entropy"] = (
                    2.08 - (0.2 + 1.2 * i / len(layers)) * progress + rng.gauss(0, 0.02)
                )
            row["train/routing/drop_rate"] = abs(0.25 * math.exp(-step / 200) + 0.013)
            row["train/routing/dead_experts"] = max(0, round(6 * math.exp(-step / 90)))
        rows.append(row)
        if step % validate == 0 or step == steps:
            scores: dict[str, float] = {"step": step, "epoch": 0}
            for task in final:
                high = starts[task]
                scores[f"valid/{task}/accuracy"] = 0.9 * progress / (1 + final[task] / 9)
                scores[f"valid/{task}/loss"] = high + (final[task] - high) * progress * 0.97 + rng.gauss(0, 0.01)
            for pair, value in bleu.items():
                scores[f"valid/bleu/{pair}"] = value * max(0.0, 1 - math.exp(-3 * (step / steps - 0.05)))
            if bleu:
                total = sum(v for k, v in scores.items() if k.startswith("valid/bleu/"))
                scores["valid/bleu/average"] = total / len(bleu)
            rows.append(scores)
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    header = list(dict.fromkeys(["step", "epoch", *(name for row in rows for name in row)]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def edit(run: Path, file: str, **changes: Any) -> Path:
    """Replace keys of a run's JSON file."""
    content = json.loads((run / file).read_text())
    (run / file).write_text(json.dumps({**content, **changes}))
    return run
