"""A few rows against a weight in four bits: decoding reads the codes, and makes nothing dense."""

from types import ModuleType
from typing import Any

from ..engine.backend import is_array
from ..quant.linear import QuantizedLinear
from .cuda import Kernels, floats

ROWS = (1, 2, 4, 8)  # of x, that there is a kernel for; with more, W is made dense
PIECE, OUTPUTS = 32, 16  # of the kernel: columns of a lane; rows of the weight of a block

kernels = Kernels("coded_product.cu", *(f"coded_product<{n}>" for n in ROWS))


def coded_product(xp: ModuleType, x: Any, base: Any) -> Any:
    """y = x Ŵᵀ + b where `base` is a QuantizedLinear; None for what the kernel does not take.

    x (n, d_in) float32 with n <= 8, y (n, d_out).  Any four-bit code, scales quantized or not;
    d_in is a multiple of 32.  What a row gets does not depend on the others: not a bit of it.
    """
    if not isinstance(base, QuantizedLinear) or len(x) > ROWS[-1] or not floats(x):
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
    if (
        launch is None or code.bits != 4 or weight.dtype != xp.float32 or d_in % PIECE
        or x.shape[1] != d_in or not floats(bias) or (bias is not None and bias.shape != (d_out,))
        or not all(a.flags.c_contiguous for a in arrays)
    ):  # fmt: skip
        return None
    n, y = len(x), xp.empty((len(x), d_out), xp.float32)
    name = f"coded_product<{next(rows for rows in ROWS if rows >= n)}>"
    inner_block = 1 if is_array(scales) else scales.residual.block
    launch(name, -(-d_out // OUTPUTS), 128, y, xp.ascontiguousarray(x), weight.packed, *scaling,
           code.table, bias, n, d_in, d_out, weight.block.bit_length() - 1,
           inner_block.bit_length() - 1)  # fmt: skip
    return y
