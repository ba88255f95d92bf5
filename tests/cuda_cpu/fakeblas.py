"""cuBLAS as a card would see it: addresses, leading dimensions, and columns that come first.

Each function is called through the machine's own calling convention, with the signature that
stands in NVIDIA's header; the matrices are read at their addresses in the stand-in's memory.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_float, c_int, c_size_t, c_uint16, c_void_p
from types import SimpleNamespace
from weakref import WeakValueDictionary

import numpy as np
import pytest
import standin

from minilora.engine.bf16 import bits_of, float32_of
from minilora.fast import cublas

HANDLE = 0xB1A5
SUCCESS, NOT_INITIALIZED, INVALID_VALUE = 0, 1, 7
FLOAT, HALF, OF_FLOATS, ADDRESS = 0, 14, POINTER(c_float), c_void_p
TAKEN = {(FLOAT, FLOAT, FLOAT), (HALF, HALF, HALF), (HALF, HALF, FLOAT)}
SIGNATURES = {  # cublas_v2.h
    "cublasCreate_v2": (POINTER(c_void_p),),
    "cublasSetMathMode": (ADDRESS, c_int),
    "cublasSetStream_v2": (ADDRESS, ADDRESS),
    "cublasSetWorkspace_v2": (ADDRESS, ADDRESS, c_size_t),
    "cublasGemmEx": (
        ADDRESS, c_int, c_int, c_int, c_int, c_int, OF_FLOATS, ADDRESS, c_int, c_int, ADDRESS,
        c_int, c_int, OF_FLOATS, ADDRESS, c_int, c_int, c_int, c_int,
    ),
}  # fmt: skip


class Library:
    """What ctypes would load.  `asked` holds the names called, `wrong` what went wrong."""

    def __init__(self):
        self.asked, self.wrong = [], None
        self.stream = self.workspace = None
        self.whole_sums = False
        for name, types in SIGNATURES.items():
            setattr(self, name, CFUNCTYPE(c_int, *types)(self.guarded(name)))

    def guarded(self, name):
        def call(*arguments):
            self.asked.append(name)
            try:
                return getattr(self, name.removesuffix("_v2")[6:].lower())(*arguments)
            except Exception as error:  # ctypes would drop it
                self.wrong = error
                return INVALID_VALUE

        return call

    def create(self, handle):
        handle[0] = HANDLE
        return SUCCESS

    def setmathmode(self, handle, mode):
        """16: CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION"""
        self.expect(handle)
        self.whole_sums = mode == 16
        return SUCCESS

    def setstream(self, handle, stream):
        self.expect(handle)
        self.stream, self.workspace = stream, None
        return SUCCESS

    def setworkspace(self, handle, address, size):
        self.expect(handle)
        inside(address, size)
        self.workspace = address
        return SUCCESS

    def expect(self, handle):
        if handle != HANDLE:
            raise ValueError(f"handle {handle}")

    def gemmex(
        self, handle, ta, tb, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, c, type_c,
        ldc, compute, algorithm,
    ):  # fmt: skip
        """C (m, n) = alpha op(A) op(B) + beta C, all of them column by column."""
        self.expect(handle)
        if type_a == HALF and not self.whole_sums:
            raise ValueError("parts of a sum could be rounded")
        if self.workspace is None:
            raise ValueError("no workspace: a capture would fail")
        kinds = (type_a, type_b, type_c)
        if kinds not in TAKEN or (compute, algorithm) != (68, -1):
            raise ValueError(f"types {kinds}")
        alpha, beta = alpha[0], beta[0]

        def run():
            left = numbers(matrix(a, *((m, k), (k, m))[ta], lda, type_a))
            right = numbers(matrix(b, *((k, n), (n, k))[tb], ldb, type_b))
            value = np.float32(alpha) * ((left.T if ta else left) @ (right.T if tb else right))
            into = matrix(c, m, n, ldc, type_c)
            value = value if beta == 0 else value + np.float32(beta) * numbers(into)
            into[...] = value if type_c == FLOAT else bits_of(value)

        kept = [inside(address, 2) for address in (a, b, c)]  # a graph's pool would keep them
        self.run(lambda: run() if kept else None)
        standin.stats.launches += 1
        return SUCCESS

    def run(self, step):
        """Now; a capture records the step as well."""
        step()


def matrix(address, rows, columns, leading, kind):
    """A (rows, columns) view of memory, columns `leading` entries apart."""
    if leading < max(1, rows):
        raise ValueError(f"leading dimension {leading} of {rows} rows")
    entry, size = (c_float, 4) if kind == FLOAT else (c_uint16, 2)
    count = leading * (columns - 1) + rows
    inside(address, size * count)
    flat = np.ctypeslib.as_array((entry * count).from_address(address))
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (size, size * leading))


def numbers(entries):
    """float32, of bfloat16's bits too."""
    return float32_of(entries) if entries.dtype == np.uint16 else entries


found: WeakValueDictionary = WeakValueDictionary()  # by an address, the allocation it lies in


def candidates(address):
    """Where the address was found before, if that lives; then every allocation, newest first."""
    known = found.get(address)
    if known is not None:
        yield known
    yield from reversed(list(standin.roots.values()))


def inside(address, size):
    """The allocation of the stand-in that these bytes lie in."""
    for root in candidates(address):
        start = root._a.ctypes.data
        if start <= address and address + size <= start + root._a.nbytes:
            found[address] = root
            return root
    raise IndexError(f"{size} bytes at {address:#x} are in no allocation")


@contextmanager
def installed(binding=cublas) -> Iterator[Library]:
    """`cupy` is the stand-in, and `binding` finds this cuBLAS."""
    with pytest.MonkeyPatch.context() as patch:
        modules: dict = {}
        cupy = standin.install(modules)
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=0))
        library = Library()
        patch.setitem(binding.opened, (cupy, 0), binding.Cublas(cupy, library))
        yield library
