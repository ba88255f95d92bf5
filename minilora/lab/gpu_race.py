"""The same training step here and in torch, on one card: eager, from a graph, compiled."""

import gc
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..fast.capture import WARM, CapturedStep
from ..model.module import to_device
from ..optim.adamw import AdamW
from .bench import missing
from .bench_ours import whole_loss
from .bench_shapes import BETAS, WEIGHT_DECAY, Job, Shape, starting_tree, tokens
from .bench_worker import Worker

OURS = ("minilora, eager", "minilora, captured", "minilora, captured, NF4 base")
EAGER, COMPILED = "torch + PEFT, eager", "torch + PEFT, torch.compile"
LIMITS = {EAGER: 80.0, COMPILED: 120.0}  # seconds for torch, imports and compilation included
PEERS = ("torch", "peft", "transformers")
AGREE = {"float32": 1e-4, "bf16": 1e-3}  # first losses, relative; on the CPU 1e-7 and 1e-4

tree_of = lru_cache(maxsize=1)(starting_tree)  # to draw it takes longer than to run the steps


def race_name(shape: Shape, dtype: str) -> str:
    """ "bf16, 8 x 512": a precision, and the tokens of a batch."""
    return f"{dtype}, {shape.batch} x {shape.time}"


def precision_of(race: str) -> str:
    """The precision of a race, from its name."""
    return race.partition(",")[0]


def racers(
    cupy: Any, shape: Shape, dtype: str, rank: int, rounds: int, left: Callable[[], float],
    device: str = "cuda",
) -> dict[str, Callable[[], dict[str, Any]]]:  # fmt: skip
    """{name: call} of the contenders: the same weights, tokens, dropout 0, AdamW in float32.

    torch runs in a process of its own, with SDPA and the fused AdamW, its adapters by PEFT; it
    gets no more than the seconds that are `left()`.
    A call gives the median milliseconds of a step, the first loss, and the bytes that the
    process has taken from the card at most; or, for torch, why it did not run.
    """
    job = Job("minilora", shape, rank=rank, device=device, dtype=dtype)
    modes = dict(zip(OURS, (("lora", False), ("lora", True), ("qlora", True)), strict=True))
    calls = {
        name: partial(our_step, cupy, replace(job, mode=mode), rounds, captured)
        for name, (mode, captured) in modes.items()
    }
    for name, contender in ((EAGER, "torch"), (COMPILED, "compile")):
        theirs = replace(job, contender=contender)
        calls[name] = partial(torch_step, theirs, rounds, LIMITS[name], left)
    return {name: partial(on_a_free_card, cupy, call) for name, call in calls.items()}


def on_a_free_card(cupy: Any, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The call, once the card has back what the last contender and its graph have held."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    return call()


def our_step(cupy: Any, job: Job, rounds: int, captured: bool) -> dict[str, Any]:
    """Steps of minilora in this process."""
    pool = cupy.get_default_memory_pool()
    batch, scored = tokens(job).take(np.arange(job.shape.batch), "cuda")
    before = pool.total_bytes()
    optimizer = AdamW(
        to_device(tree_of(job), "cuda"), lr=job.lr, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    step = CapturedStep(optimizer, whole_loss)
    step.captures &= captured
    losses = [float(step.run(batch, scored)) / scored for _ in range(WARM)]
    taken = pool.total_bytes() - before
    if captured:  # from here on a graph has the temporaries; the peak may have been before
        float(step.run(batch, scored))
        graphs = sum(graph.pool.total_bytes() for graph in step.graphs.values())
        taken = max(taken, pool.total_bytes() - before + graphs)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        step.run(batch, scored)
        cupy.cuda.Device().synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    why = next(iter(step.eager.values()), None) if captured else None
    return {
        "ms": sorted(times)[rounds // 2], "loss": losses[0], "bytes": int(taken), "why_eager": why,
    }  # fmt: skip


def torch_step(
    job: Job, rounds: int, limit: float, left: Callable[[], float] = lambda: math.inf
) -> dict[str, Any]:
    """Steps of torch in another process, which has `limit` seconds for all of it, or less."""
    limit = min(limit, left())
    if absent := missing(PEERS):
        return {"not run": f"{', '.join(absent)} not installed"}
    began = time.monotonic()
    with Worker(job) as worker:
        bell = threading.Timer(limit, worker.process.kill)
        bell.start()
        try:
            versions = worker.prepare()["versions"]
            loss = worker.run(1)["values"][0][0]
            worker.run(WARM)
            times = sorted(1e3 * worker.run(1)["wall"] for _ in range(rounds))
            taken = worker.ask("memory")["bytes"]
        except MiniloraError as error:
            late = time.monotonic() - began >= limit
            return {"not run": f"not done within {limit:.0f} s" if late else str(error)[:400]}
        finally:
            bell.cancel()
    return {"ms": times[rounds // 2], "loss": loss, "bytes": taken, "versions": versions}


def race_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """For a table: milliseconds, bytes, and both as shares of torch's eager step, race by race."""
    base = {r["race"]: r for r in rows if r["step"] == EAGER and "ms" in r}
    table = [["the same step", "ms", "of eager torch", "MB", "of eager torch", "first loss"]]
    for row in sorted(rows, key=lambda row: row["race"]):
        name, eager = f"{row['race']}: {row['step']}", base.get(row["race"])
        if "not run" in row:
            table.append([name, "-", "-", "-", "-", f"not run: {row['not run']}"])
            continue
        shares = [f"{row[k] / eager[k]:.2f}" if eager else "-" for k in ("ms", "bytes")]
        why = f", eager: {row['why_eager']}" if row.get("why_eager") else ""
        table.append([name + why, f"{row['ms']:.2f}", shares[0], f"{row['bytes'] / 1e6:.0f}",
                      shares[1], f"{row['loss']:.5f}"])  # fmt: skip
    return table


def losses_agree(rows: list[dict[str, Any]]) -> bool:
    """Do all of a race that ran start from the same loss?  A base in NF4 is another model."""
    first: dict[str, float] = {}
    for row in rows:
        if "loss" in row and "NF4" not in row["step"]:
            race, loss = row["race"], row["loss"]
            wanted = first.setdefault(race, loss)
            if not abs(loss - wanted) <= AGREE[precision_of(race)] * abs(wanted):
                return False
    return True
