"""A batch cut into shards, one thread each: the same sums in the same order, however many cores."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import numpy as np

from ..engine.backend import xp_of
from ..engine.workers import Pool, working
from ..optim.flat import Flat
from .data import Batch, Data

Loss = Callable[[Any, Batch, np.random.Generator], Any]


def device_of(model_array: Any) -> str:
    """ "cpu" or "cuda", by the array's library."""
    return "cpu" if xp_of(model_array) is np else "cuda"


class Shards:
    """Adds the gradient of a batch into a flat buffer, shard by shard.

    How many shards there are is configuration: each has its own Generator (seed, step,
    shard), its own gradient, and its place in the sum, so that no result depends on
    threads or timing.  Threads run only on a host with `threadpoolctl`, which holds BLAS
    at one thread meanwhile; without it the shards take turns.  Use as a context manager.
    """

    def __init__(self, flat: Flat, shards: int = 1):
        xp = xp_of(flat.data)
        self.flat, self.device = flat, device_of(flat.data)
        self.buffers = [flat.grad] + [xp.zeros_like(flat.grad) for _ in range(shards - 1)]
        self.gradients = [flat.gradients] + [flat.gradients_in(b) for b in self.buffers[1:]]
        self.resources = ExitStack()
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Shards":
        threads = min(len(self.buffers), os.cpu_count() or 1)
        if threads > 1 and self.device == "cpu":
            try:
                from threadpoolctl import threadpool_limits
            except ImportError:
                return self
            self.resources.enter_context(threadpool_limits(1, user_api="blas"))
            self.pool = self.resources.enter_context(ThreadPoolExecutor(threads))
            self.resources.enter_context(working(Pool(self.pool, threads)))  # for the optimizer
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool = None
        self.resources.close()

    def add(
        self, model: Any, loss: Loss, data: Data, rows: np.ndarray, key: tuple[int, ...]
    ) -> tuple[Any, int]:
        """Add the gradient over `rows` to the flat buffer; (Σ loss, scored items)."""
        cuts = [part for part in np.array_split(rows, len(self.buffers)) if len(part)]

        def run(shard: int) -> tuple[Any, int]:
            batch, scored = data.take(cuts[shard], self.device)
            with working(None):  # the threads are at work already, on shards
                value = loss(model, batch, np.random.default_rng([*key, shard]))
                value.backward(into=self.gradients[shard])
            return value.data, scored

        if self.pool is None:
            results = [run(shard) for shard in range(len(cuts))]
        else:
            jobs = [self.pool.submit(copy_context().run, run, s) for s in range(len(cuts))]
            results = [job.result() for job in jobs]
        for buffer in self.buffers[1 : len(cuts)]:
            self.flat.grad += buffer
            buffer.fill(0)
        total = results[0][0]
        for value, _ in results[1:]:
            total = total + value
        return total, sum(scored for _, scored in results)
