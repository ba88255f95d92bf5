"""How the shipped bases were made, so that anyone can make them again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..model.transformer import TransformerConfig, init_transformer
from ..optim.adamw import AdamW
from ..optim.schedule import schedule
from . import dates
from .data import Data
from .loop import Fit, fit
from .parallel import Loss
from .task import Splits


@dataclass(frozen=True)
class Recipe:
    """A base: its shape, what it learns, and for how long."""

    config: TransformerConfig
    splits: Callable[[], Splits]
    loss: Loss
    score: Callable[[Any, Data], float]
    steps: int
    batch: int
    lr: float
    std: float  # of the initial weights


RECIPES = {
    "dates": Recipe(
        dates.CONFIG,
        lambda: dates.splits(0, "iso", 8192),
        dates.loss,
        dates.exact_match,
        steps=800,
        batch=64,
        lr=3e-3,
        std=0.1,
    ),
}


def pretrain(name: str, *, steps: int | None = None, seed: int = 0) -> tuple[Fit, float]:
    """Train the base `name` from scratch; the run, and the score on its test data.

    Errors: `MiniloraError` listing the bases there are.
    """
    if name not in RECIPES:
        raise MiniloraError(f"base: expected one of {', '.join(RECIPES)}; found {name!r}")
    recipe = RECIPES[name]
    data = recipe.splits()
    steps = recipe.steps if steps is None else steps
    model = init_transformer(recipe.config, np.random.default_rng(seed), recipe.std)
    optimizer = AdamW(model, lr=recipe.lr, betas=(0.9, 0.99))
    result = fit(
        optimizer,
        recipe.loss,
        data.train,
        steps=steps,
        batch=recipe.batch,
        seed=seed,
        schedule=schedule("cosine", steps, 0.05),
        clip=1.0,
        validation=data.validation,
        every=max(1, steps // 8),
        label=f"pretraining {name}",
    )
    return result, recipe.score(result.model, data.test)
