"""Exercises of chapter 05: what a rank must miss, what a budget buys, what a loss means in bits."""

import math

import numpy as np

from ..exercise import Exercise


def a_spectrum(rng: np.random.Generator) -> tuple:
    """singular values, falling; r"""
    n = int(rng.integers(2, 7))
    return np.sort(rng.uniform(0.1, 3, n))[::-1].copy(), int(rng.integers(0, n + 1))


def a_budget(rng: np.random.Generator) -> tuple:
    """shapes [(d_out, d_in), ...], budget: now and then below that of rank 1"""
    shapes = [tuple(int(s) for s in rng.integers(8, 512, 2)) for _ in range(rng.integers(1, 5))]
    per_rank = sum(a + b for a, b in shapes)
    ranks = rng.uniform(0.1, 1) if rng.integers(4) == 0 else rng.uniform(1, 20)
    return shapes, int(per_rank * ranks)


def a_memory(rng: np.random.Generator) -> tuple:
    """facts, bits each, loss in nats per fact"""
    bits = int(rng.integers(2, 9))
    return int(rng.integers(100, 5000)), bits, float(rng.uniform(0, bits * math.log(2)))


EXERCISES = (
    Exercise(
        name="05.1",
        statement=(
            "Write `missed(singular, r)`: the share of the squared error that the best update of "
            "rank r leaves, if the update that is needed has these singular values, largest first."
        ),
        hint="The energy of a direction is its singular value squared.",
        draw=a_spectrum,
        solution=lambda singular, r: np.sum(singular[r:] ** 2) / np.sum(singular**2),
        wrong=lambda singular, r: np.sum(singular[r:]) / np.sum(singular),
        tolerance=1e-9,
        labels=("singular", "r"),
    ),
    Exercise(
        name="05.2",
        statement=(
            "Write `highest_rank(shapes, budget)`: the highest rank, the same for all matrices of "
            "these shapes (d_out, d_in), whose adapters have at most `budget` numbers together."
        ),
        hint="Rank 1 costs d_out + d_in for each matrix.  Whole ranks only; 0 if none fits.",
        draw=a_budget,
        solution=lambda shapes, budget: budget // sum(a + b for a, b in shapes),
        wrong=lambda shapes, budget: budget // sum(a * b for a, b in shapes),
        tolerance=0,
        labels=("shapes", "budget"),
    ),
    Exercise(
        name="05.3",
        statement=(
            "Write `bits_known(facts, bits_each, loss)`: how many bits a model knows of so many "
            "facts, each of which takes `bits_each` bits to a stranger, if its loss is `loss` nats "
            "per fact."
        ),
        hint="A nat is 1 / ln 2 bits.  A loss of 0 means that all bits are known.",
        draw=a_memory,
        solution=lambda facts, bits_each, loss: facts * (bits_each - loss / math.log(2)),
        wrong=lambda facts, bits_each, loss: facts * (bits_each - loss),
        tolerance=1e-9,
        labels=("facts", "bits_each", "loss"),
    ),
)
