"""Codes and scales on a CPU: a chunk stays in the cache from its first maximum to its bytes.

Equal to the specification to the bit; `tests/test_blockwise.py` holds that.
"""

from functools import lru_cache

import numpy as np

from ..engine.workers import at_work, spread
from ..quant.blockwise import (
    BLOCKS,
    block_scales,
    dequantize_blocks,
    expect_floating,
    expect_packed,
    expect_weights,
    fits,
    nonzero,
    quantize_blocks,
)
from ..quant.codes import Code
from .cpu import arena, blocks

CHUNK = 1 << 18  # a multiple of every block size; calls so long that two threads make them at once
LONGEST = max(BLOCKS)


def chunks(size):
    """As many and as long for every thread, so that none is left with the last alone."""
    threads = at_work()
    if threads == 1:
        return blocks(size, CHUNK)
    count = threads * -(-size // (threads * CHUNK))
    return blocks(size, -(-size // (count * LONGEST)) * LONGEST if count else CHUNK)


@quantize_blocks.on("numpy")
def _(xp, w, *, code, block=64):
    """Whole blocks by chunks; the short last one by the specification."""
    expect_weights(w, block)
    if code.bits == 8 and below(code) is None:
        return NotImplemented
    flat = w.reshape(-1)
    n, whole = w.size, w.size - w.size % block
    lanes = 2 if code.bits == 4 else 1  # entries to a byte
    packed = np.empty(-(-n // lanes), np.uint8)
    scales = np.empty(-(-n // block), np.float32)
    if whole < n:
        if not fits(np, abs(flat[whole:])):
            return NotImplemented  # the specification finds the first bad weight
        last = quantize_blocks.specification(np, flat[whole:], code=code, block=block)
        packed[whole // lanes :], scales[whole // block :] = last

    def store(part):
        x = flat[:whole][part]
        peak = largest(abs(x), block)
        if not fits(np, peak):
            return False
        rows = x.reshape(-1, block)
        s = scales[part.start // block :][: len(rows)]
        s[:] = block_scales(np, rows, peak, code)
        inverse = (1 / nonzero(np, s))[:, None]
        rows = rows.astype(np.float32, copy=False)
        v = arena.take("quant v", rows.shape, np.dtype(np.float32))
        np.multiply(rows, inverse, out=v)
        stored = nearest(v.reshape(-1), code)
        packed[part.start // lanes :][: x.size // lanes] = stored if lanes == 1 else joined(stored)
        return True

    if not all(spread(store, chunks(whole))):
        return NotImplemented  # the specification finds the first bad weight
    return packed, scales


def largest(magnitudes: np.ndarray, block: int) -> np.ndarray:
    """The maximum of each block: of pairs, of pairs of pairs, ...: whole vectors at a time.

    The bits of floats that are not negative are whole numbers in the same order (NaN the
    greatest), and of strided whole numbers NumPy finds the maxima twice as fast.
    """
    peak = magnitudes.view(f"i{magnitudes.itemsize}")
    while peak.size > magnitudes.size // block:
        peak = np.maximum(peak[0::2], peak[1::2])
    return peak.view(magnitudes.dtype)


def joined(stored: np.ndarray) -> np.ndarray:
    """Two codes to a byte, the first in the high half: both are one number of 16 bits."""
    pair = stored.view("<u2")  # first + 256 second
    byte = pair << 4
    byte |= pair >> 8
    return byte.view(np.uint8)[0::2]


def nearest(v: np.ndarray, code: Code) -> np.ndarray:
    """What is stored for each v: how many thresholds lie below it, and what that means."""
    if code.bits == 4:
        # All thresholds in one call: threads hand the interpreter over less often.
        shape = (len(code.thresholds), v.size)
        above = arena.take("quant above", shape, np.dtype(bool))
        np.greater(v, code.thresholds[:, None], out=above)
        position = arena.take("quant position", v.shape, np.dtype(np.uint8))
        np.add.reduce(above.view(np.uint8), axis=0, dtype=np.uint8, out=position)
    else:
        # Numbers that share their upper 16 bits lie above the same thresholds, but for one.
        upper = v.view(np.uint32) >> 16
        position = np.take(below(code), upper, mode="clip")
        position += v > np.take(next_threshold(code), position, mode="clip")
    return position if in_order(code) else np.take(code.order, position, mode="clip")


@lru_cache(32)
def below(code: Code) -> np.ndarray | None:
    """(65536,) how many thresholds lie below the least float32 with these upper 16 bits.

    None for a code so fine that two thresholds share them.
    """
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.where(upper >> 31, [upper | 0xFFFF, upper], [upper, upper | 0xFFFF])
    least, greatest = np.searchsorted(code.thresholds, ends.astype(np.uint32).view(np.float32))
    return least.astype(np.uint8) if (greatest - least <= 1).all() else None


@lru_cache(32)
def next_threshold(code: Code) -> np.ndarray:
    return np.append(code.thresholds, np.float32(np.inf))


@lru_cache(32)
def in_order(code: Code) -> bool:
    return bool((np.diff(code.order.astype(int)) == 1).all())


@lru_cache(32)
def meanings(code: Code) -> np.ndarray:
    """(256,) what a byte means: one float32, or two, which move as one complex number."""
    if code.bits == 8:
        return code.table
    byte = np.arange(256)
    return code.table[np.stack([byte >> 4, byte & 15], axis=1)].view(np.complex64)[:, 0]


@dequantize_blocks.on("numpy")
def _(xp, packed, scales, *, code, block=64, out):
    if not out.flags.c_contiguous:
        return NotImplemented
    expect_packed(packed, scales, out.size, code, block)
    expect_floating("out", out.dtype)
    flat = out.reshape(-1)
    n, whole = out.size, out.size - out.size % block
    lanes, table = 8 // code.bits, meanings(code)

    def restore(part):
        x = flat[:whole][part]
        y = x if x.dtype == np.float32 else arena.take("dequant", x.shape, np.dtype(np.float32))
        stored = packed[part.start // lanes :][: x.size // lanes]
        np.take(table, stored, out=y.view(table.dtype), mode="clip")
        rows = y.reshape(-1, block)
        rows *= scales[part.start // block :][: len(rows), None]
        if y is not x:
            x[:] = y

    spread(restore, chunks(whole))
    if whole < n:
        dequantize_blocks.specification(
            np, packed[whole // lanes :], scales[whole // block :],
            code=code, block=block, out=flat[whole:],
        )  # fmt: skip
    return out
