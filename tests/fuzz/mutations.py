"""Damage by a seed: what disks, transfers and editors do to bytes, and what people and programs do to JSON and YAML."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]


def flip_bit(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


def set_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes become others, at the beginning, at the end or anywhere."""
    place = chance.choice([chance.randrange(min(64, len(data))), chance.randrange(len(data)), -chance.randrange(1, 80)])
    place %= len(data)
    size = chance.randrange(1, 9)
    return (data[:place] + chance.randbytes(size) + data[place + size :])[: len(data)]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def blank(data: bytes, chance: random.Random) -> bytes:
    """A block of zeros, as after a crash of a file system."""
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + bytes(last - first) + data[last:]


def exchange(data: bytes, chance: random.Random) -> bytes:
    """Two blocks of one size change places."""
    size = chance.randrange(1, max(2, len(data) // 4))
    first, second = sorted(chance.randrange(max(1, len(data) - size)) for _ in range(2))
    second = max(second, first + size)
    return (
        data[:first] + data[second : second + size] + data[first + size : second] + data[first : first + size]
        + data[second + size :]
    )  # fmt: skip


def repeat(data: bytes, chance: random.Random) -> bytes:
    """A block is there twice."""
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:last] + data[first:last] + data[last:]


def drop(data: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[last:]


def append(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 200))


def quote(data: bytes, chance: random.Random) -> bytes:
    """A mark of CSV somewhere, which may make one field of all that follows; of files that are long enough."""
    place = chance.randrange(len(data))
    return (
        data[:place]
        + chance.choice([b'"', b',"', b"\n", b",,,", "²,".encode()])
        + data[place:] * chance.choice([1, 20])
    )


def replace(data: bytes, chance: random.Random) -> bytes:
    """Another file altogether."""
    return chance.choice([b"", b"\0" * 64, chance.randbytes(300), b"[" * 100_000, b'{"a":' * 100_000, b"PK\3\4" + data])


BYTES: tuple[Damage, ...] = (
    flip_bit, flip_bit, set_bytes, set_bytes, cut, blank, exchange, repeat, drop, append, replace,
)  # fmt: skip

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**30, -(10**400), 1e308, -1e-308, float("nan"), float("inf"), "", "O", "\ud800",
    "é" * 99, "../../x", "2020-99-99", [], [[]], {}, {"": 0}, [None, 1, "x"], {"version": 99}, "!!int", "0x",
)  # fmt: skip


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below `tree`."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def change_value(data: bytes, chance: random.Random) -> bytes:
    """A value of a JSON file becomes an odd one, goes, or changes places with another; the file stays JSON."""
    tree = json.loads(data)
    places = _places(tree)
    if not places:
        return flip_bit(data, chance)
    (node, key), (other, other_key) = chance.choice(places), chance.choice(places)
    how = chance.randrange(8)
    if how == 0:
        del node[key]
    elif how == 1:
        node[key] = json.loads(json.dumps(other[other_key]))
    elif how == 2:
        marked = json.dumps(_set(tree, node, key, "@"))
        depth = chance.choice([50, 5_000, 200_000])
        return marked.replace(
            '"@"', chance.choice(["[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth])
        ).encode()
    elif how == 3:
        return json.dumps(_set(tree, node, key, "@")).replace('"@"', "9" * chance.choice([19, 400, 5_000])).encode()
    else:
        node[key] = chance.choice(ODD)
    return json.dumps(tree).encode()


def _set(tree: Any, node: Any, key: Any, value: Any) -> Any:
    node[key] = value
    return tree


YAML = (
    b"a: !!int\n", b"a: !!bool x\n", b"a: 2020-99-99\n", b"&a [*a]\n", b"? [a]\n: b\n", b"a: !!python/object:os.x {}\n",
    b"a: &x [1]\nb: {<<: *x}\n", b"{" * 20_000, b"a: 0b\n", b"a: 1:99:99\n", b"\0", b"a: '\n", b"%TAG\n---\n",
    b"--- \n--- \n", b"a: !!timestamp x\n", b"a: !!binary x\n", b"a: !!float .\n", b"\xff\xfe", b"- " * 20_000,
    b"a: 0x\n", b"a: !!set [1]\n",
)  # fmt: skip


def odd_yaml(data: bytes, chance: random.Random) -> bytes:
    """A line of a YAML file is replaced by something that is hard to read."""
    lines = data.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    odd = chance.choice(YAML)
    how = chance.randrange(3)
    if how == 0:
        return odd
    if how == 1:
        return b"".join([*lines[:place], odd, *lines[place + 1 :]])
    key = lines[place].partition(b":")[0]
    value = json.dumps(chance.choice(ODD)).encode()
    return b"".join([*lines[:place], key + b": " + value + b"\n", *lines[place + 1 :]])
