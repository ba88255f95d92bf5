"""Whole layers as single ops, with pullbacks derived by hand and nothing kept that is not used.

Weights follow the convention of the papers: y = x Wᵀ with W of shape (d_out, d_in).
"""

import math

from .errors import MiniloraError
from .graph import together
from .ops import logistic
from .rounding import moves
from .rules import wide
from .tensor import op


def rows(a):
    """Flatten all axes but the last: (..., d) -> (n, d)."""
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])  # no -1: d may be 0


@op
def linear(xp, x, W, b=None):
    """y = x Wᵀ + b.   dx = dy W   dW = dyᵀ x   db = Σ dy

    x (..., d_in), W (d_out, d_in), b (d_out,) or None; y (..., d_out).
    """
    expect_width("linear", x, W)
    shape, d_out = x.shape, W.shape[0]
    y = rows(x) @ W.T
    if b is not None:
        y += b
    return y.reshape(*shape[:-1], d_out), (
        lambda g: (rows(g) @ W).reshape(shape),
        lambda g: rows(g).T @ rows(x),
        lambda g: rows(g).sum(axis=0),
    )


@op
def frozen_linear(xp, x, *, base):
    """y = x W0ᵀ + b0 with both frozen inside `base`.   dx = dy W0, and nothing is kept.

    x (..., d_in), y (..., d_out); `base` as in `lora_linear`.
    """
    W = wide(base.dense())
    expect_width("frozen_linear", x, W)
    shape, d_out = x.shape, W.shape[0]
    y = rows(x) @ W.T
    if base.bias is not None:
        y += wide(base.bias.data)
    return y.reshape(*shape[:-1], d_out), (lambda g: (rows(g) @ wide(base.dense())).reshape(shape),)


@op
def lora_linear(xp, x, A, B, *, base, scale, wants):
    """y = x W0ᵀ + b0 + s (x Aᵀ) Bᵀ, with W0 and b0 frozen inside `base`.

        dx = dy W0 + s (dy B) A     dA = s (dy B)ᵀ x     dB = s dyᵀ (x Aᵀ)

    x (..., d_in), A (r, d_in), B (d_out, r); y (..., d_out).  `base.dense()` gives W0
    (d_out, d_in), here and again on the way back, so that a base may hold it in four bits;
    `base.bias` is a Tensor or None.  Where A is frozen, x is not kept.  (Hu et al. 2021.)
    """
    W = wide(base.dense())
    expect_width("lora_linear", x, W)
    if A.shape != (B.shape[1], W.shape[1]) or B.shape[0] != W.shape[0]:
        raise MiniloraError(
            f"lora_linear: expected A (r, {W.shape[1]}) and B ({W.shape[0]}, r), "
            f"found {A.shape} and {B.shape}"
        )
    shape, d_out = x.shape, W.shape[0]
    u = rows(x) @ A.T  # (n, r)
    y = rows(x) @ W.T
    if base.bias is not None:
        y += wide(base.bias.data)
    y += scale * (u @ B.T)
    kept_x = x if wants[1] else None
    kept_u = u if wants[2] else None

    def pullback(g, wants):
        g = rows(g)
        gB = scale * (g @ B)  # (n, r)
        return (
            (g @ wide(base.dense()) + gB @ A).reshape(shape) if wants[0] else None,
            gB.T @ rows(kept_x) if wants[1] else None,
            scale * (g.T @ kept_u) if wants[2] else None,
        )

    return y.reshape(*shape[:-1], d_out), together(pullback)


def expect_width(name, x, W):
    if x.shape[-1:] != W.shape[1:]:
        raise MiniloraError(f"{name}: expected x (..., {W.shape[1]}), found {x.shape}")


GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


@op
def gelu(xp, x):
    """y = x/2 (1 + t),  t = tanh(√(2/π) (x + 0.044715 x³)).

        dx = dy ((1 + t)/2 + x/2 (1 - t²) √(2/π) (1 + 3·0.044715 x²))

    The tanh form of GPT-2 (Hendrycks and Gimpel 2016).
    """
    t = xp.tanh(GELU_SCALE * (x + GELU_CUBE * x * x * x))

    def pullback(g):
        t = xp.tanh(GELU_SCALE * (x + GELU_CUBE * x * x * x))
        inner = GELU_SCALE * (1 + 3 * GELU_CUBE * x * x)
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)

    return 0.5 * x * (1 + t), (pullback,)


