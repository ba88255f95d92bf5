"""The book as a site: built without a warning, linked in order, and nothing asked of a network."""

import json
import re
from importlib import util
from pathlib import Path

import pytest

from minilora import MiniloraError
from minilora.book import explore, site
from minilora.cli import main
from minilora.engine.errors import FormatError
from minilora.train.tasks import TASKS

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
needs_sphinx = pytest.mark.skipif(
    not all(util.find_spec(name) for name in site.NEEDED), reason="needs minilora[book]"
)


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("writes files")


def record(name):
    return json.loads((ROOT / "figures" / f"{name}.json").read_text())


# ------------------------------------------------------------------------ frames, no sphinx needed


def test_a_rank_has_a_frame_with_its_tasks_and_their_gains():
    records = [record("compare_dates"), record("compare_planted")]
    frames = explore.rank_frames(records)
    assert [f.label for f in frames] == ["1", "2", "4", "8", "16"]
    assert "planted 0.25" in frames[0].words
    assert "planted 1.00" in frames[2].words
    assert "planted" not in frames[4].words  # not run at 16
    for r in records:
        for arm in filter(explore.is_lora, r["arms"]):
            gains = explore.gains(r, arm)
            assert sum(gains) / len(gains) == pytest.approx(arm["gain_share"])


def test_a_record_of_other_ranks_has_frames_and_one_of_other_methods_is_refused():
    records = [record("compare_dates"), record("compare_planted")]
    arms = records[1]["arms"]
    records[1]["arms"] = [arm for arm in arms if arm["rank"] != 1]  # compare --ranks 2,4
    assert "planted" not in explore.rank_frames(records)[0].words
    for methods in (("full",), ("lora",)):
        records[1]["arms"] = [arm for arm in arms if arm["method"] in methods]
        if methods == ("lora",):
            for arm in records[1]["arms"]:
                arm["gain_share"] = None
        with pytest.raises(MiniloraError, match="compare planted: expected LoRA beside a full"):
            explore.rank_frames(records)


@pytest.fixture(scope="module")
def by_block():
    return explore.block_frames(record("codes_by_block"))


def test_a_block_size_has_a_frame_with_the_codes_in_order_of_error(by_block):
    frames = by_block
    assert [int(f.label) for f in frames] == [2**i for i in range(5, 13)]
    assert frames[0].words.startswith("INT4, 16 levels")
    assert all(f.words.startswith("NF4") for f in frames[1:])
    errors = [float(e) for e in re.findall(r"0\.\d{4}", frames[3].words)]
    assert errors == sorted(errors)
    assert len(errors) == 5


def test_the_models_are_those_of_the_ledger():
    whole = record("memory_by_model")
    entries = {e["model"]: e for e in explore.models(whole)}
    assert len(entries) == len(explore.MODELS)
    for known in whole["records"]:
        ours = entries[known["model"]]
        assert ours["parameters"] == known["parameters"]
        for method, entry in known["methods"].items():
            assert ours["methods"][method]["total"] == pytest.approx(entry["total"], rel=0.01)


def test_the_same_record_gives_the_same_frame(by_block):
    whole = record("codes_by_block")
    whole["by_block"] = {
        name: {b: e for b, e in by.items() if b in ("32", "64")}
        for name, by in whole["by_block"].items()
    }
    one, two = (explore.block_frames(whole)[0] for _ in range(2))
    assert one == two
    assert one.words == by_block[0].words
    assert b"<svg" in one.svg
    assert b"<text" not in one.svg  # letters are paths: no font is asked for


def test_an_explorer_shows_the_first_of_its_frames(tmp_path):
    frames = [explore.Frame(str(i), f'"{i}" < 3', b"<svg/>") for i in range(3)]
    text = explore.explorer("x", "Which?", frames, tmp_path / "explore")
    assert text.count("<img") == 3
    assert text.count(" hidden") == 2
    assert 'max="2"' in text
    assert "&quot;1&quot; &lt; 3" in text
    assert sorted(p.name for p in (tmp_path / "explore").iterdir()) == [
        "x-0.svg", "x-1.svg", "x-2.svg",
    ]  # fmt: skip
    with pytest.raises(MiniloraError, match="at least 2 frames, found 1"):
        explore.explorer("x", "Which?", frames[:1], tmp_path)


# ------------------------------------------------------------------------------------ sources


