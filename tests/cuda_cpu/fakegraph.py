"""CUDA graphs on the stand-in: what is launched while a stream captures is recorded.

The work must run to know the shapes of its results; when the capture ends, what it wrote is
undone, and what it made is poisoned, for a capture computes nothing.  A launch runs the
record, on what the buffers hold by then.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import standin
from cuda_cpu import fakeraw

OWN_CUBLAS = {"matmul", "dot", "einsum", "tensordot", "inner", "vdot"}


class Tape:
    """The state of this fake: the current stream, the record where one captures."""

    def __init__(self):
        self.steps, self.before, self.stream = None, [], None
        self.launches = 0  # of graphs

    def refuse(self, what):
        if self.steps is not None:
            raise RuntimeError(f"{what} while a stream captures")


class Graph:
    def __init__(self, tape, steps):
        self.tape, self.steps = tape, steps

    def launch(self, stream=None):
        assert self.tape.steps is None, "a graph launched inside a capture"
        count = standin.stats.launches
        with np.errstate(all="ignore"):
            for step in self.steps:
                step()
        standin.stats.launches = count + 1
        self.tape.launches += 1


def arrays_in(value):
    if isinstance(value, standin.ndarray):
        return [value]
    return (
        [a for part in value for a in arrays_in(part)] if isinstance(value, (list, tuple)) else []
    )


def values_in(value):
    if isinstance(value, (list, tuple)):
        return [v for part in value for v in values_in(part)]
    return [np.asarray(value)]


def again(compute, result):
    """Run `compute` once more, into the arrays that it made the first time."""

    def step():
        value = compute()
        for array, new in zip(arrays_in(result), values_in(value), strict=False):
            if not np.may_share_memory(array._a, new):
                array._a[...] = new

    return step


@contextmanager
def installed(cupy, library=None) -> Iterator[Tape]:
    """`cupy.cuda` has streams that capture, graphs and pools; `library` is a fake cuBLAS."""
    tape = Tape()

    class Stream:
        ptr = 0

        def __init__(self, non_blocking=False):
            assert non_blocking, "the null stream does not capture"
            self.ptr = id(self)

        def __enter__(self):
            self.outer, tape.stream = tape.stream, self
            return self

        def __exit__(self, *error):
            tape.stream = self.outer

        def begin_capture(self):
            assert tape.steps is None
            assert tape.stream is self
            tape.before = [(root, root._a.copy()) for root in list(standin.roots.values())]
            tape.steps = []

        def end_capture(self):
            steps, tape.steps = tape.steps, None
            old = {id(root) for root, _ in tape.before}
            for root, content in tape.before:
                root._a[...] = content
            for root in list(standin.roots.values()):
                if id(root) not in old and root._a.dtype.kind == "f":
                    root._a[...] = np.nan
            tape.before = []
            return Graph(tape, steps)

    null = type("Null", (), {"ptr": 0})()
    made, call, wait, asarray = standin.made, standin.call, standin.wait, standin.asarray
    run, to_host, fill = fakeraw.Function.__call__, standin.ndarray.get, standin.ndarray.set

    def recorded(compute, writes=False):
        result = made(compute, writes)
        if tape.steps is not None:
            tape.steps.append(again(compute, result))
        return result

    def checked(function, *args, **options):
        if tape.steps is not None and function.__name__ in OWN_CUBLAS:
            raise NotImplementedError("calling cuBLAS API during stream capture is not supported")
        return call(function, *args, **options)

    def kernel(self, grid, block, args, *, shared_mem=0):
        run(self, grid, block, args, shared_mem=shared_mem)
        if tape.steps is not None:
            tape.steps.append(lambda: run(self, grid, block, args, shared_mem=shared_mem))

    def door(source, dtype=None, copy=False):
        if not isinstance(source, standin.ndarray) and np.ndim(source):
            tape.refuse("a copy from the host")
        return asarray(source, dtype, copy)

    def guarded(name, function):
        def guard(*args, **options):
            tape.refuse(name)
            return function(*args, **options)

        return guard

    def gemm(step):
        step()
        if tape.steps is not None:
            tape.steps.append(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standin, "made", recorded)
        patch.setattr(standin, "call", checked)
        patch.setattr(standin, "wait", guarded("a wait", wait))
        patch.setattr(standin.ndarray, "get", guarded("a copy to the host", to_host))
        patch.setattr(standin.ndarray, "set", guarded("a copy from the host", fill))
        patch.setattr(fakeraw.Function, "__call__", kernel)
        patch.setitem(vars(cupy), "asarray", door)
        if library is not None:
            patch.setattr(library, "run", gemm)
        for name, value in {
            "Stream": Stream,
            "MemoryPool": type(
                "MemoryPool", (), {"malloc": lambda self, size: None, "total_bytes": lambda self: 0}
            ),
            "using_allocator": lambda malloc: nullcontext(),
            "get_current_stream": lambda: tape.stream or null,
        }.items():
            patch.setattr(cupy.cuda, name, value, raising=False)
        yield tape
