"""Forget a stretch of the graph and run it again on the way back: time for memory."""

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import numpy as np

from .errors import MiniloraError
from .graph import Node, ordered, pull, shared
from .tensor import Parameter, Tensor


def recompute(
    function: Callable, *arguments: Any, rng: np.random.Generator | None = None
) -> Tensor | tuple[Tensor, ...]:
    """`function(*arguments)`, keeping its arguments and none of its intermediate values.

    On the way back the function runs once more, under the same rule setting and, where
    an `rng` is given, with a fresh Generator from the one seed drawn here, so that both
    runs see the same dropout masks.  Whatever depends on a Parameter outside the
    function must come in as an argument.  (Chen et al. 2016, "sublinear memory cost".)
    Errors: `MiniloraError` for a function that returns another thing than Tensors.
    """
    seed = None if rng is None else int(rng.integers(1 << 63))
    setting = copy_context()
    targets = [
        (a.target, a.slot) if isinstance(a, Tensor) and a.node is not None else None
        for a in arguments
    ]
    # Values of the outer graph are kept as bare arrays, and come in again as new leaves.
    is_value = [type(a) is Tensor for a in arguments]
    kept = [a.data if bare else a for a, bare in zip(arguments, is_value, strict=True)]

    def run() -> tuple[list, tuple[Tensor, ...], bool]:
        inlets = [
            (Parameter(a) if target else Tensor(a)) if bare else a
            for a, bare, target in zip(kept, is_value, targets, strict=True)
        ]
        options = {} if seed is None else {"rng": np.random.default_rng(seed)}
        value = setting.run(function, *inlets, **options)
        outputs = value if isinstance(value, tuple) else (value,)
        for output in outputs:
            if not isinstance(output, Tensor):
                found = type(output).__name__
                raise MiniloraError(
                    f"recompute: expected a Tensor or a tuple of them, found {found}"
                )
        return inlets, outputs, isinstance(value, tuple)

    inlets, outputs, is_tuple = run()
    entry = {inlet: i for i, inlet in enumerate(inlets) if targets[i] is not None}
    # Leaves in the order of the graph: (index of an argument, None) or (None, Parameter).
    leaves = [(entry[leaf], None) if leaf in entry else (None, leaf) for leaf in leaves_of(outputs)]
    parents = tuple((leaf, 0) if i is None else targets[i] for i, leaf in leaves)
    arrays = tuple(output.data for output in outputs)
    del inlets, outputs, entry

    def pullback(g: Any, wants: tuple[bool, ...]) -> list:
        inlets, outputs, _ = run()
        gradients = pull(outputs, g if is_tuple else (g,))
        return [gradients.get(leaf if i is None else inlets[i]) for i, leaf in leaves]

    if not leaves:
        results = tuple(Tensor(a) for a in arrays)
    else:
        edges = ((parents, shared(pullback, (True,) * len(parents))),)
        node = Node("recompute", edges, len(arrays) if is_tuple else None)
        results = tuple(Tensor(a, node, slot) for slot, a in enumerate(arrays))
    return results if is_tuple else results[0]


def leaves_of(outputs: tuple[Tensor, ...]) -> list[Parameter]:
    """The Parameters that `outputs` were made from, each once, in the order of the graph."""
    found = [o.target for o in outputs if isinstance(o.target, Parameter)]
    for node in ordered(outputs):
        found += [t for parents, _ in node.edges for t, _ in parents if isinstance(t, Parameter)]
    return list(dict.fromkeys(found))