@op
def swiglu(xp, gate, up):
    """y = gate σ(gate) up.   dgate = dy up σ (1 + gate (1 - σ))   dup = dy gate σ

    (Shazeer 2020; the gated MLP of Llama.)
    """

    def pullback(g, wants):
        s = logistic(xp, gate)
        return (
            g * up * (s * (1 + gate * (1 - s))) if wants[0] else None,
            g * (gate * s) if wants[1] else None,
        )

    return gate * logistic(xp, gate) * up, together(pullback)


@op
def layer_norm(xp, x, weight, bias, *, eps):
    """y = w n + b,  n = (x - mean) / √(var + eps), over the last axis.

        dx = (h - mean(h) - n mean(h n)) / √(var + eps),  h = dy w     dw = Σ dy n     db = Σ dy

    (Ba et al. 2016.)
    """
    centered = x - x.mean(axis=-1, keepdims=True)
    inverse = 1 / xp.sqrt((centered * centered).mean(axis=-1, keepdims=True) + eps)
    n = centered * inverse

    def pullback(g, wants):
        h = g * weight
        dx = None
        if wants[0]:
            dx = h - h.mean(axis=-1, keepdims=True) - n * (h * n).mean(axis=-1, keepdims=True)
            dx = dx * inverse
        return dx, rows(g * n).sum(axis=0), rows(g).sum(axis=0)

    return n * weight + bias, together(pullback)


@op
def rms_norm(xp, x, weight, *, eps):
    """y = w n,  n = x / √(mean(x²) + eps), over the last axis.

        dx = (h - n mean(h n)) / √(mean(x²) + eps),  h = dy w          dw = Σ dy n

    The squares are summed in double precision: 1e20 squared overflows float32.
    (Zhang and Sennrich 2019.)
    """
    wide = x.astype(xp.float64) if x.dtype.kind == "f" else x
    inverse = (1 / xp.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps)).astype(x.dtype)
    n = x * inverse

    def pullback(g, wants):
        h = g * weight
        dx = (h - n * (h * n).mean(axis=-1, keepdims=True)) * inverse if wants[0] else None
        return dx, rows(g * n).sum(axis=0) if wants[1] else None

    return n * weight, together(pullback)


@op
def embedding(xp, table, *, ids):
    """y = table[ids].   dtable[i] = Σ dy over the places where ids = i

    table (V, C), ids (...) whole numbers in 0..V-1; y (..., C).
    """
    shape = table.shape
    if ids.dtype.kind not in "iu":
        raise MiniloraError(f"embedding: expected whole numbers as ids, found {ids.dtype}")

    def pullback(g):
        dtable = xp.zeros(shape, g.dtype)
        xp.add.at(dtable, ids, g)
        return dtable

    return table[ids], (pullback,)


moves(embedding, lambda wants, ids: not wants[0])  # of a frozen table


@op
def dropout(xp, x, *, rate, rng):
    """y = x m / (1 - rate), with m = 1 where hash(key, index) >= rate, else 0.   dx = dy m / ...

    One key is drawn from `rng`; the mask is a function of (key, index) alone, hence the
    same on every device, and made again on the way back instead of being kept.
    """
    if not 0 <= rate < 1:
        raise MiniloraError(f"dropout: expected 0 <= rate < 1, found {rate}")
    key = int(rng.integers(1 << 63))
    shape = x.shape

    def mask(like):
        keep = hashed_uniform(xp, key, math.prod(shape)).reshape(shape) >= rate
        return keep * like.dtype.type(1 / (1 - rate))

    return x * mask(x), (lambda g: g * mask(g),)


def hashed_uniform(xp, key, count):
    """`count` float32 numbers in [0, 1): a 32-bit mixing hash of (key, index).

    Two rounds of the multiply-and-shift finalizer of MurmurHash3, the halves of the key
    added in between; 24 bits are used, which float32 holds exactly.
    """
    h = xp.arange(count, dtype=xp.uint32)
    for half in (key & 0xFFFFFFFF, key >> 32):
        h = h + xp.uint32(half)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> xp.uint32(shift))) * xp.uint32(factor)
        h = h ^ (h >> xp.uint32(16))
    return (h >> xp.uint32(8)).astype(xp.float32) * xp.float32(2.0**-24)
