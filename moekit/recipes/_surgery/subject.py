"""A run to operate on: its weights, its recipe, and the model that its configuration describes."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

import moekit.recipes
from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.recipes._command import Recipe, from_plain
from moekit.recipes._parts import Build, WithData, build_parts, make_optimizer
from moekit.recipes._pipeline import pipeline_of
from moekit.recipes._run_text import recorded, training_data
from moekit.surgery import SparseLayer, by_name, parameter_names, require_complete, sparse_layers
from moekit.surgery.adapters import merged_state
from moekit.training.checkpoint_state import LoadedState, load_state
from moekit.training.run_folder import CONFIG_KEY, RunFolder

_PROBE = 7919
"""A vocabulary size that no other dimension has: a prime."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint of a recipe's run.

    Attributes:
        path: the checkpoint.
        folder: the run's, None where there is only a checkpoint.
        loaded: what the checkpoint holds.
        variant: of the recipe.
        recipe: its command line.
        config: its configuration.
        vocab_size: V.
    """

    path: Path
    folder: RunFolder | None
    loaded: LoadedState
    variant: str
    recipe: Recipe[Any]
    config: Any
    vocab_size: int

    @property
    def build(self) -> Build:
        """What makes its model."""
        return pipeline_of(self.recipe).build

    def model(self, config: Any = None, *, device: str = "meta") -> nn.Module:
        """The network and its heads under the names that a checkpoint has; by another configuration where one is given.

        Raises:
            UserError: if the recipe cannot build it.
        """
        wanted = self.config if config is None else config
        return build_model(self.build, wanted, self.vocab_size, device=device)

    def fresh_model(self, config: Any) -> nn.Module:
        """`model` with the weights that training begins with; tables of the text are made of it.

        Raises:
            UserError: if the recipe cannot build it, or looks at the run's text and that is gone or has changed.
        """
        data = None
        if isinstance(self.build, WithData):
            data = training_data(self.config, self.folder, self.loaded.rest, str(self.path))
        return build_model(self.build, config, self.vocab_size, data, "cpu")

    @property
    def tokenizer_digest(self) -> str | None:
        """The beginning of the fingerprint of the tokenizer that it was trained with, where that is known."""
        tokenizer = None if self.folder is None else self.folder.tokenizer
        return recorded(self.loaded.rest, "tokenizer") if tokenizer is None else tokenizer.fingerprint[:16]

    def layers(self) -> dict[str, SparseLayer]:
        """Its sparse layers."""
        return sparse_layers(self.model())

    def slots(self) -> dict[str, dict[str, Any]] | None:
        """Optimizer state by parameter names; None where the checkpoint has none, or is of a run of fine-tuning.

        Raises:
            UserError: if it is not that of the recipe's optimizer.
        """
        settings = self.loaded.rest.get(CONFIG_KEY)
        if isinstance(settings, Mapping) and "fine_tune" in settings:
            return None  # fine-tuning steps other parameters than the recipe
        if self.loaded.named_optimizer is not None:
            return self.loaded.named_optimizer
        if self.loaded.optimizer is None:
            return None
        return by_name(self.loaded.optimizer, optimizer_names(self.config, self.model()), str(self.path))


def optimizer_names(config: Any, model: nn.Module) -> list[str]:
    """Names of parameters in the order of the run's optimizer."""
    return parameter_names(model, make_optimizer(config.train, model))


def open_subject(path: str | Path, config: str | Path | None = None) -> Subject:
    """A run folder, a checkpoint of a run, or a plain state dict with the configuration that it is of.

    Args:
        path: of a folder the best checkpoint is taken, else the last, as `test` and `generate` do; for another one give
            the file.
        config: a run's config.yaml; needed where the checkpoint holds none and none lies beside it.

    Raises:
        UserError: naming the file, and the key where there is one: it cannot be read, is of no recipe, or its weights
            are not of the model that the configuration describes.
    """
    place = Path(path)
    folder = RunFolder(place) if (place / "config.yaml").is_file() else None
    if folder is not None:
        found = folder.best_checkpoint
        if found is None:
            raise UserError(f"{place} holds no checkpoint: train first (run or fit).")
        place = found
    elif place.parent.name == "checkpoints" and (place.parent.parent / "config.yaml").is_file():
        folder = RunFolder(place.parent.parent)
    loaded = load_state(place)
    loaded = dataclasses.replace(loaded, weights=merged_state(loaded.weights))
    where, values = _settings(place, loaded, folder, config)
    recipe = recipe_of(values, where)
    settings = from_plain(type(next(iter(recipe.variants.values()))), values, where)
    vocab_size = _vocab_size(recipe, settings, loaded.weights, str(place))
    subject = Subject(place, folder, loaded, str(values.get("variant")), recipe, settings, vocab_size)
    require_complete(loaded.weights, subject.model(), str(place))
    return subject


def recipe_of(values: Mapping[str, Any], where: str) -> Recipe[Any]:
    """The recipe that a run's settings name; `where` begins the message of a UserError."""
    known = [info.name for info in pkgutil.iter_modules(moekit.recipes.__path__) if not info.name.startswith("_")]
    name = values.get("recipe")
    if name not in known:
        raise UserError(f"{where}: recipe must be one of {', '.join(known)}: got {name!r}.")
    recipe: Recipe[Any] = importlib.import_module(f"moekit.recipes.{name}").RECIPE
    return recipe


def build_model(
    build: Build, config: Any, vocab_size: int, data: MultitaskData | None = None, device: str = "meta"
) -> nn.Module:
    """Network and heads, named as in `MultitaskModule`; what looks at the run's text is not made on the meta device.

    Raises:
        UserError: if the recipe refuses the configuration.
    """
    try:
        built = build_parts(build, config, vocab_size, data, device)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the recipe cannot build such a model: {error}") from None
    return nn.ModuleDict({"backbone": built.backbone, "heads": nn.ModuleDict({h.task: h for h in built.heads})})


def with_setting(config: Any, key: str, value: Any) -> Any:
    """The configuration with the value at a dotted key replaced."""
    name, _, rest = key.partition(".")
    inner = with_setting(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def _settings(
    place: Path, loaded: LoadedState, folder: RunFolder | None, config: str | Path | None
) -> tuple[str, Mapping[str, Any]]:
    """The configuration of a run, and where it is from: the given file, the checkpoint, the folder."""
    if config is not None:
        given = Path(config)
        try:
            values = yaml.safe_load(given.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{given} must be readable YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(values, dict):
            raise UserError(f"{given} must hold a mapping: got {type(values).__name__}.")
        return str(given), values
    inside = loaded.rest.get(CONFIG_KEY)
    if isinstance(inside, Mapping):
        return str(place), inside
    if folder is not None:
        return str(folder.path / "config.yaml"), folder.config()
    raise UserError(
        f"{place} does not say what model it is of: give the config.yaml of a run with such a model (--config)."
    )


def _vocab_size(recipe: Recipe[Any], config: Any, weights: Mapping[str, Tensor], where: str) -> int:
    """V, from the shapes of the weights: no text is read for it."""
    for name, tensor in build_model(pipeline_of(recipe).build, config, _PROBE).state_dict().items():
        if _PROBE in tensor.shape and name in weights and weights[name].ndim == tensor.ndim:
            return weights[name].shape[tensor.shape.index(_PROBE)]
    raise UserError(f"{where} has no table of tokens where the model of its configuration has one.")
