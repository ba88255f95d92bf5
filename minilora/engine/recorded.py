"""A function made of rules, run again without the Python between them."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

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
            self.steps, self.constants, self.result = steps_of(self.before, calls, value)
            self.reference = only_reference()
        except LookupError as error:
            self.steps, self.why_not = None, str(error)
        self.before = None
        return value

    def replay(self) -> Any:
        values = self.constants.copy()
        for step in self.steps:
            values += step(values)
        return values[self.result]


class Step:
    """A call to make again: the arrays that it returns, from the list of all values so far.

    `places` says where in that list the arguments stand, `late` where the options that change.
    The function of the rule that is asked first is found once; where it declines, the rule is
    run as ever.
    """

    def __init__(self, call: Call, places: list[int], late: dict[str, int]):
        self.rule, self.xp, self.options, self.wants = call.rule, call.xp, call.options, call.wants
        self.late = late
        several = len(places) > 1  # else itemgetter gives no tuple
        self.pick = itemgetter(*places) if several else lambda values: [values[p] for p in places]
        self.function = call.rule.first(call.xp, BF16 in map(type, call.arguments))
        told = {"wants": call.wants} if self.function in call.rule.told_wants else {}
        self.given = call.options | told

    def __call__(self, values: list) -> tuple:
        arguments, given, value = self.pick(values), self.given, NotImplemented
        if self.late:
            given = given | self.options_made(values)
        if self.function is not None:
            value = self.function(self.xp, *arguments, **given)
        if value is NotImplemented:
            options = self.options | self.options_made(values)
            value = self.rule.run(self.xp, arguments, options, self.wants)
        return outputs(self.rule, value)

    def options_made(self, values: list) -> dict[str, Any]:
        return {name: values[place] for name, place in self.late.items()}


def outputs(rule: Rule, value: Any) -> tuple:
    """The arrays in what a rule returned, in order."""
    if isinstance(rule, Op):
        value = value[0]
    return value if isinstance(value, tuple) else (value,)


def slots_of(calls: list[Call]) -> dict[int, int]:
    """{id of an array: which of all values it is, counted in order}."""
    values = [value for call in calls for value in outputs(call.rule, call.value)]
    return {id(value): slot for slot, value in enumerate(values) if is_array(value)}


def steps_of(first: list[Call], second: list[Call], value: Any) -> tuple[list[Step], list, int]:
    """The calls that both runs made, the arguments that stay, and the place of `value`, which the
    second run gave, in the list of what stays followed by what is made.

    Errors: `LookupError` saying where the runs differ, or that no rule made the value.
    """
    if [call.rule for call in first] != [call.rule for call in second]:
        raise LookupError("two runs called different rules")
    slots, slots_now = slots_of(first), slots_of(second)
    made = sum(len(call.arguments) for call in second)  # the place of the first value that is made
    steps: list[Step] = []
    constants: list[Any] = []
    for a, b in zip(first, second, strict=True):
        if True in a.wants or a.wants != b.wants:
            raise LookupError(f"{a.rule.__name__}: a gradient is wanted")
        if len(a.arguments) != len(b.arguments) or a.options.keys() != b.options.keys():
            raise LookupError(f"{a.rule.__name__}: other arguments were given")
        places, late = [], {}
        for one, other in zip(a.arguments, b.arguments, strict=True):
            slot = came_from(a.rule, one, other, slots, slots_now)
            places.append(len(constants) if slot is None else made + slot)
            constants.append(other if slot is None else None)
        for name, one in a.options.items():
            slot = came_from(a.rule, one, b.options[name], slots, slots_now)
            if slot is not None:
                late[name] = made + slot
        steps.append(Step(b, places, late))
    if (result := slots_now.get(id(value))) is None:
        raise LookupError("what the function returns, no rule made")
    return steps, constants, made + result


def came_from(rule: Rule, one: Any, other: Any, slots: dict, slots_now: dict) -> int | None:
    """Which of all values an argument was, the same in both runs; None if it stays as it is."""
    slot = slots.get(id(one))
    if slot != slots_now.get(id(other)) or (slot is None and not same(one, other)):
        raise LookupError(f"{rule.__name__}: an argument that no rule made changed")
    return slot


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
