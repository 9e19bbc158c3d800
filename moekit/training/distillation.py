"""Distillation: a student learns from the text and from what a frozen teacher says of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.data.batch import Batch
from moekit.tasks.head import Head, HeadOutput, Scores, TokenHead
from moekit.training.multitask import MultitaskModule


@dataclass(frozen=True)
class Weights:
    """What the two parts of the loss count at some step."""

    label: float
    teacher: float


class Objective(Protocol):
    """How much labels and teacher count, by optimizer step."""

    def weights(self, step: int) -> Weights:
        """The weights with which step number `step` (from 0) is made."""


@dataclass(frozen=True)
class Mixture:
    """loss = (1 - teacher) * label loss + teacher * KL.

    Attributes:
        teacher: the teacher's share, 0.25 in the paper.

    Source: arXiv:2101.03961 section 4.2, table 6 (25 % teacher and 75 % label). Differs: the teacher's part is the KL
        divergence and not the cross-entropy with its probabilities; they differ by the teacher's entropy, which has no
        gradient.
    """

    teacher: float = 0.25

    def __post_init__(self) -> None:
        """Raise ValueError if `teacher` is no share in 0..1."""
        if not 0 <= self.teacher <= 1:
            raise ValueError(f"Mixture.teacher must be a share in 0..1: got {self.teacher}.")

    def weights(self, step: int) -> Weights:
        """The same at every step."""
        return Weights(1 - self.teacher, self.teacher)


@dataclass(frozen=True)
class Added:
    """loss = label loss + teacher * KL.

    Attributes:
        teacher: alpha of the KL divergence, 1.0 in the released training script.

    Source: arXiv:2201.05596 section 4.2.
    """

    teacher: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError if `teacher` is negative."""
        if not self.teacher >= 0:
            raise ValueError(f"Added.teacher must not be negative: got {self.teacher}.")

    def weights(self, step: int) -> Weights:
        """The same at every step."""
        return Weights(1.0, self.teacher)


@dataclass(frozen=True)
class Staged:
    """Another objective until a step, then the labels alone: the teacher helps early and hurts late.

    Attributes:
        before: the objective of the first stage.
        until: optimizer steps of the first stage; from step number `until` on the teacher does not run.

    Source: arXiv:2201.05596 section 4.2 (stopped at step 400,000). Differs: it happens by itself, where the released
        script is started again without the teacher.
    """

    before: Objective
    until: int

    def __post_init__(self) -> None:
        """Raise ValueError if `until` is negative."""
        if self.until < 0:
            raise ValueError(f"Staged.until must be a number of steps, 0 or more: got {self.until}.")

    def weights(self, step: int) -> Weights:
        """Those of `before`, then (1, 0)."""
        return self.before.weights(step) if step < self.until else Weights(1.0, 0.0)


@dataclass(frozen=True)
class Falling:
    """Another objective whose teacher falls silent by degrees: from step `begin` to step `until` its weight goes to 0.

    The labels' weight goes to 1 as fast. From step number `until` on the teacher does not run.

    Attributes:
        before: the objective that it begins as.
        until: optimizer steps with the teacher.
        begin: step at which its weight begins to fall.
        form: "linear", or "cosine": half a wave, slow at both ends.

    Source: ours; arXiv:2201.05596 section 4.2 stops at once (`Staged`), because the teacher helps early and hurts late.
    """

    before: Objective
    until: int
    begin: int = 0
    form: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        """Raise ValueError if `begin` is not before `until`, or `form` is unknown."""
        if not 0 <= self.begin < self.until:
            raise ValueError(
                f"Falling needs steps to fall in, from `begin` to a later `until`: got begin={self.begin} and "
                f"until={self.until}."
            )
        if self.form not in ("linear", "cosine"):
            raise ValueError(f'Falling.form must be "linear" or "cosine": got {self.form!r}.')

    def weights(self, step: int) -> Weights:
        """Those of `before`, the nearer to (1, 0) the later."""
        done = min(max((step - self.begin) / (self.until - self.begin), 0.0), 1.0)
        left = 1 - done if self.form == "linear" else (1 + math.cos(math.pi * done)) / 2
        if done >= 1:
            return Weights(1.0, 0.0)
        full = self.before.weights(step)
        return Weights(1 - left * (1 - full.label), left * full.teacher)


def switch() -> Mixture:
    """Switch Transformer's: a quarter of the loss from the teacher. Start the student from the teacher's weights.

    Source: arXiv:2101.03961 table 6. Weights: `moekit.surgery.initialize_student`.
    """
    return Mixture(0.25)


def mixture_of_students(until: int, alpha: float = 1.0) -> Staged:
    """DeepSpeed-MoE's staged distillation of a shallower sparse student, which begins with weights of its own.

    Args:
        until: optimizer steps with the teacher; 400,000 of the paper's.
        alpha: weight of the KL divergence; 1 in the released script.

    Source: arXiv:2201.05596 section 4.2; the released script draws the student's weights anew, and loads the teacher's
        into the teacher alone. `moekit.surgery.initialize_student` is another start, which is ours.
    """
    return Staged(Added(alpha), until)


