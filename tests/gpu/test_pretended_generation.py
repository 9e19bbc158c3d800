"""Generation on a GPU: the CPU's texts, and the host looks once in eight tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import EVERY, explained, gpu
from torch import Tensor, nn

from moekit import experts, routers
from moekit.data.batch import Batch
from moekit.inference import (
    BeamSearch,
    ExpertsOnDemand,
    Greedy,
    LengthLimit,
    Sampling,
    complete,
    generate,
    load_on_demand,
)
from moekit.inference.completer import Completer
from moekit.inference.scoring import score_continuations
from moekit.inference.translator import Translator as Translator_
from moekit.layer import MoELayer
from moekit.recurrent import RecurrentLM
from moekit.routing import Capacity
from moekit.runs.writer import to_gpu
from moekit.testing import seeded
from moekit.transformer import (
    DecoderOnly,
    EncoderDecoder,
    Positions,
    RelativePositions,
    RotaryPositions,
    SplitSinusoidalPositions,
    every_other,
)

VOCAB, DIM, NEW = 23, 16, 24
SEARCHES = {
    "greedy": Greedy(),
    "sampling": Sampling(samples=2, top_k=5, seed=1),
    "nucleus": Sampling(top_p=0.8, seed=1),
    "beam": BeamSearch(3, num_return=2),
    "beam of one": BeamSearch(1),
}
POSITIONS: dict[str, Any] = {
    "none": Positions,
    "relative": lambda: RelativePositions(4),
    "rotary": RotaryPositions,
    "sinusoidal": SplitSinusoidalPositions,
}


def sparse(layer: int, side: str) -> nn.Module:
    return MoELayer(routers.TopKRouter(DIM, 4, 2), experts.GroupedMLP(4, DIM, 24))


class Ends:
    """Makes the end likelier, or texts of untrained models would all be cut at the limit."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)  # type: ignore[misc]
        return logits + 2.0 * (torch.arange(VOCAB, device=logits.device) == 2)


class Translator(Ends, EncoderDecoder):
    pass


class Language(Ends, DecoderOnly):
    pass


def model(kind: str, positions: str) -> Any:
    with seeded(0):
        feed = every_other(sparse)
        place = POSITIONS[positions]()
        if kind == "translator":
            made: Any = Translator(VOCAB, DIM, 4, 2, 2, 24, feed_forward=feed, positions=place)
        else:
            made = Language(VOCAB, DIM, 4, 2, 24, feed_forward=feed, positions=place)
        for name, weight in made.named_parameters():
            if weight.dim() > 1 and "embedding" not in name:
                weight.data.mul_(3.0)
    return made


def write(kind: str, made: Any, search: Any, device: str) -> Any:
    generator = torch.Generator().manual_seed(1) if device == "cpu" else _cpu_generator()
    ids = torch.randint(3, VOCAB, (6, 5), generator=generator, device="cpu")
    mask = torch.arange(5, device="cpu") < torch.tensor([5, 2, 4, 1, 3, 5], device="cpu")[:, None]
    ids = ids.masked_fill(~mask, 0)
    if device != "cpu":
        ids, mask = ids.to(device), mask.to(device)
    if kind == "translator":
        return lambda: generate(made, ids, mask, search=search, limit=LengthLimit(NEW - 15, 3.0))
    return lambda: complete(made, ids, mask, search=search, max_new_tokens=NEW)


def _cpu_generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(1)


