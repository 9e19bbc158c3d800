"""Tokens per second of training, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moekit.data.batch import Batch


def count_tokens(batch: Any) -> Tensor | int:
    """Real tokens of a batch: source and target without padding; one text that is both counts once.

    Args:
        batch: a `Batch`, or dictionaries, lists and tuples that hold some.

    Raises:
        TypeError: if there is no `Batch` in it.
    """
    counts = [
        part.source_mask.sum() + (0 if part.target_mask is None or part.one_text else part.target_mask.sum())
        for part in tree_leaves(batch, is_leaf=lambda part: isinstance(part, Batch))
        if isinstance(part, Batch)
    ]
    if not counts:
        raise TypeError(
            f"count_tokens needs moekit batches: got {type(batch).__name__}. Give Throughput your own `count`."
        )
    return torch.stack(counts).sum()


class Throughput(Callback):
    """Logs ``train/tokens_per_second``, ``train/tokens`` (real ones, all processes together), ``train/step_seconds``.

    With `flops_per_token` also ``train/flops_per_second``, the model's operations, and with `product_rate` their share
    of it, ``train/flops_share``. Nothing is computed for them: they are the rate of tokens in another unit.

    The rate is over the time since it was logged last, with data loading and checkpoints, without validation. Tokens
    and seconds of the whole run are kept in checkpoints; `tokens`, `seconds` and `tokens_per_second` tell them.

    Args:
        count: number of tokens of a batch.
        flops_per_token: operations of forward and backward for a token; None = not known.
        product_rate: operations per second that the machine is able to do, all processes together; None = not known.
        clock: seconds that never go back; for tests.
    """

    def __init__(
        self,
        count: Callable[[Any], Tensor | int] = count_tokens,
        *,
        flops_per_token: float | None = None,
        product_rate: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._count = count
        self._flops_per_token, self._product_rate = flops_per_token, product_rate
        self._logged_step = 0
        self._clock = clock
        self.tokens = 0
        self.seconds = 0.0
        self._since = 0.0
        self._pending: list[Tensor | int] = []
        self._paused: float | None = None  # since a validation began

    @property
    def tokens_per_second(self) -> float:
        """Rate over the whole run so far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._pending, self._paused = self._clock(), [], None
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pending.append(self._count(batch))
        # Where Lightning is about to write.
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            before, steps = self.seconds, trainer.global_step - self._logged_step
            rate = self._collect(trainer)
            self._logged_step = trainer.global_step
            values = {"train/tokens_per_second": rate, "train/tokens": float(self.tokens)}
            if steps > 0:
                values["train/step_seconds"] = (self.seconds - before) / steps
            if self._flops_per_token is not None:
                values["train/flops_per_second"] = rate * self._flops_per_token
                if self._product_rate:
                    values["train/flops_share"] = rate * self._flops_per_token / self._product_rate
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = self._clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._paused is not None:
            self._since += self._clock() - self._paused
            self._paused = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._pending:
            self._collect(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        now = self._clock() if self._paused is None else self._paused
        seconds = self.seconds + (now - self._since if self._pending else 0.0)
        state = {"tokens": self.tokens + self._count_pending(trainer), "seconds": seconds}
        checkpoint["callbacks"][self.state_key] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def _collect(self, trainer: L.Trainer) -> float:
        """Add the pending batches to the totals; the rate of their window."""
        tokens, now = self._count_pending(trainer), self._clock()
        window = now - self._since
        self.tokens += tokens
        self.seconds += window
        self._since, self._pending = now, []
        return tokens / window if window > 0 else 0.0

    def _count_pending(self, trainer: L.Trainer) -> int:
        """Tokens of the pending batches of all processes; one read of the device for all of them."""
        if not self._pending:
            return 0  # the same in all processes, which have made the same steps
        tokens = torch.stack([torch.as_tensor(count, dtype=torch.int64) for count in self._pending]).sum()
        if trainer.world_size > 1:
            tokens = trainer.strategy.reduce(tokens.to(trainer.strategy.root_device), reduce_op="sum")
            # Tensor-parallel partners read the same batch.
            readers = trainer.distributed_sampler_kwargs
            tokens = tokens * (readers["num_replicas"] if readers else trainer.world_size) // trainer.world_size
        return int(tokens)
