"""Evidence: is a pullback the true one, do two functions agree, what does a graph keep alive?"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from .backend import is_array, to_numpy, xp_of
from .errors import NumericsError
from .graph import ordered, pull, shared, together
from .rules import wide
from .tensor import Parameter, Tensor


def gradients(function: Callable, arrays: list, cotangent: Any) -> tuple[list, Any]:
    """`[dx, ...]` of <function(*arrays), cotangent>, and the value itself.

    Arrays may be None or numbers, which are passed through and get no gradient.
    """
    given = [Parameter(a) if is_array(a) else a for a in arrays]
    value = function(*given)
    values = value if isinstance(value, tuple) else (value,)
    cotangents = cotangent if isinstance(cotangent, tuple) else (cotangent,)
    found = pull(values, cotangents)
    return [found.get(p) if isinstance(p, Parameter) else None for p in given], value


def inner(values: Any, cotangents: Any) -> Any:
    """Σ <value, cotangent> over one array or a tuple of them, as a Python number."""
    if not isinstance(values, tuple):
        values, cotangents = (values,), (cotangents,)
    total = 0
    for value, w in zip(values, cotangents, strict=True):
        data = value.data if isinstance(value, Tensor) else value
        total = total + (to_numpy(data) * to_numpy(w)).sum()
    return complex(total) if np.iscomplexobj(total) else float(total)


def moved(arrays: list, directions: list, step: Any) -> list:
    """arrays + step · directions; entries that are no arrays stay."""
    # asarray: NumPy makes a scalar of the sum of two 0-d arrays.
    return [
        xp_of(a).asarray(a + step * v) if is_array(a) else a
        for a, v in zip(arrays, directions, strict=True)
    ]


def directional_gap(
    function: Callable, arrays: list, directions: list, cotangent: Any, step: float = 1e-3
) -> float:
    """How far the pullbacks of `function` are from a fourth-order difference quotient.

        D f(x)[v] ~ (8 (f(x+hv) - f(x-hv)) - (f(x+2hv) - f(x-2hv))) / 12h

    Compares <D f(x)[v], w> with <v, pullback(w)> and returns the difference relative to
    1 + |<v, pullback(w)>|.  All arrays float64; `directions` has one v per array (0-size
    and None entries allowed), `cotangent` is w.
    """
    found, _ = gradients(function, arrays, cotangent)
    predicted = sum(inner(g, v) for g, v in zip(found, directions, strict=True) if g is not None)

    def along(t: float) -> float:
        return inner(function(*moved(arrays, directions, t * step)), cotangent)

    measured = (8 * (along(1) - along(-1)) - (along(2) - along(-2))) / (12 * step)
    return abs(measured - predicted) / (1 + abs(predicted))


def complex_step_gap(
    function: Callable, arrays: list, directions: list, cotangent: Any, step: float = 1e-30
) -> float:
    """The same against Im f(x + i h v) / h, exact to rounding for an analytic `function`.

    (Squire and Trapp 1998: no difference is formed, so h may be tiny.)
    """
    found, _ = gradients(function, arrays, cotangent)
    terms = [inner(g, v) for g, v in zip(found, directions, strict=True) if g is not None]
    predicted = sum(terms)
    value = inner(function(*moved(arrays, directions, 1j * step)), cotangent)
    measured = complex(value).imag / step
    return abs(measured - predicted) / (1 + sum(abs(t) for t in terms))


def adjoint_gap(function: Callable, x: Any, w: Any) -> float:
    """|<f(x), w> - <x, pullback(w)>| of a linear `function`, relative to the terms' size."""
    (back,), value = gradients(function, [x], w)
    forward, backward = inner(value, w), inner(back, x)
    return abs(forward - backward) / (1 + abs(forward))


def assert_same(
    mine: Callable, theirs: Callable, draw: Callable, cases: int = 20, tolerance: float = 1e-6
) -> None:
    """Assert that two functions agree on `cases` drawn arguments, relative to their size.

    `draw(rng)` returns a tuple of arguments, for each function anew: one that writes into them
    does not change what the other is given.  Errors: `AssertionError` with the first case
    that differs: its arguments, both answers and the gap.
    """
    for seed in range(cases):
        # times 1.0: masks and codes are subtracted as numbers
        a, b = (bare(f(*draw(np.random.default_rng(seed)))) * 1.0 for f in (mine, theirs))
        arguments = draw(np.random.default_rng(seed))
        if a.shape != b.shape:
            raise AssertionError(f"case {seed}: shapes {a.shape} and {b.shape} for {arguments}")
        gap = float(np.max(np.abs(a - b), initial=0)) / (1 + float(np.max(np.abs(b), initial=0)))
        if not gap <= tolerance:
            raise AssertionError(
                f"case {seed}: gap {gap:.3g} > {tolerance:.3g}\narguments: {arguments}\n"
                f"mine: {a}\ntheirs: {b}"
            )


def bare(value: Any) -> np.ndarray:
    """The host array inside a Tensor, an array or a number."""
    return to_numpy(value.data if isinstance(value, Tensor) else value)


# ------------------------------------------------------------ what a graph remembers


def retained(outputs: Tensor | Iterable[Tensor], besides: Iterable[Any] = ()) -> dict[str, int]:
    """Bytes that the graph behind `outputs` keeps for the way back, op by op.

    An array counts once, by its root buffer, for the first op that holds it, in the order
    of the forward pass.  Arrays in `besides` (and views of them) do not count: pass the
    weights, which stay in memory whether or not there is a graph.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    seen = {id(root_of(array)) for array in besides}
    sizes: dict[str, int] = {}
    for node in ordered(outputs):
        for _, pullback in node.edges:
            for array in arrays_of(pullback):
                root = root_of(array)
                if id(root) not in seen:
                    seen.add(id(root))
                    sizes[node.name] = sizes.get(node.name, 0) + root.nbytes
    return sizes


def root_of(array: Any) -> Any:
    """The array that owns the memory that `array` looks at."""
    library, array = xp_of(array).ndarray, getattr(array, "bits", array)
    while isinstance(getattr(array, "base", None), library):
        array = array.base
    return array


def arrays_of(pullback: Any) -> list:
    """The arrays that a pullback closes over, through nested functions and containers.

    Tensors and modules are not entered: they are held by the model in any case.
    """
    found, entered, stack = [], set(), [pullback]
    while stack:
        value = stack.pop()
        if id(value) in entered:
            continue
        entered.add(id(value))
        if is_array(value) and not isinstance(value, np.generic):
            found.append(value)
        elif isinstance(value, (shared, together)):
            stack.append(value.pullback)
        elif isinstance(value, partial):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, (tuple, list)):
            stack += reversed(value)
        elif isinstance(value, dict):
            stack += reversed(list(value.values()))
        elif hasattr(value, "__closure__"):
            stack += reversed([cell_value(c) for c in value.__closure__ or ()])
            stack += value.__defaults__ or ()
    return found


def cell_value(cell: Any) -> Any:
    """What a closure cell holds; None for a name not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def expect_finite(name: str, array: Any) -> None:
    """Refuse NaN and infinity, naming the first place.  Errors: `NumericsError`."""
    if not xp_of(array).isfinite(wide(array)).all():
        host = to_numpy(array)
        bad = ~np.isfinite(host)
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise NumericsError(f"{name}: expected finite values, found {host[place]} at {place}")
