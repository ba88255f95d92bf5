"""Which linears of a model are meant: by name, by suffix, by `*` glob, or all of them."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from ..engine.errors import AdapterError
from .layers import is_linear
from .module import walk

ALL_LINEAR = "all-linear"


def select(
    model: Any, targets: str | Iterable[str], fits: Callable[[Any], bool] = is_linear
) -> list[str]:
    """Paths of the nodes that `fits` accepts and `targets` name, in the order of the tree.

    A target is an exact path (`blocks.0.mlp.up`), a suffix of one at a dot (`up`,
    `attention.query`), a glob in which `*` matches anything (`blocks.*.up`), or
    "all-linear", which means every linear but the output head.  A regular expression is not
    taken: one that a stranger wrote can run for ever.
    Errors: `AdapterError` for a target that matches nothing, listing what there is.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise AdapterError("targets: expected at least one name, found none")
    nodes = {path: node for path, node in walk(model) if fits(node)}
    paths = list(nodes)
    chosen: set[str] = set()
    for target in wanted:
        found = [path for path in paths if matches(path, target)]
        if target == ALL_LINEAR:
            found = [path for path in found if is_linear(nodes[path])]
        if not found:
            raise AdapterError(f"targets: {target!r} matches nothing; there are: {listed(paths)}")
        chosen.update(found)
    return [path for path in paths if path in chosen]


def matches(path: str, target: str) -> bool:
    """Does `target` (exact, suffix, glob or "all-linear") mean `path`?"""
    if target == ALL_LINEAR:
        return path.rpartition(".")[2] != "head"
    if "*" in target:
        # Only `*` is special: a bracket or question mark in a name stands for itself.
        pattern = target.replace("[", "[[]").replace("?", "[?]")
        return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")
    return path == target or path.endswith(f".{target}")


def listed(paths: list[str]) -> str:
    """The distinct last names, with one full path as an example."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    return f"{', '.join(names)} (as in {paths[0]})" if paths else "none at all"
