"""From a folder of transformers to one of our models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.data.tokenizer import SpecialTokens
from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES, Architecture
from moekit.huggingface.families import FAMILIES, Family
from moekit.huggingface.keys import Link, Shape
from moekit.huggingface.model import build
from moekit.huggingface.settings import Fields, Setting
from moekit.mapped import MappedTensor, read_safetensors
from moekit.stored import parse_json
from moekit.transformer import EncoderDecoder

WEIGHTS, INDEX, EXACT = "model.safetensors", "model.safetensors.index.json", "moekit.safetensors"
FORM = "moekit"
"""The key of ``config.json`` under which an export notes how the model said the same before."""
FORM_FIELDS = ("embedding_scale", "attention_scale", "bias")
"""What it notes: fields of `Architecture`."""
TOKEN_FIELDS = {"pad": "pad_token_id", "bos": "decoder_start_token_id", "eos": "eos_token_id"}
"""Fields of ``config.json`` by those of `SpecialTokens`."""


@dataclass(frozen=True)
class Imported:
    """A model of a folder.

    Attributes:
        model: The model, in evaluation mode.
        tokens: The special ids, as `moekit.inference.generate` takes them.
        architecture: What was found.
    """

    model: EncoderDecoder
    tokens: SpecialTokens
    architecture: Architecture


@dataclass(frozen=True)
class Blueprint:
    """A folder whose tensors have been found and fit, before any is read.

    Attributes:
        model: The model, on the meta device.
        tokens: The special ids.
        architecture: What was found.
        links: Which of theirs each of our tensors is made from, by our names.
        tensors: Their tensors by name.
        exact: Our tensors by name, where an export kept what its factors would round.
    """

    model: EncoderDecoder
    tokens: SpecialTokens
    architecture: Architecture
    links: Mapping[str, Link]
    tensors: Mapping[str, MappedTensor]
    exact: Mapping[str, MappedTensor]

    def tensor(self, name: str) -> Tensor:
        """One of ours, in memory of its own."""
        link = self.links[name]
        theirs = {name: self.tensors[name].tensor() for name in link.theirs}
        if link.factor != 1 and name in self.exact:
            kept = self.exact[name].tensor()
            again = link.to_theirs(kept)
            # Weights that were changed since they were exported are theirs, whatever was kept.
            if all(again[n].dtype == theirs[n].dtype and torch.equal(again[n], theirs[n]) for n in theirs):
                return kept.clone()
        return link.to_ours(theirs)

    def entry(self, name: str, number: int) -> Tensor:
        """Entry `number` of one of ours whose entries are tensors of their own there, such as an expert's; mapped."""
        link = self.links[name]
        return link.entry(number, self.tensors[link.theirs[number]].tensor())


def import_model(
    folder: Path | str, *, dropless: bool = False, dtype: torch.dtype | None = None, form: Architecture | None = None
) -> Imported:
    """Read a folder of transformers: ``config.json`` and safetensors, in one file or several.

    SwitchTransformers and NllbMoe for conditional generation. Logits are those of transformers for sentences padded on
    the right (see `Differs`). A folder that `export_model` wrote gives the exported model back, bit for bit, with the
    tables and queries that it had.

    Args:
        folder: The folder, as ``save_pretrained`` writes it.
        dropless: Whether to leave the capacity out; transformers does the same with a large ``expert_capacity``.
        dtype: The type of the weights; None = as they are stored.
        form: An architecture whose scales and biases, or none, the model is to have; None = those of the model that was
            exported, or those of transformers.

    Raises:
        UserError: if it is no such folder, a file is missing or broken, weights are pickles, the architecture is
            another or uses what moekit does not compute, or shapes do not fit.

    Source: arXiv:2101.03961, arXiv:2207.04672. Differs: padding takes no place at experts; evaluation is deterministic
        (NllbMoe's policies "sampling" and "random" act in training only); ``layerdrop`` is not built.
        SwitchTransformers drops tokens by sequence in training and in evaluation, which `SequenceCapacity` does here;
        NllbMoe's capacity in training, a number for the whole batch, is left out. NllbMoe of transformers 5 runs
        experts 0 and 1 whichever its router chose; here those run that were chosen, as in the authors' code.
    """
    found = open_folder(folder, dropless=dropless, form=form)
    state = {name: found.tensor(name) for name in found.links}
    found.model.load_state_dict(state, assign=True)
    model = found.model if dtype is None else found.model.to(dtype)
    return Imported(model.eval(), found.tokens, found.architecture)


def open_folder(folder: Path | str, *, dropless: bool = False, form: Architecture | None = None) -> Blueprint:
    """Find everything of a folder and make sure that it fits, and is as it was written where that is known.

    Weights stay in their files; arguments as of `import_model`.

    Raises:
        UserError: as `import_model`.
    """
    folder = Path(folder)
    config, family = _config(folder)
    where = str(folder / "config.json")
    theirs = family.architecture(config, where, dropless=dropless)
    tokens = _tokens(folder, config, where)
    synonyms = family.keys.synonyms(tied=theirs.tied)
    tensors = _resolve(folder, _tensors(folder), synonyms, tied=theirs.tied)
    wanted = _form(where, config) if form is None else {name: getattr(form, name) for name in FORM_FIELDS}
    architecture = theirs if wanted is None else dataclasses.replace(theirs, **wanted)
    if not family.bias:
        architecture = dataclasses.replace(architecture, bias=False)

    def linked(ours: Architecture) -> tuple[EncoderDecoder, list[Link]]:
        try:
            with torch.device("meta"):
                model = build(ours, pad_id=tokens.pad)
        except (ValueError, RuntimeError) as error:  # torch's, of sizes whose product it cannot count
            raise UserError(f"{where}: {next(iter(str(error).splitlines()), '')}") from None
        return model, list(family.links(ours, model.state_dict()))

    model, links = linked(architecture)
    absent = [name for link in links if not link.ours for name in link.theirs if name in tensors]
    if any(bool(tensors[name].tensor().any()) for name in absent):  # trained since, so they are there now
        architecture = dataclasses.replace(architecture, bias=theirs.bias)
        model, links = linked(architecture)
    _check(folder, links, model, tensors)
    exact = read_safetensors(folder / EXACT) if (folder / EXACT).is_file() else {}
    return Blueprint(model, tokens, architecture, {n.ours: n for n in links if n.ours}, tensors, exact)


