"""What is in a checkpoint, as a table to read and as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from moekit.runs.record import LayerRecord
from moekit.runs.run import Run
from moekit.runs.surgery.utilisation import layer_names, written_load
from moekit.surgery import SparseLayer
from moekit.terminal import visible
from moekit.training.callbacks.config import CONFIG_KEY
from moekit.training.checkpoint_state import load_state

_BARS = "▁▂▃▄▅▆▇█"


def inspect(path: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """A checkpoint's sparse layers, experts, sizes, and how much they are used where routing.json is beside it.

    Args:
        path: run folder, checkpoint, or plain state dict; of one that does not say what model it is of, only the
            tensors are told.
        config: the config of `Run.load`.

    Raises:
        UserError: it cannot be read, or its weights are not of the model that its configuration describes.
    """
    place = Path(path)
    beside = (place / "config.yaml", place.parent.parent / "config.yaml")
    if config is None and not any(file.is_file() for file in beside):
        loaded = load_state(place)
        if CONFIG_KEY not in loaded.rest:
            return {"checkpoint": str(path), "recipe": None, **_totals(loaded.weights), "parts": _parts(loaded.weights)}
    return _of_run(Run.load(path, config))


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print what `inspect` found."""
    title(found["checkpoint"], console)
    if found["recipe"] is None:
        console.print("tensors without a configuration: give that of a run (--config) to see layers and experts")
        table = Table("part", *_right("tensors", "parameters", "size"))
        for part in found["parts"]:
            table.add_row(part["name"], f"{part['tensors']:,}", f"{part['parameters']:,}", _size(part["bytes"]))
        console.print(table)
        say_totals(found, console)
        return
    step = "" if found["step"] is None else f", step {found['step']:,}"
    console.print(f"recipe {found['recipe']}, variant {found['variant']}{step}", highlight=False)
    if found["layers"]:
        console.print(layer_table(found["layers"]))
    else:
        console.print("a dense model: no experts")
    say_totals(found, console)
    state = "with" if found["optimizer"] else "without"
    kinds = "".join(f" ({kind})" for kind in dict.fromkeys(row["experts"] for row in found["layers"]))
    console.print(f"experts{kinds} {found['expert_share']:.1%} of them; {state} optimizer state", highlight=False)


def _of_run(run: Run) -> dict[str, Any]:
    layers, weights, rest = run.layers(), run.loaded.weights, run.loaded.rest
    used = written_load(run) if layers else None
    names = {path: name for name, path in layer_names(run).items()} if layers else {}
    loads = {} if used is None else {layer.name: layer for layer in used.layers}
    rows = [_row(layer, names[path], weights, loads.get(names[path])) for path, layer in layers.items()]
    totals = _totals(weights)
    of_experts = sum(row["expert_parameters"] * row["num_experts"] for row in rows)
    return {
        "checkpoint": str(run.checkpoint),
        "recipe": run.recipe.name,
        "variant": run.variant,
        "step": None if "global_step" not in rest else int(rest["global_step"]),
        "vocab_size": run.vocab_size or None,
        **totals,
        "expert_share": of_experts / max(totals["parameters"], 1),
        "optimizer": run.loaded.optimizer is not None or run.loaded.named_optimizer is not None,
        "layers": rows,
    }


def _row(layer: SparseLayer, name: str, weights: Mapping[str, Tensor], used: LayerRecord | None) -> dict[str, Any]:
    bank = {tensor: weights[tensor] for tensor in layer.bank}
    return {
        "name": name,
        "path": layer.path,
        "router": layer.router,
        "experts": layer.experts,
        "num_experts": layer.num_experts,
        "k": layer.k,
        "expert_parameters": sum(t.numel() for t in bank.values()) // layer.num_experts,
        "shapes": {tensor.removeprefix(f"{layer.path}.experts."): list(value.shape) for tensor, value in bank.items()},
        "bytes": _bytes(bank),
        "load": None if used is None else used.load,
        "load_by_language": None if used is None else used.load_by_language,
        "obstacle": layer.obstacle,
    }


def title(place: str, console: Console) -> None:
    """Print where the model lies."""
    console.print(Text(visible(place), style="bold"), soft_wrap=True)


def layer_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each sparse layer, with a bar for each expert where loads are known."""
    used = any(row["load"] for row in rows)
    table = Table("layer", "router", *_right("k", "experts", "each", "size"), *(["use"] if used else []))
    for row in rows:
        cells = [row["name"], row["router"], f"{row['k']:g}", str(row["num_experts"])]
        cells += [f"{row['expert_parameters']:,}", _size(row["bytes"])]
        table.add_row(*cells, *([_use(row["load"])] if used else []))
    return table


def _use(load: list[float] | None) -> str:
    """A bar for each expert, and the range of shares."""
    if not load:
        return ""
    top = max(max(load), 1e-12)
    bars = "".join(_BARS[min(int(share / top * len(_BARS)), len(_BARS) - 1)] for share in load)
    return f"{bars} {min(load):.0%}-{max(load):.0%}"


def _parts(weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Totals of what lies under the first two names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        groups.setdefault(".".join(name.split(".")[:2]), {})[name] = tensor
    return [{"name": name, "tensors": len(tensors), **_totals(tensors)} for name, tensors in groups.items()]


def _totals(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"parameters": sum(tensor.numel() for tensor in weights.values()), "bytes": _bytes(weights)}


def _bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def say_totals(found: Mapping[str, Any], console: Console) -> None:
    """Print the size of everything."""
    console.print(f"{found['parameters']:,} parameters, {_size(found['bytes'])}", highlight=False)


def _size(count: int) -> str:
    power = min(int(math.log(count, 1024)) if count else 0, 4)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{count} B"


def _right(*heads: str) -> list[Column]:
    return [Column(head, justify="right") for head in heads]
