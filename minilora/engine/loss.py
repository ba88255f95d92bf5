"""Cross-entropy over tokens: a sum, never a mean, so that micro-batches add up."""

from .backend import device_of
from .errors import MiniloraError, NumericsError
from .fused import expect_width, rows
from .graph import together
from .ops import softmax_parts
from .tensor import op

IGNORE = -100  # the target of a token that is not scored, as in PyTorch


@op
def cross_entropy(xp, logits, *, targets, ignore_index=IGNORE):
    """L = Σ (log Σ e^z - z_target) over the scored tokens.   dz = dL (softmax(z) - 1[target])

    logits (..., V), targets (...) whole numbers; L a single number.  Divide by the number
    of scored tokens where a mean is wanted: `scored(targets)`.
    """
    shape = logits.shape
    expect_targets("cross_entropy", targets, shape[:-1], shape[-1], ignore_index)
    z, targets = rows(logits), targets.reshape(-1)
    losses, dz = token_losses(xp, z, targets, ignore_index)
    return losses.sum(), (lambda g: (g * dz).reshape(shape),)


@op
def head_cross_entropy(xp, x, W, *, targets, ignore_index=IGNORE, chunk=256, wants):
    """cross_entropy(x Wᵀ), `chunk` tokens at a time, so that all logits are never held.

        dx = dL (softmax(x Wᵀ) - 1) W      dW = dL (softmax(x Wᵀ) - 1)ᵀ x

    x (..., C), W (V, C), targets (...).  Since dL is one number, the products for dx and
    dW are formed on the way out, while a chunk's logits are at hand.
    """
    expect_width("head_cross_entropy", x, W)
    expect_targets("head_cross_entropy", targets, x.shape[:-1], W.shape[0], ignore_index)
    shape = x.shape
    x, targets = rows(x), targets.reshape(-1)
    total = xp.zeros((), x.dtype)
    dx = xp.empty_like(x) if wants[0] else None
    dW = xp.zeros_like(W) if wants[1] else None
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        losses, dz = token_losses(xp, x[part] @ W.T, targets[part], ignore_index)
        total = total + losses.sum()
        if wants[0]:
            dx[part] = dz @ W
        if wants[1]:
            dW += dz.T @ x[part]

    def pullback(g, wants):
        return (g * dx).reshape(shape) if wants[0] else None, g * dW if wants[1] else None

    return total, together(pullback)


def token_losses(xp, z, targets, ignore_index):
    """Per token: log Σ e^z - z_target and softmax(z) - 1[target]; 0 where ignored.

    z (n, V), targets (n,).
    """
    scored = targets != ignore_index
    safe = xp.where(scored, targets, 0)
    token = xp.arange(z.shape[0])
    p, lse = softmax_parts(xp, z, -1)
    losses = xp.where(scored, lse[:, 0] - z[token, safe], 0)
    p[token, safe] -= 1
    return losses, p * scored[:, None]


def expect_targets(name, targets, shape, V, ignore_index):
    """One whole number a token; on the host, a class or `ignore_index` (to see it on a card would
    be to wait)."""
    if targets.dtype.kind not in "iu" or targets.shape != shape:
        raise MiniloraError(
            f"{name}: expected whole-number targets of shape {shape}, "
            f"found {targets.dtype} {targets.shape}"
        )
    if device_of(targets) == "cpu":
        expect_classes(targets, V, ignore_index)


def expect_classes(targets, V, ignore_index):
    """Refuse what is neither a class nor ignored: -1 would be the last class."""
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if wrong.any():
        raise NumericsError(
            f"targets: expected 0..{V - 1} or {ignore_index}, found {targets[wrong][0]}"
        )


def scored(targets, ignore_index=IGNORE):
    """How many tokens of a host array of targets count."""
    return int((targets != ignore_index).sum())
