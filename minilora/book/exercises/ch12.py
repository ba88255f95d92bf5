"""Exercises of chapter 12: a block of eight bits, rows in another order, and a perplexity."""

import numpy as np

from ..exercise import Exercise


def an_eight_bit_block(rng: np.random.Generator) -> tuple[np.ndarray]:
    """The 34 bytes of a block: a float16, then 32 codes"""
    scale = np.array([rng.uniform(0.001, 0.1)], "<f2").view(np.uint8)
    return (np.concatenate([scale, rng.integers(0, 256, 32, dtype=np.uint8)]),)


def rows_of_heads(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """w (heads · D, d_in) with D of at least 6, heads"""
    heads, half = int(rng.integers(1, 4)), int(rng.integers(3, 6))
    return rng.standard_normal((heads * 2 * half, 3)), heads


def windows_of_text(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses in nats (n,), scored tokens (n,)"""
    counts = rng.integers(1, 300, int(rng.integers(2, 8)))
    return counts * rng.uniform(1, 5, len(counts)), counts


def eight_bits(block):
    return block[:2].copy().view("<f2").astype(np.float32) * block[2:].view(np.int8)


def without_a_sign(block):
    return block[:2].copy().view("<f2").astype(np.float32) * block[2:]


EXERCISES = (
    Exercise(
        name="12.1",
        statement=(
            "Write `q8_0(block)`: the 32 weights of a block of Q8_0, the format of the embedding "
            "table.  Of its 34 bytes (uint8) the first two are a float16 $d$, each of the others "
            "is a whole number $q$ from -128 to 127, and $w = d q$.  Compute in float32."
        ),
        hint=(
            "block[:2].copy().view(np.float16).astype(np.float32) reads the scale; np.int8 has a "
            "sign, uint8 none."
        ),
        draw=an_eight_bit_block,
        solution=eight_bits,
        wrong=without_a_sign,
        labels=("block",),
    ),
    Exercise(
        name="12.2",
        statement=(
            "Write `my_halves(w, heads)`, the library's `to_halves`: rows (heads · D, d_in) in "
            "which the channels that turn together are neighbors, put into the order in which "
            "they lie D/2 apart: within each head rows 0, 2, 4, ... come first, then rows 1, 3, "
            "5, ..."
        ),
        hint="Reshape to (heads, D/2, 2, d_in), swap the middle two axes, and reshape back.",
        draw=rows_of_heads,
        solution=lambda w, heads: (
            w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        ),
        wrong=lambda w, heads: w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape),
        tolerance=0,
        labels=("w", "heads"),
    ),
    Exercise(
        name="12.3",
        statement=(
            "Write `my_perplexity(sums, counts)`: a text was read in windows; `sums` holds the "
            "loss of each window in nats, added up over its tokens, and `counts` how many tokens "
            "these were.  Every token of the text counts the same."
        ),
        hint="All the nats over all the tokens, and then one exp.",
        draw=windows_of_text,
        solution=lambda sums, counts: np.exp(sums.sum() / counts.sum()),
        wrong=lambda sums, counts: np.exp((sums / counts).mean()),
        labels=("sums", "counts"),
    ),
)
