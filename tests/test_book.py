"""The machinery of the chapters: checkers that find the fault, notebooks that come out the same."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from minilora import MiniloraError
from minilora.book.exercise import Exercise, difference, multiplications, near, shown
from minilora.book.exercises import EXERCISES, exercise
from minilora.book.show import show
from minilora.book.write import drafted, execute, read
from minilora.engine.errors import FormatError
from minilora.engine.fused import linear
from minilora.engine.tensor import Tensor


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("runs on the host")


every_exercise = pytest.mark.parametrize("e", EXERCISES.values(), ids=EXERCISES)


@every_exercise
def test_the_right_answer_passes(e):
    verdict = e.verdict(e.solution)
    assert verdict.state == "passed", verdict


@every_exercise
def test_the_plausible_wrong_answer_fails(e):
    verdict = e.verdict(e.wrong)
    assert verdict.state == "failed", verdict
    assert "expected" in str(verdict) or "budget" in str(verdict)


@every_exercise
def test_a_blank_is_open_and_gives_nothing_away(e):
    def blank(*arguments):
        raise NotImplementedError

    for answer in (blank, lambda *arguments: ...):
        verdict = e.verdict(answer)
        assert verdict.state == "open"
        assert f'exercise("{e.name}").hint' in str(verdict)
        assert f'show(exercise("{e.name}").solution)' in str(verdict)
        assert e.hint not in str(verdict)
    assert e.hint in str(e.verdict(lambda *arguments: "no")), "after a try, the hint"


@every_exercise
def test_every_solution_can_be_shown(e, capsys):
    show(e.solution)
    text = capsys.readouterr().out
    assert text.startswith(f"# minilora/book/exercises/ch{e.name[:2]}.py\n")
    assert "lambda" in text or "return" in text


@every_exercise
def test_an_answer_that_crashes_is_shown(e):
    verdict = e.verdict(lambda *arguments: 1 / 0)
    assert verdict.state == "failed"
    assert "ZeroDivisionError" in str(verdict)


def test_blocks_that_restart_with_every_row_are_found():
    """Exercise 08.1 counts blocks row after row: they run across the ends of rows."""

    def row_by_row(g, codes, scales, levels, block):
        row, column = np.indices(codes.shape)
        return g @ (levels[codes] * scales[row * (codes.shape[1] // block) + column // block])

    assert exercise("08.1").verdict(row_by_row).state == "failed"


def test_a_budget_below_that_of_rank_1_and_a_tensor_of_many_outer_blocks_are_asked_for():
    """Answers that were once right in all cases: those that tell them apart were never drawn."""

    def at_least_one(shapes, budget):
        return max(1, budget // sum(a + b for a, b in shapes))

    assert exercise("05.2").verdict(at_least_one).state == "failed"
    assert exercise("07.3").verdict(lambda n, b, d: min(n, 256 * b) if d else b).state == "failed"
    assert exercise("07.3").verdict(lambda n, b, d: n).state == "failed"


DOUBLE = Exercise(
    name="x", statement="Double it.", hint="+", draw=lambda rng: (rng.standard_normal(2),),
    solution=lambda a: 2 * a, wrong=lambda a: a, labels=("a",),
)  # fmt: skip


def test_the_counterexample_is_the_first_one(capsys):
    DOUBLE.check(lambda a: np.where(a > 2, 0, 2 * a))
    text = capsys.readouterr().out
    seed = next(s for s in range(99) if (np.random.default_rng(s).standard_normal(2) > 2).any())
    assert f"Case {seed}:" in text
    assert "a = array (2,): [" in text
    assert "expected array" in text


def test_the_place_of_the_difference_is_shown():
    def off_at_the_end(a):
        b = 2 * a
        b[-1] += 1
        return b

    last = DOUBLE.draw(np.random.default_rng(0))[0][-1]
    text = str(DOUBLE.verdict(off_at_the_end))
    expected = f"expected {2 * last:.8g}, found {2 * last + 1:.8g}"
    assert f"1 of 2 entries differ, the first at [1]: {expected}" in text
    assert "shape: expected (2,), found (1, 2)" in str(DOUBLE.verdict(lambda a: 2 * a[None]))
    pair = np.zeros((2, 3)), np.ones(3)
    other = np.zeros((2, 3)), np.array([1, 1, np.nan])
    assert difference(other, pair, 1e-6).startswith("part 2: 1 of 3 entries differ, the first at")
    assert "number of parts: expected 2, found 1" in difference(pair[:1], pair, 0)
    assert difference((1, 2), (1, 3), 0) == "part 2: expected 3, found 2"
    assert difference("no", 1.0, 0) == difference(2.0, 1.0, 0) == ""
    assert shown(pair) == "(array (2, 3): [0., 0., 0., 0., ...], array (3,): [1., 1., 1.])"


def test_an_answer_may_write_into_its_arguments():
    def scribble(a):
        b = 2 * a
        a[...] = np.inf
        return b if b[0] < 2 else a

    text = str(DOUBLE.verdict(scribble))
    assert "a = array" in text
    assert "inf" not in next(line for line in text.splitlines() if "a = " in line)
    assert DOUBLE.verdict(lambda a: np.multiply(a, 2, out=a)).state == "passed"


def test_shapes_and_kinds_count():
    assert DOUBLE.verdict(lambda a: (2 * a)[:1]).state == "failed"
    assert DOUBLE.verdict(lambda a: "no").state == "failed"
    assert near((1.0, [2.0]), (1.0, [2.0 + 1e-9]), 1e-6)
    assert not near((1.0,), (1.0, 2.0), 1e-6)
    assert near(Tensor(np.ones(2)), np.ones(2), 0)
    assert not near(float("nan"), 1.0, 1e-6)
    for odd in ("1", 1 + 2j, np.array(["1"]), 10**400):
        assert not near(odd, 1.0, 1e-6)
        assert difference(odd, 1.0, 1e-6) == ""


def test_multiplications_are_counted():
    a, b = np.ones((3, 4)), np.ones((4, 5))
    assert multiplications(lambda a, b: (a @ b).sum(), (a, b)) == 60
    assert multiplications(lambda a, b: a @ (b @ b.T @ b), (a, b)) == 4 * 4 * 5 * 2 + 60
    into = lambda a, b, c: np.matmul(a, b, out=c).sum()
    assert multiplications(into, (a, b, np.empty((3, 5)))) == 60
    assert multiplications(lambda a, b: np.dot(a, b).dot(b.T), (a, b)) == 60 + 3 * 5 * 4
    assert multiplications(lambda a, b: np.dot(2, a) + a.dot(2.0), (a, b)) == 0
    column = lambda a, b: a[0].dot(b) @ b.T + a[0].dot(np.dot(a.T, a[:, 0]))
    assert multiplications(column, (a, b)) == 4 * 5 + 5 * 4 + 4 * 3 + 4
    into = lambda a, b, c: np.dot(a, b, out=c).sum()
    assert multiplications(into, (a, b, np.empty((3, 5)))) == 60


def test_values_are_shown_short():
    assert shown(3) == "3"
    assert len(shown("x" * 500)) <= 90
    assert shown(np.arange(9.0)).startswith("array (9,): [0., 1.")


def test_source_is_shown_with_its_file(capsys):
    show(linear)
    text = capsys.readouterr().out
    assert text.startswith("# minilora/engine/fused.py\n@op\ndef linear(")
    show(Exercise.check)
    assert "def check(self" in capsys.readouterr().out


def test_an_unknown_exercise():
    with pytest.raises(MiniloraError, match=r"00\.1"):
        exercise("99.9")


# ---------------------------------------------------------------------------- notebooks

DRAFT = """introduces: Tensor, freeze
# A title

