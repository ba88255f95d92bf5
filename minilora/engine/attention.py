"""Attention whose T x T table never exists whole, and the rotation that tells it positions.

Shapes: q (N, T, H, D); k and v (N, S, K, D), where K divides H and each key head serves
H / K query heads; positions (N, T) or None.
"""

import math
from itertools import accumulate
from typing import NamedTuple

from .errors import MiniloraError
from .graph import together
from .rounding import moves
from .tensor import op, swap


@moves
@op
def split_heads(xp, x, *, heads, width):
    """Cut packed channels into heads: (N, T, Σ heads · D) -> one (N, T, h, D) each, as views.

    dx = the cotangents side by side (zeros for a part that was not used)
    """
    N, T, C = x.shape
    dtype = x.dtype
    if width * sum(heads) != C:
        raise MiniloraError(f"split_heads: expected {sum(heads)} x {width} channels, found {C}")
    ends = accumulate(h * width for h in heads)
    parts = [slice(end - h * width, end) for h, end in zip(heads, ends, strict=True)]

    def pullback(g):
        dx = xp.empty((N, T, C), dtype)
        for part, dpart in zip(parts, g, strict=True):
            dx[..., part] = 0 if dpart is None else dpart.reshape(N, T, part.stop - part.start)
        return dx

    views = (x[..., part].reshape(N, T, h, width) for part, h in zip(parts, heads, strict=True))
    return tuple(views), (pullback,)


class RopeScaling(NamedTuple):
    """Slower turns for a longer context, as Llama 3 has them.

    A pair that turns fewer than `low` times in the old `context` turns `factor` times as
    slowly, one that turns more than `high` times as before, those between in between.
    """

    factor: float
    low: float
    high: float
    context: int


def rope_rates(xp, D, theta, scaling=None):
    """The angle by which pair i turns from one position to the next: theta^(-2i/D), (D/2,)."""
    rate = theta ** (xp.arange(D // 2, dtype=xp.float64) * (-2 / D))
    if scaling is None:
        return rate
    turns = rate * (scaling.context / (2 * math.pi))
    keep = xp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return rate * (keep + (1 - keep) / scaling.factor)


@op
def rope(xp, x, *, theta, scaling=None, positions=None):
    """Rotate the pair (x_i, x_{i + D/2}) at position p by the angle p · theta^(-2i/D).

    dx = dy, rotated back.   x (N, T, H, D); positions (N, T), or None for 0..T-1;
    `scaling` slows the turns down.  The pairing of Llama checkpoints (Su et al. 2021).
    """
    T, D = x.shape[1], x.shape[3]
    if D % 2:
        raise MiniloraError(f"rope: expected an even head width, found {D}")
    if positions is None:
        positions = xp.arange(T)[None]
    # (N or 1, T, 1, D/2), in double precision
    angle = positions[..., None, None] * rope_rates(xp, D, theta, scaling)
    cos, sin = xp.cos(angle).astype(x.dtype), xp.sin(angle).astype(x.dtype)

    def rotate(x, sin):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        y = xp.empty_like(x)
        y[..., : D // 2] = a * cos - b * sin
        y[..., D // 2 :] = b * cos + a * sin
        return y

    return rotate(x, sin), (lambda g: rotate(g, -sin),)


@op
def attention(xp, q, k, v, *, positions=None, tile=64, wants):
    """O = softmax(q kᵀ / √D) v, each query seeing the keys up to its own position.

        P = e^(q kᵀ/√D - lse)     dv = Pᵀ dO     dS = P (dO vᵀ - Σ dO O) / √D
        dq = dS k                 dk = dSᵀ q

    Queries go by tiles of `tile` rows; on the way back P is formed again from lse, its
    row-wise log-sum-exp.  With `positions` (N, T), query t of row n sees the keys
    0..positions[n, t] of a cache; without, T = S and query t sees 0..t.  (Dao et al. 2022.)
    """
    N, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[::3] != (N, D) or H % K or (positions is None and T != S):
        raise MiniloraError(
            f"attention: queries {q.shape} do not fit keys {k.shape} and values {v.shape}"
        )
    scale = 1 / math.sqrt(D)
    q_, k_, v_ = by_head(q, K), by_head(k, K), by_head(v, K)
    out = xp.empty(q.shape, q.dtype)
    out_ = by_head(out, K)
    lse = xp.empty((N, K, H // K, T, 1), q.dtype) if any(wants) else None

    def scores(start):
        """q kᵀ / √D of one tile, with -inf where a key is not to be seen."""
        part, seen = slice(start, start + tile), S if positions is not None else start + tile
        s = (q_[..., part, :] * scale) @ swap(k_[..., :seen, :])  # (N, K, H/K, tile, seen)
        key = xp.arange(s.shape[-1])
        if positions is None:
            visible = key <= start + xp.arange(s.shape[-2])[:, None]
        else:
            visible = (key <= positions[:, part, None])[:, None, None]
        return part, slice(0, seen), xp.where(visible, s, -xp.inf)

    for start in range(0, T, tile):
        part, seen, s = scores(start)
        top = s.real.max(axis=-1, keepdims=True)
        p = xp.exp(s - top)
        total = p.sum(axis=-1, keepdims=True)
        out_[..., part, :] = (p @ v_[..., seen, :]) / total
        if lse is not None:
            lse[..., part, :] = top + xp.log(total)

    def pullback(g, wants):
        g_ = by_head(g, K)
        dq = xp.empty(q.shape, q.dtype)
        dk, dv = xp.zeros(k.shape, k.dtype), xp.zeros(v.shape, v.dtype)
        dq_, dk_, dv_ = by_head(dq, K), by_head(dk, K), by_head(dv, K)
        for start in range(0, T, tile):
            part, seen, s = scores(start)
            p = xp.exp(s - lse[..., part, :])
            g_tile = g_[..., part, :]
            dv_[..., seen, :] += (swap(p) @ g_tile).sum(axis=2, keepdims=True)
            delta = (g_tile * out_[..., part, :]).sum(axis=-1, keepdims=True)
            ds = p * (g_tile @ swap(v_[..., seen, :]) - delta) * scale
            dq_[..., part, :] = ds @ k_[..., seen, :]
            dk_[..., seen, :] += (swap(ds) @ q_[..., part, :]).sum(axis=2, keepdims=True)
        return dq, dk, dv

    return out, together(pullback)


def by_head(a, key_heads):
    """A view with heads before time, grouped: (N, T, H, D) -> (N, K, H/K, T, D)."""
    N, T, H, D = a.shape
    return a.reshape(N, T, key_heads, H // key_heads, D).transpose(0, 2, 3, 1, 4)