@EVERY
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("translator", torch.float32),
        pytest.param("translator", torch.bfloat16, marks=pytest.mark.slow),
        ("language", torch.float32),
        pytest.param("language", torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_texts_and_few_waits(name: str, kind: str, dtype: torch.dtype, device: str) -> None:
    compare(name, kind, list(POSITIONS)[len(name) % len(POSITIONS)], dtype, device)


@EVERY
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions(positions: str, device: str) -> None:
    compare("greedy", "language", positions, torch.float32, device)


def compare(name: str, kind: str, positions: str, dtype: torch.dtype, device: str) -> None:
    """Texts of both devices; in float32 they must be the same."""
    made, search = model(kind, positions), SEARCHES[name]
    with gpu(device) as found:
        there = copy.deepcopy(made).to(dtype).to("cuda")
        run = write(kind, there, search, "cuda")
        with found.watch() as waits:
            got = run()
        assert got.ids.is_cuda
        got = torch.utils._pytree.tree_map(lambda leaf: leaf.cpu(), got)
    if dtype == torch.float32:
        wanted = write(kind, made, search, "cpu")()
        assert torch.equal(got.ids, wanted.ids)
        assert torch.equal(got.lengths, wanted.lengths)
        assert torch.equal(got.ended, wanted.ended)
        torch.testing.assert_close(got.scores, wanted.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.token_scores, wanted.token_scores, rtol=1e-4, atol=1e-4)
        assert kind == "language" or len(set(wanted.lengths.flatten().tolist())) > 2
    explained(waits)
    steps = got.ids.shape[-1] + 5
    # Beside the looks: what is given, the longest text, and of prompts and sources what their masks hold.
    assert sum(waits.values()) <= steps // 8 + 5, list(map(str, waits.items()))


COMPETING: dict[str, Any] = {
    "a capacity": lambda: routers.TopKRouter(DIM, 4, 1, capacity=Capacity(1.0, 1.0, minimum=1), init_scale=9.0),
    "by position": lambda: routers.UniformRouter(4, 2),
}


@EVERY
@pytest.mark.parametrize("kind", COMPETING)
@pytest.mark.parametrize("name", [pytest.param("sampling", marks=pytest.mark.slow), "beam"])
def test_texts_that_have_ended_take_no_room(name: str, kind: str, device: str) -> None:
    """Where rows compete for experts, those that ended leave at once, as on a CPU."""
    with seeded(0):
        layer = lambda number, side: MoELayer(COMPETING[kind](), experts.GroupedMLP(4, DIM, 24))  # noqa: E731
        made = Translator(VOCAB, DIM, 4, 2, 2, 24, feed_forward=every_other(layer), positions=Positions())
        for key, weight in made.named_parameters():
            if weight.dim() > 1 and "embedding" not in key:
                weight.data.mul_(3.0)
    wanted = write("translator", made, SEARCHES[name], "cpu")()
    assert len(set(wanted.lengths.flatten().tolist())) > 2
    with gpu(device):
        got = write("translator", copy.deepcopy(made).to("cuda"), SEARCHES[name], "cuda")().ids.cpu()
    assert torch.equal(got, wanted.ids)


@EVERY
def test_experts_on_demand_come_to_the_gpu(tmp_path: Path, device: str) -> None:
    with seeded(0):
        layer = sparse(0, "encoder").eval()
    torch.save({"state_dict": layer.state_dict()}, tmp_path / "last.ckpt")
    x = torch.randn(9, DIM)
    wanted = layer(x).hidden.detach()
    with torch.device("meta"):
        small = sparse(0, "encoder")
    small = load_on_demand(small, tmp_path / "last.ckpt", resident=2)
    with gpu(device), torch.inference_mode():
        there = small.to("cuda")
        got = there(x.to("cuda")).hidden
        assert got.is_cuda
        bank = there.experts
        assert isinstance(bank, ExpertsOnDemand)
        assert bank.held
        assert {tensor.device.type for held in bank._held.values() for tensor in held.values()} == {"cuda"}
        torch.testing.assert_close(got.cpu().clone(), wanted, rtol=1e-4, atol=1e-5)
        small.to("cpu")
    torch.testing.assert_close(small(x).hidden.detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@EVERY
@pytest.mark.parametrize("kind", ["translator", "language", "recurrent"])
def test_scores_are_the_cpus_and_every_wait_says_why(kind: str, device: str) -> None:
    with seeded(0):
        made: Any = RecurrentLM(VOCAB, DIM, sparse(0, "decoder")) if kind == "recurrent" else model(kind, "none")
    contexts, continuations = [[1, 5, 6], [1, 7], [1, 8, 9, 4]], [[4, 5], [6], [7, 8, 9]]
    wanted = score_continuations(made, contexts, continuations)
    with gpu(device) as found:
        there = copy.deepcopy(made).to("cuda")
        with found.watch() as waits:
            got = score_continuations(there, contexts, continuations)
        explained(waits)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class Letters:
    """A tokenizer of letters."""

    bos_id, eos_id, pad_id, mask_id, first_text_id = 1, 2, 0, 3, 4
    sentinel_ids = ()

    def tag_id(self, language: str) -> int:
        return 3

    def language_id(self, language: str) -> int:
        return 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[4 + ord(letter) % (VOCAB - 4) for letter in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@EVERY
def test_sentences_are_written_on_the_gpu(device: str) -> None:
    tokenizer: Any = Letters()
    translator, language = model("translator", "none"), model("language", "none")
    texts = ["abc", "d", "", "efgh", "ijk"]

    ids, mask = torch.randint(4, VOCAB, (3, 7)), torch.arange(7) < torch.tensor([7, 5, 4])[:, None]
    number = torch.zeros(3, dtype=torch.int64)
    batches = [Batch(task, ids, mask, ids, mask, None, number, number) for task in ("causal_lm", "denoising")]

    def run(translator: Any, language: Any, batches: Any) -> list[Any]:
        writer = Completer(language, tokenizer, max_new_tokens=9)
        made = Translator_(translator, tokenizer, search=Greedy(), limit=LengthLimit(6, 1.0))
        samples = [Completer(m, tokenizer).samples(b, 2) for m, b in zip((language, translator), batches, strict=True)]
        return [writer.complete(texts, "en"), made.translate(texts, "en", "de"), samples]

    wanted = run(translator, language, batches)
    assert all(len(rows) == 2 for rows in wanted[-1])
    with gpu(device) as found:
        there = [copy.deepcopy(one).to("cuda") for one in (translator, language)]
        moved = [batch.to("cuda") for batch in batches]
        with found.watch() as waits:
            got = run(*there, moved)
        explained(waits)
    assert got == wanted


def test_generate_goes_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = nn.Linear(2, 2)
    with gpu():
        assert to_gpu(made, "auto").weight.is_cuda
        assert to_gpu(made.to("cpu"), "cpu").weight.device.type == "cpu"
    assert to_gpu(nn.Linear(2, 2), "auto").weight.device.type == "cpu"
