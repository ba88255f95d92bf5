"""Real handwriting: a network that reads digits learns them relabeled, or with pixels shuffled."""

import gzip
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..engine.loss import cross_entropy
from ..files.trees import DATA, shipped_tree
from ..model.layers import Net, Rng, init_linear
from .data import Batch, Data
from .task import Settings, Splits, Task, argmax_hits

WIDTHS = (64, 128, 128, 10)
SHIFTS = ("swap", "shuffle")


@lru_cache(maxsize=1)
def images() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 64) pixels in 0..1, and (1797,) labels.  (UCI; the file of scikit-learn.)"""
    with gzip.open(DATA / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :64] / np.float32(16), table[:, 64].astype(np.int64)


def splits(seed: int, shift: str | None = None) -> Splits:
    """1000 digits to train on, 297 for validation; the 500 of the test are the same for all."""
    x, y = images()
    if shift == "swap":
        y = np.where(y < 2, 1 - y, y)
    elif shift == "shuffle":
        x = x[:, np.random.default_rng(5).permutation(64)]
    order = np.random.default_rng(0).permutation(len(x))
    test, rest = order[:500], np.random.default_rng([seed, 1]).permutation(order[500:])
    parts = (rest[:1000], rest[1000:], test)
    return Splits(*(Data({"x": x[part], "targets": y[part]}) for part in parts))


def loss(model: Any, batch: Batch, rng: Rng | None) -> Any:
    """Σ cross-entropy over the images."""
    return cross_entropy(model(batch["x"]), targets=batch["targets"])


def accuracy(model: Any, data: Data) -> float:
    """The share of images whose likeliest label is the right one."""
    hits = argmax_hits(model, data, lambda m, batch: m(batch["x"]))
    return float(np.concatenate([found == targets for found, targets in hits]).mean())


def new_net(rng: Rng) -> Net:
    """Three linears with a GELU between each two, trainable."""
    pairs = pairwise(WIDTHS)
    return Net(tuple(init_linear(i, o, rng, std=i**-0.5, bias=False) for i, o in pairs))


def task(shift: str) -> Task:
    """ "swap" exchanges the labels 0 and 1; "shuffle" moves every pixel to another place."""
    if shift not in SHIFTS:
        raise MiniloraError(f"digits: expected a shift of {', '.join(SHIFTS)}; found {shift!r}")
    old = splits(0).test
    about = {
        "swap": "handwritten digits with the labels 0 and 1 exchanged: a small change of the task",
        "shuffle": "handwritten digits with their pixels shuffled: everything must be learned anew",
    }
    return Task(
        name=f"digits-{shift}",
        about=about[shift],
        metric="accuracy",
        base=lambda: shipped_tree("digits", new_net(np.random.default_rng(0))),
        splits=lambda seed: splits(seed, shift),
        loss=loss,
        score=accuracy,
        before=lambda model: accuracy(model, old),
        before_metric="digits as before",
        settings=Settings(
            steps=400,
            batch=100,
            full_rates=(3e-4, 1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
            lora_rates=(3e-3, 1e-2, 2e-2, 4e-2),
            alpha=8.0,
            targets="*",
            clip=None,
            ranks=(1, 2, 4, 8, 16),
        ),
    )
