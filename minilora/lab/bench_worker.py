"""A worker: one process, one library, and a pipe over which it is told when to run.

`Worker` is the end that asks; `python -m minilora.lab.bench_worker` is the end that answers.
Requests and answers are lines of JSON.  Never two libraries' threads in one process: idle
ones that spin would take the processors from those at work.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from ..engine.errors import MiniloraError
from .bench_shapes import Job, Shape
from .machine import Load, Peak, cpu_seconds, keep_large_blocks, sgemm_ceiling


class Worker:
    """A process that is ready to run the steps of one job.  Use as a context manager.

    Errors: `MiniloraError` with the worker's own words when it fails or dies.
    """

    def __init__(self, job: Job):
        self.job = job
        threads = {
            f"{name}_NUM_THREADS": str(blas_threads(job))
            for name in ("OPENBLAS", "MKL", "BLIS", "OMP")
        }
        self.words = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minilora.lab.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            env=os.environ | threads,
            start_new_session=True,  # Ctrl-C reaches us alone, and we close it
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.kill()
        self.process.communicate()
        self.words.close()

    def ask(self, command: str, **options: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps({"command": command} | options) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": self.last_words()}
        if "error" in answer:
            raise MiniloraError(f"bench: {self.job.contender}: {answer['error']}")
        return answer

    def prepare(self) -> dict[str, Any]:
        """Import, draw, build; `{"versions": ..., "working": threads found at work}`."""
        return self.ask("prepare", job=asdict(self.job))

    def run(self, steps: int) -> dict[str, Any]:
        """Seconds of `steps` steps by the clock ("wall") and of this process ("cpu"), the
        share of the processors that others took, and a list of values for the gate."""
        return self.ask("run", steps=steps)

    def last_words(self) -> str:
        self.words.seek(0)
        lines = self.words.read().decode(errors="replace").strip().splitlines()
        return f"the worker ended: {lines[-1] if lines else 'without a word'}"


def blas_threads(job: Job) -> int:
    """Threads inside a matrix product: all of them, but where there are as many of our shards, or
    processes that write tokens."""
    from .bench_ours import in_processes

    whole = job.contender == "blas" or (job.kind == "generate" and not in_processes(job))
    return job.threads if whole or is_theirs(job) else 1


def is_theirs(job: Job) -> bool:
    from .bench_ours import OURS

    return job.contender not in OURS


class Answering:
    """The other end: what is asked for, done by the contender of the job."""

    def prepare(self, job: dict[str, Any]) -> dict[str, Any]:
        """Every library gets the allocator that the command line gives minilora, but for torch
        as its users have it, which is "stock"."""
        self.job = Job(**(job | {"shape": Shape(**job["shape"])}))
        if self.job.contender != "stock":
            keep_large_blocks()
        if is_theirs(self.job):
            import peft
            import torch
            import transformers

            from .bench_torch import contender

            used = [torch, peft, transformers]
            if self.job.contender == "bnb":
                import bitsandbytes

                used.append(bitsandbytes)
            libraries = {m.__name__: m.__version__ for m in used}
        else:
            from .bench_ours import contender

            libraries = {}
        self.contender = contender(self.job)
        self.peak = Peak()
        self.contender.build()
        return {"versions": libraries, "working": self.contender.working}

    def run(self, steps: int) -> dict[str, Any]:
        load, values, wall, cpu = Load(), [], 0.0, 0.0
        for _ in range(steps):
            self.contender.before()
            began, used = time.perf_counter(), cpu_seconds()
            self.contender.step()
            wall += time.perf_counter() - began
            cpu += cpu_seconds() - used
            values.append(self.contender.value())
        return {"wall": wall, "cpu": cpu, "others": load.others(), "values": values}

    def memory(self) -> dict[str, Any]:
        """Peak bytes since the data were drawn; those of a card where the steps run on one."""
        taken = self.contender.taken()
        return {"bytes": self.peak.bytes() if taken is None else taken}

    def ceiling(self) -> dict[str, Any]:
        return {"gflops": sgemm_ceiling(*self.contender.products())}


def main() -> None:
    """Answer line by line until the pipe closes.  What libraries print goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answering = Answering()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(answering, request.pop("command"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=pipe, flush=True)


if __name__ == "__main__":
    main()
