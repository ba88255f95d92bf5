"""A function made of rules, run again without the Python between them."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from .backend import address_of, is_array
from .bf16 import BF16
from .rounding import bits_in
from .rules import Call, Rule, only_reference, written_down
from .tensor import Op


class Recorded:
    """`function()`, of which from the third run on only the rules are run.

    Which rule is next and where its arguments come from, Python finds out anew in each run,
    though for a model that writes tokens it is the same every time.  Two runs are written down
    and compared.  If they made the same calls, each argument being either the value of the same
    call before it or an array at the same address, these calls are all that a later run makes;
    else every run is the function's, and `why_not` says why.

    The function takes what changes from run to run out of arrays that stay where they are, and
    returns an array that a rule made; it wants no gradient.  All that it does with arrays, it
    does by rules: an array made otherwise is noticed, one changed in place otherwise is not.
    """

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.before: list[Call] | None = None  # of the first run
        self.steps: list[Step] | None = None
        self.reference = False  # were the steps recorded inside `reference_rules`?
        self.why_not: str | None = None

    def __call__(self) -> Any:
        if self.steps is not None and only_reference() == self.reference:
            return self.replay()
        if self.steps is not None or self.why_not is not None:
            return self.function()
        with written_down() as calls:
            value = self.function()
        if self.before is None:  # kept, so that nothing of the second run stands where it stood
            self.before = calls
            return value
        try:
            self.steps, self.result = steps_of(self.before, calls, value)
            self.reference = only_reference()
        except LookupError as error:
            self.steps, self.why_not = None, str(error)
        self.before = None
        return value

    def replay(self) -> Any:
        made: list[Any] = []
        for call, arguments, from_before, options, late in self.steps:
            given = arguments.copy()
            for place, slot in from_before:
                given[place] = made[slot]
            if late:
                options = options | {name: made[slot] for name, slot in late}
            made += call(given, options)
        return made[self.result]


class Step(NamedTuple):
    """A call to make again: what stays, and for the rest the number of the value it was."""

    call: "Again"
    arguments: list
    from_before: list[tuple[int, int]]  # (place among the arguments, number of a value)
    options: dict
    late: list[tuple[str, int]]  # (name of an option, number of a value)


class Again:
    """The outputs of a rule that takes the same kinds of arguments every time.

    The function of the rule that is asked first is found once; where it declines, the rule is
    run as ever.
    """

    def __init__(self, rule: Rule, xp: ModuleType, arguments: Sequence, wants: tuple):
        self.rule, self.xp, self.wants = rule, xp, wants
        self.function = rule.first(xp, BF16 in map(type, arguments))
        self.told = {"wants": wants} if self.function in rule.told_wants else {}

    def __call__(self, given: list, options: dict) -> tuple:
        value = NotImplemented
        if self.function is not None:
            value = self.function(self.xp, *given, **options, **self.told)
        if value is NotImplemented:
            value = self.rule.run(self.xp, given, options, self.wants)
        return outputs(self.rule, value)


def outputs(rule: Rule, value: Any) -> tuple:
    """The arrays in what a rule returned, in order."""
    if isinstance(rule, Op):
        value = value[0]
    return value if isinstance(value, tuple) else (value,)


def slots_of(calls: list[Call]) -> dict[int, int]:
    """{id of an array: which of all values it is, counted in order}."""
    values = [value for call in calls for value in outputs(call.rule, call.value)]
    return {id(value): slot for slot, value in enumerate(values) if is_array(value)}


def steps_of(first: list[Call], second: list[Call], value: Any) -> tuple[list[Step], int]:
    """The calls that both runs made, and which of all values the second's `value` is.

    Errors: `LookupError` saying where the runs differ, or that no rule made the value.
    """
    if [call.rule for call in first] != [call.rule for call in second]:
        raise LookupError("two runs called different rules")
    slots, slots_now = slots_of(first), slots_of(second)
    steps = []
    for a, b in zip(first, second, strict=True):
        if True in a.wants or a.wants != b.wants:
            raise LookupError(f"{a.rule.__name__}: a gradient is wanted")
        if len(a.arguments) != len(b.arguments) or a.options.keys() != b.options.keys():
            raise LookupError(f"{a.rule.__name__}: other arguments were given")
        pairs = [*zip(a.arguments, b.arguments, strict=True)]
        pairs += [(value, b.options[name]) for name, value in a.options.items()]
        came_from = []
        for one, other in pairs:
            slot = slots.get(id(one))
            if slot != slots_now.get(id(other)) or (slot is None and not same(one, other)):
                raise LookupError(f"{a.rule.__name__}: an argument that no rule made changed")
            came_from.append(slot)
        n = len(a.arguments)
        from_before = [(i, slot) for i, slot in enumerate(came_from[:n]) if slot is not None]
        late = [(k, s) for k, s in zip(a.options, came_from[n:], strict=True) if s is not None]
        again = Again(b.rule, b.xp, b.arguments, b.wants)
        steps.append(Step(again, list(b.arguments), from_before, b.options, late))
    if (result := slots_now.get(id(value))) is None:
        raise LookupError("what the function returns, no rule made")
    return steps, result


def same(one: Any, other: Any) -> bool:
    """The same memory seen the same way, the same object, or equal plain values?"""
    if one is other:
        return True
    if is_array(one) and is_array(other):
        return where(one) == where(other)
    if type(one) is not type(other) or is_array(one):
        return False
    if isinstance(one, (tuple, list)):  # an index, say, which may hold arrays
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def where(array: Any) -> tuple:
    array = bits_in(array)
    return address_of(array), array.shape, array.strides, array.dtype
