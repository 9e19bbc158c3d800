"""The LightningModule that joins a backbone and several heads: losses summed with weights, metrics by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection

from moekit.component import LoadedFromFile
from moekit.data.batch import Batch
from moekit.errors import UserError, nearest
from moekit.layer import AuxLosses
from moekit.parallel.gradients import global_weights
from moekit.tasks.head import Head, HeadOutput
from moekit.training.agreement import agree
from moekit.training.answers import Answers
from moekit.training.metrics import LabelCounts, PieceCounts, RoutingStatistics, TokenPerplexity
from moekit.training.metrics.routing import learns
from moekit.training.optimizers import fused_adamw
from moekit.training.schedules import per_step
from moekit.transformer import routed_layers


class MultitaskModule(LoadedFromFile):
    """Train several heads over one backbone.

    A training batch is a mapping from task to `Batch`; the objective is

        sum over tasks of weight_t * (loss_t + aux(routings_t)).

    Args:
        backbone: the shared model.
        heads: the tasks; each at most once.
        weights: weights of the tasks by name; 1.0 where not named.
        aux: weighs the routers' losses; None where the model is dense.
        languages: names by language id, for load by language.
        directions: directions whose written answers are scored in the test, for example ``["en-de"]``.
        optimizer: makes the optimizer from this module; default AdamW with a learning rate of 1e-3.
        schedule: makes the learning rate schedule; it moves per optimizer step.
        log_routing_every: steps between updates of the routing statistics in training.
        samples: translations of each direction (or texts of each language) kept for a report, in ``answers.samples``.
        tokenize: how BLEU splits text into words: see `moekit.tasks.TranslationScore`.
        score_valid: validation sentences of each direction, the first ones, whose written answers are scored in
            validations of training; 0 = none. All processes write together: see `WrittenTogether`.
        score_valid_every: validations between them; 1 = each.
        steps_before: optimizer steps of the run that the weights are from, of which components with schedules are told;
            kept in checkpoints.

    Logs ``train/loss`` (the objective), ``train/<task>/loss`` (nats per prediction, without smoothing, weights and
    routers' losses), ``train/<task>/accuracy``, ``train/aux/<name>``, ``train/routing/<name>`` and ``lr``; in
    validation ``valid/<task>/loss``, ``valid/<task>/accuracy``, ``valid/<task>/perplexity`` and
    ``valid/routing/<name>``, and with `score_valid` the scores of the test; in the test, of heads with scores,
    ``test/<score>/<direction>`` and ``test/<score>/average``, such as ``test/bleu/en-de``, and of others
    ``test/<task>/loss``, ``test/<task>/accuracy``, ``test/<task>/perplexity`` and
    ``test/<task>/perplexity/<language>``.

    Raises:
        ValueError: two heads of one task or with the same score, or a weight for a task that has no head; in the test,
            if there is something to write and ``answers.translate`` or `directions` were not set.

    Source: arXiv:2109.10465 (sum of the losses of translation, denoising, masked LM and ELECTRA).
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[Head],
        *,
        weights: Mapping[str, float] | None = None,
        aux: AuxLosses | None = None,
        languages: Sequence[str] = (),
        directions: Sequence[str] = (),
        optimizer: Callable[[nn.Module], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        log_routing_every: int = 10,
        samples: int = 5,
        tokenize: str = "auto",
        score_valid: int = 0,
        score_valid_every: int = 1,
        steps_before: int = 0,
    ) -> None:
        super().__init__()
        tasks = [head.task for head in heads]
        if len(set(tasks)) != len(tasks) or not tasks:
            raise ValueError(f"heads must be one or more different tasks: got {tasks}.")
        unknown = sorted(set(weights or {}) - set(tasks))
        if unknown:
            raise ValueError(f"weights name tasks without a head: {unknown}. The heads are {tasks}.")
        self.backbone = backbone
        self.heads = nn.ModuleDict(dict(zip(tasks, heads, strict=True)))
        self.weights = {task: float((weights or {}).get(task, 1.0)) for task in tasks}
        self.aux = aux
        self.languages, self.log_routing_every = tuple(languages), log_routing_every
        self.directions = tuple(directions)
        self._optimizer, self._schedule = optimizer, schedule
        self.steps_before = steps_before
        self.score_valid, self.score_valid_every, self._validations = score_valid, score_valid_every, 0
        self.routing: dict[str, Any] | None = None
        self.routing_summary: dict[str, Any] | None = None
        # Counted in validations that are not of training, where somebody wants it: the tables are large.
        self.pieces: PieceCounts | None = None
        self.piece_counts: dict[str, Tensor] = {}
        self.tested: dict[str, dict[str, Any]] = {}
        # Asked at the end of the test, while all processes have their weights.
        self.ask: Callable[[str], Sequence[Any]] | None = None
        self.recalled: list[Any] = []

        self.valid_perplexity = TokenPerplexity(tasks)
        self.valid_accuracy = MetricCollection({task: _mean() for task in tasks}, compute_groups=False)
        sparse: dict[str, Any] = routed_layers(backbone)
        layers = {name: int(layer.num_experts) for name, layer in sparse.items()}
        fixed = [name for name, layer in sparse.items() if not learns(layer)]
        self.train_routing = RoutingStatistics(layers, self.languages, fixed) if layers else None
        self.valid_routing = RoutingStatistics(layers, self.languages, fixed) if layers else None
        self.answers = Answers(heads, directions, tokenize=tokenize, samples=samples, valid=score_valid > 0)
        vocabulary = int(getattr(backbone, "vocab_size", 0))  # of a model that does not say it nobody counts labels
        self.labels = LabelCounts(tasks, vocabulary) if vocabulary else None
        self.chance = {head.task: 1 / (head.choices or vocabulary) for head in heads if vocabulary}
        self.majority: dict[str, float] = {}
        texts = [head.task for head in heads if not head.scores]
        streams = [*texts, *(f"{task}/{language}" for task in texts for language in self.languages)]
        self.test_perplexity = TokenPerplexity(streams) if streams else None
        self.test_accuracy = MetricCollection({task: _mean() for task in texts}, compute_groups=False)

    def forward(self, batch: Batch) -> HeadOutput:
        """Loss and counts of one task's batch."""
        return cast(HeadOutput, self.heads[batch.task](batch, self.backbone))

    def learn(self, batch: Batch) -> HeadOutput:
        """What `training_step` minimises of one task: by default what validation measures. To be overridden."""
        return cast(HeadOutput, self(batch))

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> dict[str, Tensor]:
        """Sum the weighted losses of all tasks in the batch, each a mean over the predictions of all processes.

        Returns:
            The sum as ``loss``, and its terms without gradient: ``<task>/loss``, and routers' ``<task>/aux/<name>``.

        Raises:
            ValueError: if it holds none.
        """
        if not batch:
            raise ValueError(f"a training batch must hold at least one of the tasks {list(self.heads)}: got none.")
        logs: dict[str, Any] = {}
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        trainer: Any = self.trainer
        # Neither computed nor handed over where nobody will write it: log_dict takes some 50 microseconds a value.
        reports = (self.global_step + 1) % trainer.log_every_n_steps == 0
        watch = self.train_routing is not None and self.global_step % self.log_routing_every == 0
        outputs = {task: self.learn(part) for task, part in batch.items()}
        counts = torch.stack([out.num_predictions for out in outputs.values()])
        # Process groups may be there for something else than this Trainer.
        shares = global_weights(counts) if self.trainer.world_size > 1 else torch.ones_like(counts)
        for (task, out), share in zip(outputs.items(), shares, strict=True):
            loss = share * out.loss
            parts[f"{task}/loss"] = out.loss.detach()
            if self.aux is not None and out.routings:
                extra, terms = self.aux(*out.routings.values())
                loss = loss + extra
                for name, value in terms.items():
                    if reports:
                        logs.setdefault(f"train/aux/{name}", []).append(value)
                    parts[f"{task}/aux/{name}"] = value.detach()
            total = self.weights[task] * loss if total is None else total + self.weights[task] * loss
            if reports:
                logs |= {f"train/{task}/{name}": value for name, value in out.to_log().items()}
            if watch:
                self._count(self.train_routing, out, batch[task])
        assert total is not None
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=1)
        if reports:
            logs = {name: torch.stack(v).mean() if isinstance(v, list) else v for name, v in logs.items()}
            self.log_dict({**logs, "lr": self._learning_rate()}, batch_size=1)
            if self.train_routing is not None and self.train_routing.update_called:
                self.log_dict({f"train/{n}": v for n, v in self.train_routing.log_values().items()}, batch_size=1)
                self.train_routing.reset()
        return {"loss": total, **parts}

    def _learning_rate(self) -> float:
        """That of the first parameter group."""
        optimizers: Any = self.optimizers()
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        return float(first.param_groups[0]["lr"])

    def _count(self, metric: RoutingStatistics | None, out: HeadOutput, batch: Batch) -> None:
        """Count load by layer, an encoder's by source language and a decoder's by target language."""
        if metric is None:
            return
        sides = {"encoder": batch.source_language, "decoder": batch.target_language}
        for side, language in sides.items():
            routings = {name: r for name, r in out.routings.items() if name.startswith(side)}
            if routings:
                metric.update(routings, language if self.languages else None)

    def _count_pieces(self, out: HeadOutput, batch: Batch) -> None:
        """Count which expert got which piece: of the encoder's layers the source's, of the decoder's the target's.

        Where a task gives its layers other tokens than those of the batch, they count as those they stand for.
        """
        if self.pieces is None or self._fitting:
            return
        sides = {"encoder": batch.source, "decoder": None if batch.target is None else batch.target[:, :-1]}
        for side, tokens in sides.items():
            routings = {
                name: routing
                for name, routing in out.routings.items()
                if name.startswith(side) and tokens is not None and tokens.numel() == routing.num_tokens
            }
            if tokens is not None and routings:
                self.pieces.update(routings, tokens)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch of one task to the sums."""
        out = self(batch)
        self.valid_perplexity.update(batch.task, out.nll, out.num_predictions)
        self.valid_accuracy[batch.task].update(out.correct / out.num_predictions.clamp_min(1), out.num_predictions)
        self._count(self.valid_routing, out, batch)
        self._count_pieces(out, batch)
        self._count_labels(out, batch)
        if batch.task in self.answers.scored_in_training and self._scores_this_validation:
            numbers = [] if batch.index is None else batch.index.tolist()  # host read: which sentences they are
            rows = [row for row, number in enumerate(numbers) if number < self.score_valid]
            if agree(self.trainer, bool(rows))[0]:  # then all processes write, whatever they have
                self.answers.validate(batch.rows(rows))

    @property
    def _fitting(self) -> bool:
        """Whether a Trainer trains it, now perhaps in validation."""
        return self._trainer is not None and self._trainer.state.fn == "fit"

    def _count_labels(self, out: HeadOutput, batch: Batch) -> None:
        if self.labels is not None and out.labels is not None and not self._fitting:
            self.labels.update(batch.task, out.labels)

    def _majorities(self) -> dict[str, float]:
        """Accuracy by task of always giving the most frequent answer, of an evaluation that is not of training."""
        if self.labels is None or not self.labels.update_called:
            return {}
        found = self.labels.compute()
        self.labels.reset()
        return found

    @property
    def _scores_this_validation(self) -> bool:
        """Whether it is one of training in which written answers are scored."""
        state = self._fitting and not self.trainer.sanity_checking
        return state and (self._validations + 1) % self.score_valid_every == 0

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and accuracy by task, and the routing statistics."""
        logs: dict[str, float] = {}
        for task, value in self.valid_perplexity.compute().items():
            logs[f"valid/{task}/perplexity"] = value
            logs[f"valid/{task}/loss"] = math.log(value)
            accuracy = self.valid_accuracy[task].compute()
            logs[f"valid/{task}/accuracy"] = float(accuracy)  # host read: once for an evaluation
        if self.valid_routing is not None and self.valid_routing.update_called:
            logs.update({f"valid/{name}": value for name, value in self.valid_routing.log_values().items()})
            self.routing = self.valid_routing.compute()
            self.routing_summary = self.valid_routing.summary()
            self.valid_routing.reset()
        if self.pieces is not None and self.pieces.update_called:
            self.piece_counts = self.pieces.compute()
            self.pieces.reset()
        if self._scores_this_validation:
            logs |= {f"valid/{name}": value for name, value in self.answers.end_validation().items()}
        self.majority = self._majorities()
        self._validations += self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        self.log_dict(logs)
        self.valid_perplexity.reset()
        self.valid_accuracy.reset()

    def monitor(self, name: str = "", task: str | None = None) -> tuple[str, Literal["min", "max"]]:
        """The metric of validation that is meant by a name, and whether less or more of it is better.

        ``valid/loss`` is the loss of `task`, else of the first one, which is also meant by "", and ``valid/bleu`` the
        average over directions; others are named as they are logged. ``val/`` means ``valid/``.

        Raises:
            UserError: validation logs none of that name, or not in each validation.
        """
        measures, first = ("loss", "accuracy", "perplexity"), task or next(iter(self.heads))
        by_task = {f"valid/{task}/{what}" for task in self.heads for what in measures}
        heads: Iterable[Any] = (self.heads[task] for task in self.answers.scored_in_training)
        scores = [f"valid/{score}" for head in heads for score in head.scores]
        written = {f"{score}/{where}" for score in scores for where in ("average", *self.directions)}
        short = {f"valid/{what}": f"valid/{first}/{what}" for what in measures}
        short |= {score: f"{score}/average" for score in scores}
        wanted = f"valid/{name.removeprefix('val/')}" if name.startswith("val/") else name or "valid/loss"
        found = short.get(wanted, wanted)
        if found not in by_task | written:
            off = "" if scores or not self.answers.scored else " Scores of written answers need evaluate.score_valid."
            raise UserError(
                f"the metric to choose weights by must be one that validation logs: got {name!r}. "
                f"{nearest(wanted, by_task | written | set(short))}{off}"
            )
        if found in written and self.score_valid_every > 1:
            raise UserError(
                f"{found} must be measured in each validation to choose weights by it: got evaluate.score_valid_every "
                f"{self.score_valid_every}. Set it to 1, and train.validate_every higher."
            )
        return found, "max" if found in written or found.endswith("/accuracy") else "min"

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Write the answers to one batch of one direction and score them, or measure one batch of another task."""
        head: Any = self.heads[batch.task]
        if head.scores:
            self.answers.test(batch)
        else:
            self._measure(batch)

    def _measure(self, batch: Batch) -> None:
        out = self(batch)
        assert self.test_perplexity is not None, "made where the answers of a task are not scored"
        self.test_perplexity.update(batch.task, out.nll, out.num_predictions)
        self._count_labels(out, batch)
        if batch.direction in self.languages:
            self.test_perplexity.update(f"{batch.task}/{batch.direction}", out.nll, out.num_predictions)
        self.test_accuracy[batch.task].update(out.correct / out.num_predictions.clamp_min(1), out.num_predictions)
        self.answers.sample(batch)

    def on_test_epoch_end(self) -> None:
        """Log scores by direction and on average, and the perplexity of other tasks by language; ask questions."""
        self.answers.share(self.trainer.world_size)
        if self.ask is not None:
            self.recalled = [found for task in self.heads for found in self.ask(task)]
        self.log_dict({f"test/{name}": value for name, value in self.answers.end_test().items()})
        if self.test_perplexity is not None and self.test_perplexity.update_called:
            found, majorities = self.test_perplexity.compute(), self._majorities()
            for task in self.test_accuracy:
                if task not in found:
                    continue
                self.tested[task] = {
                    "loss": math.log(found[task]),
                    "perplexity": found[task],
                    "accuracy": float(self.test_accuracy[task].compute()),  # host read: once for a test
                    "languages": {x: found[f"{task}/{x}"] for x in self.languages if f"{task}/{x}" in found},
                }
                if task in majorities:
                    self.tested[task] |= {"majority": majorities[task], "chance": self.chance[task]}
                for name in ("loss", "perplexity", "accuracy"):
                    self.log(f"test/{task}/{name}", self.tested[task][name])
                languages = self.tested[task]["languages"]
                self.log_dict({f"test/{task}/perplexity/{x}": value for x, value in languages.items()})
            self.test_perplexity.reset()
            self.test_accuracy.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        if self.steps_before:
            checkpoint["steps_before"] = self.steps_before
        if self.score_valid:
            checkpoint["validations"] = self._validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        self.steps_before = int(checkpoint.get("steps_before", 0))
        self._validations = int(checkpoint.get("validations", 0))

    def configure_optimizers(self) -> Any:
        """The optimizer and the schedule that were given."""
        make = self._optimizer or _adamw
        optimizer = make(self)
        return optimizer if self._schedule is None else per_step(optimizer, self._schedule(optimizer))


def _adamw(module: nn.Module) -> Optimizer:
    return fused_adamw([{"params": list(module.parameters())}], lr=1e-3)


def _mean() -> MeanMetric:
    """A mean of numbers that are never NaN: looking for one would wait for the device at every update."""
    return MeanMetric(nan_strategy="disable")
