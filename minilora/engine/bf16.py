"""bfloat16: the upper half of a float32, kept as the integer that it is, since NumPy has none.

A BF16 is a store of numbers, with which nobody calculates.  Whoever is handed one says how it
is to be read: an op with a rule of its own for BF16 takes it as it is; any other gets float32,
and what it returns is rounded back.  See `Rule.run`; the laws that follow from it:

    values        a result is BF16 where a positional argument was, save a single number:
                  a loss stays float32, for there is nothing to gain and a digit to lose
    cotangents    are stored as the value that they belong to: BF16 for a BF16 activation,
                  float32 for a float32 Parameter or a loss.  A sum of two is rounded once.

(Wang and Kanwar 2019, "BFloat16: the secret to high performance on Cloud TPUs".)
"""

from operator import attrgetter
from typing import Any

import numpy as np


class DType(str):
    """The name of a dtype that NumPy does not know, with what is asked of one."""

    __slots__ = ()
    kind, itemsize = "f", 2
    name = property(str)


BFLOAT16 = DType("bfloat16")
ASKED = ("shape", "ndim", "size", "strides", "itemsize", "nbytes", "flags")
MOVED = ("reshape", "transpose", "swapaxes", "copy", "ravel")
UINT16 = np.dtype(np.uint16)


def float32_of(bits: Any) -> Any:
    """uint16 -> float32, exactly: sixteen zeros behind."""
    whole = bits.astype("uint32")
    whole <<= 16  # in place, for NumPy makes a number of what it computes from 0-d arrays
    return whole.view("float32")


def bits_of(values: Any) -> Any:
    """float -> uint16 by way of float32, to the nearest, ties to even; a NaN stays one.

    Adding 0x7FFF, or 0x8000 to an odd upper half, carries into it where that is nearer.
    """
    whole = values.astype("float32").view("uint32")
    nan = ((whole & 0x7FFFFFFF) > 0x7F800000).astype("uint32")
    nearest = whole + (0x7FFF + (whole >> 16 & 1)) * (1 - nan)
    return ((nearest | nan << 22) >> 16).astype("uint16")


class BF16:
    """An array in bfloat16 over `bits`, a uint16 array of NumPy or CuPy; views share memory.

    It has the shape of its bits and can be sliced, reshaped and written to (what is written is
    rounded), and no arithmetic: `float32()` gives the numbers.
    Errors: `TypeError` for bits of another dtype, for arithmetic and for implicit conversion.
    """

    __slots__ = ("bits",)
    __array_ufunc__ = None  # array + BF16 is refused, not tried entry by entry
    __hash__ = None
    dtype = BFLOAT16

    def __init__(self, bits: Any):
        if getattr(bits, "dtype", None) != UINT16:
            raise TypeError(f"BF16: expected uint16 bits, found {getattr(bits, 'dtype', bits)}")
        self.bits = np.asarray(bits) if isinstance(bits, np.generic) else bits

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> "BF16":
        return BF16(self.bits[index])

    def __setitem__(self, index: Any, values: Any) -> None:
        if isinstance(values, (int, float)):
            values = np.float32(values)
        self.bits[index] = values.bits if type(values) is BF16 else bits_of(values)

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("a BF16 is not converted implicitly; use .float32()")

    @property
    def T(self) -> "BF16":
        return BF16(self.bits.T)

    def float32(self) -> Any:
        """The numbers, exactly, as a new array of the same library."""
        return float32_of(self.bits)

    def astype(self, dtype: Any) -> Any:
        """The numbers in a float type of the array library."""
        return self.float32().astype(dtype)

    def item(self) -> float:
        """The one number."""
        return self.float32().item()

    def __repr__(self) -> str:
        return f"BF16({self.float32()!r})"


def moved(name: str) -> Any:
    return lambda self, *places: BF16(getattr(self.bits, name)(*places))


for _name in ASKED:
    setattr(BF16, _name, property(attrgetter(f"bits.{_name}")))
for _name in MOVED:
    setattr(BF16, _name, moved(_name))


def empty(xp: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of a dtype that may be BFLOAT16, with unspecified content."""
    return BF16(xp.empty(shape, np.uint16)) if dtype == BFLOAT16 else xp.empty(shape, dtype)
