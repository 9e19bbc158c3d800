"""NaN and infinity end training, or are left out, before they reach the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.errors import NonFiniteError
from moekit.training.agreement import agree, everybody

Reaction = Literal["stop", "skip", "ignore"]
_SHOWN = 4  # names of a list


class NonFinite(Callback):
    """Looks at the loss and at the norm of every gradient before each optimizer step, and at weights before each save.

    What is not finite changes no weight and no optimizer state: the gradients of the step are dropped, on all processes
    together. Then training stops with an error that says the step, the terms of the loss that are not finite (where
    ``training_step`` returns a mapping, its entries are the terms) and the parameters whose gradients are not. A
    checkpoint of weights that are not finite is never written, so the last good one stays. For any Trainer;
    `moekit.ExpertParallelStrategy`, which finds the norm anyway, lets this callback decide where there is one.

    It costs one pass over the gradients, one number between processes and one host read per optimizer step. The read
    comes after backward, where clipping and the optimizer have yet to be started: a GPU waits for a few launches.

    Args:
        reaction: "stop" ends training; "skip" leaves out the step and goes on; "ignore" does nothing at all.
        most_in_a_row: steps left out in a row after which "skip" ends training too.

    Attributes:
        skipped: steps left out so far, resumed runs included; logged as ``train/skipped_steps`` once there are any.

    Raises:
        ValueError: `reaction` is another one, or `most_in_a_row` is not positive.
        NonFiniteError: in training, on all processes.
    """

    keeps_gradients = True  # of a step that is made: their norm stays what it is

    def __init__(self, reaction: Reaction = "stop", *, most_in_a_row: int = 10) -> None:
        if reaction not in get_args(Reaction):
            raise ValueError(f"NonFinite.reaction must be one of {', '.join(get_args(Reaction))}: got {reaction!r}.")
        if most_in_a_row < 1:
            raise ValueError(f"NonFinite.most_in_a_row must be at least 1: got {most_in_a_row}.")
        self.reaction, self.most_in_a_row = reaction, most_in_a_row
        self.skipped = self._in_a_row = 0
        self._forget()

    def _forget(self) -> None:
        self._loss: Tensor | None = None  # the sum of this step's losses
        self._terms: list[Any] = []  # what its batches before the last returned
        self._found: list[str] | None = None  # parameters whose gradients are not finite, in a step that is not
        self._norm: tuple[list[tuple[int, int]], Tensor] | None = None  # gradients and their versions, and their norm

    # -- a step --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()
        self._in_a_row = 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.reaction != "ignore":
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def loss_flag(self) -> Tensor | None:
        """Float32[1]: 1 where a loss of this step is not finite on this process, else 0; None where nobody looks."""
        return None if self._loss is None else (~self._loss.isfinite()).float().reshape(1)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        flag = self.loss_flag()
        if flag is None or getattr(trainer.strategy, "inspects_gradients", False):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # which leaves out infinite gradients
        gradients = [] if scaled else [parameter.grad for parameter in parameters]
        norms = _norms(gradients)
        if len(norms) == 1 and all(g is not None and _is_plain(g) for g in gradients):
            self._norm = _versions(parameters), torch.linalg.vector_norm(norms[0])
        # host read: of gradients in host memory alone, whose flags then go to the device
        flags = [(~found.isfinite()).any().float().to(flag.device) for found in norms]
        bad = torch.stack([flag[0], *flags]).amax()
        if trainer.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bool(bad):  # host read: the one of a step
            self.react(pl_module, parameters)

    def seen_norm(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """As `norm_of`, which may be asked once, afterwards."""
        found = self._norm
        return found[1] if found is not None and found[0] == _versions(parameters) else None

    def norm_of(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """The norm of the gradients of `parameters`, if it has just been found and they are what they were then."""
        found = self.seen_norm(parameters)
        self._norm = None
        return found

    def react(self, module: L.LightningModule, parameters: Sequence[Tensor]) -> None:
        """In a step that is not finite: drop the gradients of `parameters`, and note which of them are not finite."""
        if self.reaction == "ignore":
            return
        bad = set(map(id, _not_finite(parameters, [p.grad for p in parameters])))
        found = [name for name, parameter in module.named_parameters() if id(parameter) in bad]
        self._found = [*(self._found or []), *found]  # of several optimizers
        for parameter in parameters:
            parameter.grad = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._loss is None:
            return
        self._terms.append(outputs)
        if trainer.fit_loop._should_accumulate():
            return
        terms, found = self._terms, self._found
        self._forget()
        if found is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self.reaction == "skip" and self._in_a_row < self.most_in_a_row:
            self.skipped += 1
            _say(f"step {trainer.global_step} is not finite and was left out; so were {self.skipped} in all")
            pl_module.log("train/skipped_steps", float(self.skipped), batch_size=1)
            return
        raise NonFiniteError(self._told(trainer, pl_module, terms, found))

    def _told(self, trainer: L.Trainer, module: L.LightningModule, terms: Sequence[Any], found: Sequence[str]) -> str:
        """What all processes have found; all must ask."""
        weights = list(module.named_parameters())
        spoilt = set(map(id, _not_finite([p for _, p in weights], [p.detach() for _, p in weights])))
        own = (
            list(dict.fromkeys(name for output in terms for name in _bad_terms(output))),
            list(found),
            [name for name, parameter in weights if id(parameter) in spoilt],
        )
        parts = [
            list(dict.fromkeys(n for names in some for n in names))
            for some in zip(*everybody(trainer, own), strict=True)
        ]
        said = [
            f"{what}: {_listed(names)}"
            for what, names in zip(
                ("terms of the loss", "gradients of", "already before the step, weights of"), parts, strict=True
            )
            if names
        ]
        row = f", like the {self._in_a_row - 1} before it," if self._in_a_row > 1 else ""
        return (
            f"step {trainer.global_step}{row} is not finite (NaN or infinite): "
            f"{'; '.join(said) or 'the gradient norm'}. {kept(trainer)}Lower the learning rate, lengthen the warm-up, "
            "or look at the data of that step."
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite: they would take the place of the last good ones."""
        if self.reaction == "ignore" or trainer.state.fn != "fit":
            return
        weights = list(pl_module.named_parameters())
        spoilt = set(map(id, _not_finite([p for _, p in weights], [p.detach() for _, p in weights])))
        if agree(trainer, bool(spoilt))[0]:
            own = [name for name, parameter in weights if id(parameter) in spoilt]
            names = list(dict.fromkeys(name for some in everybody(trainer, own) for name in some))
            raise NonFiniteError(
                f"the weights after step {trainer.global_step} are not finite (NaN or infinite) and are not saved: "
                f"{_listed(names)}. {kept(trainer)}Lower the learning rate or lengthen the warm-up."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped} if self.skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]


