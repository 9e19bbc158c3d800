"""Checkpoint folders that are broken, tampered with or of another model: data and not code, refused by name."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_net import trained
from torch import nn

from moekit.errors import UserError
from moekit.parallel import Checkpointer, consolidate, verify_checkpoint
from moekit.parallel.checkpoint import index


def load(path: Path) -> None:
    """Where it is refused, model and optimizer are as they were."""
    net, made = trained(1, seed=3)
    before = copy.deepcopy((net.state_dict(), made.state_dict()))
    try:
        Checkpointer().load(path, net, [made])
    except UserError:
        torch.testing.assert_close((net.state_dict(), made.state_dict()), before, rtol=0, atol=0)
        raise


def shard(path: Path) -> Path:
    return next(path.glob("data-*/rank_00000.safetensors"))


def rewrite_index(path: Path, change: Callable[[Any], None], *, honest: bool = True) -> None:
    """Change the index; an attacker, or another program, may also make its digest fit."""
    file = path / "index.json"
    raw = json.loads(file.read_text())
    change(raw)
    if honest:
        raw.pop("digest")
        raw["digest"] = index._digest(raw)
    file.write_text(json.dumps(raw))


def test_truncated_shards_are_refused_by_name(saved: Path) -> None:
    content = shard(saved).read_bytes()
    for length in (len(content) - 1, len(content) // 2, 4, 0):
        shard(saved).write_bytes(content[:length])
        for call in (load, verify_checkpoint, lambda path: consolidate(path, path / "x.safetensors")):
            with pytest.raises(
                UserError, match=r"rank_00000\.safetensors must be a whole safetensors file.*Use another"
            ):
                call(saved)
    shard(saved).unlink()
    with pytest.raises(UserError, match=r"is broken: there is no file .*rank_00000\.safetensors"):
        load(saved)


def test_tampered_shards_are_refused_by_name(saved: Path) -> None:
    tensors = load_file(shard(saved))
    for key in ("model/moe.experts.w_in@0,0,0", "optimizer/0/moe.experts.w_in/exp_avg@0,0,0"):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[key].view(-1)[5] += 1e-3
        save_file(changed, shard(saved))
        for call in (load, verify_checkpoint):
            with pytest.raises(UserError, match=rf"rank_00000\.safetensors was altered .*{key.partition('@')[0]}"):
                call(saved)
    del changed[key]
    save_file(changed, shard(saved))
    with pytest.raises(UserError, match=r"rank_00000\.safetensors has no tensor optimizer/0/moe"):
        load(saved)
    # The other way round: as many bytes under the name of another tensor.
    swapped = dict(tensors)
    swapped[key], swapped[key.replace("avg@", "avg_sq@")] = tensors[key.replace("avg@", "avg_sq@")], tensors[key]
    save_file(swapped, shard(saved))
    with pytest.raises(UserError, match="was altered"):
        load(saved)


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_no_pickle_is_executed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    plain = next(saved.glob("data-*/plain.pt"))
    before = plain.read_bytes()
    malicious = [pickle.dumps(Payload())]
    torch.save({"state": {}, "extra": Payload()}, plain)
    malicious.append(plain.read_bytes())
    for content in malicious:
        plain.write_bytes(content)
        with pytest.raises(UserError, match=r"plain\.pt was altered"):
            load(saved)

        # Even where the digests were made to fit.
        def fit(raw: Any, content: bytes = content) -> None:
            import hashlib

            raw["plain"][1] = hashlib.sha256(content).hexdigest()

        rewrite_index(saved, fit)
        with pytest.raises(UserError, match=r"tensors and plain data only: .*Nothing in it has been executed"):
            load(saved)
    assert not Path("executed").exists()

    # A folder of torch's own format: its metadata is a pickle, which is not looked at.
    other = saved.parent / "other"
    other.mkdir()
    (other / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"\.metadata file, a pickle of torch's own format, which is not read"):
        load(other)
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload works
    assert Path("executed").exists()
    assert before


def test_the_index_is_checked(saved: Path) -> None:
    good = (saved / "index.json").read_text()
    bank = "model/moe.experts.w_in"

    def expect(change: Callable[[Any], None], message: str, *, honest: bool = True) -> None:
        (saved / "index.json").write_text(good)
        rewrite_index(saved, change, honest=honest)
        with pytest.raises(UserError, match=message):
            load(saved)

    def halve(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][1][0] = 2

    def double(raw: Any) -> None:
        chunks = raw["tensors"][bank]["chunks"]
        chunks.append(copy.deepcopy(chunks[0]))

    def overlap(raw: Any) -> None:
        chunks = raw["tensors"][bank]["chunks"]
        first, second, third = (copy.deepcopy(chunks[0]) for _ in range(3))
        first[1][0] = 2
        second[0][0], second[1][0], second[3] = 1, 2, "other"
        third[0][0], third[1][0], third[3] = 3, 1, "third"
        raw["tensors"][bank]["chunks"] = [first, second, third]

    def outside(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][0][0] = 1

    def elsewhere(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][2] = "../secret.safetensors"

    def absolute(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][2] = "/etc/passwd"

    def flat(raw: Any) -> None:
        raw["tensors"][bank]["chunks"][0][0] = [0]

    def negative(raw: Any) -> None:
        raw["tensors"][bank]["shape"][0] = -4

    def typed(raw: Any) -> None:
        raw["tensors"][bank]["dtype"] = "torch.complex64"

    def none(raw: Any) -> None:
        raw["tensors"] = None

    expect(lambda raw: raw["tensors"].pop(bank), "was altered after it was written: its digest", honest=False)
    expect(halve, r"not complete: of model/moe\.experts\.w_in.*256 of 512 numbers; nothing at 2, 3 of its first")
    expect(lambda raw: raw["tensors"][bank]["chunks"].clear(), r"0 of 512 numbers; nothing at 0, 1, 2, 3 of")
    expect(double, r"gives the same bytes, model/moe\.experts\.w_in@0,0,0 .* one of them is missing")
    expect(overlap, r"holds parts of model/moe\.experts\.w_in twice, at \(1, 0, 0\) and at \(0, 0, 0\)")
    expect(outside, r"lies outside of its shape \(4, 8, 16\)")
    for change in (elsewhere, absolute, flat, negative, typed, none):
        expect(change, r"index\.json is not a checkpoint's index")
    expect(lambda raw: raw.update(format=2), r"must have format 1: got 2")

    (saved / "index.json").write_text("[1]")
    with pytest.raises(UserError, match="must have format 1: got 'list'"):
        load(saved)
    (saved / "index.json").write_text(good[:-30])
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        load(saved)
    (saved / "index.json").write_text(good)
    load(saved)


def test_other_models_and_optimizers(saved: Path) -> None:
    net, made = trained()
    with pytest.raises(
        UserError, match=r"of another model: it has no 0\.bias, 0\.weight, and the model has no .* more"
    ):
        Checkpointer().load(saved, nn.Sequential(nn.Linear(2, 2)))
    net.moe.experts.w_in = nn.Parameter(torch.zeros(8, 8, 16))
    with pytest.raises(UserError, match=r"moe\.experts\.w_in has shape \(4, 8, 16\) there and \(8, 8, 16\) here"):
        Checkpointer().load(saved, net)
    net, made = trained()
    with pytest.raises(UserError, match="state of 2 optimizers: it has that of 1"):
        Checkpointer().load(saved, net, [made, made])
    with pytest.raises(
        UserError, match=r"groups the parameters of optimizer 0 otherwise: 2 groups of 7, 1 there, 1 groups of 8"
    ):
        Checkpointer().load(saved, net, [torch.optim.SGD(net.parameters())])
    with pytest.raises(ValueError, match="must work on the model's parameters: got one of shape \\(2, 2\\)"):
        Checkpointer().save(saved, net, [torch.optim.SGD(nn.Linear(2, 2).parameters())])
    with pytest.raises(TypeError, match=r"must be numbers, strings, tensors, and lists .*a Path to a string"):
        Checkpointer().save(saved, net, extra={"folder": Path("x")})
    with pytest.raises(UserError, match="There is no checkpoint at"):
        load(saved / "nothing")
    (saved.parent / "empty").mkdir()
    with pytest.raises(UserError, match=r"There is no index\.json, so no checkpoint, in"):
        load(saved.parent / "empty")
