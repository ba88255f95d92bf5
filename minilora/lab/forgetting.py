"""What is learned against what is forgotten, as paths: an end point hides how it was reached."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..engine.progress import progress
from ..optim.schedule import schedule
from ..train import text
from ..train.loop import fit
from ..train.task import Task
from ..train.tasks import TASKS
from .compare import Arm, optimizer_for, spread, versions


@dataclass(frozen=True)
class ForgettingConfig:
    """Long training on little text: `characters` of Genesis, `steps` steps at a constant rate."""

    characters: int = 20_000
    steps: int = 600
    batch: int = 16
    marks: tuple[int, ...] = (10, 25, 50, 100, 150, 200, 300, 400, 500, 600)
    seeds: int = 3
    jobs: int = 2
    # (rank or None for full fine-tuning, learning rate)
    arms: tuple[tuple[int | None, float], ...] = (
        (None, 1e-3),
        (None, 3e-4),
        (8, 4e-3),
        (8, 1.5e-3),
        (2, 4e-3),
        (2, 1.5e-3),
    )


def path_of(config: ForgettingConfig, rank: int | None, lr: float, seed: int) -> list[dict]:
    """One run: nats per character on held-out Genesis and on the plays, at every mark."""
    task = little(config)
    arm = Arm("full") if rank is None else Arm("lora", rank)
    optimizer = optimizer_for(arm, task, lr, seed)
    data, old = task.splits(seed), text.cut(text.shipped_text("shakespeare")).validation

    def mark(step: int, train: float | None) -> dict[str, Any]:
        return {
            "step": step,
            "train": train,
            "new": text.nats(optimizer.model, data.validation),
            "old": text.nats(optimizer.model, old),
        }

    found, done = [mark(0, None)], 0
    for stop in config.marks:
        run = fit(
            optimizer,
            task.loss,
            data.train,
            steps=stop - done,
            batch=config.batch,
            seed=1000 * seed + done,
            schedule=schedule("constant", stop - done),
            clip=1.0,
            every=stop - done,
        )
        done = stop
        found.append(mark(stop, run.history[-1]["loss"]))
    return found


def little(config: ForgettingConfig) -> Task:
    """The text task with `characters` to train on; validation and test as they are."""
    task = TASKS["text"]()
    whole = text.encode(text.shipped_text("genesis"))
    few = text.windows(whole[: config.characters], text.LENGTH // 2)
    return replace(task, splits=lambda seed: replace(task.splits(seed), train=few))


def forgetting(config: ForgettingConfig) -> dict[str, Any]:
    """All paths as a record: per arm and seed, the points along the way."""
    calls = [(config, rank, lr, seed) for rank, lr in config.arms for seed in range(config.seeds)]
    bar = progress(total=len(calls), label="forgetting")
    paths = []
    for points in spread(path_of, calls, config.jobs):
        paths.append(points)
        bar.update(1)
    bar.close()
    arms = []
    for i, (rank, lr) in enumerate(config.arms):
        mine = paths[i * config.seeds : (i + 1) * config.seeds]
        name = f"{'full' if rank is None else f'lora r={rank}'}, lr {lr:g}"
        mean = [
            {
                "step": points[0]["step"],
                **{k: float(np.mean([p[k] for p in points])) for k in ("new", "old")},
                "spread": float(np.std([p["old"] for p in points])),
            }
            for points in zip(*mine, strict=True)
        ]
        arms.append({"name": name, "rank": rank, "lr": lr, "paths": mine, "mean": mean})
    return {"kind": "forgetting", "config": asdict(config), "arms": arms, "versions": versions()}


def forgetting_report(record: dict[str, Any]) -> str:
    """A line an arm: at its best on new text, and at the end."""
    from .report import table

    rows = [["arm", "best step", "new", "plays", "at the end: new", "plays"]]
    for arm in record["arms"]:
        best = min(arm["mean"], key=lambda p: p["new"])
        last = arm["mean"][-1]
        rows.append([
            arm["name"], str(best["step"]), f"{best['new']:.3f}", f"{best['old']:.3f}",
            f"{last['new']:.3f}", f"{last['old']:.3f} ± {last['spread']:.3f}",
        ])  # fmt: skip
    start = record["arms"][0]["mean"][0]
    config = record["config"]
    return table(rows) + (
        f"\n\nNats per character, mean over {config['seeds']} seeds, on held-out Genesis (new) and "
        f"on the plays that the base knows.\nThe base: {start['new']:.3f} and {start['old']:.3f}.  "
        f"{config['steps']} steps at a constant rate on {config['characters']:,} characters."
    )
