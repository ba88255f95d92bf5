"""LayerNorm and RMSNorm on a card: one launch out, one launch back, and nothing kept but x."""

from ..engine.bf16 import empty
from ..engine.fused import layer_norm, rms_norm
from ..engine.graph import together
from .cuda import Kernels, contiguous, floats, row_block, storage

kernels = Kernels(
    "norms.cu",
    *(f"norm_{way}<{S}, {centered}>" for way in ("forward", "backward", "columns")
      for S in ("float", "bf16") for centered in ("false", "true")),
    "add_strips",
)  # fmt: skip


@layer_norm.on("cupy", "cupy bf16")
def _(xp, x, weight, bias, *, eps):
    return normalized(xp, x, weight, bias, eps, centered=True)


@rms_norm.on("cupy", "cupy bf16")
def _(xp, x, weight, *, eps):
    return normalized(xp, x, weight, None, eps, centered=False)


def normalized(xp, x, weight, bias, eps, centered):
    """Both norms; keeps x, 1/√ and the mean.  Weight and bias are float32 beside any x."""
    launch, S = kernels.on(xp), storage(x)
    if launch is None or S is None or not floats(weight, bias) or x.ndim == 0:
        return NotImplemented
    shape, C = x.shape, x.shape[-1]
    if weight.shape != (C,) or (centered and bias.shape != (C,)):
        return NotImplemented  # broadcasting, or an error that the specification names
    rows, kind = x.size // C, f"<{S}, {str(centered).lower()}>"
    x, weight = contiguous(xp, x), xp.ascontiguousarray(weight)
    bias = xp.ascontiguousarray(bias) if centered else None
    y = empty(xp, shape, x.dtype)
    inverse = xp.empty(rows, xp.float32)
    mean = xp.empty(rows, xp.float32) if centered else None
    block = row_block(C)
    launch("norm_forward" + kind, rows, block, y, inverse, mean, x, weight, bias, C, eps)

    def pullback(g, wants):
        g = contiguous(xp, g)
        dx = dweight = dbias = None
        if wants[0]:
            dx = empty(xp, shape, g.dtype)
            launch("norm_backward" + kind, rows, block, dx, g, x, weight, inverse, mean, C)
        if any(wants[1:]):
            dweight, dbias = columns(g)
        return (dx, dweight, dbias) if centered else (dx, dweight)

    def columns(g):
        """Σ g n and Σ g over all rows: first in strips, 64 at most, then over those."""
        strip = max(64, -(-rows // 64))
        strips = -(-rows // strip)
        sums = [xp.empty((strips, C), xp.float32) for _ in range(1 + centered)]
        dweight, dbias = (*sums, None)[:2]
        grid = (-(-C // 32), strips)
        launch("norm_columns" + kind, grid, 256, dweight, dbias, g, x, inverse, mean,
               rows, C, strip)  # fmt: skip
        if strips == 1:
            return [s if s is None else s[0] for s in (dweight, dbias)]
        whole = [xp.empty(C, xp.float32) for _ in sums]
        for out, parts in zip(whole, sums, strict=True):
            launch("add_strips", -(-C // 128), 128, out, parts, strips, C)
        return (*whole, None)[:2]

    return y, together(pullback)
