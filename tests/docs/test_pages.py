"""What the documentation says works: its Python runs, its links lead somewhere, its commands exist."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")],
    key=lambda path: path.relative_to(ROOT).parts,
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
# A block that cannot run says why, on the line before the fence: <!-- not run: needs eight GPUs -->
EXCUSE = re.compile(r"<!-- not run: (?P<why>\S[^\n]{9,}) -->\s*\Z")
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\((?P<target>[^)\s]+)\)|!\[[^\]\n]*\]\((?P<image>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    excused: bool


def blocks(text: str) -> list[Block]:
    """Fenced blocks of a page, unindented, in order."""
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True))
        excused = EXCUSE.search(text[: match.start()]) is not None
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["info"].strip(), code, line, excused))
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: Path) -> list[Block]:
    return [b for b in blocks(path.read_text(encoding="utf-8")) if b.language.split(" ")[0] in ("python", "py")]


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A module of its own, so that what a page defines can be pickled and inspected like anybody's code.
    module = ModuleType(re.sub(r"\W", "_", name(page)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ran = 0
    for block in code_of(page):
        assert block.language == "python", f"{name(page)}:{block.line}: say ```python, nothing more"
        if not block.excused:
            # Empty lines first, so that a traceback names the line of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), module.__dict__)
            ran += 1
    assert ran, f"{name(page)}: every block is excused from running"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        target = match["target"] or match["image"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target} does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(page)}: {target} has no such heading"


def anchors(page: Path) -> set[str]:
    """Heading ids as MkDocs makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = page.read_text(encoding="utf-8")
    shell = "\n".join(block.code for block in blocks(text) if block.language in ("bash", "console", "sh", ""))
    for target in re.findall(r"\bmake ([a-z-]+)", shell + "\n".join(re.findall(r"`make [a-z-]+", text))):
        assert target in targets, f"{name(page)}: the Makefile has no target {target}"
    for module in re.findall(r"python -m (moekit[\w.]*)", shell):
        if module.startswith("moekit.recipes") and not any((ROOT / "moekit/recipes").glob("[!_]*.py")):
            pytest.skip("no recipe yet")
        assert importlib.util.find_spec(module), f"{name(page)}: no module {module}"


def test_every_package_with_public_names_has_a_page() -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/api").glob("*.md"))}
    shown = set(re.findall(r"^::: (\S+)", "\n".join(pages.values()), re.M))
    assert all(pkgutil.resolve_name(name) for name in shown)
    inits = sorted((ROOT / "moekit").glob("*/__init__.py"))
    public = {f"moekit.{path.parent.name}" for path in inits if "__all__" in path.read_text(encoding="utf-8")}
    assert len(public) > 10
    assert not public - shown, "docs/api has no page for them"
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [path.name for path in pages if f": api/{path.name}\n" not in listed], "mkdocs.yml does not list them"


def test_blocks_are_found() -> None:
    page = (
        "Text\n```python\nx = 1\n```\n- item\n\n    ```bash\n    make it\n    ```\n"
        "<!-- not run: needs eight GPUs -->\n```python\nboom\n```\n<!-- not run: -->\n\n```python\nx\n```\n"
    )
    found = blocks(page)
    assert [block.language for block in found] == ["python", "bash", "python", "python"]
    assert [block.code for block in found] == ["x = 1\n", "make it\n", "boom\n", "x\n"]
    assert [block.excused for block in found] == [False, False, True, False]
    assert [block.line for block in found] == [2, 7, 11, 16]
