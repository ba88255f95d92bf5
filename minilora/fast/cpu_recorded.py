"""What a recording runs in place of the ops that write a token: nothing to check or to keep.

A rule has answered the like before, so that shapes fit; what is asked here is whether the
arrays are float arrays of one dtype, as in `cpu.py`, and small.
"""

import math
import operator
from itertools import accumulate, pairwise

import numpy as np

from ..engine.attention import attention, rope, split_heads
from ..engine.fused import (
    GELU_CUBE,
    GELU_SCALE,
    embedding,
    gelu,
    layer_norm,
    linear,
    lora_linear,
    rms_norm,
    swiglu,
)
from ..engine.rules import wide
from ..engine.team import all_reduce
from ..engine.tensor import add, getitem, reshape
from ..model.cache import remembered
from .cpu import BLOCK, equal_parts, few_rows, height_of_few, inverse_sigmoid, out_of_range, real
from .cpu_attention import one_query, turned, turns_up_to

add.prepared_on("numpy")(lambda a, b: operator.add)
getitem.prepared_on("numpy")(lambda x, *, index: operator.itemgetter(index))
reshape.prepared_on("numpy")(lambda x, *, shape: operator.methodcaller("reshape", shape))


def small(*arrays):
    return real(*arrays) and 0 < arrays[0].size <= BLOCK


@all_reduce.prepared_on("numpy")
def _(y, *, team):
    n, shape = y.size, y.shape
    if len(team.cuts(n, y.itemsize)) != 1:
        return NotImplemented
    return lambda y: team.added(y.reshape(n)).reshape(shape)


@embedding.prepared_on("numpy")
def _(table, *, ids):
    one = ids.size == 1
    if ids.size == 0:
        return NotImplemented

    def run(table):
        low, high = (ids.item(),) * 2 if one else (ids.min(), ids.max())
        if low >= 0 and high < len(table):
            return table[ids]
        return embedding(table, ids=ids)  # says which id is outside

    return run


@linear.prepared_on("numpy")
def _(x, W, b=None):
    if not small(x, W, b):
        return NotImplemented
    flat, shape = flattened(x), (*x.shape[:-1], len(W))
    height = height_of_few(x.size // x.shape[-1], W)

    def run(x, W, b=None):
        y = times(x.reshape(flat), W, height)
        if b is not None:
            y += b
        return y.reshape(shape)

    return run


@lora_linear.prepared_on("numpy")
def _(x, A, B, *, base, scale):
    if not small(x, A, B):
        return NotImplemented
    flat, shape = flattened(x), (*x.shape[:-1], len(B))

    def run(x, A, B):
        x = x.reshape(flat)
        y = times(x, wide(base.dense()))
        if base.bias is not None:
            y += wide(base.bias.data)
        change = times(times(x, A), B)
        change *= scale
        y += change
        return y.reshape(shape)

    return run


def flattened(x):
    """The shape (n, d) of its rows, or (d,) of a single one."""
    return x.shape[-1:] if x.size == x.shape[-1] else (-1, x.shape[-1])


def times(x, W, height=0):
    """x Wᵀ; of a single row the product of a matrix and a vector."""
    return W.dot(x) if x.ndim == 1 else few_rows(x, W, height)


@layer_norm.prepared_on("numpy")
def _(x, weight, bias, *, eps):
    if not small(x, weight, bias):
        return NotImplemented
    return normalized(x.shape, eps, layer_norm.specification, equal_parts(len(weight), x.dtype))


@rms_norm.prepared_on("numpy")
def _(x, weight, *, eps):
    if not small(x, weight):
        return NotImplemented
    return normalized(x.shape, eps, rms_norm.specification, None)


def normalized(shape, eps, specification, average):
    """A norm of arrays of one shape; squares out of range are left to the specification."""
    C = shape[-1]
    quiet = np.errstate(over="ignore")  # an overflow is seen where it is tested for

    @quiet
    def one_row(x, weight, bias=None):
        m = x.reshape(C)
        if average is not None:
            m = m - m.dot(average)
        square = float(m.dot(m)) / C
        if out_of_range(square):
            return with_care(x, weight, bias)
        y = m * (1 / math.sqrt(square + eps))
        y *= weight
        if bias is not None:
            y += bias
        return y.reshape(shape)

    @quiet
    def several_rows(x, weight, bias=None):
        m = x.reshape(-1, C)
        if average is not None:
            m = m - (m @ average)[:, None]
        square = np.vecdot(m, m)
        square /= C
        if out_of_range(np.maximum.reduce(square)):
            return with_care(x, weight, bias)
        square += eps
        y = m / np.sqrt(square, out=square)[:, None]
        y *= weight
        if bias is not None:
            y += bias
        return y.reshape(shape)

    def with_care(x, weight, bias):
        return specification(np, x, weight, *([] if bias is None else [bias]), eps=eps)[0]

    return one_row if math.prod(shape) == C else several_rows


@gelu.prepared_on("numpy")
def _(x):
    """x (1 + t)/2, in the order of the rule for large arrays."""
    if not small(x):
        return NotImplemented

    def run(x):
        y = x * x
        y *= GELU_SCALE * GELU_CUBE
        y += GELU_SCALE
        y *= x
        np.tanh(y, out=y)
        y *= 0.5
        y += 0.5
        y *= x
        return y

    return run


@swiglu.prepared_on("numpy")
def _(gate, up):
    if not small(gate, up) or gate.shape != up.shape:
        return NotImplemented

    def run(gate, up):
        y = inverse_sigmoid(gate, np.empty_like(gate))
        np.divide(gate, y, out=y)
        y *= up
        return y

    return run


@split_heads.prepared_on("numpy")
def _(x, *, heads, width):
    N, T, _ = x.shape
    shape, ends = (N, T, sum(heads), width), list(accumulate(heads, initial=0))
    parts = [(slice(None), slice(None), slice(a, b)) for a, b in pairwise(ends)]

    return lambda x: tuple(map(x.reshape(shape).__getitem__, parts))


@remembered.prepared_on("numpy")
def _(k, v, *, layer, positions):
    keys, values, rows = layer.keys, layer.values, layer.rows
    if not real(k, v) or not isinstance(keys, np.ndarray):
        return NotImplemented

    def run(k, v):
        where = (0, positions.item()) if positions.size == 1 else (rows, positions)
        keys[where], values[where] = k, v
        return keys[:, : layer.stop], values[:, : layer.stop]

    return run


@attention.prepared_on("numpy")
def _(q, k, v, *, positions=None, tile=64):
    if positions is None or q.shape[1] != 1 or not real(q, k, v) or q.size == 0:
        return NotImplemented
    return lambda q, k, v: one_query(q, k, v, positions)


@rope.prepared_on("numpy")
def _(x, *, theta, scaling=None, positions=None):
    """One position for all: the table is looked up in only where it must grow."""
    if positions is None or positions.size != 1 or not small(x):
        return NotImplemented
    rest = x.shape[3], theta, scaling, x.dtype
    cos, sin = turns_up_to(positions.item(), *rest)

    def run(x):
        nonlocal cos, sin
        position = positions.item()
        if position < 0:
            return rope.specification(np, x, theta=theta, scaling=scaling, positions=positions)[0]
        if position >= len(cos):
            cos, sin = turns_up_to(position, *rest)
        return turned(x, cos[position], sin[position])

    return run
