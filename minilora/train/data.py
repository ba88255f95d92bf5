"""Examples as arrays, and batches that are a pure function of a seed and a step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.backend import to_device
from ..engine.errors import MiniloraError, expect_whole
from ..engine.loss import IGNORE

Batch = dict[str, Any]  # the arrays of some examples, on the model's device


@dataclass(frozen=True)
class Data:
    """Host arrays with a common first axis, one entry an example.

    `scored` (n,) says how many items of an example count in the loss: its targets that
    are not `IGNORE` where there are `targets` of whole numbers, else one.
    """

    arrays: dict[str, np.ndarray]
    scored: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if not isinstance(array, np.ndarray) or array.ndim == 0:
                raise MiniloraError(
                    f"Data: expected a NumPy array of examples, found {name} {array!r}"
                )
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise MiniloraError(f"Data: expected arrays of one length >= 1, found {lengths}")
        targets = self.arrays.get("targets")
        if targets is not None and targets.dtype.kind in "iu":
            per_row = (targets != IGNORE).reshape(len(targets), -1).sum(axis=1)
        else:
            per_row = np.ones(len(self), np.int64)
        if not per_row.sum():
            raise MiniloraError("Data: expected at least one scored target, found none")
        object.__setattr__(self, "scored", per_row)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, rows: np.ndarray | slice, device: str = "cpu") -> tuple[Batch, int]:
        """The batch of these examples on `device`, and how many scored items it has."""
        batch = {name: to_device(array[rows], device) for name, array in self.arrays.items()}
        return batch, int(self.scored[rows].sum())

    def first(self, n: int) -> "Data":
        """The first `n` examples."""
        expect_whole("examples", n, 1)
        return type(self)({name: array[:n] for name, array in self.arrays.items()})

    def in_order(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` examples that cover all, in order."""
        expect_whole("batch", size, 1)
        return (slice(start, start + size) for start in range(0, len(self), size))


class Order:
    """Which examples step s sees: epochs of fresh permutations, laid end to end.

    A function of (seed, s) alone, so that a run can be resumed at any step.
    """

    def __init__(self, n: int, batch: int, seed: int):
        expect_whole("batch", batch, 1)
        expect_whole("seed", seed, 0)
        self.n, self.batch, self.seed = n, batch, seed
        self.epochs: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> np.ndarray:
        """Indices (batch,) of step `step`."""
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.concatenate([
            self.permutation(epoch)[places[places // self.n == epoch] % self.n]
            for epoch in range(int(places[0]) // self.n, int(places[-1]) // self.n + 1)
        ])  # fmt: skip

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self.epochs:
            self.epochs = {e: p for e, p in self.epochs.items() if e >= epoch - 1}
            self.epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return self.epochs[epoch]
