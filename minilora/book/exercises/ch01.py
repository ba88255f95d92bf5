"""Exercises of chapter 01: a pullback, a forgotten sum, and what a graph keeps."""

import numpy as np

from ..exercise import Exercise


def pair(rng: np.random.Generator) -> tuple:
    """a, b, g of one shape"""
    return tuple(rng.standard_normal((3, 4)) for _ in range(3))


def row_added(rng: np.random.Generator) -> tuple:
    """g (n, k) and the length k of the row that was added to every row"""
    n, k = (int(v) for v in rng.integers(1, 6, 2))
    return rng.standard_normal((n, k)), k


def matrices(rng: np.random.Generator) -> tuple:
    """a (n, k), b (k, m), g (n, m)"""
    n, k, m = (int(v) for v in rng.integers(1, 6, 3))
    return tuple(rng.standard_normal(s) for s in ((n, k), (k, m), (n, m)))


EXERCISES = (
    Exercise(
        name="01.1",
        statement=(
            "Write `div_pullbacks(a, b, g)`: the gradients (da, db) of y = a / b, entry by entry."
        ),
        hint="y = a b⁻¹, and the derivative of b⁻¹ is -b⁻².",
        draw=pair,
        solution=lambda a, b, g: (g / b, -g * a / b**2),
        wrong=lambda a, b, g: (g / b, g * a / b**2),
        labels=("a", "b", "g"),
    ),
    Exercise(
        name="01.2",
        statement=(
            "A row of k numbers was added to every row of a matrix.  Write `row_gradient(g, k)`: "
            "what the row gets, shape (k,), when the sum gets g."
        ),
        hint="The row was used once for every row of g; uses add up.",
        draw=row_added,
        solution=lambda g, k: g.sum(axis=0),
        wrong=lambda g, k: g.mean(axis=0),
        labels=("g", "k"),
    ),
    Exercise(
        name="01.3",
        statement=(
            "Write `kept_bytes(a, b, g)`: how many bytes of arrays the pullbacks of y = a b "
            "(matrices) close over, b itself included, if b is frozen and a wants a gradient."
        ),
        hint="da = g bᵀ.  Which of a and b does that need?  A float64 has 8 bytes.",
        draw=matrices,
        solution=lambda a, b, g: b.nbytes,
        wrong=lambda a, b, g: a.nbytes + b.nbytes,
        labels=("a", "b", "g"),
    ),
)
