"""Examples are read alike by fine-tuning and by the commands that measure folders."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_folder import MIXED, TEMPLATE, chat, lines, tokenizer, transformers, write_small_folder

from moekit.cli.program import main
from moekit.errors import UserError
from moekit.folder_text.encoding import IGNORED, Encoder
from moekit.folder_text.splits import kind_of_file
from moekit.folders import FolderConfig, TextConfig
from moekit.folders.data import FolderData
from moekit.huggingface import adopt_folder
from moekit.runs.folders.measuring import held_out_loss, measured_use
from moekit.runs.folders.text import FolderText, TextChoice, folder_text
from moekit.source import Split

LENGTH = 40


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    write_small_folder(place / "base")
    lines(place / "mixed.jsonl", MIXED)
    (place / "lines.txt").write_text("one line\n\nand another\nand a third\n")
    return place


def fine_tuned_on(room: Path, file: Path, source: str = "jsonl") -> FolderData:
    text = {"source": source, "path": str(file), "max_length": LENGTH, "pack": False, "batch_size": 1}
    own = tokenizer()
    config = FolderConfig(model=str(room / "base"), data=TextConfig(**text))  # type: ignore[arg-type]
    return FolderData(config, Encoder(own, max_length=LENGTH, vocab_size=len(own)))


def rows(text: FolderText) -> list[tuple[list[int], list[int]]]:
    """Ids and labels without padding."""
    found = []
    for batch in text.batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            real = mask.bool()
            assert (labels[~real] == IGNORED).all()
            found.append((ids[real].tolist(), labels[real].tolist()))
    return sorted(found)


def read(room: Path, file: Path, split: Split, source: str = "jsonl", **more: int) -> FolderText:
    return folder_text(room / "base", TextChoice(source=source, path=str(file), **{"length": LENGTH, **more}), split)


@pytest.mark.parametrize(("name", "source"), [("mixed.jsonl", "jsonl"), ("lines.txt", "text")])
def test_commands_read_what_fine_tuning_reads(name: str, source: str, room: Path) -> None:
    data = fine_tuned_on(room, room / name, source)
    assert kind_of_file(name) == source
    for split, of in (("train", data.train), ("valid", data.valid)):
        expected = sorted((one.ids.tolist(), one.labels.tolist()) for one in of.examples.examples)
        assert expected
        assert rows(read(room, room / name, split, source)) == expected  # type: ignore[arg-type]


def test_both_splits_are_of_the_day_of_their_choice(room: Path, tmp_path: Path) -> None:
    """As `curve` reads them, perhaps before midnight and after it."""
    write_small_folder(tmp_path, "{{ strftime_now('%d/%m/%y') }}" + TEMPLATE)
    file = lines(tmp_path / "chats.jsonl", [chat("a", "b")] * 4)
    choice = TextChoice(source="jsonl", path=file, length=LENGTH, date=datetime.date(2026, 7, 31))
    for split, count in (("train", 3), ("valid", 1)):
        found = rows(folder_text(tmp_path, choice, split))  # type: ignore[arg-type]
        assert [tokenizer().decode(ids) for ids, _ in found] == ["31/07/26<|user|>a<|assistant|>b</s>"] * count


def test_the_loss_is_of_learned_tokens(room: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(room / "base")
    examples = fine_tuned_on(room, room / "mixed.jsonl").train.examples.examples
    total, count = 0.0, 0
    with torch.no_grad():
        for one in examples:
            logits = model(torch.from_numpy(one.ids)[None]).logits[0, :-1]
            wanted = torch.from_numpy(one.labels)[1:]
            total += float(F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
            count += one.predicted
    text = read(room, room / "mixed.jsonl", "train")
    adopted = adopt_folder(room / "base", aux=None)
    assert held_out_loss(adopted, text) == pytest.approx(total / count, rel=1e-5)
    tokens = sum(map(len, examples))
    for use in measured_use(adopted, text).values():
        assert int(use.tokens.sum()) == 2 * tokens  # two experts of a token, and none of padding
    assert text.said == f"{tokens:,} tokens of training text (jsonl: 7 examples)"
    short = read(room, room / "mixed.jsonl", "train", length=6)
    assert short.said.endswith("of them cut to 6 tokens, 4 left out with nothing to learn)")
    some = read(room, room / "mixed.jsonl", "train", tokens=25)
    assert sum(int(batch["attention_mask"].sum()) for batch in some.batches) <= 25


def test_a_folder_has_its_own_validation_text(room: Path, tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", MIXED)
    assert "(jsonl: 7 examples)" in read(room, tmp_path, "train").said
    assert "(jsonl: 1 example)" in read(room, tmp_path, "valid").said
    lines(tmp_path / "valid.jsonl", MIXED[:2])
    assert "(jsonl: 8 examples)" in read(room, tmp_path, "train").said
    assert "(jsonl: 2 examples)" in read(room, tmp_path, "valid").said


def test_the_commands_take_a_file_of_chats(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, text = str(room / "base"), ["--data.path", str(room / "mixed.jsonl"), "--length", str(LENGTH)]
    assert main(["inspect", base, "--json", *text]) == 0
    assert sum(json.loads(capsys.readouterr().out)["layers"][0]["load"]) == pytest.approx(1)
    assert main(["prune", base, "--keep", "2", "--by", "reap", *text, "--out", str(tmp_path / "half")]) == 0
    assert "tokens of training text (jsonl: 7 examples" in (tmp_path / "half" / "README.md").read_text()
    capsys.readouterr()
    assert main(["curve", base, "--keep", "2", "--draws", "1", *text, "--out", str(tmp_path)]) == 0
    curve = json.loads((tmp_path / "pruning.json").read_text())
    assert "Validation loss of learned tokens" in (table := (tmp_path / "pruning.md").read_text())
    assert table.endswith("1 draw.\n")
    valid = read(room, room / "mixed.jsonl", "valid")
    assert curve["whole"]["loss"] == pytest.approx(held_out_loss(adopt_folder(room / "base"), valid), rel=1e-6)


def test_text_that_does_not_do(room: Path, tmp_path: Path) -> None:
    one = Path(lines(tmp_path / "one.jsonl", [chat("a", "b")]))
    assert len(rows(read(room, one, "train"))) == 1
    bad = Path(lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"txt": "b"}]))
    translated = Path(lines(tmp_path / "pairs.jsonl", [{"translation": {"en": "a", "de": "b"}}]))
    for file, split, said in (
        (one, "valid", "jsonl must have validation text"),
        (bad, "train", "line 2: the line must have the keys of one kind"),
        (room / "none.jsonl", "train", "there is nothing at"),
    ):
        with pytest.raises(UserError, match=said):
            read(room, file, split)  # type: ignore[arg-type]
    assert "jsonl: en, de" in read(room, translated, "train").said  # as everywhere else
    with pytest.raises(UserError, match="jsonl of examples has no languages to choose from"):
        folder_text(room / "base", TextChoice(source="jsonl", path=str(one), languages=["en"]), "train")
