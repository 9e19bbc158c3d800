"""Steps of fine-tuning a Qwen3-MoE beside Hugging Face transformers itself, which computes experts by grouped_mm.

Both train the same weights on the same packed rows with the same loss: forward, backward, gradient clipping and fused
AdamW, in turn in one process. What is timed of moekit is the adopted model as `moekit finetune --model` trains it, with
its routing statistics; neither adds routers' losses. Where losses or gradients of the two differ, nothing is reported.

    python benchmarks/finetune_folder.py --threads 1     # the table
    python benchmarks/finetune_folder.py --quick         # toy sizes: does it run?

transformers is needed: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from interleaved import Step, compared, interleaved, refuse, write_json
from torch import Tensor, nn

from moekit.folders.batches import FolderBatch, collate
from moekit.folders.encoding import IGNORED, Encoded
from moekit.folders.packing import pack
from moekit.huggingface import adopt, packed
from moekit.performance import keep_memory
from moekit.training.optimizers import adamw

FLOOR = "transformers"


def batch_of(rows: int, length: int, vocab_size: int, device: str) -> FolderBatch:
    """Rows of examples of 10 to 60 tokens, of which the later half is learned."""
    draw = np.random.default_rng(0)
    examples = []
    for size in draw.integers(10, min(60, length) + 1, 4 * rows * length // 35):
        ids = draw.integers(3, vocab_size, size)
        examples.append(Encoded(ids, np.where(np.arange(size) < size // 2, IGNORED, ids)))
    chosen = pack([len(example) for example in examples], length)[:rows]
    return collate(
        [[examples[number] for number in row] for row in chosen],
        pad=0,
        predictions=float(sum(examples[number].predicted for row in chosen for number in row)),
    ).to(torch.device(device))


def qwen3_moe(dim: int, layers: int, experts: int, vocab_size: int) -> Any:
    """A Qwen3-MoE that is narrower than the published ones, with eight experts of many for a token."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocab_size, hidden_size=dim, intermediate_size=3 * dim, moe_intermediate_size=3 * dim // 8,
        num_hidden_layers=layers, num_attention_heads=max(dim // 64, 2), num_key_value_heads=max(dim // 128, 1),
        head_dim=64 if dim >= 128 else 16, num_experts=experts, num_experts_per_tok=min(8, experts // 2),
        norm_topk_prob=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")


def loss_of(model: Any, batch: FolderBatch, *, adopted: bool) -> Tensor:
    """Nats for a learned token."""
    if adopted:
        with packed(model, batch.real, batch.sequence):
            logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    else:
        logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    scores, wanted = logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten()
    return F.cross_entropy(scores, wanted, ignore_index=IGNORED, reduction="sum") / batch.predictions


def require_equal(models: Sequence[nn.Module], losses: Sequence[Callable[[], Tensor]], tolerance: float) -> None:
    """Refuse to report what is not one function."""
    found = []
    for model, loss in zip(models, losses, strict=True):
        model.zero_grad()
        value = loss()
        value.backward()
        found.append(
            (value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (one, first), (other, second) = found
    if not torch.isfinite(one) or abs(float(one - other)) > tolerance * float(one):
        refuse(f"losses differ: {float(one)} and {float(other)}")
    if first.keys() != second.keys():
        refuse(f"other parameters have gradients: {sorted(first.keys() ^ second.keys())[:3]}")
    for name, gradient in first.items():
        if (gradient - second[name]).abs().max() > tolerance * max(float(gradient.abs().max()), 1e-6):
            refuse(f"gradients of {name} differ")


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A training step."""
    optimizer = adamw(model, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256, help="model dimension (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks (default 4)")
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer (default 64)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--rounds", type=int, default=12, help="counted rounds (default 12)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="toy sizes and two rounds")
    parser.add_argument("--json", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    kept = keep_memory()
    vocab_size = 8192
    if options.quick:
        options.dim, options.layers, options.experts, options.rows, options.length = 32, 2, 8, 2, 64
        options.rounds, vocab_size = 2, 128
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = qwen3_moe(options.dim, options.layers, options.experts, vocab_size).to(options.device).train()
    ours = adopt(copy.deepcopy(plain), aux=None).train()
    batch = batch_of(options.rows, options.length, vocab_size, options.device)
    losses = {
        FLOOR: lambda: loss_of(plain, batch, adopted=False),
        "moekit": lambda: loss_of(ours, batch, adopted=True),
    }
    require_equal([plain, ours], list(losses.values()), 1e-3)
    arms = {name: step_of(model, losses[name]) for name, model in ((FLOOR, plain), ("moekit", ours))}
    table = compared(interleaved(arms, options.rounds), FLOOR)
    for name, loss in losses.items():
        if not torch.isfinite(loss().detach()):
            refuse(f"the loss of {name} is not finite")
    clock = "processor" if options.device == "cpu" else "wall"
    tokens = int(batch.num_tokens())
    print(
        f"{tokens} tokens in {batch.ids.numel()} positions, {sum(p.numel() for p in plain.parameters()):,} parameters"
    )
    print(f"{'':14} {'steps/s':>8} {'s/step':>8} {'least':>8} {'ratio':>8} {'tokens/s':>9}")
    for name, found in table.items():
        median = found[clock]["median_seconds"]
        found |= {"steps_per_second": 1 / median, "tokens_per_second": tokens / median}
        print(
            f"{name:14} {1 / median:8.2f} {median:8.3f} {found[clock]['least_seconds']:8.3f} "
            f"{found[clock]['median_ratio']:8.2f} {tokens / median:9.0f}"
        )
    asked = {
        n: getattr(options, n) for n in ("dim", "layers", "experts", "rows", "length", "rounds", "threads", "device")
    }
    write_json(options.json, {**asked, "keeps_memory": kept, "tokens": tokens, "arms": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
