"""How much does an adapter hold?  Random facts, which nothing but memory can get right."""

import math
from typing import Any

import numpy as np

from ..engine.loss import IGNORE
from ..files.trees import shipped_tree
from ..model.transformer import TransformerConfig, init_transformer
from .data import Data
from .loop import evaluate
from .task import Settings, Splits, Task, token_loss

KEYS, VALUES = 64, 32  # a fact: two of 64 keys, and one of 32 values, 5 bits
CONFIG = TransformerConfig(
    vocab=KEYS + VALUES, width=32, layers=2, heads=4, mlp="gelu", context=4, tied=False
)


def facts(seed: int, n: int) -> Data:
    """`n` pairs of keys, each pair once, with a random value: ids and targets (n, 2)."""
    rng = np.random.default_rng([seed, 3])
    pairs = rng.permutation(KEYS * KEYS)[:n]
    ids = np.stack([pairs // KEYS, pairs % KEYS], axis=1)
    targets = np.full((n, 2), IGNORE)
    targets[:, 1] = KEYS + rng.integers(0, VALUES, n)
    return Data({"ids": ids, "targets": targets})


def bits(model: Any, data: Data) -> float:
    """Bits stored: n (log₂ 32 - loss / ln 2), none where guessing would do better."""
    surprise = evaluate(model, token_loss, data) / math.log(2)
    return max(0.0, len(data) * (math.log2(VALUES) - surprise))


def task(n: int = 1024) -> Task:
    """`n` new facts, on a base that knows 512 others.  All parts are the facts themselves:
    there is nothing to generalize to."""
    old = facts(0, 512)
    return Task(
        name="facts",
        about=f"{n:,} random facts of 5 bits each, learned by heart: how much an adapter holds",
        metric="bits stored",
        base=lambda: shipped_tree("facts", init_transformer(CONFIG, np.random.default_rng(0))),
        splits=lambda seed: Splits(*[facts(1000 + seed, n)] * 3),
        loss=token_loss,
        score=bits,
        before=lambda model: bits(model, old),
        before_metric="old bits left",
        per_parameter="bits/parameter",
        settings=Settings(
            steps=1000,
            batch=256,
            full_rates=(2.5e-3, 5e-3, 1e-2, 2e-2),
            lora_rates=(2.5e-3, 5e-3, 1e-2, 2e-2),
            warmup=0.05,
            ranks=(1, 2, 4, 8),
        ),
    )
