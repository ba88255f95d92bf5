"""What tests of kernels share: the RawModule in place, and an op against its specification.

On the stand-in the kernels run on the CPU, under two seeds of the scheduler; with `--device cuda`
the same tests run them on the card.
"""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
from cuda_cpu import fakeraw

from minilora.engine.backend import to_device, to_numpy
from minilora.engine.bf16 import BF16, BFLOAT16, bits_of, float32_of
from minilora.engine.check import gradients
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Tensor
from minilora.model.module import cast, rebuild
from minilora.model.module import to_device as tree_to_device


def with_a_mistake(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module with `old` in its source, which stands there once, replaced."""
    source = inspect.getsource(module)
    assert source.count(old) == 1
    wrong = ModuleType(f"{module.__package__}.wrong")
    wrong.__package__ = module.__package__
    exec(source.replace(old, new), vars(wrong))
    return wrong


@pytest.fixture(scope="module")
def kernels(request) -> Iterator[None]:
    """Kernels can run: on the stand-in through g++, on a card as they are."""
    device = request.config.getoption("device")
    if device == "cpu":
        pytest.skip("kernels are for the stand-in (--device standin) or a card")
    if device == "cuda":
        request.getfixturevalue("device")
        yield
        return
    if fakeraw.compiler is None or sys.platform != "linux":
        pytest.skip("kernels run on the CPU with g++, on Linux")
    with installed(fakeraw.RawModule):
        yield


@pytest.fixture
def on_the_cpu(kernels, request) -> None:
    """Mistakes are planted where they can be seen and do no harm."""
    if request.config.getoption("device") != "standin":
        pytest.skip("planted mistakes are for the CPU")


@contextmanager
def installed(raw_module) -> Iterator[None]:
    """The stand-in's CuPy has this RawModule, and before and after it the one it had."""
    library = vars(sys.modules["cupy"])
    before = library.get("RawModule")
    library["RawModule"] = raw_module
    try:
        yield
    finally:
        del library["RawModule"]
        if before is not None:
            library["RawModule"] = before


def on_device(value):
    if isinstance(value, np.ndarray):
        return to_device(value, "cuda")
    return tree_to_device(value, "cuda") if hasattr(value, "dense") else value


def launches(call, seed=1):
    """The value of `call()`, and the kernels that it launched."""
    fakeraw.RawModule.seed = seed
    fakeraw.RawModule.launched.clear()
    value = call()
    return value, [re.sub(r"<.*", "", name) for name in fakeraw.RawModule.launched]


def in_bf16(tree):
    """A tree whose Tensors are rounded to bfloat16."""
    half = lambda n: Tensor(BF16(bits_of(n.data))) if isinstance(n, Tensor) else n
    return rebuild(tree, lambda _, node: half(node))


def agrees(op, arrays, options=None, *, expect=(), tolerance=None, scale=0.0, frozen=(), half=None):
    """Value and gradients of `op` in float32 on the device, against float64 on the host.

    The error is relative in norm, or to `scale` where that is larger.  The kernels that `expect`
    names must have run; a second run under another seed must give the same bits; arguments stay
    as they are.  Arguments numbered in `frozen` want no gradient; those in `half` come in
    bfloat16, and so do frozen bases then: the numbers are rounded first, for both sides.
    """
    narrow = lambda v: cast(v, np.float32) if hasattr(v, "dense") else v
    options = {name: narrow(value) for name, value in (options or {}).items()}
    arrays = [np.asarray(a, np.float32) for a in arrays]
    rng = np.random.default_rng(0)
    tolerance = tolerance or (1e-5 if half is None else 4e-3)
    if half is not None:
        bases = {name: in_bf16(v) for name, v in options.items() if hasattr(v, "dense")}
        options = options | bases
        arrays = [float32_of(bits_of(a)) if i in half else a for i, a in enumerate(arrays)]

    def stored(place, i):
        if place is on_device and half is not None and i in half:
            return BF16(place(bits_of(arrays[i])))
        return place(arrays[i])

    def run(place):
        """Value and gradients for arrays, a cotangent and options placed by `place`."""
        given = [stored(place, i) for i in range(len(arrays))]
        fixed = {name: place(value) for name, value in options.items()}

        def function(*free):
            free = iter(free)
            whole = [given[i] if i in frozen else next(free) for i in range(len(given))]
            return op(*whole, **fixed)

        free = [a for i, a in enumerate(given) if i not in frozen]
        return function, free

    with reference_rules():
        function, free = run(wide)
        shape = function(*free).data.shape
        w = np.asarray(rng.standard_normal(shape), np.float32)
        w = w if half is None else np.asarray(float32_of(bits_of(w)))
        wanted, value = gradients(function, free, w.astype(np.float64))
    results = []
    for seed in (1, 2):
        function, free = run(on_device)
        cotangent = on_device(w)
        (found, fast), names = launches(lambda f=function, a=free, c=cotangent: gradients(f, a, c),
                                        seed)  # fmt: skip
        if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
            assert set(expect) <= set(names), f"expected {expect}, launched {names}"
        results.append([to_numpy(a) for a in (fast.data, *found)])
        kinds = [bool(half) and fast.ndim > 0, *(half is not None and i in half
                 for i in range(len(arrays)) if i not in frozen)]  # fmt: skip
        for a, two_bytes in zip((fast.data, *found), kinds, strict=True):
            assert a.dtype == (BFLOAT16 if two_bytes else np.float32)
        for given, a in zip(free, [a for i, a in enumerate(arrays) if i not in frozen],
                            strict=True):  # fmt: skip
            np.testing.assert_array_equal(to_numpy(given), a)
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes(), "two runs differ"
    for a, b in zip(results[0], (value.data, *wanted), strict=True):
        assert a.dtype == np.float32
        assert a.shape == b.shape
        assert apart(a, b, scale) <= tolerance
    return results[0]


def wide(value):
    """A float array, or a base that holds some, in float64."""
    if hasattr(value, "dense"):
        return cast(value, np.float64)
    floating = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return value.astype(np.float64) if floating else value


def apart(a, b, scale=0.0) -> float:
    """‖a - b‖ / max(‖b‖, scale)."""
    gap = np.linalg.norm((a.astype(np.float64) - b).ravel())
    return gap / max(np.linalg.norm(np.ravel(b)), scale, 1e-30)


def sanitized(script: str) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own under AddressSanitizer."""
    found = subprocess.run(
        [fakeraw.compiler, "-print-file-name=libasan.so"], capture_output=True, text=True
    )
    library = found.stdout.strip()
    if "/" not in library:
        pytest.skip("g++ comes without libasan")
    environment = {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": ":".join(p for p in sys.path if p),
        "PATH": "/usr/bin:/bin",
    }
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
