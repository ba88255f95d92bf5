"""Exercises of chapter 03: a mean that starts at zero, the nearest matrix of a rank, a bill."""

import numpy as np

from ..exercise import Exercise


def a_memory(rng: np.random.Generator) -> tuple:
    """t, beta"""
    return int(rng.integers(1, 9)), float(rng.choice([0.5, 0.9, 0.99]))


def a_matrix(rng: np.random.Generator) -> tuple:
    """W (m, n), r"""
    m, n = rng.integers(3, 9, 2)
    return rng.standard_normal((m, n)), int(rng.integers(1, 3))


def a_size(rng: np.random.Generator) -> tuple[int, int]:
    """How many parameters, and how many of them train"""
    parameters = int(rng.integers(1, 70)) * 10**9
    return parameters, int(parameters * rng.uniform(0.001, 1))


def influence(t, beta):
    return (1 - beta) * beta ** np.arange(t - 1, -1, -1.0)


def nearest(W, r):
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r]


EXERCISES = (
    Exercise(
        name="03.1",
        statement=(
            "After t steps Adam's corrected mean is a mixture of the t gradients so far.  Write "
            "`influence(t, beta)`: the share of each in it, first gradient first, shape (t,)."
        ),
        hint="Unroll m as in section 2, then divide by 1 - beta ** t.  The shares sum to one.",
        draw=a_memory,
        solution=lambda t, beta: influence(t, beta) / (1 - beta**t),
        wrong=influence,
        tolerance=1e-9,
        labels=("t", "beta"),
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
            "Write `gigabytes(parameters, trained)`: what fine-tuning with Adam holds between two "
            "steps, in units of 10^9 bytes, if only `trained` of the parameters train.  Weights "
            "and gradients are in 16 bits, both means in 32."
        ),
        hint="2 bytes for every weight; 2 for a gradient and 4 for each of the means that exist.",
        draw=a_size,
        solution=lambda parameters, trained: (2 * parameters + 10 * trained) / 1e9,
        wrong=lambda parameters, trained: 12 * trained / 1e9,
        tolerance=1e-9,
        labels=("parameters", "trained"),
    ),
)
