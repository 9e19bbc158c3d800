"""A batch of half-written texts: asks the model for next tokens, and lets rows multiply, move and leave."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.inference.interface import Cache, CausalModel, SequenceModel

_LOOK_EVERY = 8


class Session:
    """What a search sees of a model. Rows start as one per sentence.

    Args:
        model: what is decoded.
        memory: Float[B, S, D], the encoder's hidden states; None for a language model.
        memory_mask: Bool[B, S].
        language: Int64[B], told to routers as the task of every token.
        rows: B.
        use_cache: False computes every prefix anew at every step: slow, and the twin that the cache is tested against.
    """

    def __init__(
        self,
        model: SequenceModel | CausalModel,
        *,
        rows: int,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        language: Tensor | None = None,
        use_cache: bool = True,
    ) -> None:
        self.rows = rows
        self._model, self._language = model, language
        self._memory: tuple[Tensor | None, ...] = () if memory is None else (memory, memory_mask)
        self._cache: Cache | None = model.new_cache() if use_cache else None
        self._seen = 0
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self._compete = any(getattr(module, "by_position", False) for module in modules)

    def look_every(self, device: torch.device) -> int:
        """Steps between two looks at which texts are finished, once a step was made.

        One on a CPU, where looking costs nothing; elsewhere the host waits. One also where the other rows of the batch
        decide about a row's experts, as under a capacity in evaluation: texts that have ended would take part.
        """
        return 1 if self._compete or device.type == "cpu" else _LOOK_EVERY

    def logits(self, ids: Tensor) -> Tensor:
        """Logits Float[R, V] of the token after each row of `ids` Int64[R, T], in float32 or wider.

        With every call the rows grow; what they held before must not change but by `keep`.
        """
        new = ids if self._cache is None else ids[:, self._seen :]
        output = self._model.decode(new, *self._memory, None, self._language, self._cache)  # type: ignore[call-arg,arg-type]
        self._seen = ids.shape[1]
        self._compete |= any(routing.capacity is not None for routing in getattr(output, "routings", ()))
        logits = self._model.logits(output.hidden[:, -1])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def keep(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Continue with `rows` Int64[R'], and with the memories of `sentences` Int64[B'] (None = all as they are).

        Afterwards there must be a whole number of rows per memory, side by side.
        """
        if sentences is not None and self._memory:
            self._memory = tuple(None if part is None else part.index_select(0, sentences) for part in self._memory)
            if self._cache is not None:
                self._cache.select_memory(sentences)
        # Whether the rows are all where they were is asked on a CPU alone: elsewhere copying is cheaper than waiting.
        same = rows.device.type == "cpu" and torch.equal(rows, torch.arange(self.rows, device=rows.device))
        self.rows = rows.numel()
        if same:
            return
        if self._language is not None:
            self._language = self._language.index_select(0, rows)
        if self._cache is not None:
            self._cache.reorder(rows)

    def keep_each(self, rows: Tensor) -> None:
        """Continue with `rows` Int64[R'], any of them, each with a memory of its own."""
        memories = next((len(part) for part in self._memory if part is not None), self.rows)
        self.keep(rows, rows // (self.rows // memories))
