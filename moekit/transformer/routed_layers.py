"""The names of sparse layers."""

from __future__ import annotations

from torch import nn


def routed_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """Sparse layers of a backbone by their names, an encoder's before a decoder's.

    ``encoder.1`` is the feed-forward of the encoder's block 1. Logs, reports and commands use these names.
    """
    stacks = {side: getattr(backbone, side, None) for side in ("encoder", "decoder")}
    return {
        f"{side}.{number}": stack.blocks[number].feed_forward
        for side, stack in stacks.items()
        if stack is not None
        for number in stack.routed_layers
    }
