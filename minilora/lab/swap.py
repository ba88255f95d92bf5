"""One frozen base, four adapters: each does its own task, and none of the others'."""

from dataclasses import asdict, dataclass
from typing import Any

from ..engine.progress import progress
from ..train import letters
from .compare import Arm, fit_task, optimizer_for, spread, versions


@dataclass(frozen=True)
class SwapConfig:
    """The ways that the letters are written, and how an adapter for each is trained."""

    ways: tuple[str, ...] = ("cipher", "caesar", "reverse", "sort")
    rank: int = 4
    lr: float = 4e-3
    seeds: int = 3
    jobs: int = 2


def row_of(config: SwapConfig, way: str, seed: int) -> list[float]:
    """Train an adapter for `way`; the share of right letters in each way, `way` among them."""
    task = letters.task(way)
    optimizer = optimizer_for(Arm("lora", config.rank), task, config.lr, seed)
    run = fit_task(task, optimizer, task.splits(seed).train, seed)
    columns = ("copy", *config.ways)
    return [letters.accuracy(run.model, letters.examples(w, 500, 1)) for w in columns]


def swap(config: SwapConfig) -> dict[str, Any]:
    """The matrix adapters by tasks, for every seed; the base is the first row."""
    calls = [(config, way, seed) for way in config.ways for seed in range(config.seeds)]
    bar = progress(total=len(calls), label="swap")
    found = []
    for row in spread(row_of, calls, config.jobs):
        found.append(row)
        bar.update(1)
    bar.close()
    base = letters.base()
    columns = ["copy", *config.ways]
    first = [letters.accuracy(base, letters.examples(w, 500, 1)) for w in columns]
    n = config.seeds
    rows = [{"adapter": None, "seeds": [first]}]
    rows += [
        {"adapter": way, "seeds": found[i * n : (i + 1) * n]} for i, way in enumerate(config.ways)
    ]
    return {
        "kind": "swap",
        "config": asdict(config),
        "tasks": columns,
        "rows": rows,
        "versions": versions(),
    }


def swap_report(record: dict[str, Any]) -> str:
    """The matrix, its entries means over seeds."""
    from .report import table

    rows = [["adapter", *record["tasks"]]]
    for row in record["rows"]:
        means = [sum(column) / len(column) for column in zip(*row["seeds"], strict=True)]
        rows.append([row["adapter"] or "none", *(f"{m:.3f}" for m in means)])
    config = record["config"]
    return table(rows) + (
        f"\n\nLetters right, mean over {config['seeds']} seeds: adapters of rank {config['rank']} "
        "on one frozen base,\neach asked for every task."
    )
