"""Where padding stands in a row: what counts as the place of a token, and what cannot be computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.functional.eager import is_symbolic


def count_real(mask: Tensor) -> Tensor:
    """Int64[B, S]: how many real tokens stand before each real place of ``mask`` Bool[B, S] in its row.

    Padding goes on counting from the last real token, so that padding on the right changes no number at all.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    return place - torch.where(mask, (~mask).cumsum(1), 0).cummax(1).values


def previous_real(ids: Tensor, mask: Tensor | None, first: Tensor) -> Tensor:
    """Int64[B, S]: the real token before each place of ``ids`` Int64[B, S]; ``first`` Int64[B] where there is none."""
    if mask is None:
        return torch.cat((first[:, None], ids[:, :-1]), dim=1)
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    last = torch.where(mask, place, 0).cummax(1).values  # 1 + the last real place up to and with this one
    before = nn.functional.pad(last[:, :-1], (1, 0))
    return torch.where(before > 0, ids.gather(1, (before - 1).clamp_min(0)), first[:, None])


def next_real(ids: Tensor, mask: Tensor | None, last: Tensor) -> Tensor:
    """Int64[B, S]: the real token after each place of ``ids`` Int64[B, S]; ``last`` Int64[B] where there is none."""
    return previous_real(ids.flip(1), None if mask is None else mask.flip(1), last).flip(1)


def _unseen(mask: Tensor) -> bool:
    """Whether looking at a mask would cost: an accelerator waits, a compiled graph breaks, and vmap refuses it."""
    return mask.device.type != "cpu" or is_symbolic()


def check_right_padded(mask: Tensor | None, *, cached: bool = False) -> None:
    """Refuse padding that a causal stack would see, where looking costs nothing.

    Raises:
        ValueError: if a real token stands after padding, or there is padding and a cache would keep it.
    """
    if mask is None or _unseen(mask):
        return
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "A decoder takes padding on the right only: got a mask with a real token after padding. Move the padding "
            "behind the tokens."
        )
    if cached and not bool(mask.all()):
        raise ValueError(
            "A cache keeps every token for those that follow, and padding is none: got a mask with padding. Decode "
            "rows of one length together, or without a cache."
        )


def check_no_hole(mask: Tensor | None, positions: nn.Module) -> None:
    """Refuse padding between the tokens of a row, where looking costs nothing.

    Raises:
        ValueError: if a row of ``mask`` Bool[B, S] has any.
    """
    if mask is None or _unseen(mask):
        return
    begins = mask[:, 1:] & ~mask[:, :-1]
    if bool((begins.sum(1) + mask[:, :1].sum(1) > 1).any()):
        raise ValueError(
            f"{type(positions).__name__} see distances between places, and padding between two tokens changes them: "
            "got a mask with padding inside a row. Move the padding to the ends of the row."
        )
