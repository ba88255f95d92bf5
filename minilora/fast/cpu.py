"""The same ops for NumPy arrays, in blocks that fit a cache and with fewer passes over memory.

Each rule here is proven equal to its specification by `tests/test_fast_cpu.py`.  Scratch that is
used inside one call is kept per thread; what a pullback keeps is always a new array.
"""

import math
import threading
from collections.abc import Iterable
from functools import lru_cache, partial

import numpy as np

from ..engine.blas import on_one_thread, small_kernels
from ..engine.errors import NumericsError
from ..engine.fused import (
    GELU_CUBE,
    GELU_SCALE,
    embedding,
    gelu,
    layer_norm,
    lora_linear,
    rms_norm,
    rows,
    swiglu,
)
from ..engine.graph import together
from ..engine.loss import expect_classes, head_cross_entropy
from ..engine.rules import wide
from ..engine.tensor import swap
from ..lora.variants import row_lengths
from ..model.layers import Linear

# Entries of a block: 512 KiB of float32, half a level-2 cache.  Each call into NumPy hands the
# interpreter to the other threads and may have to wait for it after: shorter blocks cost more.
BLOCK = 1 << 17
LEAST = 64  # tokens for which it pays to fill a scratch with W0 + s B A
FEW = 16  # rows that are few: for more, packing pays


