"""Between float32 and BF16: what is rounded, once, and what only moves and stays as it is."""

from collections.abc import Callable
from typing import Any

from .backend import is_array
from .bf16 import BF16, BFLOAT16, bits_of, float32_of
from .rules import Rule, rule, wide


@rule
def narrow(xp, values):
    """float32 -> uint16 bits, to the nearest, ties to even."""
    return bits_of(values)


@rule
def summed(xp, a, b):
    """The bits of a + b, rounded once."""
    return bits_of(float32_of(a) + float32_of(b))


def stored_as(like: Any, value: Any) -> Any:
    """`value` as a BF16 if `like` is one, else its numbers."""
    if type(like) is not BF16:
        return wide(value)
    return value if type(value) is BF16 else BF16(narrow(value))


def cast_array(value: Any, dtype: Any) -> Any:
    """The array in another float type, which may be BFLOAT16."""
    return BF16(narrow(wide(value))) if dtype == BFLOAT16 else value.astype(dtype)


def in_two_bytes(value: Any) -> Any:
    """BF16 in place of a float array; a single number, and all else, as it is."""
    if is_array(value) and value.dtype.kind == "f" and value.ndim and type(value) is not BF16:
        return BF16(narrow(value))
    return value


def plus(a: Any, b: Any) -> Any:
    """a + b of two cotangents."""
    return BF16(summed(a.bits, b.bits)) if type(a) is BF16 else a + b


def parts(function: Callable, g: Any) -> Any:
    """`function` of a cotangent, or of each in the tuple that an op with several values gets."""
    return tuple(map(function, g)) if isinstance(g, tuple) else function(g)


def narrowed(pullback: Callable, narrow_ones: bool | tuple[bool, ...]) -> Callable:
    """A pullback made in float32, between cotangents that may be BF16.

    `narrow_ones` says for which arguments they are: a tuple for a pullback of several.
    """
    if isinstance(narrow_ones, tuple):
        return lambda g, wants: [
            BF16(narrow(c)) if n and c is not None else c
            for c, n in zip(pullback(parts(wide, g), wants), narrow_ones, strict=True)
        ]
    if narrow_ones:
        return lambda g: BF16(narrow(pullback(parts(wide, g))))
    return lambda g: pullback(parts(wide, g))


def moves(op: Rule, when: Callable[..., bool] = lambda wants, **options: True) -> Rule:
    """Say that an op only moves entries: of BF16 arguments it moves the bits, and back.

    `when(wants, **options)` says for which calls; the others are run in float32.
    """

    @op.on("numpy bf16", "cupy bf16")
    def _(xp, *arguments, wants, **options):
        if not all(type(a) is BF16 for a in arguments) or not when(wants, **options):
            return NotImplemented
        value, pullbacks = op.specification(xp, *map(bits_in, arguments), **options)
        if getattr(value, "ndim", 1) == 0:  # a number stays float32
            return NotImplemented
        return parts(BF16, value), tuple(
            lambda g, pullback=pullback: BF16(pullback(parts(bits_in, g))) for pullback in pullbacks
        )

    return op


def bits_in(value: Any) -> Any:
    """The array that holds the memory: of a BF16 its bits."""
    return value.bits if type(value) is BF16 else value