class Teacher:
    """A frozen model with its heads: in evaluation mode, without gradients, in nobody's parameters or checkpoint.

    It is no module, so that no optimizer, checkpoint, strategy or ``train()`` of a module that holds it finds it.
    Evaluation mode makes it deterministic, and dropless unless a router says otherwise.

    Args:
        backbone: the model; it is changed (frozen) in place.
        heads: heads of its tasks; those that do not predict tokens are left out.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[Head]) -> None:
        self.heads: dict[str, TokenHead] = {head.task: head for head in heads if isinstance(head, TokenHead)}
        self.backbone = backbone
        for module in (self.backbone, *self.heads.values()):
            module.eval().requires_grad_(False)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to `device`, in numbers of type `dtype`."""
        for module in (self.backbone, *self.heads.values()):
            module.to(device, dtype)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """What the teacher says of the tokens that the batch asks for."""
        return self.heads[batch.task].score(batch, self.backbone)


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * mean_n KL(softmax(teacher_n / T) || softmax(student_n / T)), in float32.

    Give it the logits of real predictions only: there is no mask, since there is nothing to mask.

    Args:
        student: Float[N, V] logits.
        teacher: Float[N, V] logits.
        temperature: T; the factor T^2 keeps the size of the gradient.

    Returns:
        A scalar; 0 (with a gradient path) where N = 0.

    Raises:
        ValueError: if shapes differ or the temperature is not positive and finite.

    Source: arXiv:1503.02531 section 2. Differs: arXiv:2201.05596's code also counts padded positions; here they are not
        among the N.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            "kl_divergence needs scores of the same tokens over the same vocabulary: got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite: got {temperature}.")
    if student.shape[0] == 0:
        return student.float().sum() * 0.0
    student_log, teacher_log = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


class DistillationModule(MultitaskModule):
    """Train a student on text and on a teacher's scores of the same tokens; otherwise a `MultitaskModule`.

    Of each task, with the weights of the objective at this step,

        loss = label * (the head's loss) + teacher * T^2 * KL(teacher || student),

    both a mean over the predicted tokens; then task weights and the student's router losses, as without a teacher.
    Student and teacher may be any two models that the student's heads work with: sparse or dense, of different depth
    and width, encoder-decoder or decoder-only; they share the vocabulary. The step is the optimizer's, so that gradient
    accumulation does not shift a stage.

    Args: as of `MultitaskModule`, with heads that predict tokens; the frozen `teacher`; the `objective`, how much
    labels and teacher count; and the `temperature` T of the soft distributions.

    Logs, beside `MultitaskModule`, ``train/<task>/teacher_loss``: what the teacher adds to the loss, 0 after its stage.

    Raises:
        ValueError: if a task has no teacher or does not predict tokens, or the vocabularies differ in size.

    Source: arXiv:2101.03961 section 4.2; arXiv:2201.05596 section 4.2.
    """

    def __init__(
        self,
        student: nn.Module,
        heads: Sequence[Head],
        teacher: Teacher,
        *,
        objective: Objective,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(student, heads, **options)
        for head in heads:
            if not isinstance(head, TokenHead):
                raise ValueError(
                    f"only tasks that predict tokens can be distilled: {head.task} does not. Leave the task out."
                )
            if head.task not in teacher.heads:
                raise ValueError(
                    f"the teacher must know every task of the student: it lacks {head.task}, and has "
                    f"{', '.join(teacher.heads) or 'none that predicts tokens'}."
                )
        sizes = [getattr(model, "vocab_size", None) for model in (student, teacher.backbone)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"student and teacher must have the same vocabulary: got {sizes[0]} and {sizes[1]} pieces. Train the "
                "student with the teacher's tokenizer."
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite: got {temperature}.")
        self.teacher, self.objective, self.temperature = teacher, objective, temperature

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device and precision, which it has once the strategy is set up."""
        self.teacher.to(self.trainer.strategy.root_device, next(self.backbone.parameters()).dtype)

    def learn(self, batch: Batch) -> HeadOutput:
        """Loss of labels and teacher; without the teacher where its weight is 0. Without a Trainer the step is 0."""
        weights = self.objective.weights(0 if self._trainer is None else self.global_step)
        if not weights.teacher:  # nobody asks for all scores, which are then never held at once
            out: HeadOutput = self(batch)
            loss, heard = weights.label * out.loss, torch.zeros((), device=out.loss.device)
        else:
            head: Any = self.heads[batch.task]
            scores: Scores = head.score(batch, self.backbone)
            out = head.judge(scores)
            heard = weights.teacher * kl_divergence(scores.logits, self.teacher.score(batch).logits, self.temperature)
            loss = weights.label * out.loss + heard
        return dataclasses.replace(out, loss=loss, extra={**out.extra, "teacher_loss": heard.detach()})
