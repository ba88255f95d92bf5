"""The chapters as they are committed: run, checked, short, and in order."""

import ast
import json
import re
from pathlib import Path

import pytest

from minilora.book.exercises import EXERCISES

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
NOTEBOOKS = {path: json.loads(path.read_text()) for path in CHAPTERS}
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


def cells(path, kind):
    return [c for c in NOTEBOOKS[path]["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def prose(path):
    """The words of a chapter, formulas and code names left out."""
    text = "\n".join(source(c) for c in cells(path, "markdown"))
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return re.findall(r"[A-Za-z][\w'-]*", text)


def test_there_are_chapters():
    assert CHAPTERS
    assert CHAPTERS[0].stem.startswith("00_")


@every_chapter
def test_every_cell_was_run_without_an_error(path):
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error"]
    for output in outputs:
        assert output["output_type"] in ("stream", "execute_result", "display_data")
        assert output.get("name", "stdout") == "stdout"
        kinds = set(output.get("data", {}))
        assert kinds <= {"image/png", "text/plain", "text/markdown"}
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert 1 <= len(pictures) <= 8


@every_chapter
def test_cells_are_short_and_checked(path):
    code = [source(c) for c in cells(path, "code")]
    assert max(len(c.splitlines()) for c in code) <= 30
    checked = [c for c in code if re.search(r"\bassert\b|assert_same|\.check\(", c)]
    assert len(checked) >= len(code) / 3


@every_chapter
def test_prose_and_code_are_in_proportion(path):
    lines = sum(len(source(c).splitlines()) for c in cells(path, "code"))
    assert 4 <= len(prose(path)) / lines <= 8


@every_chapter
def test_ids_are_fixed_and_no_times_are_kept(path):
    notebook = NOTEBOOKS[path]
    assert [c["id"] for c in notebook["cells"]] == [
        f"cell-{i + 1:03}" for i in range(len(notebook["cells"]))
    ]
    assert all(c["metadata"] == {} for c in notebook["cells"])
    printed = "".join("".join(o.get("text", "")) for c in cells(path, "code") for o in c["outputs"])
    assert not re.search(r"\d\s?(?:ms|seconds)\b", printed)


@every_chapter
def test_the_source_that_it_shows_is_the_source_that_there_is(path):
    for cell in cells(path, "code"):
        printed = "".join("".join(o.get("text", "")) for o in cell["outputs"])
        pieces = re.split(r"^# (minilora/[\w/]+\.py)\n", printed, flags=re.M)
        for file, shown in zip(pieces[1::2], pieces[2::2], strict=True):
            assert shown.rstrip() in (ROOT / file).read_text(), f"{file}: run the chapter again"


def imported(path):
    """Names that a chapter takes from minilora."""
    found = set()
    for cell in cells(path, "code"):
        plain = re.sub(r"^%.*", "", source(cell), flags=re.M)  # what only a notebook understands
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minilora"):
                found |= {alias.name for alias in node.names}
    return found


TOOLS = {"book", "exercise", "show", "picture", "assert_same"}  # of the chapters themselves


def test_names_are_imported_only_once_introduced():
    known = set(TOOLS)
    for path in CHAPTERS[1:]:  # 00, the overture, is excepted
        known |= set(NOTEBOOKS[path]["metadata"]["minilora"]["introduces"])
        assert imported(path) <= known, f"{path.stem}: {imported(path) - known}"


@every_chapter
def test_it_has_its_exercises_and_each_is_checked(path):
    number = path.stem[:2]
    mine = {name for name in EXERCISES if name.startswith(f"{number}.")}
    assert len(mine) >= 3
    text = "\n".join(source(c) for c in cells(path, "code"))
    for name in mine:
        assert f'exercise("{name}").check(' in text


@every_chapter
def test_the_nine_beats(path):
    titles = re.findall(r"^## (\d)\. ", "\n".join(source(c) for c in cells(path, "markdown")), re.M)
    assert titles == [str(i) for i in range(1, 10)]


@every_chapter
def test_files_that_it_names_exist(path):
    text = "\n".join(source(c) for c in NOTEBOOKS[path]["cells"])
    for name in re.findall(r"(?:minilora|tests|figures)/[\w/.-]+\.(?:py|json|png)", text):
        assert (ROOT / name).exists(), name
    prose = "\n".join(source(c) for c in cells(path, "markdown"))
    for link in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (path.parent / link).exists(), link


def test_the_readme_lists_every_chapter():
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"\(chapters/([^)]+\.ipynb)\)", readme)
    assert listed == [path.name for path in CHAPTERS]
