"""Exercises of chapter 13: the principal part, the change that a file may hold, a row's length."""

import numpy as np

from ..exercise import Exercise


def a_weight(rng: np.random.Generator) -> tuple:
    """W (8, 6), r in 1..4, s in 1/4..4"""
    return rng.standard_normal((8, 6)), int(rng.integers(1, 5)), float(2.0 ** rng.integers(-2, 3))


def rest(W, r, s):
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return W - (U[:, :r] * S[:r]) @ Vt[:r]


def scaled_again(W, r, s):
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return W - s * (U[:, :r] * S[:r]) @ Vt[:r]


def two_moments(rng: np.random.Generator) -> tuple:
    """A0 (r, 6), B0 (4, r), A (r, 6), B (4, r)"""
    r = int(rng.integers(1, 4))
    return tuple(rng.standard_normal(s) for s in ((r, 6), (4, r), (r, 6), (4, r)))


def change(A0, B0, A, B):
    return np.concatenate([A, A0]), np.concatenate([B, -B0], axis=1)


def factors_apart(A0, B0, A, B):
    return np.concatenate([A, -A0]), np.concatenate([B, -B0], axis=1)


def a_dora(rng: np.random.Generator) -> tuple:
    """x (6,), W0 (4, 6), A (2, 6), B (4, 2), s, m (4,), b (4,)"""
    x, W0, A, B = (rng.standard_normal(s) for s in ((6,), (4, 6), (2, 6), (4, 2)))
    return x, W0, A, B, 0.5, rng.uniform(0.5, 2, 4), rng.standard_normal(4)


def rows_of_length_m(x, W0, A, B, s, m, b):
    V = W0 + s * B @ A
    return m * (V @ x) / np.linalg.norm(V, axis=1) + b


def bias_stretched(x, W0, A, B, s, m, b):
    V = W0 + s * B @ A
    return m * (V @ x + b) / np.linalg.norm(V, axis=1)


EXERCISES = (
    Exercise(
        name="13.1",
        statement=(
            "Write `left(W, r, s)`: the base that PiSSA leaves, W - s B A, for rank r and an "
            "adapter of scale s."
        ),
        hint="A and B are each divided by √s, so what is s B A?",
        draw=a_weight,
        solution=rest,
        wrong=scaled_again,
        tolerance=1e-9,
        labels=("W", "r", "s"),
    ),
    Exercise(
        name="13.2",
        statement=(
            "Write `change(A0, B0, A, B)`: the factors (A', B') of rank 2 r with "
            "B' A' = B A - B0 A0, what training moved.  A stands above A0, and the minus lies in "
            "B'."
        ),
        hint="Only one factor of each pair may carry the minus.",
        draw=two_moments,
        solution=change,
        wrong=factors_apart,
        tolerance=1e-9,
        labels=("A0", "B0", "A", "B"),
    ),
    Exercise(
        name="13.3",
        statement=(
            "Write `dora(x, W0, A, B, s, m, b)`: row i of W0 + s B A stretched to the length m[i], "
            "times x, plus the bias."
        ),
        hint="np.linalg.norm(V, axis=1) are the lengths of rows.  The bias has no direction.",
        draw=a_dora,
        solution=rows_of_length_m,
        wrong=bias_stretched,
        tolerance=1e-9,
        labels=("x", "W0", "A", "B", "s", "m", "b"),
    ),
)
