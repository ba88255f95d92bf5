"""Does it matter where an adapter starts, and what else trains?  PiSSA, LoftQ and DoRA on dates."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import NumericsError
from ..lora.lora import LoRALinear, adapt
from ..lora.variants import dora, loftq, pissa
from ..model.layers import Linear
from ..model.module import count, rebuild, walk
from ..optim.adamw import AdamW
from ..optim.schedule import schedule
from ..quant.blockwise import quantize_array
from ..quant.codes import Code, make
from ..quant.linear import QuantizedLinear, distance, quantize
from ..train import dates
from ..train.loop import evaluate, fit
from ..train.tasks import get_task
from .compare import at_best_rates, at_edge, versions
from .figures import BLUE, GREEN, MARKS, ORANGE, PURPLE, RED, canvas, save
from .report import table


@cache
def two_bits() -> Code:
    """-1, 0 and 1 times the largest weight of a block."""
    return make("two bits", 4, [-1.0, 0.0, 1.0])


def coarse(base: Linear) -> QuantizedLinear:
    return QuantizedLinear(quantize_array(base.weight.data, two_bits(), 64), base.bias)


def on_codes(adapted: Any, quantizer: Callable[[Linear], Any]) -> Any:
    """The same adapters, B at zero, on a base in codes: QLoRA."""

    def change(path: str, node: Any) -> Any:
        if not isinstance(node, LoRALinear):
            return node
        return replace(node, base=quantizer(node.base))

    return rebuild(adapted, change)


STARTS: dict[str, Callable[[Any, Callable], Any]] = {  # (adapted model, quantizer) -> start
    "QLoRA": on_codes,
    "QPiSSA": pissa,
    "LoftQ": loftq,
    "LoftQ, 5 rounds": partial(loftq, rounds=5),
}
ARMS: dict[str, Callable[[Any], Any]] = {  # adapted model -> where the arm starts
    "LoRA": lambda adapted: adapted,
    "PiSSA": pissa,
    "DoRA": dora,
} | {
    f"{name}, 2 bits": lambda adapted, start=start: start(adapted, coarse)
    for name, start in STARTS.items()
}
CODES = {"2 bits": coarse, "NF4": partial(quantize, double=False)}


@dataclass(frozen=True)
class VariantsConfig:
    """Dates at a rank that leaves something to wish for; where the arms start, at several."""

    seeds: int = 3
    jobs: int = 2
    rank: int = 2
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    every: int = 30


def start_of(arm: str, rank: int, seed: int) -> Any:
    """The model that an arm begins with."""
    task = get_task("dates")
    s, rng = task.settings, np.random.default_rng([seed, 17])
    return ARMS[arm](adapt(task.base(), s.targets, rank=rank, alpha=s.alpha, rng=rng))


def train_variant(
    arm: str, lr: float, seed: int, rank: int = 2, every: int = 30, steps: int | None = None
) -> dict[str, Any]:
    """One run: what it scored, and its held-out loss on the way."""
    task = get_task("dates")
    s, data = task.settings, task.splits(seed)
    steps = steps or s.steps
    start = start_of(arm, rank, seed)
    optimizer = AdamW(start, lr=lr, betas=s.betas, weight_decay=s.weight_decay)
    run = {"lr": lr, "seed": seed, "trainable": count(start, trainable=True)}
    curve = [[0, evaluate(start, task.loss, data.validation)]]
    try:
        result = fit(
            optimizer, task.loss, data.train, steps=steps, batch=s.batch, seed=seed, clip=s.clip,
            schedule=schedule(s.schedule, steps, s.warmup), validation=data.validation, every=every,
        )  # fmt: skip
    except NumericsError as error:  # too high a rate: a finding, not the end of the experiment
        return run | {"diverged": str(error), "val_loss": None, "score": None, "curve": curve}
    curve += [[entry["step"], entry["val"]] for entry in result.history]
    return run | {
        "val_loss": min(loss for _, loss in curve[1:]),
        "score": task.score(result.model, data.test),
        "curve": curve,
    }


def dense(model: Any) -> np.ndarray:
    """All of base + s B A, linear after linear."""
    return np.concatenate([
        node.merged().weight.data.ravel()
        for _, node in walk(model) if isinstance(node, LoRALinear)
    ])  # fmt: skip


def starts(ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Before any training, by start, code and rank: how far the weights are from W0, in
    √(Σ ‖W0 - base - s B A‖² / Σ ‖W0‖²) over the linears, and the loss on the dates that the
    base was trained for."""
    task, old = get_task("dates"), dates.splits(0, "iso").validation
    base, rows = task.base(), []
    for name, start in STARTS.items():
        for code, quantizer in CODES.items():
            row = {"start": name, "code": code, "distance": [], "loss": []}
            for rank in ranks:
                rng = np.random.default_rng(0)
                adapted = adapt(base, task.settings.targets, rank=rank, alpha=rank, rng=rng)
                model = start(adapted, quantizer)
                row["distance"].append(distance(dense(model), dense(adapted)))
                row["loss"].append(evaluate(model, task.loss, old))
            rows.append(row)
    return rows


