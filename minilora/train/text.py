"""Real text, a character at a time: a model of two plays learns another style, or your file."""

import lzma
import string
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import FormatError, MissingFileError
from ..engine.loss import IGNORE
from ..files.trees import DATA, shipped_tree
from ..model.transformer import TransformerConfig, init_transformer
from .data import Data
from .loop import evaluate
from .task import Settings, Splits, Task, token_loss

UNKNOWN = 0  # stands for every character outside the alphabet; never scored
ALPHABET = "\ufffd\n " + string.ascii_letters + string.digits + ".,;:!?'\"-()[]&"
LENGTH = 64  # characters of an example
CONFIG = TransformerConfig(
    vocab=len(ALPHABET), width=64, layers=3, heads=4, mlp="gelu", context=LENGTH, tied=False
)


def shipped_text(name: str) -> str:
    """The text `minilora/data/NAME.txt.xz`."""
    return lzma.decompress((DATA / f"{name}.txt.xz").read_bytes()).decode("ascii")


def encode(text: str) -> np.ndarray:
    """Characters to ids; those outside the alphabet become `UNKNOWN`."""
    index = {c: i for i, c in enumerate(ALPHABET)}
    return np.array([index.get(c, UNKNOWN) for c in text], np.int64)


def decode(ids: list[int]) -> str:
    """Ids to characters."""
    return "".join(ALPHABET[i] for i in ids)


def windows(ids: np.ndarray, stride: int = LENGTH) -> Data:
    """Stretches of `LENGTH` characters, each with the next character as its target."""
    starts = np.arange(0, len(ids) - LENGTH, stride)
    table = ids[starts[:, None] + np.arange(LENGTH + 1)]
    targets = np.where(table[:, 1:] == UNKNOWN, IGNORE, table[:, 1:])
    return Data({"ids": table[:, :-1].copy(), "targets": targets})


def cut(text: str) -> Splits:
    """By place: the first 80% to train on, then 10% for validation, then 10% for the test."""
    ids = encode(text)
    a, b = int(0.8 * len(ids)), int(0.9 * len(ids))
    return Splits(windows(ids[:a], LENGTH // 2), windows(ids[a:b]), windows(ids[b:]))


def nats(model: Any, data: Data) -> float:
    """The mean surprise by a character, in nats."""
    return evaluate(model, token_loss, data)


def base() -> Any:
    """The frozen model of Hamlet and Macbeth."""
    return shipped_tree("text", init_transformer(CONFIG, np.random.default_rng(0)))


SETTINGS = Settings(
    steps=300,
    batch=32,
    full_rates=(1e-3, 2e-3, 4e-3, 8e-3),
    lora_rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2),
    ranks=(1, 2, 4, 8, 16),
)


def task() -> Task:
    """From Shakespeare's plays to the King James Genesis."""
    return text_task("text", shipped_text("genesis"), "the King James Genesis")


def file_task(path: str | Path) -> Task:
    """From Shakespeare's plays to the reader's own file, which is cut by place into three.

    Errors: `MissingFileError`; `FormatError` for a file that is not UTF-8, too short, or of
    which more than a tenth is outside the alphabet.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise MissingFileError(f"{path}: expected a text file, found none") from None
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path}: expected text in UTF-8 ({error})") from None
    if len(text) < 40 * LENGTH:
        raise FormatError(
            f"{path}: expected at least {40 * LENGTH:,} characters to train and test on, "
            f"found {len(text):,}"
        )
    unknown = int((encode(text) == UNKNOWN).sum())
    if unknown > len(text) / 10:
        raise FormatError(
            f"{path}: expected text in the alphabet of the base ({len(ALPHABET) - 1} characters), "
            f"found {unknown:,} of {len(text):,} characters outside it"
        )
    about = f"{path.name} ({unknown:,} characters outside the alphabet are not scored)"
    return text_task(f"data:{path}", text, about)


def text_task(name: str, text: str, what: str) -> Task:
    data, old = cut(text), cut(shipped_text("shakespeare")).test
    return Task(
        name=name,
        about=f"a character transformer that knows two plays of Shakespeare reads {what}",
        metric="nats per character",
        lower_is_better=True,
        base=base,
        splits=lambda seed: data,
        loss=token_loss,
        score=nats,
        before=lambda model: nats(model, old),
        before_metric="nats on the plays",
        settings=SETTINGS,
    )
