"""Train one small causal language model with every router of moekit in turn, and draw what they do.

    python docs/guides/compare_routers.py --steps 200 --out routers.png

The text is generated: four languages, each a Markov chain over the same words, so that there is something to route by.
The model is a two-layer decoder whose second layer is sparse. Nothing but the router changes from run to run: initial
weights outside of it, data and order are the same. The picture has four panels: loss, load balance (the heaviest
expert's load over the mean), active experts per token, and time per step, whose bars are also the legend.

To compare a router of your own, add a line to `routers`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

import moekit as mk
from moekit import routers as r
from moekit import transformer as tr
from moekit.experts import Experts, GroupedMLP, MultiHashMLP

DIM, HIDDEN, EXPERTS = 32, 64, 8
WORDS, LANGUAGES, LENGTH, BATCH = 64, 4, 32, 8

# What the papers weigh a router's losses with; a router that returns none of them is not regularised.
WEIGHTS = {"load_balance": 1e-2, "router_z": 1e-3, "importance": 0.1, "load": 0.1, "sparsity": 1.0}

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Entry:
    """A router to compare.

    Attributes:
        router: builds it.
        experts: builds its bank; None = two-layer experts, as many as the router chooses from.
        weights: of its losses where they are not those of `WEIGHTS`.
    """

    router: Callable[[], mk.Router]
    experts: Callable[[], Experts] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


def routers(batches: Sequence[Batch]) -> dict[str, Entry]:
    """Every router class or its preset, by name; what follows a comma tells several of one name apart.

    Those that look at later tokens leak the future in a causal model. They run here because ``allow_future=True`` says
    that this is known; the picture marks them. Tables of hash routers are made from the text that is trained on.
    """
    size, steps = (DIM, EXPERTS), len(batches)
    pairs = torch.zeros(WORDS, WORDS).index_put_(
        (torch.cat([words[:, :-1] for words, _ in batches]), torch.cat([words[:, 1:] for words, _ in batches])),
        torch.ones(()),
        accumulate=True,
    )
    counts = pairs.sum(1).to(torch.int64)
    meaning = pairs / pairs.sum(1, keepdim=True).clamp_min(1)  # words with the same successors lie close together
    return {
        # A token chooses one expert.
        "switch": Entry(lambda: r.switch(*size)),
        "zcode_m3": Entry(lambda: r.zcode_m3(*size, allow_future=True)),
        "CosineRouter": Entry(lambda: r.CosineRouter(*size)),
        "SinkhornRouter": Entry(lambda: r.SinkhornRouter(*size, allow_future=True)),
        "base_layers": Entry(lambda: r.base_layers(*size, allow_future=True)),
        # A token chooses several.
        "gshard": Entry(lambda: r.gshard(*size)),
        "st_moe": Entry(lambda: r.st_moe(*size)),
        "TopKRouter, re-routing": Entry(
            lambda: r.TopKRouter(
                *size, 2, capacity=mk.Capacity(train=1.0), overflow=r.NoTokenLeftBehind(), allow_future=True
            )
        ),
        "noisy_topk": Entry(lambda: r.noisy_topk(*size)),
        "HierarchicalRouter": Entry(lambda: r.HierarchicalRouter(DIM, EXPERTS // 2, 2)),
        "loss_free": Entry(lambda: r.loss_free(*size)),
        "deepseek_v3": Entry(lambda: r.deepseek_v3(*size, k=4), weights={"load_balance": 1e-4}),
        "SparseMixerRouter": Entry(lambda: r.SparseMixerRouter(*size)),
        # A token takes as many as it needs.
        "dense_to_sparse": Entry(
            lambda: r.dense_to_sparse(*size, decay_steps=max(steps // 2, 1), hard_from=3 * steps // 4)
        ),
        "remoe": Entry(lambda: r.remoe(*size)),
        # Experts choose tokens.
        "ExpertChoiceRouter": Entry(lambda: r.ExpertChoiceRouter(*size, allow_future=True)),
        # A table chooses: by word, neighbour, place or language.
        "hash_layers": Entry(lambda: r.hash_layers(EXPERTS, counts)),
        "hash_random": Entry(lambda: r.hash_random(EXPERTS, WORDS)),
        "hash_previous": Entry(lambda: r.hash_previous(EXPERTS, counts)),
        "hash_bigram": Entry(lambda: r.hash_bigram(EXPERTS, WORDS)),
        "hash_position": Entry(lambda: r.hash_position(EXPERTS, LENGTH)),
        "hash_clustered": Entry(lambda: r.hash_clustered(EXPERTS, meaning)),
        "hash_dispersed": Entry(lambda: r.hash_dispersed(EXPERTS, meaning)),
        "hash_oracle": Entry(lambda: r.hash_oracle(EXPERTS, counts, allow_future=True)),
        "multi_hash": Entry(lambda: r.multi_hash(EXPERTS, counts), lambda: MultiHashMLP(EXPERTS, DIM, HIDDEN)),
        "TaskRouter": Entry(lambda: r.TaskRouter(*size, num_tasks=LANGUAGES)),
        "TaskTableRouter": Entry(lambda: r.TaskTableRouter(EXPERTS, [0, 2, 4, 6])),
        # Nobody chooses.
        "UniformRouter": Entry(lambda: r.UniformRouter(EXPERTS)),
    }


def text(steps: int, seed: int = 0) -> list[Batch]:
    """Sentences Int64[B, S + 1] and their languages Int64[B] for every step; each word has four likely successors."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, WORDS, (LANGUAGES, WORDS, 4), generator=generator)
    chance = torch.tensor([0.6, 0.2, 0.1, 0.1])
    batches = []
    for _ in range(steps):
        language = torch.randint(0, LANGUAGES, (BATCH,), generator=generator)
        words = [torch.randint(0, WORDS, (BATCH,), generator=generator)]
        for _ in range(LENGTH):
            which = chance.multinomial(BATCH, replacement=True, generator=generator)
            words.append(successors[language, words[-1], which])
        batches.append((torch.stack(words, dim=1), language))
    return batches


