"""A training step of zcode_m3 beside its dense twin and Hugging Face SwitchTransformers of the same shape.

All have the same dimension, layers, vocabulary, batch and dropout (none on attention weights); the sparse ones the same
experts in every other layer. They run forward, backward, gradient clipping and fused AdamW, in turn in one process. The
dense twin, of the same active work, is the floor. What differs from transformers, because it is what each library does:
position bias and embedding scale (both T5's), capacity (both about 1 per even share), and which positions reach the
output projection.

Where moekit's loss or gradients without dropout and noise are not those of plain operations, or a loss is not finite,
nothing is reported.

    python benchmarks/train_step.py --threads 1          # the table
    python benchmarks/train_step.py --profile            # and where moekit's time goes
    python benchmarks/train_step.py --quick              # toy sizes: does it run?

transformers is needed: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from interleaved import Step, compared, counted, interleaved, peak_bytes, refuse, write_json, written
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moekit.data.batch import Batch
from moekit.performance import keep_memory
from moekit.planner.measure import product_rate
from moekit.recipes import zcode_m3
from moekit.runs import RunConfig, RunText

FLOOR = "dense twin"
_SAMPLE = 3  # steps of a profile
_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "_grouped_mm")


@dataclasses.dataclass(frozen=True)
class Arm:
    """Something that is timed.

    Attributes:
        step: a training step.
        model: all that it trains.
        loss: forward and loss alone.
        flops: floating-point operations of the products of a step.
    """

    step: Step
    model: nn.Module
    loss: Callable[[], torch.Tensor]
    flops: int


def batch_of(tokens: int, vocab_size: int, device: str) -> Batch:
    """A translation batch of sentences of 20 to 26 pieces, about `tokens` real tokens on both sides, 10% padding."""
    generator = torch.Generator().manual_seed(0)
    rows, longest = max(tokens // 2 // 24, 1), 26
    lengths = torch.randint(20, longest + 1, (2, rows), generator=generator)

    def side(length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.arange(longest) < length[:, None]
        ids = torch.randint(45, vocab_size, (rows, longest), generator=generator)
        return torch.where(mask, ids, 0).to(device), mask.to(device)

    (source, source_mask), (target, target_mask) = side(lengths[0]), side(lengths[1])
    zero = torch.zeros(rows, dtype=torch.long, device=device)
    return Batch("translation", source, source_mask, target, target_mask, None, zero, zero)


def autocast(device: str, precision: str) -> Any:
    """The context of a precision."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def arm(model: nn.Module, loss: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor] | None = None) -> Arm:
    """A full training step of a loss; the operations of its products are counted in `plain`, if given."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        (plain or loss)().backward()
    optimizer.zero_grad()
    return Arm(step, model, loss, counter.get_total_flops())


def moekit_arm(config: RunConfig, vocab_size: int, batch: Batch, device: str, precision: str) -> Arm:
    """The step of moekit, whose loss is first compared with that of plain operations."""
    alone = zcode_m3.TasksConfig(translation=config.tasks.translation)
    built = zcode_m3.build(config.changed(tasks=alone), RunText(vocab_size))
    head: Any = built.heads[0]
    modules = nn.ModuleList([built.backbone, head]).to(device).train()

    def objective(out: Any) -> torch.Tensor:
        aux = built.aux(*out.routings.values())[0] if built.aux is not None and out.routings else 0.0
        return out.loss + aux

    def loss() -> torch.Tensor:
        with autocast(device, precision):
            return objective(head(batch, built.backbone))

    def plain() -> torch.Tensor:
        with autocast(device, precision):
            return objective(head.judge(head.score(batch, built.backbone)))

    require_equal(modules, loss, plain, 0.02 if precision == "bf16" else 1e-4)
    return arm(modules, loss, plain)


def require_equal(
    model: nn.Module, loss: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor], tolerance: float
) -> None:
    """Refuse to go on where loss or gradients of two forms differ, in evaluation mode."""
    model.eval()
    found = []
    for form in (loss, plain):
        value = form()
        value.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([value.detach().flatten(), *grads]).float())
        model.zero_grad()
    model.train()
    if not float((found[0] - found[1]).norm()) <= tolerance * float(found[1].norm()):
        refuse("loss or gradients of moekit are not those of plain operations")


def transformers_arm(config: RunConfig, vocab_size: int, batch: Batch, device: str, precision: str) -> Arm:
    """The peer's step."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    model = config.model
    # Hugging Face counts capacity per sequence and expert.
    share = -(-batch.source.shape[1] // model.num_experts)
    peer = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=vocab_size,
            d_model=model.dim,
            d_kv=model.dim // model.heads,
            d_ff=model.hidden_dim,
            num_heads=model.heads,
            num_layers=model.encoder_layers,
            num_decoder_layers=model.decoder_layers,
            num_experts=model.num_experts,
            num_sparse_encoder_layers=model.encoder_layers // 2,
            num_sparse_decoder_layers=model.decoder_layers // 2,
            expert_capacity=max(1, round(share * model.capacity_factor)),
            router_jitter_noise=model.jitter,
            router_aux_loss_coef=model.load_balance,
            router_z_loss_coef=0.0,
            dropout_rate=model.dropout,
            add_router_probs=True,
            decoder_start_token_id=1,
            pad_token_id=0,
        )
    )
    for module in peer.modules():
        if type(module).__name__ == "SwitchTransformersAttention":
            module.dropout = 0.0  # on attention weights, where the other arms have none
    peer.to(device).train()
    assert batch.target is not None
    assert batch.target_mask is not None
    labels = torch.where(batch.target_mask, batch.target, -100)[:, 1:].contiguous()

    def loss() -> torch.Tensor:
        with autocast(device, precision):
            return peer(
                input_ids=batch.source,
                attention_mask=batch.source_mask.long(),
                decoder_input_ids=batch.target[:, :-1],
                labels=labels,
                output_router_logits=True,
            ).loss

    return arm(peer, loss)


