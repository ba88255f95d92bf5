"""How well a model predicts a text, and what each code of its weights costs in that."""

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError, NumericsError
from ..engine.progress import progress
from ..files.peft import load_adapter
from ..quant.linear import quantize
from ..train.corpus import read_corpus
from ..train.data import Data
from ..train.loop import evaluate
from ..train.task import token_loss
from .answer import open_for_text
from .figures import BLACK, BLUE, RED, canvas, save, words
from .ledger import held_bytes
from .machine import machine
from .report import size, table

PLAIN = "float32"
MOST_NATS = 700  # exp of a little more is no float


@dataclass(frozen=True)
class PerplexityConfig:
    """What reads what.  A code may be `float32`, or `nf4`, `fp4`, `int4`, ...; with `+dq` its
    scales are quantized too."""

    model: str = "smollm2"
    data: str = "genesis"
    codes: tuple[str, ...] = (PLAIN,)
    adapter: str | None = None
    windows: int = 32
    max_len: int = 256
    block: int = 64


def perplexity(config: PerplexityConfig) -> dict[str, Any]:
    """A record: for each code the mean loss over the same windows, and exp of it; how far that loss
    is above the first code's, and the standard error of this over the windows.

    The windows lie evenly over the text; each begins without context, so that the figures
    are for comparing models on one setting, not for comparing settings.
    Errors: `MiniloraError` for a model without a tokenizer, a text of fewer windows than two, or
    no codes; `QuantError` for a code that is not known; `NumericsError` for a broken model.
    """
    began = time.monotonic()
    if not config.codes:
        raise MiniloraError("codes: expected at least one, found none")
    source, tokenizer = open_for_text(config.model)
    length = min(config.max_len, source.model.config.context)
    corpus = read_corpus(config.data, tokenizer, length)
    chosen = corpus.train.spread(config.windows)
    scored = np.flatnonzero(chosen.scored)
    windows = [Data({k: a[[i]] for k, a in chosen.arrays.items()}) for i in scored]
    share = chosen.scored[scored] / chosen.scored.sum()  # of each window in the mean
    rows: list[dict[str, Any]] = []
    for name in progress(config.codes, label="perplexity"):
        model = source.model
        if name != PLAIN:
            code, plus, double = name.partition("+")
            if plus + double not in ("", "+dq"):
                raise MiniloraError(f"codes: expected NAME or NAME+dq, found {name!r}")
            model = quantize(model, code=code, block=config.block, double=bool(double))
        if config.adapter is not None:
            model = load_adapter(config.adapter, model)
        losses = np.array([evaluate(model, token_loss, window) for window in windows])
        if not rows:
            first = losses
        mean = float(share @ losses)
        if not mean < MOST_NATS:
            raise NumericsError(f"{name}: expected a loss below {MOST_NATS}, found {mean}")
        rows.append({"code": name, "loss": mean, "perplexity": math.exp(mean),
                     "bytes": held_bytes(model)} | above(losses - first, share))  # fmt: skip
    return {
        "kind": "perplexity",
        "config": asdict(config),
        "model": {"name": source.name, "weights": source.about},
        "data": {"name": corpus.name, "kind": corpus.kind, "windows": len(chosen),
                 "tokens": int(chosen.scored.sum())},
        "rows": rows,
        "machine": machine(),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def above(d: np.ndarray, share: np.ndarray) -> dict[str, float | None]:
    """The mean of d (n,), weighted by `share`, which sums to 1, and its standard error.

    error² = n/(n-1) Σ share² (d - mean)²,   s²/n for equal shares; None for a single one
    """
    n, mean = len(d), float(share @ d)
    squares = float((share**2) @ (d - mean) ** 2)
    return {"above": mean, "error": math.sqrt(n / (n - 1) * squares) if n > 1 else None}


def perplexity_report(record: dict[str, Any]) -> str:
    """A table by code, and what the base itself was."""
    data, first = record["data"], record["rows"][0]["code"]
    rows = [["code", "nats per token", f"above {first}", "perplexity", "weights"]]
    for row in record["rows"]:
        more = "-" if row["error"] is None else f"{row['above']:.4f} ± {row['error']:.4f}"
        rows.append([
            row["code"], f"{row['loss']:.4f}", more if row["code"] != first else "-",
            f"{row['perplexity']:.3f}", size(row["bytes"]),
        ])  # fmt: skip
    return "\n".join([
        table(rows), "",
        f"{record['model']['name']} on {data['name']}: {data['tokens']:,} tokens in "
        f"{data['windows']} windows; codes on the linears of blocks, blocks of "
        f"{record['config']['block']}; ±: the standard error over the windows.",
        f"The base itself: {record['model']['weights']}; what it lost before is in every row.",
    ])  # fmt: skip


def perplexity_figure(record: dict[str, Any], path: str | os.PathLike) -> Path:
    """Perplexity against the bytes of the weights, a point a code."""
    figure, (ax,) = canvas(6.4, 4.0)
    for row in record["rows"]:
        plain, double = row["code"] == PLAIN, row["code"].endswith("+dq")
        color = BLACK if plain else RED if double else BLUE
        x = row["bytes"] / 2**20
        ax.plot(x, row["perplexity"], "s" if plain else "D" if double else "o", color=color)
        left = double or x > np.mean([r["bytes"] / 2**20 for r in record["rows"]])
        ax.annotate(row["code"], (x, row["perplexity"]), textcoords="offset points",
                    xytext=(-8 if left else 8, 0), ha="right" if left else "left", va="center",
                    fontsize=9)  # fmt: skip
    ax.set_xlabel("weights held, MiB")
    ax.set_ylabel(f"perplexity on {words(record['data']['name'])}")
    base = record["model"]["weights"]
    ax.set_title(f"codes on the linears; the base: {base}", loc="left", fontsize=10)
    ax.margins(0.2, 0.12)
    return save(figure, path)
