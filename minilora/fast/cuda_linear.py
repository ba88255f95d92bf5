"""Linear layers on a card: each product is one call of cuBLAS, which a CUDA graph can hold."""

from functools import partial

from ..engine.bf16 import BF16
from ..engine.fused import frozen_linear, linear, lora_linear, rows
from ..engine.graph import together
from ..engine.rounding import narrow
from ..engine.rules import wide
from ..lora.variants import row_lengths
from .cublas import cublas
from .cuda import contiguous, floats, storage
from .cuda_coded import coded_product
from .cuda_pointwise import kernels

FEW = 64  # tokens: with fewer, writing W0 + s B A costs more than the detour's own products


def transformed(xp, product, x, W, b, y=None):
    """x Wᵀ + b, of the type of x; added to y, where that is given, and written into it."""
    if type(x) is BF16:
        return with_bias(xp, product(x, W.T, y, beta=0.0 if y is None else 1.0), b)
    if b is not None:  # it stands in the output before the product is added to it
        if y is None:
            y = xp.empty((len(x), len(W)), x.dtype)
            y[...] = b
        else:
            y += b
    return product(x, W.T, y, beta=0.0 if y is None else 1.0)


def with_bias(xp, y, b):
    """y + b in place, for bfloat16.  Afterwards, with an adapter and without: before, b would
    round a small update away that is added to it, and B = 0 would not give the base's bits."""
    launch = kernels.on(xp)
    if b is not None and launch is None:
        y[...] = wide(y) + wide(b)
    elif b is not None:
        launch("add_to_rows<bf16>", len(y), 128, y, contiguous(xp, b), len(b))
    return y


def taken(x, W, b):
    """Are these of one type that cuBLAS takes, and do they fit?  If not, the specification says
    what is wrong."""
    return (
        storage(x, W, b) is not None and W.ndim == 2 and x.shape[-1:] == W.shape[1:]
        and (b is None or b.shape == W.shape[:1])
    )  # fmt: skip


def through(xp, product, x, base, more=None):
    """x W0ᵀ + b0 + more: from codes where rows are few, else with W0 dense; None if they do not
    fit.  `more` may be written over."""
    y = coded_product(xp, x, base, more)
    if y is None:
        W, b = base.dense(), None if base.bias is None else base.bias.data
        y = transformed(xp, product, x, W, b, more) if taken(x, W, b) else None
    return y


@linear.on("cupy", "cupy bf16")
def _(xp, x, W, b=None, *, wants):
    """A weight in bfloat16 is frozen: the gradient of one is left to the specification."""
    blas = cublas(xp)
    if blas is None or not taken(x, W, b) or (type(x) is BF16 and any(wants[1:])):
        return NotImplemented
    product, shape = blas.product, x.shape
    y = transformed(xp, product, rows(x), W, b)
    return y.reshape(*shape[:-1], len(W)), (
        lambda g: product(rows(g), W).reshape(shape),
        lambda g: product(rows(g).T, rows(x)),
        lambda g: rows(g).sum(axis=0),
    )


@frozen_linear.on("cupy", "cupy bf16")
def _(xp, x, *, base):
    blas = cublas(xp)
    if blas is None or storage(x) is None:
        return NotImplemented
    product, shape = blas.product, x.shape
    y = through(xp, product, rows(x), base) if x.ndim else None
    if y is None:
        return NotImplemented
    return y.reshape(*shape[:-1], y.shape[1]), (
        lambda g: product(rows(g), base.dense()).reshape(shape),
    )


def fit(x, A, B, base):
    """Do an input, an adapter and its base belong together?"""
    (d_out, d_in), b = base.shape, base.bias
    return (
        x.shape[-1:] == (d_in,) and A.shape == (B.shape[1], d_in) and len(B) == d_out
        and (b is None or b.shape == (d_out,))
    )  # fmt: skip


def adapted_weight(xp, product, A, B, base, scale):
    """W0 + s B A, float32, in an array of its own."""
    W = base.dense(xp.empty(base.shape, xp.float32))
    return product(B, A, W, alpha=scale, beta=1.0)


@row_lengths.on("cupy")
def _(xp, A, B, *, base, scale):
    """With the product by cuBLAS, which a CUDA graph can hold."""
    blas = cublas(xp)
    if blas is None or not floats(A, B):
        return NotImplemented
    W = adapted_weight(xp, blas.product, A, B, base, scale)
    return xp.sqrt(xp.square(W, out=W).sum(axis=1))


@lora_linear.on("cupy")
def _(xp, x, A, B, *, base, scale, wants):
    """One product with W0 + s B A, written into scratch here and again on the way back; with few
    rows the base and the detour, each by its own products.

    Whether B is zero is not asked, which would be to wait: W0 + s 0 A is W0 but for the sign
    of zeros, and so step 0 has the bits of the base.
    """
    blas = cublas(xp)
    d_out, b = base.shape[0], None if base.bias is None else base.bias.data
    if blas is None or not floats(x, A, B, b) or not fit(x, A, B, base):
        return NotImplemented
    product, shape = blas.product, x.shape
    x = rows(x)
    few = len(x) < FEW

    updated = partial(adapted_weight, xp, product, A, B, base, scale)
    u = product(x, A.T) if few or wants[2] else None  # (n, r)
    if few:
        y = through(xp, product, x, base, product(u, B.T, alpha=scale))
        if y is None:
            return NotImplemented
    else:
        y = transformed(xp, product, x, updated(), b)
    kept_x = x if wants[1] else None
    kept_u = u if wants[2] else None

    def pullback(g, wants):
        g, dx = rows(g), None
        gB = product(g, B, alpha=scale) if wants[1] or (few and wants[0]) else None
        if wants[0]:
            dx = product(g, base.dense() if few else updated())
            dx = (product(gB, A, dx, beta=1.0) if few else dx).reshape(shape)
        return (
            dx,
            product(gB.T, kept_x) if wants[1] else None,
            product(g.T, kept_u, alpha=scale) if wants[2] else None,
        )

    return y.reshape(*shape[:-1], d_out), together(pullback)


@lora_linear.on("cupy bf16")
def _(xp, x, A, B, *, base, scale, wants):
    """The adapter's path is written first, and x W0ᵀ added to it in float32 and rounded once.

    To round W0 + s B A, or to add the update to a rounded x W0ᵀ, would lose most of what is
    small.  A and B are rounded for the products alone; their gradients are float32.  With few
    rows of x the codes of a base are read where they are, as when there is no adapter.
    """
    blas = cublas(xp)
    if blas is None or storage(x) != "bf16" or not floats(A, B) or not fit(x, A, B, base):
        return NotImplemented
    product, shape, (d_out, r) = blas.product, x.shape, B.shape
    x, A, B = rows(x), BF16(narrow(A)), BF16(narrow(B))
    u = product(x, A.T)  # (n, r)
    y = through(xp, product, x, base, product(u, B.T, alpha=scale))
    if y is None:
        return NotImplemented
    kept_x = x if wants[1] else None
    kept_u = u if wants[2] else None

    def pullback(g, wants):
        g = rows(g)
        gB = product(g, B, alpha=scale) if wants[0] or wants[1] else None  # (n, r)
        dx = dA = dB = None
        if wants[0]:
            dx = product(g, base.dense(), product(gB, A), beta=1.0).reshape(shape)
        if wants[1]:
            dA = product(gB.T, kept_x, xp.empty(A.shape, xp.float32))
        if wants[2]:
            dB = product(g.T, kept_u, xp.empty((d_out, r), xp.float32), alpha=scale)
        return dx, dA, dB

    return y.reshape(*shape[:-1], d_out), together(pullback)