def _config(folder: Path) -> tuple[dict[str, Any], Family]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder} must be a folder with config.json and safetensors: there is no such folder.")
    if not path.is_file():
        raise UserError(f"{folder} must be a folder of transformers: it has no config.json.")
    config = _json(path)
    kind = config.get("model_type")
    if kind not in list(NAMES):
        raise UserError(f"{path}: model_type must be one of {', '.join(NAMES)}: got {kind!r}.")
    names = config.get("architectures") or [NAMES[kind]]
    if not isinstance(names, list) or NAMES[kind] not in names:
        raise UserError(f"{path}: architectures must name {NAMES[kind]}: got {names}. Only whole models are read.")
    return config, FAMILIES[kind]


def _json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable JSON: {error}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object: got {type(data).__name__}.")
    return data


def _tokens(folder: Path, config: Mapping[str, Any], where: str) -> SpecialTokens:
    """Special ids: what generation_config.json says, else config.json."""
    said = _json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    given = {k: said[k] if said.get(k) is not None else config.get(k) for k in TOKEN_FIELDS.values()}
    if isinstance(given["eos_token_id"], list):  # any of several may end a text there
        given["eos_token_id"] = next(iter(given["eos_token_id"]), None)
    defaults = FAMILIES[config["model_type"]].token_defaults
    fields = Fields(given, where)
    return SpecialTokens(
        **{ours: Setting(name, defaults[name], least=0).value(fields) for ours, name in TOKEN_FIELDS.items()}
    )


def _tensors(folder: Path) -> dict[str, MappedTensor]:
    """Where every tensor of the folder lies."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5"))
        if pickles:
            raise UserError(
                f"{folder} must hold safetensors: it has {pickles[0]}, a pickle, which can run code when it is read. "
                "Nothing in it was read. Save the model again with save_pretrained, which writes safetensors."
            )
        raise UserError(f"{folder} must hold {WEIGHTS}, or {INDEX} and its shards: it has neither.")
    listed = _json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(v, str) and Path(v).name == v for v in listed.values()):
        raise UserError(f"{folder / INDEX}: weight_map must map names of tensors to files of this folder.")
    shards = {}
    for name in sorted(set(listed.values())):
        if not (folder / name).is_file():
            raise UserError(f"{folder} must hold every shard that {INDEX} names: {name} is missing.")
        shards[name] = read_safetensors(folder / name)
    for tensor, name in listed.items():
        if tensor not in shards[name]:
            raise UserError(f"{folder / name} must hold {tensor}, as {INDEX} says: it does not.")
    return {tensor: shards[name][tensor] for tensor, name in listed.items()}


def _resolve(
    folder: Path, tensors: Mapping[str, MappedTensor], synonyms: Mapping[str, tuple[str, ...]], *, tied: bool
) -> dict[str, MappedTensor]:
    """The tensors with each table under its first name only."""
    out = dict(tensors)
    for name, others in synonyms.items():
        present = [n for n in (name, *others) if n in tensors]
        if not present:
            continue
        first = tensors[present[0]]
        for other in present[1:] if tied else ():
            same = tensors[other].shape == first.shape and torch.equal(tensors[other].tensor(), first.tensor())
            if not same:
                raise UserError(
                    f"{folder}: {present[0]} and {other} must be equal, as tie_word_embeddings says: they differ. Set "
                    "tie_word_embeddings to false in config.json."
                )
        out[name] = first
    for other in {n for others in synonyms.values() for n in others} - set(synonyms):
        out.pop(other, None)
    return out


def _form(where: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the model said the same before it was exported, where the folder is of an export."""
    form = config.get(FORM)
    if form is None:
        return None
    good = (
        isinstance(form, dict)
        and form.get("embedding_scale") in ("input", "output", "none")
        and isinstance(form.get("attention_scale", ""), float | int | None)
        and isinstance(form.get("bias"), bool)
    )
    if not good:
        raise UserError(
            f"{where}: {FORM} must hold embedding_scale, attention_scale and bias, as the export wrote them: got "
            f"{form!r}. Remove it to read the folder as any other."
        )
    return {name: form[name] for name in FORM_FIELDS}


def _check(folder: Path, links: list[Link], model: EncoderDecoder, tensors: Mapping[str, MappedTensor]) -> None:
    """Every tensor is there, fits, and is known."""
    wanted: dict[str, Shape] = {}
    for link in links:
        wanted |= link.shapes()
    without = model.state_dict().keys() - {link.ours for link in links}
    assert not without, f"no link for {sorted(without)}"
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UserError(f"{folder} must hold the tensor {missing[0]}: it is missing ({len(missing)} altogether).")
    for name, shape in wanted.items():
        got = tensors[name].shape
        if got != shape:
            raise UserError(
                f"{folder}: {name} must have the shape {list(shape)}, as config.json says: got {list(got)}."
            )
    unknown = [n for n in tensors if n not in wanted and not n.endswith("embed_positions.weights")]
    if unknown:
        raise UserError(f"{folder} must hold a {type(model).__name__}'s tensors only: {unknown[0]} is none of them.")
