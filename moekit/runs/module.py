"""The LightningModule of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.kernels.gpu.backend import use_backend
from moekit.runs.config import RunConfig
from moekit.runs.recipe import Recipe, RunText
from moekit.runs.settings.tasks import active_tasks
from moekit.training.budget import Budget
from moekit.training.multitask import MultitaskModule
from moekit.transformer import init_weights_by_name


def make_module(
    recipe: Recipe,
    config: RunConfig,
    data: MultitaskData,
    make: Callable[..., MultitaskModule] = MultitaskModule,
    *,
    empty: bool = False,
    loaded: bool = False,
) -> tuple[MultitaskModule, Budget]:
    """The LightningModule of a run, made by `make`, and the budget that its schedule follows.

    With `empty` it is made without memory. With `loaded` weights will be loaded in the place of all that is made here,
    so that no text is looked at.

    Raises:
        UserError: the model should be made without memory and cannot be, or its settings do not fit together.
    """
    if empty and (recipe.reads_text or make is not MultitaskModule):
        source = "text" if recipe.reads_text else "the weights of another"
        raise UserError(
            f"strategy.empty_init needs a model whose weights are drawn: this one is made from {source}. Leave it out."
        )
    text = RunText(data.tokenizer.vocab_size, None if loaded else data)
    parts = recipe.parts(config, text, "meta" if empty else None)
    train, budget = config.train, config.train.budget()
    if train.init_by_name and not (empty or loaded):
        init_weights_by_name(parts.named(), train.seed)
    if train.accelerator != "cpu" and torch.cuda.is_available():  # elsewhere torch computes
        use_backend(parts.backbone, train.backend)
    module = make(
        parts.backbone, parts.heads, aux=parts.aux,
        weights={name: task.weight for name, task in active_tasks(config.tasks).items()},
        languages=data.tokenizer.languages, directions=[str(direction) for direction in data.directions],
        optimizer=train.make_optimizer, schedule=lambda optimizer: train.make_schedule(optimizer, budget),
        log_routing_every=train.log_every, samples=config.evaluate.samples, tokenize=config.evaluate.bleu_tokenizer,
        score_valid=config.evaluate.score_valid, score_valid_every=config.evaluate.score_valid_every,
    )  # fmt: skip
    return module, budget
