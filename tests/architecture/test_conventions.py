"""Conventions that no linter knows: file names and sizes, docstrings, environment, pickles, paths, pins."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "moekit"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
LONG = {
    "moekit/routing.py": "the vocabulary that every room shares is read in one place",
    "moekit/runs/run.py": "one noun: what a run's folder holds, as its properties",
    "moekit/training/strategy.py": "one class has all hooks that Lightning calls; what they do lies in its parts",
}
"""Longer files that hold one subject, each with its reason; a longer file that is not here is warned of."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def recipe_names(folder: Path) -> set[str]:
    """Recipes as code; a module whose name begins with an underscore is shared by recipes and is none."""
    found = (path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
    return {path.stem for path in found if not path.stem.startswith("_")}


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Names of public classes and functions without a docstring, and of the module itself."""
    if ast.get_docstring(tree) is None:
        yield "the module"
    for node in tree.body:
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ):
            yield node.name


def environment_uses(tree: ast.Module) -> Iterator[int]:
    """Lines that touch environment variables."""
    names = {"environ", "environb", "getenv", "putenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os":
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from [node.lineno] * bool(names & {alias.name for alias in node.names})


def unsafe_loads(tree: ast.AST) -> Iterator[int]:
    """Lines that could execute a file while reading it: ``torch.load`` says ``weights_only=True`` in that word.

    A pickle made in the same expression, ``pickle.loads(pickle.dumps(x))``, is no file; its errors may be named.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            from_pickle = isinstance(node, ast.ImportFrom) and node.module == "pickle"
            if from_pickle or {"cloudpickle", "dill", "joblib", "marshal", "shelve"} & {n.split(".")[0] for n in names}:
                yield node.lineno
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: word.value for word in node.keywords}
            own = bool(node.args) and ast.unparse(node.args[0]).startswith("pickle.dumps(")
            if (
                (called == "torch.load" and not is_true(given.get("weights_only")))
                or (called in ("np.load", "numpy.load") and is_true(given.get("allow_pickle")))
                or (called in ("pickle.load", "pickle.loads", "pickle.Unpickler") and not own)
                or (called.startswith("yaml.") and called.endswith("load") and called != "yaml.safe_load")
            ):
                yield node.lineno


WRITERS = {
    "moekit/ablation/processes.py": "opens the logs that runs append to",
    "moekit/atomic.py": "it is the writer",
    "moekit/data/cache.py": "into the draft of replacing_folder",
    "moekit/data/sources/first_seen.py": "hashes, into a draft or a temporary folder, where they are removed",
    "moekit/data/sources/streamed.py": "into the draft of replacing_folder, by cached_folder",
    "moekit/data/store.py": "into the draft of replacing_folder, by cached_folder",
    "moekit/data/tokenizer.py": "into the draft of replacing_folder, as its docstring asks for",
    "moekit/huggingface/consolidating.py": "into the draft of replacing_folder",
    "moekit/huggingface/folder.py": "into the draft of replacing_folder",
    "moekit/huggingface/saving.py": "into the draft of replacing_folder",
    "moekit/huggingface/tokenizers.py": "into the draft of replacing_folder, by export_model",
    "moekit/huggingface/writing.py": "moves shards in the draft of replacing_folder",
    "moekit/mapped.py": "into drafts of replacing_path and replacing_folder",
    "moekit/parallel/checkpoint/checkpointer.py": "serializes into memory",
    "moekit/parallel/checkpoint/disk.py": "moves the hidden folder that all ranks have filled",
    "moekit/parallel/checkpoint/writer.py": "fills the hidden folder that disk.py moves, and flushes each file",
    "moekit/runs/surgery/writing.py": "moves a hidden run folder, beside whatever else is in its place",
    "moekit/training/loggers.py": "appends rows to metrics.csv; a torn one is dropped when the run goes on",
    "moekit/testing/distributed.py": "results of processes, in a temporary folder",
    "moekit/testing/modules.py": "serializes into memory",
}
"""Files that write without `moekit.atomic`, and why."""


