"""Attention and rotations for NumPy arrays: tiles that stay in a cache, angles made once."""

import math
from functools import lru_cache

import numpy as np

from ..engine.attention import attention, by_head, rope, rope_rates
from ..engine.graph import together
from ..engine.tensor import swap
from .cpu import BLOCK, arena, real


@attention.on("numpy")
def _(xp, q, k, v, *, positions=None, tile=64, wants):
    """A few sequences at a time, so that a tile of scores for all heads stays in the cache."""
    if not real(q, k, v) or q.size == 0:
        return NotImplemented
    (N, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (N, S, K, D) or H % K:
        return NotImplemented  # the specification says what is wrong
    if positions is not None:
        if any(wants):
            return NotImplemented
        if T == 1:
            return one_query(q, k, v, positions), None
    if S != T or (positions is not None and (positions != np.arange(T)).any()):
        return NotImplemented  # else a prompt that fills the cache: positions say 0..T-1
    scale = 1 / math.sqrt(D)
    dtype = q.dtype
    out = np.empty((N, T, H, D), dtype)
    lse = np.empty((N, K, H // K, 1, T), dtype) if any(wants) else None
    q_, k_, v_, out_ = (by_head(a, K) for a in (q, k, v, out))
    later = np.tril(np.full((tile, tile), -np.inf, dtype), -1)  # [key, query]: not to be seen
    together_ = max(1, 2 * BLOCK // (H * min(T, tile) * T))
    tiles = [
        (slice(n, min(n + together_, N)), slice(t, min(t + tile, T)), slice(0, min(t + tile, T)))
        for n in range(0, N, together_)
        for t in range(0, T, tile)
    ]

    def scores(n, mine, seen):
        """k qᵀ / √D of one tile, -inf below the diagonal: keys down, queries across."""
        queries = swap(q_[n, ..., mine, :])  # (n, K, H/K, D, t)
        scaled = np.multiply(queries, scale, out=arena.take("queries", queries.shape, dtype))
        t = queries.shape[-1]
        s = arena.take("scores", (*queries.shape[:-2], seen.stop, t), dtype)
        np.matmul(k_[n, ..., seen, :], scaled, out=s)
        s[..., mine, :] += later[:t, :t]
        return s

    for n, mine, seen in tiles:
        s = scores(n, mine, seen)
        top = largest(s)
        s -= top
        np.exp(s, out=s)
        total = np.matmul(ones(seen.stop, dtype), s)
        part = out_[n, ..., mine, :]
        np.matmul(swap(s), v_[n, ..., seen, :], out=part)
        part /= swap(total)
        if lse is not None:
            np.log(total, out=total)
            np.add(top, total, out=lse[n, ..., mine])

    def pullback(g, wants):
        dq, dk, dv = np.empty(q.shape, dtype), np.zeros(k.shape, dtype), np.zeros(v.shape, dtype)
        g_, dq_, dk_, dv_ = (by_head(a, K) for a in (g, dq, dk, dv))
        for n, mine, seen in tiles:
            s = scores(n, mine, seen)
            s -= lse[n, ..., mine]
            np.exp(s, out=s)  # Pᵀ
            mine, seen = (n, ..., mine, slice(None)), (n, ..., seen, slice(None))
            add_heads(dv_[seen], s, g_[mine])
            across = arena.take("cotangents", swap(g_[mine]).shape, dtype)
            across[...] = swap(g_[mine])
            ds = np.matmul(v_[seen], across, out=arena.take("ds", s.shape, dtype))
            ds -= np.vecdot(g_[mine], out_[mine])[..., None, :]
            ds *= s  # times √D: the scale comes at the end
            np.matmul(swap(ds), k_[seen], out=dq_[mine])
            add_heads(dk_[seen], ds, q_[mine])
        dq *= scale
        dk *= scale
        return dq, dk, dv

    return out, together(pullback)


@lru_cache(maxsize=64)
def ones(n, dtype):
    """(1, n): a sum down the columns as a product, which is the fastest that NumPy has."""
    return np.ones((1, n), dtype)


def largest(s):
    """The maximum of each column of (..., n, t): halves against each other, in whole vectors."""
    while (n := s.shape[-2]) > 1:
        half = n // 2
        pairs = np.maximum(s[..., :half, :], s[..., half : 2 * half, :])
        if n % 2:
            np.maximum(pairs[..., :1, :], s[..., -1:, :], out=pairs[..., :1, :])
        s = pairs
    return s if s.base is None else s.copy()


def one_query(q, k, v, positions):
    """The newest token of each row against its cache: two products a key head, no tiles."""
    N, S, K, D = k.shape
    scaled = (q * (1 / math.sqrt(D))).reshape(N, K, -1, D)
    s = scaled @ k.transpose(0, 2, 3, 1)  # (N, K, H/K, S)
    if not (positions.item() == S - 1 if positions.size == 1 else (positions == S - 1).all()):
        s[np.broadcast_to((np.arange(S) > positions)[:, None, None], s.shape)] = -np.inf
    s -= np.maximum.reduce(s, axis=-1, keepdims=True)
    np.exp(s, out=s)
    out = s @ v.transpose(0, 2, 1, 3)
    out /= np.add.reduce(s, axis=-1, keepdims=True)
    return out.reshape(q.shape)


def add_heads(into, a, b):
    """into (n, K, 1, S, D) += Σ over a key head's query heads of a (n, K, G, S, t) @ b."""
    product = np.matmul(a, b, out=arena.take("heads", (*a.shape[:-1], b.shape[-1]), b.dtype))
    into += product if product.shape[2] == 1 else product.sum(axis=2, keepdims=True)


@rope.on("numpy")
def _(xp, x, *, theta, scaling=None, positions=None):
    """Whole rows at once: y = x cos + swap(x) sin, where swap exchanges the halves of a head."""
    T, D = x.shape[1], x.shape[3]
    if not real(x) or D % 2 or x.size == 0:
        return NotImplemented
    if positions is None:
        cos, sin = turns(T, D, theta, scaling, x.dtype)
    else:
        if positions.min() < 0:
            return NotImplemented
        cos, sin = turns_up_to(int(positions.max()), D, theta, scaling, x.dtype)
        cos, sin = cos[positions], sin[positions]
    return turned(x, cos, sin), (lambda g: turned(g, cos, -sin),)


def turned(x, cos, sin):
    """x cos + swap(x) sin, where swap exchanges the halves of a head."""
    halves = (*x.shape[:-1], 2, x.shape[-1] // 2)
    y = x.reshape(halves)[..., ::-1, :] * sin.reshape(*sin.shape[:-1], *halves[-2:])
    y = y.reshape(x.shape)
    y += np.multiply(x, cos, out=arena.take("rope", x.shape, x.dtype))
    return y


def turns_up_to(position, D, theta, scaling, dtype):
    """`turns` for few different T, each a power of two."""
    return turns(1 << position.bit_length(), D, theta, scaling, dtype)


@lru_cache(maxsize=16)
def turns(T, D, theta, scaling, dtype):
    """cos and signed sin of every (position, channel): two (T, 1, D) arrays."""
    angle = np.arange(T)[:, None] * rope_rates(np, D, theta, scaling)
    cos, sin = np.cos(angle), np.sin(angle)
    return (
        np.concatenate([cos, cos], axis=-1).astype(dtype)[:, None],
        np.concatenate([-sin, sin], axis=-1).astype(dtype)[:, None],
    )
