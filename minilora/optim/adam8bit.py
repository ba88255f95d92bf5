"""Adam whose two moments take a byte each: blocks of 256, two codes made for long tails."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..engine.backend import device_of, xp_of
from ..engine.errors import MiniloraError
from ..engine.rules import rule
from ..model.module import to_device
from ..quant.codes import Code
from ..quant.codes import code as code_named
from .flat import FACTOR, LR, NORM, STEP, Flat, Group, Grouping, Stepper, by_shape

BLOCK = 256
SMALL = 4096  # a parameter of fewer entries keeps float32 moments, as in bitsandbytes


def moved(xp: Any, p: Any, g: Any, m: Any, v: Any, control: Any, betas, eps, decay, lr_factor):
    """(p, m, v) after one step in the order of bitsandbytes: the decay comes last.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g², at most what float32 can hold
    p = (p - lr √(1 - b2ᵗ) / (1 - b1ᵗ) · m / (√v + √(1 - b2ᵗ) eps)) (1 - lr decay)
    """
    b1, b2 = betas
    lr, t = control[LR] * lr_factor, control[STEP] + 1
    root = xp.sqrt(1 - b2**t)
    rate = (lr * root / (1 - b1**t)).astype(p.dtype)
    shrink, eps = (1 - lr * decay).astype(p.dtype), (root * eps).astype(p.dtype)
    g = g * control[FACTOR].astype(p.dtype)
    m = b1 * m + (1 - b1) * g
    with np.errstate(over="ignore"):  # of an infinite scale the rest of a block would be NaN
        v = xp.minimum(b2 * v + (1 - b2) * (g * g), np.finfo(np.float32).max)
    return (p - rate * (m / (xp.sqrt(v) + eps))) * shrink, m, v


@rule
def adamw8bit_update(
    xp: Any, p: Any, g: Any, m: Any, v: Any, scales_m: Any, scales_v: Any, control: Any, *,
    signed: Code, unsigned: Code, betas: Any, eps: float, decay: float, lr_factor: float = 1.0,
) -> None:  # fmt: skip
    """Decode both moments, step, encode them again with the new largest magnitude of each block.

    p g (n,) float32; m v (n,) uint8; scales (ceil(n / 256),) float32; all in place.  A first
    moment that would be rounded to a level of the other sign takes the next one of its own.
    Nothing is written where the gradient's norm is not finite: bitsandbytes zeroes the moments
    there instead.  (Dettmers et al. 2021; kernels.cu, kOptimizerStatic8bit2StateBlockwise.)
    """
    finite = xp.isfinite(control[NORM])
    old_m = decoded(xp, m, scales_m, signed)
    old_v = decoded(xp, v, scales_v, unsigned)
    new_p, new_m, new_v = moved(xp, p, g, old_m, old_v, control, betas, eps, decay, lr_factor)
    codes_m, peaks_m = encoded(xp, new_m, signed)
    codes_v, peaks_v = encoded(xp, new_v, unsigned)
    crossed = xp.signbit(signed.table[codes_m]) != xp.signbit(new_m)
    aside = xp.where(new_m > 0, 1, -1) * crossed
    codes_m = (codes_m.astype(xp.int16) + aside).astype(xp.uint8)
    for old, new in (
        (p, new_p), (m, codes_m), (v, codes_v), (scales_m, peaks_m), (scales_v, peaks_v),
    ):  # fmt: skip
        xp.copyto(old, new, where=finite)


def decoded(xp: Any, codes: Any, scales: Any, code: Code) -> Any:
    """scale · level, entry by entry, (n,) float32."""
    wide = xp.broadcast_to(scales[:, None], (scales.size, BLOCK)).reshape(-1)
    return code.table[codes] * wide[: codes.size]


def encoded(xp: Any, x: Any, code: Code) -> tuple[Any, Any]:
    """Codes (n,) of x / scale, and the scales: the largest magnitude of each block."""
    n = x.size
    rows = xp.zeros(-(-n // BLOCK) * BLOCK, x.dtype)
    rows[:n] = x
    rows = rows.reshape(-1, BLOCK)
    peaks = abs(rows).max(axis=1)
    scaled = rows / xp.where(peaks > 0, peaks, 1)[:, None]
    return code.order[xp.searchsorted(code.thresholds, scaled.reshape(-1)[:n])], peaks


def stretches(flat: Flat) -> Iterator[tuple[list[str], Group]]:
    """Neighbors of one group that one update serves, by path."""
    for part, group in flat.parts:
        paths: list[str] = []
        for path, span in flat.spans.items():
            if part.start <= span.start < part.stop:
                if paths and not goes_on(flat.spans[paths[-1]], span):
                    yield paths, group
                    paths = []
                paths.append(path)
        if paths:
            yield paths, group


def goes_on(before: slice, after: slice) -> bool:
    """Have both float32 moments, or both 8-bit ones whose blocks do not run across?"""
    n, following = before.stop - before.start, after.stop - after.start
    return following < SMALL if n < SMALL else following >= SMALL and n % BLOCK == 0


class AdamW8bit(Stepper):
    """AdamW with 8-bit moments: 2 + 2 · 4 / 256 = 2.03125 bytes a number instead of 8.

    Parameters with fewer than 4,096 entries keep float32 moments (bitsandbytes' rule): most
    factors of small adapters do, and save nothing.  `state_bytes` counts.
    Errors: `MiniloraError` for parameters that are not float32.
    """

    def __init__(
        self,
        model: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        groups: Grouping = by_shape,
    ):
        super().__init__(model, lr, groups, betas=betas, eps=eps, weight_decay=weight_decay)
        flat = self.flat
        if flat.data.dtype != np.float32:
            raise MiniloraError(f"AdamW8bit: expected float32 parameters, found {flat.data.dtype}")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        xp = xp_of(flat.data)
        device = device_of(flat.data)
        self.signed, self.unsigned = (
            to_device(code_named(name), device) for name in ("dynamic", "dynamic_unsigned")
        )
        zero_m, zero_v = (int(np.flatnonzero(code_named(n).table == 0)[0])
                          for n in ("dynamic", "dynamic_unsigned"))  # fmt: skip
        self.stretches: list[tuple[slice, Group, dict[str, Any]]] = []  # with their moments
        self.moments: dict[str, dict[str, Any]] = {}  # by path, as views of those
        for paths, group in stretches(flat):
            start, stop = flat.spans[paths[0]].start, flat.spans[paths[-1]].stop
            n = stop - start
            if flat.spans[paths[0]].stop - start < SMALL:
                arrays = {k: xp.zeros(n, xp.float32) for k in ("m", "v")}
            else:
                arrays = {
                    "m": xp.full(n, zero_m, xp.uint8),
                    "v": xp.full(n, zero_v, xp.uint8),
                    "scales_m": xp.zeros(-(-n // BLOCK), xp.float32),
                    "scales_v": xp.zeros(-(-n // BLOCK), xp.float32),
                }
            self.stretches.append((slice(start, stop), group, arrays))
            for path in paths:
                first, last = flat.spans[path].start - start, flat.spans[path].stop - start
                blocks = slice(first // BLOCK, -(-last // BLOCK))
                self.moments[path] = {
                    kind: a[blocks if kind.startswith("scales") else slice(first, last)]
                    for kind, a in arrays.items()
                }

    @property
    def state_bytes(self) -> int:
        """Bytes of all moments and their scales."""
        return sum(a.nbytes for arrays in self.moments.values() for a in arrays.values())

    def step(self, divide_by: float = 1, clip: float | None = None) -> None:
        """Apply the gradient gathered so far, and clear it; see `AdamW.step`."""
        self.measure(divide_by, clip)
        for span, group, moments in self.stretches:
            options = {
                "betas": self.betas,
                "eps": self.eps,
                "decay": self.weight_decay * group.decay,
                "lr_factor": group.lr,
            }
            self.update(self.flat.data[span], self.flat.grad[span], moments, options)
        self.count_step()

    def update(self, p: Any, g: Any, moments: dict[str, Any], options: dict[str, Any]) -> None:
        """One stretch, its entries in a row."""
        m, v = moments["m"], moments["v"]
        if m.dtype == np.uint8:
            adamw8bit_update(
                p, g, m, v, moments["scales_m"], moments["scales_v"], self.control,
                signed=self.signed, unsigned=self.unsigned, **options,
            )  # fmt: skip
            return
        xp = xp_of(p)
        finite = xp.isfinite(self.control[NORM])
        for old, new in zip((p, m, v), moved(xp, p, g, m, v, self.control, **options), strict=True):
            xp.copyto(old, new, where=finite)

    def arrays(self) -> dict[str, Any]:
        """Codes, scales and float32 moments by path, and the control numbers."""
        return {"control": self.control} | {
            f"{kind}.{path}": array
            for path, arrays in self.moments.items()
            for kind, array in arrays.items()
        }
