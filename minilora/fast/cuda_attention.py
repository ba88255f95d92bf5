"""Attention on a card: flash attention out and back, and a kernel of its own for decoding."""

import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from ..engine.attention import attention
from ..engine.bf16 import empty
from ..engine.graph import together
from .cuda import Kernels, contiguous, storage

TILE, CHUNK = 64, 128  # of the kernels: query or key rows of a block; keys of a block that decodes
FEW = 8  # queries a row, up to which each gets blocks of its own
BACK = ("delta", "backward_q", "backward_kv")
WAYS = ("forward", "cached", *BACK)
LANES = (8, 16, 32)  # to a key when decoding, four channels each

FILES = {
    "float": "attention_parts.cu attention.cu attention_backward.cu",
    "bf16": "attention_parts.cu attention_mma.cu attention_backward_mma.cu",
}


def kernel(way: str, E: str, width: int) -> str:
    """The kernel for float, or for bf16 the one on tensor cores."""
    if E == "bf16":
        return f"attention_{way}_mma<{width}>"
    return "attention_delta" if way == "delta" else f"attention_{way}<{width}>"


tiled = {
    (E, width): Kernels(file, *(kernel(way, E, width) for way in WAYS))
    for E, file in FILES.items()
    for width in (32, 64, 96, 128)
}
decoding = {
    E: Kernels(
        "decode_attention.cu", *(f"attention_decode<{E}, {n}>" for n in LANES),
        f"attention_combine<{E}>",
    )
    for E in FILES
}  # fmt: skip


def shared_bytes(way: str, E: str, width: int) -> int:
    """Dynamic shared memory of a block: its tiles, in float32 with rows of width + 4 and weights
    of 64 + 16, in bfloat16 with rows of width + 8."""
    rows = backward_rows(E, width)
    back = way in BACK
    if E == "bf16":
        return 2 * (3 + back) * TILE * (width + 8)
    if not back:
        return 4 * (2 * TILE * (width + 4) + TILE * (TILE + 16))
    return 4 * (2 * (rows + TILE) * (width + 4) + rows * (TILE + 16))


def backward_rows(E: str, width: int) -> int:
    """Queries of a tile on the way back."""
    return 32 if E == "float" and width > 64 else 64


def multiplies_bf16(xp: ModuleType) -> bool:
    """Has the card tensor cores for bfloat16?  From compute capability 8.0 on."""
    return int(getattr(xp.cuda.Device(), "compute_capability", 80)) >= 80


@cache
def fits(compiler: Any, E: str, width: int, way: str) -> bool:
    """Can a block have its shared memory on this card?  More than 48 KiB must be asked for."""
    function = tiled[E, width].compiled[compiler][kernel(way, E, width)]
    try:
        function.max_dynamic_shared_size_bytes = shared_bytes(way, E, width)
    except RuntimeError:  # CuPy's CUDADriverError
        return False
    return True


def strided(xp: ModuleType, a: Any) -> Any:
    """`a` (N, T, H, D) where its last axis is contiguous, as in a view of packed heads; else a
    copy."""
    plain = a.strides[3] == a.itemsize and min(a.strides) >= 0
    return a if plain else contiguous(xp, a)


def strides(*arrays: Any) -> list[int]:
    """Of rows, time and heads, in entries: three numbers for each array."""
    return [s // a.itemsize for a in arrays for s in a.strides[:3]]


@attention.on("cupy", "cupy bf16")
def _(xp, q, k, v, *, positions=None, tile=64, wants):
    """Keeps q, k, v, the output and the log-sum-exps.  With positions, for a frozen model only."""
    if storage(q, k, v) is None or not q.ndim == k.ndim == 4:
        return NotImplemented
    N, T, H, D = q.shape
    S, K = k.shape[1:3]
    if k.shape != v.shape or k.shape[::3] != (N, D) or H % K or D > 128:
        return NotImplemented  # wide heads, or an error that the specification names
    if positions is None:
        return flash(xp, q, k, v, wants) if T == S else NotImplemented
    if any(wants) or positions.dtype != np.int64 or positions.shape != (N, T):
        return NotImplemented
    positions = xp.ascontiguousarray(positions)
    few = T <= FEW and N < 65536
    return decode(xp, q, k, v, positions) if few else flash(xp, q, k, v, wants, positions)


def flash(xp, q, k, v, wants, positions=None):
    """Tiles of queries against tiles of keys, out and back."""
    N, T, H, D = q.shape
    S, K = k.shape[1:3]
    E, width, scale = storage(q), -(-D // 32) * 32, 1 / math.sqrt(D)
    if E == "bf16" and not multiplies_bf16(xp):
        return NotImplemented
    launch = tiled[E, width].on(xp)
    way = "forward" if positions is None else "cached"
    needed = (way, *BACK) if any(wants) else (way,)
    if launch is None or not all(fits(xp.RawModule, E, width, way) for way in needed):
        return NotImplemented

    def run(way, blocks, rows, *arguments):
        grid, shared = (blocks, -(-T // rows)), shared_bytes(way, E, width)
        launch(kernel(way, E, width), grid, 128, *arguments, scale, shared=shared)

    out, lse = empty(xp, q.shape, q.dtype), xp.empty((N, H, T), xp.float32)
    arrays = [strided(xp, a) for a in (q, k, v)]
    if positions is None:
        run(way, N * H, TILE, *arrays, out, lse, *strides(*arrays), T, H, K, D)
    else:
        run(way, N * H, TILE, *arrays, positions, out, lse, *strides(*arrays), T, S, H, K, D)

    def pullback(g, wants):
        g = strided(xp, g if E == "bf16" else g.astype(xp.float32, copy=False))
        delta = xp.empty(lse.shape, xp.float32)
        arrays = [*(strided(xp, a) for a in (q, k, v)), g]
        sizes = (*strides(*arrays), T, H, K, D)
        if E == "bf16":
            run("delta", N * H, TILE, *arrays, out, lse, delta, *sizes)
        else:
            rows = N * T * H
            launch("attention_delta", -(-rows // 4), 128, g, out, delta, *strides(g), T, H, D, rows)
        dq = dk = dv = None
        if wants[0]:
            dq = empty(xp, q.shape, q.dtype)
            run("backward_q", N * H, backward_rows(E, width), *arrays, lse, delta, dq, *sizes)
        if wants[1] or wants[2]:
            dk, dv = empty(xp, k.shape, k.dtype), empty(xp, v.shape, v.dtype)
            run("backward_kv", N * K, TILE, *arrays, lse, delta, dk, dv, *sizes)
        return dq, dk, dv

    return out, together(pullback)


def decode(xp, q, k, v, positions):
    """A few queries over a cache: blocks by chunks of keys, then the chunks in order."""
    E = storage(q)
    launch = decoding[E].on(xp)
    if launch is None:
        return NotImplemented
    N, T, H, D = q.shape
    S, K = k.shape[1:3]
    chunks = -(-S // CHUNK)
    lanes = next(n for n in LANES if 4 * n >= D)
    parts = xp.empty((N * T, H, chunks, D + 2), xp.float32)
    out = empty(xp, q.shape, q.dtype)
    arrays = [strided(xp, a) for a in (q, k, v)]
    launch(f"attention_decode<{E}, {lanes}>", (chunks, T * H, N), 128, *arrays, positions, parts,
           *strides(*arrays), T, S, H, K, D, 1 / math.sqrt(D))  # fmt: skip
    launch(f"attention_combine<{E}>", (H, N * T), 128, parts, positions, out, chunks, S, H, D)
    return out, None
