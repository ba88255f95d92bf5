"""The optimizers' updates on a card: one launch each, two for the norm, and no word to the host."""

import math

from ..optim.adam8bit import BLOCK, adamw8bit_update
from ..optim.adamw import adamw_update
from ..optim.flat import CONTROL, measure
from .cuda import Kernels, flat_grid, floats

kernels = Kernels("optim.cu", "square_sums", "measure", "adamw", "adamw8bit", exact=True)


def flat(*arrays):
    """Are these float32, in one row each?"""
    return floats(*arrays) and all(a.ndim == 1 and a.flags.c_contiguous for a in arrays)


def controls(xp, control):
    fits = control.dtype == xp.float64 and control.shape == (CONTROL,)
    return fits and control.flags.c_contiguous


@measure.on("cupy")
def _(xp, grad, control, *, divide_by, clip):
    launch = kernels.on(xp)
    if launch is None or not flat(grad) or not controls(xp, control):
        return NotImplemented
    blocks = min(1024, flat_grid(grad.size))
    sums, bad = xp.empty(blocks, xp.float64), xp.empty(blocks, xp.int64)
    launch("square_sums", blocks, 256, sums, bad, grad, grad.size)
    clip = math.inf if clip is None else clip
    launch("measure", 1, 256, control, sums, bad, blocks, grad.size, divide_by, clip)
    return None


@adamw_update.on("cupy")
def _(xp, p, g, m, v, control, *, betas, eps, decay, lr_factor=1.0):
    launch = kernels.on(xp)
    if launch is None or not flat(p, g, m, v) or not controls(xp, control):
        return NotImplemented
    launch("adamw", flat_grid(p.size), 256, p, g, m, v, control, p.size, *betas, eps, decay,
           lr_factor)  # fmt: skip
    return None


@adamw8bit_update.on("cupy")
def _(
    xp, p, g, m, v, scales_m, scales_v, control, *, signed, unsigned, betas, eps, decay,
    lr_factor=1.0,
):  # fmt: skip
    launch = kernels.on(xp)
    if launch is None or not flat(p, g, scales_m, scales_v) or not controls(xp, control):
        return NotImplemented
    if any(code.thresholds.size != 255 for code in (signed, unsigned)):
        return NotImplemented
    grid = min(1024, -(-p.size // BLOCK))
    launch(
        "adamw8bit", grid, BLOCK, p, g, m, v, scales_m, scales_v, control,
        signed.table, signed.thresholds, signed.order,
        unsigned.table, unsigned.thresholds, unsigned.order,
        p.size, *betas, eps, decay, lr_factor,
    )  # fmt: skip
    return None
