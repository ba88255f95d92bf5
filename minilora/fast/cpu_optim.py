"""The optimizers' updates for NumPy arrays, in place, in blocks that stay in a cache."""

import math
from functools import partial

import numpy as np

from ..engine.workers import spread
from ..optim.adam8bit import BLOCK, adamw8bit_update
from ..optim.adamw import adamw_update
from ..optim.flat import BAD_CALL, BAD_INDEX, CALLS, FACTOR, LR, NORM, STEP, measure
from .cpu import arena, blocks

CHUNK = 64 * BLOCK  # entries of 8-bit moments at a time


def sum_of_squares(array, part):
    """Of one block: in its own precision, if that neither overflows nor loses small entries."""
    a = array[part]
    with np.errstate(over="ignore"):
        own = float(np.vdot(a, a))
    if 1e-20 < own < 1e30:
        return own
    return float(np.square(a, dtype=np.float64).sum())


@measure.on("numpy")
def _(xp, grad, control, *, divide_by, clip):
    squares = sum(spread(partial(sum_of_squares, grad), blocks(grad.size)))
    norm = math.sqrt(squares) / divide_by
    control[CALLS] += 1
    control[NORM] = norm
    control[FACTOR] = (1.0 if clip is None else min(1.0, clip / max(norm, 1e-300))) / divide_by
    if not math.isfinite(norm):
        control[FACTOR] = math.nan
        if control[BAD_CALL] == 0:
            control[BAD_CALL] = control[CALLS]
            control[BAD_INDEX] = (~np.isfinite(grad)).argmax()


@adamw_update.on("numpy")
def _(xp, p, g, m, v, control, *, betas, eps, decay, lr_factor=1.0):
    if not math.isfinite(control[NORM]):
        return
    b1, b2 = betas
    lr, t = float(control[LR]) * lr_factor, float(control[STEP]) + 1
    kind = p.dtype.type
    rate, factor = kind(lr / (1 - b1**t)), kind(control[FACTOR])
    root, shrink = kind(math.sqrt(1 - b2**t)), kind(1 - lr * decay)

    def update(part):
        a = np.multiply(g[part], factor, out=arena.take("adam a", g[part].shape, p.dtype))
        b = arena.take("adam b", a.shape, p.dtype)
        m_, v_, p_ = m[part], v[part], p[part]
        m_ *= b1
        m_ += np.multiply(a, 1 - b1, out=b)
        np.multiply(a, a, out=a)
        a *= 1 - b2
        v_ *= b2
        v_ += a
        np.sqrt(v_, out=a)
        a /= root
        a += eps
        np.divide(m_, a, out=a)
        a *= rate
        p_ *= shrink
        p_ -= a

    spread(update, blocks(p.size))


@adamw8bit_update.on("numpy")
def _(xp, p, g, m, v, scales_m, scales_v, control, **options):
    """The specification, over a whole number of blocks that fit a cache."""
    if p.size <= CHUNK:
        return NotImplemented

    def update(part):
        scales = slice(part.start // BLOCK, part.stop // BLOCK)
        arrays = (*(a[part] for a in (p, g, m, v)), scales_m[scales], scales_v[scales])
        adamw8bit_update.specification(xp, *arrays, control, **options)

    spread(update, blocks(p.size, CHUNK))
    return None
