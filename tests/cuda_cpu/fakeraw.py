"""A `cupy.RawModule` for the stand-in: g++ compiles the kernels, `shim.h` runs them, and the launch
code is held to the kernels' signatures.

Refused: a wrong number of arguments, a host array or a number where a pointer is due and the
reverse, an array of another dtype, one that is not C-contiguous (save where the kernel says
Strided), a scalar of another NumPy dtype (by CuPy's rule a Python int is int64, a float float64),
blocks above 1024 threads, empty grids.  Each array is copied into a buffer of its own for the
launch, at its offset modulo 512 from the allocation it belongs to, with 0xFF on both sides: a
read beyond it finds NaN, a write is seen.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import standin

HERE = Path(__file__).parent
MARGIN = 1024  # bytes on each side of an array; 0 where AddressSanitizer watches the sides
FLAGS = ["-O1", "-g", "-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC", "-shared"]
LIMITS = ((1 << 31) - 1, 65535, 65535)
WRAPPER = """
extern "C" const char* launch_{i}(void** a, const unsigned* shape, size_t shared, uint64_t seed) {{
    return shim::launch([](void** b) {{ shim::call(&{name}, b); }}, a, shape, shared, seed);
}}
extern "C" const char* signature_{i}() {{ return shim::signature(&{name}); }}
"""
compiler = shutil.which("g++")


class RawModule:
    """Like CuPy's: `code`, `options`, `name_expressions`; then `get_function(name)`."""

    __module__ = "cupy"
    seed = 0  # of the scheduler
    edits: tuple = ()  # (old, new): planted mistakes
    flags: tuple = ()  # further ones for g++
    launched: ClassVar[list[str]] = []  # names, in order

    def __init__(self, *, code, options=(), name_expressions=None):
        assert "-std=c++17" in options
        for old, new in self.edits:
            code = code.replace(old, new)
        wrappers = "".join(WRAPPER.format(i=i, name=n) for i, n in enumerate(name_expressions))
        head = '#define CUDA_CPU\n#include "shim.h"\nnamespace {\n#line 1 "kernel.cu"\n'
        text = head + code + "\n}\n" + wrappers  # unnamed, or no red zones around `__shared__`
        self.library = ctypes.CDLL(str(built(text, self.flags)))
        self.names = {name: i for i, name in enumerate(name_expressions)}

    def get_function(self, name):
        return Function(self, name)


refused: dict = {}  # what g++ said; Hypothesis would ask again and again


