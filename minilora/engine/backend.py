"""The array knows where it lives: no flag, no global, and CuPy only on request."""

import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from .bf16 import BF16
from .errors import MiniloraError

DEVICES = ("cpu", "cuda")
LIBRARIES = ("numpy", "cupy")


def xp_of(array: Any) -> ModuleType:
    """The library that owns `array`: `numpy` or `cupy`.  No import, no probe."""
    try:
        return sys.modules[package_of(type(array))]
    except KeyError:
        return xp_of(array.bits)  # of a BF16


def device_of(array: Any) -> str:
    """ "cpu" or "cuda", by the array's library."""
    return "cpu" if xp_of(array) is np else "cuda"


# What follows is asked several times in every op, hence remembered by class.


@cache
def package_of(kind: type) -> str:
    """The package that a class comes from: "BF16" for that class, which does not say whose its
    bits are."""
    return "BF16" if kind is BF16 else kind.__module__.partition(".")[0]


@cache
def library_of(kind: type) -> str | None:
    """The name of the library whose arrays are of this class, or "BF16"; None if it is no array."""
    package = package_of(kind)
    return package if package in (*LIBRARIES, "BF16") and hasattr(kind, "dtype") else None


def is_array(value: Any) -> bool:
    """True for an array of a supported library; False for numbers, lists, None."""
    return library_of(type(value)) is not None


def as_array(value: Any) -> Any:
    """An array as it is, a NumPy number with its dtype, anything else in float32."""
    if not is_array(value):
        return np.asarray(value, dtype=np.float32)
    return np.asarray(value) if isinstance(value, np.generic) else value


def address_of(array: Any) -> int:
    """Where an array's memory begins."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def to_device(array: Any, device: str) -> Any:
    """`array` on `device` ("cpu" or "cuda"): the one door between host and card.

    Returns the same object when it is there already.  The library imports CuPy here and
    nowhere else.  Errors: `MiniloraError` for another device name, or for "cuda"
    without CuPy.
    """
    if device not in DEVICES:
        raise MiniloraError(f"device: expected one of {DEVICES}, found {device!r}")
    if type(array) is BF16:
        bits = to_device(array.bits, device)
        return array if bits is array.bits else BF16(bits)
    if device == "cpu":
        return to_numpy(array)
    return cupy().asarray(array)


def to_numpy(array: Any) -> np.ndarray:
    """A host copy of a device array; a host array itself; of a BF16 its numbers in float32."""
    if type(array) is BF16:
        return BF16(to_numpy(array.bits)).float32()
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
