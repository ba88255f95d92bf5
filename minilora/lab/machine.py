"""What a figure was measured on: processor, libraries, other load, memory of this process."""

import ctypes
import os
import platform
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..engine.blas import library
from ..engine.forked import copies


class Load:
    """Who else uses the processors: busy time of the machine less that of this process and
    the copies forked from it.

    `others()` is their share of all processors since the last call, between 0 and 1; None
    where there is no /proc/stat.  The kernel counts in ticks of 10 ms.
    """

    def __init__(self) -> None:
        self.last = self.reading()

    def others(self) -> float | None:
        before, self.last = self.last, self.reading()
        if before is None or self.last is None:
            return None
        wall, busy, own = (now - then for now, then in zip(self.last, before, strict=True))
        return max(0.0, busy - own) / max(1e-9, wall * (os.cpu_count() or 1))

    @staticmethod
    def reading() -> tuple[float, float, float] | None:
        """Seconds: on the clock, of busy processors, and of our own processes."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, cpu_seconds()


def cpu_seconds() -> float:
    """Processor time of this process, of children that have ended, and of its forked copies."""
    ticks = 0
    for copy in copies():
        with suppress(OSError):  # it has ended just now
            # After the name, which may hold spaces: user and system time are fields 12 and 13.
            fields = Path(f"/proc/{copy.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    ended = os.times()[2:4]  # of children that were waited for
    return time.process_time() + sum(ended) + ticks / os.sysconf("SC_CLK_TCK")


class Peak:
    """Bytes that we held at most since `Peak()`, beyond what this process held then."""

    def __init__(self) -> None:
        with suppress(AttributeError, OSError, TypeError):  # else what is freed stays, and its
            ctypes.CDLL(None).malloc_trim(0)  # next use is not seen
        with suppress(OSError):  # where it fails, an import's own peak may hide a small one
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.base = memory("VmRSS")

    def bytes(self) -> int:
        return max(0, held_at_most() - self.base)


def held_at_most() -> int:
    """Bytes at the peak of this process, and those that its forked copies have for themselves.

    Of the copies as it is now: their memory does not shrink where `keep_large_blocks` could.
    Pages that only copies share, which takes two of them, are not counted.
    """
    return memory("VmHWM") + sum(private_bytes(copy.pid) for copy in copies())


def private_bytes(pid: int) -> int:
    """What a process shares with no other; 0 where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes; elsewhere the peak that getrusage knows."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak << 10
    return int(text.partition(f"{field}:")[2].split()[0]) << 10


def keep_large_blocks() -> bool:
    """Let glibc's malloc keep freed blocks of up to a gigabyte, instead of returning each to the
    kernel and taking fresh pages, which have to be zeroed, for the next.  True where it could.

    All threads share one arena: glibc returns those of other threads to the kernel once they
    are empty, whatever else it is told.  Under one interpreter, threads seldom wait for malloc.

    Called once by the command line; the library leaves its host process as it finds it.
    (mallopt(3): M_MMAP_THRESHOLD = -3, M_TRIM_THRESHOLD = -1, M_ARENA_MAX = -8.)
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = (-3, 1 << 30), (-1, (1 << 31) - 1), (-8, 1)
    return all(mallopt(option, value) == 1 for option, value in settings)


def sgemm_ceiling(products: Callable[[], Any], count: int, seconds: float = 0.5) -> float:
    """GFLOP/s of the best call of `products`: `count` times (1024, 512) by (512, 1024)."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        products()
        best = min(best, time.perf_counter() - began)
    return count * 2 * 1024 * 512 * 1024 / best / 1e9


def processor() -> str:
    """The model of the CPU, as the kernel names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def blas() -> str:
    """NumPy's BLAS: its name, version and kernels, and whether the environment chose those."""
    if (found := library()) is None:
        built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{built['name']} {built['version']}"
    kernels = getattr(found, "architecture", "?")
    if "OPENBLAS_CORETYPE" in os.environ:
        kernels += ", by OPENBLAS_CORETYPE"
    return f"{found.internal_api} {found.version} ({kernels})"


def machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.machine()} {platform.system()}",
        "blas": blas(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "minilora": __version__,
    }
