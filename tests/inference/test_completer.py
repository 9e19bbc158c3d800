"""`Completer`: order, batches, languages and samples, beside a loop over single prompts; what a `Translator` draws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from moekit.data.module import MultitaskData, TaskData
from moekit.data.sources import open_source
from moekit.errors import UserError
from moekit.inference import BeamSearch, Greedy, Sampling, complete
from moekit.inference.completer import GAP, Completer
from moekit.inference.interface import Search
from moekit.inference.translator import Translator
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


SEARCHES: list[Search] = [Greedy(), BeamSearch(3, num_return=2), Sampling(1.2, top_p=0.9, seed=3)]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_batches_hold_no_more_tokens_than_they_may(data: MultitaskData, decoder: DecoderOnly, search: Search) -> None:
    """And what is written does not depend on them."""
    language = data.languages[1]
    prompts = [*data.source.monolingual(language, "test")[:3], *["", "x", "x x"] * 4]
    lengths = [1 + len(data.tokenizer.encode(prompt)) for prompt in prompts]
    options = {"search": search, "max_new_tokens": 6}
    whole = Completer(decoder, data.tokenizer, **options).hypotheses(prompts, language)  # type: ignore[arg-type]
    for batch_tokens in (1, 7, 4096):
        done: list[int] = []
        completer = Completer(decoder, data.tokenizer, batch_tokens=batch_tokens, **options)  # type: ignore[arg-type]
        found = completer.hypotheses(prompts, language, advance=done.append)
        assert [[x.text for x in texts] for texts in found] == [[x.text for x in texts] for texts in whole]
        expected = []
        for length, rows in sorted(Counter(lengths).items()):
            most = max(1, batch_tokens // length)
            expected += [most] * (rows // most) + [rows % most] * (rows % most > 0)
        assert done == expected
    later = completer.hypotheses(prompts[4:], language, first_number=4)
    assert [texts[0].text for texts in later] == [texts[0].text for texts in whole[4:]]
    if isinstance(search, Sampling):
        assert len({texts[0].text for texts in whole[3::3]}) == 4, "a prompt that comes again is continued anew"


@pytest.fixture(scope="module")
def translator(data: MultitaskData) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(data.tokenizer.vocab_size, DIM, 2, 1, 1, 32, positions=SinusoidalPositions())


def test_drawn_translations_do_not_depend_on_batches(data: MultitaskData, translator: EncoderDecoder) -> None:
    source, target = data.languages[:2]
    sentences = [*["x x"] * 6, "", *data.source.monolingual(source, "test")[:3], "x x"]

    def drawn(batch_tokens: int, seed: int | None = 0) -> list[str]:
        torch.manual_seed(1)
        made = Translator(translator, data.tokenizer, search=Sampling(seed=seed), batch_tokens=batch_tokens)
        return made.translate(sentences, source, target)

    whole = drawn(4096)
    assert drawn(1) == drawn(17) == whole
    assert len(set(whole)) == len(whole)
    assert whole[6] == ""
    assert drawn(1, None) == drawn(17, None) == drawn(4096, None)
    assert drawn(1, None) != whole
    made = Translator(translator, data.tokenizer, search=Sampling(seed=0))
    assert made.translate(sentences[4:], source, target, first_number=4) == whole[4:]


def test_rows_of_evaluation_draw_by_their_places_in_the_text(
    data: MultitaskData, decoder: DecoderOnly, translator: EncoderDecoder
) -> None:
    batch = next(batch for batch in data.test_dataloader() if batch.task == "denoising")
    assert batch.index is not None
    assert len(batch) > 2
    made = Translator(translator, data.tokenizer, search=Sampling(seed=0))
    whole = made.batch(batch)
    alone = [
        replace(
            batch,
            source=batch.source[i : i + 1],
            source_mask=batch.source_mask[i : i + 1],
            source_language=batch.source_language[i : i + 1],
            target_language=batch.target_language[i : i + 1],
            index=batch.index[i : i + 1],
            target=None,
            target_mask=None,
        )
        for i in range(len(batch))
    ]
    assert [made.batch(row)[0] for row in alone] == whole

    text = next(batch for batch in data.test_dataloader() if batch.task == "causal_lm")
    assert text.target is not None
    assert text.target_mask is not None
    again = replace(text, target=text.target[:1].expand(4, -1), target_mask=text.target_mask[:1].expand(4, -1))
    again = replace(again, source=again.source[:1].expand(4, -1), index=torch.arange(4))
    again = replace(again, target_language=text.target_language[:1].expand(4))
    wrote = [row[2] for row in Completer(decoder, data.tokenizer, search=Sampling(seed=0)).samples(again, 4)]
    assert len(set(wrote)) == 4
