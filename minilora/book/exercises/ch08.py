"""Exercises of chapter 08: a gradient through codes, resident bytes, and the right base."""

import numpy as np

from ..exercise import Exercise


def coded(rng: np.random.Generator) -> tuple:
    """g (n, d_out), codes (d_out, d_in), scales (flat blocks), levels (16,), block"""
    d_out, d_in, block = 2 * int(rng.integers(1, 3)), int(rng.choice([6, 8])), 4  # 6: across rows
    codes = rng.integers(0, 16, (d_out, d_in))
    scales = rng.uniform(0.5, 2, d_out * d_in // block)
    return rng.standard_normal((3, d_out)), codes, scales, np.sort(rng.uniform(-1, 1, 16)), block


def through(g, codes, scales, levels, block):
    W = (levels[codes.ravel()] * np.repeat(scales, block)).reshape(codes.shape)
    return g @ W


def sizes(rng: np.random.Generator) -> tuple[int, int, int]:
    """d_out, d_in (multiples of 64), r"""
    d_out, d_in = (64 * int(n) for n in rng.integers(1, 65, 2))
    return d_out, d_in, int(rng.integers(1, 65))


def weights(rng: np.random.Generator) -> tuple:
    """W0, W_hat, A, B, alpha"""
    W0, r = rng.standard_normal((4, 5)), 2
    W_hat = W0 + 0.1 * rng.standard_normal(W0.shape)
    return W0, W_hat, rng.standard_normal((r, 5)), rng.standard_normal((4, r)), 6.0


EXERCISES = (
    Exercise(
        name="08.1",
        statement=(
            "Write `input_gradient(g, codes, scales, levels, block)`: dx = g Ŵ for a weight held "
            "as codes, where every `block` codes (counted along the rows, row after row) share "
            "one scale."
        ),
        hint="levels[codes.ravel()] * np.repeat(scales, block), then the shape of the codes.",
        draw=coded,
        solution=through,
        wrong=lambda g, codes, scales, levels, block: g @ levels[codes],
        tolerance=1e-9,
        labels=("g", "codes", "scales", "levels", "block"),
    ),
    Exercise(
        name="08.2",
        statement=(
            "Write `resident_bytes(d_out, d_in, r)`: what one layer of QLoRA holds between two "
            "steps.  Codes of 4 bits; a float32 scale for every 64 weights (no double "
            "quantization); A and B, their gradients and Adam's two means in float32."
        ),
        hint="Half a byte a weight, 4 bytes a block, and 16 bytes for every number of A and B.",
        draw=sizes,
        solution=lambda d_out, d_in, r: d_out * d_in * (1 / 2 + 4 / 64) + 16 * r * (d_out + d_in),
        wrong=lambda d_out, d_in, r: d_out * d_in * (1 / 2 + 4 / 64) + 4 * r * (d_out + d_in),
        tolerance=1e-9,
        labels=("d_out", "d_in", "r"),
    ),
    Exercise(
        name="08.3",
        statement=(
            "An adapter was trained by QLoRA on Ŵ, the decoded codes of W0.  Write "
            "`merged_weight(W0, W_hat, A, B, alpha)`: the plain weight with exactly the function "
            "that was trained (s = alpha / r)."
        ),
        hint="What did the adapter learn to complete?",
        draw=weights,
        solution=lambda W0, W_hat, A, B, alpha: W_hat + alpha / len(A) * B @ A,
        wrong=lambda W0, W_hat, A, B, alpha: W0 + alpha / len(A) * B @ A,
        tolerance=1e-9,
        labels=("W0", "W_hat", "A", "B", "alpha"),
    ),
)
