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
    addresses are part of it.  `value` is what the function returned, overwritten by each launch.
    Errors: those of CuPy, where the function waits, copies across the border, or calls a
    library that CuPy does not let into a capture.
    """

    def __init__(self, xp: ModuleType, function: Callable[[], Any]):
        self.xp, self.pool = xp, xp.cuda.MemoryPool()
        stream = xp.cuda.Stream(non_blocking=True)
        with xp.cuda.using_allocator(self.pool.malloc), stream:
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
        self.runs, self.graph, self.eager = 0, None, None

    def __call__(self) -> Any:
        if self.graph is None and self.eager is None and self.runs == WARM:
            try:
                self.graph = Graph(self.xp, self.function)
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
    """

    def __init__(self, optimizer: Any, loss: Callable, clip: float | None = None):
        self.optimizer, self.loss, self.clip = optimizer, loss, clip
        self.xp = xp_of(optimizer.control)
        self.start = self.xp.ones((), optimizer.flat.data.dtype)  # 1/divide_by
        self.seen: dict[tuple, int] = {}
        self.graphs: dict[tuple, tuple[dict, Graph]] = {}  # by shape: its batch, and the graph
        cuda = getattr(self.xp, "cuda", None)
        self.captures = hasattr(getattr(cuda, "Stream", None), "begin_capture")
        self.eager: dict[tuple, str] = {}

    def run(self, batch: dict[str, Any], divide_by: float = 1, rng: Any = None) -> Any:
        """One step on this batch; Σ loss, an array that the next step may overwrite."""
        rng = np.random.default_rng(0) if rng is None else rng
        shape = tuple((name, a.shape, a.dtype.str) for name, a in sorted(batch.items()))
        self.start.fill(1 / divide_by)
        if shape not in self.graphs and shape not in self.eager:
            self.seen[shape] = self.seen.get(shape, 0) + 1
            if self.seen[shape] > WARM:
                self.capture(shape, batch)
        if shape not in self.graphs:
            before = rng.bit_generator.state
            value = self.whole(batch, rng)
            if rng.bit_generator.state != before:
                self.eager[shape] = "the loss draws random numbers"
            return value
        fixed, graph = self.graphs[shape]
        for name, array in batch.items():
            fixed[name][...] = array
        graph.launch()
        return graph.value

    def whole(self, batch: dict[str, Any], rng: Any) -> Any:
        optimizer = self.optimizer
        value = self.loss(optimizer.model, batch, rng)
        value.backward(self.start.reshape(value.shape), into=optimizer.gradients)
        optimizer.step(divide_by=1, clip=self.clip)
        return value.data

    def capture(self, shape: tuple, batch: dict[str, Any]) -> None:
        if not self.captures:
            self.eager[shape] = f"{self.xp.__name__} captures nothing"
            return
        fixed = {name: array.copy() for name, array in batch.items()}
        rng = np.random.default_rng(0)
        before = rng.bit_generator.state
        try:
            graph = Graph(self.xp, lambda: self.whole(fixed, rng))
        except (RuntimeError, MiniloraError) as error:
            self.eager[shape] = str(error)
            warnings.warn(f"this step was not captured and stays eager: {error}", stacklevel=3)
            return
        if rng.bit_generator.state != before:
            self.eager[shape] = "the loss draws random numbers"
            return
        self.graphs[shape] = fixed, graph

    def __call__(
        self, optimizer: Any, workers: Any, loss: Callable, train: Any, rows: Any,
        key: tuple[int, ...], clip: float | None, accumulate: int,
    ) -> tuple[Any, int]:  # fmt: skip
        """What `fit` asks of a step.  Errors: `MiniloraError` if it is not the one captured."""
        if (optimizer, loss, clip) != (self.optimizer, self.loss, self.clip):
            raise MiniloraError("CapturedStep: expected its own optimizer, loss and clip")
        if accumulate != 1 or len(workers.buffers) != 1:
            raise MiniloraError(
                f"CapturedStep: expected accumulate = shards = 1, "
                f"found {accumulate} and {len(workers.buffers)}"
            )
        batch, scored = train.take(rows, workers.device)
        value = self.run(batch, max(1, scored), np.random.default_rng([*key, 0, 0]))
        return value.copy(), scored  # the next launch overwrites what `run` gave
