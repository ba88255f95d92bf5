"""Dates rewritten: a transformer that knows one format learns another."""

import datetime
from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..engine.loss import IGNORE
from ..files.trees import shipped_tree
from ..model.transformer import TransformerConfig, init_transformer
from .data import Data
from .task import Settings, Splits, Task, argmax_hits, token_loss

MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
FORMATS: dict[str, Callable[[datetime.date], str]] = {
    "iso": lambda d: f"{d.year}-{d.month:02}-{d.day:02}",
    "us": lambda d: f"{d.month:02}/{d.day:02}/{d.year}",
    "mon": lambda d: f"{MONTHS[d.month - 1]} {d.day:02}, {d.year}",
    "compact": lambda d: f"{d.year % 100:02}{d.month:02}{d.day:02}",
}
ALPHABET = "".join(sorted(set("0123456789-/>, ." + "".join(MONTHS))))
LENGTH = 11 + 13  # "10-09-2026>" and the longest answer, "Sep 10, 2026."
FIRST, DAYS = datetime.date(1950, 1, 1), 54786  # 1950 to 2099

CONFIG = TransformerConfig(vocab=len(ALPHABET), width=64, layers=2, heads=4, mlp="gelu", context=32)


def encode(text: str) -> list[int]:
    """Characters to ids.  Errors: `MiniloraError` for a character outside the alphabet."""
    try:
        return [ALPHABET.index(c) for c in text]
    except ValueError:
        odd = sorted(set(text) - set(ALPHABET))
        raise MiniloraError(f"dates: expected characters of {ALPHABET!r}, found {odd}") from None


def decode(ids: list[int]) -> str:
    """Ids to characters."""
    return "".join(ALPHABET[i] for i in ids)


def prompt(day: datetime.date) -> str:
    """The question, day first: "10-09-2026>"."""
    return f"{day.day:02}-{day.month:02}-{day.year}>"


def examples(days: np.ndarray, form: str) -> Data:
    """ids and targets (n, LENGTH - 1); only the answer is scored, its full stop included."""
    ids = np.zeros((len(days), LENGTH), np.int64)
    targets = np.full((len(days), LENGTH), IGNORE, np.int64)
    for row, offset in enumerate(days):
        day = FIRST + datetime.timedelta(days=int(offset))
        question, answer = prompt(day), FORMATS[form](day) + "."
        text = encode(question + answer)
        ids[row, : len(text)] = text
        targets[row, len(question) : len(text)] = text[len(question) :]
    return Data({"ids": ids[:, :-1], "targets": targets[:, 1:].copy()})


def splits(seed: int, form: str, train: int = 4096) -> Splits:
    """Days of `seed`'s permutation: no day stands in two parts; the test days are seed 0's."""
    test = np.random.default_rng(0).permutation(DAYS)[:1000]
    rest = np.setdiff1d(np.arange(DAYS), test)
    days = np.random.default_rng([seed, 1]).permutation(rest)[: train + 500]
    return Splits(*(examples(part, form) for part in (days[500:], days[:500], test)))


def exact_match(model: Any, data: Data) -> float:
    """The share of answers without a wrong character.

    Each character is predicted from the true ones before it; all of them are right if and
    only if greedy decoding writes the same answer.
    """
    right = [
        ((found == targets) | (targets == IGNORE)).all(axis=1)
        for found, targets in argmax_hits(model, data, lambda m, b: m(b["ids"]))
    ]
    return float(np.concatenate(right).mean())


def task(form: str = "mon") -> Task:
    """From ISO dates, which the shipped base writes without a mistake, to `form`."""
    if form not in FORMATS:
        raise MiniloraError(f"dates: expected a format of {', '.join(FORMATS)}; found {form!r}")
    iso = examples(np.random.default_rng(0).permutation(DAYS)[:500], "iso")
    return Task(
        name="dates",
        about="a character transformer learns to write 'Sep 10, 2026' where it wrote ISO dates",
        metric="exact match",
        base=lambda: shipped_tree("dates", init_transformer(CONFIG, np.random.default_rng(0))),
        splits=lambda seed: splits(seed, form),
        loss=token_loss,
        score=exact_match,
        before=lambda model: exact_match(model, iso),
        before_metric="ISO dates still right",
        settings=Settings(
            steps=300,
            batch=48,
            full_rates=(1e-3, 2e-3, 4e-3, 8e-3),
            lora_rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
        ),
    )
