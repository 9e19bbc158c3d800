"""Imports run strictly downward: the floors of docs/architecture.md, checked on the source alone."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "moekit"

# Room -> floor. A room imports rooms of lower floors only. A new room must be given a floor here and in
# docs/architecture.md.
FLOORS = {
    "component": 0,
    "lazy": 0,
    "strategy_names": 0,
    "errors": 0,
    "terminal": 0,
    "atomic": 0,
    "lock": 0,
    "output": 0,
    "shell": 0,
    "performance": 0,
    "mapped": 0,
    "stored": 0,
    "source": 0,
    "routing": 0,
    "stepping": 0,
    "functional": 0,
    "wording": 0,
    "environment": 1,
    "folder_kinds": 1,
    "kernels": 1,
    "babel": 1,
    "routers": 2,
    "experts": 2,
    "dispatch": 2,
    "mixing": 2,
    "layer": 3,
    "soft_moe": 3,
    "transformer": 3,
    "recurrent": 3,
    "surgery": 3,
    "data": 3,
    "tasks": 4,
    "data.module": 4,
    "parallel": 4,
    "huggingface": 4,
    "routing_traces": 4,
    "mechanisms": 4,
    "heads": 5,
    "folder_text": 5,
    "planner": 5,
    "training": 5,
    "inference": 5,
    "runs": 6,
    "report": 7,
    "ablation": 7,
    "serving": 7,
    "folders": 7,
    "cli": 8,
    "recipes": 9,
    # The programs, ``python -m moekit.<room>``: nothing imports them, so a room's own may use the floors above it.
    "__main__": 10,
}

# Files of a room that stand on a higher floor than the rest of it, since they are built of what lies between.
UPSTAIRS = {
    "moekit.data.module": "data.module",
    "moekit.data.held_out": "data.module",
}

# The only imports between two rooms of one floor: (importer, imported module and what lies below it) -> why.
SAME_FLOOR = {
    ("routing", "moekit.component"): "Router is a Component",
    ("routing", "moekit.stepping"): "a router notices that nobody tells it of steps",
    ("stepping", "moekit.component"): "components are what is told of steps",
    ("functional", "moekit.routing"): "the reference layer and the losses read a Routing",
    ("functional", "moekit.errors"): "errors.py is everybody's",
    ("atomic", "moekit.errors"): "errors.py is everybody's",
    ("mapped", "moekit.errors"): "errors.py is everybody's",
    ("mapped", "moekit.stored"): "headers are JSON",
    ("lock", "moekit.errors"): "errors.py is everybody's",
    ("lock", "moekit.atomic"): "who holds a folder is a file in it",
    ("source", "moekit.errors"): "errors.py is everybody's",
    ("transformer", "moekit.layer"): "blocks hand a RoutingContext to a MoELayer and return its Routing",
    ("soft_moe", "moekit.layer"): "Soft MoE returns a MoEOutput as MoELayer does",
    ("recurrent", "moekit.transformer"): "the recurrent model embeds, and answers, as the transformers do",
    ("surgery", "moekit.layer"): "surgery builds and reads sparse layers",
    ("surgery", "moekit.transformer"): "adapters sit on its projections",
    ("surgery", "moekit.data.tokenizer"): "a vocabulary is written beside the model it belongs to",
    ("huggingface", "moekit.parallel.checkpoint"): "folders are read as checkpoints are, each rank its part",
    ("huggingface", "moekit.parallel.shards"): "adapters of a divided model are gathered to be written",
    ("ablation", "moekit.report.style"): "pictures of results look as those of reports",
    ("mechanisms", "moekit.routing_traces"): "mechanisms are computed from traces",
    ("inference", "moekit.training.checkpoint_io"): "experts on demand are mapped from a run's checkpoint",
    ("data.module", "moekit.tasks"): "the data module asks its tasks what they make of text",
}

# Files that import one another in a circle, function-level imports included; only to be shortened.
CIRCLES: list[set[str]] = []

# Rooms that must run with nothing but torch and the standard library (and lower rooms of moekit).
TORCH_ONLY = {
    "functional": {"torch"},
    "kernels": {"torch", "triton", "numpy", "numba", "onnxscript"},
    "dispatch": {"torch"},
}

# The root package and the test harness stand outside the floors.
ROOT, TESTING = "", "testing"


@dataclass(frozen=True)
class Import:
    importer: str  # room
    imported: str  # dotted name
    where: str  # file:line
    module: str  # that imports


def room_of(module: str) -> str:
    """`moekit.routers.topk` -> `routers`; a program -> `__main__`; the package itself -> ``""``."""
    if module in UPSTAIRS:
        return UPSTAIRS[module]
    parts = module.split(".")
    if parts[-1] == "__main__":
        return parts[-1]
    return parts[1] if len(parts) > 1 else ROOT


def module_name(path: Path, package: Path) -> str:
    parts = list(path.relative_to(package.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(dotted: str, package: Path) -> bool:
    path = package.parent.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def only_identity(tree: ast.Module, name: str) -> bool:
    """Whether a module uses nothing of `name` but its own data, as in ``moekit.__version__``."""
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name]
    return bool(uses) and all(re.fullmatch("__[a-z]+__", use.attr) for use in uses)


def imports(package: Path) -> Iterator[Import]:
    """Every import statement under `package`, also those inside functions and behind TYPE_CHECKING."""
    for path in sorted(package.rglob("*.py")):
        name = module_name(path, package)
        base = name if path.stem == "__init__" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [
                    alias.name
                    for alias in node.names
                    if alias.name != package.name or not only_identity(tree, alias.asname or alias.name)
                ]
            elif isinstance(node, ast.ImportFrom):
                above = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                # `from moekit import routers` imports a room, `from moekit.routing import Routing` a name.
                targets = [
                    f"{source}.{alias.name}" if is_module(f"{source}.{alias.name}", package) else source
                    for alias in node.names
                    if (source, alias.name) != (package.name, "__version__")  # set before anything is imported
                ]
            else:
                continue
            where = f"{path.relative_to(package.parent)}:{node.lineno}"
            for target in dict.fromkeys(targets):
                yield Import(room_of(name), target, where, name)


def fault(found: Import, package: Path) -> str | None:
    """What is wrong with one import, or None."""
    top = found.imported.split(".")[0]
    if top != package.name:
        allowed = TORCH_ONLY.get(found.importer)
        if allowed is None or top in allowed or top in sys.stdlib_module_names:
            return None
        return f"{found.importer} may import {', '.join(sorted(allowed))} and the standard library, not {top}"
    target = room_of(found.imported)
    if target == found.importer:
        return None
    if target == TESTING:
        return "moekit.testing is for tests; the package does not import it"
    if found.importer in (ROOT, TESTING):
        return f"moekit.{found.importer or '__init__'} must not import recipes" if target == "recipes" else None
    for room in (found.importer, target):
        if room not in FLOORS and room != ROOT:
            return f"room {room!r} has no floor: add it to FLOORS and to docs/architecture.md"
    if target == ROOT:
        return None if found.importer == "recipes" else "import the room: `moekit` itself imports everything"
    if FLOORS[target] < FLOORS[found.importer]:
        return None
    if FLOORS[target] > FLOORS[found.importer]:
        return f"upward import: floor {FLOORS[found.importer]} from floor {FLOORS[target]}"
    for importer, module in SAME_FLOOR:
        if importer == found.importer and (found.imported == module or found.imported.startswith(f"{module}.")):
            return None
    return "sideways import; if it is right, give the reason in SAME_FLOOR"


def faults(package: Path) -> list[str]:
    pairs = ((found, fault(found, package)) for found in imports(package))
    return [f"{found.where}: {found.importer} -> {found.imported}: {why}" for found, why in pairs if why]


def circles(package: Path) -> list[set[str]]:
    """Groups of modules that reach one another through imports."""
    modules = {module_name(path, package) for path in package.rglob("*.py")}
    below: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports(package):
        below[found.module] |= {found.imported} & (modules - {found.module})

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        todo = [module]
        while todo:
            new = below[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {module: reached(module) for module in modules}
    groups = {frozenset(n for n in reach[m] if m in reach[n]) for m in modules if m in reach[m]}
    return sorted(map(set, groups), key=sorted)


def test_imports_run_downward() -> None:
    found = faults(PACKAGE)
    assert not found, "\n".join(found)


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circles(PACKAGE) == CIRCLES, "let one of them hold what both need; CIRCLES holds those that are left"


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = fake_package(tmp_path, "routers/topk.py", "def f():\n    from moekit.routers import choices")
    (package / "routers" / "choices.py").write_text("from moekit.routers.policies import x\n")
    (package / "routers" / "policies.py").write_text("from moekit.routers.topk import y\nimport moekit.errors\n")
    assert circles(package) == [{"moekit.routers.topk", "moekit.routers.choices", "moekit.routers.policies"}]
    (package / "routers" / "policies.py").write_text("import moekit.errors\n")
    assert circles(package) == []


def test_every_room_has_a_floor() -> None:
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
    }
    assert rooms - {TESTING} <= set(FLOORS)


def test_same_floor_table_has_no_cycle_and_no_idle_row() -> None:
    edges = {(importer, room_of(module)) for importer, module in SAME_FLOOR}
    assert all(FLOORS[a] == FLOORS[b] for a, b in edges), "SAME_FLOOR is for rooms of one floor"
    below: dict[str, set[str]] = {}
    for a, b in edges:
        below.setdefault(a, set()).add(b)

    def reach(room: str, seen: tuple[str, ...] = ()) -> None:
        assert room not in seen, f"cycle: {' -> '.join([*seen, room])}"
        for lower in below.get(room, ()):
            reach(lower, (*seen, room))

    for room in below:
        reach(room)


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("routing.py", "from moekit.layer import MoELayer", "upward import"),
        ("functional/losses.py", "from moekit.component import Component", "sideways"),
        ("functional/losses.py", "import numpy as np", "not numpy"),
        ("dispatch.py", "import lightning", "not lightning"),
        ("kernels/topk.py", "import scipy.special", "not scipy"),
        ("routers/topk.py", "from moekit.experts import GroupedMLP", "sideways"),
        ("routers/topk.py", "from ..experts import GroupedMLP", "sideways"),
        ("routers/topk.py", "from .. import layer", "upward import"),
        ("routers/topk.py", "import moekit as mk", "import the room"),
        ("routers/topk.py", "import moekit as mk\nmk.__version__, mk.layer", "import the room"),
        ("routers/topk.py", "def f():\n    from moekit.training import fit", "upward import"),
        ("transformer/blocks.py", "from moekit.data.sources import base", "sideways"),
        ("data/batch.py", "from moekit.tasks import translation", "upward import"),
        ("tasks/translation.py", "from moekit.data.module import MultitaskData", "sideways"),
        ("training/modules.py", "from moekit.recipes import zcode_m3", "upward import"),
        ("training/modules.py", "from moekit import testing", "does not import it"),
        ("__init__.py", "from moekit import recipes", "must not import recipes"),
        ("testing.py", "from moekit.recipes import zcode_m3", "must not import recipes"),
        ("surgery/pruning.py", "from moekit.surgery import __main__", "upward import"),
        ("surgery/upcycling.py", "from moekit.recipes import zcode_m3", "upward import"),
        ("attic/things.py", "from moekit.routing import Routing", "has no floor"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, path: str, line: str, message: str) -> None:
    package = fake_package(tmp_path, path, line)
    found = faults(package)
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith(f"moekit/{path}:")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            "functional/losses.py",
            "import math\nimport torch.nn\nfrom moekit.routing import Routing",
        ),
        ("kernels/topk.py", "import triton.language as tl\nfrom moekit.functional import losses"),
        ("tasks/translation.py", "from moekit.data.batch import Batch\nfrom moekit.transformer import x"),
        ("data/module.py", "from moekit.tasks import TASKS\nfrom moekit.data.batch import Batch"),
        ("training/folder.py", "import moekit\nprint(moekit.__version__, moekit.__file__)"),
        ("training/modules.py", "from moekit import __version__\nfrom moekit import tasks\nimport lightning"),
        ("recipes/zcode_m3.py", "import moekit as mk\nfrom moekit.training import modules"),
        ("surgery/__main__.py", "from moekit.recipes import zcode_m3\nfrom moekit.surgery import pruning"),
        ("__init__.py", "from moekit import routers, training\nfrom moekit.layer import MoELayer"),
        ("testing.py", "import moekit.training"),
    ],
)
def test_a_right_import_is_not_found(tmp_path: Path, path: str, line: str) -> None:
    assert faults(fake_package(tmp_path, path, line)) == []


def fake_package(folder: Path, path: str, line: str) -> Path:
    """An empty moekit with every room, and one file holding `line`."""
    package = folder / "moekit"
    for room in {*FLOORS, "testing"} - set(UPSTAIRS.values()):
        (package / room).mkdir(parents=True)
    for name in ("layer", "dispatch", "testing", "routing", "stepping", "component", "errors"):
        (package / name).rmdir()
        (package / f"{name}.py").touch()
    (package / "data" / "batch.py").touch()
    (package / "surgery" / "__main__.py").touch()
    (package / "data" / "sources").mkdir()
    file = package / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(line + "\n")
    return package
