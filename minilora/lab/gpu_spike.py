"""A batch too long for the memory that is left: an optimizer raises, one with pages makes room."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..engine.tensor import Parameter
from ..optim.adamw import AdamW
from ..optim.paged import PagedAdamW

PAGES = 16


def memory_spike(cupy: Any, numbers: int) -> dict[str, Any]:
    """Two steps, a spike, two steps; with AdamW and with its moments on pages.

    The pool gets a limit: what is held, and half of what the spike asks for, which is half of
    the moments.  `same_bits`: in the end both have the same weights, spike or not.
    """
    ends, entry = [], {}
    for name, make in (
        ("unpaged", partial(AdamW, lr=0.1)),
        ("paged", partial(PagedAdamW, lr=0.1, page=-(-numbers // PAGES))),
    ):
        entry[name], weights = driven(cupy, make, numbers)
        ends.append(weights)
    return entry | {"same_bits": ends[0] == ends[1]}


def driven(cupy: Any, make: Callable, numbers: int) -> tuple[str, bytes]:
    """What came of the spike, and the last weights."""
    rng, pool = np.random.default_rng(0), cupy.get_default_memory_pool()
    weights = cupy.asarray(rng.standard_normal(numbers, np.float32))
    optimizer = make((Parameter(weights),))
    gradient = cupy.asarray(rng.standard_normal(numbers, np.float32))
    found = ""
    for step in range(4):
        optimizer.flat.grad[...] = gradient
        optimizer.step()
        if step == 1:
            size = 4 * numbers  # of 8 that the moments have
            gc.collect()
            pool.free_all_blocks()
            pool.set_limit(size=pool.total_bytes() + size // 2)
            try:
                found = spike(cupy, optimizer, size)
            finally:
                pool.set_limit(size=0)
    return found, optimizer.flat.data.get().tobytes()


def spike(cupy: Any, optimizer: Any, size: int) -> str:
    """Ask for `size` bytes, and where there are pages, for their room."""
    try:
        cupy.zeros(size, cupy.uint8)
    except MemoryError:
        pager = getattr(optimizer, "pager", None)
        if pager is None:
            return "raises"
        slots = pager.slots
        pager.shrink(1)
        cupy.zeros(size, cupy.uint8)  # raises again if the slots have not given back theirs
        pager.grow(slots)
        return "survives"
    return "fits"
