"""What the model of a folder does with text: its loss, and how much each expert matters."""

from __future__ import annotations

from typing import Any

import torch

from moekit.errors import UserError
from moekit.runs.folders.text import FolderText
from moekit.surgery import ExpertUse, sparse_layers, watch_experts


@torch.no_grad()
def held_out_loss(model: Any, text: FolderText) -> float:
    """Nats per prediction, of labels alone: no routers' losses."""
    total = 0.0
    model.eval()
    for batch, count in zip(text.batches, text.predictions, strict=True):
        total += float(model(**_on(model, batch)).loss) * count
    return total / sum(text.predictions)


@torch.no_grad()
def measured_use(model: Any, text: FolderText) -> dict[str, ExpertUse]:
    """`moekit.surgery.watch_experts` on text, for every sparse layer.

    Raises:
        UserError: nothing was routed in a layer.
    """
    model.eval()
    with watch_experts(model) as use:
        for batch in text.batches:
            model(**_on(model, batch))
    for path in sparse_layers(model):
        if path not in use or not int(use[path].tokens.sum()):
            raise UserError(f"no token was routed in {path}: give more text.")
    return use


def _on(model: Any, batch: Any) -> dict[str, Any]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
