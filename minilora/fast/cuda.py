"""Plain CUDA C++ kernels for CuPy: compiled on first use, launched with exact argument types."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..engine.bf16 import BF16, BFLOAT16
from ..engine.rounding import bits_in

FOLDER = Path(__file__).parent / "kernels"
SIGNATURE = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?{name}\s*\(([^)]*)\)"
SCALARS = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}


def pointer(array: Any) -> Any:
    """What a kernel is given for an array; a null pointer for None."""
    return np.uint64(0) if array is None else bits_in(array)


class Kernels:
    """Kernels of one file, by name: `Kernels("norms.cu", "norm_forward<float, true>", ...)`;
    "a.cu b.cu" reads two files as one.

    `on(xp)` gives `launch(name, grid, block, *arguments, shared=0)`, or None where the installed
    CuPy cannot compile (the stand-in of the tests).  The kernel's own signature says which NumPy
    type each scalar gets, for CuPy would pass a Python int as int64 and a float as float64;
    None is a null pointer.  A launch neither waits nor copies nor takes memory.

    `exact` forbids fused multiply-adds, so that the bits are those of the specification, but for
    numbers below 2^-126: CuPy compiles all kernels, its own too, so that those are zero;
    `shared` is the most dynamic shared memory asked for, in bytes, where that is above 48 KiB.
    """

    def __init__(self, file: str, *names: str, exact: bool = False, shared: int = 0):
        self.file, self.names, self.shared = file, names, shared
        self.options = ("-std=c++17", "--fmad=false") if exact else ("-std=c++17",)
        self.compiled: dict[type, dict[str, Callable]] = {}  # by the class that compiled them
        self.kinds = {name: argument_kinds(self.source(), name) for name in names}

    def source(self) -> str:
        """The text that is compiled: `common.cu` and the files."""
        files = ("common.cu", *self.file.split())
        return "".join((FOLDER / file).read_text("utf-8") for file in files)

    def on(self, xp: ModuleType) -> Callable | None:
        compiler = getattr(xp, "RawModule", None)
        if compiler is None:
            return None
        functions = self.compiled.get(compiler)
        if functions is None:
            module = compiler(code=self.source(), options=self.options, name_expressions=self.names)
            functions = {name: module.get_function(name) for name in self.names}
            if self.shared:
                for function in functions.values():
                    function.max_dynamic_shared_size_bytes = self.shared
            self.compiled[compiler] = functions

        def launch(name: str, grid: Any, block: int, *arguments: Any, shared: int = 0) -> None:
            values = tuple(
                kind(value) for kind, value in zip(self.kinds[name], arguments, strict=True)
            )
            grid = grid if isinstance(grid, tuple) else (grid,)
            functions[name](grid, (block,), values, shared_mem=shared)

        return launch


def argument_kinds(source: str, name: str) -> list[Callable]:
    """For each parameter of a kernel, what makes an argument of it."""
    found = re.search(SIGNATURE.format(name=name.partition("<")[0]), source)
    parameters = [" ".join(p.split()) for p in found[1].split(",")]
    return [pointer if "*" in p else SCALARS[p.rpartition(" ")[0]] for p in parameters]


def floats(*arrays: Any) -> bool:
    """Are these float32 arrays with something in them?  The rules here take nothing else."""
    return all(a is None or (a.dtype == np.float32 and a.size > 0) for a in arrays)


STORAGE = {np.dtype(np.float32): "float", BFLOAT16: "bf16"}


def storage(*arrays: Any) -> str | None:
    """What a kernel calls the type that all of these are stored in; None if there is no kernel
    for it, if they differ, or if one is empty.  None among them does not count."""
    kinds = {a.dtype for a in arrays if a is not None}
    if len(kinds) != 1 or any(a is not None and a.size == 0 for a in arrays):
        return None
    return STORAGE.get(kinds.pop())


def contiguous(xp: ModuleType, array: Any) -> Any:
    """The array itself where its entries lie in order, else a copy."""
    whole = xp.ascontiguousarray(bits_in(array))
    return BF16(whole) if type(array) is BF16 else whole


def row_block(width: int) -> int:
    """Threads for a row of that many entries, four to a thread: whole warps, 1024 at most."""
    return min(1024, -(-width // 128) * 32)


def flat_grid(size: int, block: int = 256) -> int:
    """Blocks for a flat array, four entries to a thread; beyond 4096 of them, threads loop."""
    return max(1, min(4096, -(-size // (4 * block))))
