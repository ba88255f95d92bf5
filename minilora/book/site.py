"""The book as a site: the chapters as committed, figures to explore, and every docstring.

Nothing is executed and nothing is fetched, neither now nor when a page is read.  Sphinx builds
in a folder beside the target, which gets its name when all went well.  This module is also the
Sphinx extension (`setup`) that shows docstrings as they stand in the source.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from ..engine.errors import MiniloraError
from ..files.atomic import disk
from .explore import explore_page, text_of
from .write import read

LIBRARY = Path(__file__).parent.parent
FLOORS = ("engine", "model", "lora", "quant", "optim", "files", "train", "lab")
NEEDED = ("sphinx", "myst_nb", "furo", "sphinx-mathjax-offline")
WORKERS = ("bench_torch", "bench_peers")  # need torch to be imported; nobody calls them
MARK = ".minilora-site"  # in a built site: the names that the build put beside it

CONF = {
    "project": "minilora",
    "extensions": [
        "myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline", "minilora.book.site",
    ],
    "nb_execution_mode": "off",
    "myst_enable_extensions": ["dollarmath", "amsmath"],
    "html_theme": "furo",
    "html_title": "minilora",
    "html_static_path": ["_static"],
    "html_css_files": ["site.css"],
    "html_favicon": "_static/icon.svg",
    "html_copy_source": False,
    "html_show_copyright": False,
    "html_use_index": False,
    "html_domain_indices": False,
    "html_theme_options": {
        "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
        "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
    },
    "add_module_names": False,
    "autodoc_preserve_defaults": True,
    "python_use_unqualified_type_names": True,
    "python_maximum_signature_line_length": 80,
    "toc_object_entries_show_parents": "hide",
}  # fmt: skip
CSS = """\
.docstring .highlight, .docstring pre { background: none !important; }
.docstring pre { white-space: pre-wrap; padding: 0.2rem 0; }
.explorer { margin: 1rem 0 2rem; }
.explorer label { display: block; font-weight: 600; }
.explorer input { display: block; width: 100%; max-width: 32rem; margin: 0.6rem 0; }
.explorer img { background: white; border-radius: 0.4rem; width: 100%; max-width: 36rem; }
.cell_output img { background: white; border-radius: 0.4rem; }
"""
ICON = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="#0072b2"
 d="M1 1h10v10H1z"/><path fill="#e69f00" d="M12 1h3v10h-3zM1 12h10v3H1z"/></svg>
"""


