"""From prompts to continuations, and from damaged text to clean text: tokenizer, model and search behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moekit.data.batch import Batch
from moekit.data.tokenizer import Tokenizer
from moekit.inference.batching import of_one_length, to_device
from moekit.inference.generate import complete, generate
from moekit.inference.interface import Generation, Hypothesis, LengthLimit, Search
from moekit.inference.sampling import Greedy, one_seed
from moekit.tasks import TASKS

GAP = "___"
"""What stands in a sample for text that was cut out."""


class Completer:
    """Writes what a language model, or a model trained to restore damaged text, would write.

    Deterministic for a deterministic search, whatever the batching, unless rows of a batch compete for experts. Drawn
    text follows from the seed and the places of the prompts in the input.

    Args:
        model: such as `moekit.transformer.DecoderOnly` (continuations) or `EncoderDecoder` (restored text).
        tokenizer: the one it was trained with.
        search: how tokens are chosen; default greedy.
        max_new_tokens: the longest continuation.
        batch_tokens: tokens of prompts in a batch; a longer prompt goes alone.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        search: Search | None = None,
        max_new_tokens: int = 64,
        batch_tokens: int = 4096,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.search = search or Greedy()
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self._suppress = [i for i in range(tokenizer.first_text_id) if i != tokenizer.eos_id]

    def complete(
        self,
        prompts: Sequence[str],
        language: str,
        *,
        first_number: int = 0,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """The continuation of each prompt, in their order; an empty prompt is the beginning of a text.

        Args:
            prompts: plain text in `language`.
            language: told to routers that ask for it.
            first_number: number of the first prompt in the whole input, on which drawn text depends.
            advance: told, after every batch, how many prompts it held.

        Raises:
            UserError: if the tokenizer does not know the language.
        """
        found = self.hypotheses(prompts, language, first_number=first_number, advance=advance)
        return [texts[0].text for texts in found]

    def hypotheses(
        self,
        prompts: Sequence[str],
        language: str,
        *,
        first_number: int = 0,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[Hypothesis]]:
        """All texts that the search returns for each prompt, best first; arguments as of `complete`."""
        number, device = self.tokenizer.language_id(language), next(self.model.parameters()).device
        rows = [[self.tokenizer.bos_id, *ids] for ids in self.tokenizer.encode_batch(prompts)]
        search = one_seed(self.search)
        written: list[list[Hypothesis]] = [[]] * len(rows)
        # Prompts of one length at a time: `complete` feeds those that are longer a token at a time.
        for members in of_one_length([len(row) for row in rows], self.batch_tokens):
            ids = to_device([rows[i] for i in members], device)
            languages = torch.full((len(members),), number, device=device)
            numbers = to_device([first_number + i for i in members], device)
            found = self._continue(search, ids, languages, numbers).hypotheses(self.tokenizer.decode)
            for i, texts in zip(members, found, strict=True):
                written[i] = texts
            advance(len(members))
        return written

    def samples(self, batch: Batch, rows: int) -> list[tuple[str, str, str]]:
        """What was given, what is right and what the model writes, for the first `rows` rows of a batch.

        Where a task continues text (`moekit.tasks.Task.writes`), the first half of one is given; where it restores
        damaged text, that. Other tasks have none.
        """
        if batch.target is None or batch.target_mask is None or rows < 1:
            return []
        writes = TASKS[batch.task].writes if batch.task in TASKS else None
        if writes is None:
            return []
        if writes == "continuation":
            numbers = torch.arange(len(batch), device=batch.target.device) if batch.index is None else batch.index
            return [self._sample(batch, row, numbers[row : row + 1]) for row in range(min(rows, len(batch)))]
        # What a gap is marked with is part of the answer only where the answer is the missing spans.
        marks = self.tokenizer.sentinel_ids if writes == "spans" else ()
        found = generate(
            self.model,  # type: ignore[arg-type]
            batch.source[:rows],
            batch.source_mask[:rows],
            search=self.search,
            limit=LengthLimit(),
            source_language=batch.source_language[:rows],
            target_language=batch.target_language[:rows],
            suppress=[i for i in self._suppress if i not in marks],
            numbers=None if batch.index is None else batch.index[:rows],
        )
        both = batch.source[:rows].tolist(), batch.target[:rows].tolist()  # host read: the texts
        texts = (*both, found.best())
        given, right, wrote = ([self._with_gaps(ids) for ids in text] for text in texts)
        return list(zip(given, right, wrote, strict=True))

    def _sample(self, batch: Batch, row: int, number: Tensor) -> tuple[str, str, str]:
        assert batch.target is not None
        assert batch.target_mask is not None
        ids = batch.target[row][batch.target_mask[row]].tolist()  # host read: the text
        cut = max(1, len(ids) // 2)  # bos is always given
        prompt = to_device([ids[:cut]], batch.target.device)
        found = self._continue(self.search, prompt, batch.target_language[row : row + 1], number)
        wrote = found.hypotheses(self.tokenizer.decode)[0][0].text
        return self.tokenizer.decode(ids[:cut]), self.tokenizer.decode(ids[cut:]), wrote

    def _continue(self, search: Search, ids: Tensor, language: Tensor, numbers: Tensor) -> Generation:
        return complete(
            self.model,  # type: ignore[arg-type]
            ids,
            search=search,
            max_new_tokens=self.max_new_tokens,
            language=language,
            suppress=self._suppress,
            numbers=numbers,
        )

    def _with_gaps(self, ids: Sequence[int]) -> str:
        """The text between sentinels and masks, with a mark where each stood."""
        holes = {self.tokenizer.mask_id, *self.tokenizer.sentinel_ids}
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token in holes:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return f" {GAP} ".join(self.tokenizer.decode(piece) for piece in pieces).strip()
