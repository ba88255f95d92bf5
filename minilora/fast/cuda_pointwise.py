"""GELU, SwiGLU and RoPE on a card: one launch each way, and nothing kept but what went in."""

from ..engine.attention import rope
from ..engine.fused import gelu, swiglu
from ..engine.graph import together
from .cuda import Kernels, flat_grid, floats

kernels = Kernels(
    "pointwise.cu", "gelu_forward<float>", "gelu_backward<float>", "swiglu_forward<float>",
    "swiglu_backward<float>", "rope<float>",
)  # fmt: skip


@gelu.on("cupy")
def _(xp, x):
    launch = kernels.on(xp)
    if launch is None or not floats(x):
        return NotImplemented
    x = xp.ascontiguousarray(x) if x.ndim else x  # CuPy gives a number an axis
    y = xp.empty(x.shape, x.dtype)
    launch("gelu_forward<float>", flat_grid(x.size), 256, y, x, x.size)

    def pullback(g):
        g = xp.ascontiguousarray(g) if g.ndim else g
        dx = xp.empty(x.shape, g.dtype)
        launch("gelu_backward<float>", flat_grid(x.size), 256, dx, g, x, x.size)
        return dx

    return y, (pullback,)


@swiglu.on("cupy")
def _(xp, gate, up):
    launch = kernels.on(xp)
    if launch is None or not floats(gate, up) or gate.shape != up.shape or gate.ndim == 0:
        return NotImplemented
    gate, up = xp.ascontiguousarray(gate), xp.ascontiguousarray(up)
    grid = flat_grid(gate.size)
    y = xp.empty(gate.shape, gate.dtype)
    launch("swiglu_forward<float>", grid, 256, y, gate, up, y.size)

    def pullback(g, wants):
        g = xp.ascontiguousarray(g)
        dgate, dup = (xp.empty(g.shape, g.dtype) if wanted else None for wanted in wants)
        launch("swiglu_backward<float>", grid, 256, dgate, dup, g, gate, up, g.size)
        return dgate, dup

    return y, together(pullback)


@rope.on("cupy")
def _(xp, x, *, theta, scaling=None, positions=None):
    """The angles are worked out again in every launch: no table, and nothing kept."""
    launch = kernels.on(xp)
    if launch is None or not floats(x) or x.ndim != 4 or x.shape[3] % 2:
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
            x = xp.ascontiguousarray(x)
        steps = [s // step for s in x.strides[:3]]
        y = xp.empty((N, T, H, D), x.dtype)
        launch("rope<float>", grid, 128, y, x, positions, N, T, H, D, *steps, theta, turn, *slower)
        return y

    return rotate(x, 1.0), (lambda g: rotate(g, -1.0),)
