"""Exercises of chapter 10: the bytes of a state, the page that gives way, and the room left."""

import numpy as np

from ..exercise import Exercise


def a_size(rng: np.random.Generator) -> tuple[int]:
    """entries of one parameter"""
    return (int(rng.choice([100, 4095, 4096, 256 * int(rng.integers(16, 400))])),)


def a_sweep(rng: np.random.Generator) -> tuple:
    """pages in memory, the page that is wanted (not one of them), how many pages there are"""
    pages = int(rng.integers(4, 12))
    order, k = rng.permutation(pages).tolist(), int(rng.integers(2, pages))
    return order[:k], order[k], pages


def a_step(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """bytes: budget, weights and gradients, activations, a page"""
    page = 1024 * int(rng.integers(1, 9))
    fixed, activations = (int(n) for n in rng.integers(10_000, 90_000, 2))
    return fixed + activations + int(rng.integers(0, 20 * page)), fixed, activations, page


def last_needed(resident, now, pages):
    return max(resident, key=lambda page: (page - now - 1) % pages)


def oldest(resident, now, pages):
    return max(resident, key=lambda page: (now - page) % pages)


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
            "Write `victim(resident, now, pages)`: page `now` is wanted and is not in memory.  "
            "Which of the pages in `resident` should make room, if pages are used in the order "
            "0, 1, ..., pages - 1, over and over?"
        ),
        hint="(page - now - 1) % pages says how many uses lie before the next use of a page.",
        draw=a_sweep,
        solution=last_needed,
        wrong=oldest,
        tolerance=0,
        labels=("resident", "now", "pages"),
    ),
    Exercise(
        name="10.3",
        statement=(
            "Write `slots_left(budget, fixed, activations, page_bytes)`: how many whole pages may "
            "stay in memory during a step that must hold `fixed` bytes of weights and gradients "
            "and `activations` bytes, all in `budget` bytes."
        ),
        hint="Whole pages of what the other two leave.",
        draw=a_step,
        solution=lambda budget, fixed, acts, page: (budget - fixed - acts) // page,
        wrong=lambda budget, fixed, acts, page: (budget - fixed) // page,
        tolerance=0,
        labels=("budget", "fixed", "activations", "page_bytes"),
    ),
)