@dataclass
class Record:
    """What one router did, step by step."""

    looks_ahead: bool = False
    loss: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of timed steps after the training

    def __str__(self) -> str:
        return f"loss {self.final_loss:.3f}   heaviest/mean {self.imbalance[-1]:.2f}   active {self.active[-1]:.2f}"

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        last = self.loss[-max(len(self.loss) // 10, 1) :]
        return sum(last) / len(last)

    @property
    def milliseconds(self) -> float:
        """Best time of a step: what others do on the machine only ever adds to it."""
        return 1000 * min(self.seconds)


class SmallLM(L.LightningModule):
    """A two-layer decoder whose second layer routes."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        torch.manual_seed(1)
        router = entry.router()
        experts = GroupedMLP(router.num_experts, DIM, HIDDEN) if entry.experts is None else entry.experts()
        self.model = tr.DecoderOnly(
            WORDS,
            DIM,
            4,
            layers=2,
            hidden_dim=HIDDEN,
            feed_forward=tr.at_layers([1], lambda *_: mk.MoELayer(router, experts)),
        )
        # Routers draw different numbers of random weights: let everything else start alike.
        torch.manual_seed(2)
        tr.init_weights(self.model)
        experts.reset_parameters()
        self.weights = {**WEIGHTS, **entry.weights}
        self.record = Record(looks_ahead=router.looks_ahead)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, mk.Routing]:
        """Cross-entropy of the next word, the same plus the router's weighted losses, and what the router did."""
        words, language = batch
        decoded = self.model.decode(words[:, :-1], language=language)
        loss = F.cross_entropy(self.model.logits(decoded.hidden).flatten(0, 1), words[:, 1:].flatten())
        routing = decoded.routings[0]
        weights = {name: weight for name, weight in self.weights.items() if name in routing.losses}
        aux, _ = mk.AuxLosses(**weights)(routing)
        return loss, loss + aux, routing

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """One step, written down."""
        loss, objective, routing = self.losses(batch)
        load = mk.routing_stats(routing).kept.float()
        self.record.loss.append(float(loss.detach()))
        self.record.imbalance.append(float(load.max() / load.mean().clamp_min(1e-9)))
        self.record.active.append(float(load.sum()) / routing.num_tokens)
        return objective

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all parameters alike."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(entry: Entry, batches: Sequence[Batch]) -> SmallLM:
    """Train a fresh model on all batches, once."""
    module = SmallLM(entry)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(batches), batch_size=None))
    return module


def time_steps(modules: Sequence[SmallLM], batches: Sequence[Batch], rounds: int = 9) -> None:
    """Time forward and backward of every trained model, in turn, so that a busy machine slows all of them alike."""
    for number in range(rounds + 1):
        for module in modules:
            start = time.perf_counter()
            module.losses(batches[number % len(batches)])[1].backward()
            if number > 0:  # the first round warms up
                module.record.seconds.append(time.perf_counter() - start)


