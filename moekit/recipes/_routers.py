"""Routers that recipes compare in the place of their own, and the embeddings that a table may be made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from moekit.errors import UserError
from moekit.routers import CosineRouter, LossFreeRouter, SampledSoftmax, TopKRouter, base_layers
from moekit.routing import Router
from moekit.runs import Run
from moekit.training.checkpoint_state import load_state

Learned = Literal["switch", "sampled", "cosine", "base", "loss_free"]
LEARNED: Mapping[Learned, Callable[[int, int], Router]] = {
    # Switch's softmax without jitter, so that runs of a pair draw the same random numbers
    "switch": lambda dim, num_experts: TopKRouter(dim, num_experts),
    "sampled": lambda dim, num_experts: TopKRouter(dim, num_experts, exploration=SampledSoftmax()),
    "cosine": lambda dim, num_experts: CosineRouter(dim, num_experts),
    # The assignment of training weighs a token against later ones, as in its paper; evaluation does not.
    "base": lambda dim, num_experts: base_layers(dim, num_experts, allow_future=True),
    "loss_free": lambda dim, num_experts: LossFreeRouter(dim, num_experts, 1),
}
"""Routers that send a token to one expert without a limit, by name, for D and E."""


def token_embeddings(run: str | None, vocab_size: int) -> Tensor:
    """Float[V, D], the token embeddings of the best checkpoint of a run.

    Raises:
        UserError: there is none, or it has another vocabulary.
    """
    checkpoint = None if run is None else Run.open(run).best_checkpoint
    if checkpoint is None:
        raise UserError(
            f"model.hash clustered and dispersed need model.embeddings, the folder of a trained run: got {run}. For "
            "example train --variant tiny_dense and give its folder."
        )
    table = load_state(checkpoint).weights.get("backbone.embedding.weight")
    if table is None or table.shape[0] != vocab_size:
        found = "no token embeddings" if table is None else f"a vocabulary of {table.shape[0]}"
        raise UserError(f"model.embeddings must be of a run with this one's vocabulary of {vocab_size}: got {found}.")
    return table
