"""Exercises of chapter 02: a softmax with a window, the size of a block, and another norm."""

import numpy as np

from ..exercise import Exercise


def scores(rng: np.random.Generator) -> tuple:
    """scores (T, T), some of them large; window"""
    n = int(rng.integers(2, 7))
    window = int(rng.integers(1, n + 1))
    return rng.standard_normal((n, n)) * float(rng.choice([1, 300])), window


def widths(rng: np.random.Generator) -> tuple[int, int]:
    """width, hidden"""
    return int(rng.integers(8, 4096)), int(rng.integers(8, 12000))


def rows(rng: np.random.Generator) -> tuple:
    """x (n, C), weight (C,), bias (C,)"""
    x = rng.standard_normal((3, 8)) * 10 + rng.uniform(-5, 5)
    return x, rng.standard_normal(8), rng.standard_normal(8)


def seen(scores, window):
    """True where row t may look: at the places t - window + 1 to t."""
    return np.tril(np.ones(scores.shape, bool)) & np.triu(np.ones(scores.shape, bool), 1 - window)


def local(scores, window):
    shown = np.where(seen(scores, window), scores, -np.inf)
    e = np.exp(shown - shown.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def masked_too_late(scores, window):
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.where(seen(scores, window), e / e.sum(axis=1, keepdims=True), 0)


def centered_norm(x, weight, bias):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True)) * weight + bias


EXERCISES = (
    Exercise(
        name="02.1",
        statement=(
            "Write `local_shares(scores, window)`: a causal softmax that also forgets.  Row t "
            "gives shares that sum to one to place t and the `window - 1` places before it (as "
            "many as there are), and nothing to others.  Some scores are in the hundreds, where "
            "`np.exp` overflows."
        ),
        hint="Set what is not seen to -inf first, then subtract each row's maximum.",
        draw=scores,
        solution=local,
        wrong=masked_too_late,
        tolerance=1e-9,
        labels=("scores", "window"),
    ),
    Exercise(
        name="02.2",
        statement=(
            "Write `parameters_of_a_block(width, hidden)`: the weights of one Llama block, whose "
            "key heads are as many as its heads: query, key, value, output, gate, up, down, and "
            "the two norms."
        ),
        hint="Four square matrices, three of (hidden, width), and two vectors.",
        draw=widths,
        solution=lambda width, hidden: 4 * width**2 + 3 * width * hidden + 2 * width,
        wrong=lambda width, hidden: 4 * width**2 + 2 * width * hidden + 2 * width,
        tolerance=0,
        labels=("width", "hidden"),
    ),
    Exercise(
        name="02.3",
        statement=(
            "GPT-2 has another norm: it takes the mean of each row away first, and then gives the "
            "row the size 1.  Write `layer_norm(x, weight, bias)`: that, times the weight, plus "
            "the bias.  (Leave out the small epsilon.)"
        ),
        hint="The mean of the squares, as in `my_norm`, but of what is left without the mean.",
        draw=rows,
        solution=centered_norm,
        wrong=lambda x, weight, bias: x / np.std(x, -1, keepdims=True) * weight + bias,
        tolerance=1e-9,
        labels=("x", "weight", "bias"),
    ),
)
