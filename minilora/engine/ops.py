"""The other primitives, each beside its pullbacks."""

from typing import Any

from .errors import MiniloraError
from .rounding import moves
from .tensor import op, reopened, shape_of, unbroadcast


@op
def exp(xp, x):
    """y = eˣ.   dx = dy y"""
    y = xp.exp(x)
    return y, (lambda g: g * y,)


@op
def log(xp, x):
    """y = log x.   dx = dy / x"""
    return xp.log(x), (lambda g: g / x,)


@op
def sqrt(xp, x):
    """y = √x.   dx = dy / 2y   (infinite at 0)"""
    y = xp.sqrt(x)
    return y, (lambda g: g / (2 * y),)


@op
def tanh(xp, x):
    """y = tanh x.   dx = dy (1 - y²)"""
    y = xp.tanh(x)
    return y, (lambda g: g * (1 - y * y),)


@op
def sigmoid(xp, x):
    """y = 1 / (1 + e⁻ˣ).   dx = dy y (1 - y)"""
    y = logistic(xp, x)
    return y, (lambda g: g * y * (1 - y),)


def logistic(xp: Any, x: Any) -> Any:
    """1 / (1 + e⁻ˣ) by way of tanh, which cannot overflow."""
    return 0.5 * (1 + xp.tanh(0.5 * x))


@op
def max(xp, x, *, axis=None, keepdims=False):
    """y = max x over `axis`.   dx = dy at the maximum, shared evenly among ties"""
    y = x.max(axis=axis, keepdims=keepdims)
    shape = x.shape

    def pullback(g):
        hit = x == reopened(y, shape, axis, keepdims)
        ties = hit.sum(axis=axis, keepdims=True).astype(g.dtype)
        return hit * (reopened(g, shape, axis, keepdims) / ties)

    return y, (pullback,)


@op
def where(xp, a, b, *, mask):
    """y = a where `mask`, else b.   da = dy where `mask`   db = dy elsewhere"""
    sa, sb = shape_of(a), shape_of(b)
    return xp.where(mask, a, b), (
        lambda g: unbroadcast(xp.where(mask, g, 0), sa),
        lambda g: unbroadcast(xp.where(mask, 0, g), sb),
    )


@moves
@op
def concat(xp, *parts, axis=-1):
    """Join along an existing axis.   each part gets its stretch of dy"""
    axis = axis % parts[0].ndim
    ends, total = [], 0
    for part in parts:
        ends.append((total, total + part.shape[axis]))
        total = ends[-1][1]
    lead = (slice(None),) * axis
    return xp.concatenate(parts, axis=axis), tuple(
        lambda g, start=start, stop=stop: g[(*lead, slice(start, stop))] for start, stop in ends
    )


@moves
@op
def stack(xp, *parts, axis=0):
    """Join along a new axis.   each part gets its slice of dy"""
    lead = (slice(None),) * (axis % (parts[0].ndim + 1))
    return xp.stack(parts, axis=axis), tuple(
        lambda g, i=i: g[(*lead, i)] for i in range(len(parts))
    )


@op
def softmax(xp, x, *, axis=-1):
    """y = eˣ / Σ eˣ.   dx = y (dy - Σ dy y)

    A row of -inf alone has no distribution: its y and dx are 0.  NaN and +inf stay NaN.
    """
    y, _ = softmax_parts(xp, x, axis)
    return y, (lambda g: y * (g - (g * y).sum(axis=axis, keepdims=True)),)


@op
def log_softmax(xp, x, *, axis=-1):
    """y = x - log Σ eˣ.   dx = dy - softmax(x) Σ dy"""
    _, lse = softmax_parts(xp, x, axis)
    y = x - xp.where(lse == -xp.inf, 0, lse)
    return y, (lambda g: g - softmax_parts(xp, x, axis)[0] * g.sum(axis=axis, keepdims=True),)


@op
def logsumexp(xp, x, *, axis=-1, keepdims=False):
    """y = log Σ eˣ.   dx = dy softmax(x)   (0 where all x are -inf, and y = -inf)"""
    p, lse = softmax_parts(xp, x, axis)
    shape = x.shape
    value = lse if keepdims else lse.squeeze(axis)
    return value, (lambda g: reopened(g, shape, axis, keepdims) * p,)


def softmax_parts(xp: Any, x: Any, axis: Any) -> tuple[Any, Any]:
    """softmax(x) and log Σ eˣ (with the axis kept), shifted by the row maximum.

    The maximum is a constant shift, so a complex step may use that of the real part.
    """
    if not isinstance(axis, int):
        raise MiniloraError(f"softmax: expected one axis, found {axis!r}")
    top = x.real.max(axis=axis, keepdims=True)
    top = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    e = xp.exp(x - top)
    total = e.sum(axis=axis, keepdims=True)
    empty = total == 0
    whole = xp.where(empty, xp.ones_like(total), total)
    return e / whole, xp.where(empty, -xp.inf, top + xp.log(whole))
