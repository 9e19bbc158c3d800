"""`Completer`: order, languages and samples, beside a loop over single prompts."""

from __future__ import annotations

import pytest
import torch

from moekit.data.module import MultitaskData, TaskData
from moekit.data.sources import open_source
from moekit.errors import UserError
from moekit.inference import complete
from moekit.inference.completer import GAP, Completer
from moekit.transformer import DecoderOnly, EncoderDecoder, SinusoidalPositions

DIM = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MultitaskData:
    source = open_source("babel", None, languages=2, train_sentences=300)
    tasks = {name: TaskData() for name in ("causal_lm", "span_corruption", "denoising")}
    return MultitaskData(source, tasks=tasks, cache=tmp_path_factory.mktemp("cache"), vocab_size=500, test_sentences=4)


@pytest.fixture(scope="module")
def decoder(data: MultitaskData) -> DecoderOnly:
    torch.manual_seed(0)
    return DecoderOnly(data.tokenizer.vocab_size, DIM, 2, 1, 32, positions=SinusoidalPositions())


def test_prompts_are_continued_in_their_order(data: MultitaskData, decoder: DecoderOnly) -> None:
    language = data.languages[1]
    prompts = [*data.source.monolingual(language, "test")[:5], "", "x"]
    done: list[int] = []
    completer = Completer(decoder, data.tokenizer, max_new_tokens=6)
    written = completer.complete(prompts, language, advance=done.append)
    assert sum(done) == len(prompts)
    for prompt, text in zip(prompts, written, strict=True):
        ids = torch.tensor([[data.tokenizer.bos_id, *data.tokenizer.encode(prompt)]])
        alone = complete(decoder, ids, max_new_tokens=6, suppress=completer._suppress).best()[0]
        assert text == data.tokenizer.decode(alone)
    with pytest.raises(UserError, match="nosuch"):
        completer.complete(["a"], "nosuch")


def test_samples_of_a_language_model_split_the_text(data: MultitaskData, decoder: DecoderOnly) -> None:
    batches = [batch for batch in data.test_dataloader() if batch.task == "causal_lm"]
    texts = data.source.monolingual(batches[0].direction, "test")
    found = Completer(decoder, data.tokenizer, max_new_tokens=5).samples(batches[0], 2)
    assert len(found) == 2
    for row, (given, right, wrote) in enumerate(found):
        assert f"{given}{right}".replace(" ", "") == texts[int(batches[0].index[row])].replace(" ", "")
        assert isinstance(wrote, str)


def test_samples_of_damaged_text_show_the_gaps(data: MultitaskData) -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(data.tokenizer.vocab_size, DIM, 2, 1, 1, 32, positions=SinusoidalPositions())
    completer = Completer(model, data.tokenizer)
    for task in ("span_corruption", "denoising"):
        batch = next(batch for batch in data.test_dataloader() if batch.task == task)
        given, right, _ = zip(*completer.samples(batch, 4), strict=True)
        assert any(GAP in text for text in given)
        assert any(GAP in text for text in right) == (task == "span_corruption")
    assert completer.samples(batch, 0) == []
