"""A model is a tree of frozen dataclasses; changing it builds a new one that shares the rest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, dataclass_transform

from ..engine.backend import is_array
from ..engine.backend import to_device as array_to_device
from ..engine.rounding import cast_array
from ..engine.tensor import Parameter, Tensor


@dataclass_transform(frozen_default=True, eq_default=False)
def module(cls: type) -> type:
    """A frozen dataclass, compared by identity, whose fields are the branches of a tree."""
    cls = dataclass(frozen=True, eq=False, repr=False)(cls)
    cls.__repr__ = summary
    cls.is_module = True
    return cls


def is_module(value: Any) -> bool:
    return hasattr(type(value), "is_module")


@cache
def branches(kind: type) -> tuple[str, ...]:
    """The names of a module's fields; remembered by class, for every walk asks."""
    return tuple(field.name for field in fields(kind))


def children(node: Any) -> list[tuple[str, Any]]:
    """The branches of a module, list or tuple, with their names; [] for anything else."""
    if is_module(node):
        return [(name, getattr(node, name)) for name in branches(type(node))]
    if isinstance(node, (list, tuple)):
        return [(str(i), child) for i, child in enumerate(node)]
    return []


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every `(path, node)` of the tree, parents first; paths read `blocks.3.attention.query`.

    Nodes are modules, lists, tuples and what they hold; a node that is reached by two
    paths (a tied weight) comes twice.
    """
    yield path, tree
    for name, child in children(tree):
        yield from walk(child, f"{path}.{name}" if path else name)


def tensors(tree: Any) -> dict[str, Tensor]:
    """`{path: Tensor}`, each Tensor once, under the first path that reaches it."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, node in walk(tree):
        if isinstance(node, Tensor):
            found.setdefault(id(node), (path, node))
    return dict(found.values())


def parameters(tree: Any) -> dict[str, Parameter]:
    """`{path: Parameter}`: what trains, each once."""
    return {path: t for path, t in tensors(tree).items() if isinstance(t, Parameter)}


def count(tree: Any, trainable: bool = False) -> int:
    """How many numbers the tree's Tensors hold; with `trainable`, its Parameters alone."""
    return sum(t.size for t in (parameters if trainable else tensors)(tree).values())


def rebuild(tree: Any, visit: Callable[[str, Any], Any]) -> Any:
    """A new tree in which `visit(path, node)` stands where it differs from `node`.

    A replaced node is not entered; where nothing below a node changed, the node itself
    is shared.  A node reached twice is visited once, by its first path, so that tied
    weights stay tied.
    """
    memo: dict[int, Any] = {}  # by id: the tree holds its nodes, so that none is used again

    def build(path: str, node: Any) -> Any:
        if id(node) not in memo:
            new = visit(path, node)
            if new is node:
                parts = children(node)
                built = {n: build(f"{path}.{n}" if path else n, c) for n, c in parts}
                changed = {n: built[n] for n, c in parts if built[n] is not c}
                if changed and is_module(node):
                    new = replace(node, **changed)
                elif changed:
                    new = type(node)(built.values())
            memo[id(node)] = new
        return memo[id(node)]

    return build("", tree)


def freeze(tree: Any) -> Any:
    """The same tree with every Parameter a Tensor over the same array: a live view."""
    return rebuild(tree, lambda _, n: Tensor(n.data) if isinstance(n, Parameter) else n)


def unfreeze(tree: Any, where: Callable[[str], bool] = lambda path: True) -> Any:
    """The same tree with the Tensors whose path satisfies `where` as Parameters.

    Arrays are shared.  Errors: `AdapterError` below the frozen base of an adapter.
    """

    def thaw(path: str, node: Any) -> Any:
        return Parameter(node.data) if type(node) is Tensor and where(path) else node

    return rebuild(tree, thaw)


def to_device(tree: Any, device: str) -> Any:
    """The tree with all arrays on "cpu" or "cuda"; tied weights stay tied."""

    def move(path: str, node: Any) -> Any:
        if isinstance(node, Tensor):
            data = array_to_device(node.data, device)
            return node if data is node.data else type(node)(data)
        return array_to_device(node, device) if is_array(node) else node

    return rebuild(tree, move)


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its Tensors in another float type, e.g. float64 for a check; BFLOAT16 too."""

    def convert(path: str, node: Any) -> Any:
        if not isinstance(node, Tensor) or node.dtype == dtype:
            return node
        return type(node)(cast_array(node.data, dtype))

    return rebuild(tree, convert)


def summary(tree: Any) -> str:
    """The tree in print: a line per module, with shapes, counts and what trains.

    Equal neighbors in a list are shown once, with how many they are.
    """
    lines: list[str] = []

    def show(name: str, node: Any, depth: int, times: int = 1) -> None:
        indent = "  " * depth
        if isinstance(node, Tensor):
            kind = "trains" if isinstance(node, Parameter) else "frozen"
            lines.append(f"{indent}{name} {node.shape} {node.dtype} {kind}")
            return
        parts = [(n, c) for n, c in children(node) if holds_arrays(c)]
        if not parts:
            return
        total, live = count(node), count(node, trainable=True)
        repeat = f" x {times}" if times > 1 else ""
        lines.append(f"{indent}{name} {type(node).__name__}{repeat}: {total:,} ({live:,} train)")
        if isinstance(node, (list, tuple)):
            for first, children_alike in runs([c for _, c in parts]):
                show(f"{first}", children_alike[0], depth + 1, len(children_alike))
        else:
            for n, c in parts:
                show(n, c, depth + 1)

    show("", tree, 0)
    return "\n".join(line.rstrip() for line in lines).strip()


def holds_arrays(node: Any) -> bool:
    return any(isinstance(n, Tensor) or is_array(n) for _, n in walk(node))


def runs(nodes: list) -> list[tuple[int, list]]:
    """Neighbors of the same structure: [(index of the first, the nodes)]."""
    found: list[tuple[int, list]] = []
    outline = None
    for i, node in enumerate(nodes):
        now = [
            (p, type(n), getattr(n, "shape", None), getattr(n, "dtype", None))
            for p, n in walk(node)
            if isinstance(n, Tensor) or is_array(n) or is_module(n)
        ]
        if found and now == outline:
            found[-1][1].append(node)
        else:
            found.append((i, [node]))
        outline = now
    return found
