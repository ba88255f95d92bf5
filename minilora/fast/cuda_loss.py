"""Cross-entropy on a card: the gradient takes the place of the logits, a chunk at a time."""

from ..engine.bf16 import empty
from ..engine.fused import rows
from ..engine.graph import together
from ..engine.loss import IGNORE, cross_entropy, head_cross_entropy
from .cublas import cublas
from .cuda import Kernels, contiguous, flat_grid, storage

kernels = Kernels(
    "loss.cu", *(f"{name}<{S}>" for name in ("token_losses", "scaled") for S in ("float", "bf16")),
    "add_losses",
)  # fmt: skip
THREADS = 512  # to a row of logits


@cross_entropy.on("cupy", "cupy bf16")
def _(xp, logits, *, targets, ignore_index=IGNORE, wants):
    """Logits are left as they are; dz is kept where it is wanted.  The loss is float32."""
    launch, S = kernels.on(xp), storage(logits)
    if launch is None or S is None or not fit(targets, logits.shape[:-1]):
        return NotImplemented
    shape = logits.shape
    z, targets = contiguous(xp, rows(logits)), flat(xp, targets)
    losses = xp.empty(len(z), xp.float32)
    dz = empty(xp, z.shape, z.dtype) if wants[0] else None
    launch(f"token_losses<{S}>", len(z), THREADS, losses, dz, z, targets, z.shape[1],
           ignore_index)  # fmt: skip
    return summed(xp, launch, losses), (lambda g: scaled(xp, launch, S, g, dz).reshape(shape),)


@head_cross_entropy.on("cupy", "cupy bf16")
def _(xp, x, W, *, targets, ignore_index=IGNORE, chunk=256, wants):
    """One buffer of logits serves all chunks, and holds their gradient in turn."""
    launch, S, blas = kernels.on(xp), storage(x, W), cublas(xp)
    if launch is None or S is None or not fit(targets, x.shape[:-1]):
        return NotImplemented
    if W.ndim != 2 or W.shape[1] != x.shape[-1]:
        return NotImplemented  # the specification says what is wrong
    if S == "bf16" and (blas is None or wants[1]):
        return NotImplemented  # a weight in bfloat16 is frozen
    shape, V = x.shape, len(W)
    x, targets = contiguous(xp, rows(x)), flat(xp, targets)
    n, product = len(x), xp.matmul if blas is None else blas.product
    losses, logits = xp.empty(n, xp.float32), empty(xp, (min(n, chunk), V), x.dtype)
    dx = empty(xp, x.shape, x.dtype) if wants[0] else None
    dW = xp.zeros(W.shape, W.dtype) if wants[1] else None
    for start in range(0, n, chunk):
        part = slice(start, min(n, start + chunk))
        z = logits[: part.stop - start]
        product(x[part], W.T, out=z)
        launch(f"token_losses<{S}>", len(z), THREADS, losses[part], z if any(wants) else None,
               z, targets[part], V, ignore_index)  # fmt: skip
        if wants[0]:
            product(z, W, out=dx[part])
        if wants[1]:
            dW += product(z.T, x[part])

    def pullback(g, wants):
        return (
            scaled(xp, launch, S, g, dx).reshape(shape) if wants[0] else None,
            g * dW if wants[1] else None,
        )

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


def scaled(xp, launch, S, g, x):
    """g x, where g is a float32 number on the device."""
    y = empty(xp, x.shape, x.dtype)
    launch(f"scaled<{S}>", flat_grid(x.size), 256, y, x, xp.asarray(g, xp.float32), x.size)
    return y