def build_site(folder: Path, chapters: Sequence[Path], root: Path = Path()) -> Path:
    """Build the site of `chapters` into `folder`; README.md and figures/ are those of `root`.

    `folder` is absent, empty, or an earlier site, which is replaced when the new one stands.

    Errors: `MiniloraError` where Sphinx or a companion is not installed, where there are no
    chapters, where `folder` holds anything else, or with Sphinx's warnings, none of which is
    let pass; `MissingFileError` for the README or a record; `FormatError` for what is no notebook.
    """
    missing = [name for name in NEEDED if not util.find_spec(name)]
    if missing:
        raise MiniloraError(f'the site needs {", ".join(missing)}: pip install "minilora[book]"')
    if not chapters:
        raise MiniloraError("book: expected notebooks, or a folder chapters/, found 0")
    folder = Path(os.path.abspath(folder))
    expect_former_site(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_sources(work / "source", chapters, root)
        run_sphinx(work)
        names = sorted(os.listdir(work / "site"))
        (work / "site" / MARK).write_text("\n".join(names) + "\n", "utf-8")
        if folder.exists():
            disk.rename(folder, work / "former")
        try:
            disk.rename(work / "site", folder)
        except OSError:
            if (work / "former").exists():
                disk.rename(work / "former", folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def expect_former_site(folder: Path) -> None:
    """Errors: `MiniloraError` if replacing `folder` would lose anything but an earlier site."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise MiniloraError(f"{folder}: expected a folder or nothing, found a file or a link")
    mark = folder / MARK
    ours = {MARK, *mark.read_text("utf-8").splitlines()} if mark.exists() else set()
    others = sorted(set(os.listdir(folder)) - ours)
    if others:
        raise MiniloraError(
            f"{folder}: expected nothing or an earlier site, found {', '.join(others[:3])}, which "
            "would be lost; build into a folder of its own"
        )


def run_sphinx(work: Path) -> None:
    """`source` to `site`, warnings being errors.  Errors: `MiniloraError` with what it said."""
    path = os.pathsep.join(filter(None, (str(LIBRARY.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", "trees", "source", "site"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise MiniloraError(f"sphinx could not build the site:\n{done.stderr.strip()[-2000:]}")


def write_sources(source: Path, chapters: Sequence[Path], root: Path) -> None:
    """All that Sphinx reads: configuration, chapters, index, explorers, API pages."""
    readme = text_of(root / "README.md")
    for name in ("chapters", "api", "_static"):
        (source / name).mkdir(parents=True)
    conf = "\n".join(f"{key} = {value!r}" for key, value in CONF.items())
    (source / "conf.py").write_text(conf + "\n", "utf-8")
    (source / "_static" / "site.css").write_text(CSS, "utf-8")
    (source / "_static" / "icon.svg").write_text(ICON, "utf-8")
    for chapter in chapters:
        read(chapter)  # of what is no notebook Sphinx would tell at length
        (source / "chapters" / chapter.name).write_text(text_of(chapter), "utf-8")
    (source / "index.md").write_text(index_page(readme, chapters), "utf-8")
    (source / "explore.md").write_text(explore_page(root / "figures", source / "_static"), "utf-8")
    for floor in FLOORS:
        (source / "api" / f"{floor}.rst").write_text(api_page(floor, readme), "utf-8")


def index_page(readme: str, chapters: Sequence[Path]) -> str:
    """The README's beginning, and the chapters with their questions where it has them."""
    opening = readme.partition("\n## ")[0].strip()
    rows = re.findall(r"^\| \[(.+?)\]\(chapters/(.+?)\.ipynb\) \| (.+?) \|$", readme, re.M)
    asked = {stem: (title, question) for title, stem, question in rows}
    lines, tree = [], []
    for stem in [path.stem for path in chapters]:
        title, question = asked.get(stem, (stem.replace("_", " "), ""))
        lines.append(f"- [{title}](chapters/{stem}.ipynb)" + (f": {question}" if question else ""))
        tree.append(f"chapters/{stem}")
    apis = [f"{floor} <api/{floor}>" for floor in FLOORS]
    return "\n\n".join((
        opening,
        "## Chapters", "\n".join(lines),
        "## Figures and names",
        "[Explore](explore.md): rank, block size and model size, each on a slider. The library's "
        "own words, floor by floor, stand under *Library* in the contents.",
        toctree("Chapters", tree), toctree("Figures", ["explore"]), toctree("Library", apis),
    )) + "\n"  # fmt: skip


def toctree(caption: str, entries: Sequence[str]) -> str:
    return "\n".join(("```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"))


def api_page(floor: str, readme: str) -> str:
    """Every public name of a floor that says what it does, file by file, in source order.

    The files that the README names come first, in its order.
    """
    row = re.search(rf"^\| `{floor}/` \| (.+) \|$", readme, re.M)
    told = row.group(1) if row else ""
    files = {path.stem: path for path in sorted((LIBRARY / floor).glob("[!_]*.py"))}
    order = dict.fromkeys([n for n in re.findall(r"`(\w+)\.py`", told) if n in files] + [*files])
    opening = f"{told[:1].upper()}{told[1:]}." if told else ""
    parts = [f"{floor}\n{'=' * len(floor)}", opening.replace("`", "``")]
    for name in order:
        if name in WORKERS:
            continue
        module = f"minilora.{floor}.{name}"
        parts += [f"{name}.py\n{'-' * (len(name) + 3)}", f".. automodule:: {module}"]
        for node in ast.parse(files[name].read_text("utf-8")).body:
            kind = {ast.FunctionDef: "function", ast.ClassDef: "class"}.get(type(node))
            if kind and not node.name.startswith("_") and ast.get_docstring(node):
                members = "\n   :members:\n   :member-order: bysource" if kind == "class" else ""
                parts.append(f".. auto{kind}:: {module}.{node.name}{members}")
    return "\n\n".join(parts) + "\n"


def verbatim(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A docstring as it stands in the source: formulas keep their columns."""
    if any(lines):
        lines[:] = [".. code-block:: text", "   :class: docstring", "", *(f"   {x}" for x in lines)]
        lines.append("")


def as_called(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str, returned: str
) -> tuple[str, str]:
    """The signature of a call: `xp`, which an op gets from its arrays, left out."""
    return (re.sub(r"^\(xp\b(: \w+)?(, )?", "(", signature or "") or signature), returned


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", verbatim)
    app.connect("autodoc-process-signature", as_called)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
