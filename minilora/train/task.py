"""Small worlds with a before and an after: a base that knows one thing, data for another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.backend import device_of, to_numpy
from ..engine.rules import wide
from ..model.module import freeze, tensors
from .data import Batch, Data
from .parallel import Loss


@dataclass(frozen=True)
class Settings:
    """How a task is trained unless somebody says otherwise."""

    steps: int
    batch: int
    full_rates: tuple[float, ...]  # learning rates that full fine-tuning chooses from
    lora_rates: tuple[float, ...]  # the same for adapters
    alpha: float | None = 16.0  # None: alpha = r, a scale of one at every rank
    targets: str | tuple[str, ...] = "all-linear"
    schedule: str = "linear"
    warmup: float = 0.05
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Splits:
    """Training; validation, which chooses rates and stopping; test, reported once."""

    train: Data
    validation: Data
    test: Data


@dataclass(frozen=True)
class Task:
    """A base model, data drawn from a seed, a loss and a score.

    `loss(model, batch, rng)` is a Σ over scored items; `score(model, data)` is the metric,
    larger is better unless `lower_is_better`; `before(model)` is the score on what the base
    was trained for, where that means something.
    """

    name: str
    about: str  # what the task shows, in one line
    metric: str
    base: Callable[[], Any]
    splits: Callable[[int], Splits]
    loss: Loss
    score: Callable[[Any, Data], float]
    settings: Settings
    before: Callable[[Any], float] | None = None
    before_metric: str = ""
    lower_is_better: bool = False
    per_parameter: str = ""  # what score / trainable parameters is called, where that says much
    facts: dict[str, Any] = field(default_factory=dict)  # what a test or a figure may need


def token_loss(model: Any, batch: Batch, rng: np.random.Generator | None) -> Any:
    """Σ cross-entropy over the targets that count."""
    return model.loss(batch["ids"], batch["targets"], rng=rng)


def argmax_hits(model: Any, data: Data, logits: Callable, batch: int = 256) -> Iterator[Any]:
    """Batch by batch, on the host: (best class at each place, the targets there)."""
    model = freeze(model)
    device = device_of(next(iter(tensors(model).values())).data)
    for rows in data.in_order(batch):
        arrays, _ = data.take(rows, device)
        found = to_numpy(wide(logits(model, arrays).data).argmax(axis=-1))
        yield found, data.arrays["targets"][rows]


def squared_error(model: Any, batch: dict, rng: np.random.Generator | None) -> Any:
    """Σ (model(x) - y)², the mean over outputs left to the caller."""
    gap = model(batch["x"]) - batch["y"]
    return (gap * gap).sum()
