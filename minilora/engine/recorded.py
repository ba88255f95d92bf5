"""A function made of rules, run again without the Python between them."""

from collections.abc import Callable, Sequence
from operator import itemgetter
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
    call before it or an array at the same address, these calls are all that a later run makes,
    each by what its rule has prepared (`Rule.prepared_on`); else every run is the function's,
    and `why_not` says why.

    The function takes what changes from run to run out of arrays that stay where they are, and
    returns an array that a rule made; it wants no gradient.  All that it does with arrays, it
    does by rules: an array made otherwise is noticed, one changed in place otherwise is not.
    """

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.before: list[Call] | None = None  # of the first run
        self.program: Program | None = None
        self.reference = False  # was the program written inside `reference_rules`?
        self.why_not: str | None = None

    def __call__(self) -> Any:
        if self.program is not None and only_reference() == self.reference:
            return self.program.run()
        if self.program is not None or self.why_not is not None:
            return self.function()
        with written_down() as calls:
            value = self.function()
        if self.before is None:  # kept, so that nothing of the second run stands where it stood
            self.before = calls
            return value
        try:
            self.program = program_of(self.before, calls, value)
            self.reference = only_reference()
        except LookupError as error:
            self.why_not = str(error)
        self.before = None
        return value


class Step(NamedTuple):
    """A call to make again: `function` of what `pick` takes out of all values so far."""

    rule: Rule
    function: Callable
    pick: Callable[[list], Sequence]


class Program(NamedTuple):
    """Steps that start from the arguments that stay; which of all values is the result."""

    constants: list
    steps: list[Step]
    result: int

    def run(self) -> Any:
        values = self.constants.copy()
        for _, function, pick in self.steps:
            value = function(*pick(values))
            if type(value) is tuple:  # of an op with several
                values += value
            else:
                values.append(value)
        return values[self.result]


def picker(places: list[int]) -> Callable[[list], Sequence]:
    """values -> the values at these places, in the compiled code of Python's own."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def function_of(call: Call, late: list[str]) -> Callable:
    """The call as a function of its arguments, followed by the options named in `late`.

    What was prepared for it; else the rule is run as ever.
    """
    rule, xp, options, wants = call.rule, call.xp, call.options, call.wants
    takes = not (late or only_reference() or BF16 in map(type, call.arguments))
    if takes and xp.__name__ in rule.prepared:
        function = rule.prepared[xp.__name__](*call.arguments, **options)
        if function is not NotImplemented:
            return function
    count = len(call.arguments)

    def again(*values: Any) -> Any:
        given = options | dict(zip(late, values[count:], strict=True))
        return without_pullbacks(rule, rule.run(xp, values[:count], given, wants))

    return again


def without_pullbacks(rule: Rule, value: Any) -> Any:
    """The array, or the tuple of arrays, in what a rule returned."""
    return value[0] if isinstance(rule, Op) else value


def slots_of(calls: list[Call]) -> dict[int, int]:
    """{id of an array: which of all that the calls gave it is, counted in order}."""
    values: list[Any] = []
    for call in calls:
        value = without_pullbacks(call.rule, call.value)
        values += value if type(value) is tuple else (value,)
    return {id(value): slot for slot, value in enumerate(values) if is_array(value)}


def program_of(first: list[Call], second: list[Call], value: Any) -> Program:
    """The calls that both runs made; its result is what `value` is in the second.

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
        places, late = [], []
        for one, other in zip(a.arguments, b.arguments, strict=True):
            slot = came_from(a.rule, one, other, slots, slots_now)
            places.append(len(constants) if slot is None else made + slot)
            constants.append(other if slot is None else None)
        for name, one in a.options.items():
            slot = came_from(a.rule, one, b.options[name], slots, slots_now)
            if slot is not None:
                places.append(made + slot)
                late.append(name)
        steps.append(Step(b.rule, function_of(b, late), picker(places)))
    if (result := slots_now.get(id(value))) is None:
        raise LookupError("what the function returns, no rule made")
    return Program(constants, steps, made + result)


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
