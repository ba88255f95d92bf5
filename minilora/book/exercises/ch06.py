"""Exercises of chapter 06: two codes to a byte, the bits of a block, and the nearest level."""

import numpy as np

from ..exercise import Exercise


def nibbles(rng: np.random.Generator) -> tuple:
    """An even number of codes 0..15"""
    return (rng.integers(0, 16, 2 * int(rng.integers(1, 9)), dtype=np.uint8),)


def bits_of(rng: np.random.Generator) -> tuple:
    """code bits, block size, bits of a scale"""
    return int(rng.choice([4, 8])), int(rng.choice([32, 64, 128, 256])), int(rng.choice([16, 32]))


def levels_and_numbers(rng: np.random.Generator) -> tuple:
    """x (n,) in -1..1, sorted levels (16,)"""
    return rng.uniform(-1, 1, 9), np.sort(rng.uniform(-1, 1, 16))


def nearest(x, levels):
    return levels[np.abs(x[:, None] - levels[None, :]).argmin(axis=1)]


def next_above(x, levels):
    return levels[np.minimum(np.searchsorted(levels, x), len(levels) - 1)]


EXERCISES = (
    Exercise(
        name="06.1",
        statement=(
            "Write `pack(codes)`: an even number of codes 0..15 (uint8) as half as many bytes, "
            "the first of each two in the high half."
        ),
        hint="codes[0::2] are the first ones.  `<< 4` moves a number into the high half.",
        draw=nibbles,
        solution=lambda codes: codes[0::2] << 4 | codes[1::2],
        wrong=lambda codes: codes[1::2] << 4 | codes[0::2],
        tolerance=0,
        labels=("codes",),
    ),
    Exercise(
        name="06.2",
        statement=(
            "Write `bits_per_weight(bits, block, scale_bits)`: what one weight costs if a code "
            "has `bits` bits and every `block` weights share a scale of `scale_bits` bits."
        ),
        hint="The scale is paid once for the whole block.",
        draw=bits_of,
        solution=lambda bits, block, scale_bits: bits + scale_bits / block,
        wrong=lambda bits, block, scale_bits: bits + block / scale_bits,
        labels=("bits", "block", "scale_bits"),
    ),
    Exercise(
        name="06.3",
        statement=(
            "Write `nearest(x, levels)`: for each number of x the level nearest to it (the level "
            "itself, not its index)."
        ),
        hint=(
            "np.abs(x[:, None] - levels[None, :]) has all distances; argmin picks one a row, as an "
            "index into levels."
        ),
        draw=levels_and_numbers,
        solution=nearest,
        wrong=next_above,
        tolerance=1e-12,
        labels=("x", "levels"),
    ),
)
