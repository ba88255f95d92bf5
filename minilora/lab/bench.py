"""How fast and how large, against whom: one library a process, driven in turn, behind a gate.

A ratio is printed only where both sides computed the same thing: the losses of the first four
optimizer steps agree to 1e-4.  Per round every contender runs once while the rest wait; a
round in which somebody else used the processors is dropped and counted; what is reported is
the median over rounds of the ratio within a round.
"""

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import compress
from typing import Any

from ..engine.errors import MiniloraError
from ..engine.progress import progress
from .bench_shapes import MODES, SHAPES, Job, Shape, flops
from .bench_worker import Worker
from .machine import Load, machine

SUITES = ("step", "memory", "micro", "generate", "optimizer", "quantize", "scaling", "threads")
BASELINES = {  # what it is called in print, and the suites that it runs in
    "torch": ("torch eager + PEFT", SUITES),
    "hf": ("Hugging Face + PEFT", ("step", "memory", "generate")),
    "compile": ("torch.compile + PEFT", ("step", "memory")),
    "bnb": ("bitsandbytes + PEFT", ("step", "memory", "quantize")),
    "erf": ("torch, erf-GELU", ("step",)),
    "stock": ("torch as it comes + PEFT", ("step",)),
    "primitives": ("our primitives", ("step", "memory", "scaling")),
    "reference": ("our specifications", SUITES),
    "blas": ("minilora, BLAS threads", ("step", "memory", "threads", "generate")),
}
WEIGHED = ("memory", "micro", "scaling")  # the suites that report bytes
ALONE = {  # the only baselines of a suite, if none are asked for
    "micro": ["torch"], "scaling": ["torch"], "threads": ["torch", "blas"],
}  # fmt: skip
PEERS = ("torch", "transformers", "peft", "bitsandbytes")  # the last for "bnb" alone
NEEDS_TORCH = ("torch", "hf", "compile", "erf", "stock", "bnb")
ON_REQUEST = ("erf", "stock", "reference", "blas")  # and primitives beside scaling
GATE, GATE_STEPS = 1e-4, 4
PROCESSES = 3  # whose memory is taken
ERF_GATE = 1e-2  # another function, so its loss is another; close enough to be the same work
QUIET = 0.07  # of all processors: more than this for others makes a round dirty
TURN = 0.4  # seconds that a turn lasts at least, against a clock of 10 ms ticks
MICRO = 2  # sequences of a micro-batch in the suite of that name
ATTEMPTS = 3  # rounds tried for each one wanted


@dataclass(frozen=True)
class BenchConfig:
    """What is raced.  None stands for the suite's own default."""

    suite: str = "step"
    shapes: tuple[str, ...] | None = None
    modes: tuple[str, ...] | None = None
    threads: int = 2
    rounds: int = 7
    baselines: tuple[str, ...] | None = None
    patience: float = 10.0  # seconds to wait for a quiet machine before a round
    quiet: float = QUIET

    def __post_init__(self) -> None:
        for name, values, known in (
            ("suite", (self.suite,), SUITES),
            ("shapes", self.shapes, SHAPES),
            ("modes", self.modes, MODES),
            ("baselines", self.baselines, BASELINES),
        ):
            for value in values or ():
                if value not in known:
                    raise MiniloraError(
                        f"{name}: expected some of {', '.join(known)}; found {value!r}"
                    )
            if values is not None and len(set(values)) != len(values):
                raise MiniloraError(f"{name}: expected each once, found {', '.join(values)}")
            if name != "baselines" and values == ():  # no baselines: ourselves alone
                raise MiniloraError(f"{name}: expected at least one, found none")
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise MiniloraError(f"{name}: expected a whole number >= 1")
        for name in self.baselines or ():
            if self.suite not in BASELINES[name][1]:
                raise MiniloraError(f"baselines: {name} does not run in the suite {self.suite}")
        if self.suite == "scaling" and len(self.shapes or ("S1",)) > 1:
            raise MiniloraError(f"shapes: scaling goes out from one, found {len(self.shapes)}")
        if self.suite == "quantize" and self.modes not in (None, ("qlora",)):
            raise MiniloraError("modes: the suite quantize has qlora alone")

    def jobs(self, shape: Shape, mode: str, **options: Any) -> list[Job]:
        """minilora first, then the baselines that can run here.

        Four bits are raced against bitsandbytes and our own variants; the rest never is.
        """
        kind = self.suite if self.suite in ("generate", "optimizer", "quantize") else "step"
        first = Job("minilora", shape, kind, mode, **{"threads": self.threads} | options)
        ours = ("primitives", "reference", "blas")
        rivals = [
            name
            for name in self.contenders()
            if ((name == "bnb") == (mode == "qlora") or (name in ours and name != "primitives"))
            and not (name == "blas" and first.threads == 1)
        ]
        return [first] + [replace(first, contender=name) for name in rivals]

    def contenders(self) -> list[str]:
        """The baselines asked for, or all usual ones, as far as the suite and the machine go."""
        usual = ALONE.get(self.suite, [n for n in BASELINES if n not in ON_REQUEST])
        wanted, absent = usual if self.baselines is None else self.baselines, missing()
        return [
            name
            for name in wanted
            if self.suite in BASELINES[name][1] and not set(needs(name)) & set(absent)
        ]


