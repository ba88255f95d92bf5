"""Matrix products by cuBLAS itself: CuPy refuses its own while a CUDA graph is captured.

A binding in ctypes of the few functions that are needed.  One thread at a time: the handle and
its workspace serve one stream after another.
"""

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_size_t, c_void_p
from types import ModuleType
from typing import Any

import numpy as np

from ..engine.bf16 import BFLOAT16, empty
from ..engine.errors import MiniloraError
from ..engine.rounding import bits_in
from .cuda import contiguous

WORKSPACE = 32 << 20  # bytes: what NVIDIA recommends for Hopper
KINDS = {np.dtype(np.float32): 0, BFLOAT16: 14}
COMPUTE_32F, DEFAULT = 68, -1  # sums in float32, and float32's own products: no TF32
WHOLE_SUMS = 16  # where a sum is split, its parts are not rounded to bfloat16 on the way
PLAIN, TRANSPOSED = 0, 1
MATRIX = (c_void_p, c_int, c_int)  # address, type, leading dimension
FUNCTIONS = {
    "cublasCreate_v2": (POINTER(c_void_p),),
    "cublasSetMathMode": (c_void_p, c_int),
    "cublasSetStream_v2": (c_void_p, c_void_p),
    "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
    "cublasGemmEx": (
        c_void_p, c_int, c_int, c_int, c_int, c_int, POINTER(c_float), *MATRIX, *MATRIX,
        POINTER(c_float), *MATRIX, c_int, c_int,
    ),
}  # fmt: skip


class Cublas:
    """A handle on one device, its workspace, and products on the stream that is current."""

    def __init__(self, xp: ModuleType, library: Any):
        self.xp, self.stream = xp, None
        for name, types in FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, c_int
        self.library, self.handle = library, c_void_p()
        self.workspace = xp.empty(WORKSPACE, xp.uint8)
        self.ask("cublasCreate_v2", byref(self.handle))
        self.ask("cublasSetMathMode", self.handle, WHOLE_SUMS)

    def ask(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise MiniloraError(f"cuBLAS: {name} returned status {status}, expected 0")

    def product(self, a: Any, b: Any, out: Any = None, alpha: float = 1.0, beta: float = 0.0):
        """out = alpha a b + beta out, and `out`; a new array where none is given.

        a (M, K) and b (K, N) float32, or BF16 both; out (M, N) as they are, or float32.  Sums
        are float32 in any case, and rounded once.  Rows of `out` are contiguous; of `a` and `b`
        rows or columns are, or a copy is made.  Neither waits nor copies across the border.

        cuBLAS reads matrices column by column: the same bytes are outᵀ, which is bᵀ aᵀ.
        """
        xp, (M, K), N = self.xp, a.shape, b.shape[1]
        if out is None:
            out = empty(xp, (M, N), a.dtype)
        by_rows = (layout(out) or (0, None))[1] == PLAIN
        expect_kinds(a, b, out)
        if len(b) != K or out.shape != (M, N) or not by_rows or a.size * b.size == 0:
            raise MiniloraError(
                f"product: expected (M, K), (K, N) and rows (M, N), "
                f"found {a.shape}, {b.shape} and {out.shape}"
            )
        a, b = (m if layout(m) else contiguous(xp, m) for m in (a, b))
        (lda, ta), (ldb, tb), (ldc, _) = layout(a), layout(b), layout(out)
        if max(M, N, K, lda, ldb, ldc) >= 1 << 31:
            raise MiniloraError(f"product: {a.shape} x {b.shape} is too large for cuBLAS")
        stream = xp.cuda.get_current_stream().ptr
        if stream != self.stream:  # SetStream takes the workspace away
            self.ask("cublasSetStream_v2", self.handle, stream)
            self.ask("cublasSetWorkspace_v2", self.handle, self.workspace.data.ptr, WORKSPACE)
            self.stream = stream
        at_a, at_b, at_out = (bits_in(m).data.ptr for m in (a, b, out))
        kind, made = KINDS[a.dtype], KINDS[out.dtype]
        self.ask(
            "cublasGemmEx", self.handle, tb, ta, N, M, K, byref(c_float(alpha)),
            at_b, kind, ldb, at_a, kind, lda, byref(c_float(beta)),
            at_out, made, ldc, COMPUTE_32F, DEFAULT,
        )  # fmt: skip
        return out


def expect_kinds(a: Any, b: Any, out: Any) -> None:
    found = [m.dtype for m in (a, b, out)]
    if found not in ([np.float32] * 3, [BFLOAT16] * 3, [BFLOAT16, BFLOAT16, np.float32]):
        raise MiniloraError(f"product: expected float32 or bfloat16 alike, found {found}")


def layout(matrix: Any) -> tuple[int, int] | None:
    """(leading dimension, PLAIN or TRANSPOSED) of a matrix; None if it must be copied."""
    size = matrix.itemsize
    for (rows, columns), (far, near), kind in (
        (matrix.shape, matrix.strides, PLAIN),
        (matrix.shape[::-1], matrix.strides[::-1], TRANSPOSED),
    ):
        step = far // size if rows > 1 else columns
        if (near == size or columns == 1) and step >= columns and (rows == 1 or far % size == 0):
            return step, kind
    return None


opened: dict[tuple[ModuleType, int], Cublas | None] = {}  # by library of arrays and device


def cublas(xp: ModuleType) -> Cublas | None:
    """cuBLAS on the current device, opened once; None where it cannot be found."""
    place = (xp, xp.cuda.Device().id)
    if place not in opened:
        library = found(xp)
        opened[place] = None if library is None else Cublas(xp, library)
    return opened[place]


def found(xp: ModuleType) -> Any:
    """The library that CuPy works with: the one it has loaded, or where NVIDIA's finder says."""
    try:
        xp.cuda.device.get_cublas_handle()  # so that it is loaded
    except (AttributeError, ImportError):  # the stand-in of the tests; a CuPy without cuBLAS
        return None
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "/libcublas.so" in line}
        if len(paths) == 1:
            return ctypes.CDLL(paths.pop())
    except OSError:
        pass  # no such file, or a name with spaces: ask
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except (ImportError, RuntimeError, OSError):
        return None
