"""Every refusal is one family, and says what was expected and what was found."""

import math
from typing import Any

import numpy as np


class MiniloraError(ValueError):
    """Something that minilora was given cannot be used; the message names it."""


def is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def expect_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number, or one below `least`, in the words of all refusals."""
    if not is_whole(value) or value < least:
        raise MiniloraError(f"{name}: expected a whole number >= {least}, found {value}")


def is_number(value: Any) -> bool:
    return is_whole(value) or isinstance(value, (float, np.floating))


def expect_number(name: str, value: Any) -> None:
    """Refuse what is no finite number >= 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise MiniloraError(f"{name}: expected a finite number >= 0, found {value}")


def expect_positive(name: str, value: Any) -> None:
    """Refuse what is no number > 0; infinity is one."""
    if not is_number(value) or not value > 0:
        raise MiniloraError(f"{name}: expected a number > 0, found {value}")


class FormatError(MiniloraError):
    """A file does not follow its format."""


class MissingFileError(FormatError, FileNotFoundError):
    """A file that was named does not exist."""

    def __str__(self) -> str:  # OSError would print its own two-argument form
        return str(self.args[0]) if self.args else ""


class AdapterError(MiniloraError):
    """An adapter does not fit its model, or was put together wrongly."""


class MissingAdapterError(AdapterError, MissingFileError):
    """A directory that was named holds no adapter."""


class BaseMismatchWarning(UserWarning):
    """An adapter was trained on another base than the one it is put on."""


class RankWarning(UserWarning):
    """An adapter has a higher rank than its weight can have."""


class QuantError(MiniloraError):
    """An array cannot be quantized, or packed codes and scales disagree."""


class NumericsError(MiniloraError):
    """A value is not finite, or an index or label is out of range."""


class CheckpointError(MiniloraError):
    """A training state could not be saved, or does not belong to this run."""
