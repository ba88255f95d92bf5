"""Chapters are written here: executed from top to bottom, and left without a trace of when.

The `.ipynb` is the truth.  To begin one, write a draft in Markdown, in which every fence
marked `python` is a code cell and a line `+++` parts two cells of text:

    minilora book --from draft.md chapters/04_lora.ipynb      # makes the notebook, and runs it
    minilora book chapters/04_lora.ipynb                      # runs it again, in place

The first line of a draft may read `introduces: name, name`: the names of minilora that the
chapter is the first to import.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..engine.errors import FormatError, MiniloraError, MissingFileError
from ..engine.progress import progress
from ..files.atomic import replace_file
from ..train.corpus import read_text

KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tools() -> tuple[Any, Any]:
    """nbformat and nbclient, or an error that names the extra."""
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        raise MiniloraError('the book needs nbclient: pip install "minilora[test]"') from error
    return nbformat, nbclient


def drafted(text: str) -> Any:
    """The notebook of a draft, not yet executed."""
    nbformat, _ = tools()
    introduces: list[str] = []
    first, _, rest = text.partition("\n")
    if first.startswith("introduces:"):
        introduces = [name.strip() for name in first.partition(":")[2].split(",") if name.strip()]
        text = rest
    cells = []
    for i, part in enumerate(re.split(r"^```(python)?\n(.*?)^```$", text, flags=re.M | re.S)):
        kind = i % 3  # text, the word "python", code
        if kind == 2:
            cells.append(nbformat.v4.new_code_cell(part.strip()))
        elif kind == 0:
            texts = [t.strip() for t in re.split(r"^\+\+\+$", part, flags=re.M)]
            cells += [nbformat.v4.new_markdown_cell(t) for t in texts if t]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = dict(KERNEL) | {"minilora": {"introduces": introduces}}
    return notebook


def execute(notebook: Any, folder: Path, timeout: int = 600) -> Any:
    """Run every cell in a fresh kernel that stands in `folder`.

    Errors: `MiniloraError` with the cell that failed, took longer than `timeout` seconds, or
    ended the kernel.
    """
    _, nbclient = tools()
    errors = nbclient.exceptions
    failures = errors.CellExecutionError, errors.CellTimeoutError, errors.DeadKernelError
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=place
    )
    try:
        client.execute(env=dict(os.environ))
    except failures as error:
        raise MiniloraError(f"a cell failed:\n{error}") from None
    return notebook


def normalized(notebook: Any) -> Any:
    """The notebook with fixed ids, PNG or plain text alone as outputs, and no times."""
    count = 0
    declared = notebook.metadata.get("minilora", {})
    notebook.metadata = dict(KERNEL) | {"minilora": declared}
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i + 1:03}"
        cell["metadata"] = {}
        if cell["cell_type"] != "code":
            continue
        count += 1
        cell["execution_count"] = count
        kept = []
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                if output["name"] == "stdout":
                    kept.append(output)
                continue
            if output["output_type"] == "error":
                raise MiniloraError(f"cell {i + 1}: expected no error, found {output['ename']}")
            data = output["data"]
            best = next(
                (k for k in ("image/png", "text/markdown", "text/plain") if k in data), None
            )
            if best is not None:
                output["data"] = {best: data[best]}
                output["metadata"] = {}
                if "execution_count" in output:
                    output["execution_count"] = count
                kept.append(output)
        cell["outputs"] = merged_streams(kept)
    return notebook


def merged_streams(outputs: list) -> list:
    """Neighboring pieces of stdout as one: how they were cut depends on timing."""
    merged: list = []
    for output in outputs:
        if merged and output["output_type"] == merged[-1]["output_type"] == "stream":
            merged[-1]["text"] += output["text"]
        else:
            merged.append(output)
    return merged


def write_chapters(
    paths: Iterable[Path], draft: Path | None = None, device: str = "cpu", fast: bool = False
) -> list[Path]:
    """Execute, normalize and save each chapter; with a `draft`, make the one chapter from it.

    Errors: `MissingFileError`, `FormatError` for a file that is no notebook, `MiniloraError`
    with the cell that failed; a chapter that failed is left as it was.
    """
    nbformat, _ = tools()
    os.environ["MINILORA_DEVICE"] = device
    if fast:
        os.environ["MINILORA_FAST"] = "1"
    done = []
    for path in progress(list(paths), label="book"):
        if draft is not None:
            notebook = drafted(read_text(draft))
        else:
            notebook = read(path)
        finished = normalized(execute(notebook, path.parent))
        replace_file(path, nbformat.writes(finished, version=4).encode() + b"\n")
        done.append(path)
    return done


def read(path: Path) -> Any:
    """A notebook from disk."""
    nbformat, _ = tools()
    try:
        return nbformat.reads(path.read_text("utf-8"), as_version=4)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: expected a notebook, found none") from None
    except Exception as error:  # over JSON that is no notebook nbformat trips in many ways
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{path}: expected a notebook ({reason})") from None
