"""Linear layers on a card: each product is one call of cuBLAS, which a CUDA graph can hold."""

from ..engine.fused import frozen_linear, linear, lora_linear, rows
from ..engine.graph import together
from .cublas import cublas
from .cuda import floats
from .cuda_coded import coded_product

FEW = 64  # tokens: with fewer, writing W0 + s B A costs more than the detour's own products


def transformed(xp, product, x, W, b):
    """x Wᵀ + b; the bias stands in the output before the product is added to it."""
    y = xp.empty((len(x), len(W)), x.dtype)
    if b is None:
        return product(x, W.T, y)
    y[...] = b
    return product(x, W.T, y, beta=1.0)


def taken(x, W, b):
    """Are these float32 arrays that fit?  If not, the specification says what is wrong."""
    return (
        floats(x, W, b) and W.ndim == 2 and x.shape[-1:] == W.shape[1:]
        and (b is None or b.shape == W.shape[:1])
    )  # fmt: skip


def through(xp, product, x, base):
    """x W0ᵀ + b0: from codes where rows are few, else with W0 dense; None if they do not fit."""
    y = coded_product(xp, x, base)
    if y is None:
        W, b = base.dense(), None if base.bias is None else base.bias.data
        y = transformed(xp, product, x, W, b) if taken(x, W, b) else None
    return y


@linear.on("cupy")
def _(xp, x, W, b=None):
    blas = cublas(xp)
    if blas is None or not taken(x, W, b):
        return NotImplemented
    product, shape = blas.product, x.shape
    y = transformed(xp, product, rows(x), W, b)
    return y.reshape(*shape[:-1], len(W)), (
        lambda g: product(rows(g), W).reshape(shape),
        lambda g: product(rows(g).T, rows(x)),
        lambda g: rows(g).sum(axis=0),
    )


@frozen_linear.on("cupy")
def _(xp, x, *, base):
    blas = cublas(xp)
    if blas is None or not floats(x):
        return NotImplemented
    product, shape = blas.product, x.shape
    y = through(xp, product, rows(x), base) if x.ndim else None
    if y is None:
        return NotImplemented
    return y.reshape(*shape[:-1], y.shape[1]), (
        lambda g: product(rows(g), base.dense()).reshape(shape),
    )


@lora_linear.on("cupy")
def _(xp, x, A, B, *, base, scale, wants):
    """One product with W0 + s B A, written into scratch here and again on the way back; with few
    rows the base and the detour, each by its own products.

    Whether B is zero is not asked, which would be to wait: W0 + s 0 A is W0 but for the sign
    of zeros, and so step 0 has the bits of the base.
    """
    blas = cublas(xp)
    (d_out, d_in), b = base.shape, None if base.bias is None else base.bias.data
    if blas is None or not floats(x, A, B, b):
        return NotImplemented
    if x.shape[-1:] != (d_in,) or A.shape != (B.shape[1], d_in) or len(B) != d_out:
        return NotImplemented  # the specification says what is wrong
    if b is not None and b.shape != (d_out,):
        return NotImplemented
    product, shape = blas.product, x.shape
    x = rows(x)
    few = len(x) < FEW

    def updated():
        W = base.dense(xp.empty((d_out, d_in), xp.float32))
        return product(B, A, W, alpha=scale, beta=1.0)

    u = product(x, A.T) if few or wants[2] else None  # (n, r)
    if few:
        y = through(xp, product, x, base)
        if y is None:
            return NotImplemented
        product(u, B.T, y, alpha=scale, beta=1.0)
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
