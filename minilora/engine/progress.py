"""Long work shows how far it is: a bar on a terminal, nothing in pipes and notebooks."""

import sys
from collections.abc import Iterable
from typing import Any


class Silent:
    """Stands where a bar would, and shows nothing."""

    def __init__(self, iterable: Iterable | None = None):
        self.iterable = iterable if iterable is not None else ()

    def __iter__(self):
        return iter(self.iterable)

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...

    def close(self) -> None: ...


def on_terminal() -> bool:
    """Is there a standard error, and is it a terminal?"""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(iterable: Iterable | None = None, *, total: int | None = None, label: str = "") -> Any:
    """A tqdm bar on a terminal; where stderr is none, or tqdm is missing, the same silently."""
    if not on_terminal():
        return Silent(iterable)
    try:
        from tqdm import tqdm
    except ImportError:
        return Silent(iterable)
    return tqdm(iterable, total=total, desc=label, leave=False, dynamic_ncols=True)
