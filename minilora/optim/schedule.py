"""How the learning rate moves: up over a warm-up, then down, or not."""

import math
from collections.abc import Callable

from ..engine.errors import MiniloraError, expect_whole, is_number

SHAPES = ("constant", "linear", "cosine")


def schedule(shape: str, steps: int, warmup: float = 0.0) -> Callable[[int], float]:
    """A function from the step (0, 1, ...) to the factor on the learning rate.

    The factor climbs linearly over the first `warmup` share of the steps, then stays at 1
    ("constant"), or falls to 0 at the end along a line ("linear") or half a cosine ("cosine").
    Errors: `MiniloraError` for another shape, or steps or a share out of range.
    """
    expect_whole("schedule: steps", steps, 0)
    if shape not in SHAPES or not is_number(warmup) or not 0 <= warmup <= 1:
        raise MiniloraError(
            f"schedule: expected a shape of {SHAPES} and 0 <= warmup <= 1, "
            f"found {shape!r} and {warmup}"
        )
    climb = round(warmup * steps)

    def factor(step: int) -> float:
        if step < climb:
            return (step + 1) / climb
        done = (step - climb) / max(1, steps - climb)
        if shape == "linear":
            return max(0.0, 1 - done)
        if shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    return factor
