"""Which matrices to adapt, if the number of trained numbers is the same for all choices."""

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..lora.lora import adapt
from ..model.module import count
from ..optim.adamw import AdamW
from ..train.loop import evaluate
from ..train.tasks import get_task
from .compare import at_best_rates, fit_task, versions
from .figures import BLUE, RED, canvas, save
from .report import table

CHOICES = {  # name: modules, and the rank that spends the budget
    "query": (("query",), 36),
    "query, value": (("query", "value"), 18),
    "attention": (("query", "key", "value", "output"), 9),
    "MLP": (("up", "down"), 7),
    "all": (("all-linear",), 4),
}


@dataclass(frozen=True)
class TargetsConfig:
    """Dates, at about 9,200 trained numbers; the scale s = alpha / √r is the same rule for all."""

    seeds: int = 3
    jobs: int = 2
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2)
    alpha: float = 8.0


def train_choice(name: str, lr: float, seed: int, alpha: float = 8.0) -> dict[str, Any]:
    """One run: what it scored, and how many numbers trained."""
    task = get_task("dates")
    s, data = task.settings, task.splits(seed)
    modules, rank = CHOICES[name]
    model = adapt(
        task.base(), modules[0] if len(modules) == 1 else modules, rank=rank, alpha=alpha,
        rank_stabilized=True, rng=np.random.default_rng([seed, 17]),
    )  # fmt: skip
    optimizer = AdamW(model, lr=lr, betas=s.betas, weight_decay=s.weight_decay)
    result = fit_task(task, optimizer, data.train, seed)
    return {
        "lr": lr,
        "seed": seed,
        "val_loss": evaluate(result.model, task.loss, data.validation),
        "score": task.score(result.model, data.test),
        "trainable": count(result.model, trainable=True),
    }


def targets(config: TargetsConfig) -> dict[str, Any]:
    """Each choice at its own best rate, as `compare` chooses it, over seeds."""
    rows = []
    train = partial(train_choice, alpha=config.alpha)
    for name, tried, found in at_best_rates(
        train, CHOICES, config.rates, config.seeds, config.jobs
    ):
        rows.append({
            "choice": name, "rank": CHOICES[name][1], "trainable": found[0]["trainable"],
            "lr": found[0]["lr"], "rates": tried, "scores": [run["score"] for run in found],
            "losses": [run["val_loss"] for run in found],
        })  # fmt: skip
    return {"kind": "targets", "config": asdict(config), "rows": rows, "versions": versions()}


def targets_report(record: dict[str, Any]) -> str:
    rows = [["adapted", "rank", "trainable", "lr", "exact match", "by seed", "held-out loss"]]
    for row in record["rows"]:
        rows.append([
            row["choice"], str(row["rank"]), f"{row['trainable']:,}", f"{row['lr']:g}",
            f"{statistics.mean(row['scores']):.3f}", " ".join(f"{s:.3f}" for s in row["scores"]),
            f"{statistics.mean(row['losses']):.3f}",
        ])  # fmt: skip
    return table(rows)


def targets_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Held-out loss of each choice, a dot a seed, on a logarithmic axis."""
    figure, (ax,) = canvas(6.4, 3.0)
    rows = record["rows"][::-1]
    for i, row in enumerate(rows):
        ax.plot([statistics.mean(row["losses"])], [i], "D", color=RED, ms=7)
        ax.plot(row["losses"], [i] * len(row["losses"]), "o", color=BLUE, ms=4, alpha=0.6)
    ax.set_xscale("log")
    ax.set_yticks(range(len(rows)), [f"{row['choice']} (r={row['rank']})" for row in rows])
    ax.grid(axis="x", color="0.9")
    ax.set_xlabel("held-out loss, nats per character (mean: diamond)")
    return save(figure, path)
