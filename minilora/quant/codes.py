"""A code is a short table of levels on [-1, 1], and the rule that the nearest one is taken."""

from collections.abc import Callable, Iterable
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from ..engine.errors import QuantError
from ..model.module import module

# The sixteen float32 numbers that every NF4 file in the world was made with.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@module
class Code:
    """Levels c_0 <= c_1 <= ... on [-1, 1], and the integer that is stored for each.

    A number v has level k if thresholds[k-1] < v <= thresholds[k]: the nearest level, and
    of two that are equally near the lower.  A threshold is the midpoint of its neighbors,
    rounded to float32 as bitsandbytes rounds it.

    `scaled_by` says what brings a block into [-1, 1]:
        "magnitude"  max |x|
        "extreme"    minus the x of largest magnitude, which so falls on the level -1
        "maximum"    max x, of numbers none of which is negative
    """

    name: str
    bits: int  # 4 or 8
    levels: Any  # (K,) float32, ascending
    thresholds: Any  # (K - 1,) float32
    order: Any  # (K,) uint8: what is stored for level k
    table: Any  # (2^bits,) float32: the level that is meant by what is stored
    scaled_by: str


def make(name: str, bits: int, meaning: Iterable[float], scaled_by: str = "magnitude") -> Code:
    """The code whose stored integer i means `meaning[i]`; others mean nothing: NaN."""
    meaning = np.array(meaning, np.float32)
    order = np.argsort(meaning, kind="stable")
    levels = meaning[order]
    table = np.full(2**bits, np.nan, np.float32)
    table[: len(meaning)] = meaning
    thresholds = (levels[1:] + levels[:-1]) / np.float32(2)
    return Code(name, bits, levels, thresholds, order.astype(np.uint8), table, scaled_by)


def normal_levels(outermost: float = 0.9677083) -> np.ndarray:
    """The NF4 levels from the normal quantiles: equally likely numbers, so equally used levels.

        Φ⁻¹ of 8 probabilities falling evenly from `outermost` towards 1/2 (the positive side),
       -Φ⁻¹ of 7 (the negative side), 0 itself; divided by the largest

    The asymmetry buys an exact 0 within sixteen levels.  `outermost` is 1 - (1/32 + 1/30)/2:
    halfway between the outermost probabilities of 16 and of 15 equal slices.  Probabilities
    and quantiles are rounded to float32, which makes the table equal to the published one.
    Source: bitsandbytes functional.py, create_normal_map.  (Equation 4 of the QLoRA paper,
    the mean of neighboring quantiles, starts at Φ⁻¹(0) = -∞ and gives no table at all.)
    """

    def quantiles(count: int) -> list[float]:
        probabilities = evenly(outermost, 0.5, count)[:-1].tolist()
        return [NormalDist().inv_cdf(p) for p in probabilities]

    levels = np.array([-q for q in quantiles(7)] + [0.0] + quantiles(8)[::-1], np.float32)
    return levels / levels.max()


def evenly(start: float, stop: float, steps: int) -> np.ndarray:
    """`steps` + 1 numbers from `start` to `stop` in float32, each reached from the nearer end.

    This is torch.linspace on a CPU with fused multiply-add: the product is not rounded.
    """
    start, stop = np.float32(start), np.float32(stop)
    step = np.float64((stop - start) / np.float32(steps))
    i = np.arange(steps + 1)
    from_start, from_stop = start + step * i, stop - step * (steps - i)
    return np.where(i < (steps + 1) // 2, from_start, from_stop).astype(np.float32)


def dynamic_levels(signed: bool = True) -> np.ndarray:
    """256 levels that spend their bits where they are needed: seven decades, each twice as fine.

        10^(i-6) · (means of the 2^i equal parts of [0.1, 1]),  i = 0..6;  0;  1

    with both signs, or without signs and with twice as many parts.  So -1 is no level: the
    lowest signed one is -0.9929688.  Source: Dettmers, 8-bit Approximations for Parallelism
    in Deep Learning (2015); bitsandbytes functional.py, create_dynamic_map.
    """
    levels = [np.float32([0, 1])]
    for i in range(7):
        edges = evenly(0.1, 1, 2**i if signed else 2 ** (i + 1))
        means = np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2))
        levels += [means, -means] if signed else [means]
    return np.sort(np.concatenate(levels))


def floats(magnitudes: list[float]) -> list[float]:
    """A sign bit before eight magnitudes, scaled to a largest of 1; there are two zeros."""
    magnitudes = np.float32(magnitudes) / np.float32(max(magnitudes))
    return [*magnitudes, 0.0, *-magnitudes[1:]]


def steps(lowest: int, highest: int, unit: int) -> np.ndarray:
    """Evenly spaced levels, `lowest`/`unit` .. `highest`/`unit`."""
    return np.arange(lowest, highest + 1, dtype=np.float32) / np.float32(unit)


CODES: dict[str, Callable[[], Code]] = {
    # NormalFloat: levels equally likely under a bell curve.
    "nf4": lambda: make("nf4", 4, NF4),
    # bitsandbytes' own four-bit float, in the order of its bits; its smallest level is 1/192.
    "fp4": lambda: make("fp4", 4, floats([0, 0.0625, 8, 12, 4, 6, 2, 3])),
    # The four-bit float of the OCP microscaling standard: 2 exponent bits, 1 mantissa bit.
    "e2m1": lambda: make("e2m1", 4, floats([0, 0.5, 1, 1.5, 2, 3, 4, 6])),
    # -7..7: one of the sixteen integers is given up for symmetry.
    "int4": lambda: make("int4", 4, steps(-7, 7, 7)),
    # -8..7, the scale having the sign that puts the extreme on -8 (GGUF Q4_0 does this).
    "int4_max": lambda: make("int4_max", 4, steps(-8, 7, 8), "extreme"),
    "int8": lambda: make("int8", 8, steps(-127, 127, 127)),
    # For scales of scales, and for the first and second moment of 8-bit Adam.
    "dynamic": lambda: make("dynamic", 8, dynamic_levels()),
    "dynamic_unsigned": lambda: make("dynamic_unsigned", 8, dynamic_levels(False), "maximum"),
}


@cache
def code(name: str) -> Code:
    """The code of that name, with tables on the host; always the same object.

    Errors: `QuantError` for a name that is not in `CODES`.
    """
    if name not in CODES:
        raise QuantError(f"code: expected one of {', '.join(CODES)}, found {name!r}")
    return CODES[name]()
