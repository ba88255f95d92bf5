"""Exercises of chapter 09: what an adapter saves, what recomputing leaves, how long a sequence."""

import numpy as np

from ..exercise import Exercise


def a_layer(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """rows, d_in, d_out, r"""
    rows, d_in, d_out = (int(n) for n in rng.integers(16, 2048, 3))
    return rows, d_in, d_out, int(rng.integers(1, 65))


def a_stack(rng: np.random.Generator) -> tuple[int, int, int, bool]:
    """blocks, bytes saved inside one, bytes of its input, recomputed or not"""
    entry = int(rng.integers(1, 50)) * 1000
    return int(rng.integers(2, 80)), entry * int(rng.integers(5, 30)), entry, bool(rng.integers(2))


def a_card(rng: np.random.Generator) -> tuple[int, int, int]:
    """bytes of the card, bytes that stay, bytes a token needs"""
    card = int(rng.integers(4, 80)) * 10**9
    return card, int(card * rng.uniform(0.2, 1.2)), int(rng.integers(10**5, 10**7))


EXERCISES = (
    Exercise(
        name="09.1",
        statement=(
            "Write `saved_bytes(rows, d_in, d_out, r)`: how many bytes a LoRA layer with both "
            "factors training saves for the way back, in float32."
        ),
        hint="dA wants x, dB wants u = x Aᵀ.  The output is not named by any pullback.",
        draw=a_layer,
        solution=lambda rows, d_in, d_out, r: 4 * rows * (d_in + r),
        wrong=lambda rows, d_in, d_out, r: 4 * rows * (d_in + d_out + r),
        tolerance=0,
        labels=("rows", "d_in", "d_out", "r"),
    ),
    Exercise(
        name="09.2",
        statement=(
            "Write `peak_saved(blocks, inside, at_entry, again)`: the most bytes saved at one time "
            "by a stack of blocks that each save `inside` bytes; with `again` each keeps only its "
            "input (`at_entry` bytes, not counted in `inside`), and on the way back one at a time "
            "is run again in full."
        ),
        hint="With `again`: the inputs of all blocks, and the inside of one.",
        draw=a_stack,
        solution=lambda n, inside, entry, again: n * entry + inside if again else n * inside,
        wrong=lambda n, inside, entry, again: n * entry if again else n * inside,
        tolerance=0,
        labels=("blocks", "inside", "at_entry", "again"),
    ),
    Exercise(
        name="09.3",
        statement=(
            "Write `longest(card, stays, per_token)`: the longest sequence, in whole tokens, that "
            "a card of `card` bytes can train on, if `stays` bytes stay and each token needs "
            "`per_token` bytes more; 0 if not even the part that stays fits."
        ),
        hint="What is left, divided by what a token needs, rounded down.",
        draw=a_card,
        solution=lambda card, stays, per_token: max(0, (card - stays) // per_token),
        wrong=lambda card, stays, per_token: card // per_token,
        tolerance=0,
        labels=("card", "stays", "per_token"),
    ),
)
