"""The scales are numbers too: quantize them, around their mean, in blocks of their own."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ..engine.backend import is_array, to_numpy
from ..engine.errors import QuantError
from ..model.module import module
from .blockwise import QuantizedArray, quantize_array

BLOCK = 256  # scales that share one scale of scales


@module
class DoubleScales:
    """s_b = offset + s'_(b // 256) c_(q_b)   with the signed 8-bit dynamic code c

    8/B + 32/(256 B) bits per weight instead of 32/B: 0.127 instead of 0.5 at B = 64.  A scale
    far below the others may come back negative, by half a step of c at most.
    Source: QLoRA section 3; bitsandbytes functional.py, quantize_4bit (the paper says FP8).
    """

    residual: QuantizedArray  # (ceil(n / B),): what is left without the offset
    offset: float  # a float32, kept on the host: an argument, not an array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.residual.shape

    @property
    def dtype(self) -> np.dtype:
        return self.residual.dtype

    @property
    def nbytes(self) -> int:
        return self.residual.nbytes

    def dense(self, out: Any = None) -> Any:
        """The float32 scales."""
        out = self.residual.dense(out)
        out += self.offset
        return out


def mean_scale(scales: Any) -> float:
    """The mean in float32, from a correctly rounded sum on the host.

    The order of the scales, chunks, threads and the device cannot change it.
    """
    return float(np.float32(math.fsum(to_numpy(scales).tolist()) / max(1, scales.size)))


def double_quantize(array: QuantizedArray) -> QuantizedArray:
    """The same codes, with scales that are quantized in turn.

    Errors: `QuantError` if they are already.
    """
    if not is_array(array.scales):
        raise QuantError("scales: expected float32 scales, found scales that are quantized already")
    offset = mean_scale(array.scales)
    residual = quantize_array(array.scales - offset, "dynamic", BLOCK)
    return replace(array, scales=DoubleScales(residual, offset))
