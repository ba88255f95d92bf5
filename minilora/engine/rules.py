"""One rule, many speeds: the readable rule is the specification, faster ones stand beside it."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

from .backend import library_of
from .bf16 import BF16, float32_of
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


def only_reference() -> bool:
    """Are we inside `reference_rules`?"""
    return _only_reference.get()


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
        self.prepared: dict[str, Callable] = {}
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

    def prepared_on(self, library: str) -> Callable[[Callable], Callable]:
        """Register what a recording asks once of a call that it will make many times more.

        Given the arguments and options of the call, of which no gradient is wanted, it returns
        a function of the arguments alone, which gives the value (no pullbacks) and has nothing
        left to check or to find out.  That function may rely on the arguments' dtypes and number
        of axes; an array among the options it reads anew, and what may vary in size it sizes
        anew, or NumPy raises.  `NotImplemented` for a call that it does not take: then the rule
        is run as ever.
        """

        def register(prepare: Callable) -> Callable:
            self.prepared[library] = prepare
            return prepare

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
        key = f"{xp.__name__} bf16" if half else xp.__name__
        fast = None if _only_reference.get() else self.fast.get(key)
        for rule in (fast, None if half else self.specification):
            if rule is None:
                continue
            if rule in self.told_wants:
                value = rule(xp, *arguments, **options, wants=wants)
            else:
                value = rule(xp, *arguments, **options)
            if value is not NotImplemented:
                return value
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


@rule
def widen(xp, bits):
    """uint16 bits -> float32, exactly: what a rule not written for BF16 is given."""
    return float32_of(bits)


def wide(value: Any) -> Any:
    """The float32 numbers of a BF16; anything else as it is."""
    return widen(value.bits) if type(value) is BF16 else value
