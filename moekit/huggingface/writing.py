"""From one of our models to a folder that transformers opens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moekit.atomic import replacing_folder, write_json, writing
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES, Architecture, Kind, Tokens
from moekit.huggingface.describing import describe
from moekit.huggingface.links import Link
from moekit.huggingface.reading import EXACT, FAMILIES, FORM, FORM_FIELDS, INDEX, WEIGHTS
from moekit.huggingface.tokenizers import write_tokenizer


def export_model(
    model: nn.Module,
    folder: Path | str,
    *,
    kind: Kind | None = None,
    tokens: Tokens | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a folder that ``from_pretrained`` of transformers opens: config.json and safetensors.

    Logits, and what greedy search writes, are equal to float tolerance. What acts in training only and has no place
    there is left out: see `describe`. transformers multiplies embeddings and attention logits at other places than most
    of our models do; then tables and queries are written multiplied. A copy of those that a multiplication rounds goes
    into ``moekit.safetensors``, which transformers does not look at, so that `import_model` gives the same bits back.

    Args:
        model: an `EncoderDecoder`.
        folder: must not exist, be empty, or with `overwrite` be an earlier export.
        kind: the family; None = SwitchTransformers for RMS norms, NllbMoe for layer norms.
        tokens: special ids; default those of moekit's tokenizer.
        tokenizer: written beside the model, see `write_tokenizer`.
        max_shard_bytes: weights that take more are written as several files with an index.
        overwrite: replace an earlier export.

    Returns:
        The folder.

    Raises:
        UserError: if the model has a feature that transformers has not, the tokenizer is of another vocabulary, or the
            folder cannot be written; nothing is left there then.

    Differs: NllbMoe of transformers 5 runs experts 0 and 1 whichever its router chose, so a sparse model of that family
        opens there with other logits; its dense layers are right.
    """
    folder = Path(folder)
    tokens = tokens or Tokens()
    architecture = describe(model, kind)
    config = _config(model, architecture, tokens)
    if tokenizer is not None and tokenizer.vocab_size != architecture.vocab_size:
        raise UserError(
            f"the tokenizer must have the model's vocabulary of {architecture.vocab_size}: it has "
            f"{tokenizer.vocab_size}."
        )
    if tokenizer is not None and tokens != Tokens():
        raise UserError(f"with a tokenizer the special ids are its own, {Tokens()}: got {tokens}. Leave tokens out.")
    never = [tokens.pad]
    if tokenizer is not None:
        never = [i for i in range(tokenizer.first_text_id) if i != tokens.eos]
    links = tuple(FAMILIES[architecture.kind].links(architecture))
    state = model.state_dict()
    other = state.keys() ^ {link.ours for link in links if link.ours}
    if other:
        raise UserError(
            f"transformers' {NAMES[architecture.kind]} has no place for {min(other)} of this model. Undo what "
            "was added to its parts."
        )
    _require_free(folder, overwrite=overwrite)
    with writing(folder), replacing_folder(folder) as draft:
        write_json(draft / "config.json", config)
        write_json(draft / "generation_config.json", _generation(tokens, never))
        _write_weights(draft, _theirs(state, links, architecture), max_shard_bytes)
        kept = _rounded(state, links)
        if kept:
            save_file(kept, str(draft / EXACT))
        if tokenizer is not None:
            write_tokenizer(tokenizer, draft)
    return folder


def _config(model: nn.Module, ours: Architecture, tokens: Tokens) -> dict[str, Any]:
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
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "decoder_start_token_id": tokens.bos,
        **FAMILIES[ours.kind].config_of(ours),
        FORM: {name: getattr(ours, name) for name in FORM_FIELDS},
    }


def _generation(tokens: Tokens, never: Sequence[int]) -> dict[str, Any]:
    """What `generate` of transformers is to do as ours does: never write padding and, with a tokenizer, any mark."""
    return {
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "decoder_start_token_id": tokens.bos,
        "suppress_tokens": list(never),
    }


def _theirs(state: Mapping[str, Tensor], links: Iterable[Link], ours: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, one after another."""
    some = next(iter(state.values()))
    for link in links:
        mine = state[link.ours] if link.ours else torch.zeros(link.shape, dtype=some.dtype)
        yield from link.to_theirs(mine.detach().cpu()).items()
    if not ours.tied:  # transformers has a fourth table, which it does not use
        first = next(link for link in FAMILIES[ours.kind].links(ours) if link.ours == "embedding.weight")
        shared = "shared.weight" if ours.kind == "switch_transformers" else "model.shared.weight"
        yield shared, next(iter(first.to_theirs(state[first.ours].detach().cpu()).values())).clone()


def _rounded(state: Mapping[str, Tensor], links: Iterable[Link]) -> dict[str, Tensor]:
    """Ours that do not come back as they were."""
    kept = {}
    for link in links:
        if link.ours and not link.is_exact:
            mine = state[link.ours].detach().cpu()
            if not torch.equal(link.to_ours(link.to_theirs(mine)), mine):
                kept[link.ours] = mine.contiguous()
    return kept


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """One file, or several and an index; never more than one of them in memory."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal held, size
        save_file(held, str(folder / f"part-{len(files)}"), metadata={"format": "pt"})
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