def _versions(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Which gradients the parameters have, and how often each was changed."""
    return [(id(p.grad), p.grad._version) for p in parameters if p.grad is not None]


def _norms(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The norm of this process's part of each, Float[n] for each kind of tensor, where it lies."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local = local.coalesce().values() if local.is_sparse else local
        if local.numel():
            groups.setdefault((local.device, torch.promote_types(torch.float32, local.dtype)), []).append(local)
    return [torch.stack(torch._foreach_norm(some, 2, dtype=dtype)) for (_, dtype), some in groups.items()]


def _is_plain(gradient: Tensor) -> bool:
    """Whether all of it is here, entry by entry."""
    return not isinstance(gradient, DTensor) and gradient.layout == torch.strided


def _not_finite(named: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Those of `named` whose part in `tensors` on this process is not finite."""
    found = []
    for owner, tensor in zip(named, tensors, strict=True):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local is None or not local.is_floating_point():
            continue
        if not bool(local.isfinite().all()):  # host read: in a step that is lost, and before a checkpoint
            found.append(owner)
    return found


def _bad_terms(output: Any) -> list[str]:
    """Entries of what a training step returned that are not finite."""
    if not isinstance(output, Mapping):
        return []
    terms = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return [name for name, v in terms.items() if not bool(v.isfinite().all())]  # host read: in a step that is lost


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@rank_zero_only
def _say(text: str) -> None:
    print(f"note: {text}.", file=sys.stderr, flush=True)


def kept(trainer: L.Trainer) -> str:
    """Which checkpoint there is."""
    paths = [getattr(callback, "path", None) for callback in reversed(trainer.checkpoint_callbacks)]
    there = next((path for path in paths if path is not None and path.exists()), None)
    return "" if there is None else f"The last good checkpoint is {there}. "
