"""Where pages live when they have no slot: in host memory, in a file, or beyond a PCIe bus.

A device executes copies and decides nothing.  The simulated one runs each copy as late as is
legal, into slots that start as NaN: where the pager forgets to wait, the numbers show it.
"""

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import cupy
from ..engine.errors import CheckpointError, MiniloraError

Shape = tuple[int, int]  # of a page: both moments, entries


class Slots:
    """Places for pages where the optimizer computes, by number; a new one holds NaN."""

    def __init__(self, xp: Any, shape: Shape, dtype: Any):
        self.xp, self.shape, self.dtype = xp, shape, np.dtype(dtype)
        self.slots: dict[int, Any] = {}

    def open(self, slot: int) -> None:
        self.slots[slot] = self.xp.full(self.shape, np.nan, self.dtype)

    def close(self, slot: int) -> None:
        del self.slots[slot]

    def array(self, slot: int) -> Any:
        return self.slots[slot]


class Copy:
    """A copy that waits to be run, and the event of its being done."""

    def __init__(self, run: Any, after: list):
        self.run, self.after = run, after


class SimulatedDevice(Slots):
    """Pages in host memory; a copy runs when something waits for it, and not before."""

    def __init__(self, pages: int, shape: Shape, dtype: Any = np.float32):
        super().__init__(np, shape, dtype)
        self.host = np.zeros((pages, *shape), dtype)

    def copy_in(self, page: int, slot: int, after: list) -> Copy:
        return Copy(lambda: np.copyto(self.slots[slot], self.host[page]), after)

    def copy_out(self, page: int, slot: int, after: list) -> Copy:
        return Copy(lambda: np.copyto(self.host[page], self.slots[slot]), after)

    def computed(self) -> None:
        """The host has computed by the time it asks."""

    def wait(self, event: Copy | None) -> None:
        stack = [event]
        while stack:  # what it comes after, first
            copy = stack[-1]
            pending = [c for c in copy.after if c is not None and c.run] if copy else []
            if pending:
                stack += pending
                continue
            stack.pop()
            if copy is not None and copy.run:
                run, copy.run, copy.after = copy.run, None, []
                run()

    def read(self, page: int) -> np.ndarray:
        """A page on the host, after a flush."""
        return self.host[page].copy()

    def write(self, page: int, values: np.ndarray) -> None:
        """Set a page from the host; a slot that holds it is to be closed."""
        self.host[page] = values


class FileDevice(Slots):
    """Pages in a file, for state larger than memory: positioned reads and writes, no map.

    The file is temporary, in `folder` or where the system keeps such files, which may be memory
    itself, and gone with the device.
    Errors: `MiniloraError` for a folder that cannot be written to; `CheckpointError` when the
    disk does not do what was asked.
    """

    def __init__(
        self, pages: int, shape: Shape, dtype: Any = np.float32, folder: str | Path | None = None
    ):
        super().__init__(np, shape, dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        try:
            self.file, name = tempfile.mkstemp(prefix="minilora-pages-", dir=folder)
        except OSError as error:
            raise MiniloraError(
                f"folder: expected one to write to, found {folder}: {error.strerror}"
            ) from error
        os.unlink(name)  # it lives until it is closed, by us or by the end of the process
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, pages * self.nbytes)

    def copy_in(self, page: int, slot: int, after: list) -> None:
        view = memoryview(self.slots[slot]).cast("B")
        self.whole(os.preadv(self.file, [view], page * self.nbytes), "read")

    def copy_out(self, page: int, slot: int, after: list) -> None:
        view = memoryview(self.slots[slot]).cast("B")
        self.whole(os.pwrite(self.file, view, page * self.nbytes), "written")

    def whole(self, count: int, what: str) -> None:
        if count != self.nbytes:
            raise CheckpointError(f"page file: expected {self.nbytes} bytes {what}, found {count}")

    def computed(self) -> None: ...

    def wait(self, event: None) -> None: ...

    def read(self, page: int) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        view = memoryview(values).cast("B")
        self.whole(os.preadv(self.file, [view], page * self.nbytes), "read")
        return values

    def write(self, page: int, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, self.dtype)
        self.whole(os.pwrite(self.file, memoryview(data).cast("B"), page * self.nbytes),
                   "written")  # fmt: skip


class CupyDevice(Slots):
    """Pages in pinned host memory, slots on the card, a stream for each direction.

    The host never waits but to `read` and `write`: copies wait for events in their own stream,
    and the computation waits for an arrival in its own.  A slot is a block of its own of
    CuPy's pool, so that its bytes are free for activations once it is closed.
    """

    def __init__(self, pages: int, shape: Shape, dtype: Any = np.float32):
        super().__init__(cupy(), shape, dtype)
        count = pages * int(np.prod(shape))
        self.pinned = self.xp.cuda.alloc_pinned_memory(count * self.dtype.itemsize)
        self.host = np.frombuffer(self.pinned, self.dtype, count).reshape(pages, *shape)
        self.host[...] = 0
        self.inward = self.xp.cuda.Stream(non_blocking=True)
        self.outward = self.xp.cuda.Stream(non_blocking=True)

    def copy_in(self, page: int, slot: int, after: list) -> Any:
        self.order(self.inward, after)
        self.slots[slot].set(self.host[page], stream=self.inward)
        return self.inward.record()

    def copy_out(self, page: int, slot: int, after: list) -> Any:
        self.order(self.outward, after)
        self.slots[slot].get(stream=self.outward, out=self.host[page], blocking=False)
        return self.outward.record()

    def order(self, stream: Any, after: list) -> None:
        """Let the stream wait for events, and for the slot's making by the computing stream."""
        for event in (self.computed(), *after):
            stream.wait_event(event)

    def computed(self) -> Any:
        return self.xp.cuda.get_current_stream().record()

    def wait(self, event: Any) -> None:
        self.xp.cuda.get_current_stream().wait_event(event)

    def read(self, page: int) -> np.ndarray:
        self.outward.synchronize()
        return self.host[page].copy()

    def write(self, page: int, values: np.ndarray) -> None:
        for stream in (self.inward, self.outward):  # neither may still read it or write it
            stream.synchronize()
        self.host[page] = values


DEVICES = {"simulated": SimulatedDevice, "file": FileDevice, "cuda": CupyDevice}


def page_device(name: str, pages: int, shape: Shape, dtype: Any, **folder: Any) -> Any:
    """A device by name; a `folder` for that of a file.

    Errors: `MiniloraError` listing the names there are, or for a folder without a file.
    """
    if name not in DEVICES:
        raise MiniloraError(f"pages: expected one of {', '.join(DEVICES)}; found {name!r}")
    if folder and name != "file":
        raise MiniloraError(f'folder: expected pages="file" beside it, found {name!r}')
    return DEVICES[name](pages, shape, dtype, **folder)