def test_the_index_is_the_readmes_beginning_and_its_questions():
    readme = (
        "# minilora\n\n**What it is.**\n\n## Run it\n\nno\n\n"
        "| [00 One](chapters/00_one.ipynb) | why? |\n"
    )
    text = site.index_page(readme, [Path("c/00_one.ipynb"), Path("c/01_two.ipynb")])
    assert text.startswith("# minilora\n\n**What it is.**\n\n## Chapters")
    assert "- [00 One](chapters/00_one.ipynb): why?\n- [01 two](chapters/01_two.ipynb)\n" in text
    assert ":caption: Chapters\n\nchapters/00_one\nchapters/01_two\n" in text
    assert "Run it" not in text


def test_an_api_page_has_every_public_name_in_the_readmes_order():
    text = site.api_page("engine", (ROOT / "README.md").read_text())
    assert text.index("tensor.py\n---") < text.index("ops.py\n---") < text.index("check.py\n---")
    assert ".. autofunction:: minilora.engine.tensor.matmul" in text
    assert ".. autoclass:: minilora.engine.tensor.Tensor" in text
    assert "bench_torch" not in site.api_page("lab", "")


def test_docstrings_stand_as_they_are_and_calls_without_xp():
    lines = ["y = *x* Wᵀ", "", "  `a`  b"]
    site.verbatim(None, "function", "f", None, None, lines)
    assert lines[3:6] == ["   y = *x* Wᵀ", "   ", "     `a`  b"]
    for signature, called in (
        ("(xp, a, b)", "(a, b)"), ("(xp: Any, x: Any)", "(x: Any)"), ("(xp)", "()"),
        ("(xps, a)", "(xps, a)"), ("()", "()"),
    ):  # fmt: skip
        assert site.as_called(None, "function", "f", None, None, signature, "R") == (called, "R")


# ------------------------------------------------------------------------------------- refusals


def test_what_is_not_installed_is_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(site, "NEEDED", ("sphinx-of-elsewhere",))
    with pytest.raises(MiniloraError, match=r"sphinx-of-elsewhere.*minilora\[book\]"):
        site.build_site(tmp_path / "site", CHAPTERS, ROOT)


def test_no_chapters_no_site(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(site, "NEEDED", ())
    monkeypatch.chdir(tmp_path)
    assert main(["book", "--site", "site"]) == 2
    assert "expected notebooks, or a folder chapters/, found 0" in capsys.readouterr().err
    assert main(["book", "--site", "site", "--from", "x.md", "a.ipynb"]) == 2
    assert "--from or --site" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_would_be_lost_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(site, "NEEDED", ())
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(MiniloraError, match=r"found thesis\.txt, which would be lost"):
        site.build_site(full, CHAPTERS, ROOT)
    (full / site.MARK).write_text("index.html\n")  # an earlier site, and something else in it
    with pytest.raises(MiniloraError, match=r"thesis\.txt"):
        site.build_site(full, CHAPTERS, ROOT)
    with pytest.raises(MiniloraError, match="found a file or a link"):
        site.build_site(full / "thesis.txt", CHAPTERS, ROOT)
    (full / "thesis.txt").unlink()
    site.expect_former_site(full)
    site.expect_former_site(tmp_path / "absent")


def test_what_the_site_needs_is_named_and_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(site, "NEEDED", ())
    with pytest.raises(MiniloraError, match=r"README\.md.*found none"):
        site.build_site(tmp_path / "site", CHAPTERS, tmp_path)
    (tmp_path / "README.md").write_text("# x\n")
    with pytest.raises(MiniloraError, match=r"memory_by_model\.json.*found none"):
        site.build_site(tmp_path / "site", CHAPTERS, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "README.md").write_bytes(b"caf\xe9\n")
    with pytest.raises(MiniloraError, match=r"README\.md: expected text in UTF-8"):
        site.build_site(tmp_path / "site", CHAPTERS, tmp_path)


def test_a_chapter_that_is_no_notebook_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(site, "NEEDED", ())
    (tmp_path / "a.ipynb").write_text("[]")
    with pytest.raises(FormatError, match=r"a\.ipynb: expected a notebook"):
        site.build_site(tmp_path / "site", [tmp_path / "a.ipynb"], ROOT)


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "swap", "rows": []}'])
def test_a_record_of_something_else_is_named(content, tmp_path):
    (tmp_path / "memory_by_model.json").write_text(content)
    with pytest.raises(FormatError, match=r"memory_by_model\.json.*record of `minilora memory`"):
        explore.explore_page(tmp_path, tmp_path / "static")


