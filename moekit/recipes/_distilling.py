"""The command `distill`, which every recipe has: a student learns from text and from a trained run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentParser
from torch import nn

from moekit.errors import UserError
from moekit.recipes._command import Recipe, as_plain
from moekit.recipes._start import Start, open_run, own_tokenizer, tokenizer_of
from moekit.surgery.inheritance import inherit
from moekit.training.distillation import Added, DistillationModule, Falling, Mixture, Objective, Staged, Teacher
from moekit.training.multitask import MultitaskModule
from moekit.training.run_folder import RunFolder

if TYPE_CHECKING:
    from moekit.recipes._surgery.subject import Subject


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the student learns from the teacher, and what it begins with.

    The defaults are Switch Transformer's (arXiv:2101.03961). DeepSpeed-MoE's Mixture-of-Students (arXiv:2201.05596) is
    objective=added, weight=1.0, an `until` and, as in the released code, inherit=none: the student begins with draws of
    its own. Beginning with the teacher's layers (inherit=everything) is ours.

    Attributes:
        objective: mixture = (1 - weight) of the labels' loss and weight of the teacher's; added = the labels' loss and
            weight times the teacher's.
        weight: of the teacher's loss, the KL divergence.
        until: optimizer steps after which the teacher falls silent and labels alone count; 0 = never.
        fall: how it falls silent: stop = at once (DeepSpeed-MoE), linear or cosine = its weight goes to 0 until then.
        fall_from: step at which its weight begins to fall.
        temperature: of both distributions in the teacher's loss.
        inherit: the student begins with the teacher's weights of the same name: everything, non_moe (all but experts
            and routers), or none.
        layers: which of the teacher's layers a shallower student gets, as decoder.layers=0,1,4,5 (several stacks with
            ; between); not given = spread evenly, sparse ones from sparse ones.
    """

    objective: Literal["mixture", "added"] = "mixture"
    weight: float = 0.25
    until: int = 0
    fall: Literal["stop", "linear", "cosine"] = "stop"
    fall_from: int = 0
    temperature: float = 1.0
    inherit: Literal["everything", "non_moe", "none"] = "non_moe"
    layers: str | None = None


def options(parser: ArgumentParser) -> None:
    """What `distill` takes beside the recipe's settings, which are the student's."""
    parser.add_argument(
        "--teacher",
        type=str,
        default=None,
        metavar="RUN",
        help="folder or checkpoint of a trained run, of any recipe; the student's settings begin as that run has them "
        "(of another recipe: its data and tasks), so say what is smaller, for example --model.num_experts 0 or fewer "
        "layers",
    )
    parser.add_class_arguments(DistillConfig, "distill")


def settings(recipe: Recipe[Any], run: Subject, variant: str | None) -> tuple[str, Any]:
    """The teacher's; of another recipe or variant its data, and its tasks where this recipe has the same ones."""
    if run.recipe.name == recipe.name and variant in (None, run.variant):
        return run.variant, run.config
    name = variant or next(iter(recipe.variants))
    own = recipe.variants[name]
    tasks = run.config.tasks if type(run.config.tasks) is type(own.tasks) else own.tasks
    return name, dataclasses.replace(own, data=run.config.data, tasks=tasks)


def begin(config: Any, given: Any, folder: RunFolder, *, resume: bool) -> Start:
    """What a run of distillation starts with.

    Args:
        config: the student's settings.
        given: the command's options.
        folder: of the run.
        resume: whether it goes on from its own checkpoint, where there is one.

    Raises:
        UserError: no teacher, one that does not suit the student, or settings that are no objective.
    """
    if given.teacher is None:
        raise UserError("distill needs a trained run to learn from: give its folder with --teacher.")
    chosen = DistillConfig(**vars(given.distill))
    going_on = resume and folder.last_checkpoint is not None
    run = open_run(given.teacher)
    tokenizer = own_tokenizer(folder) if going_on else tokenizer_of(run)
    objective = _objective(chosen)

    def make(student: nn.Module, heads: Any, **options: Any) -> MultitaskModule:
        with torch.random.fork_rng(devices=[]):  # the student's dropout and order do not depend on the teacher
            model: Any = run.model(device="cpu")
        model.load_state_dict(run.loaded.weights)
        try:
            module = DistillationModule(
                student,
                heads,
                Teacher(model["backbone"], list(model["heads"].values())),
                objective=objective,
                temperature=chosen.temperature,
                **options,
            )
        except ValueError as error:
            raise UserError(f"distill: {error}") from None
        if chosen.inherit != "none" and not going_on:
            everything = chosen.inherit == "everything"
            found = inherit(module, model, run.loaded.weights, experts=everything, layers=_layers(chosen.layers))
            module.load_state_dict(found.weights)
        return module

    def note(module: MultitaskModule) -> str:
        return f"teacher   {given.teacher}: {sum(t.numel() for t in run.loaded.weights.values()):,} parameters"

    record = {"teacher": str(Path(given.teacher)), "distill": as_plain(chosen)}
    return Start(record, make, tokenizer, note)


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
