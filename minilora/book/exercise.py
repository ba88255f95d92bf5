"""An exercise: a statement, a blank, and a checker that answers with a counterexample."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.backend import to_numpy
from ..engine.tensor import Tensor


@dataclass(frozen=True)
class Budget:
    """A limit on what an answer may use: `used(answer, arguments)` at most `limit(arguments)`."""

    what: str  # "bytes kept", "multiplications"
    used: Callable[[Callable, tuple], float]
    limit: Callable[[tuple], float]


@dataclass(frozen=True)
class Verdict:
    """What the checker found: passed, failed, or nothing to check yet."""

    state: str  # "passed", "failed", "open"
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Exercise:
    """A question whose answer is a function.

    `check(answer)` calls it on cases drawn by `draw(rng)`, compares with `solution`, relative
    to the size of the right value, and prints the first case in which they differ, and where in
    it.  The answer gets copies: what it writes into them changes no case.  `wrong` is a
    plausible wrong answer; a test holds that it fails and that `solution` passes.
    """

    name: str
    statement: str
    hint: str
    draw: Callable[[np.random.Generator], tuple]
    solution: Callable
    wrong: Callable
    tolerance: float = 1e-6
    cases: int = 20
    budget: Budget | None = None
    labels: tuple[str, ...] = field(default=())  # names of the arguments, in print

    def verdict(self, answer: Callable) -> Verdict:
        """Passed, failed with a counterexample, or open where the blank is not filled."""
        for seed in range(self.cases):
            arguments = self.draw(np.random.default_rng(seed))
            right = self.solution(*arguments)
            try:
                found = answer(*deepcopy(arguments))
            except NotImplementedError:
                return self.still_open()
            except Exception as error:
                return self.failed(seed, arguments, right, f"{type(error).__name__}: {error}")
            if found is ... or (found is None and right is not None):
                return self.still_open()
            if not near(found, right, self.tolerance):
                return self.failed(seed, arguments, right, found)
            if self.budget is not None:
                used = self.budget.used(answer, deepcopy(arguments))
                limit = self.budget.limit(arguments)
                if used > limit:
                    return Verdict(
                        "failed",
                        f"Exercise {self.name}: right, but not within the budget of "
                        f"{limit:,.0f} {self.budget.what}: yours takes {used:,.0f}.",
                    )
        within = "" if self.budget is None else f", within the budget of {self.budget.what}"
        return Verdict("passed", f"Exercise {self.name}: right in {self.cases} cases{within}.")

    def check(self, answer: Callable) -> None:
        """Print the verdict.  An open or a wrong answer is no error: the notebook runs on."""
        print(self.verdict(answer))

    def still_open(self) -> Verdict:
        ask = f'exercise("{self.name}")'
        return Verdict(
            "open",
            f"Exercise {self.name} is still open.  For a hint: {ask}.hint\n"
            f"When you have tried, our answer: show({ask}.solution)",
        )

    def failed(self, case: int, arguments: tuple, right: Any, found: Any) -> Verdict:
        names = self.labels or tuple(f"argument {i + 1}" for i in range(len(arguments)))
        lines = [f"Exercise {self.name}: not yet.  Case {case}:"]
        lines += [f"  {n} = {shown(a)}" for n, a in zip(names, arguments, strict=True)]
        lines += [f"  expected {shown(right)}", f"  found    {shown(found)}"]
        lines += [f"  {where}" for where in [difference(found, right, self.tolerance)] if where]
        lines.append(f"  Hint: {self.hint}")
        return Verdict("failed", "\n".join(lines))

    def _repr_markdown_(self) -> str:
        return f"**Exercise {self.name}.** {self.statement}"

    def __repr__(self) -> str:
        return f"Exercise {self.name}. {self.statement}"


def numbers(value: Any) -> np.ndarray:
    """The value as float64 on the host.

    Errors: TypeError, ValueError, OverflowError where it is no array of real numbers.
    """
    array = np.asarray(to_numpy(value.data if isinstance(value, Tensor) else value))
    if array.dtype.kind in "cSU":  # NumPy would read "3", and drop what is imaginary
        raise TypeError(f"expected real numbers, found {array.dtype}")
    return array.astype(np.float64)


def near(found: Any, right: Any, tolerance: float) -> bool:
    """Equal in shape, and in value up to `tolerance` times the size of the right one."""
    if isinstance(right, (tuple, list)):
        return (
            isinstance(found, (tuple, list))
            and len(found) == len(right)
            and all(near(f, r, tolerance) for f, r in zip(found, right, strict=True))
        )
    if isinstance(right, (str, bool, type(None))):
        return found == right
    try:
        a, b = numbers(found), numbers(right)
        if a.shape != b.shape:
            return False
        gap = np.max(np.abs(a - b), initial=0)
        return bool(gap <= tolerance * (1 + np.max(np.abs(b), initial=0)))
    except (TypeError, ValueError, OverflowError):
        return False


def difference(found: Any, right: Any, tolerance: float) -> str:
    """Where an answer first differs from the right one, in a line; "" where that is all of it."""
    if isinstance(right, (tuple, list)):
        if not isinstance(found, (tuple, list)):
            return ""
        if len(found) != len(right):
            return f"number of parts: expected {len(right)}, found {len(found)}"
        pairs = enumerate(zip(found, right, strict=True), start=1)
        i, f, r = next((i, f, r) for i, (f, r) in pairs if not near(f, r, tolerance))
        inner = difference(f, r, tolerance)
        return f"part {i}: {inner or f'expected {shown(r)}, found {shown(f)}'}"
    try:
        a, b = numbers(found), numbers(right)
    except (TypeError, ValueError, OverflowError):
        return ""
    if a.shape != b.shape:
        return f"shape: expected {b.shape}, found {a.shape}"
    if b.ndim == 0:
        return ""
    allowed = tolerance * (1 + np.max(np.abs(b), initial=0))
    wrong = ~(np.abs(a - b) <= allowed)  # written so that nan counts as different
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"{wrong.sum():,} of {b.size:,} entries differ, the first at {list(place)}: "
        f"expected {b[place]:.8g}, found {a[place]:.8g}"
    )


def shown(value: Any) -> str:
    """A value in one short line: numbers whole, arrays by shape and first entries, by part."""
    if isinstance(value, tuple) and any(isinstance(v, (np.ndarray, Tensor)) for v in value):
        return f"({', '.join(shown(v) for v in value)})"
    if isinstance(value, Tensor):
        value = value.data
    if isinstance(value, np.ndarray):
        first = np.array2string(value.ravel()[:4], precision=4, separator=", ")
        more = ", ..." if value.size > 4 else ""
        return f"array {value.shape}: {first[:-1]}{more}]"
    text = repr(value)
    return text if len(text) <= 90 else text[:87] + "..."


class Counted(np.ndarray):
    """An array that counts the multiplications of the matrix products it takes part in."""

    total = 0

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [uncounted(i) for i in inputs]
        if "out" in options:
            options["out"] = tuple(map(uncounted, options["out"]))
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.total += result.size * plain[0].shape[-1]
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function: Any, types: Any, inputs: tuple, options: dict) -> Any:
        if function is np.dot and {np.ndim(i) for i in inputs[:2]} <= {1, 2}:
            return np.matmul(*inputs, **options)  # the same, and counted above
        return super().__array_function__(function, types, inputs, options)

    def dot(self, other: Any, out: Any = None) -> Any:
        return np.dot(self, other, out)


def uncounted(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, Counted) else value


def multiplications(answer: Callable, arguments: tuple) -> int:
    """How many multiplications the matrix products inside `answer(*arguments)` make.

    Those of `@`, `np.matmul` and `dot`; what `np.einsum` and its like multiply is not seen.
    """
    Counted.total = 0
    answer(*[a.view(Counted) if isinstance(a, np.ndarray) else a for a in arguments])
    return Counted.total
