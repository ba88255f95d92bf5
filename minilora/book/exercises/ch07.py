"""Exercises of chapter 07: the bits of both levels, a mean removed, and how far a NaN spreads."""

import numpy as np

from ..exercise import Exercise


def blocks(rng: np.random.Generator) -> tuple[int, int]:
    """block, outer block"""
    return int(rng.choice([32, 64, 128, 256])), int(rng.choice([64, 128, 256, 512]))


def some_scales(rng: np.random.Generator) -> tuple:
    """scales (n,)"""
    return (rng.uniform(1, 4, int(rng.integers(2, 20))),)


def a_tensor(rng: np.random.Generator) -> tuple[int, int, bool]:
    """how many weights, more than share an outer scale or fewer; weights in a block; doubled"""
    block = int(rng.choice([32, 64, 128]))
    return block * int(rng.choice([3, 50, 300, 5000])), block, bool(rng.integers(2))


EXERCISES = (
    Exercise(
        name="07.1",
        statement=(
            "Write `bits_per_weight(block, outer_block)`: 4-bit codes, an 8-bit scale for every "
            "`block` weights, and a 32-bit scale for every `outer_block` of those scales."
        ),
        hint="The outer scale is shared by block * outer_block weights.",
        draw=blocks,
        solution=lambda block, outer_block: 4 + 8 / block + 32 / (block * outer_block),
        wrong=lambda block, outer_block: 4 + 8 / block + 32 / outer_block,
        tolerance=1e-12,
        labels=("block", "outer_block"),
    ),
    Exercise(
        name="07.2",
        statement=(
            "Write `remove_mean(scales)`: the mean, and the residuals divided by the largest "
            "magnitude among them, so that they fit between -1 and 1.  Return (mean, residuals)."
        ),
        hint="Subtract the mean before looking for the largest magnitude, not after.",
        draw=some_scales,
        solution=lambda s: (s.mean(), (s - s.mean()) / np.abs(s - s.mean()).max()),
        wrong=lambda s: (s.mean(), (s - s.mean()) / np.abs(s).max()),
        tolerance=1e-9,
        labels=("scales",),
    ),
    Exercise(
        name="07.3",
        statement=(
            "Write `spoiled(count, block, doubled)`: how many of the `count` weights of a tensor "
            "come back as NaN, if one of them was NaN and nobody checked; `doubled` says whether "
            "the scales are doubled, with the mean removed, or plain."
        ),
        hint="Which scales contain the mean?",
        draw=a_tensor,
        solution=lambda count, block, doubled: count if doubled else block,
        wrong=lambda count, block, doubled: min(count, block * 256) if doubled else block,
        tolerance=0,
        labels=("count", "block", "doubled"),
    ),
)