class Arena(threading.local):
    """One growing buffer per thread, name and dtype."""

    def __init__(self) -> None:
        self.buffers: dict[tuple, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with unspecified content, valid until the same name is taken again."""
        size = math.prod(shape)
        held = self.buffers.get((name, dtype))
        if held is None or held.size < size:
            held = self.buffers[name, dtype] = np.empty(size, dtype)
        return held[:size].reshape(shape)


arena = Arena()


def blocks(size: int, block: int = BLOCK) -> Iterable[slice]:
    if size <= block:
        return (slice(0, size),) if size else ()
    return (slice(start, start + block) for start in range(0, size, block))


def real(*arrays: np.ndarray | None) -> bool:
    """Are these float arrays of one dtype?  The rules here take nothing else."""
    kinds = {a.dtype for a in arrays if a is not None}
    return len(kinds) == 1 and kinds.pop().kind == "f"


@gelu.on("numpy")
def _(xp, x, *, wants):
    """Keeps the derivative, of which the way back is one product."""
    if not real(x):
        return NotImplemented
    y = np.empty(x.shape, x.dtype)
    slope = np.empty(x.shape, x.dtype) if wants[0] else None
    flat_x, flat_y = x.ravel(), y.reshape(-1)
    flat_slope = None if slope is None else slope.reshape(-1)
    for part in blocks(x.size):
        a, b = flat_x[part], flat_y[part]
        square = arena.take("gelu square", a.shape, a.dtype)
        half = arena.take("gelu half", a.shape, a.dtype)
        np.multiply(a, a, out=square)
        np.multiply(square, GELU_SCALE * GELU_CUBE, out=half)
        half += GELU_SCALE
        half *= a
        np.tanh(half, out=half)  # t = tanh(√(2/π) (x + 0.044715 x³))
        half *= 0.5
        half += 0.5  # (1 + t)/2, for now h
        np.multiply(a, half, out=b)
        if flat_slope is not None:  # h + y (1 - h) 2 √(2/π) (1 + 3·0.044715 x²)
            s = flat_slope[part]
            square *= 6 * GELU_SCALE * GELU_CUBE
            square += 2 * GELU_SCALE
            np.subtract(1, half, out=s)
            s *= b
            s *= square
            s += half
    return y, (lambda g: g * slope,)


@swiglu.on("numpy")
def _(xp, gate, up):
    """Keeps its arguments; σ by way of e^-gate: 1.6 ns an entry with AVX2, where tanh takes 4.5."""
    if not real(gate, up) or gate.shape != up.shape:
        return NotImplemented
    gate_, up_ = gate.ravel(), up.ravel()
    y = np.empty(gate.shape, gate.dtype)
    flat_y = y.reshape(-1)
    for part in blocks(gate.size):
        out = np.divide(gate_[part], inverse_sigmoid(gate_[part], flat_y[part]), out=flat_y[part])
        out *= up_[part]

    def pullback(g, wants):
        g = g.ravel()
        dgate, dup = (np.empty(gate.shape, g.dtype) if wanted else None for wanted in wants)
        for part in blocks(g.size):
            a = gate_[part]
            s = inverse_sigmoid(a, arena.take("swiglu", a.shape, a.dtype))
            np.reciprocal(s, out=s)
            if wants[1]:
                d = np.multiply(a, s, out=dup.reshape(-1)[part])
                d *= g[part]
            if wants[0]:  # dy up σ (1 + gate (1 - σ))
                d = np.subtract(1, s, out=dgate.reshape(-1)[part])
                d *= a
                d += 1
                d *= s
                d *= up_[part]
                d *= g[part]
        return dgate, dup

    return y, together(pullback)


@np.errstate(over="ignore")  # far below zero it is infinite, and σ 0
def inverse_sigmoid(x, out):
    """1/σ(x) = 1 + e⁻ˣ, written into `out`."""
    np.negative(x, out=out)
    np.exp(out, out=out)
    out += 1
    return out


@lora_linear.on("numpy")
def _(xp, x, A, B, *, base, scale, wants):
    """One product with W0 + s B A, which is made here and again on the way back."""
    shape, (d_out, d_in) = x.shape, base.shape
    x = rows(x)
    if not real(x, A, B) or len(x) < LEAST or shape[-1] != d_in:
        return NotImplemented
    if A.shape != (B.shape[1], d_in) or B.shape[0] != d_out:
        return NotImplemented  # the specification says what is wrong

    updated = partial(adapted_weight, A, B, base, scale)
    y = x @ updated().T
    if base.bias is not None:
        y += wide(base.bias.data)
    u = skinny(x, A.T) if wants[2] else None  # (n, r)
    kept_x = x if wants[1] else None

    def pullback(g, wants):
        g = rows(g)
        return (
            (g @ updated()).reshape(shape) if wants[0] else None,
            over_rows(skinny(g, B) * scale, kept_x) if wants[1] else None,
            over_rows(u, g).T * scale if wants[2] else None,
        )

    return y.reshape(*shape[:-1], d_out), together(pullback)


def adapted_weight(A, B, base, scale):
    """W0 + s B A, in scratch; W0 itself as long as B is zero."""
    W0 = base.dense() if isinstance(base, Linear) else None
    if W0 is None or W0.dtype != A.dtype:  # in codes or narrower
        W0 = base.dense(arena.take("dense weight", base.shape, A.dtype))
    if not B.any():
        return W0
    W = np.matmul(B * scale, A, out=arena.take("lora weight", W0.shape, A.dtype))
    W += W0
    return W


@row_lengths.on("numpy")
def _(xp, A, B, *, base, scale):
    if not real(A, B):
        return NotImplemented
    W = adapted_weight(A, B, base, scale)
    return np.sqrt(np.vecdot(W, W))


def stack_height(n, d, r, along=False):
    """Rows of a stack of (n, d) that is multiplied with (d, r); 0 for no stacks.

    So many that `small_kernels` take them.  `along`: both lie along d.
    """
    most = 800_000 // max(1, d * r)
    if along:
        most = min(most, 1200 // max(1, r))
    height = 1 << max(0, most.bit_length() - 1)
    return height if 32 <= height < n and small_kernels() else 0


def skinny(x, M):
    """x M for few columns: x (n, d), M (d, r)."""
    (n, d), r = x.shape, M.shape[1]
    height = stack_height(n, d, r, along=not M.flags.c_contiguous)
    if not height:
        return x @ M
    whole, y = n - n % height, np.empty((n, r), x.dtype)
    np.matmul(x[:whole].reshape(-1, height, d), M, out=y[:whole].reshape(-1, height, r))
    if whole < n:
        np.matmul(x[whole:], M, out=y[whole:])
    return y


def over_rows(u, x):
    """uᵀ x for few columns of u: u (n, r), x (n, d)."""
    (n, r), d = u.shape, x.shape[1]
    height = stack_height(n, d, r)
    if not height:
        return u.T @ x
    whole = n - n % height
    stacks = swap(u[:whole].reshape(-1, height, r)) @ x[:whole].reshape(-1, height, d)
    total = stacks.sum(axis=0)
    if whole < n:
        total += u[whole:].T @ x[whole:]
    return total


def height_of_few(n, W):
    """Rows of W's stacks where it meets n rows at a time; 0 for no stacks."""
    if not 1 < n <= FEW or not on_one_thread():
        return 0
    return stack_height(*W.shape, n, along=W.flags.c_contiguous)


def few_rows(x, W, height):
    """x Wᵀ for few rows of x, by stacks of W's rows: x (n, d_in), W (d_out, d_in)."""
    if not height:
        return x @ W.T
    (n, d_in), d_out = x.shape, len(W)
    whole, y = d_out - d_out % height, np.empty((n, d_out), x.dtype)
    stacks = W.T[:, :whole].reshape(d_in, -1, height).transpose(1, 0, 2)
    np.matmul(x, stacks, out=y[:, :whole].reshape(n, -1, height).transpose(1, 0, 2))
    if whole < d_out:
        np.matmul(x, W[whole:].T, out=y[:, whole:])
    return y


@layer_norm.on("numpy")
def _(xp, x, weight, bias, *, eps):
    if not real(x, weight, bias):
        return NotImplemented
    return normalized(x, weight, bias, eps, centered=True)


@rms_norm.on("numpy")
def _(xp, x, weight, *, eps):
    if not real(x, weight):
        return NotImplemented
    return normalized(x, weight, None, eps, centered=False)


@lru_cache(maxsize=16)
def equal_parts(C, dtype):
    """(C,) of 1/C: the mean as a product."""
    return np.full(C, 1 / C, dtype)


def normalized(x, weight, bias, eps, centered):
    """Both norms, a few rows at a time; keeps n and 1/√."""
    if x.size == 0:
        return NotImplemented
    shape, C, flat = x.shape, x.shape[-1], rows(x)
    average = equal_parts(C, x.dtype)
    n, y = np.empty(flat.shape, x.dtype), np.empty(flat.shape, x.dtype)
    inverse = np.empty((len(flat), 1), x.dtype)
    for part in blocks(len(flat), max(1, BLOCK // C)):
        m = n[part]
        if centered:
            np.subtract(flat[part], (flat[part] @ average)[:, None], out=m)
        else:
            m[...] = flat[part]
        with np.errstate(over="ignore"):  # an overflow is seen in the next line but one
            square = np.vecdot(m, m)
        square /= C
        if out_of_range(square.max()):
            return NotImplemented  # squares out of range: the specification takes more care
        square += x.dtype.type(eps)
        np.divide(1, np.sqrt(square, out=square), out=inverse[part, 0])
        m *= inverse[part]
        np.multiply(m, weight, out=y[part])
        if bias is not None:
            y[part] += bias

    def pullback(g, wants):
        g = rows(g)
        dx = np.empty(g.shape, g.dtype) if wants[0] else None
        dweight = np.zeros_like(weight) if wants[1] else None
        for part in blocks(len(g), max(1, BLOCK // C)):
            if wants[1]:
                dweight += (g[part] * n[part]).sum(axis=0)
            if wants[0]:
                h = np.multiply(g[part], weight, out=dx[part])
                along = np.vecdot(h, n[part])[:, None] / C
                if centered:
                    h -= (h @ average)[:, None]
                along = np.multiply(n[part], along, out=arena.take("norm", h.shape, h.dtype))
                h -= along
                h *= inverse[part]
        dx = None if dx is None else dx.reshape(shape)
        if bias is None:
            return dx, dweight
        return dx, dweight, g.sum(axis=0) if wants[2] else None

    return y.reshape(shape), together(pullback)


def out_of_range(square):
    """Did float32 overflow, meet NaN, or come close to its smallest numbers?"""
    return not square < np.inf or 0 < square < 1e-30


@embedding.on("numpy")
def _(xp, table, *, ids):
    """A loop over rows on the way back: no sort, and each row is added in one stroke."""
    V, C = table.shape
    if ids.dtype.kind not in "iu":
        return NotImplemented
    if ids.size and not (ids.min() >= 0 and ids.max() < V):
        bad = ids[(ids < 0) | (ids >= V)].flat[0]
        raise NumericsError(f"embedding: expected ids in 0..{V - 1}, found {bad}")

    def pullback(g):
        dtable = np.zeros((V, C), g.dtype)
        for i, row in zip(ids.ravel().tolist(), g.reshape(-1, C), strict=True):
            dtable[i] += row
        return dtable

    return table[ids], (pullback,)


@head_cross_entropy.on("numpy")
def _(xp, x, W, *, targets, ignore_index=-100, chunk=256, wants):
    """Only the tokens that are scored meet the head; logits live in one chunk of scratch."""
    V, C = W.shape
    if not real(x, W) or x.shape[-1] != C or targets.shape != x.shape[:-1]:
        return NotImplemented
    if targets.dtype.kind not in "iu":
        return NotImplemented
    shape = x.shape
    targets = targets.reshape(-1)
    token = np.flatnonzero(targets != ignore_index)
    targets = targets[token]
    expect_classes(targets, V, ignore_index)
    everything = len(token) == math.prod(shape[:-1])
    x = rows(x) if everything else rows(x)[token]
    total = np.zeros((), x.dtype)
    dx = np.empty(x.shape, x.dtype) if wants[0] else None
    dW = np.zeros(W.shape, W.dtype) if wants[1] else None
    for part in blocks(len(token), chunk):
        n = len(targets[part])
        z = np.matmul(x[part], W.T, out=arena.take("logits", (n, V), x.dtype))
        top = z.max(axis=-1, keepdims=True)
        z -= top
        mine = (np.arange(n), targets[part])
        of_target = z[mine]
        np.exp(z, out=z)
        norm = z.sum(axis=-1, keepdims=True)
        total = total + (np.log(norm[:, 0]) - of_target).sum()
        if wants[0] or wants[1]:
            z /= norm
            z[mine] -= 1
        if wants[0]:
            np.matmul(z, W, out=dx[part])
        if wants[1]:
            dW += z.T @ x[part]

    def pullback(g, wants):
        whole = None
        if wants[0]:
            whole = g * dx
            if not everything:
                compact, whole = whole, np.zeros((math.prod(shape[:-1]), C), dx.dtype)
                whole[token] = compact
            whole = whole.reshape(shape)
        return whole, g * dW if wants[1] else None

    return total, together(pullback)
