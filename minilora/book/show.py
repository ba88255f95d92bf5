"""The library's own source and pictures, shown where the text speaks of them."""

import inspect
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..engine.rules import Rule

ROOT = Path(__file__).parent.parent.parent


def show(thing: Any) -> None:
    """Print the source of a function, class, method or op, and the file where it stands."""
    if isinstance(thing, Rule):
        thing = thing.specification
    file = Path(inspect.getsourcefile(thing)).resolve()
    place = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
    print(f"# {place}\n{inspect.getsource(thing).rstrip()}")


def picture(figure: Any, *arguments: Any) -> Any:
    """What a notebook displays for a matplotlib figure, or for `figure(*arguments, path)`, a
    function of `minilora.lab` that draws into a PNG file.

    The bytes hold no date and no version, so that the same figure is the same picture.
    """
    from IPython.display import Image

    if callable(figure):
        with TemporaryDirectory() as folder:
            data = Path(figure(*arguments, Path(folder) / "figure.png")).read_bytes()
        return Image(data=data, width=640)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return Image(data=buffer.getvalue(), width=640)
