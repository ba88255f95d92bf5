"""Full fine-tuning and LoRA, rank by rank, on one task: the same data, each at its own best rate.

Every arm gets the same treatment: its learning rate is chosen by validation loss on the
first seed from at least three, then it is trained on every seed at that rate and reported
on test data.  The selection run at the chosen rate is the first of those runs.  Where the
second best rate is so close that another machine's rounding could have put it first, both are
trained on every seed, and the lower mean chooses.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from .. import __version__
from ..engine.backend import device_of, xp_of
from ..engine.blas import one_blas_thread
from ..engine.check import retained
from ..engine.errors import MiniloraError, NumericsError
from ..engine.progress import progress
from ..lora.lora import adapt
from ..model.module import count, tensors, unfreeze, walk
from ..optim.adamw import AdamW
from ..optim.schedule import schedule
from ..quant.blockwise import QuantizedArray
from ..quant.codes import code
from ..quant.linear import quantize
from ..train.checkpoint import Fit
from ..train.data import Data
from ..train.loop import evaluate, fit
from ..train.task import Task
from ..train.tasks import get_task
from .ledger import held_bytes

DEFAULT_METHODS = ("full", "lora", "qlora")
QLORA_RANK = 8  # the one rank at which the default run shows QLoRA
TIE = 0.1  # of a validation loss; from one machine to another rounding moved some by 0.02 to 0.14


@dataclass(frozen=True)
class Arm:
    """One column of the comparison: a method, and the rank where it has one."""

    method: str
    rank: int | None = None

    @property
    def name(self) -> str:
        return self.method if self.rank is None else f"{self.method} r={self.rank}"


@dataclass(frozen=True)
class CompareConfig:
    """What is compared.  None stands for the task's own setting."""

    task: str = "dates"
    methods: tuple[str, ...] | None = None  # None: full, LoRA by rank, QLoRA at one rank
    ranks: tuple[int, ...] | None = None
    seeds: int = 3
    steps: int | None = None
    rates: int | None = None  # how many of the task's rates to try, from the middle out
    jobs: int = 2

    def __post_init__(self) -> None:
        for method in self.methods or ():
            if method not in ("full", "lora"):
                code_of(method)
        for name, values in (("methods", self.methods), ("ranks", self.ranks)):
            if values is not None and (not values or len(set(values)) != len(values)):
                raise MiniloraError(f"{name}: expected at least one, each once; found {values}")
        for rank in self.ranks or ():
            if rank < 1:
                raise MiniloraError(f"ranks: expected whole numbers >= 1, found {rank}")
        for name in ("seeds", "steps", "rates", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MiniloraError(f"{name}: expected a whole number >= 1, found {value}")

    def arms(self, task: Task) -> list[Arm]:
        """Full fine-tuning first, then each adapter method at each rank."""
        ranks = self.ranks or task.settings.ranks
        arms = []
        for method in self.methods or DEFAULT_METHODS:
            if method == "full":
                arms.append(Arm(method))
            elif self.methods is None and method == "qlora":
                arms += [Arm(method, r) for r in ranks if r == QLORA_RANK]
            else:
                arms += [Arm(method, r) for r in ranks]
        return arms


def quick(config: CompareConfig, task: Task) -> CompareConfig:
    """The same in small: one seed, three ranks, the middle rate, two thirds of the steps."""
    ranks = config.ranks or task.settings.ranks
    few = tuple(dict.fromkeys((ranks[0], ranks[len(ranks) // 2], ranks[-1])))
    return replace(config, ranks=few, seeds=1, rates=1, steps=max(1, 2 * task.settings.steps // 3))


def code_of(method: str) -> str:
    """The code of a method "qlora" (NF4) or "qlora-CODE".  Errors: `MiniloraError`."""
    kind, _, name = method.partition("-")
    if kind != "qlora":
        raise MiniloraError(
            f"methods: expected some of full, lora, qlora, qlora-CODE; found {method!r}"
        )
    return code(name or "nf4").name


def start(arm: Arm, task: Task, rng: np.random.Generator) -> Any:
    """The model that an arm trains: the task's base, thawed or adapted, quantized or not."""
    base, s = task.base(), task.settings
    if arm.method == "full":
        return unfreeze(base)
    if arm.method != "lora":
        base = quantize(base, s.targets, code=code_of(arm.method))
    alpha = float(arm.rank) if s.alpha is None else s.alpha
    return adapt(base, s.targets, rank=arm.rank, alpha=alpha, rng=rng)


def optimizer_for(arm: Arm, task: Task, lr: float, seed: int) -> AdamW:
    """The arm's model under the task's AdamW, ready for `fit`."""
    s = task.settings
    model = start(arm, task, np.random.default_rng([seed, 17]))
    return AdamW(model, lr=lr, betas=s.betas, weight_decay=s.weight_decay)


def fit_task(task: Task, optimizer: AdamW, train: Data, seed: int, steps: int | None = None) -> Fit:
    """Train by the task's settings; one record, at the end."""
    s = task.settings
    steps = steps or s.steps
    return fit(
        optimizer,
        task.loss,
        train,
        steps=steps,
        batch=s.batch,
        seed=seed,
        schedule=schedule(s.schedule, steps, s.warmup),
        clip=s.clip,
        every=steps,
    )


def train_arm(task_name: str, arm: Arm, lr: float, seed: int, steps: int | None) -> dict[str, Any]:
    """Train one arm once; its losses and scores as a plain record, or that it diverged."""
    task = get_task(task_name)
    data = task.splits(seed)
    optimizer = optimizer_for(arm, task, lr, seed)
    run = {"arm": arm.name, "lr": lr, "seed": seed}
    try:
        result = fit_task(task, optimizer, data.train, seed, steps)
    except NumericsError as error:  # too high a rate: a finding, not the end of the comparison
        return run | {"diverged": str(error), "val_loss": None, "score": None}
    return run | {
        "train_loss": result.history[-1]["loss"],
        "val_loss": evaluate(result.model, task.loss, data.validation),
        "score": task.score(result.model, data.test),
        "before": None if task.before is None else task.before(result.model),
    }


def rates_of(arm: Arm, task: Task, few: int | None) -> tuple[float, ...]:
    """The rates an arm chooses from; with `few`, that many from the middle."""
    rates = task.settings.full_rates if arm.method == "full" else task.settings.lora_rates
    if few is None or few >= len(rates):
        return rates
    first = (len(rates) - few) // 2
    return rates[first : first + few]


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the comparison; a record of plain values that `report` and the figures read.

    A pure function of its config but for `ms_per_step`, the versions and `seconds`.
    """
    began = time.monotonic()
    task = get_task(config.task)
    arms = config.arms(task)
    sweep = [
        (config.task, arm, lr, 0, config.steps)
        for arm in arms
        for lr in rates_of(arm, task, config.rates)
    ]
    runs: dict[str, list[dict]] = {arm.name: [] for arm in arms}
    for run in progress(
        spread(train_arm, sweep, config.jobs), total=len(sweep), label=f"{config.task}: rates"
    ):
        runs[run["arm"]].append(run)
    close = {name: closest(name, tried) for name, tried in runs.items()}
    rest = [
        (config.task, arm, run["lr"], seed, config.steps)
        for arm in arms
        for run in close[arm.name]
        for seed in range(1, config.seeds)
    ]
    at_rate = {(name, run["lr"]): [run] for name, tried in runs.items() for run in tried}
    for run in progress(
        spread(train_arm, rest, config.jobs), total=len(rest), label=f"{config.task}: seeds"
    ):
        at_rate[run["arm"], run["lr"]].append(run)
    reported = {
        name: choose(name, [at_rate[name, run["lr"]] for run in tied])
        for name, tied in close.items()
    }

    base = task.base()
    base_score = task.score(base, task.splits(0).test)
    entries = []
    for arm in arms:
        name = arm.name
        lr, scores = reported[name][0]["lr"], [run["score"] for run in reported[name]]
        before = [run["before"] for run in reported[name] if run["before"] is not None]
        entries.append({
            "name": name,
            "method": arm.method,
            "rank": arm.rank,
            "lr": lr,
            "lr_at_edge": at_edge(lr, [run["lr"] for run in runs[name]]),
            "rates": [
                {k: run[k] for k in ("lr", "val_loss", "score")}
                | {"val_losses": [one["val_loss"] for one in at_rate[name, run["lr"]]]}
                for run in runs[name]
            ],
            "scores": scores,
            "mean": statistics.mean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else None,
            "before": statistics.mean(before) if before else None,
            **footprint(arm, task),
        })  # fmt: skip
    full = next((e["mean"] for e in entries if e["method"] == "full"), None)
    for entry in entries:
        gain = None if full is None or full == base_score else full - base_score
        entry["gain_share"] = None if gain is None else (entry["mean"] - base_score) / gain
    for entry, ms in zip(entries, step_times(arms, task), strict=True):
        entry["ms_per_step"] = ms
    return {
        "kind": "compare",
        "config": asdict(config),
        "task": {
            "name": task.name,
            "about": task.about,
            "metric": task.metric,
            "lower_is_better": task.lower_is_better,
            "before_metric": task.before_metric,
            "per_parameter": task.per_parameter,
            "steps": config.steps or task.settings.steps,
            "batch": task.settings.batch,
        },
        "base": {"score": base_score, "before": task.before(base) if task.before else None},
        "arms": entries,
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
    }


def closest(name: str, tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run with the lowest validation loss, and the next if that is within `TIE` of it.

    Errors: `NumericsError` if all diverged.
    """
    sound = sorted(filter(is_sound, tried), key=lambda run: run["val_loss"])
    if not sound:
        raise NumericsError(f"{name}: every rate diverged; {tried[0].get('diverged')}")
    lowest = sound[0]["val_loss"]
    return [run for run in sound[:2] if run["val_loss"] <= lowest + TIE * abs(lowest)]


def choose(name: str, candidates: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of the runs of one rate or two, over all seeds, those with the lower mean validation loss.

    Errors: `NumericsError` if each rate diverged on some seed.
    """
    sound = [runs for runs in candidates if all(map(is_sound, runs))]
    if not sound:
        run = next(run for run in candidates[0] if not is_sound(run))
        found = run.get("diverged") or f"validation loss {run['val_loss']}"
        raise NumericsError(f"{name} at {run['lr']}, seed {run['seed']}: {found}")
    return min(sound, key=lambda runs: statistics.mean(run["val_loss"] for run in runs))


def at_best_rates(
    train: Callable[[str, float, int], dict[str, Any]],
    arms: Iterable[str], rates: Sequence[float], seeds: int, jobs: int,
) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:  # fmt: skip
    """For each arm its runs `train(arm, rate, 0)` at all rates, and over seeds at the best."""
    arms = list(arms)
    tries = [(arm, lr, 0) for arm in arms for lr in rates]
    runs = list(progress(spread(train, tries, jobs), total=len(tries), label="rates"))
    for i, arm in enumerate(progress(arms, label="seeds")):
        tried = runs[i * len(rates) : (i + 1) * len(rates)]
        close = closest(arm, tried)
        more = [(arm, run["lr"], seed) for run in close for seed in range(1, seeds)]
        rest = iter(list(spread(train, more, jobs)))
        yield arm, tried, choose(arm, [[run, *islice(rest, seeds - 1)] for run in close])


def is_sound(run: dict[str, Any]) -> bool:
    return run["val_loss"] is not None and math.isfinite(run["val_loss"])


def at_edge(lr: float, tried: list[float]) -> bool:
    """Was the best of several rates the lowest or highest of them?"""
    return len(tried) > 1 and lr in (min(tried), max(tried))


def spread(function: Callable, calls: list[tuple], jobs: int) -> Iterator[Any]:
    """`function(*call)` for each call, in order, over `jobs` processes with one BLAS thread each.

    Without joblib, one after the other.
    """
    if jobs > 1 and len(calls) > 1:
        try:
            from joblib import Parallel, delayed, parallel_config
        except ImportError:
            pass
        else:
            with parallel_config(backend="loky", inner_max_num_threads=1):
                tasks: Iterable = (delayed(function)(*call) for call in calls)
                yield from Parallel(n_jobs=jobs, return_as="generator")(tasks)
            return
    yield from (function(*call) for call in calls)


def footprint(arm: Arm, task: Task) -> dict[str, Any]:
    """What an arm trains and holds, in numbers and bytes, counted on one real step."""
    optimizer = optimizer_for(arm, task, 1e-3, 0)
    model, flat = optimizer.model, optimizer.flat
    weights = [t.data for t in tensors(model).values()]
    codes = [n for _, n in walk(model) if isinstance(n, QuantizedArray) and len(n.shape) == 2]
    batch, _ = task.splits(0).train.take(slice(0, task.settings.batch), device_of(weights[0]))
    kept = retained(task.loss(model, batch, np.random.default_rng(0)), besides=weights)
    trainable = count(model, trainable=True)
    total = count(model) + sum(math.prod(held.shape) for held in codes)
    return {
        "trainable": trainable,
        "share": trainable / total,
        "bytes": {
            "weights": held_bytes(model),
            "gradients": flat.grad.nbytes,
            "optimizer": optimizer.m.nbytes + optimizer.v.nbytes,
            "activations": sum(kept.values()),
        },
    }


def step_times(arms: list[Arm], task: Task, rounds: int = 7) -> list[float]:
    """Milliseconds per training step: the arms in turn, the median of `rounds`, on one thread."""
    train = task.splits(0).train
    rows = np.arange(min(task.settings.batch, len(train)))
    optimizers = [optimizer_for(arm, task, 1e-4, 0) for arm in arms]
    device = device_of(optimizers[0].flat.data)
    batch, scored = train.take(rows, device)
    times: list[list[float]] = [[] for _ in arms]

    def step(optimizer: AdamW) -> None:
        loss = task.loss(optimizer.model, batch, np.random.default_rng(0))
        loss.backward(into=optimizer.gradients)
        optimizer.step(divide_by=scored, clip=task.settings.clip)
        optimizer.norm()  # waits for the device

    with one_blas_thread():
        for _ in range(rounds + 1):  # the first warms up
            for optimizer, taken in zip(optimizers, times, strict=True):
                began = time.perf_counter()
                step(optimizer)
                taken.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(taken[1:]) for taken in times]


def versions() -> dict[str, str]:
    """What this ran on, as far as it can change a figure."""
    return {
        "minilora": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
        "library": xp_of(np.zeros(1)).__name__,
    }
