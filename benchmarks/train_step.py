"""Tokens per second of a training step of zcode_m3 `small`, beside Hugging Face SwitchTransformers of the same shape.

Both models have the same dimension, layers, experts (in every other layer), vocabulary and batch, run forward,
backward, gradient clipping and fused AdamW, in one process, in turn; the figure is the median over rounds of the
ratio of neighbouring steps. What differs, because it is what each library does: position bias and embedding scale
(both T5's), capacity (both about 1 per even share), and which positions reach the output projection.

    python benchmarks/train_step.py                      # the ratio
    python benchmarks/train_step.py --profile            # and where moekit's time goes

transformers is needed for the ratio only: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moekit.data.batch import Batch
from moekit.recipes import zcode_m3
from moekit.runs import RunConfig, RunText


def batch_of(tokens: int, vocab_size: int, device: str) -> Batch:
    """A translation batch of sentences of 8 to 40 pieces, about `tokens` real tokens on both sides, 10% padding."""
    generator = torch.Generator().manual_seed(0)
    rows, longest = tokens // 2 // 24, 26
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


def stepper(parameters: list[nn.Parameter], loss: Callable[[], torch.Tensor], device: str) -> Callable[[], float]:
    """A full training step; returns its seconds."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        if not torch.isfinite(value):
            raise SystemExit("refusing to report: the loss is not finite")
        return time.perf_counter() - start

    return step


def moekit_arm(config: RunConfig, vocab_size: int, batch: Batch, device: str, precision: str) -> Any:
    """The step of moekit and its parameters."""
    alone = zcode_m3.TasksConfig(translation=config.tasks.translation)
    built = zcode_m3.build(config.changed(tasks=alone), RunText(vocab_size))
    modules = nn.ModuleList([built.backbone, *built.heads]).to(device).train()

    def loss() -> torch.Tensor:
        with autocast(device, precision):
            out = built.heads[0](batch, built.backbone)
            aux = built.aux(*out.routings.values())[0] if built.aux is not None and out.routings else 0.0
            return out.loss + aux

    parameters = list(modules.parameters())
    return stepper(parameters, loss, device), sum(p.numel() for p in parameters)


def transformers_arm(config: RunConfig, vocab_size: int, batch: Batch, device: str, precision: str) -> Any:
    """The peer's step and its parameters."""
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

    parameters = list(peer.parameters())
    return stepper(parameters, loss, device), sum(p.numel() for p in parameters)


def profile(step: Callable[[], float], device: str) -> str:
    """Where the time goes: torch's own table, by self time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with record(activities=activities) as trace:
        for _ in range(3):
            step()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(trace.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=50))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="small", choices=[n for n in zcode_m3.RECIPE.variants if n != "paper"])
    parser.add_argument("--tokens", type=int, default=3072, help="real tokens of a batch, both sides (default 3072)")
    parser.add_argument("--rounds", type=int, default=12, help="counted rounds (default 12)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--profile", action="store_true", help="print where moekit's step spends its time")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    config = zcode_m3.RECIPE.variants[options.variant].config
    vocab_size = config.data.vocab_size
    batch = batch_of(options.tokens, vocab_size, options.device)
    arms = {
        name: arm(config, vocab_size, batch, options.device, options.precision)
        for name, arm in (("moekit", moekit_arm), ("transformers", transformers_arm))
    }
    for step, _ in arms.values():
        for _ in range(2):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, (step, _) in arms.items():
            seconds[name].append(step())
    ratios = [theirs / ours for ours, theirs in zip(seconds["moekit"], seconds["transformers"], strict=True)]
    result = {
        "variant": options.variant,
        "tokens": batch.num_tokens,
        "positions": batch.num_positions,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "precision": options.precision,
        "threads": options.threads,
        "torch": torch.__version__,
        "parameters": {name: count for name, (_, count) in arms.items()},
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "tokens_per_second": {name: batch.num_tokens / statistics.median(v) for name, v in seconds.items()},
        "speed_ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    print(json.dumps(result, indent=2))
    print(f"moekit trains {statistics.median(ratios):.2f} times as many tokens per second as transformers")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.profile:
        print(profile(arms["moekit"][0], options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
