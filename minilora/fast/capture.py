"""A step as one CUDA graph: what Python launched once, the card launches by itself."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np

from ..engine.backend import xp_of
from ..engine.errors import MiniloraError

WARM = 2  # eager runs of a function before it is captured: kernels compile, libraries load


class Graph:
    """What `function()` launches, recorded and not run; `launch()` runs it on the current stream.

    Results and temporaries live in a pool of their own, which stays alive with the graph: their
    addresses are part of it.  What eager runs left in the common pool goes back to the card first,
    or both would be held.  `beside` names a graph whose pool, and so whose memory for
    temporaries, serves this one too: the two never run at the same time.
    `value` is what the function returned, overwritten by each launch.
    Errors: those of CuPy, where the function waits, copies across the border, or calls a
    library that CuPy does not let into a capture.
    """

    def __init__(self, xp: ModuleType, function: Callable[[], Any], beside: "Graph | None" = None):
        self.xp = xp
        if beside is None:
            self.pool, self.stream = xp.cuda.MemoryPool(), xp.cuda.Stream(non_blocking=True)
        else:  # a pool gives back to a stream what that stream has freed
            self.pool, self.stream = beside.pool, beside.stream
        xp.get_default_memory_pool().free_all_blocks()
        with xp.cuda.using_allocator(self.pool.malloc), self.stream as stream:
            stream.begin_capture()
            try:
                self.value = function()
            except BaseException:
                ended(stream)
                raise
            self.graph = stream.end_capture()

    def launch(self) -> None:
        self.graph.launch(self.xp.cuda.get_current_stream())


def ended(stream: Any) -> None:
    """End a capture that went wrong; CUDA says so once more."""
    with suppress(RuntimeError):
        stream.end_capture()


def captures(xp: ModuleType) -> bool:
    """Can this library of arrays capture at all?"""
    return hasattr(getattr(getattr(xp, "cuda", None), "Stream", None), "begin_capture")


def replayed(xp: ModuleType, function: Callable[[], Any]) -> Callable[[], Any]:
    """`function`, as one launch from its third run on; itself where nothing can be captured.

        generate(model, prompts, 100, replay=replayed)

    What changes between two runs, it must read and write in place.
    """
    return Replayed(xp, function) if captures(xp) else function


class Replayed:
    """A function that works in place, run eagerly WARM times and then from its graph.

    A call returns what the function returned, which a later call may overwrite.  A function
    that a capture refuses warns and stays eager; `eager` says why.
    """

    def __init__(self, xp: ModuleType, function: Callable[[], Any]):
        self.xp, self.function = xp, function
        self.runs, self.graph = 0, None
        self.eager = None if captures(xp) else f"{xp.__name__} captures nothing"

    def __call__(self, beside: Graph | None = None) -> Any:
        if self.graph is None and self.eager is None and self.runs == WARM:
            try:
                self.graph = Graph(self.xp, self.function, beside)
            except (RuntimeError, MiniloraError) as error:
                self.eager = str(error)
                warnings.warn(f"a step was not captured and stays eager: {error}", stacklevel=3)
        self.runs += 1
        if self.graph is None:
            return self.function()
        self.graph.launch()
        return self.graph.value


class CapturedStep:
    """Forward, backward and the optimizer's step, one graph for each shape of a batch.

        step = CapturedStep(optimizer, loss, clip=1.0)
        total = step.run(batch, divide_by=scored)              a number on the device
        fit(optimizer, loss, train, ..., clip=1.0, advance=step)

    `loss(model, batch, rng)` is a sum; its gradient starts from 1/divide_by instead of 1, which
    stands in device memory, as the learning rate does.  What else the optimizer was given is
    part of the graph.  The first two steps of a shape run eagerly.  A loss that draws from `rng`
    stays eager, and so does every step where the arrays' library captures nothing; one that a
    capture refuses warns and stays eager.  `eager` says for which shapes, and why.
    Captured or not, the numbers are the same.

    A batch too large for the memory goes in parts: `run(part, whole, last=False)` adds a
    gradient, from a graph of its own, and the last part's graph makes the step too.
    """

    def __init__(self, optimizer: Any, loss: Callable, clip: float | None = None):
        self.optimizer, self.loss, self.clip = optimizer, loss, clip
        self.xp, self.rng = xp_of(optimizer.control), np.random.default_rng(0)
        self.start = self.xp.ones((), optimizer.flat.data.dtype)  # 1/divide_by
        self.captures = captures(self.xp)  # set it to False for eager steps, to compare
        self.parts: dict[tuple, tuple[dict, Replayed]] = {}  # by shape: its batch, and what runs

    @property
    def graphs(self) -> dict[tuple, Graph]:
        """The graphs there are, by whether they make the step, and by the shape of the batch."""
        return {key: part.graph for key, (_, part) in self.parts.items() if part.graph}

    @property
    def eager(self) -> dict[tuple, str]:
        """Why a shape will not be captured, for those that will not."""
        return {key: part.eager for key, (_, part) in self.parts.items() if part.eager}

    def run(
        self, batch: dict[str, Any], divide_by: float = 1, rng: Any = None, last: bool = True
    ) -> Any:
        """One step on this batch; Σ loss, an array that the next run may overwrite.

        With `last` False it only adds to the gradient; `divide_by` is that of the whole step.
        """
        self.rng = np.random.default_rng(0) if rng is None else rng
        self.start.fill(1 / divide_by)
        fixed, part = self.part(batch, last)
        for name, array in batch.items():
            fixed[name][...] = array
        before = self.rng.bit_generator.state
        value = part(beside=next(iter(self.graphs.values()), None))
        if self.rng.bit_generator.state != before:
            part.graph, part.eager = None, "the loss draws random numbers"
        return value

    def part(self, batch: dict[str, Any], last: bool) -> tuple[dict, Replayed]:
        """For batches of this shape: the arrays they are copied to, and what runs on these."""
        key = (last, *((name, a.shape, a.dtype.str) for name, a in sorted(batch.items())))
        if key not in self.parts:
            fixed = {name: self.xp.empty_like(array) for name, array in batch.items()}
            part = Replayed(self.xp, lambda: self.whole(fixed, last))
            if not self.captures:
                part.eager = part.eager or "not asked for"
            self.parts[key] = fixed, part
        return self.parts[key]

    def whole(self, batch: dict[str, Any], last: bool) -> Any:
        optimizer = self.optimizer
        value = self.loss(optimizer.model, batch, self.rng)
        value.backward(self.start.reshape(value.shape), into=optimizer.gradients)
        if last:
            optimizer.step(divide_by=1, clip=self.clip)
        return value.data

    def __call__(
        self, optimizer: Any, workers: Any, loss: Callable, train: Any, rows: Any,
        key: tuple[int, ...], clip: float | None, accumulate: int,
    ) -> tuple[Any, int]:  # fmt: skip
        """What `fit` asks of a step.  Errors: `MiniloraError` if it is not the one captured."""
        if (optimizer, loss, clip) != (self.optimizer, self.loss, self.clip):
            raise MiniloraError("CapturedStep: expected its own optimizer, loss and clip")
        if len(workers.buffers) != 1:
            raise MiniloraError(f"CapturedStep: expected shards = 1, found {len(workers.buffers)}")
        total, scored = 0.0, int(train.scored[rows].sum())
        micro = [part for part in np.array_split(rows, accumulate) if len(part)]
        for i, part in enumerate(micro):
            batch, _ = train.take(part, workers.device)
            rng = np.random.default_rng([*key, 0, i])
            total = total + self.run(batch, max(1, scored), rng, last=i == len(micro) - 1)
        return total, scored
