"""A recipe: the model of a paper, and the settings with which it is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekit.data.counts import bigram_counts, token_counts
from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.heads import Head
from moekit.layer import AuxLosses
from moekit.routers.hash_keys import Bigram
from moekit.runs.config import RunConfig
from moekit.runs.known import require_known
from moekit.runs.plain import as_plain, build
from moekit.runs.settings.data import DataConfig


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model: the network, its heads, and the weights of its routers' losses."""

    backbone: nn.Module
    heads: list[Head]
    aux: AuxLosses | None

    def named(self) -> nn.ModuleDict:
        """Network and heads under the names that `MultitaskModule` and checkpoints have for them."""
        return nn.ModuleDict({"backbone": self.backbone, "heads": nn.ModuleDict({h.task: h for h in self.heads})})


@dataclass(frozen=True)
class RunText:
    """What a build may ask of the text of a run.

    Attributes:
        vocab_size: V.
        data: the text; None = there is none: the weights will be loaded, or are not needed, and what is made of text
            has the same shape and other values.
    """

    vocab_size: int
    data: MultitaskData | None = None

    def token_counts(self, *, shifted: bool = False) -> Tensor:
        """Int64[V]: how often a language model reads each token in training; without text all ones.

        Read is the bos before a sentence. With `shifted` it is counted what the model predicts: the eos behind it.
        """
        if self.data is None:
            return torch.ones(self.vocab_size, dtype=torch.int64, device="cpu")
        tokenizer = self.data.tokenizer
        before, after = (None, tokenizer.eos_id) if shifted else (tokenizer.bos_id, None)
        return token_counts(self.data.store, self.vocab_size, before=before, after=after)

    def bigram_counts(self, key: Bigram) -> Tensor | None:
        """How often a language model reads each bucket of bigrams in training; None without text."""
        return None if self.data is None else bigram_counts(self.data.store, key, before=self.data.tokenizer.bos_id)


@dataclass(frozen=True)
class Variant:
    """Settings of a recipe that have a name.

    Attributes:
        config: the settings.
        note: one line about them for the help.
    """

    config: RunConfig
    note: str


@dataclass(frozen=True)
class Recipe:
    """A paper as something that runs.

    Attributes:
        name: what names it in ``moekit run <name>`` and ``python -m moekit.recipes.<name>``.
        about: one paragraph for the help.
        build: makes the parts of a model from the configuration and the text of a run.
        variants: settings by name; the first is the default. The types of ``model`` and ``tasks`` are those of its
            configuration.
        reads_text: whether `build` looks at more of the text than the size of its vocabulary.
        renamed: settings of former versions by dotted key, and where they are now.
    """

    name: str
    about: str
    build: Callable[[RunConfig, RunText], ModelParts]
    variants: Mapping[str, Variant]
    reads_text: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def default(self) -> RunConfig:
        """The configuration of the first variant."""
        return next(iter(self.variants.values())).config

    def parts(self, config: RunConfig, text: RunText, device: str | None = None) -> ModelParts:
        """What `build` makes, on `device`; on the caller's where that is None, or where it is made of text.

        Raises:
            UserError: the settings do not fit together.
        """
        looks = self.reads_text and text.data is not None
        with contextlib.nullcontext() if device is None or looks else torch.device(device):
            try:
                return self.build(config, text)
            except UserError:
                raise
            except ValueError as error:  # of a module, which knows arguments and no keys
                raise UserError(f"a model cannot be built with these settings: {error}") from error

    def config(self, values: Mapping[str, Any], where: str) -> RunConfig:
        """The configuration from parsed values, or from the plain data of a run folder or a checkpoint.

        Raises:
            UserError: a key is missing or does not fit; `where` begins the message.
        """
        try:
            groups = {f.name: values[f.name] for f in dataclasses.fields(RunConfig) if f.name in values}
            for name in ("model", "tasks"):
                groups[name] = build(type(getattr(self.default, name)), values.get(name, {}))
            return build(RunConfig, groups)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: not a configuration of this recipe ({error}).") from None

    def current(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The plain data of a configuration as this version writes it: keys that moved or are new, lists once text."""
        now = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        for old, new in self.renamed.items():
            group, _, key = new.partition(".")
            if old in now:
                value = now.pop(old)
                now[group] = {**now.get(group, {}), **({} if value is None else {key: value})}
        for f in dataclasses.fields(RunConfig):  # former versions lack the settings that came later
            if isinstance(now.get(f.name), dict) and f.name != "tasks":  # only those that take part are written
                now[f.name] = as_plain(type(getattr(self.default, f.name))()) | now[f.name]
        if isinstance(now.get("data"), dict):
            now["data"] |= structured(now["data"])
        return now


def structured(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of data that are lists or mappings, as plain data; former versions wrote them as text."""
    lists = ("source", "path", "directions", "languages", "columns", "babel_sizes")
    names = [name for name in lists if name in data]
    made = as_plain(DataConfig(**{name: data[name] for name in names}))
    return {name: made[name] for name in names}


def find_recipe(name: Any, where: str) -> Recipe:
    """The recipe with that name.

    Raises:
        UserError: there is none; `where` begins the message.
    """
    require_known(name, where)
    found: Recipe = importlib.import_module(f"moekit.recipes.{name}").RECIPE
    return found
