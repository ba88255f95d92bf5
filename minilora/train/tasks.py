"""The tasks that ship, by name."""

from collections.abc import Callable
from functools import partial

from ..engine.errors import MiniloraError
from . import dates, digits, facts, letters, planted, text
from .task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "dates": dates.task,
    "planted": planted.linear_task,
    "planted-net": planted.net_task,
    "digits-swap": partial(digits.task, "swap"),
    "digits-shuffle": partial(digits.task, "shuffle"),
    "facts": facts.task,
    "cipher": partial(letters.task, "cipher"),
    "cipher-head": partial(letters.task, "cipher", head_only=True),
    "caesar": partial(letters.task, "caesar"),
    "sort": partial(letters.task, "sort"),
    "reverse": partial(letters.task, "reverse"),
    "text": text.task,
}


def get_task(name: str) -> Task:
    """The task of this name; `data:FILE.txt` is the text task on a file of one's own.

    Errors: `MiniloraError` listing the names there are, or saying what is wrong with the file.
    """
    if name.startswith("data:"):
        return text.file_task(name.removeprefix("data:"))
    if name not in TASKS:
        raise MiniloraError(f"task: expected one of {', '.join(TASKS)}; found {name!r}")
    return TASKS[name]()
