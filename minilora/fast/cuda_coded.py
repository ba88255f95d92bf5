"""A few rows against a weight in four bits: decoding reads the codes, and makes nothing dense."""

from types import ModuleType
from typing import Any

from ..engine.backend import is_array
from ..engine.bf16 import empty
from ..quant.linear import QuantizedLinear
from .cuda import STORAGE, Kernels, contiguous, storage

ROWS = (1, 2, 4, 8)  # of x, that there is a kernel for; with more, W is made dense
PIECE, OUTPUTS = 32, 16  # of the kernel: columns of a lane; rows of the weight of a block

kernels = Kernels(
    "coded_product.cu", *(f"coded_product<{E}, {n}>" for E in STORAGE.values() for n in ROWS)
)


def coded_product(xp: ModuleType, x: Any, base: Any, more: Any = None) -> Any:
    """y = x Ŵᵀ + more + b where `base` is a QuantizedLinear; None for what the kernel does not
    take.

    x (n, d_in) with n <= 8; y and `more` (n, d_out).  All of them and b are float32 or all
    bfloat16; sums are float32, and y is rounded once.  Any four-bit code, scales quantized or
    not; d_in is a multiple of 32.  What a row gets does not depend on the others: not a bit of it.

    In bfloat16 the specification rounds Ŵ too, as it makes it dense.  Here Ŵ = s c_q stays
    unrounded, which is nearer to what the codes mean: the two differ by up to 2^-8 of each weight.
    """
    if not isinstance(base, QuantizedLinear) or len(x) > ROWS[-1]:
        return None
    weight, bias = base.weight, None if base.bias is None else base.bias.data
    (d_out, d_in), scales, code = base.shape, base.weight.scales, base.weight.code
    launch, arrays = kernels.on(xp), [weight.packed]
    if is_array(scales):
        scaling = scales, None, None, 0.0
    else:
        inner = scales.residual
        if not is_array(inner.scales) or inner.code.bits != 8:
            return None
        scaling = inner.scales, inner.packed, inner.code.table, scales.offset
    arrays += [a for a in scaling[:3] if a is not None]
    E = storage(x, more, bias)
    if (
        launch is None or E is None or code.bits != 4 or d_in % PIECE or x.shape[1] != d_in
        or weight.dtype not in (xp.float32, x.dtype)
        or (bias is not None and bias.shape != (d_out,))
        or not all(a.flags.c_contiguous for a in arrays)
    ):  # fmt: skip
        return None
    n, y = len(x), empty(xp, (len(x), d_out), x.dtype)
    name = f"coded_product<{E}, {next(rows for rows in ROWS if rows >= n)}>"
    inner_block = 1 if is_array(scales) else scales.residual.block
    launch(name, -(-d_out // OUTPUTS), 128, y, contiguous(xp, x), weight.packed, *scaling,
           code.table, more, bias, n, d_in, d_out, weight.block.bit_length() - 1,
           inner_block.bit_length() - 1)  # fmt: skip
    return y
