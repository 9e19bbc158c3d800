"""The pins of constraints.txt can be installed together, with both builds of torch; nothing is asked of an index."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
OF_TORCH = Path(__file__).with_name("torch_cuda_requirements.txt").read_text(encoding="utf-8")

# 3.11.2 is Debian 12's.
MACHINES = [
    pytest.param({"python_full_version": python, "platform_machine": machine}, id=f"{python}-{machine}")
    for python, machine in itertools.product(["3.11.2", "3.11.9", "3.12.3", "3.13.5", "3.14.2"], ["x86_64", "aarch64"])
]


def environment(machine: dict[str, str], extra: str = "") -> dict[str, str]:
    """What markers are evaluated in: CPython on Linux."""
    return {
        **machine,
        "python_version": machine["python_full_version"].rpartition(".")[0],
        "implementation_version": machine["python_full_version"],
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "platform_release": "6.1",
        "platform_version": "1",
        "sys_platform": "linux",
        "os_name": "posix",
        "extra": extra,
    }


def lines(text: str) -> Iterator[Requirement]:
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield Requirement(line)


def applies(requirement: Requirement, machine: dict[str, str], extras: Iterable[str] = ()) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate(environment(machine, extra)) for extra in ("", *extras))


def pins(text: str, machine: dict[str, str]) -> dict[str, Version]:
    """Releases by canonical name."""
    found: dict[str, Version] = {}
    for pin in lines(text):
        if applies(pin, machine):
            [specifier] = pin.specifier
            assert specifier.operator == "==", pin
            assert found.setdefault(canonicalize_name(pin.name), Version(specifier.version)), pin
    return found


def conflicts(
    pinned: dict[str, Version], requirements: Iterable[Requirement], machine: dict[str, str], extras: Iterable[str] = ()
) -> list[str]:
    """Requirements that the pins do not meet; one of a package without a pin is met by whatever pip finds."""
    return [
        f"{requirement}: {pinned[name]} is pinned"
        for requirement in requirements
        if applies(requirement, machine, extras)
        and (name := canonicalize_name(requirement.name)) in pinned
        and not requirement.specifier.contains(pinned[name], prereleases=True)
    ]


def ours() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *itertools.chain(*extras)]]


@pytest.mark.parametrize("machine", MACHINES)
def test_pins_fit_the_project_and_both_builds_of_torch(machine: dict[str, str]) -> None:
    """The CPU build requires a part of what the CUDA build does, which is recorded beside this file."""
    pinned = pins(CONSTRAINTS, machine)
    assert {canonicalize_name(requirement.name) for requirement in ours()} <= set(pinned), "a dependency without a pin"
    assert not conflicts(pinned, ours(), machine)
    assert not conflicts(pinned, lines(OF_TORCH), machine)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_pin_that_torch_refuses_is_found(machine: dict[str, str]) -> None:
    """triton 3.9.0 was pinned beside torch 2.13.0 once, and pip ended with ResolutionImpossible."""
    former = CONSTRAINTS.replace("triton==3.7.1", "triton==3.9.0")
    assert conflicts(pins(former, machine), lines(OF_TORCH), machine) == [
        'triton==3.7.1; platform_system == "Linux" and python_version < "3.15": 3.9.0 is pinned'
    ]


def test_what_is_recorded_is_of_the_pinned_torch() -> None:
    assert f"torch==={pins(CONSTRAINTS, MACHINES[0].values[0])['torch']}" in OF_TORCH  # type: ignore[arg-type]


@pytest.mark.parametrize("machine", MACHINES)
def test_pins_fit_one_another(machine: dict[str, str]) -> None:
    """What the installed packages require in turn, evaluated for another Python and machine, is pinned and fits.

    So does the Python itself. Packages that are not installed here, and those of another release than the pinned one,
    are passed over.
    """
    pinned = pins(CONSTRAINTS, machine)
    todo = {(canonicalize_name(requirement.name), tuple(sorted(requirement.extras))) for requirement in ours()}
    done: set[tuple[str, tuple[str, ...]]] = set()
    wrong: list[str] = []
    while todo:
        name, extras = item = todo.pop()
        done.add(item)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(package.version).public != str(pinned.get(name)):
            continue
        python = str(package.metadata.get("Requires-Python", ""))
        if not SpecifierSet(python).contains(machine["python_full_version"]):
            wrong.append(f"{name} {package.version} requires Python {python}")
        for requirement in map(Requirement, package.requires or ()):
            if not applies(requirement, machine, extras):
                continue
            wanted = canonicalize_name(requirement.name)
            # NVIDIA's libraries are pinned by torch.
            if wanted not in pinned and not wanted.startswith(("nvidia-", "cuda-")):
                wrong.append(f"{name} requires {requirement}, which has no pin")
            wrong += [f"{name} requires {text}" for text in conflicts(pinned, [requirement], machine, extras)]
            todo |= {(wanted, tuple(sorted(requirement.extras)))} - done
    assert len(done) > 30, "most packages are installed where tests run"
    assert not wrong
