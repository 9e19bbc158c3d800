"""`adopt`: the sparse language models of transformers with a `MoELayer` in the place of every sparse block.

model = adopt(AutoModelForCausalLM.from_pretrained(folder))
loss = model(input_ids, attention_mask, labels=labels).loss   # balance losses included, in training
model.save_pretrained("again")                                # the files that the original writes
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.huggingface.adopted_layer import AdoptedLayer, Hearing, real_tokens
from moekit.huggingface.sparse_blocks import SPARSE_BLOCKS, SparseBlock, adopted, take_tensors, weight_conversions
from moekit.layer import AuxLosses
from moekit.routing import Routing

Model = TypeVar("Model", bound=nn.Module)
_LOG = logging.getLogger(__name__)


def adopt(model: Model, aux: AuxLosses | Literal["default"] | None = "default") -> Model:
    """Put a `MoELayer` in the place of every sparse block of a model of transformers, in place.

    Logits and gradients are those of the original, parameters are the same objects under the same names, and
    `save_pretrained` writes the same files. (Experts of SwitchTransformers and NllbMoe are modules there: each layer's
    become one tensor for each matrix here, and are written as modules again.) What moekit does with a `MoELayer` it
    then does with the model: the Strategy divides its experts, reports draw its routing, routers take a capacity.
    Padding that a two-dimensional `attention_mask` tells is not routed: hidden states there, which nobody reads, are
    others.

    In training a forward that is given labels adds the routers' weighted losses to the loss, and reports their
    unweighted mean over layers as ``aux_loss``. `routings` gives all that the routers returned.

    Args:
        model: such as `AutoModelForCausalLM.from_pretrained` gives; its sparse blocks are some of
            `moekit.huggingface.SPARSE_BLOCKS`.
        aux: weights of the routers' losses; None = none. By default ``load_balance`` alone, with the configuration's
            router_aux_loss_coef times k, the mean over layers.

    Returns:
        The same model.

    Raises:
        UserError: no block is sparse, one is of an unknown kind, quantized or loaded by parts, the model was adopted
            before, or its configuration asks for output_router_logits. The model is as it was then.

    Source: ours. Differs: from transformers, routers compute in float32 whatever the model's type, and the balance loss
        is of each layer by itself, where transformers multiplies load and probability of all layers together.
    """
    found = _sparse_blocks(model)
    hearing = Hearing()
    config = getattr(model, "config", None)
    layers = {path: adopted(block, hearing, config) for path, block in found.items()}
    entry = SPARSE_BLOCKS[type(next(iter(found.values()))).__name__]
    _convert_when_saved(model, found)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        take_tensors(layer, found.pop(path))
        setattr(holder, name, layer)
        if entry.entered is None:
            for part in holder.children():
                if part is not layer:
                    part.register_forward_pre_hook(hearing.enter, with_kwargs=True)
    if entry.entered is not None:
        _hear_stacks(model, hearing, entry.entered, layers)
    if entry.fault is not None:
        _LOG.warning("%s: %s.", type(model).__name__, entry.fault)
    if isinstance(aux, str):
        aux = _default_losses(model, entry, next(iter(layers.values())))
        _LOG.warning(
            "%s: %d sparse layers adopted; training adds %r to its loss.", type(model).__name__, len(layers), aux
        )
    adoption = Adoption(hearing, aux)
    model.register_forward_pre_hook(adoption.begin, with_kwargs=True)
    model.register_forward_hook(adoption.end, with_kwargs=True, always_call=True)
    return model


class Adoption:
    """What is done around each forward of an adopted model.

    Args:
        hearing: shared by its layers.
        aux: weights of the routers' losses; None = they are not added.
    """

    def __init__(self, hearing: Hearing, aux: AuxLosses | None) -> None:
        self.hearing, self.aux = hearing, aux
        self.asked: list[tuple[int, list[Routing]]] = []  # by which thread, and where to
        self.told: dict[int, tuple[Tensor, Tensor]] = {}  # by which thread, see `packed`

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: take the mask, and begin to listen.

        Raises:
            UserError: router_logits are asked for.
        """
        if kwargs.get("output_router_logits"):
            raise UserError(
                "an adopted model returns no router_logits: got output_router_logits=True. Leave it out; "
                "moekit.huggingface.routings(model) gives what routers returned."
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        forward = self.hearing.forward
        real, sequence = mask, None
        if self.told:  # seldom; torch.compile cannot ask for the thread
            real, sequence = self.told.get(threading.get_ident(), (mask, None))
        forward.mask, forward.sequence = real_tokens(real), sequence
        forward.routings, forward.with_gradient = [], torch.is_grad_enabled()

    def end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After a forward, also one that raised: stop listening, and add the losses."""
        forward = self.hearing.forward
        heard, forward.routings, forward.mask, forward.sequence = forward.routings or [], None, None, None
        for thread, asked in self.asked:
            if thread == threading.get_ident():
                asked.extend(heard)
        as_tuple = isinstance(output, tuple) and len(output) > 0  # by return_dict=False: a loss, if any, comes first
        loss = output[0] if as_tuple else getattr(output, "loss", None)
        if as_tuple and isinstance(loss, Tensor) and loss.ndim:
            return None
        if self.aux is None or not model.training or not isinstance(loss, Tensor) or not heard:
            return None
        total, terms = self.aux(*heard)
        loss = loss + total.to(loss.device, loss.dtype)
        if as_tuple:
            return (loss, *output[1:])
        output.loss = loss
        if "aux_loss" in type(output).__dataclass_fields__:
            output.aux_loss = terms.get("load_balance")
        return output


@contextmanager
def routings(model: nn.Module) -> Iterator[list[Routing]]:
    """What the routers of an adopted model return inside the block, forward by forward, layer by layer.

    With gradient, so that a loss of one's own may be made of them. Forwards of other threads are not heard.

    Example::

        with routings(model) as heard:
            logits = model(input_ids).logits
        loss = my_loss(logits) + AuxLosses(load_balance=0.01)(*heard)[0]

    Raises:
        UserError: the model was not adopted.
    """
    adoption = _require_adopted(model, "routings")
    heard: list[Routing] = []
    adoption.asked.append((threading.get_ident(), heard))
    try:
        yield heard
    finally:
        adoption.asked = [asked for asked in adoption.asked if asked[1] is not heard]


@contextmanager
def packed(model: nn.Module, real: Tensor, sequence: Tensor) -> Iterator[None]:
    """Tell what the rows of the forwards inside the block are made of, where no attention mask can say it.

    Several texts share a row. The model is given no ``attention_mask``, and ``position_ids`` that begin anew with each
    text, by which transformers keep the attention of texts apart.

    Example::

        with packed(model, real, sequence):
            logits = model(input_ids, position_ids=position_ids, use_cache=False).logits

    Args:
        model: adopted.
        real: Bool[B, S], True = a real token; others are not routed and in no loss.
        sequence: Int64[B, S], which text a token belongs to, from 0 to below B x S.

    Raises:
        UserError: the model was not adopted.
    """
    adoption = _require_adopted(model, "packed rows")
    thread = threading.get_ident()
    former = adoption.told.get(thread)
    adoption.told[thread] = real, sequence
    try:
        yield
    finally:
        if former is None:
            del adoption.told[thread]
        else:
            adoption.told[thread] = former


def added_losses(model: nn.Module) -> AuxLosses | None:
    """What an adopted model adds to its loss: the weights of its routers' losses; None = nothing.

    For a loss that is made of the logits: ``added_losses(model)(*heard)[0]``, with what `routings` has heard.

    Raises:
        UserError: the model was not adopted.
    """
    return _require_adopted(model, "losses of routers").aux


def _require_adopted(model: nn.Module, what: str) -> Adoption:
    adoption = _adoption(model)
    if adoption is None:
        raise UserError(f"{what} are those of an adopted model: got {type(model).__name__}. Call adopt(model) first.")
    return adoption


def _adoption(model: nn.Module) -> Adoption | None:
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Adoption)), None)


def _sparse_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks to replace, by path.

    Raises:
        UserError: as `adopt`.
    """
    name = type(model).__name__
    if any(isinstance(module, AdoptedLayer) for module in model.modules()):
        raise UserError(f"{name} has been adopted already.")
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise UserError(
            f"{name}'s configuration has output_router_logits: an adopted model adds its routers' losses by itself. "
            "Set model.config.output_router_logits = False first."
        )
    known = {path: module for path, module in model.named_modules() if type(module).__name__ in SPARSE_BLOCKS}
    if "" in known:
        raise UserError(f"adopt takes a model: got the sparse block {name} itself. Give the model that holds it.")
    inside = tuple(f"{path}." for path in known)
    others = {
        path: type(module).__name__
        for path, module in model.named_modules()
        if not f"{path}.".startswith(inside) and type(module).__name__.endswith(("Experts", "SparseMLP"))
    }
    kinds = ", ".join(sorted(SPARSE_BLOCKS))
    if others:
        path, kind = next(iter(others.items()))
        raise UserError(f"{name}: {path} ({kind}) is in a sparse block of an unknown kind. Known are {kinds}.")
    if not known:
        raise UserError(f"{name} has no sparse block to adopt. Known are {kinds}.")
    return known


def _convert_when_saved(model: Any, found: Mapping[str, nn.Module]) -> None:
    """Let `save_pretrained` write experts that were modules as such."""
    made: dict[str, list[Any]] = {}
    for path, block in found.items():
        name = path.rpartition(".")[2]
        made.setdefault(name, weight_conversions(block, name))
    ours = [conversion for of_name in made.values() for conversion in of_name]
    if ours:
        # What it has none of by itself: no conversion of transformers is of these models.
        model._weight_conversions = [*(getattr(model, "_weight_conversions", None) or ()), *ours]


def _hear_stacks(model: nn.Module, hearing: Hearing, entered: str, layers: Iterable[str]) -> None:
    """Take the masks of encoder and decoder from each, which is also called by itself, and find those of recomputed
    blocks.
    """
    stacks: dict[nn.Module, None] = {}
    for path in layers:
        above = [model.get_submodule(".".join(path.split(".")[:n])) for n in range(path.count(".") + 1)]
        block = next(module for module in reversed(above) if hasattr(module, "gradient_checkpointing"))
        block.get_submodule(entered).register_forward_pre_hook(hearing.enter_states, with_kwargs=True)
        stacks[next(m for m in reversed(above[: above.index(block)]) if hasattr(m, "embed_tokens"))] = None
    for stack in stacks:
        stack.register_forward_pre_hook(hearing.begin_stack, with_kwargs=True)
        stack.register_forward_hook(hearing.end_stack, with_kwargs=True, always_call=True)


def _default_losses(model: nn.Module, entry: SparseBlock, layer: AdoptedLayer) -> AuxLosses:
    given = getattr(getattr(model, "config", None), "router_aux_loss_coef", None)
    if given is None:
        return AuxLosses(layers="mean", load_balance=entry.coefficient)
    return AuxLosses(layers="mean", load_balance=given * layer.router.k)
