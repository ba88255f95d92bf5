"""NVIDIA's compute-sanitizer over a command: does a kernel read beyond an array, or race?"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
LIMIT = 90.0  # seconds for each
FOUND = 86  # the exit status that says that a tool found something


def sanitizer() -> str | None:
    """Where compute-sanitizer is; None where it is not installed."""
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    beside = [Path(place) / "bin" for place in (*places, "/usr/local/cuda") if place]
    paths = os.pathsep.join([os.environ.get("PATH", ""), *map(str, beside)])
    return shutil.which("compute-sanitizer", path=paths)


def watched(
    tool: str, command: Sequence[str], left: Callable[[], float] = lambda: LIMIT
) -> dict[str, Any]:
    """`command` under one tool: `{"clean": bool, "said": its summary}`, or why it was not run.

    It may take LIMIT seconds, or what is `left()` of them.
    """
    limit = min(LIMIT, left())
    binary, entry = sanitizer(), {"tool": tool}
    if binary is None:
        return entry | {"not run": "compute-sanitizer is not installed"}
    process = subprocess.Popen(
        [binary, "--tool", tool, "--error-exitcode", str(FOUND), *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=limit)
    except BaseException as error:  # Ctrl-C too, which does not reach a session of its own
        os.killpg(process.pid, signal.SIGKILL)  # the command too, which is a child of its own
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return entry | {"not run": f"not done within {limit:.0f} s"}
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), None)
    if summary is None:  # the tool itself did not start: no rights, no driver
        return entry | {"not run": (lines or ["without a word"])[-1][:400]}
    clean = process.returncode == 0
    return entry | {"clean": clean, "said": summary if clean else " | ".join(lines)[:400]}