def needs(name: str) -> tuple[str, ...]:
    """The libraries that a baseline cannot do without."""
    if name not in NEEDS_TORCH:
        return ()
    return PEERS if name == "bnb" else PEERS[:-1]


def missing(names: Sequence[str] = PEERS) -> list[str]:
    """Which of these libraries, all that the baselines need, are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run one suite; a record of plain values that `report` and the figure read."""
    began = time.monotonic()
    points = list(cases(config))
    bar = progress(total=len(points) * (config.rounds + 1), label=f"bench {config.suite}")
    record: dict[str, Any] = {
        "kind": "bench",
        "config": asdict(config),
        "gate": GATE,
        "machine": machine(),
        "missing": missing(),
        "ceilings": ceilings(config),
        "cases": [],
    }
    for done, (facts, jobs) in enumerate(points):
        bar.set_postfix_str(facts["title"])
        case = facts | {"threads": jobs[0].threads, "rank": jobs[0].rank}
        if config.suite != "memory":
            case |= timed(jobs, config, lambda: bar.update(1))
        if config.suite in WEIGHED:
            case = with_memory(case, jobs)
        if jobs[0].kind == "step" and config.suite != "memory":
            case["gflop"] = flops(jobs[0]) / 1e9
        record["cases"].append(case)
        bar.n = (done + 1) * (config.rounds + 1)
        bar.update(0)
    bar.close()
    return record | {"seconds": round(time.monotonic() - began, 1)}


def cases(config: BenchConfig) -> Iterator[tuple[dict[str, Any], list[Job]]]:
    """What a suite measures, point by point: facts for the record, and the jobs to race."""
    usual = {"scaling": ("lora",), "generate": ("full",), "optimizer": ("lora", "full"),
             "quantize": ("qlora",), "threads": ("lora",), "micro": ("lora",)}  # fmt: skip
    modes = config.modes or usual.get(config.suite, MODES)
    if config.suite == "scaling":
        for axis, value, shape, rank in scaling_points(SHAPES[(config.shapes or ("S1",))[0]]):
            for mode in modes:
                title = f"{axis} {value}, {mode}"
                facts = {"title": title, "axis": axis, "value": value, "mode": mode}
                yield facts | {"about": shape.about}, config.jobs(shape, mode, rank=rank)
        return
    for name in config.shapes or ("S0", "S1", "S2", "S3"):
        for mode in modes:
            for words, shape, options in variants(config, SHAPES[name]):
                facts = {"title": f"{name} {mode}{words}", "shape": name, "mode": mode}
                yield facts | {"about": shape.about}, config.jobs(shape, mode, **options)


