"""How weights start, for every transformer of this package, in one place."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts.base import Experts, copy_first_expert_
from moekit.functional.init import truncated_normal_
from moekit.mapped import StoredWeights
from moekit.transformer.attention import CrossAttention, SelfAttention
from moekit.transformer.embedding import TokenEmbedding
from moekit.transformer.feed_forward import GLU, MLP
from moekit.transformer.positions import RelativePositions
from moekit.transformer.projection import FusedLinear
from moekit.transformer.stack import Stack


@torch.no_grad()
def init_weights(model: nn.Module, *, scale: float | None = None, by_depth: bool | None = None) -> None:
    """Draw the weights of attention, dense feed-forwards, embeddings and position tables anew.

    - Embeddings: normal, std 1 / sqrt(D) or 1 (see `TokenEmbedding`), so that vectors enter with unit variance.
    - Matrices that read the residual stream (q, k, v, in): truncated normal, std sqrt(scale / fan_in).
    - Matrices that write to it (out): the same, divided by sqrt(number of residual branches of the stack), so that
      the stream's variance at the end does not grow with depth; not divided where the stack is told so.
    - Where attention logits are multiplied by a scale of yours, queries are drawn smaller or larger, so that logits
      start as they do with 1 / sqrt(head_dim).
    - T5's relative bias: normal, std 1 / sqrt(D). Biases zero. Norms start as the identity.
    - Dense feed-forwards outside of stacks: both matrices as those that read.
    - Experts, routers and modules of yours draw their own weights and are not drawn anew. Experts in a stack have the
      same divisor upon their first draw, so that at one scale they and a dense feed-forward begin alike.

    Does nothing to tensors on the meta device; call it after they have been given memory, together with the
    `reset_parameters` of routers and experts: `materialize` does both.

    Args:
        model: any module that contains transformers of this package.
        scale: variance scale from now on, of all stacks and of feed-forwards outside of them; None = of every stack as
            it was built (`build_stack`), and 1.
        by_depth: whether matrices that write are divided from now on; None = as built.

    Source: depth scaling of the output matrices: GPT-2. Scale 0.1 of every matrix, and nothing by depth:
    arXiv:2101.03961 section 2.4, for its sparse models (``scale=0.1, by_depth=False``, banks of ``init_scale=0.1``).
    """
    for stack in model.modules():
        if isinstance(stack, Stack):
            stack.init_scale = stack.init_scale if scale is None else scale
            stack.init_by_depth = stack.init_by_depth if by_depth is None else by_depth
    for _, draw in _draws(model, 1.0 if scale is None else scale):
        draw()


Draws = list[tuple[nn.Module, Callable[[], None]]]


def _draws(model: nn.Module, scale: float) -> Draws:
    """Who draws what of its own or of its submodules' weights, in order; `scale` is for what is in no stack."""
    draws: Draws = [(m, partial(_draw_table, m, m.std)) for m in model.modules() if isinstance(m, TokenEmbedding)]
    inside: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, Stack):
            draws += _stack_draws(stack)
            inside.update(stack.modules())
    draws += [
        (m, partial(_draw_pair, m, scale, scale))
        for m in model.modules()
        if isinstance(m, MLP | GLU) and m not in inside
    ]
    return draws


def _stack_draws(stack: Stack) -> Draws:
    draws: Draws = []
    scale = stack.init_scale
    branches = sum(block.num_branches for block in stack.blocks) if stack.init_by_depth else 1
    last = scale / max(branches, 1)
    for module in stack.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            draws.append((module, partial(_draw_attention, module, scale, last)))
        elif isinstance(module, MLP | GLU):
            draws.append((module, partial(_draw_pair, module, scale, last)))
        elif isinstance(module, Experts):
            draws.append((module, partial(module.scale_outputs_, 1 / max(branches, 1))))
        elif isinstance(module, RelativePositions) and stack.blocks:
            dim = stack.blocks[0].self_attention.qkv.in_features
            draws.append((module, partial(_draw_table, module, dim**-0.5)))
    return draws


def _draw_table(module: TokenEmbedding | RelativePositions, std: float) -> None:
    if not module.weight.is_meta:
        nn.init.normal_(module.weight, std=std)


def _draw_attention(module: SelfAttention | CrossAttention, scale: float, last: float) -> None:
    if isinstance(module, SelfAttention):
        _draw(module.qkv, scale)
        _rescale(module.qkv.weight[0], module)
    else:
        _draw(module.q, scale)
        _rescale(module.q.weight, module)
        _draw(module.kv, scale)
    _draw(module.out, last)


def _draw_pair(module: MLP | GLU, scale: float, last: float) -> None:
    _draw(module.w_in, scale)
    _draw(module.w_out, last)


def _draw(linear: nn.Linear | FusedLinear, scale: float) -> None:
    truncated_normal_(linear.weight, linear.in_features, scale)
    if linear.bias is not None and not linear.bias.is_meta:
        nn.init.zeros_(linear.bias)


def _rescale(queries: Tensor, attention: SelfAttention | CrossAttention) -> None:
    if attention.scale is not None and not queries.is_meta:
        queries.mul_(attention.head_dim**-0.5 / attention.scale)


