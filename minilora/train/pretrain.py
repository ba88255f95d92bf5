"""How the shipped bases were made, so that anyone can make them again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError, expect_whole
from ..model.transformer import TransformerConfig, init_transformer
from ..optim.adamw import AdamW
from ..optim.schedule import schedule
from . import dates, digits, facts, letters, text
from .data import Data
from .loop import Fit, fit
from .parallel import Loss
from .task import Splits, token_loss


@dataclass(frozen=True)
class Recipe:
    """A base: how it starts, what it learns, and for how long."""

    start: Callable[[np.random.Generator], Any]
    splits: Callable[[], Splits]
    loss: Loss
    score: Callable[[Any, Data], float]
    steps: int
    batch: int
    lr: float


def transformer(config: TransformerConfig, std: float = 0.1) -> Callable:
    return lambda rng: init_transformer(config, rng, std)


def same(data: Data) -> Splits:
    """All parts alike: what is learned by heart is tested on itself."""
    return Splits(data, data, data)


RECIPES = {
    "dates": Recipe(
        transformer(dates.CONFIG),
        lambda: dates.splits(0, "iso", 8192),
        token_loss,
        dates.exact_match,
        steps=800,
        batch=64,
        lr=3e-3,
    ),
    "digits": Recipe(
        digits.new_net,
        lambda: digits.splits(0),
        digits.loss,
        digits.accuracy,
        steps=500,
        batch=100,
        lr=3e-3,
    ),
    "facts": Recipe(
        transformer(facts.CONFIG),
        lambda: same(facts.facts(0, 512)),
        token_loss,
        facts.bits,
        steps=1000,
        batch=256,
        lr=5e-3,
    ),
    "letters": Recipe(
        transformer(letters.CONFIG),
        lambda: letters.splits("copy", 0),
        token_loss,
        letters.accuracy,
        steps=700,
        batch=64,
        lr=3e-3,
    ),
    "text": Recipe(
        transformer(text.CONFIG),
        lambda: text.cut(text.shipped_text("shakespeare")),
        token_loss,
        text.nats,
        steps=2500,
        batch=32,
        lr=4e-3,
    ),
}


def pretrain(name: str, *, steps: int | None = None, seed: int = 0) -> tuple[Fit, float]:
    """Train the base `name` from scratch; the run, and the score on its test data.

    Errors: `MiniloraError` listing the bases there are, or for a seed below 0.
    """
    if name not in RECIPES:
        raise MiniloraError(f"base: expected one of {', '.join(RECIPES)}; found {name!r}")
    expect_whole("seed", seed, 0)
    recipe = RECIPES[name]
    data = recipe.splits()
    steps = recipe.steps if steps is None else steps
    model = recipe.start(np.random.default_rng(seed))
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