def variants(config: BenchConfig, shape: Shape) -> Iterator[tuple[str, Shape, dict[str, Any]]]:
    """What else a suite varies: words for the title, the shape, options of the job."""
    if config.suite == "threads":
        for k in thread_counts(config.threads):
            yield f", {k} thread{'s' if k > 1 else ''}", shape, {"threads": k}
    elif config.suite == "generate":
        for batch in (1, 8):
            yield f", batch {batch}", replace(shape, batch=batch), {}
    elif config.suite == "micro":  # ours alone: torch has the whole batch at once
        yield f", {MICRO} sequences at a time", shape, {"micro": MICRO}
    else:
        yield "", shape, {}


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def scaling_points(base: Shape) -> Iterator[tuple[str, int, Shape, int]]:
    """(axis, value, shape, rank) along each axis through `base`."""
    for axis in ("batch", "time", "width", "layers"):
        middle = getattr(base, axis)
        for value in (middle // 2, middle, 2 * middle):
            if value:
                yield axis, value, replace(base, **{axis: value}), 8
    for rank in (1, 4, 16, 64):
        yield "rank", rank, base, rank


# ------------------------------------------------------------------------------- a race


def timed(jobs: list[Job], config: BenchConfig, tick: Callable[[], Any] = lambda: None) -> dict:
    """Race the jobs; where no round was clean, by CPU time on one thread instead."""
    found = race(jobs, config, tick)
    if found["clean"] or found["measure"] == "cpu":
        return found
    single = [replace(job, threads=1) for job in jobs if job.contender != "blas"]
    return race(single, config, tick, measure="cpu") | {"dropped": found["dropped"]}


def race(
    jobs: list[Job],
    config: BenchConfig,
    tick: Callable[[], Any] = lambda: None,
    measure: str = "wall",
) -> dict[str, Any]:
    """Rows of times and ratios for jobs of one case; the first job is the one compared.

    By "wall", only clean rounds count; by "cpu", all do.
    Errors: `MiniloraError` if the first job fails; a baseline that fails gets a row saying why.
    """
    with ExitStack() as stack:
        rows, workers = [], []
        for job in jobs:
            worker = stack.enter_context(Worker(job))
            row: dict[str, Any] = {"contender": job.contender}
            rows.append(row)
            try:
                row |= worker.prepare()
                row["values"] = worker.run(GATE_STEPS)["values"]
                once = worker.run(1)["wall"]
            except MiniloraError as error:
                if job is jobs[0]:
                    raise
                row["error"] = str(error)
                continue
            if job is jobs[0]:
                steps = max(1, round(TURN / once + 0.5))
            if passes(row, rows[0]):
                workers.append((row, worker))
        rounds: list[list[dict]] = []
        while not enough(rounds, config, measure):
            if measure == "wall":
                wait_for_quiet(config)
            turns = {}
            for row, worker in workers if len(rounds) % 2 == 0 else workers[::-1]:
                time.sleep(0.05)  # threads of the last one may still spin
                try:
                    turns[row["contender"]] = worker.run(steps)
                except MiniloraError as error:
                    if row is rows[0]:
                        raise
                    row["error"] = str(error)
            ran = ["error" not in row for row, _ in workers]
            if not all(ran):  # the others go on, and keep the rounds that they had
                workers = list(compress(workers, ran))
                rounds = [list(compress(r, ran)) for r in rounds]
                continue
            rounds.append([turns[row["contender"]] for row, _ in workers])
            if measure == "cpu" or is_clean(rounds[-1], config.quiet):
                tick()
    kept = [r for r in rounds if measure == "cpu" or is_clean(r, config.quiet)]
    for i, (row, _) in enumerate(workers):
        row |= figures(kept, i, steps, measure)
    return {
        "measure": measure,
        "clean": len(kept),
        "dropped": len(rounds) - len(kept),
        "others": [busiest(r) for r in rounds],
        "steps_a_turn": steps,
        "rows": [row | {"values": few(row.get("values", []))} for row in rows],
    }


def few(values: list[list[float]]) -> list[list[float]]:
    """The first values of each step: what a record keeps of the hundreds that were compared."""
    return [step[:4] for step in values]


def passes(row: dict[str, Any], ours: dict[str, Any]) -> bool:
    """The gate: writes how far the values are from ours, and whether that is near enough."""
    a, b = ([v for step in r["values"] for v in step] for r in (row, ours))
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    row["gap"] = max((gap if gap == gap else math.inf for gap in gaps), default=0.0)  # NaN is far
    row["passed"] = row["gap"] <= (ERF_GATE if row["contender"] == "erf" else GATE)
    return row["passed"]


def enough(rounds: list[list[dict]], config: BenchConfig, measure: str) -> bool:
    if measure == "cpu":
        return len(rounds) >= config.rounds
    clean = sum(is_clean(r, config.quiet) for r in rounds)
    # A machine that was never quiet in as many rounds as were wanted is given up earlier.
    limit = config.rounds * (ATTEMPTS if clean else 1)
    return clean >= config.rounds or len(rounds) >= limit


def busiest(turns: list[dict]) -> float | None:
    """The largest share that others took in a turn of a round; None where it is not known."""
    shares = [turn["others"] for turn in turns]
    return None if None in shares else round(max(shares), 4)


def is_clean(turns: list[dict], quiet: float) -> bool:
    share = busiest(turns)
    return share is not None and share <= quiet


def wait_for_quiet(config: BenchConfig) -> None:
    """Return once others use less than `config.quiet`, or after `config.patience` seconds."""
    end, load = time.monotonic() + config.patience, Load()
    while time.monotonic() < end:
        time.sleep(0.25)
        share = load.others()
        if share is None or share <= config.quiet:
            return


def figures(rounds: list[list[dict]], i: int, steps: int, measure: str) -> dict[str, Any]:
    """Times a step of contender i, and the ratio of contender 0's to them, over rounds."""
    if not rounds:
        return {}
    mine = [1e3 * turns[i][measure] / steps for turns in rounds]
    first = [1e3 * turns[0][measure] / steps for turns in rounds]
    found = {
        "ms": statistics.median(mine),
        "ms_range": [min(mine), max(mine)],
        "ms_best": min(mine),
        "cpu_ms": statistics.median(1e3 * turns[i]["cpu"] / steps for turns in rounds),
    }
    if i:
        ratios = [a / b for a, b in zip(first, mine, strict=True)]
        found |= {
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "ratio_best": min(first) / min(mine),
        }
    return found


# ----------------------------------------------------------------- memory and the ceiling


def with_memory(case: dict[str, Any], jobs: list[Job]) -> dict[str, Any]:
    """The case with `bytes` in its rows: the peak over four steps, the median of fresh processes.

    Torch's differs from one process to the next by up to a tenth: `bytes_each` has them all.
    """
    rows = {row["contender"]: row for row in case.get("rows", [])}
    for job in jobs:
        row = rows.setdefault(job.contender, {"contender": job.contender})
        if "error" in row:
            continue
        try:
            peaks = [weigh(row, job) for _ in range(PROCESSES)]
        except MiniloraError as error:
            if job is jobs[0]:
                raise
            row["error"] = str(error)
            continue
        row |= {"bytes": statistics.median(peaks), "bytes_each": sorted(peaks)}
        first = rows[jobs[0].contender]
        if passes(row, first) and row is not first:
            ours, theirs = first["bytes_each"], row["bytes_each"]
            row["bytes_ratio"] = first["bytes"] / max(1, row["bytes"])
            row["bytes_range"] = [ours[0] / max(1, theirs[-1]), ours[-1] / max(1, theirs[0])]
    return case | {"rows": list(rows.values())}


def weigh(row: dict[str, Any], job: Job) -> int:
    """Bytes at the peak of one fresh process; the row learns what ran, and the first values."""
    with Worker(job) as worker:
        row |= worker.prepare()
        row.setdefault("values", worker.run(GATE_STEPS)["values"])
        return worker.ask("memory")["bytes"]


def ceilings(config: BenchConfig) -> dict[str, Any]:
    """GFLOP/s of a plain float32 product in each library, on as many threads as the race."""
    found = {}
    for name in ["minilora"] + (["torch"] if "torch" in config.contenders() else []):
        with Worker(Job(name, SHAPES["tiny"], threads=config.threads)) as worker:
            worker.prepare()
            found[{"minilora": "numpy"}.get(name, name)] = worker.ask("ceiling")["gflops"]
    return found