def init_weights_by_name(model: nn.Module, seed: int) -> None:
    """Draw the first weights of every module anew, each from a random stream of its own: that of `seed` and its name.

    Two models that differ in some modules then begin alike in all others, which have the same names, as paired runs of
    an ablation should; drawn one after the other, everything behind the first difference would differ. Experts that
    were copies of one stay so. Afterwards torch's generators are as `seed` sets them.

    Args:
        model: any module in memory; what has neither `reset_parameters` nor weights that `init_weights` draws keeps
            what it has.
        seed: random seed from which all streams follow.
    """
    draws, seen = dict(_draws(model, 1.0)), set[nn.Module]()
    copied = [bank for bank in model.modules() if isinstance(bank, Experts) and _are_copies(bank)]

    def stream(name: str) -> None:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))

    def visit(name: str, module: nn.Module) -> None:
        seen.add(module)
        if callable(reset := getattr(module, "reset_parameters", None)):
            stream(name)
            reset()
        for key, child in module.named_children():
            if child not in seen:
                visit(f"{name}.{key}", child)
        if module in draws:  # after those inside it, whose weights it draws
            stream(name)
            draws[module]()

    with torch.no_grad():
        visit("", model)
        for bank in copied:
            copy_first_expert_(bank)
    torch.manual_seed(seed)


def _are_copies(bank: Experts) -> bool:
    """Whether all experts of a bank are the same."""
    of_experts = {name: axes.index("expert") for name, axes in bank.axes.items() if "expert" in axes}
    tables = [(p, of_experts[name]) for name, p in bank.named_parameters() if name in of_experts]
    return bool(tables) and all(torch.equal(p, p.narrow(dim, 0, 1).expand_as(p)) for p, dim in tables)


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a model built on the meta device memory on `device` and draw all its weights.

    Raises:
        UserError: if a module cannot draw its weights: see `materialize_modules`.
    """
    for _ in materialize_modules(model, device):
        pass


def materialize_modules(model: nn.Module, device: torch.device | str) -> Iterator[nn.Module]:
    """`materialize` module by module: yields each when it and all inside it have their weights, inner ones first.

    Who takes each module's weights away before asking for the next one (divides them among processes, as
    `moekit.parallel.parallelize` does) never holds the whole model. Weights are drawn in float32 and then take the type
    they had on the meta device; what is shared stays so. Nothing is drawn in a module with `stored_weights`
    (`moekit.mapped.StoredWeights`): it has memory, which is filled when it has been divided.

    Raises:
        UserError: before anything is drawn, if a module has tensors and no `reset_parameters` to draw them with.
    """
    draws = dict(_draws(model, 1.0))
    _require_drawable(model, draws)
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, held: bool = False) -> Iterator[nn.Module]:
        """`held`: one around it will draw for it yet."""
        seen.add(module)
        reset = None if module in memory.stored else getattr(module, "reset_parameters", None)
        # One that draws may draw for those inside it too.
        for needed in module.modules() if callable(reset) else (module,):
            memory.give(needed)
        if callable(reset):
            reset()
        holds = held or module in draws
        inside = (ready for child in module.children() if child not in seen for ready in visit(child, holds))
        if module in draws:
            drawn = list(inside)
            with torch.no_grad():
                draws[module]()
            if not held:
                for ready in drawn:
                    memory.finish(ready)
            yield from drawn
        else:
            yield from inside
        if not held:
            memory.finish(module)
        yield module

    memory = _Memory(model, device)
    yield from visit(model)


def _held(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Parameters and buffers that a module holds itself, each with the place where it is held."""
    for holder in (module._parameters, module._buffers):
        yield from ((holder, name, tensor) for name, tensor in list(holder.items()) if tensor is not None)


class _Memory:
    """Tensors with memory on a device in place of a model's own, wide while they are drawn."""

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self.device = torch.empty(0, device=device).device
        # Shared tensors have several places, and one that stands for them until the last has it: no longer, so that
        # what the caller takes away is gone.
        self.places = Counter(tensor for module in model.modules() for _, _, tensor in _held(module))
        self.stored = {module for module in model.modules() if StoredWeights.has(module)}
        self.made: dict[Tensor, Tensor] = {}
        self.types: dict[Tensor, torch.dtype] = {}

    def give(self, module: nn.Module) -> None:
        """Replace what the module holds itself, unless it has memory there."""
        for holder, name, tensor in _held(module):
            if tensor.device == self.device:
                continue
            if module in self.stored and not tensor.is_meta:  # a table that was computed
                holder[name] = tensor.to(self.device)
                continue
            if tensor not in self.made:
                wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
                wide = tensor.dtype if module in self.stored else wide  # which would touch memory that is not kept
                memory = torch.empty(tensor.shape, dtype=wide, device=self.device)
                if isinstance(tensor, nn.Parameter):
                    memory = nn.Parameter(memory, requires_grad=tensor.requires_grad)
                self.made[tensor], self.types[memory] = memory, tensor.dtype
            holder[name] = self.made[tensor]
            self.places[tensor] -= 1
            if not self.places[tensor]:
                del self.made[tensor]

    @torch.no_grad()
    def finish(self, module: nn.Module) -> None:
        """Give what the module holds its own type."""
        for _, _, tensor in _held(module):
            if tensor in self.types:
                tensor.data = tensor.data.to(self.types.pop(tensor))


def _require_drawable(model: nn.Module, draws: Container[nn.Module]) -> None:
    def missing(path: str, module: nn.Module) -> Iterator[str]:
        if (
            callable(getattr(module, "reset_parameters", None))
            or module in draws
            or "stored_weights" in module.__dict__
        ):
            return
        yield from (f"{path}{name}" for _, name, tensor in _held(module) if tensor.is_meta)
        for name, child in module.named_children():
            yield from missing(f"{path}{name}.", child)

    found = list(missing("", model))
    if found:
        rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"a model on the meta device must know how to draw its weights: {', '.join(found[:3])}{rest} belong to "
            "modules without reset_parameters. Define it (buffers included), or build the model with memory."
        )
