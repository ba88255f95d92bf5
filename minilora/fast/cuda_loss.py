"""Cross-entropy on a card: the gradient takes the place of the logits, a chunk at a time."""

from ..engine.fused import rows
from ..engine.graph import together
from ..engine.loss import IGNORE, cross_entropy, head_cross_entropy
from .cublas import cublas
from .cuda import Kernels, floats

kernels = Kernels("loss.cu", "token_losses<float>", "add_losses")
THREADS = 512  # to a row of logits


@cross_entropy.on("cupy")
def _(xp, logits, *, targets, ignore_index=IGNORE, wants):
    """Logits are left as they are; dz is kept where it is wanted."""
    launch = kernels.on(xp)
    if launch is None or not floats(logits) or not fit(targets, logits.shape[:-1]):
        return NotImplemented
    shape = logits.shape
    z, targets = xp.ascontiguousarray(rows(logits)), flat(xp, targets)
    losses, dz = xp.empty(len(z), z.dtype), xp.empty_like(z) if wants[0] else None
    launch("token_losses<float>", len(z), THREADS, losses, dz, z, targets, z.shape[1], ignore_index)
    return summed(xp, launch, losses), (lambda g: (g * dz).reshape(shape),)


@head_cross_entropy.on("cupy")
def _(xp, x, W, *, targets, ignore_index=IGNORE, chunk=256, wants):
    """One buffer of logits serves all chunks, and holds their gradient in turn."""
    launch = kernels.on(xp)
    if launch is None or not floats(x, W) or not fit(targets, x.shape[:-1]):
        return NotImplemented
    if W.ndim != 2 or W.shape[1] != x.shape[-1]:
        return NotImplemented  # the specification says what is wrong
    shape, V = x.shape, len(W)
    x, targets = xp.ascontiguousarray(rows(x)), flat(xp, targets)
    n, blas = len(x), cublas(xp)
    product = xp.matmul if blas is None else lambda a, b, out=None: blas.product(a, b, out)
    losses, logits = xp.empty(n, x.dtype), xp.empty((min(n, chunk), V), x.dtype)
    dx = xp.empty_like(x) if wants[0] else None
    dW = xp.zeros(W.shape, W.dtype) if wants[1] else None
    for start in range(0, n, chunk):
        part = slice(start, min(n, start + chunk))
        z = logits[: part.stop - start]
        product(x[part], W.T, out=z)
        launch("token_losses<float>", len(z), THREADS, losses[part], z if any(wants) else None,
               z, targets[part], V, ignore_index)  # fmt: skip
        if wants[0]:
            product(z, W, out=dx[part])
        if wants[1]:
            dW += product(z.T, x[part])

    def pullback(g, wants):
        return (g * dx).reshape(shape) if wants[0] else None, g * dW if wants[1] else None

    return summed(xp, launch, losses), together(pullback)


def fit(targets, shape):
    """Whole numbers, one a token?  Else the specification says what is wrong."""
    return len(shape) > 0 and targets.shape == shape and targets.dtype.kind in "iu"


def flat(xp, targets):
    return xp.ascontiguousarray(targets.reshape(-1).astype(xp.int64, copy=False))


def summed(xp, launch, losses):
    total = xp.empty((), losses.dtype)
    launch("add_losses", 1, 256, total, losses, losses.size)
    return total
