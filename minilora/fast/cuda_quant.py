"""Codes and scales on a card, equal to the host's to the bit where nothing is below 2^-126."""

from ..quant.blockwise import (
    dequantize_blocks,
    expect_floating,
    expect_packed,
    expect_weights,
    quantize_blocks,
)
from .cuda import Kernels, flat_grid, floats, storage

quantizing = Kernels("quant.cu", "quantize4<false>", "quantize4<true>", exact=True)
dequantizing = Kernels(
    "quant.cu",
    *(f"dequantize<{S}, {bits}>" for S in ("float", "bf16") for bits in (4, 8)),
    exact=True,
)


@quantize_blocks.on("cupy")
def _(xp, w, *, code, block=64):
    """Four bits.  Waits once, to see whether every weight was finite; if not, the
    specification finds the first that is not."""
    launch = quantizing.on(xp)
    expect_weights(w, block)
    if launch is None or not floats(w) or code.bits != 4 or code.scaled_by == "maximum":
        return NotImplemented
    n, count = w.size, code.thresholds.size
    w = xp.ascontiguousarray(w)
    packed = xp.empty(-(-n // 2), xp.uint8)
    scales, bad = xp.empty(-(-n // block), xp.float32), xp.zeros(1, xp.int32)
    name = f"quantize4<{str(code.scaled_by == 'extreme').lower()}>"
    launch(name, -(-scales.size // 4), 128, packed, scales, bad, w, n, block,
           code.thresholds, count, code.order)  # fmt: skip
    return NotImplemented if int(bad[0]) else (packed, scales)


@dequantize_blocks.on("cupy")
def _(xp, packed, scales, *, code, block=64, out):
    launch, S = dequantizing.on(xp), storage(out)
    expect_packed(packed, scales, out.size, code, block)
    expect_floating("out", out.dtype)
    if launch is None or S is None or not out.flags.c_contiguous:
        return NotImplemented
    if not (packed.flags.c_contiguous and scales.flags.c_contiguous):
        return NotImplemented
    launch(f"dequantize<{S}, {code.bits}>", min(2048, flat_grid(out.size)), 256,
           out, packed, scales, code.table, out.size, block.bit_length() - 1)  # fmt: skip
    return out