def draw(records: Mapping[str, Record], path: Path) -> None:
    """The four panels, as PNG or whatever the path's ending names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = ("#0067a5", "#c8500a", "#00805c", "#a8508c", "#b58900", "#5b6ee1", "#7a4a2b", "#1c2430")
    dashes = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
    looks = {
        name: {"color": colours[n % len(colours)], "linestyle": dashes[n // len(colours) % len(dashes)]}
        for n, name in enumerate(records)
    }
    figure = Figure(figsize=(12, max(7.5, 2.2 + 0.28 * len(records))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, width_ratios=(1.15, 1))
    left = [figure.add_subplot(grid[row, 0]) for row in range(3)]
    panels = (
        ("loss", "loss, nats per word"),
        ("imbalance", "load: heaviest expert / mean"),
        ("active", "active experts per token"),
    )
    for axes, (quantity, title) in zip(left, panels, strict=True):
        for name, record in records.items():
            axes.plot(smooth(getattr(record, quantity)), linewidth=1.4, **looks[name])
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", color="#d9dee6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left[1].set_yscale("log", base=2)
    left[1].yaxis.set_major_formatter("{x:g}")
    left[2].set_ylim(bottom=0)
    left[2].set_xlabel("step")

    bars = figure.add_subplot(grid[:, 1])
    order = sorted(records, key=lambda name: records[name].final_loss)
    for place, name in enumerate(order):
        record = records[name]
        bars.barh(place, record.milliseconds, height=0.62, color=looks[name]["color"], alpha=0.75)
        note = f" {record.final_loss:.2f} nats" + (" †" if record.looks_ahead else "")
        bars.text(record.milliseconds, place, note, va="center", fontsize=8)
        bars.plot([-0.055, -0.01], [place, place], transform=bars.get_yaxis_transform(), clip_on=False, **looks[name])
    bars.set_yticks(range(len(order)), order, fontsize=8)
    bars.tick_params(axis="y", length=0, pad=24)
    bars.invert_yaxis()
    bars.set_ylim(len(order) - 0.4, -0.6)
    bars.margins(x=0.25)
    bars.set_title("time per step, ms; best loss first", loc="left", fontsize=10)
    bars.spines[["top", "right", "left"]].set_visible(False)
    bars.set_xlabel(
        "forward and backward after training, best of several\n"
        "† looks at later tokens: its loss in a causal model is not honest"
    )
    beside = path.with_name(f".{path.name}.part{path.suffix}")
    figure.savefig(beside, dpi=120)
    os.replace(beside, path)


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the steps."""
    window = max(len(values) // 20, 1)
    return [sum(values[max(n - window + 1, 0) : n + 1]) / min(n + 1, window) for n in range(len(values))]


def write_csv(records: Mapping[str, Record], path: Path) -> None:
    """One line per router and step."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("router", "step", "loss", "imbalance", "active", "milliseconds at the end"))
        for name, record in records.items():
            for step, values in enumerate(zip(record.loss, record.imbalance, record.active, strict=True)):
                writer.writerow((name, step, *(f"{value:.6g}" for value in (*values, record.milliseconds))))
    os.replace(beside, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Record]:
    """Train them all, time them, draw the picture; the numbers go beside it as CSV."""
    parser = argparse.ArgumentParser(description="Train one small language model with every router in turn.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps for each router")
    parser.add_argument(
        "--out", type=Path, default=Path("routers.png"), help="the picture; numbers go to the same name as .csv"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="routers whose name contains one of these")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1: got {options.steps}")
    for greeter in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(greeter).setLevel(logging.ERROR)  # at every fit
    batches = text(options.steps)
    known = routers(batches)
    chosen = {
        name: entry
        for name, entry in known.items()
        if options.only is None or any(part.lower() in name.lower() for part in options.only)
    }
    if not chosen:
        parser.error(f"no router is named like {' or '.join(options.only)}; there are: {'; '.join(known)}")

    modules = {}
    for name, entry in chosen.items():
        modules[name] = train(entry, batches)
        print(f"{name:24s} {modules[name].record}")
    time_steps(list(modules.values()), batches)
    records = {name: module.record for name, module in modules.items()}
    draw(records, options.out)
    write_csv(records, options.out.with_suffix(".csv"))
    print(f"picture: {options.out}   numbers: {options.out.with_suffix('.csv')}")
    return records


if __name__ == "__main__":
    main()
