"""The house keeps its shape: floors, sizes, names, and what it never does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "minilora"
FLOORS = [
    "engine", "model", "lora", "quant", "optim", "files", "train", "fast", "lab", "book",
]  # fmt: skip
SOURCES = sorted(LIBRARY.rglob("*.py"))
every_file = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(LIBRARY)))


def floor_of(module: str) -> int:
    """The number of a module's floor; what stands beside the floors sees all of them."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS)


def imports(path: Path) -> set[str]:
    """Absolute names of the minilora modules that a file imports, and the packages of others."""
    package = ["minilora", *path.relative_to(LIBRARY).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


@every_file
def test_a_file_imports_only_from_its_floor_and_those_above(path):
    here = ".".join(["minilora", *path.relative_to(LIBRARY).with_suffix("").parts])
    for name in imports(path):
        if name.startswith("minilora.") and floor_of(name) < len(FLOORS):
            assert floor_of(name) <= floor_of(here), f"{here} imports {name}"


def test_the_guard_sees_a_forbidden_import():
    assert floor_of("minilora.lab.compare") > floor_of("minilora.engine.tensor")
    assert "minilora.engine.errors.AdapterError" in imports(LIBRARY / "model" / "targets.py")
    assert "minilora.__version__" in imports(LIBRARY / "lab" / "compare.py")


@every_file
def test_a_file_is_one_idea(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    if lines:
        assert ast.get_docstring(ast.parse(path.read_text())), "a file opens with its thesis"


OPTIONAL = {"cupy", "cuda", "matplotlib", "tqdm", "joblib", "threadpoolctl", "nbclient", "nbformat"}
PEERS = {"torch", "peft", "transformers", "bitsandbytes"}
WORKERS = {"bench_torch.py", "bench_peers.py"}  # imported in the peers' own processes alone
FORBIDDEN = {"pickle", "marshal", "shelve", "urllib", "http", "socket", "requests", "importlib"}


@every_file
def test_only_numpy_is_needed_and_nothing_is_fetched_or_unpickled(path):
    allowed_at_top = {"numpy", "minilora"} | set(sys.stdlib_module_names)
    if path.name in WORKERS:
        allowed_at_top |= PEERS
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert {n.split(".")[0] for n in names} <= allowed_at_top
    packages = {name.split(".")[0] for name in imports(path)}
    asks_what_is_there = {"importlib.metadata", "importlib.util"} & imports(path)
    reads_versions = {"importlib"} if asks_what_is_there else set()
    assert not packages & (FORBIDDEN - reads_versions)
    others = packages - allowed_at_top - OPTIONAL
    if path.parent.name == "lab":
        others -= PEERS
    if path.parent.name == "book":
        others -= {"IPython", "sphinx"}
    assert not others
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__", "compile"), node.lineno


@every_file
def test_what_is_public_says_what_it_does(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_importing_it_brings_numpy_and_no_more():
    code = (
        "import sys, numpy; before = set(sys.modules); import minilora;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra = {name for name in found.stdout.split() if "cython" not in name}  # numpy.random's own
    assert extra <= {"minilora", "numpy"}


def tracked() -> list[Path]:
    """The files of the checkout; in a copy without git, what lies at its fixed places."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]
    places = ["minilora", "tests", "chapters", "figures", ".ci"]
    files = [p for place in places for p in (ROOT / place).rglob("*") if p.is_file()]
    files = [p for p in files if "__pycache__" not in p.parts]
    return [*files, ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "LICENSE"]


TEXT = {".py", ".md", ".toml", ".json", ".ipynb", ".txt", ".cu", ""}


def texts():
    return [(p, p.read_text()) for p in tracked() if p.suffix in TEXT and p != Path(__file__)]


def test_no_file_names_a_machine_or_a_registry():
    for path, text in texts():
        for pattern in (
            r"(?<![\w.])/(?:home|root|work|Users|tmp)/\w",
            r"index-url",
            r"https?://[^\s)\"']*(?:pypi|simple|artifact|registry)",
        ):
            found = re.search(pattern, text)
            assert not found, f"{path.name}: {found and found.group()}"


def test_nothing_but_the_agreed_stands_at_the_top():
    top = {p.relative_to(ROOT).parts[0] for p in tracked()}
    assert top <= {
        "pyproject.toml", "README.md", "minilora", "chapters", "tests", "figures", ".ci",
        ".gitignore", "LICENSE",
    }  # fmt: skip


BRITISH = "colour behaviour neighbour initialise normalise optimise quantise labelled centre grey"


def test_spelling_is_american():
    pattern = re.compile(rf"\b(?:{'|'.join(BRITISH.split())})\w*\b", re.IGNORECASE)
    allowed = {"normaliser"}  # a word of Hugging Face's file format, should it be needed
    for path, text in texts():
        if path.suffix in (".py", ".md", ".ipynb") and path.parent.name != "data":
            words = set(pattern.findall(text)) - allowed
            assert not words, f"{path.name}: {words}"
