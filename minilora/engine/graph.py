"""The graph behind a value, and the walk that carries a cotangent back along it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .backend import is_array, xp_of
from .bf16 import BF16
from .errors import MiniloraError
from .rounding import plus, stored_as


class Node:
    """One application of an op: the edges along which its cotangent flows back.

    An edge is `(parents, pullback)`; a parent is `(target, slot)`, where the target is
    the Node or Parameter that a cotangent is owed to, and the slot says which of a
    Node's outputs was used.  No edge holds a Tensor, hence none holds an array: what
    backpropagation remembers is what the pullbacks close over, and nothing else.
    """

    __slots__ = ("name", "edges", "outputs")

    def __init__(self, name: str, edges: tuple, outputs: int | None = None):
        self.name = name
        self.edges: tuple | None = edges  # None once the graph has been walked
        self.outputs = outputs  # how many, for an op that returns a tuple


class together:
    """Marks a pullback that serves all arguments at once: `pullback(g, wants)`.

    It is called once with the cotangent and a tuple that says which arguments want a
    gradient, and returns one cotangent per argument (None where none is wanted).
    """

    __slots__ = ("pullback",)

    def __init__(self, pullback: Callable):
        self.pullback = pullback


class shared:
    """The pullback of an edge with several parents: only the cotangents that are wanted."""

    __slots__ = ("pullback", "wants")

    def __init__(self, pullback: Callable, wants: tuple[bool, ...]):
        self.pullback, self.wants = pullback, wants

    def __call__(self, g: Any) -> list:
        cotangents = self.pullback(g, self.wants)
        return [c for c, wanted in zip(cotangents, self.wants, strict=True) if wanted]


def pull(outputs: Sequence[Any], cotangents: Iterable, into: dict | None = None) -> dict:
    """Carry the cotangents of `outputs` (Tensors) back to the Parameters; see `Tensor.backward`."""
    gradients = {} if into is None else into
    waiting: dict = {}  # (node, slot): the sum of the cotangents that have arrived
    ours: set = set()  # keys whose array was made by a sum here, and may be added to

    def arrive(parent: tuple, g: Any) -> None:
        target, _ = parent
        if isinstance(target, Node):
            table, key = waiting, parent
        elif into is not None:
            if target not in into:
                raise MiniloraError(f"backward: no array in `into` for {target}")
            into[target] += g
            return
        else:
            table, key = gradients, target
        if key not in table:
            table[key] = g
        elif key in ours and type(g) is not BF16:
            table[key] += g
        else:  # out of place: the first cotangent may be somebody else's array
            table[key] = plus(table[key], g)
            ours.add(key)

    order = ordered(outputs)
    for output, g in zip(outputs, cotangents, strict=True):
        if output.target is not None and g is not None:
            if not is_array(g) or g.shape != output.shape:
                raise MiniloraError(
                    f"backward: expected a cotangent array of shape {output.shape}, "
                    f"found {getattr(g, 'shape', g)}"
                )
            arrive((output.target, output.slot), stored_as(output.data, g))
    while order:
        node = order.pop()
        edges, node.edges = node.edges, None
        if node.outputs is None:
            g = waiting.pop((node, 0), None)
            arrived = g is not None
        else:
            g = tuple(waiting.pop((node, slot), None) for slot in range(node.outputs))
            arrived = any(part is not None for part in g)
        if not arrived:
            continue
        for parents, pullback in edges:
            cotangents = pullback(g) if isinstance(pullback, shared) else (pullback(g),)
            for parent, cotangent in zip(parents, cotangents, strict=True):
                if cotangent is not None:
                    arrive(parent, cotangent)
    if into is None:  # NumPy makes a number of what it computes from 0-d arrays
        gradients = {p: g if type(g) is BF16 else xp_of(g).asarray(g) for p, g in gradients.items()}
    return gradients


def ordered(outputs: Sequence[Any]) -> list[Node]:
    """The nodes behind `outputs`, each after all that it was made from.  A loop, so that
    depth is bounded by memory.  Errors: `MiniloraError` on a graph already walked."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(output.target, False) for output in outputs]
    while stack:
        node, children_done = stack.pop()
        if children_done:
            order.append(node)
        elif isinstance(node, Node) and node not in seen:
            if node.edges is None:
                raise MiniloraError(
                    f"backward: this graph was walked before and freed (at {node.name}); "
                    "run the forward pass again"
                )
            seen.add(node)
            stack.append((node, True))
            stack.extend((target, False) for parents, _ in node.edges for target, _ in parents)
    return order
