"""Each block of a tensor is stored as one scale and, for every entry, the nearest level."""

import math
from typing import Any

import numpy as np

from ..engine.backend import device_of, is_array, to_numpy, xp_of
from ..engine.bf16 import empty
from ..engine.errors import QuantError
from ..engine.rules import rule
from ..model.module import module, to_device
from .codes import Code
from .codes import code as code_named

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = ("float16", "float32", "float64", "bfloat16")
SMALLEST = 2.0**-126  # the least normal float32: 1/s of a smaller scale may be infinite
LARGEST = float(np.finfo(np.float32).max)


@rule
def quantize_blocks(xp: Any, w: Any, *, code: Code, block: int = 64) -> tuple[Any, Any]:
    """s = max |x| over a block,   q = the level nearest to x · (1/s)

    w (any shape, read row by row; blocks run across the ends of rows) -> packed
    (ceil(n/2),) uint8 for 4 bits, (n,) for 8; scales (ceil(n / block),) float32.  Of two
    entries the first is in the high half of the byte; a half that is left over at the end
    holds the code of 0.  A block with max |x| < 2^-126 is stored as zeros.

    The product with the float32 1/s differs from x/s by an ulp now and then; both are
    bitsandbytes' on a CPU, which divides in a short last block alone.
    Errors: `QuantError` for an unknown block size, a dtype that is not floating, and the
    first weight that is not a finite float32.
    """
    expect_weights(w, block)
    n = w.size
    if n == 0:  # nothing has no largest magnitude
        return xp.zeros(0, xp.uint8), xp.zeros(0, xp.float32)
    rows = xp.zeros(-(-n // block) * block, w.dtype)
    rows[:n] = w.reshape(-1)
    rows = rows.reshape(-1, block)
    peak = abs(rows).max(axis=1)
    expect_finite(xp, rows, peak)
    scales = block_scales(xp, rows, peak, code)
    rows = rows.astype(xp.float32)
    divisor = nonzero(xp, scales)[:, None]
    v = rows * (1 / divisor)
    if n % block:
        v[-1] = rows[-1] / divisor[-1]
    stored = code.order[xp.searchsorted(code.thresholds, v.reshape(-1))]
    return pack(stored[: n + n % 2]) if code.bits == 4 else stored[:n], scales


@rule
def dequantize_blocks(
    xp: Any, packed: Any, scales: Any, *, code: Code, block: int = 64, out: Any
) -> Any:
    """x' = s c_q   in float32, written into `out` (any shape, any float type) and returned.

    Errors: `QuantError` where packed codes, scales and the size of `out` do not belong
    together.
    """
    expect_packed(packed, scales, out.size, code, block)
    expect_floating("out", out.dtype)
    n = out.size
    stored = unpack(xp, packed)[:n] if code.bits == 4 else packed
    s = xp.broadcast_to(scales[:, None], (len(scales), block)).reshape(-1)[:n]
    out[...] = (code.table[stored] * s).reshape(out.shape)
    return out


def block_scales(xp: Any, rows: Any, peak: Any, code: Code) -> Any:
    """The float32 scale of each row, from the row and its largest magnitude."""
    if code.scaled_by == "maximum" and bool((rows < 0).any()):
        raise QuantError(f"{code.name}: expected no negative numbers, found {float(rows.min())}")
    scales = peak
    if code.scaled_by == "extreme":
        first = abs(rows).argmax(axis=1)[:, None]
        scales = -xp.take_along_axis(rows, first, axis=1)[:, 0]
    return xp.where(peak < SMALLEST, 0, scales).astype(xp.float32)


def nonzero(xp: Any, scales: Any) -> Any:
    """The scales to divide by: 1 for a block of zeros."""
    return xp.where(scales == 0, 1, scales).astype(xp.float32)


def pack(stored: Any) -> Any:
    """Two four-bit numbers to a byte, the first in the high half."""
    return stored[0::2] << 4 | stored[1::2]


def unpack(xp: Any, packed: Any) -> Any:
    """(m,) bytes -> (2m,) four-bit numbers.  The inverse of `pack`."""
    return xp.stack([packed >> 4, packed & 15], axis=1).reshape(-1)


def fits(xp: Any, peak: Any) -> bool:
    """Are these magnitudes finite in float32?  (NaN is less than nothing.)"""
    return bool((peak.astype(xp.float64) <= LARGEST).all())


def expect_finite(xp: Any, rows: Any, peak: Any) -> None:
    if not fits(xp, peak):
        flat = to_numpy(rows).reshape(-1)
        index = int(np.argmin(np.abs(flat.astype(np.float64)) <= LARGEST))
        raise QuantError(f"weights: expected finite float32, found {flat[index]} at flat {index}")


def expect_floating(name: str, dtype: Any) -> None:
    if dtype not in FLOATS:
        raise QuantError(f"{name}: expected {', '.join(FLOATS)}, found {dtype}")


def expect_weights(w: Any, block: int) -> None:
    expect_floating("weights", w.dtype)
    expect_block(block)


def expect_block(block: int) -> None:
    if not (isinstance(block, int) and block in BLOCKS):
        raise QuantError(f"block: expected one of {BLOCKS}, found {block!r}")


def expect_packed(packed: Any, scales: Any, n: int, code: Code, block: int) -> None:
    """Refuse packed codes and scales that are not those of `n` numbers."""
    expect_block(block)
    expected = ((n + 1) // 2 if code.bits == 4 else n,)
    if packed.dtype != "uint8" or packed.shape != expected:
        raise QuantError(
            f"packed: expected uint8 {expected} for {n} numbers in {code.name}, "
            f"found {packed.dtype} {packed.shape}"
        )
    expected = (-(-n // block),)
    if scales.dtype != "float32" or scales.shape != expected:
        raise QuantError(
            f"scales: expected float32 {expected} for {n} numbers in blocks of {block}, "
            f"found {scales.dtype} {scales.shape}"
        )


@module
class QuantizedArray:
    """An array as codes and scales.  Scales are an array, or something that makes one.

    Errors: `QuantError` if the parts do not belong together.
    """

    packed: Any  # uint8: (ceil(n/2),) for 4 bits, (n,) for 8
    scales: Any  # float32 (ceil(n / block),), or DoubleScales
    code: Code
    shape: tuple[int, ...]
    block: int
    dtype: np.dtype  # what it was, and what `dense` makes

    def __post_init__(self) -> None:
        expect_floating("dtype", self.dtype)
        expect_packed(self.packed, self.scales, self.size, self.code, self.block)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, scales of scales included; not the table of the code."""
        return self.packed.nbytes + self.scales.nbytes

    def dense(self, out: Any = None) -> Any:
        """The array that the codes mean, written into `out` where that is given."""
        if out is None:
            out = empty(xp_of(self.packed), self.shape, self.dtype)
        elif out.shape != self.shape:
            raise QuantError(f"out: expected shape {self.shape}, found {out.shape}")
        scales = self.scales if is_array(self.scales) else self.scales.dense()
        return dequantize_blocks(self.packed, scales, code=self.code, block=self.block, out=out)


def quantize_array(w: Any, code: Code | str = "nf4", block: int = 64) -> QuantizedArray:
    """`w` as codes and scales, on the device it is on.  Errors: as `quantize_blocks`."""
    if isinstance(code, str):
        code = code_named(code)
    code = to_device(code, device_of(w))
    packed, scales = quantize_blocks(w, code=code, block=block)
    return QuantizedArray(packed, scales, code, w.shape, block, w.dtype)
