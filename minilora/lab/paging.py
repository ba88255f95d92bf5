"""A long sequence among short ones: the budget bursts, unless the optimizer's state steps aside."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.check import retained
from ..engine.errors import MiniloraError
from ..model.module import tensors
from ..model.transformer import TransformerConfig, init_transformer
from ..optim.adamw import AdamW
from ..optim.paged import PagedAdamW
from .compare import versions
from .figures import BLUE, GREEN, ORANGE, RED, SKY, canvas, save
from .report import size, table

PAGED_FROM = (
    100_000  # entries: bitsandbytes pages no smaller state (optimizer.py, get_state_buffer)
)


@dataclass(frozen=True)
class PagingConfig:
    """Steps on `short` tokens, one of them on `long`; `slack` over what the short ones need."""

    width: int = 128
    layers: int = 2
    batch: int = 1
    short: int = 32
    long: int = 160
    steps: int = 8
    spike: int = 4
    page: int = 16384  # numbers
    slack: float = 1.1


def paging(config: PagingConfig) -> dict[str, Any]:
    """Train paged and unpaged under one budget of bytes; the log of every page that moved.

    Held in a step: weights, gradients, resident moments, and the activations that the graph
    retains.  Before a step that would not fit, the pager shrinks; after it, it grows again.
    """
    shape = TransformerConfig(
        vocab=64, width=config.width, layers=config.layers, heads=4, context=config.long
    )
    rng = np.random.default_rng(0)
    lengths = [config.long if s == config.spike else config.short for s in range(config.steps)]
    batches = [rng.integers(0, 64, (config.batch, length)) for length in lengths]
    start = init_transformer(shape, np.random.default_rng(1), 0.1)

    plain, paged = AdamW(start, lr=1e-3), PagedAdamW(start, lr=1e-3, page=config.page)
    fixed = plain.flat.data.nbytes + plain.flat.grad.nbytes
    moments = plain.m.nbytes + plain.v.nbytes
    budget = int(config.slack * (fixed + moments + activations(plain, batches[0])))
    slots = paged.pager.slots
    steps, burst = [], None
    for step, ids in enumerate(batches):
        acts = activations(paged, ids)
        room = (budget - fixed - acts) // paged.page_bytes
        paged.pager.shrink(min(slots, int(room)))
        if room < 1:
            raise MiniloraError(f"step {step}: expected room for one page, found {room}")
        held = paged.resident_bytes
        steps.append({
            "step": step, "tokens": int(ids.size), "activations": acts, "resident": held,
            "unpaged": fixed + moments + acts, "paged": fixed + held + acts,
        })  # fmt: skip
        if steps[-1]["unpaged"] > budget and burst is None:
            burst = step
        for optimizer in (paged, plain):
            optimizer.model.loss(ids, ids).backward(into=optimizer.gradients)
            optimizer.step(divide_by=ids.size, clip=1.0)
        paged.pager.grow(slots)
    return {
        "kind": "paging",
        "config": asdict(config),
        "budget": budget,
        "fixed": fixed,
        "moments": moments,
        "pages": paged.pager.pages,
        "page_bytes": paged.page_bytes,
        "unpaged_fails_at": burst,
        "equal": bool(np.array_equal(plain.flat.data, paged.flat.data)),
        "steps": steps,
        "log": [list(move) for move in paged.pager.log],
        "least_rank": {str(width): least_rank(width) for width in (768, 4096, 8192, 11008)},
        "versions": versions(),
    }


def activations(optimizer: Any, ids: np.ndarray) -> int:
    """Bytes that the graph of a step on `ids` retains."""
    loss = optimizer.model.loss(ids, ids)
    weights = [t.data for t in tensors(optimizer.model).values()]
    return sum(retained(loss, besides=weights).values())


def least_rank(width: int) -> int:
    """The rank from which a factor (r, width) has so many entries that bitsandbytes pages it."""
    return -(-PAGED_FROM // width)


def paging_report(record: dict[str, Any]) -> str:
    """The steps in a table, and what the literature leaves out."""
    rows = [["step", "tokens", "activations", "moments resident", "unpaged", "paged"]]
    for s in record["steps"]:
        over = " over" if s["unpaged"] > record["budget"] else ""
        rows.append([
            str(s["step"]), str(s["tokens"]), size(s["activations"]), size(s["resident"]),
            size(s["unpaged"]) + over, size(s["paged"]),
        ])  # fmt: skip
    kinds = [move[1] for move in record["log"]]
    ranks = ", ".join(f"r >= {r} at width {w}" for w, r in record["least_rank"].items())
    return table(rows) + (
        f"\n\nBudget {size(record['budget'])}; {record['pages']} pages of "
        f"{size(record['page_bytes'])}; {kinds.count('in')} moved in, {kinds.count('out')} out.  "
        f"Unpaged, step {record['unpaged_fails_at']} does not fit; paged, all steps do, and the "
        f"weights are {'equal to the bit' if record['equal'] else 'NOT EQUAL'}.\n"
        f"bitsandbytes pages a state from {PAGED_FROM:,} entries: a factor of an adapter from "
        f"{ranks}; below, paging changes nothing."
    )


def paging_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Left, bytes by step against the budget; right, which page is resident at which use."""
    figure, (ax, timeline) = canvas(7.2, 4.4, panels=2)
    steps = record["steps"]
    x = np.arange(len(steps))
    parts = (
        ("weights and gradients", [record["fixed"]] * len(steps), BLUE),
        ("moments resident", [s["resident"] for s in steps], ORANGE),
        ("activations", [s["activations"] for s in steps], SKY),
    )
    bottom = np.zeros(len(steps))
    for label, values, color in parts:
        ax.bar(x, np.array(values) / 2**20, bottom=bottom, color=color, label=label, width=0.75)
        bottom += np.array(values) / 2**20
    ax.plot(x, [s["unpaged"] / 2**20 for s in steps], "_", ms=22, mew=2, color=RED, label="unpaged")
    ax.axhline(record["budget"] / 2**20, color="0.2", ls="--", linewidth=1, label="budget")
    ax.set_xlabel("step")
    ax.set_ylabel("MiB held in a step")
    entered: dict[int, int] = {}
    end = record["log"][-1][0]
    stretches = []
    for clock, kind, page, _ in record["log"]:
        if kind == "in":
            entered[page] = clock
        elif kind in ("out", "drop"):
            stretches.append((page, entered.pop(page), clock))
    stretches += [(page, clock, end) for page, clock in entered.items()]
    for page, start, stop in stretches:
        timeline.barh(page, max(0.4, stop - start), left=start, color=GREEN, height=0.7)
    for step in range(len(steps)):
        timeline.axvline(step * record["pages"], color="0.8", linewidth=0.7, zorder=0)
    first = record["config"]["spike"] * record["pages"]
    timeline.axvspan(first, first + record["pages"], color=RED, alpha=0.15, label="the long step")
    timeline.set_xlabel("uses of a page, a step between two lines")
    timeline.set_ylabel("page (bar: it is resident)")
    timeline.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)
