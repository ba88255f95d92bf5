"""The array knows where it lives: no flag, no global, and CuPy only on request."""

import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from .errors import MiniloraError

DEVICES = ("cpu", "cuda")
LIBRARIES = ("numpy", "cupy")


def xp_of(array: Any) -> ModuleType:
    """The library that owns `array`: `numpy` or `cupy`.  No import, no probe."""
    return sys.modules[package_of(type(array))]


# What follows is asked several times in every op, hence remembered by class.


@cache
def package_of(kind: type) -> str:
    """The package that a class comes from."""
    return kind.__module__.partition(".")[0]


@cache
def library_of(kind: type) -> str | None:
    """The name of the library whose arrays are of this class; None if it is no array."""
    package = package_of(kind)
    return package if package in LIBRARIES and hasattr(kind, "dtype") else None


def is_array(value: Any) -> bool:
    """True for an array of a supported library; False for numbers, lists, None."""
    return library_of(type(value)) is not None


def to_device(array: Any, device: str) -> Any:
    """`array` on `device` ("cpu" or "cuda"): the one door between host and card.

    Returns the same object when it is there already.  CuPy is imported here and
    nowhere else.  Errors: `MiniloraError` for another device name, or for "cuda"
    without CuPy.
    """
    if device not in DEVICES:
        raise MiniloraError(f"device: expected one of {DEVICES}, found {device!r}")
    if device == "cpu":
        return to_numpy(array)
    return cupy().asarray(array)


def to_numpy(array: Any) -> np.ndarray:
    """A host copy of a device array; a host array itself."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def cupy() -> ModuleType:
    """The CuPy module, or an error that names the extra that brings it."""
    try:
        import cupy
    except ImportError as error:
        raise MiniloraError(
            'device "cuda" needs CuPy: pip install "minilora[gpu]" (CUDA 12) '
            'or "minilora[gpu13]" (CUDA 13)'
        ) from error
    return cupy