def variants(config: VariantsConfig) -> dict[str, Any]:
    """Each arm at its own best rate, as `compare` chooses it, over seeds; and the starts."""
    rows = []
    train = partial(train_variant, rank=config.rank, every=config.every)
    for arm, tried, found in at_best_rates(train, ARMS, config.rates, config.seeds, config.jobs):
        lr = found[0]["lr"]
        rows.append({
            "arm": arm, "trainable": found[0]["trainable"], "lr": lr,
            "lr_at_edge": at_edge(lr, [run["lr"] for run in tried]),
            "rates": [{k: run[k] for k in ("lr", "val_loss", "score")} for run in tried],
            "scores": [run["score"] for run in found],
            "losses": [run["val_loss"] for run in found],
            "curves": [run["curve"] for run in found],
        })  # fmt: skip
    return {
        "kind": "variants", "config": asdict(config), "rows": rows,
        "starts": starts(config.ranks), "versions": versions(),
    }  # fmt: skip


def variants_report(record: dict[str, Any]) -> str:
    rank, ranks = record["config"]["rank"], record["config"]["ranks"]
    rows = [
        [f"r = {rank}", "trainable", "lr", "loss at start", "held-out loss", "exact", "by seed"]
    ]
    for row in record["rows"]:
        rows.append([
            row["arm"], f"{row['trainable']:,}", f"{row['lr']:g}{'*' if row['lr_at_edge'] else ''}",
            f"{statistics.mean(curve[0][1] for curve in row['curves']):.3f}",
            f"{statistics.mean(row['losses']):.3f}", f"{statistics.mean(row['scores']):.3f}",
            " ".join(f"{s:.3f}" for s in row["scores"]),
        ])  # fmt: skip
    edge = any(row["lr_at_edge"] for row in record["rows"])
    lines = [table(rows) + "\n* the lowest or the highest rate that was tried" * edge]
    for key, title in (("distance", "‖W0 - base - s B A‖ / ‖W0‖"), ("loss", "loss, old dates")):
        found = [[f"{title}, at the start", "code", *(f"r={r}" for r in ranks)]]
        for row in record["starts"]:
            found.append([row["start"], row["code"], *(f"{value:.3f}" for value in row[key])])
        lines.append(table(found))
    return "\n\n".join(lines)


def variants_figure(record: dict[str, Any], path: str | Path) -> Path:
    """What a start is worth, by rank, before any training; then the losses on the way."""
    figure, (far, old, whole, low) = canvas(7.2, 6.6, panels=2, rows=2)
    ranks = record["config"]["ranks"]
    colors = dict(zip(STARTS, (BLUE, ORANGE, RED, GREEN), strict=True))
    for ax, key, title in (
        (far, "distance", "‖W0 - base - s B A‖ / ‖W0‖"),
        (old, "loss", "loss on the old dates, nats"),
    ):
        for row in record["starts"]:
            name, four = row["start"], row["code"] == "NF4"
            ax.loglog(
                ranks, row[key], "-" if four else "--", color=colors[name], marker="o", ms=4,
                label=name if four and ax is far else None,
            )  # fmt: skip
        ax.set_xticks(ranks, [str(rank) for rank in ranks])
        if ax is far:
            ax.set_yticks((0.05, 0.1, 0.2, 0.5), ("0.05", "0.1", "0.2", "0.5"))
        ax.minorticks_off()
        ax.set_xlabel("rank r")
        ax.set_title(f"at the start (dashed: 2 bits):\n{title}", loc="left", fontsize=9)
    colors |= {"LoRA": BLUE, "PiSSA": ORANGE, "DoRA": PURPLE}  # B = 0, and W0 split, as above
    for mark, row in zip(MARKS * 2, record["rows"], strict=False):
        ax = low if "bits" in row["arm"] else whole
        name, curves = row["arm"].replace(", 2 bits", ""), np.array(row["curves"])
        ax.semilogy(
            curves[0, :, 0], curves[:, :, 1].mean(axis=0), color=colors[name], marker=mark, ms=4,
            label=f"{name}, lr {row['lr']:g}",
        )  # fmt: skip
    for ax, title in ((whole, "base in 32 bits"), (low, "base in 2 bits")):
        head = f"r = {record['config']['rank']}, {title}:\nheld-out loss, nats (mean of seeds)"
        ax.set_title(head, loc="left", fontsize=9)
        ax.set_xlabel("step")
        ax.legend(frameon=False, fontsize=8)
    far.legend(frameon=False, fontsize=8, loc="center left")
    return save(figure, path)
