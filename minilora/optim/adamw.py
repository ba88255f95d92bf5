"""The writers of parameters: SGD, and Adam with its decay decoupled."""

from typing import Any

from ..engine.backend import xp_of
from ..engine.rules import rule
from .flat import FACTOR, LR, NORM, STEP, Grouping, Stepper, by_shape


@rule
def sgd_update(xp, p, g, momentum, control, *, mu, decay, lr_factor=1.0):
    """u = mu u + g,   p = (1 - lr decay) p - lr u,   in place; nothing if g is not finite."""
    finite = xp.isfinite(control[NORM])
    lr = (control[LR] * lr_factor).astype(p.dtype)
    u = mu * momentum + g * control[FACTOR].astype(p.dtype)
    xp.copyto(p, p * (1 - lr * decay) - lr * u, where=finite)
    xp.copyto(momentum, u, where=finite)


@rule
def adamw_update(xp, p, g, m, v, control, *, betas, eps, decay, lr_factor=1.0):
    """One step of AdamW, in place; nothing is written if the gradient's norm is not finite.

        p = (1 - lr decay) p
        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g²
        p = p - lr / (1 - b1ᵗ) · m / (√v / √(1 - b2ᵗ) + eps)

    p g m v flat arrays of one length; `control` holds lr (times `lr_factor`), t, the gradient's
    norm and the factor that g is multiplied by.  (Loshchilov and Hutter 2019, in PyTorch's order.)
    """
    b1, b2 = betas
    finite = xp.isfinite(control[NORM])
    lr, t = control[LR] * lr_factor, control[STEP] + 1
    rate = (lr / (1 - b1**t)).astype(p.dtype)
    root = xp.sqrt(1 - b2**t).astype(p.dtype)
    shrink = (1 - lr * decay).astype(p.dtype)
    g = g * control[FACTOR].astype(p.dtype)
    new_m = b1 * m + (1 - b1) * g
    new_v = b2 * v + (1 - b2) * (g * g)
    xp.copyto(p, p * shrink - rate * (new_m / (xp.sqrt(new_v) / root + eps)), where=finite)
    xp.copyto(m, new_m, where=finite)
    xp.copyto(v, new_v, where=finite)


class SGD(Stepper):
    """Stochastic gradient descent with momentum over one flat buffer."""

    def __init__(
        self,
        model: Any,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        groups: Grouping = by_shape,
    ):
        super().__init__(model, lr, groups, momentum=momentum, weight_decay=weight_decay)
        self.mu, self.weight_decay = momentum, weight_decay
        self.momentum = xp_of(self.flat.data).zeros_like(self.flat.data)

    def step(self, divide_by: float = 1, clip: float | None = None) -> None:
        """Apply the gradient gathered so far, and clear it; see `AdamW.step`."""
        self.measure(divide_by, clip)
        f = self.flat
        for part, group in f.parts:
            sgd_update(
                f.data[part], f.grad[part], self.momentum[part], self.control,
                mu=self.mu, decay=self.weight_decay * group.decay, lr_factor=group.lr,
            )  # fmt: skip
        self.count_step()

    def arrays(self) -> dict[str, Any]:
        return self.moments_by_path(momentum=self.momentum)


class AdamW(Stepper):
    """AdamW over one flat buffer; train `optimizer.model`, whose Parameters are its views.

    Matrices decay, norms and biases do not, unless `groups(path, parameter)` says otherwise.
    State: 2 numbers per Parameter entry (m and v).
    """

    def __init__(
        self,
        model: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        groups: Grouping = by_shape,
    ):
        super().__init__(model, lr, groups, betas=betas, eps=eps, weight_decay=weight_decay)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        xp, shape, dtype = xp_of(self.flat.data), self.flat.data.shape, self.flat.data.dtype
        # Not zeros_like, which writes: pages that nobody touched are nowhere in memory yet, nor
        # in a copy of the process that is forked before the first step.
        self.m, self.v = xp.zeros(shape, dtype), xp.zeros(shape, dtype)

    def step(self, divide_by: float = 1, clip: float | None = None) -> None:
        """Apply the gradient gathered so far, and clear it.

        It is divided by `divide_by` (the number of scored tokens) and scaled down to norm
        `clip` if it is longer.  A non-finite gradient changes nothing; see `first_bad`.
        """
        self.measure(divide_by, clip)
        f = self.flat
        for part, group in f.parts:
            adamw_update(
                f.data[part], f.grad[part], self.m[part], self.v[part], self.control, eps=self.eps,
                betas=self.betas, decay=self.weight_decay * group.decay, lr_factor=group.lr,
            )  # fmt: skip
        self.count_step()

    def arrays(self) -> dict[str, Any]:
        return self.moments_by_path(m=self.m, v=self.v)
