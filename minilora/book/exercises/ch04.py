"""Exercises of chapter 04: the gradient that passes through, a wider rank, and the products."""

import numpy as np

from ..exercise import Budget, Exercise, multiplications


def layer(rng: np.random.Generator) -> tuple:
    """g (n, d_out), W0, A, B, alpha"""
    n, d_out, d_in, r = 3, int(rng.integers(12, 24)), int(rng.integers(12, 24)), 2
    shapes = (n, d_out), (d_out, d_in), (r, d_in), (d_out, r)
    return (*(rng.standard_normal(shape) for shape in shapes), 5.0)


def few_rows(arguments: tuple) -> float:
    """g W0, g B and its product with A."""
    g, W0, A, _, _ = arguments
    return len(g) * (W0.size + len(A) * sum(W0.shape))


def factors(rng: np.random.Generator) -> tuple:
    """A (r, d_in), B (d_out, r), new_rank"""
    r = int(rng.integers(1, 4))
    A, B = rng.standard_normal((r, 5)), rng.standard_normal((4, r))
    return A, B, r + int(rng.integers(1, 5))


def sizes(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """n, d_out, d_in, r"""
    n, d_out, d_in = (int(rng.integers(16, 2048)) for _ in range(3))
    return n, d_out, d_in, int(rng.integers(1, 16))


def widened(A, B, new_rank, scaled):
    r, more = len(A), new_rank - len(A)
    B = B * (new_rank / r) if scaled else B
    return np.pad(A, ((0, more), (0, 0))), np.pad(B, ((0, 0), (0, more)))


def products(n, d_out, d_in, r):
    return 2 * n * d_out * d_in + 3 * n * r * (d_in + d_out)


EXERCISES = (
    Exercise(
        name="04.1",
        statement=(
            "Write `input_gradient(g, W0, A, B, alpha)`: the gradient of the input of a LoRA "
            "layer, with the scale alpha / r.  The rows are few, and the checker counts "
            "multiplications: never form B A."
        ),
        hint="Two ways lead from y to x: through W0, and through B and then A.",
        draw=layer,
        solution=lambda g, W0, A, B, alpha: g @ W0 + alpha / len(A) * (g @ B) @ A,
        wrong=lambda g, W0, A, B, alpha: g @ W0,
        tolerance=1e-9,
        budget=Budget("multiplications", multiplications, few_rows),
        labels=("g", "W0", "A", "B", "alpha"),
    ),
    Exercise(
        name="04.2",
        statement=(
            "Write `widen(A, B, new_rank)`: the same adapter as factors of a larger rank, the new "
            "rows of A and columns of B zero.  alpha is not to change, and neither is s B A with "
            "s = alpha / r: put what is missing into B.  Return (A, B)."
        ),
        hint="s shrinks from alpha / r to alpha / new_rank.",
        draw=factors,
        solution=lambda A, B, new_rank: widened(A, B, new_rank, True),
        wrong=lambda A, B, new_rank: widened(A, B, new_rank, False),
        tolerance=1e-9,
        labels=("A", "B", "new_rank"),
    ),
    Exercise(
        name="04.3",
        statement=(
            "Write `step_multiplications(n, d_out, d_in, r)`: the multiplications in the matrix "
            "products of one LoRA layer, out and back (dx too), for n rows: base and factors, with "
            "g B and x Aᵀ each computed once."
        ),
        hint="Out: W0, A, B.  Back: g B and g W0 and (g B) A for dx; one product each for dA, dB.",
        draw=sizes,
        solution=products,
        wrong=lambda n, d_out, d_in, r: 3 * n * d_out * d_in + 3 * n * r * (d_in + d_out),
        tolerance=0,
        labels=("n", "d_out", "d_in", "r"),
    ),
)
