"""What is read back: JSON and YAML of absurd shapes, archives and safetensors that are not as they were written."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.errors import UserError
from moekit.mapped import read_notes, read_safetensors, write_safetensors
from moekit.parallel import verify_checkpoint
from moekit.stored import check_archive, checksum, parse_json, parse_yaml
from moekit.training import checkpoint_io
from moekit.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint


@pytest.mark.parametrize(
    "text", ['{"a": [1, -2.5e3, "é", null, true]}', "[]", "18446744073709551615", "-9223372036854775808"]
)
def test_json_is_json(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("1" + "0" * 30, "31 digits"),
        ("9" * 5_000, "digit"),
        ("18446744073709551616", "must fit into 64 bits"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        (b"\xff{}", "can't decode"),
    ],
)
def test_what_is_no_json_is_a_value_error(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_yaml() -> None:
    assert parse_yaml("a: 1e-3\nb: [x, null]\n") == {"a": "1e-3", "b": ["x", None]}
    for text in (
        "{" * 5_000,
        "a: !!bool x",
        "a: !!int",
        "a: 2020-99-99",
        "? [a]\n: b",
        "a: !!python/name:os.system",
        "a: '",
    ):
        with pytest.raises(ValueError, match=r"\S") as caught:
            parse_yaml(text)
        assert "\n" not in str(caught.value)


STATE = {"state_dict": {"a": torch.arange(600.0), "b": torch.arange(7)}, "epoch": 3}


def test_every_flipped_bit_of_a_tensor_or_of_plain_data_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    right = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        inside = [(record.header_offset + 200, record) for record in archive.infolist() if record.file_size > 300]
    assert inside
    for first, record in inside:
        for place in range(first, first + record.file_size - 200, 97):
            path.write_bytes(right[:place] + bytes([right[place] ^ 8]) + right[place + 1 :])
            with pytest.raises(UserError, match=r"cannot be read \(it is not as it was written in its record"):
                load_checkpoint(path)
            with pytest.raises(UserError, match="is broken: it is not as it was written"):
                verify_checkpoint(path)
    path.write_bytes(right)
    verify_checkpoint(path)
    assert torch.equal(load_checkpoint(path)["state_dict"]["a"], STATE["state_dict"]["a"])  # type: ignore[index]


def test_what_is_no_archive_of_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for content in (b"", b"\x80\x02}q\x00.", b"PK\3\4" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a zip file"):
            check_archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", "x" * 999)
    with pytest.raises(UserError, match="it is compressed"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="it is no regular file"):
        load_checkpoint(tmp_path)


def test_a_file_that_stays_as_it_is_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looked = tmp_path / "last.ckpt", []
    monkeypatch.setattr(checkpoint_io, "check_archive", lambda place: looked.append(place))
    for _ in range(2):
        AtomicCheckpointIO().save_checkpoint(STATE, path)
        load_checkpoint(path)
        load_checkpoint(path, mmap=True)
    os.utime(path, ns=(1, 1))
    load_checkpoint(path)
    assert looked == [path] * 3, "once as it is written first and anew, and once as it is touched"


def test_our_safetensors_are_compared_with_their_digests(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(600.0), "b": torch.zeros(0, 3), "c": torch.tensor(True)}
    write_safetensors(tensors, path, {"more": "é"})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert read_notes(path)["format"] == "pt"
    assert {name: stored.tensor().tolist() for name, stored in read_safetensors(path).items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    right = path.read_bytes()
    for place in range(8, len(right), 41):
        path.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
        with pytest.raises(UserError, match=str(path)):
            read_safetensors(path)
    renamed = right.replace(b'"a":{', b'"d":{')
    assert renamed != right
    path.write_bytes(renamed)
    with pytest.raises(UserError, match="its header was altered after it was written"):
        read_safetensors(path, verify=False)


def test_safetensors_of_other_programs_have_no_digests_and_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path, metadata={"format": "pt"})
    assert read_safetensors(path)["a"].tensor().tolist() == [1, 1, 1]
    verify_checkpoint(path)


def test_checksum_is_that_of_zlib(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123456789")
    assert checksum(tmp_path / "x") == 0xCBF43926  # the check value of CRC-32


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"b": [{"x": {}, "a": 1, "a": 1}]}', b'{"a": null, "\\u0061": 0}']
)
def test_a_key_that_is_there_twice_is_refused_but_in_lines_of_text(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        parse_json(text)
    assert parse_json(text, repeated=True) == json.loads(text)
    assert parse_json('{"a": {"b": 1}, "b": 1}') == {"a": {"b": 1}, "b": 1}
