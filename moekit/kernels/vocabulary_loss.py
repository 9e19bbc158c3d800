"""Scores over a vocabulary and their cross-entropy in one operation, which never holds all scores at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.functional.eager import is_eager, is_symbolic
from moekit.functional.precision import autocast_dtype, without_autocast
from moekit.kernels.first_order import refuse_second_order

_FEWEST_ROWS = 256  # products of fewer rows lose more time than smaller scores gain
_SCORES = {"cpu": 1 << 20}  # scores at a time: few enough to stay in a cache
_SCORES_ELSEWHERE = 1 << 27  # on an accelerator, enough to hide the start of a kernel


class TokenLoss(NamedTuple):
    """Cross-entropy of N predictions.

    Attributes:
        loss: scalar, the mean with label smoothing, with its gradient path also where N is 0.
        nll: scalar, detached: the summed negative log-likelihood in nats, without smoothing.
        correct: Int64 scalar: predictions whose first highest score is the label's.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor


def logits_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> TokenLoss:
    """Cross-entropy of scores, plainly.

    Args:
        logits: Float[N, V].
        labels: Int64[N], each in 0..V-1: rows that nobody judges are to be left out.
        label_smoothing: epsilon, in 0..1; the target is (1 - epsilon) on the label and epsilon / V everywhere.

    Returns:
        Loss and log-likelihood in float32, or in float64 where the scores are. Of no prediction the loss is 0.

    Raises:
        ValueError: if `label_smoothing` is out of its range, or on a CPU a label is.

    Source: arXiv:1512.00567 section 7.
    """
    _check(labels, logits.shape[-1], label_smoothing)
    n = labels.numel()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if n == 0:
        zero = wide.new_zeros(())
        return TokenLoss(wide.sum() * 0.0, zero, torch.zeros((), dtype=torch.int64, device=logits.device))
    log_probs = F.log_softmax(wide, dim=-1)
    nll = -log_probs.gather(1, labels[:, None]).sum()
    loss = nll / n
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean()
    correct = (logits.detach().argmax(-1) == labels).sum()
    return TokenLoss(loss, nll.detach(), correct)


def vocabulary_loss_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> TokenLoss:
    """What `vocabulary_loss` computes, by all scores."""
    return logits_loss(F.linear(hidden, weight), labels, label_smoothing)


