"""Folders and files that are replaced as a whole, and what is on the disk when."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from moekit import atomic
from moekit.atomic import (
    flush,
    followed,
    one_flush,
    replacing,
    replacing_folder,
    replacing_path,
    require_writable,
    write_text,
    writing,
)
from moekit.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(place: Path, name: str) -> None:
    with replacing_folder(place) as draft:
        assert names(draft) == []
        (draft / name).write_text(name)


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "fold[er]"
    write(place, "one")
    assert names(place) == ["one"]
    for name in (".fold[er].more.7.old", ".fold[er].more.7.tmp"):  # of another folder
        (place.parent / name).mkdir()
    write(place, "two")
    assert names(place) == ["two"]
    assert names(place.parent) == [".fold[er].more.7.old", ".fold[er].more.7.tmp", "fold[er]"]


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "x", "one")
    for name in ("x", "new"):
        with pytest.raises(IsADirectoryError), replacing_folder(tmp_path / name) as draft:
            draft.write_text("a folder is no file")
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["one"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", "one")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="cannot write x in the folder"), writing(tmp_path / "x"):
        write(tmp_path / "x", "two")
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["one"]


def _killed(place: Path, renames: int) -> None:
    """Killed when so many renames are done."""
    replace, done = os.replace, 0

    def until(source: Path, target: Path) -> None:
        nonlocal done
        if done == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        replace(source, target)

    os.replace = until  # type: ignore[assignment]
    write(place, "two")


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_loses_no_folder(tmp_path: Path, renames: int) -> None:
    place = tmp_path / "x"
    write(place, "one")
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(place, renames))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    hidden = [tmp_path / name for name in names(tmp_path) if name != "x"]
    assert len(hidden) == renames + 1
    assert place.exists() == (renames == 0)
    with pytest.raises(KeyError), replacing_folder(place):
        raise KeyError
    assert names(tmp_path) == ["x"]
    assert names(place) == ["one"]


def test_everything_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace = os.replace

    def flushed(path: Path) -> None:
        calls.append(f"flush {path.name.split('.')[1] if path.name.startswith('.') else path.name}")
        flush(path)

    def replaced(source: Path, target: Path) -> None:
        calls.append(f"replace {target.name}")
        replace(source, target)

    monkeypatch.setattr(atomic, "flush", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing_folder(tmp_path / "x") as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "a").touch()
        (draft / "deep" / "link").symlink_to("nowhere")
    assert sorted(calls[:3]) == ["flush a", "flush deep", "flush x"]
    assert calls[3:] == ["replace x", f"flush {tmp_path.name}"]
    calls.clear()
    write_text(tmp_path / "file", "text")
    assert calls == ["flush file", "replace file", f"flush {tmp_path.name}"]


def test_many_files_wait_for_the_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, sync = os.fsync, os.sync
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "sync", lambda: calls.append(f"sync {len(names(tmp_path))}") or sync())
    with one_flush():
        for name in ("a", "b", "c"):
            write_text(tmp_path / name, name)
    assert calls == ["sync 3"]
    with pytest.raises(KeyError), one_flush():
        raise KeyError
    write_text(tmp_path / "d", "d")
    assert calls == ["sync 3", "fsync", "fsync"]
    monkeypatch.delattr(os, "sync")  # as on Windows
    with one_flush():
        write_text(tmp_path / "e", "e")
    assert calls[3:] == ["fsync", "fsync"]
    assert names(tmp_path) == ["a", "b", "c", "d", "e"]


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refuse)
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "file")


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="a file is in the place of a folder"), writing(tmp_path / "x"):
        write(tmp_path / "x", "one")
    assert (tmp_path / "x").is_file()


@pytest.mark.parametrize("error", [SafetensorError("no space"), OSError("no space")])
def test_what_libraries_make_of_a_failed_write_is_explained(tmp_path: Path, error: Exception) -> None:
    def write() -> None:
        with replacing_path(tmp_path / "x") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("writer failed") from error

    with pytest.raises(UserError, match=f"cannot write x in the folder {tmp_path}: no space"):
        write()
    assert names(tmp_path) == []


def test_an_error_of_the_user_is_not_told_twice(tmp_path: Path) -> None:
    def write() -> Any:
        with writing(tmp_path / "x"):
            raise UserError("the text is at fault") from OSError("no such file")

    with pytest.raises(UserError, match="the text is at fault"):
        write()


# -- what is no regular file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
def test_a_pipe_is_written_to(tmp_path: Path, by_name: bool) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    if by_name:
        with replacing_path(pipe) as temporary:
            temporary.write_bytes(b"text")
    else:
        write_text(pipe, "text")
    reader.join(10)
    assert found == [b"text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_a_device_stays(tmp_path: Path) -> None:
    """Through a link too; what a device refuses is the user's error."""
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        require_writable(path)
        write_text(path, "text")
        assert stat.S_ISCHR(path.stat().st_mode)
    assert link.is_symlink()
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match="cannot write full in the folder /dev: the disk is full"):
            write_text(Path("/dev/full"), "text")


def test_links_are_followed_where_a_user_names_them(tmp_path: Path) -> None:
    file, link, first = tmp_path / "file", tmp_path / "link", tmp_path / "first"
    link.symlink_to("file")
    first.symlink_to(link)
    for text in ("new", "again"):  # a link to nothing, and to a file
        write_text(followed(first), text)
        assert file.read_text() == text
        assert link.is_symlink()
    write_text(link, "own")
    assert (file.read_text(), link.read_text()) == ("again", "own")
    assert not link.is_symlink(), "a run's file takes the place of a link"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="leads to itself"):
        followed(tmp_path / "loop")


def test_a_reader_that_has_left_is_no_error_of_the_user(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        os.close(reader)
        with pytest.raises(BrokenPipeError), replacing(Path(f"/dev/fd/{writer}")) as file:
            file.write(b"text")
    finally:
        os.close(writer)


_PROGRAM = """
from pathlib import Path
from moekit.atomic import write_text
print("before")
write_text(Path("/dev/stdout"), "text\\n")
print("after")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_standard_output_by_name_keeps_what_is_there(tmp_path: Path) -> None:
    """Where it is a file too, which to open anew would cut off or overwrite."""
    for mode, beginning in (("w", ""), ("a", "first\n")):
        out = tmp_path / mode
        out.write_text(beginning)
        with out.open(mode) as file:
            subprocess.run([sys.executable, "-c", _PROGRAM], stdout=file, check=True)
        assert out.read_text() == f"{beginning}before\ntext\nafter\n"
    assert names(tmp_path) == ["a", "w"]


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "deep" / "er" / "file")
    for path, words in ((tmp_path, "a folder is in the place"), (tmp_path / "file" / "x", "a file is in the place")):
        with pytest.raises(UserError, match=words):
            require_writable(path)
    assert names(tmp_path) == ["file"]