Text.
+++
More text.

```python
import sys

import numpy as np

print("one")
print("two", file=sys.stderr)
np.arange(3)
```

```python
from matplotlib.figure import Figure

from minilora.book.show import picture

figure = Figure()
figure.subplots().plot([1, 2])
picture(figure)
```
"""


def book(*arguments, cwd):
    command = [sys.executable, "-m", "minilora", "book", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    (folder / "draft.md").write_text(DRAFT)
    done = book("--from", "draft.md", "a.ipynb", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "a.ipynb"


def test_a_draft_becomes_a_notebook(made):
    notebook = json.loads(made.read_text())
    cells = notebook["cells"]
    assert [c["cell_type"] for c in cells] == ["markdown", "markdown", "code", "code"]
    assert [c["id"] for c in cells] == [f"cell-{i:03}" for i in range(1, 5)]
    assert [c["execution_count"] for c in cells[2:]] == [1, 2]
    assert notebook["metadata"]["minilora"] == {"introduces": ["Tensor", "freeze"]}
    first, second = (c["outputs"] for c in cells[2:])
    assert [o["output_type"] for o in first] == ["stream", "execute_result"]
    assert "".join(first[0]["text"]) == "one\n"  # and nothing of stderr
    assert list(second[0]["data"]) == ["image/png"]


def test_a_second_run_writes_the_same_bytes(made):
    before = made.read_bytes()
    assert book("a.ipynb", cwd=made.parent).returncode == 0
    assert made.read_bytes() == before


def test_a_cell_that_fails_leaves_the_notebook_as_it_was(made, tmp_path):
    (tmp_path / "draft.md").write_text("```python\n1 / 0\n```\n")
    target = tmp_path / "b.ipynb"
    target.write_bytes(made.read_bytes())
    done = book("--from", "draft.md", "b.ipynb", cwd=tmp_path)
    assert done.returncode == 2
    assert "ZeroDivisionError" in done.stderr
    assert target.read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("cell", "words"), [("while True: pass", "timed out"), ("import os; os._exit(1)", "died")]
)
def test_a_cell_that_never_ends_or_ends_the_kernel_is_an_error(tmp_path, cell, words):
    with pytest.raises(MiniloraError, match=words):
        execute(drafted(f"```python\n{cell}\n```"), tmp_path, timeout=3)


def test_what_is_no_notebook_is_named(tmp_path):
    for content in ("{", "[]", "3", "{}", '{"nbformat": 4, "cells": 3}'):
        (tmp_path / "c.ipynb").write_text(content)
        with pytest.raises(FormatError, match=r"c\.ipynb: expected a notebook \(.*\)$"):
            read(tmp_path / "c.ipynb")
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    for names, words in (
        (["c.ipynb"], "c.ipynb: expected a notebook"), (["d.ipynb"], "d.ipynb: expected a"),
        (["--from", "latin.md", "d.ipynb"], "latin.md: expected text in UTF-8"),
        (["--from", "none.md", "d.ipynb"], "none.md: no such file"),
    ):  # fmt: skip
        done = book(*names, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"minilora book: {words}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "d.ipynb").exists()
    assert "found 0" in book(cwd=tmp_path).stderr


def test_where_chapters_compute():
    code = "from minilora import book; print(book.device, book.fast)"
    env = os.environ | {"MINILORA_DEVICE": "cuda", "MINILORA_FAST": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["cuda", "True"]
