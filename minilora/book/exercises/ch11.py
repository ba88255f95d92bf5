"""Exercises of chapter 11: a batch of many, an exact sum, and the terms that nobody asked for."""

import numpy as np

from ..exercise import Exercise


def a_batch(rng: np.random.Generator) -> tuple:
    """x (5, 6), W0 (4, 6), As (3, 2, 6), Bs (3, 4, 2), who (5,): 0..2, or -1 for none"""
    shapes = (5, 6), (4, 6), (3, 2, 6), (3, 4, 2)
    return (*(rng.standard_normal(s) for s in shapes), rng.integers(-1, 3, 5))


def each_its_own(x, W0, As, Bs, who):
    y = x @ W0.T
    for n, i in enumerate(who):
        if i >= 0:
            y[n] += Bs[i] @ (As[i] @ x[n])
    return y


def last_for_none(x, W0, As, Bs, who):
    return np.stack([W0 @ row + Bs[i] @ (As[i] @ row) for row, i in zip(x, who, strict=True)])


def two(rng: np.random.Generator) -> tuple:
    """A1, B1, s1, A2, B2, s2; the ranks may differ"""
    r, q = (int(n) for n in rng.integers(1, 4, 2))
    A1, B1 = rng.standard_normal((r, 6)), rng.standard_normal((4, r))
    return A1, B1, 2.0, rng.standard_normal((q, 6)), rng.standard_normal((4, q)), 0.5


def side_by_side(A1, B1, s1, A2, B2, s2):
    return np.concatenate([A1, A2]), np.concatenate([s1 * B1, s2 * B2], axis=1)


def without_scales(A1, B1, s1, A2, B2, s2):
    return np.concatenate([A1, A2]), np.concatenate([B1, B2], axis=1)


def equal_ranks(rng: np.random.Generator) -> tuple:
    """A1, B1, A2, B2"""
    return tuple(rng.standard_normal(s) for s in ((2, 6), (4, 2), (2, 6), (4, 2)))


def share_of_both(A1, B1, A2, B2):
    return np.linalg.norm(B1 @ A2 + B2 @ A1) / np.linalg.norm(B1 @ A1 + B2 @ A2)


def share_of_all(A1, B1, A2, B2):
    return np.linalg.norm(B1 @ A2 + B2 @ A1) / np.linalg.norm((B1 + B2) @ (A1 + A2))


EXERCISES = (
    Exercise(
        name="11.1",
        statement=(
            "Write `mixed(x, W0, As, Bs, who)`: row n of the result is x[n] through W0 and through "
            "the adapter who[n] (scale 1), or through W0 alone where who[n] is -1."
        ),
        hint="Python takes As[-1] for the last one: look at who[n] before you use it.",
        draw=a_batch,
        solution=each_its_own,
        wrong=last_for_none,
        tolerance=1e-9,
        labels=("x", "W0", "As", "Bs", "who"),
    ),
    Exercise(
        name="11.2",
        statement=(
            "Write `side_by_side(A1, B1, s1, A2, B2, s2)`: the factors (A, B) of one adapter of "
            "scale 1 with B A = s1 B1 A1 + s2 B2 A2.  Ranks add, A1 stands above A2, and the "
            "scales go into B."
        ),
        hint="np.concatenate along the rows of A and along the columns of B.",
        draw=two,
        solution=side_by_side,
        wrong=without_scales,
        tolerance=1e-9,
        labels=("A1", "B1", "s1", "A2", "B2", "s2"),
    ),
    Exercise(
        name="11.3",
        statement=(
            "Write `cross_share(A1, B1, A2, B2)`: how large the part of (B1 + B2)(A1 + A2) that "
            "nobody asked for is, as a share of the sum B1 A1 + B2 A2 that was meant (norms over "
            "all entries)."
        ),
        hint="Multiply the brackets out.  np.linalg.norm of a matrix is the norm over all entries.",
        draw=equal_ranks,
        solution=share_of_both,
        wrong=share_of_all,
        tolerance=1e-9,
        labels=("A1", "B1", "A2", "B2"),
    ),
)