def unsafe_writes(tree: ast.AST) -> Iterator[int]:
    """Lines that write or move a file themselves, but for what is written into the file of `atomic.replacing`.

    ``with replacing(path) as file: torch.save(x, file)`` is whole or not there; so is what gets a temporary name from
    `replacing_path`.
    """
    safe = {
        item.optional_vars.id
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func).split(".")[-1] in ("replacing", "replacing_path")
        and isinstance(item.optional_vars, ast.Name)
    }
    moves = {"os.replace", "os.rename", "shutil.move", "shutil.copy", "shutil.copyfile", "shutil.copytree"}
    savers = {"torch.save", "save_file", "np.save", "numpy.save", "np.savez", "json.dump", "yaml.dump", "pickle.dump"}
    methods = {"write_bytes", "write_text", "savefig", "to_csv", "tofile", "save_pretrained", "touch"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        method = called.rpartition(".")[2]
        given = [*node.args, *(word.value for word in node.keywords)]
        if any(isinstance(value, ast.Name) and value.id in safe for value in given):
            continue
        opens = method in ("open", "fdopen") and any(
            isinstance(value, ast.Constant)
            and isinstance(value.value, str)
            and re.fullmatch(r"[rwxabt+]*[wxa+][bt+]*", value.value)
            for value in given
        )
        dumps = called in ("yaml.safe_dump", "yaml.dump") and len(node.args) > 1
        ours = called in ("atomic.write_text", "write_text")
        if opens or dumps or called in moves | savers or (method in methods and not ours):
            yield node.lineno


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def machine_paths(text: str) -> Iterator[int]:
    """Lines that name a folder of somebody's machine."""
    roots = "|".join(("work", "root", "tmp", "opt", r"home/\w+", r"Users/\w+"))
    pattern = re.compile(rf"(?<![\w.\-}}\]/])/(?:{roots})(?:/|\b(?![\w\-]))")
    for number, line in enumerate(text.splitlines(), start=1):
        if pattern.search(line):
            yield number


def tracked_text() -> Iterator[tuple[Path, str]]:
    """Files of the repository, those about to be added included, that are text."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        try:
            yield path, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue


def warn_of_length(name: str, lines: int) -> None:
    if lines > MAX_LINES and name not in LONG:
        warnings.warn(
            f"{name} has {lines} lines, more than {MAX_LINES}: divide it where a subject ends, or write in LONG why it "
            "is one",
            stacklevel=2,
        )


def test_no_drawer_for_everything() -> None:
    names = {"utils", "util", "common", "helpers", "helper", "misc"}
    folders = ("moekit", "tests", "benchmarks", "recipes", "docs")
    found = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*") if path.stem in names]
    found = [path for path in found if path.is_dir() or path.suffix == ".py"]
    assert not found, f"name these after what they hold: {[relative(p) for p in found]}"


@pytest.mark.filterwarnings("default:.*has .* lines")
@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_long_file(path: Path) -> None:
    """A file is divided where a subject ends, not where a count does; so a long one needs a reason, and no more."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines > MAX_LINES or relative(path) not in LONG, f"{relative(path)} needs no reason in LONG"
    warn_of_length(relative(path), lines)


def test_no_two_test_files_of_one_name() -> None:
    """Pytest imports a test file by its name alone, so the second of two in one run is an error of collection."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not (twins := sorted(name for name, count in names.items() if count > 1)), f"name one of each anew: {twins}"


def test_recipes_have_code_and_evidence() -> None:
    code = recipe_names(PACKAGE / "recipes")
    evidence = {path.relative_to(ROOT / "recipes").parts[0] for path in ROOT.glob("recipes/*/**/*") if path.is_file()}
    assert code == evidence, "moekit/recipes/<name>.py and recipes/<name>/ come in pairs"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_public_names_have_docstrings(path: Path) -> None:
    missing = list(undocumented(ast.parse(path.read_text(encoding="utf-8"))))
    assert not missing, f"{relative(path)}: no docstring on {', '.join(missing)}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_environment_variables(path: Path) -> None:
    lines = list(environment_uses(ast.parse(path.read_text(encoding="utf-8"))))
    assert not lines, f"{relative(path)}, lines {lines}: settings are arguments, not environment variables"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_are_read_as_data(path: Path) -> None:
    lines = list(unsafe_loads(ast.parse(path.read_text(encoding="utf-8"))))
    assert not lines, f"{relative(path)}, lines {lines}: no unpickling; torch.load with weights_only=True"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_are_written_whole(path: Path) -> None:
    lines = list(unsafe_writes(ast.parse(path.read_text(encoding="utf-8"))))
    if relative(path) in WRITERS:
        assert lines, f"{relative(path)} writes nothing by itself: take it off WRITERS"
    else:
        assert not lines, f"{relative(path)}, lines {lines}: write with moekit.atomic, or say why not in WRITERS"


def test_no_machine_paths() -> None:
    found = [f"{relative(path)}:{line}" for path, text in tracked_text() for line in machine_paths(text)]
    assert not found, f"paths of one machine: {', '.join(found)}"


def test_pins_cover_and_satisfy_the_requirements() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins: dict[str, list[str]] = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        match = re.fullmatch(
            r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)(; python_full_version (<|>=) \"[0-9.]+\")?", line
        )
        assert match, f"constraints.txt pins name==version, for a Python perhaps, without local versions: got {line!r}"
        pins.setdefault(canonical(match[1]), []).append(match[2])

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    needed += [item for extra in project["project"]["optional-dependencies"].values() for item in extra]
    for requirement in map(Requirement, needed):
        versions = pins.get(canonical(requirement.name))
        assert versions, f"{requirement.name} is not pinned in constraints.txt"
        assert all(map(requirement.specifier.contains, versions)), (
            f"{requirement} excludes one of the pinned {versions}"
        )


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_checks_bite() -> None:
    """Each check above finds what it looks for, and only that."""
    assert list(undocumented(ast.parse("class A: ...\ndef _b(): ...\ndef c(): 'C.'"))) == ["the module", "A"]
    assert sorted(environment_uses(ast.parse("import os\nos.environ['A']\nos.getenv('B')\nos.path"))) == [2, 3]
    assert sorted(environment_uses(ast.parse("from os import environ\nfrom os import path"))) == [1]
    loads = (
        "import pickle",
        "pickle.load(f)",
        "pickle.loads(pickle.dumps(x))",
        "torch.load(f)",
        "torch.load(f, weights_only=True)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "from dill import x",
        "from pickle import loads",
        "def a(f, *, only=True): torch.load(f, weights_only=only)",
        "yaml.safe_load(f)",
        "yaml.load(f, yaml.FullLoader)",
    )
    assert sorted(unsafe_loads(ast.parse("\n".join(loads)))) == [2, 4, 6, 8, 9, 10, 11, 13]
    writes = (
        "open(p, 'w')",
        "open(p)",
        "p.open('rb')",
        "p.open(mode='a+b')",
        "p.write_text(x)",
        "write_text(p, x)",
        "torch.save(x, p)",
        "with replacing(p) as f: torch.save(x, f)",
        "with replacing_path(p) as t: save_file(x, t)",
        "figure.savefig(p)",
        "os.replace(a, b)",
        "open_source(p, 'w')",
        "a.open(path, 'pair')",
        "yaml.safe_dump(x)",
        "yaml.safe_dump(x, g)",
    )
    assert sorted(unsafe_writes(ast.parse("\n".join(writes)))) == [1, 4, 5, 7, 10, 11, 15]
    bad = ("@work@main", "see `@root`", "(@tmp@x)", "@home@me@x", "'@opt@y'")
    assert list(machine_paths("\n".join(bad).replace("@", "/"))) == [1, 2, 3, 4, 5]
    good = (
        "frame@work@x",
        "https:@@x.org@work@y",
        "train@root",
        "a {dir}@tmp@b",
        "@workers",
        "..@work@x",
        "@root-mean",
    )
    assert list(machine_paths("\n".join(good).replace("@", "/"))) == []
    with pytest.warns(UserWarning, match="moekit/new.py has 401 lines, more than 400"):
        warn_of_length("moekit/new.py", 401)
    warn_of_length("moekit/new.py", 400)  # a warning would be an error here
    warn_of_length("moekit/routing.py", 500)
