"""The exercises of all chapters, by name, with their solutions: look here last."""

from ...engine.errors import MiniloraError
from ..exercise import Exercise
from . import ch00, ch01, ch02, ch03, ch04, ch05, ch06, ch07, ch08, ch09, ch10, ch11, ch12, ch13

CHAPTERS = (ch00, ch01, ch02, ch03, ch04, ch05, ch06, ch07, ch08, ch09, ch10, ch11, ch12, ch13)
EXERCISES: dict[str, Exercise] = {e.name: e for chapter in CHAPTERS for e in chapter.EXERCISES}


def exercise(name: str) -> Exercise:
    """The exercise of this name, such as "00.1".  Errors: `MiniloraError` listing the names."""
    if name not in EXERCISES:
        raise MiniloraError(f"exercise: expected one of {', '.join(EXERCISES)}; found {name!r}")
    return EXERCISES[name]
