"""Exercises of chapter 10: the bytes of a state, faults without a loop, and the room left."""

import numpy as np

from ..exercise import Exercise


def a_size(rng: np.random.Generator) -> tuple[int]:
    """entries of one parameter"""
    return (int(rng.choice([100, 4095, 4096, 256 * int(rng.integers(16, 400))])),)


def a_memory(rng: np.random.Generator) -> tuple[int, int, int]:
    """pages, slots, sweeps"""
    return tuple(int(n) for n in rng.integers((2, 2, 2), (12, 12, 9)))


def a_step(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """bytes: budget, weights and gradients, activations, a page"""
    page = 1024 * int(rng.integers(1, 9))
    fixed, activations = (int(n) for n in rng.integers(10_000, 90_000, 2))
    return fixed + activations + int(rng.integers(-9 * page, 20 * page)), fixed, activations, page


def all_or_nothing(pages, slots, sweeps):
    return pages if slots >= pages else pages * sweeps


def the_missing_ones(pages, slots, sweeps):
    return pages + (sweeps - 1) * max(0, pages - slots)


EXERCISES = (
    Exercise(
        name="10.1",
        statement=(
            "Write `state_bytes(entries)`: the bytes of both of Adam's means for a parameter of so "
            "many entries: 8 bits an entry and 4 bytes a block of 256 for each mean; below 4,096 "
            "entries both stay in 32 bits.  (Entries from 4,096 on are multiples of 256.)"
        ),
        hint="Two means.  Each has entries bytes and entries / 256 scales.",
        draw=a_size,
        solution=lambda n: 8 * n if n < 4096 else 2 * (n + 4 * (n // 256)),
        wrong=lambda n: 2 * (n + 4 * (n // 256)),
        tolerance=0,
        labels=("entries",),
    ),
    Exercise(
        name="10.2",
        statement=(
            "Write `lru_faults(pages, slots, sweeps)`: how often a page is fetched in all, if "
            "memory is empty at first, has room for `slots` pages, the pages 0, 1, ..., pages - 1 "
            "are used in this order `sweeps` times over, and the one used longest ago gives way.  "
            "Without a loop."
        ),
        hint="There are two cases: all pages fit, or they do not.  Section 2 counted the second.",
        draw=a_memory,
        solution=all_or_nothing,
        wrong=the_missing_ones,
        tolerance=0,
        labels=("pages", "slots", "sweeps"),
    ),
    Exercise(
        name="10.3",
        statement=(
            "Write `slots_left(budget, fixed, activations, page_bytes)`: how many whole pages may "
            "stay in memory during a step that must hold `fixed` bytes of weights and gradients "
            "and `activations` bytes, all in `budget` bytes; 0 if nothing is left for them."
        ),
        hint="Whole pages of what the other two leave.  They may leave less than nothing.",
        draw=a_step,
        solution=lambda budget, fixed, acts, page: max(0, (budget - fixed - acts) // page),
        wrong=lambda budget, fixed, acts, page: (budget - fixed - acts) // page,
        tolerance=0,
        labels=("budget", "fixed", "activations", "page_bytes"),
    ),
)
