"""From one of our models to a folder that transformers opens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.atomic import replacing_folder, write_json, writing
from moekit.data.tokenizer import SpecialTokens, Tokenizer
from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES, Architecture, Kind
from moekit.huggingface.card import write_card
from moekit.huggingface.families import FAMILIES
from moekit.huggingface.keys import Link
from moekit.huggingface.model import describe
from moekit.huggingface.reading import EXACT, FORM, FORM_FIELDS, INDEX, TOKEN_FIELDS, WEIGHTS
from moekit.huggingface.tokenizers import write_tokenizer
from moekit.mapped import write_safetensors


def export_model(
    model: nn.Module,
    folder: Path | str,
    *,
    kind: Kind | None = None,
    tokens: SpecialTokens | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder that ``from_pretrained`` of transformers opens: config.json and safetensors.

    Logits, and what greedy search writes, are equal to float tolerance. What acts in training only and has no place
    there is left out: see `describe`. transformers multiplies embeddings and attention logits at other places than most
    of our models do; then tables and queries are written multiplied. A copy of those that a multiplication rounds goes
    into ``moekit.safetensors``, which transformers does not look at, so that `import_model` gives the same bits back.

    Args:
        model: An `EncoderDecoder`.
        folder: A path that does not exist, an empty folder, or with `overwrite` an earlier export.
        kind: The family; None = SwitchTransformers for RMS norms, NllbMoe for layer norms.
        tokens: The special ids; None = those of moekit's tokenizer.
        tokenizer: The vocabulary to write beside the model; see `write_tokenizer`.
        max_shard_bytes: The size of a file in bytes; weights that take more are written as several files with an index.
        overwrite: Whether to replace an earlier export.
        card: What is known of the model, as `write_card` takes it.

    Returns:
        The folder.

    Raises:
        UserError: if the model has a feature that transformers has not, the tokenizer is of another vocabulary, or the
            folder cannot be written; nothing is left there then.

    Differs: NllbMoe of transformers 5 runs experts 0 and 1 whichever its router chose, so a sparse model of that family
        opens there with other logits; its dense layers are right.
    """
    folder = Path(folder)
    tokens = tokens or SpecialTokens()
    architecture = describe(model, kind)
    config = _config(model, architecture, tokens)
    if tokenizer is not None and tokenizer.vocab_size != architecture.vocab_size:
        raise UserError(
            f"the tokenizer must have the model's vocabulary of {architecture.vocab_size}: it has "
            f"{tokenizer.vocab_size}."
        )
    if tokenizer is not None and tokens != SpecialTokens():
        raise UserError(
            f"with a tokenizer the special ids are its own, {SpecialTokens()}: got {tokens}. Leave tokens out."
        )
    never = [tokens.pad]
    if tokenizer is not None:
        never = [i for i in range(tokenizer.first_text_id) if i != tokens.eos]
    state = model.state_dict()
    family = FAMILIES[architecture.kind]
    links = list(family.links(architecture, state))
    other = state.keys() ^ {link.ours for link in links if link.ours}
    if other:
        raise UserError(
            f"transformers' {NAMES[architecture.kind]} has no place for {min(other)} of this model. Undo what "
            "was added to its parts."
        )
    _require_free(folder, overwrite=overwrite)
    with writing(folder), replacing_folder(folder) as draft:
        write_json(draft / "config.json", config)
        # What `generate` of transformers is to do as ours does: never write padding and, with a tokenizer, any mark.
        write_json(draft / "generation_config.json", {**_token_ids(tokens), "suppress_tokens": never})
        # Where tables are not tied, transformers has a fourth, which it does not use.
        unused = () if architecture.tied else (family.keys.shared,)
        _write_weights(draft, _theirs(state, links, unused), max_shard_bytes)
        kept = {link.ours: _on_host(state[link.ours]) for link in links if _is_rounded(link, state)}
        if kept:
            write_safetensors(kept, draft / EXACT)
        if tokenizer is not None:
            write_tokenizer(tokenizer, draft)
        write_card(draft, **{"name": folder.absolute().name, **(card or {})})
    return folder


def _config(model: nn.Module, ours: Architecture, tokens: SpecialTokens) -> dict[str, Any]:
    if ours.kind == "nllb-moe" and ours.first_position != tokens.pad + 1:
        raise UserError(
            "transformers' NllbMoeForConditionalGeneration counts positions from pad_token_id + 1: this model counts "
            f"from {ours.first_position}, and its padding is {tokens.pad}."
        )
    for name, value in dataclasses.asdict(tokens).items():
        if not 0 <= value < ours.vocab_size:
            raise UserError(f"the id of {name} must be below the vocabulary of {ours.vocab_size}: got {value}.")
    types = {parameter.dtype for parameter in model.parameters()}
    if len(types) != 1:
        raise UserError(f"the weights must have one type: got {', '.join(sorted(map(str, types)))}.")
    return {
        "model_type": ours.kind,
        "architectures": [NAMES[ours.kind]],
        "is_encoder_decoder": True,
        "vocab_size": ours.vocab_size,
        "tie_word_embeddings": ours.tied,
        "torch_dtype": str(types.pop()).removeprefix("torch."),
        **_token_ids(tokens),
        **FAMILIES[ours.kind].config(ours),
        FORM: {name: getattr(ours, name) for name in FORM_FIELDS},
    }


def _token_ids(tokens: SpecialTokens) -> dict[str, int]:
    ids = {name: getattr(tokens, ours) for ours, name in TOKEN_FIELDS.items()}
    return {name: ids.get(name, tokens.bos) for name in ("pad_token_id", "bos_token_id", "eos_token_id", *ids)}


def _theirs(state: Mapping[str, Tensor], links: Iterable[Link], unused: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, one after another; those that they do not use are copies of the first."""
    first: Tensor | None = None
    some = next(iter(state.values()))
    for link in links:
        mine = _on_host(state[link.ours]) if link.ours else torch.zeros(link.shape, dtype=some.dtype)
        theirs = link.to_theirs(mine)
        first = next(iter(theirs.values())) if first is None else first
        yield from theirs.items()
    for name in unused:
        assert first is not None, "a model has tensors"
        yield name, first.clone()


def _is_rounded(link: Link, state: Mapping[str, Tensor]) -> bool:
    """Whether ours does not come back as it was."""
    if not link.ours or link.factor == 1:
        return False
    mine = _on_host(state[link.ours])
    return not torch.equal(link.to_ours(link.to_theirs(mine)), mine)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """One file, or several and an index; never more than one of them in memory."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal held, size
        write_safetensors(held, folder / f"part-{len(files)}")
        files.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            flush()
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        os.replace(folder / "part-0", folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / f"part-{number}", folder / name)
        weight_map |= dict.fromkeys(names, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError unless `folder` is none, empty, or an earlier export that may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} must be a folder: it is a file. Choose another.")
    content = sorted(os.listdir(folder)) if folder.is_dir() else []
    if content and not (overwrite and "config.json" in content and {WEIGHTS, INDEX} & set(content)):
        hint = (
            "Choose another folder." if overwrite else "Choose another folder, or replace an earlier export: overwrite."
        )
        raise UserError(f"{folder} must be empty or not exist: it holds {content[0]!r}. {hint}")
