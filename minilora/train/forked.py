"""Copies of this process, each with an interpreter of its own, that share some arrays with it."""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from mmap import mmap
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError


def can_fork() -> bool:
    """On Linux, where BLAS and malloc are ready to be forked; not inside a daemon, which may
    have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


def shared_zeros(like: np.ndarray) -> np.ndarray:
    """Zeros in pages that this process and the copies forked from it both see and write."""
    pages = mmap(-1, max(1, like.nbytes))
    return np.frombuffer(pages, like.dtype, like.size).reshape(like.shape)


class Forked:
    """`count` copies of this process that wait to call `function`.  Use as a context manager.

    A copy has everything as it was when it was made, and shared arrays as they are; what it
    changes elsewhere stays with it.  It calls `begin` first, and ends when this process does.
    Errors: `MiniloraError` from `result` if a copy died; else what `function` raised there.
    """

    def __init__(
        self, count: int, function: Callable, begin: Callable[[], Any] = lambda: None
    ) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for _ in range(count):
            ours, theirs = fork.Pipe()
            self.pipes.append(ours)
            process = fork.Process(
                target=answer, args=(theirs, tuple(self.pipes), begin, function), daemon=True
            )
            with warnings.catch_warnings():
                # Python warns of locks that other threads may hold: a copy takes none of theirs.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self.processes.append(process)

    def ask(self, copy: int, *arguments: Any) -> None:
        """Have a copy call `function(*arguments)`."""
        try:
            self.pipes[copy].send(arguments)
        except OSError:
            raise self.death(copy) from None

    def result(self, copy: int) -> Any:
        """What that call returned, once it has."""
        try:
            value, error = self.pipes[copy].recv()
        except (EOFError, OSError):
            raise self.death(copy) from None
        if error is not None:
            raise error
        return value

    def death(self, copy: int) -> MiniloraError:
        process = self.processes[copy]
        process.join(timeout=5)
        return MiniloraError(
            f"process {process.pid}, forked to compute a shard, ended with {process.exitcode}"
        )

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error: Any) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            process.close()
            pipe.close()


def answer(pipe: Connection, others: Sequence[Connection], begin: Callable, function: Callable):
    """A copy's life: calls, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for other in others:  # or a pipe would stay open when that process has died
        other.close()
    gc.freeze()  # collecting what was there before would copy its pages
    begin()
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            reply = function(*arguments), None
        except Exception as error:
            reply = None, portable(error)
        try:
            pipe.send(reply)
        except OSError:  # nobody is there to read it
            return


def portable(error: Exception) -> Exception:
    """The error if it can be sent as it is, with its traceback as a note; else its words."""
    words = "".join(traceback.format_exception(error))
    error.add_note(f"in process {os.getpid()}:\n{words}")
    try:
        import pickle

        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # of any kind: an error's class may do as it likes
        pass
    return MiniloraError(f"{type(error).__name__}: {error}")
