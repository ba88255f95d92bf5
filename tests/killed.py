"""Work that SIGKILL ends at any moment, again and again, each time in a process of its own.

They are forked from one process that has done its imports: hundreds would take minutes for
these alone, and no kill falls into them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import minilora

PLACES = Path(minilora.__file__).parents[1], Path(__file__).parent


def forked() -> None:
    """In a script of `killer`: returns in the child that is to be killed, and only there."""
    while sys.stdin.readline():
        child = os.fork()
        if not child:
            return
        print(flush=True)
        sys.stdin.readline()  # now; or the test has ended, and nobody will say so
        os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


@contextmanager
def killer(script: str, *arguments: object) -> Iterator[Callable[[float], bool]]:
    """Yields `kill(after)`: what follows `forked()` in the script runs so many seconds, and is
    killed.  Was it still alive?"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PLACES))},
    )  # fmt: skip

    def next_line() -> str:
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    def kill(after: float) -> bool:
        next_line()
        time.sleep(after)
        return int(next_line()) == -signal.SIGKILL

    with process:
        yield kill
