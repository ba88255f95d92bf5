"""Threads that a fast rule may spread its blocks over; no result depends on how many there are."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Pool(NamedTuple):
    """An executor, and how many threads it has."""

    executor: ThreadPoolExecutor
    threads: int


_pool: ContextVar[Pool | None] = ContextVar("pool", default=None)


@contextmanager
def working(pool: Pool | None) -> Iterator[None]:
    """Inside, `spread` uses this pool; with None it runs where it is called."""
    token = _pool.set(pool)
    try:
        yield
    finally:
        _pool.reset(token)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, `spread` uses `count` threads of its own."""
    if count < 2:
        yield
        return
    with ThreadPoolExecutor(count) as executor, working(Pool(executor, count)):
        yield


def at_work() -> int:
    """How many threads `spread` uses here."""
    pool = _pool.get()
    return 1 if pool is None else pool.threads


def spread(function: Callable[[Any], Any], parts: Iterable) -> list:
    """`[function(part) for part in parts]`, a stretch of parts for each thread of the pool.

    What it runs must not call `spread` again: a pool that waits for itself waits for ever.
    """
    parts, pool = list(parts), _pool.get()
    if pool is None or len(parts) < 2:
        return [function(part) for part in parts]
    each = -(-len(parts) // pool.threads)
    stretches = [parts[i : i + each] for i in range(0, len(parts), each)]

    def run(stretch: list) -> list:
        return [function(part) for part in stretch]

    jobs = [pool.executor.submit(run, stretch) for stretch in stretches[1:]]
    results = run(stretches[0])
    for job in jobs:
        results += job.result()
    return results
