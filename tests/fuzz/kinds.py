"""What is damaged: for each kind of file one that is right, and how it is read.

A new kind is a `Kind`, and a line in `KINDS`; those of text are in data_files.py.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from adopted import make_adopted, odd_setting, read_adopted
from data_files import DATA_FILES
from harness import Kind, Outcome
from mutations import BYTES, change_value, odd_yaml, quote
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from tiny_corpus import TinySource

from moekit.data.cache import check_contents
from moekit.data.held_out import Corpus, HeldOut
from moekit.data.store import TokenStore, Wanted, cached_store
from moekit.data.tokenizer import Tokenizer, train_tokenizer
from moekit.errors import UserError
from moekit.huggingface import export_model, import_model
from moekit.parallel import Checkpointer, export_safetensors, import_safetensors
from moekit.report.reading import read_run
from moekit.runs import Run
from moekit.runs.plain import as_plain
from moekit.runs.recipe import find_recipe
from moekit.runs.surgery.compensating import copies_of
from moekit.source import Direction
from moekit.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from moekit.training.checkpoint_state import load_state
from moekit.training.loggers import CsvLogger
from moekit.transformer import EncoderDecoder, RMSNorm

WANTED = Wanted(((Direction("aa", "bb"), "train"), (Direction("aa", "bb"), "test")), (("cc", "train"),))


def fuzz(name: str, room: Path, seeds: range) -> Outcome:
    """Damage a kind once for each seed, and read it."""
    kind = KINDS[name]
    right = room / "right"
    if not right.exists():
        kind.make(right)
    expected = kind.read(right)
    outcome = Outcome(Counter(), [])
    for seed in seeds:
        (room / "seed").write_text(str(seed))  # of the last one begun, should it end the process
        chance = random.Random(f"{name} {seed}")
        place = room / f"damaged-{seed}" / right.name
        place.parent.mkdir()
        shutil.copytree(right, place) if right.is_dir() else shutil.copy(right, place)
        files = sorted(f for f in place.rglob(kind.only) if f.is_file()) if place.is_dir() else [place]
        file, damage = chance.choice(files), chance.choice(kind.damage)
        if damage is change_value and file.suffix != ".json":
            damage = BYTES[0]
        damaged = damage(file.read_bytes(), chance)
        unchanged = damaged == file.read_bytes()
        file.write_bytes(damaged)
        what = f"{name}, seed {seed}, {damage.__name__} of {file.relative_to(place.parent)}"
        try:
            content = kind.read(place)
        except UserError as error:
            outcome.counts["refused"] += 1
            if unchanged or "\n" in str(error) or str(place.parent) not in str(error):
                outcome.faults.append(f"{what}: the message must be one line that names the file: {error}")
        except Exception as error:
            outcome.faults.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        else:
            if kind.known and content != expected:
                outcome.faults.append(f"{what}: other content was taken")
            if kind.digested and content != expected and content[0] == expected[0]:
                outcome.faults.append(f"{what}: other content has the digest of the right one")
            outcome.counts["unchanged" if unchanged else "right all the same" if content == expected else "read"] += 1
        shutil.rmtree(place.parent)
    return outcome


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Embedding(3, 4))


def _optimizer(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _plain(tree: Any) -> Any:
    """Something that `==` compares, types and shapes included."""
    if isinstance(tree, Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.detach().contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _make_file(place: Path) -> None:
    net = _net()
    state = {"state_dict": net.state_dict(), "optimizer_states": [_optimizer(net).state_dict()], "epoch": 3}
    AtomicCheckpointIO().save_checkpoint({**state, "moekit_config": {"train": {"lr": 1e-3}}}, place)


def _read_file(place: Path) -> Any:
    """As a run that goes on reads it, and as all others do."""
    whole, state = load_checkpoint(place), load_state(place)
    assert _plain(whole["state_dict"]) == _plain(state.weights)
    return _plain(whole)


def _make_folder(place: Path) -> None:
    net = _net()
    Checkpointer().save(place, net, [_optimizer(net)], extra={"checkpoint": {"epoch": 3}, "model_key": "state_dict"})


def _read_folder(place: Path) -> Any:
    state = load_state(place)
    return _plain([state.weights, state.named_optimizer, state.rest])


def _make_weights(place: Path) -> None:
    export_safetensors(_net(), place)


def _read_weights(place: Path) -> Any:
    net = _net()
    import_safetensors(place, net)
    state = load_state(place.rename(place.with_suffix(".safetensors")))
    place.with_suffix(".safetensors").rename(place)
    assert _plain(state.weights) == _plain(dict(net.state_dict()))
    return _plain(state.weights)


def _make_exchange(place: Path) -> None:
    torch.manual_seed(0)
    export_model(EncoderDecoder(40, 8, 2, 1, 1, 16, norm=RMSNorm), place)


def _read_exchange(place: Path) -> Any:
    return _plain(dict(import_model(place).model.state_dict()))


# -- text --------------------------------------------------------------------------------------------------------------


def _tokenizer(room: Path) -> Tokenizer:
    return train_tokenizer(TinySource(scale=0.2), vocab_size=420, cache_dir=room.parent / "cache")


def _make_store(place: Path) -> None:
    made = cached_store(TinySource(scale=0.1), _tokenizer(place), WANTED, cache_dir=place.parent / "cache")
    shutil.copytree(made.folder, place)
    contents = place / "contents.json"
    contents.write_text(contents.read_text().replace(made.folder.name, place.name))


def _content(store: TokenStore) -> Any:
    return {
        name: [row.tolist() for row in store.read(store.starts(name), store.lengths(name))] for name in store.sections
    }


def _read_store(place: Path) -> Any:
    check_contents(place)
    return _content(TokenStore(place))


def _read_store_unchecked(place: Path) -> Any:
    """As a worker opens it, after the process that checked it."""
    store = TokenStore(place)
    with contextlib.suppress(IndexError, ValueError, MemoryError):  # of offsets, which `check_contents` compares
        _content(store)
    return None


def _make_tokenizer(place: Path) -> None:
    _tokenizer(place).save(place)


def _read_tokenizer(place: Path) -> Any:
    found = Tokenizer.load(place)
    return found.fingerprint, found.languages, found.encode("bada bidi")


# -- run folders -------------------------------------------------------------------------------------------------------


def _make_held_out(place: Path) -> None:
    texts = {"test/aa-bb/source": ["a b", "c"], "test/aa-bb/target": ["d", "e f"], "valid/aa": ["a b", "c"]}
    held_out = HeldOut(
        name="tiny", languages=("aa", "bb"), directions=(Direction("aa", "bb"),), tasks=("translation",),
        limits={"valid": None, "test": 2}, settings={"data.source": "tiny"},
        corpus=Corpus("0" * 8, {"train/aa": 9}, {}), sections=texts,
    )  # fmt: skip
    with place.open("wb") as file:
        held_out.write(file)


def _read_held_out(place: Path) -> Any:
    found = HeldOut.read(place)
    return found.fingerprint(), found.languages, found.directions, dict(found.sections), found.corpus


_LAYER = {"name": "encoder.1", "num_experts": 2, "load": [0.5, 0.5], "load_by_language": {"aa": [0.4, 0.6]}}
_RECORDS: dict[str, Any] = {
    "summary.json": {
        "version": 1, "recipe": "switch", "variant": "tiny", "steps": 20, "tokens": 999, "loss": {"translation": 2.5},
        "data": {"source": "babel", "languages": ["aa"], "directions": ["aa-bb"], "sentences": {"translation": 9}},
        "bleu": {"average": 1.5, "directions": {"aa-bb": 1.5}}, "parameters": {"total": 9, "active": 5},
        "peak_memory": {"bytes": 9, "where": "host"}, "wall_seconds": 3.5, "perplexity": {"translation": 9.0},
    },
    "routing.json": {"languages": ["aa", "bb"], "layers": [_LAYER]},
    "samples.json": [{"direction": "aa-bb", "source": "a", "reference": "b", "hypothesis": "c"}],
    "environment.json": {"python": "3.11", "packages": {"torch": "2.11"}},
    "surgery.json": {"operation": "upcycle", "compensated_copies": 2.0},
}  # fmt: skip


def _make_configuration(place: Path) -> None:
    recipe = find_recipe("switch", "")
    variant, settings = next(iter(recipe.variants.items()))
    place.mkdir()
    plain = {"recipe": "switch", "variant": variant, **as_plain(settings.config)}
    (place / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))


def _read_configuration(place: Path) -> None:
    assert Run.open(place).config is not None


def _make_records(place: Path) -> None:
    place.mkdir()
    for name, record in _RECORDS.items():
        (place / name).write_text(json.dumps(record))


def _read_records(place: Path) -> None:
    """All of them, as the report sees them and as commands do, whatever the others say."""
    run = Run(place)
    read_run(place)
    wrong = []
    for look in (lambda: run.summary, lambda: run.routing, lambda: run.samples, lambda: copies_of(run)):
        try:
            look()
        except UserError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0]


def _make_metrics(place: Path) -> None:
    place.mkdir()
    logger = CsvLogger(place)
    logger.continue_from(0)
    for step in range(900):
        logger.log_metrics({"epoch": step // 300, "train/loss": 9 / (step + 1), "valid/loss": 1e-3 * step}, step)
    logger.save()


def _read_metrics(place: Path) -> None:
    """As the report does, and as a run that goes on does, which writes them again."""
    read_run(place)
    CsvLogger(place).continue_from(700)
    read_run(place)


KINDS = {
    "checkpoint of one file": Kind(_make_file, _read_file),
    "sharded checkpoint": Kind(_make_folder, _read_folder, (*BYTES, change_value)),
    "weights of one file": Kind(_make_weights, _read_weights),
    "weights of an exchange folder": Kind(_make_exchange, _read_exchange, only="*.safetensors"),
    "settings of an exchange folder": Kind(
        _make_exchange, _read_exchange, (*BYTES, *[change_value] * 12), known=False, only="*.json"
    ),
    "settings of an adopted model": Kind(
        make_adopted, read_adopted, (change_value, *[odd_setting] * 4), known=False, only="config.json"
    ),
    "token store": Kind(_make_store, _read_store, (*BYTES, *[change_value] * 6)),
    "token store, unchecked": Kind(_make_store, _read_store_unchecked, (*BYTES, *[change_value] * 9), known=False),
    "tokenizer": Kind(_make_tokenizer, _read_tokenizer, (*BYTES, *[change_value] * 4)),
    "held-out text": Kind(_make_held_out, _read_held_out),
    "configuration of a run": Kind(
        _make_configuration, lambda p: Run.open(p).config, (*BYTES, *[odd_yaml] * 12), known=False
    ),
    "metrics of a run": Kind(_make_metrics, _read_metrics, (*BYTES, *[quote] * 2), known=False, least=0),
    "records of a run": Kind(_make_records, _read_records, (*BYTES, *[change_value] * 12), known=False),
    **DATA_FILES,
}
