"""The tasks that ship, by name."""

from collections.abc import Callable

from ..engine.errors import MiniloraError
from . import dates, planted
from .task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "dates": dates.task,
    "planted": planted.linear_task,
    "planted-net": planted.net_task,
}


def get_task(name: str) -> Task:
    """The task of this name.  Errors: `MiniloraError` listing the names there are."""
    if name not in TASKS:
        raise MiniloraError(f"task: expected one of {', '.join(TASKS)}; found {name!r}")
    return TASKS[name]()
