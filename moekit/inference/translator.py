"""From sentences to sentences: tokenizer, encoder-decoder and search behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moekit.data.batch import Batch
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.inference.batching import by_length, padded, to_device
from moekit.inference.beam import BeamSearch
from moekit.inference.generate import generate
from moekit.inference.interface import Generation, Hypothesis, LengthLimit, Search
from moekit.inference.length_penalty import GNMTPenalty
from moekit.inference.sampling import Greedy, one_seed


class Translator:
    """Translates text with an encoder-decoder that was trained with target-language tags.

    Deterministic for a deterministic search, whatever the batching. Drawn text follows from the seed and the places of
    the sentences in the input.

    Args:
        model: such as `moekit.transformer.EncoderDecoder`.
        tokenizer: the one it was trained with.
        search: how tokens are chosen; default a beam of 4.
        limit: the longest translation, by source length.
        batch_tokens: padded source tokens in a batch.
        sentinel: whether the model was trained with a sentinel at the end of sources and the beginning of targets (see
            `moekit.tasks.TaskData`).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        search: Search | None = None,
        limit: LengthLimit | None = None,
        batch_tokens: int = 4096,
        sentinel: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.search = search or BeamSearch(4)
        self.limit = limit or LengthLimit()
        self.batch_tokens = batch_tokens
        # Tags, masks and sentinels are input only; the end is the one special token that may be written.
        self._suppress = [i for i in range(tokenizer.first_text_id) if i != tokenizer.eos_id]
        self._forced = tokenizer.sentinel_ids[:1] if sentinel else ()

    def batch(self, batch: Batch) -> list[str]:
        """One translation for every row of ``batch.source``."""
        languages = batch.source_language, batch.target_language
        found = self._write(self.search, batch.index, batch.source, batch.source_mask, *languages)
        return [self.tokenizer.decode(ids) for ids in found.best()]

    def text(self, ids: Tensor) -> list[str]:
        """The sentences of Int64[B, T] token ids; special tokens are dropped."""
        return [self.tokenizer.decode(row) for row in ids.tolist()]  # host read: the texts

    def translate(
        self,
        sentences: Sequence[str],
        source: str,
        target: str,
        *,
        first_number: int = 0,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """Translate sentences, in their order; an empty one stays empty.

        Args:
            sentences: plain text.
            source: language of the sentences.
            target: language wanted.
            first_number: number of the first sentence in the whole input, on which drawn text depends.
            advance: told, after every batch, how many sentences it held.

        Raises:
            UserError: if the tokenizer does not know a language.
        """
        found = self.hypotheses(sentences, source, target, first_number=first_number, advance=advance)
        return [texts[0].text for texts in found]

    def hypotheses(
        self,
        sentences: Sequence[str],
        source: str,
        target: str,
        *,
        first_number: int = 0,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[Hypothesis]]:
        """All texts that the search returns for each sentence, best first; arguments as of `translate`."""
        tag, end = self.tokenizer.tag_id(target), self.tokenizer.eos_id
        languages = (self.tokenizer.language_id(source), self.tokenizer.language_id(target))
        device, search = next(self.model.parameters()).device, one_seed(self.search)
        ids = [[tag, *encoded, *self._forced, end] for encoded in self.tokenizer.encode_batch(sentences)]
        results = [[Hypothesis("", 0.0)]] * len(ids)
        said = [i for i, sentence in enumerate(sentences) if sentence.strip()]
        for batch in by_length([(len(ids[i]),) for i in said], self.batch_tokens):
            rows = [said[i] for i in batch]
            source_ids, mask = padded([ids[i] for i in rows], self.tokenizer.pad_id, device)
            row_languages = [torch.full((len(rows),), language, device=device) for language in languages]
            numbers = to_device([first_number + i for i in rows], device)
            written = self._write(search, numbers, source_ids, mask, *row_languages)
            for i, texts in zip(rows, written.hypotheses(self.tokenizer.decode), strict=True):
                results[i] = texts
            advance(len(rows))
        advance(len(sentences) - len(said))
        return results

    def _write(
        self,
        search: Search,
        numbers: Tensor | None,
        source: Tensor,
        mask: Tensor,
        source_language: Tensor,
        target_language: Tensor,
    ) -> Generation:
        forced = source.new_tensor(self._forced).expand(len(source), -1) if self._forced else None
        return generate(
            self.model,  # type: ignore[arg-type]
            source,
            mask,
            forced=forced,
            search=search,
            limit=self.limit,
            source_language=source_language,
            target_language=target_language,
            suppress=self._suppress,
            numbers=numbers,
        )


def search_for(beam_size: int, length_penalty: float, n_best: int = 1) -> Search:
    """Greedy search for a beam of 1, else a beam search with the penalty ((5 + length) / 6) ** alpha.

    Raises:
        UserError: if more texts are wanted than the beam is wide.
    """
    if not 1 <= n_best <= beam_size:
        raise UserError(
            f"--n_best must be from 1 to the width of the beam: got {n_best} and evaluate.beam_size {beam_size}. "
            f"Give --evaluate.beam_size {max(n_best, 1)} or more, or a smaller --n_best."
        )
    if beam_size == 1:
        return Greedy()
    return BeamSearch(beam_size, num_return=n_best, penalty=GNMTPenalty(length_penalty))