def built(text, flags=()):
    """The shared library of this text, from a folder of this user's among the temporary files."""
    shim = (HERE / "shim.h").read_text()
    if text in refused:
        raise SyntaxError(refused[text])
    key = hashlib.sha1(f"{shim}{text}{FLAGS}{flags}".encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"minilora-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, made = Path(work) / "kernel.cpp", Path(work) / "kernel.so"
            source.write_text(text)
            command = [compiler, *FLAGS, *flags, f"-I{HERE}", "-o", str(made), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                refused[text] = done.stderr
                raise SyntaxError(done.stderr)
            made.replace(library)  # whole or not at all: another worker may be at it too
    return library


class Function:
    """One kernel: `function((gx, gy, gz), (bx, by, bz), arguments, shared_mem=0)`."""

    def __init__(self, module, name):
        number = module.names[name]
        self.module, self.name = module, name
        self.run = getattr(module.library, f"launch_{number}")
        self.run.restype = ctypes.c_char_p
        signature = getattr(module.library, f"signature_{number}")
        signature.restype = ctypes.c_char_p
        self.parameters = re.findall("...", signature().decode())
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(self, grid, block, args, *, shared_mem=0):
        shape = (*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block)))
        if not all(type(n) is int and n >= 1 for n in shape) or len(shape) != 6:
            raise ValueError(f"{self.name}: grid {grid} and block {block}")
        if any(n > limit for n, limit in zip(shape, LIMITS, strict=False)):
            raise ValueError(f"{self.name}: grid {grid} is too large")
        if shape[3] * shape[4] * shape[5] > 1024 or shape[5] > 64:
            raise ValueError(f"{self.name}: block {block} is too large")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{self.name}: {shared_mem} bytes of shared memory")
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}: {len(self.parameters)} parameters, {len(args)} given")
        buffers: dict = {}
        pointers = (ctypes.c_void_p * len(args))()
        values = []
        for i, (value, parameter) in enumerate(zip(args, self.parameters, strict=True)):
            values.append(self.word(i, value, parameter, buffers))
            pointers[i] = values[-1].ctypes.data
        numbers = (ctypes.c_uint * 6)(*shape)
        seed = ctypes.c_uint64(self.module.seed)
        wrong = self.run(pointers, numbers, ctypes.c_size_t(shared_mem), seed)
        if wrong:
            raise RuntimeError(f"{self.name}: {wrong.decode()}")
        for buffer in buffers.values():
            buffer.give_back(self.name)
        standin.stats.launches += 1
        self.module.launched.append(self.name)

    def word(self, i, value, parameter, buffers):
        """The bytes that stand for one argument, as a 1-entry array."""
        place = f"{self.name}, argument {i}"
        if parameter[0] == " ":
            if isinstance(value, (int, float)) and not isinstance(value, np.generic):
                value = np.int64(value) if isinstance(value, int) else np.float64(value)
            kind = value.dtype.kind + str(value.itemsize) if isinstance(value, np.generic) else ""
            if kind != parameter[1:]:
                raise TypeError(f"{place}: expected {parameter[1:]}, found {value!r:.60}")
            return np.array([value])
        if isinstance(value, np.uint64) and value == 0:
            return np.zeros(1, np.uint64)  # a null pointer
        if not isinstance(value, standin.ndarray):
            raise TypeError(f"{place}: expected a device array, found {type(value)}")
        kind = value.dtype.kind + str(value.itemsize)
        if kind != parameter[1:] and not (parameter[1] == "V" and kind[1:] == parameter[2:]):
            raise TypeError(f"{place}: expected an array of {parameter[1:]}, found {value.dtype}")
        if parameter[0] == "S":  # read, never written: each argument has its own copy
            buffers[place] = Buffer(value, strided=True)
            return np.array([buffers[place].address], np.uint64)
        if not value.flags.c_contiguous:
            raise TypeError(f"{place}: not C-contiguous")
        key = (value._a.ctypes.data, value.nbytes)
        if key not in buffers:
            for start, size in (at for at, buffer in buffers.items() if not buffer.strided):
                if start < key[0] + key[1] and key[0] < start + size:
                    raise TypeError(f"{place}: overlaps another argument in part")
            buffers[key] = Buffer(value)
        return np.array([buffers[key].address], np.uint64)


class Buffer:
    """A copy of an array between margins of 0xFF, aligned as the array would be on a card.

    A strided one is read only, and what lies between its entries is 0xFF too.
    """

    def __init__(self, array, strided=False):
        self.array, self.strided = array._a, strided
        owner = array._a if array.base is None else array.base._a
        offset = (self.array.ctypes.data - owner.ctypes.data) % 512  # allocations stand on 512
        steps = zip(self.array.shape, self.array.strides, strict=True)
        size = self.array.itemsize + sum((n - 1) * step for n, step in steps)
        size = size if self.array.size else 0
        if MARGIN:
            self.raw = np.full(size + 2 * MARGIN + 1024, 0xFF, np.uint8)
            start = MARGIN - (self.raw.ctypes.data + MARGIN) % 512 + offset
            start += 512 if start < MARGIN else 0
        else:
            start = offset % 16
            self.raw = np.full(start + size, 0xFF, np.uint8)
        self.inside = self.raw[start : start + size]
        if size:
            self.seen()[...] = self.array
        self.first = self.inside.copy() if strided else None
        self.before, self.after = self.raw[:start], self.raw[start + size :]
        self.address = self.inside.ctypes.data if size else 0

    def seen(self):
        """The array as the kernel sees it."""
        a = self.array
        return np.ndarray(a.shape, a.dtype, self.inside, strides=a.strides)

    def give_back(self, name):
        if self.strided and (self.inside != self.first).any():
            raise RuntimeError(f"{name}: a write to an array that is only read")
        if (self.before != 0xFF).any() or (self.after != 0xFF).any():
            raise RuntimeError(f"{name}: a write outside an array of {self.array.shape}")
        if self.array.size and self.seen().tobytes() != self.array.tobytes():
            self.array[...] = self.seen()


def planted(*edits):
    """A RawModule that compiles the kernels with `old` replaced by `new`."""
    return type("RawModule", (RawModule,), {"edits": edits, "__module__": "cupy"})
