"""`generate` (source to target) and `complete` (prompt to continuation)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from moekit.data.tokenizer import SpecialTokens
from moekit.inference.interface import CausalModel, Generation, LengthLimit, Search, SequenceModel, Start
from moekit.inference.sampling import Greedy
from moekit.inference.session import Session
from moekit.transformer.embedding import packed_logits


def generate(
    model: SequenceModel,
    source_ids: Tensor,
    source_mask: Tensor | None = None,
    *,
    search: Search | None = None,
    limit: LengthLimit | None = None,
    forced: Tensor | None = None,
    source_language: Tensor | None = None,
    target_language: Tensor | None = None,
    tokens: SpecialTokens | None = None,
    suppress: Sequence[int] = (),
    numbers: Tensor | None = None,
    use_cache: bool = True,
) -> Generation:
    """Write a target for each of B sources.

    The model is in evaluation mode meanwhile and gets its modes back. Same input, same output; sampling by its seed.

    Args:
        model: an encoder-decoder, such as `moekit.transformer.EncoderDecoder`.
        source_ids: Int64[B, S].
        source_mask: Bool[B, S], True = a real token; None = all are.
        search: `Greedy()` (default), `BeamSearch(...)`, `Sampling(...)`.
        limit: the most tokens written, by source length.
        forced: Int64[B, P], tokens every target begins with (a language tag); they are part of the returned ids but
            neither of scores nor of the limit.
        source_language: Int64[B], told to the encoder's routers.
        target_language: Int64[B], told to the decoder's routers.
        tokens: special ids.
        suppress: ids never written; padding never is.
        numbers: Int64[B], of the sources in an input that is written in several batches. `Sampling` draws by them; None
            = 0 to B - 1.
        use_cache: False = compute every prefix anew (slow; for tests).

    Raises:
        ValueError: if shapes disagree.
    """
    tokens = SpecialTokens() if tokens is None else tokens
    rows = source_ids.shape[0]
    _check(rows, source_mask=(source_mask, source_ids.shape), source_language=(source_language, (rows,)))
    _check(rows, target_language=(target_language, (rows,)), numbers=(numbers, (rows,)))
    if forced is not None and (forced.dim() != 2 or forced.shape[0] != rows):
        raise ValueError(f"forced must be [{rows}, P]: got shape {tuple(forced.shape)}. Use forced[:, None] for one.")
    begin = source_ids.new_full((rows, 1), tokens.bos)
    prefix = begin if forced is None else torch.cat((begin, forced), dim=1)
    if not rows:
        return _nothing(source_ids)
    with _without_gradients(model), evaluating(model), packed_logits(model):
        length = source_ids.new_full((rows,), source_ids.shape[1]) if source_mask is None else source_mask.sum(1)
        session = Session(
            model,
            rows=rows,
            memory=model.encode(source_ids, source_mask, source_language).hidden,
            memory_mask=source_mask,
            language=target_language,
            use_cache=use_cache,
        )
        start = Start(
            prefix=prefix,
            length=length.new_full((rows,), prefix.shape[1]),
            limit=(limit or LengthLimit())(length),
            tokens=tokens,
            suppress=suppress,
            numbers=numbers,
        )
        found = (search or Greedy()).run(session, start)
        if forced is not None:
            found = _prepend(forced, found)
    return _pytree.tree_map(torch.clone, found)  # outside of inference mode, so that autograd may use it


def complete(
    model: CausalModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None = None,
    *,
    search: Search | None = None,
    max_new_tokens: int = 64,
    language: Tensor | None = None,
    tokens: SpecialTokens | None = None,
    suppress: Sequence[int] = (),
    numbers: Tensor | None = None,
    use_cache: bool = True,
) -> Generation:
    """Continue each of B prompts.

    Prompts of different lengths go through the model together as far as the shortest reaches and then a token at a
    time, so no padding is ever seen; group prompts of very different lengths.

    Args: search, tokens, suppress, numbers and use_cache as of `generate`, and
        model: a language model, such as `moekit.transformer.DecoderOnly`.
        prompt_ids: Int64[B, P], with their begin token, at least one token each.
        prompt_mask: Bool[B, P], True = a real token, padding on the right; None = all are.
        max_new_tokens: the most tokens written.
        language: Int64[B], told to routers.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: if shapes disagree, a prompt is empty or padded on the left.
    """
    rows, longest = prompt_ids.shape
    _check(rows, prompt_mask=(prompt_mask, prompt_ids.shape), language=(language, (rows,)))
    _check(rows, numbers=(numbers, (rows,)))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1: got {max_new_tokens}.")
    if not rows:
        return _nothing(prompt_ids)
    length = prompt_ids.new_full((rows,), longest) if prompt_mask is None else prompt_mask.sum(1)
    empty, padded_left = longest == 0, False
    if prompt_mask is not None:
        faults = torch.stack([(length < 1).any(), (prompt_mask[:, 1:] & ~prompt_mask[:, :-1]).any()])
        empty, padded_left = faults.tolist()  # host read: once for a call
    if empty:
        raise ValueError("A prompt needs at least one token, its begin token: got an empty one.")
    if padded_left:
        raise ValueError("Prompts are padded on the right: got a mask with a real token after padding.")
    with _without_gradients(model), evaluating(model), packed_logits(model):
        session = Session(model, rows=rows, language=language, use_cache=use_cache)
        start = Start(
            prefix=prompt_ids,
            length=length,
            limit=length.new_full((rows,), max_new_tokens),
            tokens=SpecialTokens() if tokens is None else tokens,
            suppress=suppress,
            numbers=numbers,
        )
        found = (search or Greedy()).run(session, start)
    return _pytree.tree_map(torch.clone, found)


@contextmanager
def _without_gradients(model: object) -> Iterator[None]:
    """Inference mode, unless the model says that it must not be."""
    with torch.inference_mode(getattr(model, "inference_mode", True)), torch.no_grad():
        yield


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode back."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check(rows: int, **fields: tuple[Tensor | None, Sequence[int]]) -> None:
    for name, (value, shape) in fields.items():
        if value is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {list(shape)} for {rows} sequences: got {list(value.shape)}.")


def _prepend(forced: Tensor, found: Generation) -> Generation:
    """The same texts, beginning with the forced tokens."""
    copies = forced[:, None].expand(-1, found.ids.shape[1], -1)
    return replace(
        found,
        ids=torch.cat((copies, found.ids), dim=-1),
        lengths=found.lengths + (found.lengths > 0) * forced.shape[1],
        token_scores=torch.cat((found.token_scores.new_zeros(copies.shape), found.token_scores), dim=-1),
    )


def _nothing(ids: Tensor) -> Generation:
    """Texts for no sentence."""
    return Generation(
        ids=ids.new_zeros(0, 1, 0),
        lengths=ids.new_zeros(0, 1),
        scores=torch.zeros(0, 1, device=ids.device),
        token_scores=torch.zeros(0, 1, 0, device=ids.device),
        ended=torch.zeros(0, 1, dtype=torch.bool, device=ids.device),
    )