def times_by_operation(step: Step, device: str) -> tuple[dict[str, float], str]:
    """Share of each operation in the self time of some steps, and torch's own table."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as trace:
        for _ in range(_SAMPLE):
            step()
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    averages = trace.key_averages()
    total = sum(getattr(event, clock) for event in averages)
    shares = {event.key.removeprefix("aten::"): getattr(event, clock) / total for event in averages}
    return shares, str(averages.table(sort_by=clock, row_limit=25, max_name_column_width=50))


def shares_of(shares: dict[str, float]) -> dict[str, float]:
    """Of matrix products, and of these with the attention kernels, which are products and a softmax."""
    products = sum(share for name, share in shares.items() if name in _PRODUCTS)
    attention = sum(share for name, share in shares.items() if "scaled_dot_product" in name)
    return {"products": products, "products_and_attention": products + attention}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sparse = [name for name, variant in zcode_m3.RECIPE.variants.items() if variant.config.model.num_experts]
    parser.add_argument("--variant", default="small", choices=[name for name in sparse if name != "paper"])
    parser.add_argument("--tokens", type=counted, default=3072, help="real tokens of a batch, both sides (3072)")
    parser.add_argument("--rounds", type=counted, default=12, help="counted rounds (default 12)")
    parser.add_argument("--threads", type=counted, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--profile", action="store_true", help="print where moekit's step spends its time")
    parser.add_argument("--quick", action="store_true", help="the tiny variant, few tokens and two rounds")
    parser.add_argument("--json", type=written, help="write the result as JSON")
    parser.add_argument("--no-keep-memory", action="store_true", help="leave the C library as it is")
    options = parser.parse_args(arguments)
    kept = False if options.no_keep_memory else keep_memory()
    if options.quick:
        options.variant, options.tokens, options.rounds = "tiny", 96, 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    variants, device = zcode_m3.RECIPE.variants, options.device
    config, twin = (variants[name].config for name in (options.variant, f"{options.variant}_dense"))
    vocab_size = config.data.vocab_size
    batch = batch_of(options.tokens, vocab_size, device)
    rest = vocab_size, batch, device, options.precision
    arms = {
        FLOOR: moekit_arm(twin, *rest),
        "moekit": moekit_arm(config, *rest),
        "transformers": transformers_arm(config, *rest),
    }
    seconds = interleaved({name: arm.step for name, arm in arms.items()}, options.rounds)
    for name, one in arms.items():
        if not torch.isfinite(one.loss().detach()):
            refuse(f"the loss of {name} is not finite")
    table = compared(seconds, FLOOR)
    rate = product_rate(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    print(f"{batch.num_tokens} tokens in {batch.num_positions} positions; products here: {rate / 1e9:.1f} GFLOP/s")
    print(f"{'':14} {'s/step':>8} {'least':>8} {'x dense':>8} {'least':>8} {'GFLOP/s':>8} {'of rate':>8} "
          f"{'peak MB':>8} {'tokens/s':>9} {'products':>9} {'+ attn':>7}")  # fmt: skip
    traces = {}
    for name, one in arms.items():
        shares, traces[name] = times_by_operation(one.step, device)
        found, clock = table[name], table[name]["processor" if device == "cpu" else "wall"]
        median = clock["median_seconds"]
        found |= {
            "parameters": sum(p.numel() for p in one.model.parameters()),
            "flops": one.flops,
            "flops_per_second": one.flops / median,
            "share_of_product_rate": one.flops / median / rate,
            "peak_bytes": peak_bytes(one.step),
            "tokens_per_second": batch.num_tokens / median,
            **shares_of(shares),
        }
        print(
            f"{name:14} {median:8.3f} {clock['least_seconds']:8.3f} {clock['median_ratio']:8.2f} "
            f"{clock['ratio_of_least']:8.2f} {found['flops_per_second'] / 1e9:8.1f} "
            f"{found['share_of_product_rate']:8.0%} {found['peak_bytes'] / 1e6:8.0f} "
            f"{found['tokens_per_second']:9.0f} {found['products']:9.0%} {found['products_and_attention']:7.0%}"
        )
    speed = {
        clock: {
            key: table["transformers"][clock][key] / table["moekit"][clock][key]
            for key in ("median_ratio", "ratio_of_least")
        }
        for clock in ("processor", "wall")
    }
    for clock, ratios in speed.items():
        print(
            f"{clock} time: moekit trains {ratios['median_ratio']:.2f} times as many tokens per second as "
            f"transformers (least times: {ratios['ratio_of_least']:.2f})"
        )
    if options.profile:
        print(traces["moekit"])
    asked = {name: getattr(options, name) for name in ("variant", "rounds", "threads", "device", "precision")}
    sizes = {"tokens": batch.num_tokens, "positions": batch.num_positions, "product_rate": rate}
    write_json(options.json, {**asked, "keeps_memory": kept, **sizes, "arms": table, "speed_over_transformers": speed})
    return 0


if __name__ == "__main__":
    sys.exit(main())
