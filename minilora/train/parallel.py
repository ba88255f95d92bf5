"""A batch cut into shards, a processor each: the same sums in the same order, however many."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import cached_property, partial
from typing import Any

import numpy as np

from ..engine.backend import device_of, xp_of
from ..engine.forked import Forked, can_fork, shared_zeros
from ..engine.rules import only_reference
from ..engine.workers import Pool, working
from ..model.module import freeze
from ..optim.flat import Flat
from .data import Batch, Data

Loss = Callable[[Any, Batch, np.random.Generator], Any]


class Shards:
    """Adds the gradient of a batch into a flat buffer, shard by shard.

    How many shards there are is configuration: each has its own Generator (seed, step,
    shard, micro-batch), its own gradient, and its place in the sum, so that no result depends on
    processors or timing.  They are worked on at the same time on a host with `threadpoolctl`,
    which holds BLAS at one thread meanwhile; without it they take turns.  On Linux the workers
    are this process and copies forked from it, which need not wait for one another's
    interpreter; elsewhere they are threads.  Use as a context manager.

    A forked copy has all as it was at its first batch, but the Parameters of the model as they
    are: what `loss` changes by itself stays with the copy, and where it closes over another view
    of the weights, as `freeze(model)`, that view stays what it was.
    """

    def __init__(self, flat: Flat, shards: int = 1):
        xp = xp_of(flat.data)
        self.flat, self.device = flat, device_of(flat.data)
        self.workers = min(shards, os.cpu_count() or 1) if self.device == "cpu" else 1
        self.forks = self.workers > 1 and can_fork()
        zeros = shared_zeros if self.forks else xp.zeros_like
        self.buffers = [flat.grad] + [zeros(flat.grad) for _ in range(shards - 1)]
        self.gradients = [flat.gradients] + [flat.gradients_in(b) for b in self.buffers[1:]]
        self.resources = ExitStack()
        self.pool: ThreadPoolExecutor | None = None
        self.copies: Forked | None = None

    def __enter__(self) -> "Shards":
        if self.workers > 1:
            try:
                from threadpoolctl import threadpool_limits
            except ImportError:
                return self
            self.resources.enter_context(threadpool_limits(1, user_api="blas"))
            self.pool = self.resources.enter_context(ThreadPoolExecutor(self.workers))
            pool = Pool(self.pool, self.workers)
            self.resources.enter_context(working(pool))  # for the optimizer
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool = None
        try:
            self.part()
        finally:
            self.resources.close()

    def add(
        self, loss: Loss, data: Data, rows: np.ndarray, key: tuple[int, ...], pieces: int = 1
    ) -> tuple[Any, int]:
        """Add the gradient over `rows` to the flat buffer; (Σ loss, scored items).

        Each shard goes through its rows in `pieces` micro-batches, one graph after the other:
        the same sum, a part of the activations, and no waiting for the other shards between.
        """
        cuts = [part for part in np.array_split(rows, len(self.buffers)) if len(part)]
        if not cuts:
            return 0.0, 0
        scored, jobs = 0, []
        for shard, cut in enumerate(cuts):
            micro = [data.take(p, self.device) for p in np.array_split(cut, pieces) if len(p)]
            jobs.append((shard, [batch for batch, _ in micro], key))
            scored += sum(n for _, n in micro)
        total, *others = self.each("gradient", loss, jobs)
        for buffer in self.buffers[1 : len(cuts)]:
            self.flat.grad += buffer
        for value in others:
            total = total + value
        return total, scored

    def losses(self, loss: Loss, data: Data, cuts: Iterable[slice]) -> Iterable:
        """Σ loss of each cut of the data, on the model as it is now, frozen."""
        jobs = ((data.take(rows, self.device)[0],) for rows in cuts)
        return self.each("loss_of", loss, jobs)

    def gradient(self, loss: Loss, shard: int, batches: list[Batch], key: tuple[int, ...]) -> Any:
        """The work on a shard: its gradient into its buffer, and Σ loss."""
        total = 0.0
        if shard:
            self.buffers[shard].fill(0)
        for i, batch in enumerate(batches):
            value = loss(self.flat.model, batch, np.random.default_rng([*key, shard, i]))
            value.backward(into=self.gradients[shard])
            total = total + value.data
        return total

    def loss_of(self, loss: Loss, batch: Batch) -> Any:
        return loss(self.frozen, batch, None).data

    @cached_property
    def frozen(self) -> Any:
        """The model, for which no graph is built; its arrays are those that train."""
        return freeze(self.flat.model)

    def each(self, task: str, loss: Loss, jobs: Iterable[tuple]) -> Iterable:
        """What the method `task` returns for each job, in their order, by all workers."""
        if self.pool is None:
            return (getattr(self, task)(loss, *job) for job in jobs)
        if self.forks:
            return self.each_forked(task, loss, list(jobs))
        started = [self.pool.submit(copy_context().run, self.share, loss, task, [j]) for j in jobs]
        return [value for job in started for value in job.result()]

    def share(self, loss: Loss, task: str, jobs: list[tuple]) -> list:
        """A worker's part of the jobs."""
        with working(None):  # the workers are at work already
            return [getattr(self, task)(loss, *job) for job in jobs]

    def each_forked(self, task: str, loss: Loss, jobs: list[tuple]) -> list:
        """Worker w takes every job from w on in steps of `workers`; w = 0 is this process."""
        made_for = (loss, only_reference())
        if self.copies is None or self.made_for != made_for:
            self.part()
            self.made_for, self.weights = made_for, shared_zeros(self.flat.data)
            self.copies = Forked(self.workers - 1, partial(self.share, loss), self.follow)
        self.weights[...] = self.flat.data
        shares = [jobs[w :: self.workers] for w in range(self.workers)]
        try:
            for copy, share in enumerate(shares[1:]):
                self.copies.ask(copy, task, share)
            values = [self.share(loss, task, shares[0])]
            values += [self.copies.result(copy) for copy in range(self.workers - 1)]
        except BaseException:  # Ctrl-C too: an answer that nobody took must not be the next one's
            self.part()
            raise
        return [values[job % self.workers][job // self.workers] for job in range(len(jobs))]

    def follow(self, copy: int) -> None:
        """In a copy: the Parameters are views of the weights that are shared, not of its own."""
        for path, view in self.flat.cut(self.weights).items():
            self.flat.named[path].data = view
        self.flat.data = self.weights  # so that the pages of before are free
        self.__dict__.pop("frozen", None)  # it had the arrays of before

    def part(self) -> None:
        """Let the copies go."""
        copies, self.copies = self.copies, None
        if copies is not None:
            copies.close()
