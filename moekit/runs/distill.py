"""Distillation: a student learns from text and from a trained run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.init_from import InitFrom, choices_from, starting_tokenizer
from moekit.runs.recipe import Recipe
from moekit.runs.run import Run
from moekit.runs.settings.fields import setting
from moekit.surgery.student import initialize_student
from moekit.training.distillation import Added, DistillationModule, Falling, Mixture, Objective, Staged, Teacher
from moekit.training.multitask import MultitaskModule


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the student learns from the teacher, and which weights it copies.

    The defaults are Switch Transformer's (arXiv:2101.03961). DeepSpeed-MoE's Mixture-of-Students (arXiv:2201.05596) is
    objective=added, weight=1.0, an `until` and, as in the released code, inherit=none: the student begins with draws of
    its own. Beginning with the teacher's layers (inherit=everything) is ours.

    Attributes:
        objective: form of the loss: mixture = (1 - weight) * label loss + weight * teacher loss; added = label loss +
            weight * teacher loss.
        weight: weight of the teacher loss, a KL divergence; 0.25 in Switch.
        until: number of optimizer steps with the teacher; afterwards only the label loss counts. 0 = the teacher is
            used to the end.
        fall: how the teacher's weight reaches 0 at step `until`: stop = all at once (DeepSpeed-MoE), linear, or cosine.
        fall_from: optimizer step at which the teacher's weight begins to fall, for linear and cosine.
        temperature: temperature of the softmax of teacher and student in the teacher loss; 1 = unchanged.
        inherit: weights that the student copies from the teacher's parameters of the same name: everything, non_moe
            (all but experts and routers), or none.
        layers: teacher layers that a shallower student copies, as decoder.layers=0,1,4,5; separate several stacks by ;
            (semicolon). Not given = spread evenly, sparse layers from sparse layers.
    """

    objective: Literal["mixture", "added"] = "mixture"
    weight: float = setting(0.25, at_least=0)
    until: int = setting(0, at_least=0)
    fall: Literal["stop", "linear", "cosine"] = "stop"
    fall_from: int = setting(0, at_least=0)
    temperature: float = setting(1.0, above=0)
    inherit: Literal["everything", "non_moe", "none"] = "non_moe"
    layers: str | None = None


class Distillation(InitFrom):
    """A trained run as the teacher of another."""

    command, option, purpose = "distill", "teacher", "a trained run to learn from"
    group, choices = "distill", DistillConfig
    chosen: DistillConfig

    def __init__(self, source: str | None, chosen: DistillConfig, config: RunConfig, own: Run | None) -> None:
        super().__init__(source, chosen, config, own)
        self.run = Run.load(self.source)
        if own is None:
            self.tokenizer = starting_tokenizer(self.run)
        self.objective = _objective(chosen)

    @classmethod
    def starting_config(cls, recipe: Recipe, run: Run, variant: str | None) -> tuple[str, RunConfig]:
        """Those of the teacher; of one of another recipe its data, and its tasks if this recipe has them."""
        if run.recipe.name == recipe.name and variant in (None, run.variant):
            return run.variant, run.config
        name = variant or next(iter(recipe.variants))
        own = recipe.variants[name].config
        tasks = run.config.tasks if type(run.config.tasks) is type(own.tasks) else own.tasks
        return name, own.changed(data=run.config.data, tasks=tasks)

    def make(self, *parts: Any, **options: Any) -> MultitaskModule:
        """The student with its teacher and, unless it goes on, with the weights that it inherits.

        Raises:
            UserError: settings are no objective, or do not suit student and teacher.
        """
        with torch.random.fork_rng(devices=[]):  # the student's dropout and order do not depend on the teacher
            model: Any = self.run.model(device="cpu")
        weights = self.run.loaded.weights
        model.load_state_dict(weights)
        student, heads = parts
        try:
            module = DistillationModule(
                student,
                heads,
                Teacher(model["backbone"], list(model["heads"].values())),
                objective=self.objective,
                temperature=self.chosen.temperature,
                **options,
            )
        except ValueError as error:
            raise UserError(f"distill: {error}") from None
        if not self.goes_on and (found := inherited(self.chosen, module, model, weights)) is not None:
            module.load_state_dict(found)
        return module

    def note(self, module: MultitaskModule) -> str:  # noqa: D102
        count = sum(tensor.numel() for tensor in self.run.loaded.weights.values())
        return f"teacher   {self.source}: {count:,} parameters"


def inherited(
    chosen: DistillConfig, student: nn.Module, teacher: nn.Module, weights: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The state dict with which a student begins; None where it inherits nothing.

    Args:
        chosen: what it inherits.
        student: network and heads, under the names of `MultitaskModule`.
        teacher: the same of the teacher; both may be on the meta device.
        weights: the teacher's state dict.

    Raises:
        UserError: student and teacher do not suit each other, or no such layers.
    """
    if chosen.inherit == "none":
        return None
    everything = chosen.inherit == "everything"
    return initialize_student(student, teacher, weights, experts=everything, layers=_layers(chosen.layers)).weights


def distill_config(given: Mapping[str, Any]) -> DistillConfig:
    """The settings from plain data.

    Raises:
        UserError: one is unknown or out of its range, or together they are no objective; or layers are no numbers.
    """
    found = choices_from(DistillConfig, "distill", given)
    _objective(found)
    _layers(found.layers)
    return found


def _objective(chosen: DistillConfig) -> Objective:
    try:
        base = Mixture(chosen.weight) if chosen.objective == "mixture" else Added(chosen.weight)
        if chosen.fall != "stop":
            return Falling(base, chosen.until, chosen.fall_from, chosen.fall)
        if chosen.fall_from:
            raise ValueError(f"fall_from needs a fall that is not stop: got fall_from={chosen.fall_from}.")
        return Staged(base, chosen.until) if chosen.until else base
    except ValueError as error:
        raise UserError(f"distill: {error}") from None


def _layers(text: str | None) -> Mapping[str, tuple[int, ...]] | None:
    """``decoder.layers=0,1;encoder.layers=0`` by the names that the module has."""
    if not text:
        return None
    found = {}
    for part in text.split(";"):
        stack, _, numbers = part.partition("=")
        words = [word.strip() for word in numbers.split(",")]
        if not all(word.isdecimal() for word in words):
            raise UserError(f"distill.layers must be as decoder.layers=0,1,4,5: got {part.strip()!r}.")
        found[f"backbone.{stack.strip()}"] = tuple(map(int, words))
    return found
