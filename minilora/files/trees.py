"""A module tree as a safetensors file: one tensor a path, and the small bases that ship."""

from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import FormatError
from ..model.module import freeze, rebuild, tensors
from . import safetensors

DATA = Path(__file__).parent.parent / "data"


def save_tree(path: str | Path, tree: Any, dtype: Any = np.float32) -> None:
    """Write every Tensor of `tree` once, under its first path, as `dtype`."""
    arrays = {name: t.numpy().astype(dtype) for name, t in tensors(tree).items()}
    safetensors.write(path, arrays)


def load_tree(path: str | Path, skeleton: Any) -> Any:
    """`skeleton` with the file's arrays in its Tensors, cast to the skeleton's dtypes.

    Errors: `FormatError` for a tensor that is missing, left over or of another shape.
    """
    stored = safetensors.read(path)
    wanted = tensors(skeleton)
    if set(stored) != set(wanted):
        odd = sorted(set(stored) ^ set(wanted))
        raise FormatError(f"{path}: tensors of the file and of the model differ: {', '.join(odd)}")
    new = {}
    for name, old in wanted.items():
        array = stored[name]
        if array.shape != old.shape:
            raise FormatError(f"{path}: expected {name} {old.shape}, found {array.shape}")
        new[id(old)] = type(old)(array.astype(old.dtype))
    return rebuild(skeleton, lambda _, node: new.get(id(node), node))


def shipped_tree(name: str, skeleton: Any) -> Any:
    """The frozen base `minilora/data/NAME.safetensors`, made by `minilora pretrain NAME`."""
    return load_tree(DATA / f"{name}.safetensors", freeze(skeleton))
