"""Docstrings say what is raised, arguments are whole phrases, and a public class name stands for one class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "moekit"
MODULES = sorted(PACKAGE.rglob("*.py"))

ERRORS = {"ValueError", "UserError"}
ROOMS = (
    "huggingface",
    "surgery",
    "routers",
    "functional",
    "experts",
    "dispatch",
    "kernels",
    "mixing",
    "soft_moe",
    "layer",
    "routing",
    "transformer",
    "recurrent",
    "component",
    "stepping",
    "tasks",
    "heads",
    "training",
    "source",
    "mapped",
    "atomic",
    "report",
    "inference",
    "parallel",
    "planner",
    "runs",
    "cli",
)
"""Where docstrings are held to these rules; widen it as rooms come to keep them."""

TWINS: set[str] = set()
"""Names that still stand for two classes, apart from what every recipe has; only to be shortened."""
OF_EVERY_RECIPE = {"Config", "ModelConfig"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def raised(nodes: Iterable[ast.AST]) -> bool:
    """Whether one of `ERRORS` is raised here, and not in a function or class inside."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    return any(
        (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in ERRORS)
        or raised(ast.iter_child_nodes(node))
        for node in nodes
        if not isinstance(node, inner)
    )


def says_so(*nodes: ast.ClassDef | ast.FunctionDef) -> bool:
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return any("Raises:" in text or text.startswith("Raise ") for text in texts)


def silent(tree: ast.Module) -> Iterator[str]:
    """Public functions, methods and classes that raise an error and do not say so.

    What making or calling an object raises may be said by its class.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if raised(node.body) and not says_so(node):
                yield node.name
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or not raised(method.body):
                    continue
                of_class = method.name in ("__init__", "__post_init__", "__call__", "forward")
                if (of_class and not says_so(node, method)) or (
                    not method.name.startswith("_") and not of_class and not says_so(method)
                ):
                    yield f"{node.name}.{method.name}"


def fragments(tree: ast.Module) -> Iterator[str]:
    """Lines of arguments and attributes that are no phrase of their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", text, re.MULTILINE):
                yield from re.findall(r"^    (\*{0,2}\w+: (?:of|in|as|by|see|and|\.\.\.) .*)", section, re.MULTILINE)


def twins(trees: Iterable[ast.Module]) -> set[str]:
    """Public names of classes that are defined in more than one module."""
    names = [n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    return {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(path) in ROOMS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_errors_are_said_and_arguments_are_phrases(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not list(silent(tree)), f"{path.name}: add `Raises:` to what these raise"
    assert not list(fragments(tree)), f"{path.name}: a line of `Args:` or `Attributes:` is a phrase of its own"


def test_rooms_exist() -> None:
    assert set(ROOMS) <= {room_of(path) for path in MODULES}


def test_a_public_class_name_stands_for_one_class() -> None:
    found = twins(ast.parse(path.read_text(encoding="utf-8")) for path in MODULES)
    assert found - OF_EVERY_RECIPE == TWINS, "give one of the two another name; TWINS holds those that are left"


def test_checks_of_docstrings_bite() -> None:
    body = "if x:\n        raise ValueError('x')"
    assert list(silent(ast.parse(f"def f(x):\n    'F.'\n    {body}"))) == ["f"]
    assert list(silent(ast.parse(f"def f(x):\n    'F.\\n\\nRaises:\\n    ValueError: x.'\n    {body}"))) == []
    assert (
        list(silent(ast.parse(f"def _f(x):\n    {body}\ndef g():\n    def h(x):\n      raise ValueError('x')"))) == []
    )
    method = "  def {}(self):\n    raise ValueError('x')\n"
    made = "class A:\n  'A.{}'\n" + method.format("__init__") + method.format("f")
    assert list(silent(ast.parse(made.format("")))) == ["A.__init__", "A.f"]
    assert list(silent(ast.parse(made.format("\\n\\nRaises:\\n    ValueError: x.")))) == ["A.f"]
    arguments = "Args:\n        seed: of the draw.\n        k: number\n            of: choices."
    text = f"def f(seed, k):\n    '''F.\n\n    {arguments}\n    '''"
    assert list(fragments(ast.parse(text))) == ["seed: of the draw."]
    assert twins(map(ast.parse, ("class A: ...\nclass _B: ...", "class A: ...", "class _B: ..."))) == {"A"}
