"""Steps of fine-tuning a Qwen3-MoE beside Hugging Face transformers itself, which computes experts by grouped_mm.

Both train the same weights on the same packed rows with the same loss: forward, backward, gradient clipping and fused
AdamW, in turn in one process. What is timed of moekit is the adopted model as `moekit finetune --model` trains it, with
its routing statistics; neither adds routers' losses. Where losses or gradients of the two differ, nothing is reported.

Processes (--processes 2): both on several processes with one thread each and as many rows each, moekit with divided
experts under `ExpertParallelStrategy`, transformers with FSDP2: see `finetune_folder_processes.py`.

    python benchmarks/finetune_folder.py --threads 1     # the table
    python benchmarks/finetune_folder.py --processes 2   # the table of processes
    python benchmarks/finetune_folder.py --quick         # toy sizes: does it run?

transformers is needed: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from finetune_folder_model import Measured, batch_of, loss_of, qwen3_moe
from interleaved import Step, compared, counted, interleaved, refuse, write_json, written
from torch import Tensor, nn

from moekit.huggingface import adopt
from moekit.performance import keep_memory
from moekit.training.optimizers import adamw

FLOOR = "transformers"


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


def in_one_process(options: argparse.Namespace, plain: Any) -> Measured:
    """Both in this process; the losses are those at the end."""
    torch.set_num_threads(options.threads)
    plain = plain.to(options.device).train()
    ours = adopt(copy.deepcopy(plain), aux=None).train()
    batch = batch_of(options.rows, options.length, plain.config.vocab_size).to(torch.device(options.device))
    losses = {
        FLOOR: lambda: loss_of(plain, batch, adopted=False),
        "moekit": lambda: loss_of(ours, batch, adopted=True),
    }
    require_equal([plain, ours], list(losses.values()), 1e-3)
    arms = {name: step_of(model, losses[name]) for name, model in ((FLOOR, plain), ("moekit", ours))}
    seconds = interleaved(arms, options.rounds)
    last = {name: [float(loss().detach())] for name, loss in losses.items()}
    for name, (value,) in last.items():
        if not math.isfinite(value):
            refuse(f"the loss of {name} is not finite")
    return Measured(seconds, int(batch.num_tokens()), last)


def in_processes(options: argparse.Namespace, plain: Any) -> Measured:
    """Both in several processes, which read the model from a folder."""
    from finetune_folder_processes import measure

    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        sizes = options.rows, options.length, plain.config.vocab_size, options.rounds
        return measure(Path(folder), options.processes, *sizes)


def print_table(table: Mapping[str, Any], clock: str) -> None:
    """By one clock."""
    width = max(map(len, table)) + 2
    print(f"{'':{width}} {'steps/s':>8} {'s/step':>8} {'least':>8} {'ratio':>8} {'tokens/s':>9}")
    for name, found in table.items():
        median, least, ratio = (found[clock][key] for key in ("median_seconds", "least_seconds", "median_ratio"))
        print(
            f"{name:{width}} {found['steps_per_second']:8.2f} {median:8.3f} {least:8.3f} {ratio:8.2f} "
            f"{found['tokens_per_second']:9.0f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=counted, default=256, help="model dimension (default 256)")
    parser.add_argument("--layers", type=counted, default=4, help="transformer blocks (default 4)")
    parser.add_argument("--experts", type=counted, default=64, help="experts of a layer (default 64)")
    parser.add_argument("--rows", type=counted, default=4, help="rows of a process's batch (default 4)")
    parser.add_argument("--length", type=counted, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--rounds", type=counted, default=12, help="counted rounds (default 12)")
    parser.add_argument("--processes", type=int, default=1, help="processes, with one thread each if several")
    parser.add_argument("--threads", type=counted, help="threads of one process (default: torch's)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of one process")
    parser.add_argument("--quick", action="store_true", help="toy sizes and two rounds")
    parser.add_argument("--json", type=written, help="write the result as JSON")
    options = parser.parse_args(arguments)
    vocab_size = 8192
    if options.quick:
        options.dim, options.layers, options.experts, options.rows, options.length = 32, 2, 8, 2, 64
        options.rounds, vocab_size = 2, 128
    several = options.processes > 1
    if options.processes < 1 or options.experts % options.processes:
        parser.error(f"--processes must be 1 or more and divide {options.experts} experts: got {options.processes}")
    if several and (options.device != "cpu" or options.threads not in (None, 1)):
        parser.error("--processes 2 and more are on the CPU, with one thread each: leave --device and --threads out")
    options.threads = options.threads or (1 if several else torch.get_num_threads())
    kept = keep_memory()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    plain = qwen3_moe(options.dim, options.layers, options.experts, vocab_size)
    measured = (in_processes if several else in_one_process)(options, plain)
    table = compared(measured.seconds, next(iter(measured.seconds)))
    clock, tokens = "wall" if several or options.device != "cpu" else "processor", measured.tokens
    for found in table.values():
        median = found[clock]["median_seconds"]
        found |= {"steps_per_second": 1 / median, "tokens_per_second": tokens / median}
    shape = f"{options.processes} x {options.rows} rows of at most {options.length}"
    print(f"{tokens} tokens in {shape}, {sum(p.numel() for p in plain.parameters()):,} parameters, {clock} time")
    print_table(table, clock)
    names = ("dim", "layers", "experts", "rows", "length", "rounds", "processes", "threads", "device")
    asked = {name: getattr(options, name) for name in names}
    write_json(
        options.json, {**asked, "keeps_memory": kept, "tokens": tokens, "losses": measured.losses, "arms": table}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
