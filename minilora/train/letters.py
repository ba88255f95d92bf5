"""One base that copies six letters; adapters that make it write them in other ways."""

import string
from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..engine.loss import IGNORE
from ..files.trees import shipped_tree
from ..model.transformer import TransformerConfig, init_transformer
from .data import Data
from .task import Settings, Splits, Task, argmax_hits, token_loss

LETTERS = string.ascii_lowercase + "012345"  # 32 symbols
N, ARROW = 6, 32  # letters of a word; the symbol between word and answer
CONFIG = TransformerConfig(
    vocab=33, width=64, layers=2, heads=4, mlp="gelu", context=16, tied=False
)
CIPHER = np.random.default_rng(21).permutation(32)

# From words (n, 6) to what shall stand after the arrow.
WRITES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "copy": lambda w: w,
    "cipher": lambda w: CIPHER[w],
    "caesar": lambda w: (w + 3) % 32,
    "sort": lambda w: np.sort(w, axis=1),
    "reverse": lambda w: w[:, ::-1],
}


def examples(way: str, n: int, seed: int) -> Data:
    """`n` random words and their answers: ids and targets (n, 12), the answer scored."""
    words = np.random.default_rng([seed, 7]).integers(0, 32, (n, N))
    arrows = np.full((n, 1), ARROW)
    text = np.concatenate([words, arrows, WRITES[way](words)], axis=1)
    targets = text[:, 1:].copy()
    targets[:, :N] = IGNORE
    return Data({"ids": text[:, :-1].copy(), "targets": targets})


def splits(way: str, seed: int) -> Splits:
    """Fresh words for each part; the test is the same for all seeds."""
    return Splits(
        examples(way, 8192, 10 + 2 * seed),
        examples(way, 500, 11 + 2 * seed),
        examples(way, 1000, 1),
    )


def accuracy(model: Any, data: Data) -> float:
    """The share of right letters, each given the true ones before it."""
    right, all_scored = 0, 0
    for found, targets in argmax_hits(model, data, lambda m, batch: m(batch["ids"])):
        right += int((found == targets).sum())
        all_scored += int((targets != IGNORE).sum())
    return right / all_scored


def base() -> Any:
    """The frozen model that copies."""
    return shipped_tree("letters", init_transformer(CONFIG, np.random.default_rng(0)))


def task(way: str, head_only: bool = False) -> Task:
    """From copying to `way`; with `head_only`, adapters sit on the output head alone."""
    if way not in WRITES:
        raise MiniloraError(f"letters: expected one of {', '.join(WRITES)}; found {way!r}")
    copied = examples("copy", 500, 1)
    where = " through an adapter on the output head alone" if head_only else ""
    return Task(
        name=f"{way}-head" if head_only else way,
        about=f"a base that copies six letters learns to write them by {way}{where}",
        metric="letters right",
        base=base,
        splits=lambda seed: splits(way, seed),
        loss=token_loss,
        score=accuracy,
        before=lambda model: accuracy(model, copied),
        before_metric="copies still right",
        settings=Settings(
            steps=400,
            batch=48,
            full_rates=(1e-3, 2e-3, 4e-3, 8e-3),
            lora_rates=(1.6e-2, 3.2e-2, 6.4e-2, 0.128) if head_only else (2e-3, 4e-3, 8e-3, 1.6e-2),
            targets=("head",) if head_only else "all-linear",
            ranks=(1, 2, 3, 4, 8) if head_only else (1, 2, 4, 8),
        ),
    )
