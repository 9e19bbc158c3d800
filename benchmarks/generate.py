"""Sentences per second beside Hugging Face transformers, and the memory of whole, pruned and on-demand models.

Speed: one model with random weights, exported and opened by transformers, so both have the same weights. Both write
exactly as many tokens for each sentence, greedily and with a beam; they take turns in one process with the floor: the
products of moekit's run with weights (projections, experts, vocabulary) and nothing else, into memory that is kept.
All texts are scored by one model, given whole; where one of moekit's scores below that of transformers, or greedy texts
differ, nothing is reported.

Memory: each kind answers the same sentences in a process of its own, and its peak resident memory is taken. The
sentences are of one of four languages, whose words have a direction in common that routers turn into a quarter of the
experts: a stand-in for a trained multilingual model, whose languages prefer experts. Last, address space is limited to
less than the weights need: the whole model fails to load, the one on demand answers.

    python benchmarks/generate.py                      # both, a model of 540 MB
    python benchmarks/generate.py --only speed --threads 1 --rounds 9
    python benchmarks/generate.py --quick              # toy size, seconds, to see that it works

transformers is needed: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interleaved import Step, compared, counted, interleaved, peak_bytes, refuse, write_json, written
from safetensors.torch import save_file
from torch import Tensor, nn

from moekit import MoELayer, routers
from moekit.experts import GroupedMLP
from moekit.experts.base import Experts
from moekit.huggingface import export_model
from moekit.inference import BeamSearch, ExpertsOnDemand, Greedy, LengthLimit, MeanLogProb, Search, load_on_demand
from moekit.inference import generate as write
from moekit.performance import keep_memory
from moekit.planner.measure import product_rate
from moekit.surgery import choose_experts, sparse_layers, take_experts
from moekit.transformer import EncoderDecoder, RMSNorm, every_other
from moekit.transformer.projection import FusedLinear

PAD, FIRST = 0, 4
LANGUAGES = 4


@dataclass(frozen=True)
class Size:
    """A model and what it is asked."""

    vocab: int
    dim: int
    heads: int
    layers: int
    hidden: int
    experts: int
    sentences: int
    length: int


SIZES = {
    "tiny": Size(vocab=400, dim=64, heads=4, layers=2, hidden=128, experts=8, sentences=8, length=12),
    "small": Size(vocab=8000, dim=256, heads=4, layers=4, hidden=1024, experts=64, sentences=32, length=24),
}


def build(size: Size, num_experts: int | None = None) -> EncoderDecoder:
    """A T5 in which every second feed-forward is sparse."""
    count = num_experts or size.experts

    def sparse(layer: int, side: str) -> nn.Module:
        return MoELayer(routers.switch(size.dim, count), GroupedMLP(count, size.dim, size.hidden, init_scale=1.0))

    return EncoderDecoder(
        size.vocab, size.dim, size.heads, size.layers, size.layers, size.hidden,
        feed_forward=every_other(sparse), norm=RMSNorm, tied=False,  # tied, a model of random weights repeats itself
    )  # fmt: skip


@torch.no_grad()
def give_languages(model: EncoderDecoder, size: Size) -> None:
    """Words of a language share a direction, and its experts look for it; what is written depends on the sentence."""
    for block in model.decoder.blocks:
        assert block.cross_attention is not None
        block.cross_attention.out.weight *= 6
    directions = torch.linalg.qr(torch.randn(size.dim, LANGUAGES))[0].t()
    of_word = (torch.arange(size.vocab) - FIRST).clamp_min(0) * LANGUAGES // (size.vocab - FIRST)
    for table in (model.embedding, model.target_embedding):
        assert table is not None
        table.weight += 0.7 * directions[of_word]
    for module in model.modules():
        if isinstance(module, routers.TopKRouter):
            module.weight.normal_(std=size.dim**-0.5)
            of_expert = torch.arange(size.experts) * LANGUAGES // size.experts
            module.weight += 0.25 * directions[of_expert]


def words_of(size: Size, language: int | None) -> tuple[int, int]:
    """The first word of a language and the one after its last; of all languages for None."""
    words = size.vocab - FIRST
    return (
        (FIRST, size.vocab)
        if language is None
        else (FIRST + words * language // LANGUAGES, FIRST + words * (language + 1) // LANGUAGES)
    )


def unwanted(size: Size, language: int | None) -> list[int]:
    """What is not written: marks, the end (so that both write equally much), and words of other languages."""
    low, high = words_of(size, language)
    return [i for i in range(size.vocab) if not low <= i < high]


def sentences(size: Size, language: int | None) -> tuple[Tensor, Tensor]:
    """Sentences of one language, or of all, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(*words_of(size, language), (size.sentences, size.length), generator=generator)
    lengths = torch.randint(size.length // 2, size.length + 1, (size.sentences,), generator=generator)
    mask = torch.arange(size.length) < lengths[:, None]
    return ids.masked_fill(~mask, PAD), mask


def ours(model: EncoderDecoder, size: Size, beams: int, language: int | None = None) -> Tensor:
    """Int64[B, T]: what moekit writes, `length` tokens for each sentence."""
    search: Search = Greedy() if beams == 1 else BeamSearch(beams, penalty=MeanLogProb())
    source, mask = sentences(size, language)
    limit = LengthLimit(size.length, 0.0)
    return write(model, source, mask, search=search, limit=limit, suppress=unwanted(size, language)).ids[:, 0]


def theirs(model: Any, size: Size, beams: int, language: int | None = None) -> Tensor:
    """Int64[B, T]: what transformers writes."""
    source, mask = sentences(size, language)
    found: Tensor = model.generate(
        input_ids=source, attention_mask=mask.long(), num_beams=beams, do_sample=False, length_penalty=1.0,
        max_new_tokens=size.length, min_new_tokens=size.length, suppress_tokens=unwanted(size, language),
    )  # fmt: skip
    return found[:, 1:]


def open_theirs(folder: Path) -> Any:
    """The exported model in transformers."""
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


# -- speed ---------------------------------------------------------------------------------------------------------


class Products:
    """The products with weights of one run, with factors of the same shapes and the same weights, and their work."""

    def __init__(self, model: EncoderDecoder, run: Callable[[], object]) -> None:
        self.flops = 0
        self._made: list[tuple[Tensor, Tensor]] = []  # rows and weight of each product
        self._rows: dict[tuple[int, int], Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(self._projection)
            for module in model.modules()
            if isinstance(module, nn.Linear | FusedLinear)
        ]
        hooks += [m.register_forward_pre_hook(self._bank) for m in model.modules() if isinstance(m, Experts)]
        score = model.logits

        def logits(hidden: Tensor) -> Tensor:
            table = model.embedding if model.output is None else model.output
            self._note(hidden.numel() // hidden.shape[-1], table.weight.t())
            return score(hidden)

        model.__dict__["logits"] = logits
        run()
        del model.__dict__["logits"]
        for hook in hooks:
            hook.remove()
        self._room = torch.empty(max(rows.shape[0] * weight.shape[1] for rows, weight in self._made))

    def _projection(self, module: nn.Linear | FusedLinear, inputs: tuple[Tensor, ...]) -> None:
        weight = module.weight.detach()
        self._note(inputs[0].numel() // inputs[0].shape[-1], weight.flatten(0, -2).t())

    def _bank(self, bank: Experts, inputs: tuple[Tensor, ...]) -> None:
        rows, counts = inputs
        numbers = [rows.shape[1]] * bank.num_experts if counts is None else counts.tolist()
        for name in bank.matrices:
            for number, weight in zip(numbers, getattr(bank, name).detach().unbind(0), strict=True):
                self._note(number, weight)

    def _note(self, rows: int, weight: Tensor) -> None:
        if rows:
            shape = (rows, weight.shape[0])
            self.flops += 2 * rows * weight.numel()
            self._made.append((self._rows.setdefault(shape, torch.randn(shape)), weight.detach()))

    def __call__(self) -> None:
        """Compute them."""
        with torch.inference_mode():
            for rows, weight in self._made:
                size = rows.shape[0], weight.shape[1]
                torch.mm(rows, weight, out=self._room[: size[0] * size[1]].view(size))


def parts(model: EncoderDecoder, run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of a run by part of the model, of the fastest of some runs.

    Parts that hold others are named without these: "sparse layers" is what sorts and sums rows, "search" all that is
    neither encoder nor decoder nor logits.
    """
    spent: dict[str, float] = {}
    open_parts: list[list[float]] = []  # when each began, and what its own parts took

    def begin(*_: object) -> None:
        open_parts.append([time.process_time(), 0.0])

    def end(name: str) -> None:
        start, inner = open_parts.pop()
        took = time.process_time() - start
        spent[name] = spent.get(name, 0.0) + took - inner
        if open_parts:
            open_parts[-1][1] += took

    named: list[tuple[str, nn.Module]] = [("encoder", model.encoder), ("decoder: the rest", model.decoder)]
    for block in model.decoder.blocks:
        named += [("self-attention", block.self_attention), ("cross-attention", block.cross_attention)]  # type: ignore[list-item]
        feed = block.feed_forward
        if isinstance(feed, MoELayer):
            named += [("sparse layers", feed), ("routers", feed.router), ("experts", feed.experts)]
        else:
            named.append(("dense feed-forwards", feed))
    named += [("norms", module) for module in model.decoder.modules() if isinstance(module, RMSNorm)]
    hooks = []
    for name, module in named:
        hooks.append(module.register_forward_pre_hook(begin))
        hooks.append(module.register_forward_hook(lambda *_, name=name: end(name)))  # type: ignore[misc]
    score = model.logits

    def logits(hidden: Tensor) -> Tensor:
        begin()
        found = score(hidden)
        end("logits")
        return found

    model.__dict__["logits"] = logits
    best: dict[str, float] = {}
    for _ in range(rounds):
        spent.clear()
        begin()
        run()
        end("search")
        if not best or sum(spent.values()) < sum(best.values()):
            best = dict(spent)
    del model.__dict__["logits"]
    for hook in hooks:
        hook.remove()
    return {name: 1e3 * seconds for name, seconds in sorted(best.items(), key=lambda item: -item[1])}


@torch.inference_mode()
def scores(model: EncoderDecoder, size: Size, texts: Tensor) -> Tensor:
    """Float[B]: mean log-probability of a token of each text, of the whole text at once."""
    source, mask = sentences(size, None)
    given = torch.cat((torch.ones_like(texts[:, :1]), texts[:, :-1]), 1)
    logits = model.logits(model.decode(given, model.encode(source, mask).hidden, mask).hidden)
    return logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0].double().mean(1)


def speed(size: Size, folder: Path, rounds: int, beams: Sequence[int]) -> dict[str, Any]:
    """Sentences per second of both, and of the products alone, in turn."""
    model = whole(size, folder)
    peer = open_theirs(folder / "theirs")
    rate = product_rate("cpu", torch.float32)
    result: dict[str, Any] = {"product_rate": rate}
    for count in beams:
        texts = [ours(model, size, count), theirs(peer, size, count)]
        if texts[0].shape != texts[1].shape:
            refuse(f"with {count} beams texts have the shapes {[tuple(t.shape) for t in texts]}")
        same = float((texts[0] == texts[1]).all(1).double().mean())
        lower = int((scores(model, size, texts[0]) < scores(model, size, texts[1]) - 1e-4).sum())
        if lower or (count == 1 and same < 0.9):
            refuse(f"with {count} beams {same:.0%} of the texts agree, and {lower} of moekit's score lower")
        products = Products(model, lambda count=count: ours(model, size, count))  # type: ignore[misc]
        arms: dict[str, Step] = {
            "products alone": products,
            "moekit": lambda count=count: ours(model, size, count),  # type: ignore[misc, return-value]
            "transformers": lambda count=count: theirs(peer, size, count),  # type: ignore[misc, return-value]
        }
        seconds = interleaved(arms, rounds, warm_up=1)
        found = compared(seconds, "moekit")
        for name, clocks in found.items():
            for clock in clocks.values():
                clock["sentences_per_second"] = size.sentences / clock["median_seconds"]
            found[name]["teraflops"] = products.flops / clocks["wall"]["least_seconds"] / 1e12
            found[name]["share_of_product_rate"] = products.flops / clocks["wall"]["least_seconds"] / rate
            found[name]["peak_megabytes"] = peak_bytes(arms[name]) / 2**20
        result[f"beams {count}"] = {
            "same_texts": same,
            "lower_scores": lower,
            "arms": found,
            "milliseconds_of_parts": parts(model, arms["moekit"], rounds),
        }
    return result


def table(found: dict[str, Any]) -> str:
    """The speeds as lines of text."""
    clocks = [(key, clock) for key in ("median_ratio", "ratio_of_least") for clock in ("processor", "wall")]
    lines = [
        "time as a multiple of moekit's: medians of processor and wall time, then minima; sentences per second,",
        "share of the machine's product rate, and megabytes of memory",
    ]
    for name, group in found.items():
        if not name.startswith("beams"):
            continue
        lines.append(f"{name}: {group['same_texts']:.0%} of the texts agree, none of moekit's scores lower")
        for arm, values in group["arms"].items():
            ratios = "".join(f"{values[clock][key]:7.2f}" for key, clock in clocks)
            wall = values["wall"]["sentences_per_second"]
            share, peak = values["share_of_product_rate"], values["peak_megabytes"]
            lines.append(f"  {arm:16}{ratios}{wall:9.1f}{share:7.0%}{peak:8.1f}")
        told = ", ".join(f"{part} {spent:.0f}" for part, spent in group["milliseconds_of_parts"].items())
        lines.append(f"  milliseconds of processor time of moekit's fastest run: {told}")
    return "\n".join(lines)


# -- memory --------------------------------------------------------------------------------------------------------


def whole(size: Size, folder: Path) -> EncoderDecoder:
    """The model with all weights in memory."""
    return in_memory(size, size.experts, folder / "whole.pt")


def in_memory(size: Size, num_experts: int, file: Path) -> EncoderDecoder:
    """A model with the weights of a file, read and not mapped: mapped ones would be in memory by and by."""
    with torch.device("meta"):
        model = build(size, num_experts)
    model.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return model.eval()


def prune(size: Size, folder: Path) -> int:
    """Write the specialist of language 0: the quarter of the experts that its sentences use most."""
    model = whole(size, folder)
    source, mask = sentences(size, 0)
    layers = sparse_layers(model)
    with torch.no_grad():
        encoded = model.encode(source, mask)
        written = ours(model, size, 1, 0)
        start = written.new_ones(written.shape[0], 1)
        decoded = model.decode(torch.cat((start, written[:, :-1]), 1), encoded.hidden, mask)
    routings = zip(layers, (*encoded.routings, *decoded.routings), strict=True)
    load = {
        path: torch.bincount(routing.expert[routing.kept], minlength=size.experts).double()
        for path, routing in routings
    }
    keep = size.experts // LANGUAGES
    state = take_experts(model.state_dict(), layers, choose_experts(layers, keep, load=load))
    torch.save(state, folder / "pruned.pt")
    return keep


def peak_mb() -> float:
    """The most memory that was resident; `ru_maxrss` would begin with that of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def answer(kind: str, size: Size, folder: Path, resident: int, spare_mb: int) -> dict[str, Any]:
    """Load one kind of model and answer, within this much more address space than Python and torch have; 0 = any."""
    if spare_mb:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    model: Any = None
    start = time.perf_counter()
    if kind == "whole":
        model = whole(size, folder)
    elif kind == "pruned":
        model = in_memory(size, size.experts // LANGUAGES, folder / "pruned.pt")
    elif kind == "on demand":
        with torch.device("meta"):
            model = build(size)
        load_on_demand(model, folder / "whole.safetensors", resident=resident)
    elif kind == "transformers":
        model = open_theirs(folder / "theirs")
    loaded = time.perf_counter()
    texts = None if model is None else (theirs if kind == "transformers" else ours)(model, size, 1, 0)
    done = time.perf_counter()
    banks = [m for m in model.modules() if isinstance(m, ExpertsOnDemand)] if isinstance(model, nn.Module) else []
    return {
        "peak_mb": peak_mb(),
        "load_seconds": loaded - start,
        "answer_seconds": done - loaded,
        "texts": None if texts is None else texts.tolist(),
        "experts_fetched": sum(bank.loads for bank in banks),
    }


def child(
    kind: str, options: argparse.Namespace, folder: Path, resident: int, spare_mb: int = 0
) -> dict[str, Any] | None:
    """`answer` in a process of its own; None if that had too little memory."""
    command = [sys.executable, __file__, "--size", options.size, "--threads", str(options.threads)]
    command += ["--child", kind, "--folder", str(folder), "--resident", str(resident), "--spare-mb", str(spare_mb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if spare_mb and any(word in done.stderr for word in ("MemoryError", "allocate memory", "Cannot allocate")):
            return None
        refuse(f"{kind} failed\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(options: argparse.Namespace, size: Size, folder: Path) -> dict[str, Any]:
    """Peak memory of every kind."""
    kept = prune(size, folder)
    expert_mb = 2 * size.dim * size.hidden * 4 / 2**20
    layers = 2 * (size.layers // 2)
    result: dict[str, Any] = {"experts_mb": expert_mb * size.experts * layers, "experts_of_pruned": kept, "kinds": {}}
    arms = [("nothing", 0), ("transformers", 0), ("whole", 0), ("pruned", 0)]
    arms += [("on demand", count) for count in (kept, max(1, kept // 4))]
    texts: list[list[int]] = []
    for kind, resident in arms:
        found = child(kind, options, folder, resident)
        assert found is not None
        own = found.pop("texts")
        name = f"{kind}, {resident} of {size.experts}" if resident else kind
        if kind == "whole":
            texts = own
        if texts and own:
            found["same_texts"] = sum(a == b for a, b in zip(own, texts, strict=True)) / len(texts)
        if kind == "on demand" and found["same_texts"] < 1:
            refuse("on demand writes other texts than the whole model")
        found["sha"] = None if own is None else hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]
        result["kinds"][name] = found
    # Half of what the experts need, beside what the rest and the answering take.
    spare = int(result["experts_mb"] / 2) + 100
    result["limited"] = {"spare_mb": spare}
    for kind in ("whole", "on demand"):
        found = child(kind, options, folder, max(1, kept // 4), spare)
        result["limited"][kind] = "out of memory" if found is None else "answers"
        if found is not None and found["texts"] != texts:
            refuse("with little memory the texts are others")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--only", choices=["speed", "memory"], default=None)
    parser.add_argument("--rounds", type=counted, default=9, help="counted rounds (default 9)")
    parser.add_argument("--beams", type=counted, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=counted, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="toy size, one round, no memory: does it run?")
    parser.add_argument("--json", type=written, help="write the result, with environment and commit, to this file")
    for name in ("--child", "--folder", "--resident", "--spare-mb"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--no-keep-memory", action="store_true", help="leave the C library as it is")
    options = parser.parse_args(arguments)
    kept = False if options.no_keep_memory else keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.quick:
        options.size, options.rounds, options.only = "tiny", 1, "speed"
    size = SIZES[options.size]
    if options.child:
        found = answer(options.child, size, Path(options.folder), int(options.resident), int(options.spare_mb))
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(size)
        give_languages(model, size)
        torch.save(model.state_dict(), folder / "whole.pt")
        save_file(model.state_dict(), folder / "whole.safetensors")
        export_model(model, folder / "theirs")
        result: dict[str, Any] = {
            "size": options.size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "threads": options.threads,
        }
        del model
        if options.only != "memory":
            result["speed"] = speed(size, folder, options.rounds, options.beams)
        if options.only != "speed":
            result["memory"] = memory(options, size, folder)
    if "speed" in result:
        print(table(result["speed"]))
    if "memory" in result:
        print(json.dumps(result["memory"], indent=2))
    write_json(options.json, {**result, "keeps_memory": kept})
    return 0


if __name__ == "__main__":
    sys.exit(main())
