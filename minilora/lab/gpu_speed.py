"""How fast is this card, and how near does each kernel come to what the card can do at all?"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..engine.attention import attention, rope
from ..engine.bf16 import BFLOAT16
from ..engine.check import gradients
from ..engine.fused import embedding, frozen_linear, gelu, layer_norm, rms_norm, swiglu
from ..engine.loss import cross_entropy
from ..engine.rounding import cast_array
from ..engine.rules import wide
from ..fast.capture import CapturedStep, Graph, captures
from ..fast.cublas import cublas
from ..fast.cuda_norms import kernels as norm_kernels
from ..model.module import to_device
from ..optim.adamw import AdamW, adamw_update
from ..optim.flat import measure
from ..quant.blockwise import QuantizedArray, quantize_array
from ..quant.codes import code
from ..quant.double import double_quantize
from ..quant.linear import QuantizedLinear
from .bench_shapes import DTYPES

WIDTH, VOCAB = 1024, 50257
HIDDEN = ("get", "item", "tolist", "__float__", "__int__", "__bool__", "__complex__", "__index__")


def milliseconds(cupy: Any, call: Callable, least: float = 0.02, repeats: int = 5) -> float:
    """The median time of a call, over stretches of `least` seconds that end with a wait."""
    wait = cupy.cuda.Device().synchronize

    def stretch(count: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - began) / count

    stretch(2)  # compiles, fills caches and pools
    count = max(1, min(500, int(least / max(stretch(1), 1e-6))))
    return 1e3 * sorted(stretch(count) for _ in range(repeats))[repeats // 2]


def kernels_of(cupy: Any, size: int) -> Iterator[tuple[str, float, Callable]]:
    """(name, bytes that must move, call) for arrays of `size` bytes of float32, or of as many
    numbers in bfloat16."""
    n = max(2, size // 4 // WIDTH) * WIDTH
    rng = np.random.default_rng(0)
    row = rng.standard_normal(WIDTH, np.float32)
    x = cupy.empty((n // WIDTH, WIDTH), cupy.float32)
    x[...] = cupy.asarray(row)
    y, w = cupy.empty_like(x), cupy.asarray(row)
    yield "copy", 8 * n, lambda: cupy.copyto(y, x)
    yield from stored_kernels(x, y, w)
    ids = cupy.asarray(rng.integers(0, n // WIDTH, n // WIDTH))
    yield "embedding", 8 * n, lambda: embedding(x, ids=ids)
    m, v, p = cupy.zeros_like(x).reshape(-1), cupy.zeros_like(x).reshape(-1), y.reshape(-1)
    p[...] = x.reshape(-1)
    g = x.reshape(-1) + 1
    control = cupy.zeros(7)
    yield "gradient norm", 4 * n, partial(measure, g, control, divide_by=1.0, clip=1.0)
    yield (
        "adamw",
        28 * n,
        lambda: adamw_update(p, g, m, v, control, betas=(0.9, 0.999), eps=1e-8, decay=0.01),
    )
    plain = quantize_array(x, "nf4")
    yield "nf4 quantize", 4 * n + plain.nbytes, lambda: quantize_array(x, "nf4")
    double = double_quantize(plain)
    yield "nf4 dequantize, double", 4 * n + double.nbytes, lambda: double.dense(y)
    yield from stored_kernels(*(cast_array(a, BFLOAT16) for a in (x, y)), w, ", bf16")
    yield from coded_products(cupy, size, rng)
    rows = max(1, n // VOCAB)
    logits = cupy.zeros((rows, VOCAB), cupy.float32)
    targets = cupy.asarray(rng.integers(0, VOCAB, rows))
    yield "cross_entropy", 4 * rows * VOCAB, lambda: cross_entropy(logits, targets=targets)


def stored_kernels(x: Any, y: Any, w: Any, mark: str = "") -> Iterator[tuple[str, float, Callable]]:
    """As `kernels_of`: those that take x (rows, C) in float32 or in bfloat16, w (C,) float32; the
    codes are written into y."""
    one = x.nbytes
    g, other = x[::-1].copy(), x.copy()

    def back(op: Callable, *arrays: Any, **options: Any) -> Callable:
        return lambda: gradients(lambda *a: op(*a, **options), list(arrays), g)

    for name, arrays, call in (
        ("rms_norm", 2, lambda: rms_norm(x, w, eps=1e-5)),
        ("layer_norm", 2, lambda: layer_norm(x, w, w, eps=1e-5)),
        ("layer_norm, there and back", 5, back(partial(shifted, w), x)),
        ("gelu", 2, lambda: gelu(x)),
        ("gelu, there and back", 5, back(gelu, x)),
        ("swiglu", 3, lambda: swiglu(x, other)),
        ("swiglu, there and back", 8, back(swiglu, x, other)),
        ("rope", 2, partial(rope, x.reshape(1, len(x), -1, 64), theta=1e4)),
    ):
        yield name + mark, arrays * one, call
    codes = quantize_array(wide(x), "nf4")
    yield f"nf4 dequantize{mark}", one + codes.nbytes, lambda: codes.dense(y)


def coded_products(
    cupy: Any, size: int, rng: np.random.Generator
) -> Iterator[tuple[str, float, Callable]]:
    """As `kernels_of`: a few rows against NF4 codes of size/2 bytes, more than a cache holds."""
    shape = (max(1, size // (4 * WIDTH)), 4 * WIDTH)
    packed = cupy.empty((shape[0], 2 * WIDTH), cupy.uint8)
    packed[...] = cupy.asarray(rng.integers(0, 256, 2 * WIDTH, np.uint8))
    scales = cupy.full(shape[0] * WIDTH // 16, 0.5, cupy.float32)
    nf4 = to_device(code("nf4"), "cuda")
    plain = QuantizedArray(packed.reshape(-1), scales, nf4, shape, 64, np.dtype(np.float32))
    for name, weight, rows, dtype in (
        ("1 row", plain, 1, np.float32),
        ("1 row, double", double_quantize(plain), 1, np.float32),
        ("8 rows", plain, 8, np.float32),
        ("1 row, bf16", replace(plain, dtype=BFLOAT16), 1, BFLOAT16),
        ("8 rows, bf16", replace(plain, dtype=BFLOAT16), 8, BFLOAT16),
    ):
        x = cast_array(cupy.asarray(rng.standard_normal((rows, shape[1]), np.float32)), dtype)
        call = partial(frozen_linear, x, base=QuantizedLinear(weight))
        out = x.itemsize * rows * shape[0]
        yield f"nf4 product, {name}", weight.nbytes + x.nbytes + out, call


def shifted(w: Any, x: Any) -> Any:
    """A LayerNorm whose weights are frozen."""
    return layer_norm(x, w, w, eps=1e-5)


def kernel_speeds(cupy: Any, size: int, late: Callable[[], bool]) -> list[dict[str, Any]]:
    """GB/s of each kernel, as a share of a copy's; a kernel that no longer fits is left out."""
    found: list[dict[str, Any]] = []
    for name, moved, call in kernels_of(cupy, size):
        if late():
            found.append({"kernel": name, "left out": "no time"})
            continue
        ms = milliseconds(cupy, call)
        rate = moved / ms / 1e6
        copy = found[0]["gb_s"] if found else rate
        found.append({"kernel": name, "ms": ms, "gb_s": rate, "of_copy": rate / copy})
    return found


