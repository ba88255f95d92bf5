"""Exercises of chapter 03: a mean that starts at zero, the nearest matrix of a rank, a bill."""

import numpy as np

from ..exercise import Exercise


def a_series(rng: np.random.Generator) -> tuple:
    """gradients (t,), beta"""
    return rng.standard_normal(int(rng.integers(1, 9))), float(rng.choice([0.5, 0.9, 0.99]))


def a_matrix(rng: np.random.Generator) -> tuple:
    """W (m, n), r"""
    m, n = rng.integers(3, 9, 2)
    return rng.standard_normal((m, n)), int(rng.integers(1, 3))


def a_size(rng: np.random.Generator) -> tuple[int]:
    """How many parameters"""
    return (int(rng.integers(1, 70)) * 10**9,)


def running_mean(gradients, beta, correct):
    m = 0.0
    for g in gradients:
        m = beta * m + (1 - beta) * g
    return m / (1 - beta ** len(gradients)) if correct else m


def nearest(W, r):
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r]


EXERCISES = (
    Exercise(
        name="03.1",
        statement=(
            "Write `corrected(gradients, beta)`: Adam's running mean m of these gradients, first "
            "to last, started at zero and divided by what corrects for that start."
        ),
        hint="m = beta m + (1 - beta) g for each; at the end divide by 1 - beta ** t.",
        draw=a_series,
        solution=lambda gradients, beta: running_mean(gradients, beta, True),
        wrong=lambda gradients, beta: running_mean(gradients, beta, False),
        tolerance=1e-9,
        labels=("gradients", "beta"),
    ),
    Exercise(
        name="03.2",
        statement="Write `truncate(W, r)`: the matrix of rank r that is nearest to W.",
        hint="np.linalg.svd(W, full_matrices=False) gives U, S and V transposed; keep r of each.",
        draw=a_matrix,
        solution=nearest,
        wrong=lambda W, r: np.where(np.arange(len(W))[:, None] < r, W, 0),
        tolerance=1e-9,
        labels=("W", "r"),
    ),
    Exercise(
        name="03.3",
        statement=(
            "Write `gigabytes(parameters)`: what full fine-tuning with Adam holds between two "
            "steps, in units of 10^9 bytes, with weights and gradients in 16 bits and both means "
            "in 32."
        ),
        hint="2 bytes for the weight, 2 for the gradient, and 4 for each of the two means.",
        draw=a_size,
        solution=lambda parameters: 12 * parameters / 1e9,
        wrong=lambda parameters: 16 * parameters / 1e9,
        tolerance=1e-9,
        labels=("parameters",),
    ),
)
