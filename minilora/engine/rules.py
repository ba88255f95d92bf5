"""One rule, many speeds: the readable rule is the specification, faster ones stand beside it."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

from .backend import is_array, library_of
from .bf16 import BF16, BFLOAT16, bits_of, float32_of
from .errors import MiniloraError

_only_reference: ContextVar[bool] = ContextVar("only_reference", default=False)
_written: "ContextVar[list[Call] | None]" = ContextVar("written", default=None)


@contextmanager
def reference_rules() -> Iterator[None]:
    """Inside, every rule runs its specification.  Carried along by `copy_context`."""
    token = _only_reference.set(True)
    try:
        yield
    finally:
        _only_reference.reset(token)


class Call(NamedTuple):
    """One run of a rule: what it was given, and what it returned."""

    rule: "Rule"
    xp: ModuleType
    arguments: Sequence
    options: dict
    wants: tuple
    value: Any


@contextmanager
def written_down() -> Iterator[list[Call]]:
    """Inside, every run of a rule is added to the list, but for those that a rule makes itself."""
    calls: list[Call] = []
    token = _written.set(calls)
    try:
        yield calls
    finally:
        _written.reset(token)


class Rule:
    """A function `f(xp, *arrays, **options)`, and faster ones for single libraries.

    The library of the first positional array chooses; an array of another
    library among the arguments raises.  A fast rule returns `NotImplemented`
    for what it does not take, and the specification answers.  What no rule for
    BF16 arguments takes is asked again in float32.
    """

    def __init__(self, specification: Callable):
        self.specification = specification
        self.fast: dict[str, Callable] = {}
        self.__name__ = specification.__name__
        self.__doc__ = specification.__doc__
        self.__module__ = specification.__module__
        self.__wrapped__ = specification
        self.told_wants = {specification} if declares_wants(specification) else set()

    def on(self, *libraries: str) -> Callable[[Callable], Callable]:
        """Register a faster rule for the arrays of a library ("numpy", "cupy"), or for calls
        with BF16 among its positional arguments ("numpy bf16", "cupy bf16")."""

        def register(rule: Callable) -> Callable:
            self.fast.update(dict.fromkeys(libraries, rule))
            if declares_wants(rule):
                self.told_wants.add(rule)
            return rule

        return register

    def run(self, xp: ModuleType, arguments: Sequence, options: dict, wants: tuple = ()) -> Any:
        """The value of the rule that applies: the fast one, or the specification.

        `wants` says which arguments want a gradient, to a rule that declares it.
        """
        if (calls := _written.get()) is not None:
            token = _written.set(None)
            try:
                value = self.run(xp, arguments, options, wants)
            finally:
                _written.reset(token)
            calls.append(Call(self, xp, arguments, options, wants, value))
            return value
        half = BF16 in map(type, arguments)
        last = None if half else self.specification
        rule = self.fast.get(f"{xp.__name__} bf16" if half else xp.__name__)
        if rule is None or _only_reference.get():
            rule = last
        while rule is not None:
            if rule in self.told_wants:
                value = rule(xp, *arguments, **options, wants=wants)
            else:
                value = rule(xp, *arguments, **options)
            if value is not NotImplemented:
                return value
            rule = None if rule is last else last
        if half:
            return self.rounded(self.run(xp, list(map(wide, arguments)), options, wants), arguments)
        raise MiniloraError(f"{self.__name__}: no rule takes these arguments")

    def rounded(self, value: Any, arguments: Sequence) -> Any:
        """What float32 gave to a call with BF16 arguments: codes and scales stay as they are."""
        return value

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.run(common_library(self.__name__, arguments, options), arguments, options)

    def __repr__(self) -> str:
        return f"<rule {self.__name__}, fast on: {', '.join(self.fast) or 'none'}>"


def declares_wants(rule: Callable) -> bool:
    return "wants" in inspect.signature(rule).parameters


def rule(specification: Callable) -> Rule:
    """Turn `f(xp, *arrays, **options)` into a function whose arrays pick the library."""
    return Rule(specification)


def common_library(name: str, arguments: Sequence, options: dict) -> ModuleType:
    """The one library of all arrays given.  Errors: none given, or two libraries."""
    found = None
    for value in (*arguments, *options.values()) if options else arguments:
        library = library_of(type(value))
        if library == "BF16":
            library = library_of(type(value.bits))
        if library is None or library == found:
            continue
        if found is not None:
            raise MiniloraError(
                f"{name}: arrays of {found} and {library} meet; "
                "move them to one device with to_device"
            )
        found = library
    if found is None:
        raise MiniloraError(f"{name}: expected at least one array, found none")
    return sys.modules[found]


# ------------------------------------------------------------ between BF16 and float32


@rule
def widen(xp, bits):
    """uint16 bits -> float32, exactly."""
    return float32_of(bits)


@rule
def narrow(xp, values):
    """float32 -> uint16 bits, to the nearest, ties to even."""
    return bits_of(values)


@rule
def summed(xp, a, b):
    """The bits of a + b, rounded once."""
    return bits_of(float32_of(a) + float32_of(b))


def wide(value: Any) -> Any:
    """The float32 numbers of a BF16; anything else as it is."""
    return widen(value.bits) if type(value) is BF16 else value


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


def rounding(pullback: Callable, narrow_ones: bool | tuple[bool, ...]) -> Callable:
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
