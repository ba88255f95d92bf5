"""The same training step here and in torch, on one card: eager, from a graph, compiled."""

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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

EAGER, COMPILED = 100.0, 150.0  # seconds that torch may take, imports and compilation included
PEERS = ("torch", "peft", "transformers")


def racers(
    cupy: Any, shape: Shape, rank: int, rounds: int, left: Callable[[], float],
    device: str = "cuda",
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:  # fmt: skip
    """(name, call) for each contender: the same weights, tokens, dropout 0, AdamW, float32.

    torch runs in a process of its own, with SDPA and the fused AdamW, its adapters by PEFT; it
    gets no more than the seconds that are `left()`.
    A call gives the median milliseconds of a step, the first loss, and the bytes that the
    process has taken from the card; or, for torch, why it did not run.
    """
    job = Job("minilora", shape, rank=rank, device=device)
    for name, mode, captured in (
        ("minilora, eager", "lora", False),
        ("minilora, captured", "lora", True),
        ("minilora, captured, NF4 base", "qlora", True),
    ):
        yield name, partial(our_step, cupy, replace(job, mode=mode), rounds, captured)
    for name, contender, limit in (
        ("torch + PEFT, eager", "torch", EAGER),
        ("torch + PEFT, torch.compile", "compile", COMPILED),
    ):
        yield name, partial(torch_step, replace(job, contender=contender), rounds, limit, left)


def our_step(cupy: Any, job: Job, rounds: int, captured: bool) -> dict[str, Any]:
    """Steps of minilora in this process."""
    pool = cupy.get_default_memory_pool()
    gc.collect()  # the last contender and its graph
    pool.free_all_blocks()
    batch, scored = tokens(job).take(np.arange(job.shape.batch), "cuda")
    before = pool.total_bytes()
    optimizer = AdamW(
        to_device(starting_tree(job), "cuda"), lr=job.lr, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    step = CapturedStep(optimizer, whole_loss)
    step.captures &= captured
    losses = [float(step.run(batch, scored)) / scored for _ in range(WARM)]
    taken = pool.total_bytes() - before
    if captured:  # from here on a graph has the temporaries
        pool.free_all_blocks()
        float(step.run(batch, scored))
        graphs = step.graphs.values()
        taken = pool.total_bytes() - before + sum(graph.pool.total_bytes() for graph in graphs)
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
    """For a table: milliseconds, bytes, and both as shares of torch's eager step."""
    base = next((r for r in rows if r["step"] == "torch + PEFT, eager" and "ms" in r), None)
    table = [["the same step", "ms", "of eager torch", "MB", "of eager torch", "first loss"]]
    for row in rows:
        if "not run" in row:
            table.append([row["step"], "-", "-", "-", "-", f"not run: {row['not run']}"])
            continue
        shares = [f"{row[k] / base[k]:.2f}" if base else "-" for k in ("ms", "bytes")]
        why = f", eager: {row['why_eager']}" if row.get("why_eager") else ""
        table.append([row["step"] + why, f"{row['ms']:.2f}", shares[0], f"{row['bytes'] / 1e6:.0f}",
                      shares[1], f"{row['loss']:.5f}"])  # fmt: skip
    return table


def losses_agree(rows: list[dict[str, Any]], tolerance: float = 1e-4) -> bool:
    """Do all that ran start from the same loss?  A base in NF4 is another model."""
    found = [row["loss"] for row in rows if "loss" in row and "NF4" not in row["step"]]
    return all(abs(loss - found[0]) <= tolerance * abs(found[0]) for loss in found)
