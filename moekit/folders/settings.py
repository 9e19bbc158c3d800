"""The settings of fine-tuning a folder of transformers: its text, what of it trains, and how."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch

from moekit.data.lines import STANDARD
from moekit.errors import UserError, nearest
from moekit.folder_text.examples import HELD_OUT, SEED
from moekit.runs.settings.fields import RESUME, setting
from moekit.runs.settings.train import StrategyConfig, TrainConfig
from moekit.surgery.adapters import Target

UNUSED = frozenset(
    ("label_smoothing", "best", "patience", "ema", "average_last", "record_routing", "init_by_name", "backend")
)
"""Settings of training that say something about runs of recipes alone."""

ADAPTER_RATE = 2e-4
"""The learning rate where adapters train and none is given: ten times that of whole weights, as is usual. Ours."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What a folder is fine-tuned on.

    Attributes:
        source: kind of the files: jsonl = one object a line, with text, with prompt and completion, or with messages;
            text = one text a line.
        path: file of training examples, plain or compressed; - = standard input.
        valid_path: file of held-out examples; not given: a share of the training examples is held out.
        held_out: share of the training examples that is held out where there is no valid_path; at least one is.
        max_length: most tokens of a row. A longer text is divided, a longer conversation or completion is cut.
        pack: whether several examples share a row, their attention kept apart.
        batch_size: rows of an optimizer step, of all processes together.
        seed: random seed of which examples are held out, and of their order.
        date: the day that a chat template is told which writes the date, as in 2026-07-31. Not given: the day on which
            training begins, which is kept.
    """

    source: Literal["jsonl", "text"] = "jsonl"
    path: str = ""
    valid_path: str | None = None
    held_out: float = setting(HELD_OUT, above=0, below=1)
    max_length: int = setting(1024, at_least=2)
    pack: bool = True
    batch_size: int = setting(8, at_least=1)
    seed: int = setting(SEED, at_least=0, at_most=2**32 - 1)
    date: str | None = setting(None, free=RESUME)  # the text that it makes is compared

    @property
    def day(self) -> datetime.date | None:
        """The date; None = not given.

        Raises:
            UserError: it is none.
        """
        try:
            return None if self.date is None else datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"data.date must be a day such as 2026-07-31: got {self.date!r}.") from None


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What of the model trains.

    Attributes:
        tune: what trains: names joined by + and -, as in all-routers or attention+experts. Not given: adapters where
            there is a rank, else all.
        rank: rank of low-rank adapters, 0 = none; a multiple of 8 suits accelerators.
        alpha: weight of the adapters: their product counts alpha / rank.
        adapt: what has adapters: some of experts, routers, attention and feed_forward, joined by commas.
    """

    tune: str | None = None
    rank: int = setting(0, at_least=0)
    alpha: float = setting(16.0, above=0)
    adapt: str = "experts,attention"

    @property
    def subset(self) -> str:
        """What trains."""
        return self.tune or ("adapters" if self.rank else "all")

    @property
    def targets(self) -> list[Target]:
        """What has adapters.

        Raises:
            UserError: one is unknown, or there is none.
        """
        names = [name.strip() for name in self.adapt.split(",") if name.strip()]
        for name in names:
            if name not in get_args(Target):
                raise UserError(f"fine_tune.adapt has an unknown target {name!r}. {nearest(name, get_args(Target))}")
        if not names:
            raise UserError(f"fine_tune.adapt must name some of {', '.join(get_args(Target))}: got none.")
        return cast(list[Target], names)


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """All settings of fine-tuning a folder.

    Attributes:
        model: the folder.
        data: its text.
        fine_tune: what trains.
        train: length, optimizer, schedule and devices; those of `UNUSED` have no meaning here.
        strategy: how the model is spread over processes; on several it is divided, whatever is given.
    """

    model: str
    data: TextConfig = field(default_factory=TextConfig)
    fine_tune: TuneConfig = field(default_factory=TuneConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            max_steps=500,
            learning_rate=2e-5,
            warmup_steps=20,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            validate_every=100,
            label_smoothing=0.0,
        )
    )
    strategy: StrategyConfig = field(default_factory=StrategyConfig, metadata={"free": RESUME})

    def rows_of_a_rank(self, ranks: int) -> int:
        """Rows of a batch, which one of the ranks reads at once.

        Raises:
            UserError: the rows of a step cannot be dealt evenly.
        """
        parts = ranks * self.train.accumulate
        if self.data.batch_size % parts:
            raise UserError(
                f"data.batch_size must be divisible by {parts}, the processes that read different rows ({ranks}) times "
                f"train.accumulate ({self.train.accumulate}): got {self.data.batch_size}."
            )
        return self.data.batch_size // parts

    def check(self) -> None:
        """Hold settings to what they need of each other, before anything is read.

        Raises:
            UserError: they do not go together.
        """
        self.train.check()
        if not self.data.path:
            raise UserError("data.path must name a file of training examples: got none. Give --data.path FILE.")
        if STANDARD in (self.data.path, self.data.valid_path) and self.processes > 1:
            raise UserError(
                f"data.path must name a file, which {self.processes} processes read: got standard input. Write a file."
            )
        _ = self.fine_tune.targets, self.data.day
        if self.fine_tune.subset == "adapters" and not self.fine_tune.rank:
            raise UserError("fine_tune.tune adapters needs a rank: got 0. Give --fine_tune.rank 8.")
        if self.strategy.empty_init is not None:
            raise UserError("strategy.empty_init is of runs of recipes: a folder is always divided before it is read.")
        tensor = self.strategy.tensor_parallel_size or 1
        if self.processes % tensor == 0:
            self.rows_of_a_rank(self.processes // tensor)

    @property
    def processes(self) -> int:
        """Of all machines together."""
        return self.train.devices * self.train.num_nodes

    def settled(self, kept: Mapping[str, Any], *, dated: bool = False) -> FolderConfig:
        """The settings with the number format that "auto" is here, and the date; what goes on keeps what it began with.

        Args:
            kept: the settings in the folder that goes on; nothing where none does.
            dated: whether the text depends on the date, which is set then if it is not given.

        Raises:
            UserError: the date that was kept is none.
        """
        if dated and self.data.date is None:
            day = kept.get("data", {}).get("date") or datetime.date.today()
            dated_text = dataclasses.replace(self.data, date=str(day))
            _ = dated_text.day
            return dataclasses.replace(self, data=dated_text).settled(kept)
        if self.train.precision != "auto":
            return self
        found = self.with_train(precision=kept.get("train", {}).get("precision", self.train.usable_precision))
        if found.train.on_gpu and found.train.precision == "32-true":
            torch.set_float32_matmul_precision("high")
        return found

    def with_train(self, **changes: object) -> FolderConfig:
        """The settings with others of training."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **changes))  # type: ignore[arg-type]
