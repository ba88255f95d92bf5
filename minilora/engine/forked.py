"""Copies of this process, each with an interpreter of its own, that share some arrays with it."""

import gc
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np

from .errors import MiniloraError

NAME = "a copy forked by minilora"


def can_fork() -> bool:
    """On Linux, where BLAS and malloc are ready to be forked; not inside a daemon, which may
    have no children."""
    if sys.platform != "linux":
        return False
    from multiprocessing import current_process

    return not current_process().daemon


def shared_zeros(like: np.ndarray) -> np.ndarray:
    """Zeros in pages that this process and the copies forked from it both see and write."""
    from mmap import mmap

    pages = mmap(-1, max(1, like.nbytes))
    return np.frombuffer(pages, like.dtype, like.size).reshape(like.shape)


def copies() -> list:
    """The processes forked here that live."""
    from multiprocessing import active_children

    return [process for process in active_children() if process.name == NAME]


class Forked:
    """`count` copies of this process that wait to call `function`.  Use as a context manager.

    A copy has everything as it was when it was made, and shared arrays as they are; what it
    changes elsewhere stays with it.  It calls `begin` with its number first, and ends when this
    process does.
    Errors: `MiniloraError` from `result` if a copy died; else what `function` raised there.
    """

    def __init__(
        self, count: int, function: Callable, begin: Callable[[int], Any] = lambda copy: None
    ) -> None:
        from multiprocessing import get_context

        fork = get_context("fork")
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        try:
            for copy in range(count):
                ours, theirs = fork.Pipe()
                process = fork.Process(
                    target=answer,
                    args=(theirs, (*self.pipes, ours), partial(begin, copy), function),
                    name=NAME,
                    daemon=True,
                )
                with warnings.catch_warnings():
                    # Python warns of locks that other threads may hold at this moment: what
                    # runs in a copy here takes none of theirs, nor should a loss.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
        except BaseException:
            self.close()
            raise

    def ask(self, copy: int, *arguments: Any) -> None:
        """Have a copy call `function(*arguments)`."""
        try:
            self.pipes[copy].send(arguments)
        except ConnectionError:
            raise self.death(copy) from None

    def result(self, copy: int) -> Any:
        """What that call returned, once it has."""
        pipe = self.pipes[copy]
        try:
            value, words = pipe.recv()
        except (EOFError, ConnectionError):
            raise self.death(copy) from None
        if words is None:
            return value
        try:
            error = pipe.recv()
        except Exception:  # of any kind: some classes cannot be made again of what was sent
            error = None
        error = error or MiniloraError(words.strip().rpartition("\n")[2])
        error.add_note(f"in process {self.processes[copy].pid}:\n{words}")
        raise error

    def death(self, copy: int) -> MiniloraError:
        process = self.processes[copy]
        process.join(timeout=5)
        return MiniloraError(
            f"process {process.pid}, forked to share the work, ended with {process.exitcode}"
        )

    def results(self) -> list:
        """Of all copies, each asked once; an error is raised as soon as it is there."""
        from multiprocessing.connection import wait

        found: dict[Any, Any] = {}
        while len(found) < len(self.pipes):
            for pipe in wait([pipe for pipe in self.pipes if pipe not in found]):
                found[pipe] = self.result(self.pipes.index(pipe))
        return [found[pipe] for pipe in self.pipes]

    def left(self, copy: int) -> Callable[[], NoReturn] | None:
        """If that copy has answered or any has died, a function that raises why."""
        if self.pipes[copy].poll():
            return partial(self.expect_none, copy)
        for other, process in enumerate(self.processes):
            if not process.is_alive():
                return partial(self.expect_none, other)
        return None

    def expect_none(self, copy: int) -> NoReturn:
        """Raise what the copy raised, or `MiniloraError`: it ended too early."""
        self.result(copy)
        raise MiniloraError(f"process {self.processes[copy].pid} ended its work before the others")

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End them, whatever they are at."""
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            process.close()
            pipe.close()


def answer(pipe: Any, others: Sequence, begin: Callable, function: Callable):
    """A copy's life: calls, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and so is what it does before it ends
    for other in others:  # or a pipe would stay open when that process has died
        other.close()
    gc.freeze()  # collecting what was there before would copy its pages
    begin()
    while True:
        try:
            arguments = pipe.recv()
        except (EOFError, OSError):  # a reset, where an answer was left unread
            return
        try:
            reply, error = (function(*arguments), None), None
        except Exception as caught:
            reply, error = (None, "".join(traceback.format_exception(caught))), caught
        try:
            pipe.send(reply)
            if error is not None:
                send_error(pipe, error)
        except OSError:  # nobody is there to read it
            return


def send_error(pipe: Any, error: Exception) -> None:
    """The error itself, so that its own class is raised; None if it cannot be sent."""
    try:
        pipe.send(error)
    except OSError:
        raise
    except Exception:  # of any kind: an error may hold anything
        pipe.send(None)