def vocabulary_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0, *, rows: int | None = None
) -> TokenLoss:
    """Cross-entropy of hidden states whose scores are their products with a table: some rows after the other.

    Scores of some rows become probabilities and at once gradients of states and table, so that nothing of the size
    [N, V] is kept for the backward, which multiplies these gradients by that of the loss. A first derivative is all
    that there is. Under autocast, products are of its type and all else is float32. A compiled graph, and what
    `torch.func` transforms, get the plain form, `vocabulary_loss_reference`.

    Args:
        hidden: Float[N, D].
        weight: Float[V, D].
        labels: Int64[N], each in 0..V-1: rows that nobody judges are to be left out.
        label_smoothing: epsilon, in 0..1; the target is (1 - epsilon) on the label and epsilon / V everywhere.
        rows: how many at a time; None = as the device likes it.

    Raises:
        ValueError: if the three are not of these shapes, if `label_smoothing` is out of its range, or on a CPU a label
            is, or if `rows` is less than 1.

    Source: arXiv:1512.00567 section 7; gradients with the forward: arXiv:2410.10989 section 3.2.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "vocabulary_loss needs hidden [N, D], weight [V, D] and labels [N]: got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}."
        )
    _check(labels, weight.shape[0], label_smoothing)
    if rows is not None and rows < 1:
        raise ValueError(f"vocabulary_loss needs rows >= 1, or None for as many as the device likes: got {rows}.")
    if is_symbolic():
        return vocabulary_loss_reference(hidden, weight, labels, label_smoothing)
    if rows is None:
        kind = hidden.device.type
        rows = max(_SCORES.get(kind, _SCORES_ELSEWHERE) // max(weight.shape[0], 1), _FEWEST_ROWS)
    learns = torch.is_grad_enabled()
    found: tuple[Tensor, ...] = _VocabularyLoss.apply(hidden, weight, labels, label_smoothing, rows, learns)
    return TokenLoss(*found)


def _check(labels: Tensor, vocabulary: int, smoothing: float) -> None:
    """Refuse what is no label and no smoothing; elsewhere than on a CPU a look at labels would wait for the device."""
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]: got {smoothing}.")
    if labels.device.type == "cpu" and type(labels) is Tensor and labels.numel() and is_eager():
        least, most = (int(label) for label in labels.aminmax())
        if least < 0 or most >= vocabulary:
            wrong = least if least < 0 else most
            raise ValueError(
                f"labels must be in 0..{vocabulary - 1}, the numbers of the vocabulary: got {wrong}. No number stands "
                "for a label that is ignored: leave such rows out."
            )


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, rows: int, learns: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        narrow = autocast_dtype(hidden) or hidden.dtype
        with without_autocast(hidden.device):
            learns_hidden, learns_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
            sums = _Sums(hidden, weight.to(narrow), smoothing, learns_hidden, learns_weight)
            for start in range(0, hidden.shape[0], rows):
                sums.add(slice(start, start + rows), labels[start : start + rows])
            loss, grad_hidden, grad_weight = sums.finish(weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.types = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(sums.nll, sums.correct)
        return loss, sums.nll, sums.correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("vocabulary_loss", "moekit.kernels.vocabulary_loss_reference, by autograd")
        found = (None if g is None else (g * grad).to(t) for g, t in zip(ctx.saved_tensors, ctx.types, strict=True))
        return *found, None, None, None, None


class _Sums:
    """What chunks of rows add up to: loss, counts and gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, smoothing: float, learns_hidden: bool, learns_weight: bool):
        self.hidden, self.weight, self.smoothing = hidden, weight, smoothing
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.nll = hidden.new_zeros((), dtype=self.wide)
        self.correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        self.grad_hidden = torch.empty_like(hidden, dtype=self.wide) if learns_hidden else None
        self.grad_weight: Tensor | None = None
        self.learns_weight = learns_weight
        self.logits: Tensor | None = None
        self.lse = hidden.new_zeros((), dtype=self.wide)

    def add(self, place: slice, labels: Tensor) -> None:
        x, label = self.hidden[place].to(self.weight.dtype), labels[:, None]
        count = x.shape[0]
        if self.logits is None:
            self.logits = x.new_empty(count, self.weight.shape[0])
        scores = torch.mm(x, self.weight.t(), out=self.logits[:count]).to(self.wide)
        own = scores.gather(1, label)
        top = self._count(scores, label, own)
        scores.sub_(top).exp_()
        total = scores.sum(-1, keepdim=True)
        lse = top + total.log()
        self.nll += (lse - own).sum()
        self.lse += lse.sum()
        if self.grad_hidden is None and not self.learns_weight:
            return
        # What is left of probability - target, times `total`, but for the even part of smoothing: see `finish`. The
        # division is of D numbers instead of V, unless the product's type is too coarse for what is not divided.
        scores.scatter_add_(1, label, total * (self.smoothing - 1))
        if self.wide != self.weight.dtype:
            slopes, even = scores.div_(total).to(self.weight.dtype), torch.ones_like(total)
        else:
            slopes, even = scores, total.reciprocal()
        if self.grad_hidden is not None:
            self.grad_hidden[place] = torch.mm(slopes, self.weight).to(self.wide) * even
        if self.learns_weight:
            x = x * even.to(x.dtype)
            if self.grad_weight is not None and self.wide == x.dtype:
                self.grad_weight.addmm_(slopes.t(), x)
            else:
                part = torch.mm(slopes.t(), x).to(self.wide)
                self.grad_weight = part if self.grad_weight is None else self.grad_weight.add_(part)

    def _count(self, scores: Tensor, label: Tensor, own: Tensor) -> Tensor:
        """Count the right ones; the highest score of each row, Float[n, 1]."""
        if scores.device.type != "cpu":
            self.correct += (scores.argmax(-1, keepdim=True) == label).sum()
            return scores.amax(-1, keepdim=True)
        # A CPU finds a highest number seven times faster than its place.
        scores.scatter_(1, label, -torch.inf)
        others = scores.amax(-1, keepdim=True)
        scores.scatter_(1, label, own)
        self.correct += (own > others).sum()
        tied = (own == others).squeeze(1)
        if bool(tied.any()):  # host read: none, it is a CPU's
            self.correct += (scores[tied].argmax(-1, keepdim=True) == label[tied]).sum()
        return torch.maximum(own, others)

    def finish(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and gradients of its mean.

        The even part of the target, epsilon / V, asks for the mean score of every row and takes the same from every
        probability: products with the mean of the table, which need no score at all.
        """
        n, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        mean = 1 / max(n, 1)
        loss = self.nll * (1 - self.smoothing)
        row = table = None
        if self.smoothing:
            row, table = self.hidden.sum(0, dtype=self.wide), weight.mean(0, dtype=self.wide)
            loss = loss + self.smoothing * (self.lse - row.dot(table))
        grad_hidden, grad_weight = self.grad_hidden, self.grad_weight
        if grad_hidden is not None:
            if table is not None:
                grad_hidden -= self.smoothing * table
            grad_hidden *= mean
        if self.learns_weight:
            grad_weight = torch.zeros_like(weight, dtype=self.wide) if grad_weight is None else grad_weight
            if row is not None:
                grad_weight -= row * (self.smoothing / vocabulary)
            grad_weight *= mean
        return loss * mean, grad_hidden, grad_weight
