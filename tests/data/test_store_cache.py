"""The cache under bad luck: killed builders, several at once, full and read-only disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import TinySource

from moekit.data import cache as cache_room
from moekit.data.cache import cached_folder
from moekit.data.store import Wanted, cached_store
from moekit.data.tokenizer import train_tokenizer
from moekit.errors import UserError
from moekit.source import Direction

WANTED = Wanted(parallel=((Direction.parse("aa-bb"), "train"),))


def read(folder: Path) -> str:
    return (folder / "value").read_text()


def write(folder: Path) -> None:
    (folder / "value").write_text("built")


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".old")]


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    place = tmp_path / "things" / "key"
    assert cached_folder(place, write, read) == "built"
    assert cached_folder(place, lambda _: pytest.fail("built again"), read) == "built"
    assert not left_over(tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached_folder(tmp_path / "key", fail, read)
    assert not left_over(tmp_path)
    assert not (tmp_path / "key").exists()
    assert cached_folder(tmp_path / "key", write, read) == "built"


def _get_stuck(what: str, folder: Path, stuck: Any) -> None:
    """Stop in the middle of writing, with part of a file on the disk and the lock held, and wait to be killed."""

    def half_written(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        stuck.set()
        time.sleep(120)

    tokenizer = train_tokenizer(TinySource(), vocab_size=420, cache_dir=folder) if what == "stores" else None
    Path.write_bytes = half_written  # type: ignore[assignment, method-assign]
    if tokenizer is None:
        train_tokenizer(TinySource(), vocab_size=420, cache_dir=folder)
    else:
        cached_store(TinySource(), tokenizer, WANTED, cache_dir=folder)


@pytest.mark.parametrize("what", ["tokenizers", "stores"])
def test_a_killed_build_is_never_read_and_blocks_nobody(what: str, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    stuck = fork.Event()
    process = fork.Process(target=_get_stuck, args=(what, tmp_path, stuck))
    process.start()
    assert stuck.wait(60)
    process.kill()
    process.join()
    folder = tmp_path / what
    assert left_over(folder)
    assert not [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    tokenizer = train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path)
    store = cached_store(TinySource(), tokenizer, WANTED, cache_dir=tmp_path)
    assert not left_over(tmp_path)
    fresh = train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path / "fresh")
    assert tokenizer.fingerprint == fresh.fingerprint
    assert len(store.offsets) == 801


def _ask(folder: str, start: Any, answers: Any) -> None:
    start.wait()
    source = TinySource()
    tokenizer = train_tokenizer(source, vocab_size=420, cache_dir=folder)
    store = cached_store(source, tokenizer, WANTED, cache_dir=folder)
    answers.put((tokenizer.fingerprint, len(store.tokens), int(store.tokens.sum())))


def test_processes_that_ask_at_once_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = tmp_path / "builds"
    builds.mkdir()
    replacing = os.replace

    def counted(source: Path, target: Path) -> None:
        (builds / f"{target.name}-{os.getpid()}").touch()
        replacing(source, target)

    monkeypatch.setattr(os, "replace", counted)
    fork = multiprocessing.get_context("fork")
    start, answers = fork.Event(), fork.Queue()
    processes = [fork.Process(target=_ask, args=(str(tmp_path), start, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    got = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(set(got)) == 1
    assert len(list(builds.iterdir())) == 2, "one tokenizer and one store were built, whoever did it"


def test_waiting_for_a_lock_ends_when_its_holder_does(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    held = fork.Event()

    def hold() -> None:
        with cache_room.locked(tmp_path / "key.lock"):
            held.set()
            time.sleep(120)

    holder = fork.Process(target=hold)
    holder.start()
    assert held.wait(30)
    asker = fork.Process(target=lambda: cached_folder(tmp_path / "key", write, read))
    asker.start()
    asker.join(0.3)
    assert asker.is_alive(), "the lock must be respected"
    holder.kill()
    asker.join(30)
    assert asker.exitcode == 0
    assert read(tmp_path / "key") == "built"
    holder.join()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"cache folder .*tokenizers: the disk is full; free some space\. data\.cache"),
        (errno.EDQUOT, r"cache folder .*tokenizers: the disk quota is used up.*data\.cache"),
        (errno.EROFS, r"cache folder .*tokenizers: the file system is read-only.*data\.cache"),
        (errno.EACCES, r"cache folder .*tokenizers: permission denied.*data\.cache"),
    ],
)
def test_disk_trouble_in_the_middle_names_the_folder_and_leaves_nothing(
    code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", broken)
        with pytest.raises(UserError, match=message):
            train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path)
    assert not left_over(tmp_path)
    tokenizer = train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", broken)
        with pytest.raises(UserError, match=message.replace("tokenizers", "stores")):
            cached_store(TinySource(), tokenizer, WANTED, cache_dir=tmp_path)
    assert not left_over(tmp_path)
    assert len(cached_store(TinySource(), tokenizer, WANTED, cache_dir=tmp_path).offsets) == 801


def test_a_disk_that_fills_while_tokens_are_written(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path)

    class Full(type(tokenizer)):  # type: ignore[misc]
        def encode_batch(self, texts: Any, **threads: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"stores: the disk is full"):
        cached_store(TinySource(), Full(tokenizer._model, tokenizer.languages), WANTED, cache_dir=tmp_path)
    assert not left_over(tmp_path)


def test_a_cache_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file/sub/tokenizers: .*data\.cache"):
        train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path / "file" / "sub")


def test_a_read_only_cache_that_has_the_answer_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path)

    opening = Path.open

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def read_only(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return refuse() if set(mode) & set("wax+") else opening(self, mode, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError, match="read-only"):
        train_tokenizer(TinySource(), vocab_size=421, cache_dir=tmp_path)
    assert train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path).fingerprint == before.fingerprint


def test_trouble_with_the_data_itself_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    def build(_: Path) -> None:
        Path("/nowhere/data.en").read_text()

    with pytest.raises(FileNotFoundError, match=r"/nowhere/data\.en"):
        cached_folder(tmp_path / "key", build, read)