def test_a_build_that_fails_leaves_the_old_site(monkeypatch, tmp_path):
    monkeypatch.setattr(site, "NEEDED", ())
    monkeypatch.setattr(site, "write_sources", lambda source, *rest: source.mkdir())
    old = tmp_path / "site"
    old.mkdir()
    (old / "index.html").write_text("old")
    (old / site.MARK).write_text("index.html\n")
    with pytest.raises(MiniloraError, match="sphinx could not build"):  # no conf.py, or no sphinx
        site.build_site(old, CHAPTERS, ROOT)
    assert (old / "index.html").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["site"]

    def finished(work):
        (work / "site").mkdir()
        (work / "site" / "index.html").write_text("new")

    monkeypatch.setattr(site, "run_sphinx", finished)
    site.build_site(old, CHAPTERS, ROOT)
    assert (old / "index.html").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


# ------------------------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The whole site; a warning of Sphinx would have raised."""
    return site.build_site(tmp_path_factory.mktemp("book") / "site", CHAPTERS, ROOT)


@pytest.fixture(scope="module")
def pages(built):
    return {p.relative_to(built).as_posix(): p.read_text("utf-8") for p in built.rglob("*.html")}


@needs_sphinx
def test_every_chapter_leads_to_the_next(pages):
    names = ["index", *(f"chapters/{p.stem}" for p in CHAPTERS), "explore", "api/engine"]
    for before, name, after in zip(names, names[1:], names[2:], strict=False):
        text = pages[f"{name}.html"]
        for relation, other in (("prev", before), ("next", after)):
            link = re.search(rf'<a class="{relation}-page" href="([^"]+)"', text).group(1)
            target = (Path(f"{name}.html").parent / link).as_posix()
            assert target.replace("chapters/../", "").replace("api/../", "") == f"{other}.html"


@needs_sphinx
def test_chapters_carry_their_outputs_and_formulas(pages):
    for path in CHAPTERS:
        text = pages[f"chapters/{path.stem}.html"]
        pictures = path.read_text().count('"image/png"')
        assert text.count('src="../_images/') == pictures
        assert "MathJax" in text or "mathjax" in text


@needs_sphinx
def test_nothing_is_asked_of_a_network(built, pages):
    loads = (
        r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=\"([^\"]+)\"|<link\b[^>]*?\shref=\"([^\"]+)\""
    )
    for name, text in pages.items():
        assert not re.search(r"<link[^>]*preconnect", text)
        for one, two in re.findall(loads, text):
            address = one or two
            assert not re.match(r"(?:[a-z]+:)?//", address), f"{name}: {address}"
            if not address.startswith("data:"):
                target = (built / name).parent / re.split(r"[?#]", address)[0]
                assert target.exists(), f"{name}: {address}"
    for style in built.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text("utf-8")), style


@needs_sphinx
def test_three_figures_can_be_explored(built, pages):
    text = pages["explore.html"]
    counts = {"rank": 5, "block": 8, "model": len(explore.MODELS)}
    for name, count in counts.items():
        assert text.count(f'src="_static/explore/{name}-') == count
        assert len(list((built / "_static" / "explore").glob(f"{name}-*.svg"))) == count
    assert text.count('type="range"') == 3
    assert text.count("<script>\nfor (const figure") == 1
    assert all(f"{task} " in text for task in TASKS)


@needs_sphinx
def test_the_library_is_in_its_own_words(pages):
    text = pages["api/engine.html"]
    assert 'id="minilora.engine.tensor.matmul"' in text
    assert "dA = dC Bᵀ" in text
    assert all(f"api/{floor}.html" in pages for floor in site.FLOORS)
    assert "bench_torch" not in pages["api/lab.html"]


@needs_sphinx
def test_a_second_build_replaces_the_first(built, monkeypatch):
    assert set((built / site.MARK).read_text().split()) == {p.name for p in built.iterdir()} - {
        site.MARK
    }
    site.expect_former_site(built)
    monkeypatch.setattr(site, "write_sources", lambda source, *rest: broken(source))
    before = (built / "index.html").read_bytes()
    with pytest.raises(MiniloraError, match=r"(?s)sphinx could not build.*WARNING"):
        site.build_site(built, CHAPTERS, ROOT)
    assert (built / "index.html").read_bytes() == before


def broken(source):
    """A site of one page, with one warning."""
    source.mkdir()
    (source / "conf.py").write_text("extensions = ['myst_nb']\n")
    (source / "index.md").write_text("# x\n\n[nowhere](nowhere.md)\n")
