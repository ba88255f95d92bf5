"""Exercises of chapter 00: counting an adapter, and multiplying in the cheap order."""

import numpy as np

from ..exercise import Budget, Exercise, multiplications


def sizes(rng: np.random.Generator) -> tuple[int, int, int]:
    """(d_out, d_in, r)"""
    d_out, d_in, r = rng.integers(1, 4096), rng.integers(1, 4096), rng.integers(1, 64)
    return int(d_out), int(d_in), int(r)


def arrays(rng: np.random.Generator) -> tuple:
    """x, W0, A, B, alpha"""
    n, d_in, d_out, r = rng.integers(2, 30), rng.integers(10, 40), rng.integers(10, 40), 2
    x, W0 = rng.standard_normal((n, d_in)), rng.standard_normal((d_out, d_in))
    return x, W0, rng.standard_normal((r, d_in)), rng.standard_normal((d_out, r)), 4.0


def forward(x, W0, A, B, alpha):
    return x @ W0.T + (alpha / A.shape[0]) * ((x @ A.T) @ B.T)


def forward_dear(x, W0, A, B, alpha):
    return x @ W0.T + (alpha / A.shape[0]) * (x @ (B @ A).T)


def cheap_limit(arguments: tuple) -> float:
    """One product with W0, and two with the factors."""
    x, W0, A, _, _ = arguments
    n, (d_out, d_in), r = len(x), W0.shape, len(A)
    return n * (d_out * d_in + r * d_in + r * d_out)


EXERCISES = (
    Exercise(
        name="00.1",
        statement=(
            "Write `adapter_size(d_out, d_in, r)`: how many numbers an adapter of rank `r` adds "
            "to a weight of shape (d_out, d_in)."
        ),
        hint="A has r rows of d_in numbers; B has d_out rows of r numbers.",
        draw=sizes,
        solution=lambda d_out, d_in, r: r * (d_in + d_out),
        wrong=lambda d_out, d_in, r: r * d_in * d_out,
        labels=("d_out", "d_in", "r"),
    ),
    Exercise(
        name="00.2",
        statement=(
            "Write `lora_forward(x, W0, A, B, alpha)` on plain arrays, with the scale alpha / r. "
            "The checker counts multiplications: never form B A."
        ),
        hint="x @ A.T is narrow: n rows of r numbers.  Multiply that by B.T.",
        draw=arrays,
        solution=forward,
        wrong=forward_dear,
        tolerance=1e-9,
        budget=Budget("multiplications", multiplications, cheap_limit),
        labels=("x", "W0", "A", "B", "alpha"),
    ),
    Exercise(
        name="00.3",
        statement=(
            "Write `merge(W0, A, B, alpha)`: the one weight that does what W0 and the adapter do "
            "together."
        ),
        hint="x W0ᵀ + s (x Aᵀ) Bᵀ = x (W0 + ...)ᵀ",
        draw=lambda rng: arrays(rng)[1:],
        solution=lambda W0, A, B, alpha: W0 + alpha / A.shape[0] * B @ A,
        wrong=lambda W0, A, B, alpha: W0 + alpha * B @ A,
        labels=("W0", "A", "B", "alpha"),
    ),
)
