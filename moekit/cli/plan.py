"""The command plan."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moekit.cli.command import Command, RecipeCommand, number, path, say
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


def _options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        type=number(float, above=0),
        help="device memory in GiB; shows if the model fits and the fewest devices",
    )
    parser.add_argument(
        "--sequences", type=number(int, at_least=1), default=8, help="number of sequences in a device's micro-batch"
    )
    parser.add_argument(
        "--length", type=number(int, at_least=1), help="tokens in a sequence (default: data.max_length)"
    )


def _plan(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.runs.plan import forecast  # a list of commands needs none of it

    sizes = {name: given[name] for name in ("memory", "sequences", "length")}
    forecast(recipe, given.variant, config, Terminal(), **sizes)


def _folder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=path,
        required=True,
        metavar="FOLDER",
        help="transformers model; no weights are read",
    )
    parser.add_argument("--devices", type=number(int, at_least=1), default=1, help="number of devices (default: 1)")
    parser.add_argument("--memory", type=number(float, above=0), help="device memory in GiB; layouts must fit into it")
    parser.add_argument(
        "--sequences",
        type=number(int, at_least=1),
        default=1,
        help="number of sequences in a device's micro-batch (default: 1)",
    )
    parser.add_argument(
        "--length", type=number(int, at_least=1), default=1024, help="tokens in a sequence (default: 1024)"
    )
    parser.add_argument(
        "--precision", choices=["bf16-true", "32-true"], default="bf16-true", help="number format (default: bf16-true)"
    )
    parser.add_argument(
        "--optimizer", choices=["adamw", "momentum", "sgd", "adafactor"], default="adamw", help="default: adamw"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")
    parser.add_argument(
        "--adapters",
        type=number(int, at_least=1),
        default=16,
        metavar="RANK",
        help="rank of the adapters that are planned beside full fine-tuning (default: 16)",
    )
    parser.add_argument(
        "--targets", default="experts", help="what has adapters: experts, routers, attention (default: experts)"
    )


def _plan_folder(given: argparse.Namespace, console: Console) -> None:
    from moekit.parallel.layout import Training  # a list of commands needs none of it
    from moekit.planner import GIB
    from moekit.runs.folders.plan import folder_plan, show_plan

    training = Training(
        sequences=given.sequences,
        source_length=given.length,
        target_length=given.length,
        precision=given.precision,
        optimizer=given.optimizer,
        checkpointing=given.checkpointing,
    )
    memory = None if given.memory is None else given.memory * GIB
    targets = [name.strip() for name in given.targets.split(",")]
    for rank in (0, given.adapters):
        found = folder_plan(given.model, given.devices, training, memory=memory, rank=rank, targets=targets)
        say(console, show_plan(found, memory))


FOLDER_COMMAND = Command(
    "Estimate memory, FLOPs and communication of training a transformers model, from its configuration",
    _folder_options,
    _plan_folder,
    "  moekit plan --model OLMoE-1B-7B --devices 8 --memory 80",
)
COMMAND = RecipeCommand("Estimate memory, FLOPs and communication without running the model", _options, _plan)
