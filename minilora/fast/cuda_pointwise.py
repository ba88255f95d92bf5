"""GELU, SwiGLU and RoPE on a card: one launch each way, and nothing kept but what went in.

Beside them what bfloat16 asks for: conversions, a sum of two cotangents, a residual connection.
"""

from ..engine.attention import rope
from ..engine.bf16 import BF16, empty
from ..engine.fused import gelu, swiglu
from ..engine.graph import together
from ..engine.rounding import narrow, summed
from ..engine.rules import widen
from ..engine.tensor import add
from .cuda import Kernels, contiguous, flat_grid, floats, storage

EACH = ("gelu_forward", "gelu_backward", "swiglu_forward", "swiglu_backward", "rope")
kernels = Kernels(
    "pointwise.cu", *(f"{name}<{S}>" for name in EACH for S in ("float", "bf16")),
    "converted<bf16, float>", "converted<float, bf16>", "added<bf16>", "add_to_rows<bf16>",
)  # fmt: skip


@widen.on("cupy")
def _(xp, bits):
    return converted(xp, "float, bf16", bits, xp.float32)


@narrow.on("cupy")
def _(xp, values):
    return converted(xp, "bf16, float", values, xp.uint16) if floats(values) else NotImplemented


def converted(xp, kinds, x, dtype):
    launch = kernels.on(xp)
    if launch is None or x.size == 0:
        return NotImplemented
    x, y = xp.ascontiguousarray(x) if x.ndim else x, xp.empty(x.shape, dtype)
    launch(f"converted<{kinds}>", flat_grid(x.size), 256, y, x, x.size)
    return y


@summed.on("cupy")
def _(xp, a, b):
    launch = kernels.on(xp)
    if launch is None or a.shape != b.shape or a.size == 0:
        return NotImplemented
    a, b = (xp.ascontiguousarray(part) if part.ndim else part for part in (a, b))
    y = xp.empty(a.shape, a.dtype)
    launch("added<bf16>", flat_grid(a.size), 256, y, a, b, a.size)
    return y


@add.on("cupy bf16")
def _(xp, a, b):
    """A residual connection; what is repeated or float32 is left to the specification."""
    if not (type(a) is type(b) is BF16 and a.shape == b.shape and a.ndim):
        return NotImplemented
    return BF16(summed(a.bits, b.bits)), (lambda g: g, lambda g: g)


@gelu.on("cupy", "cupy bf16")
def _(xp, x):
    launch, S = kernels.on(xp), storage(x)
    if launch is None or S is None or (x.ndim == 0 and S == "bf16"):
        return NotImplemented
    x = contiguous(xp, x) if x.ndim else x  # CuPy gives a number an axis
    y = empty(xp, x.shape, x.dtype)
    launch(f"gelu_forward<{S}>", flat_grid(x.size), 256, y, x, x.size)

    def pullback(g):
        g = contiguous(xp, g) if g.ndim else g
        dx = empty(xp, x.shape, g.dtype)
        launch(f"gelu_backward<{S}>", flat_grid(x.size), 256, dx, g, x, x.size)
        return dx

    return y, (pullback,)


@swiglu.on("cupy", "cupy bf16")
def _(xp, gate, up):
    launch, S = kernels.on(xp), storage(gate, up)
    if launch is None or S is None or gate.shape != up.shape or gate.ndim == 0:
        return NotImplemented
    gate, up = contiguous(xp, gate), contiguous(xp, up)
    grid = flat_grid(gate.size)
    y = empty(xp, gate.shape, gate.dtype)
    launch(f"swiglu_forward<{S}>", grid, 256, y, gate, up, y.size)

    def pullback(g, wants):
        g = contiguous(xp, g)
        dgate, dup = (empty(xp, g.shape, g.dtype) if wanted else None for wanted in wants)
        launch(f"swiglu_backward<{S}>", grid, 256, dgate, dup, g, gate, up, g.size)
        return dgate, dup

    return y, together(pullback)


@rope.on("cupy", "cupy bf16")
def _(xp, x, *, theta, scaling=None, positions=None):
    """The angles are worked out again in every launch: no table, and nothing kept."""
    launch, S = kernels.on(xp), storage(x)
    if launch is None or S is None or x.ndim != 4 or x.shape[3] % 2:
        return NotImplemented
    N, T, H, D = x.shape
    if positions is not None:
        if positions.shape != (N, T) or positions.dtype.kind not in "iu":
            return NotImplemented
        positions = xp.ascontiguousarray(positions.astype(xp.int64, copy=False))
    slower = scaling or (1.0, 0.0, 1.0, 0)
    grid = -(-N * T * (D // 2) // 128)

    def rotate(x, turn):
        step = x.itemsize
        if x.strides[3] != step:
            x = contiguous(xp, x)
        steps = [s // step for s in x.strides[:3]]
        y = empty(xp, (N, T, H, D), x.dtype)
        launch(f"rope<{S}>", grid, 128, y, x, positions, N, T, H, D, *steps, theta, turn, *slower)
        return y

    return rotate(x, 1.0), (lambda g: rotate(g, -1.0),)