def product_speeds(cupy: Any, size: int, late: Callable[[], bool]) -> list[dict[str, Any]]:
    """TFLOP/s of products: our binding, CuPy's in float32, and causal attention beside them.

    Of attention's table only the half that is looked at is counted: 2 N H T² D there, 3.5 times
    that there and back.
    """
    blas = cublas(cupy)
    found: list[dict[str, Any]] = []

    def rate(product: str, dtype: str, sizes: tuple[int, ...], flop: float, call: Callable) -> None:
        if late():
            return
        ms = milliseconds(cupy, call)
        found.append({
            "product": product, "dtype": dtype, "shape": " x ".join(map(str, sizes)), "ms": ms,
            "tflop_s": flop / ms / 1e9,
        })  # fmt: skip

    shapes = {(size, size, size), (size, max(8, size // 8), max(8, size // 8))}
    T, heads, width = max(16, min(1024, size // 8)), 12, 64
    for dtype in DTYPES:
        kind = BFLOAT16 if dtype == "bf16" else np.float32
        for M, K, N in sorted(shapes, reverse=True):
            a, b, out = (
                cast_array(cupy.ones(shape, cupy.float32), kind)
                for shape in ((M, K), (N, K), (M, N))
            )
            calls = {}
            if dtype == "float32":  # CuPy's own has no bfloat16 without ml_dtypes
                calls["CuPy"] = partial(cupy.matmul, a, b.T, out=out)
            if blas is not None:
                calls["cuBLAS"] = partial(blas.product, a, b.T, out)
            for name, call in calls.items():
                rate(name, dtype, (M, K, N), 2 * M * K * N, call)
        q = cast_array(cupy.ones((8, T, heads, width), cupy.float32), kind)
        flop, sizes = 2 * 8 * heads * T * T * width, (8, T, heads, width)
        rate("attention", dtype, sizes, flop, partial(attention, q, q, q))
        back = partial(gradients, attention, [q, q, q], q)
        rate("attention, there and back", dtype, sizes, 3.5 * flop, back)
    return found


def launch_costs(cupy: Any, count: int) -> dict[str, float]:
    """Microseconds of the host for one call on next to no data, without waiting."""
    x, w = cupy.ones((4, 64), cupy.float32), cupy.ones(64, cupy.float32)
    y, inverse = cupy.empty_like(x), cupy.empty(4, cupy.float32)
    square = cupy.ones((64, 64), cupy.float32)
    calls: dict[str, Callable] = {
        "a ufunc of CuPy": lambda: cupy.add(x, x, out=y),
        "an op (rms_norm)": lambda: rms_norm(x, w, eps=1e-5),
        "a product of CuPy": lambda: cupy.matmul(x, square, out=y),
    }
    if (blas := cublas(cupy)) is not None:
        calls["a product of ours"] = lambda: blas.product(x, square, y)
    if (launch := norm_kernels.on(cupy)) is not None:
        forward = partial(launch, "norm_forward<float, false>", 4, 32, y, inverse, None, x, w, None)
        calls["a kernel"] = lambda: forward(64, 1e-5)
        if captures(cupy):
            calls["a kernel"]()
            graph = Graph(cupy, lambda: [forward(64, 1e-5) for _ in range(20)])
            calls["a graph of 20 kernels"] = graph.launch
    costs = {}
    for name, call in calls.items():
        call()
        cupy.cuda.Device().synchronize()
        began = time.perf_counter()
        for _ in range(count):
            call()
        costs[name] = 1e6 * (time.perf_counter() - began) / count
        cupy.cuda.Device().synchronize()
    return costs


@contextmanager
def crossings(cupy: Any) -> Iterator[dict[str, int]]:
    """Counts, inside, of copies to the host (each of which waits) and of arrays to the device.

    What Python calls is counted.  What CuPy does within, a capture would refuse: a step that
    was captured neither waits nor copies.  `unwatched` counts methods that cannot be replaced.
    """
    counts = {"to_host": 0, "to_device": 0, "unwatched": 0}
    inner: list[str] = []  # float(a) may come to a.get()

    def counting(what: str, function: Callable, is_crossing: Callable) -> Callable:
        def counted(*args: Any, **options: Any) -> Any:
            counts[what] += not inner and is_crossing(*args)
            inner.append(what)
            try:
                return function(*args, **options)
            finally:
                inner.pop()

        return counted

    kept = []

    def always(*args: Any) -> bool:
        return True

    def brings(source: Any, *args: Any) -> bool:
        return not isinstance(source, cupy.ndarray) and np.ndim(source) > 0

    def replace(owner: Any, name: str, what: str, is_crossing: Callable) -> None:
        own = vars(owner).get(name)
        try:
            setattr(owner, name, counting(what, getattr(owner, name), is_crossing))
        except TypeError:  # a type that C made
            counts["unwatched"] += 1
        else:
            kept.append((owner, name, own))

    try:
        for name in HIDDEN:
            if hasattr(cupy.ndarray, name):
                replace(cupy.ndarray, name, "to_host", always)
        replace(cupy.ndarray, "set", "to_device", always)
        for name in ("asarray", "array"):
            replace(cupy, name, "to_device", brings)
        yield counts
    finally:
        for owner, name, own in reversed(kept):
            delattr(owner, name) if own is None else setattr(owner, name, own)


def loss_of(model: Any, batch: dict[str, Any], rng: Any) -> Any:
    return model.loss(batch["ids"], batch["ids"])


def step_times(cupy: Any, make: Callable[[], Any], shape: tuple[int, int], rounds: int) -> dict:
    """A step eager and captured: milliseconds, bytes, what crosses the border, the same bits?

    `make()` gives a model on the device.  Captured steps are those of `fast.capture`; where the
    card's capture refused, `why_eager` says what.
    """
    rng = np.random.default_rng(0)
    batches = [{"ids": cupy.asarray(rng.integers(0, 512, shape))} for _ in range(4)]
    entry: dict[str, Any] = {}
    ends = []
    for way in ("eager", "captured"):
        step = CapturedStep(AdamW(make(), lr=1e-4), loss_of, clip=1.0)
        step.captures &= way == "captured"
        losses = [float(step.run(batches[i % 4], shape[0] * shape[1])) for i in range(6)]
        if way == "eager":
            with crossings(cupy) as counts:
                step.run(batches[0], shape[0] * shape[1])
            entry |= counts
        else:
            step.run(batches[0], shape[0] * shape[1])
            entry["why_eager"] = next(iter(step.eager.values()), None)
            if not step.graphs:
                continue
        ends.append((losses, step.optimizer.flat.data.get().tobytes()))
        times = []
        for i in range(rounds):
            began = time.perf_counter()
            step.run(batches[i % 4], shape[0] * shape[1])
            cupy.cuda.Device().synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        entry |= {f"{way}_ms": sorted(times)[rounds // 2], f"{way}_least_ms": min(times)}
        if step.graphs:
            pool = next(iter(step.graphs.values())).pool
            entry["graph_bytes"] = int(getattr(pool, "total_bytes", lambda: 0)())
    entry["same_bits"] = ends[0] == ends[1] if len(ends) == 2 else None
    pool = getattr(cupy, "get_default_memory_pool", None)
    entry["pool_bytes"] = None if pool is None else int(pool().total_bytes())
    return entry
