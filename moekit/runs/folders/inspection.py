"""What is in a folder of transformers, as a table to read and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moekit.errors import UserError
from moekit.huggingface import adopt_folder, folder_layout
from moekit.huggingface.folder import folder_files
from moekit.runs.folders.measuring import measured_use
from moekit.runs.folders.text import TextChoice, folder_text
from moekit.runs.surgery.inspection import layer_table, say_totals, title


def inspect_folder(folder: Path, choice: TextChoice | None = None) -> dict[str, Any]:
    """A folder's sparse layers, experts and sizes, without its weights; with text also how much experts are used.

    Raises:
        UserError: it is no folder of a model that transformers knows, or text cannot be read.
    """
    layout, files = folder_layout(folder), folder_files(folder)
    size = sum(mapped.numel * mapped.dtype.itemsize for mapped in files.values())
    use = {}
    if choice is not None:
        if not layout.layers:
            raise UserError(f"text is for the use of experts, and {folder} has none. Leave --data.path out.")
        text = folder_text(folder, choice, "train")
        use = measured_use(adopt_folder(folder, aux=None), text)
    each = size / max(sum(mapped.numel for mapped in files.values()), 1)
    rows = [
        {
            "name": name,
            "path": layer.path,
            "router": layer.router,
            "experts": layout.architecture,
            "num_experts": layer.num_experts,
            "k": layer.k,
            "expert_parameters": layer.expert_parameters,
            "bytes": round(layer.expert_parameters * layer.num_experts * each),
            "load": use[layer.path].load.tolist() if layer.path in use else None,
            "saliency": use[layer.path].saliency.tolist() if layer.path in use else None,
        }
        for name, layer in zip(_names([layer.path for layer in layout.layers]), layout.layers, strict=True)
    ]
    return {
        "folder": str(folder),
        "architecture": layout.architecture,
        "parameters": layout.parameters,
        "active_parameters": layout.active,
        "expert_share": layout.of_experts / max(layout.parameters, 1),
        "bytes": size,
        "types": sorted({str(mapped.dtype).removeprefix("torch.") for mapped in files.values()}),
        "layers": rows,
    }


def _names(paths: Sequence[str]) -> list[str]:
    """Paths without what all of them begin and end with: short enough for a table."""
    parts = [path.split(".") for path in paths]
    first = next((i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), 0)
    last = next((i for i, same in enumerate(zip(*(p[::-1] for p in parts), strict=False)) if len(set(same)) > 1), 0)
    return [".".join(part[max(first - 1, 0) : len(part) - last]) for part in parts]


def show_folder(found: Mapping[str, Any], console: Console) -> None:
    """Print what `inspect_folder` found."""
    title(found["folder"], console)
    console.print(f"{found['architecture']} of transformers, {', '.join(found['types'])}", highlight=False)
    if found["layers"]:
        console.print(layer_table(found["layers"]))
    else:
        console.print("a dense model: no experts")
    say_totals(found, console)
    if found["layers"]:
        active = f"{found['active_parameters']:,} active for a token"
        console.print(f"experts {found['expert_share']:.1%} of them; {active}", highlight=False)
