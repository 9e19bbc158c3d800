"""Answers written by two processes whose experts are divided: the same texts as one process writes, each once."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from small_lm import quiet, seeded, trainer_for
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moekit import ExpertParallelStrategy, MoELayer, routers
from moekit.data.batch import Batch
from moekit.experts import GroupedMLP
from moekit.inference import BeamSearch, Greedy, LengthLimit, Search, generate
from moekit.testing import run_distributed
from moekit.training.multitask import MultitaskModule
from moekit.training.written_together import WrittenTogether
from moekit.transformer import EncoderDecoder, every_other

VOCABULARY, DIM = 13, 8
SEARCHES: dict[str, Search] = {"greedy": Greedy(), "beam": BeamSearch(3)}
# The sentences of each batch of each rank: batches of other sizes, and one without a sentence.
SHARES = (((0, 1, 2), (3,)), ((4, 1), ()))
LENGTHS = (2, 5, 3, 1, 4)


def batch_of(numbers: tuple[int, ...]) -> Batch:
    words = torch.randint(3, VOCABULARY, (len(LENGTHS), 5), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([LENGTHS[n] for n in numbers], dtype=torch.int64)
    mask = torch.arange(5) < lengths[:, None]
    source = words[list(numbers)].masked_fill(~mask, 0)
    zero = torch.zeros(len(numbers), dtype=torch.int64)
    return Batch("translation", source, mask, None, None, None, zero, zero, "en-de", torch.tensor(numbers).long())


class Writer:
    """Writes ids for ids."""

    def __init__(self, model: Any, search: Search) -> None:
        self.model, self.search = model, search

    def batch(self, batch: Batch) -> list[str]:
        found = generate(
            self.model, batch.source, batch.source_mask, search=self.search, limit=LengthLimit(3, 1.0),
            source_language=batch.source_language, target_language=batch.target_language,
        )  # fmt: skip
        return [" ".join(map(str, ids)) for ids in found.best()]

    def text(self, ids: Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


class Writes(L.LightningModule):
    """Keeps what it writes as `MultitaskModule` does."""

    def __init__(self, search: Search) -> None:
        super().__init__()

        def sparse(layer: int, side: str) -> nn.Module:
            return MoELayer(routers.switch(DIM, 4), GroupedMLP(4, DIM, 12, init_scale=4.0))

        with seeded(0), torch.no_grad():
            self.backbone = EncoderDecoder(VOCABULARY, DIM, 2, 2, 2, 12, feed_forward=every_other(sparse), tied=False)
            for name, weight in self.backbone.named_parameters():
                if weight.dim() > 1 and "embedding" not in name:
                    weight.mul_(2.0)  # untrained models repeat one token
        self.together = WrittenTogether(self, lambda model: Writer(model, search))
        self.written: dict[str, dict[str, list[tuple[int, str, str]]]] = {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        texts = self.together.batch(batch)
        assert len(texts) == len(batch)
        if len(batch):
            assert batch.index is not None
            rows = self.written.setdefault("translation", {}).setdefault("en-de", [])
            rows += zip(batch.index.tolist(), self.together.text(batch.source), texts, strict=True)

    def on_test_epoch_end(self) -> None:
        MultitaskModule._share_written(self)  # type: ignore[arg-type]


def writes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    everything = batch_of((0, 1, 2, 3, 4))
    for name, search in SEARCHES.items():
        module = Writes(search)
        alone = Writer(module.backbone.eval(), search).batch(everything)
        loader = DataLoader([batch_of(numbers) for numbers in SHARES[dist.get_rank()]], batch_size=None)  # type: ignore[arg-type]
        trainer = trainer_for(ExpertParallelStrategy(2), use_distributed_sampler=False)
        with quiet():
            trainer.test(module, loader, verbose=False)
        bank = module.backbone.encoder.layers[1].feed_forward.experts
        found[name] = (alone, module.written, next(iter(bank.parameters())).to_local().shape[0])  # type: ignore[operator]
    return found


@pytest.mark.slow  # starts two processes
def test_two_processes_write_what_one_writes() -> None:
    first, second = run_distributed(writes, 2)
    for name in SEARCHES:
        alone, written, experts = first[name]
        assert second[name] == first[name]  # all know what all have written
        assert experts == 2  # of four: the experts were divided
        rows = written["translation"]["en-de"]
        assert [number for number, _, _ in rows] == [0, 1, 2, 3, 4]  # in order, and what both wrote is there once
        assert [text for _, _, text in rows] == alone
        assert len({len(text.split()) for text in alone}) > 1  # they ended at different steps
