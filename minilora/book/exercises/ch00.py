"""Exercises of chapter 00: the size of an adapter, its first step, and merging."""

import numpy as np

from ..exercise import Budget, Exercise, multiplications


def sizes(rng: np.random.Generator) -> tuple[int, int, int]:
    """(d_out, d_in, r)"""
    d_out, d_in, r = rng.integers(1, 4096), rng.integers(1, 4096), rng.integers(1, 64)
    return int(d_out), int(d_in), int(r)


def arrays(rng: np.random.Generator) -> tuple:
    """W0, A, B, alpha; alpha is no multiple of r, and whole, as it stands in files"""
    d_in, d_out, r = rng.integers(10, 40), rng.integers(10, 40), int(rng.choice([2, 4]))
    W0, A = rng.standard_normal((d_out, d_in)), rng.standard_normal((r, d_in))
    return W0, A, rng.standard_normal((d_out, r)), int(rng.choice([3, 5, 7]))


def at_the_start(rng: np.random.Generator) -> tuple:
    """x, g, W0, A, alpha, lr"""
    W0, A, _, alpha = arrays(rng)
    n, (d_out, d_in) = int(rng.integers(8, 30)), W0.shape
    x, g = rng.standard_normal((n, d_in)), rng.standard_normal((n, d_out))
    return x, g, W0, A, alpha, float(rng.uniform(0.01, 0.1))


def stepped(x, g, W0, A, alpha, lr):
    s = alpha / len(A)
    B = -lr * s * g.T @ (x @ A.T)  # B was zero, and A does not move yet
    return W0 + s * B @ A


def stepped_dear(x, g, W0, A, alpha, lr):
    s = alpha / len(A)
    return W0 - lr * s**2 * (g.T @ x) @ A.T @ A


def thin_limit(arguments: tuple) -> float:
    """x Aᵀ, its product with gᵀ, and B A."""
    x, g, _, A, _, _ = arguments
    (n, d_in), d_out, r = x.shape, g.shape[1], len(A)
    return r * (n * d_in + n * d_out + d_out * d_in)


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
            "Write `first_step(x, g, W0, A, alpha, lr)`: the merged weight W0 + s B A after one "
            "step of gradient descent at rate `lr`, begun at B = 0.  The checker counts "
            "multiplications: the large product g.T @ x would be over the budget."
        ),
        hint="dA is zero at the start, so that only B moves.  x @ A.T is narrow: n rows of r.",
        draw=at_the_start,
        solution=stepped,
        wrong=stepped_dear,
        tolerance=1e-9,
        budget=Budget("multiplications", multiplications, thin_limit),
        labels=("x", "g", "W0", "A", "alpha", "lr"),
    ),
    Exercise(
        name="00.3",
        statement=(
            "Write `merge(W0, A, B, alpha)`: the one weight that does what W0 and the adapter do "
            "together."
        ),
        hint="x W0ᵀ + s (x Aᵀ) Bᵀ = x (W0 + ...)ᵀ",
        draw=arrays,
        solution=lambda W0, A, B, alpha: W0 + alpha / A.shape[0] * B @ A,
        wrong=lambda W0, A, B, alpha: W0 + alpha * B @ A,
        labels=("W0", "A", "B", "alpha"),
    ),
)
