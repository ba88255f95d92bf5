"""A comparison in print: one table, a line an arm; and how a record reaches the disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.errors import MiniloraError
from ..files.atomic import replace_file


def report(record: dict[str, Any]) -> str:
    """The table of a record made by `compare`, with what its columns mean below it."""
    task, base = record["task"], record["base"]
    several = record["config"]["seeds"] > 1
    edge = any(arm["lr_at_edge"] for arm in record["arms"])
    header = ["method", "trainable", "share", "lr", task["metric"], "of full gain"]
    if base["before"] is not None:
        header.append(task["before_metric"])
    if task.get("per_parameter"):
        header.append(task["per_parameter"])
    header += ["weights", "gradients", "optimizer", "activations", "ms/step"]
    lines = [base_row(header, record)]
    for arm in record["arms"]:
        spread = "" if arm["spread"] is None else f" ± {number(arm['spread'])}"
        row = [
            arm["name"],
            f"{arm['trainable']:,}",
            f"{100 * arm['share']:.2f}%",
            f"{arm['lr']:g}" + ("*" if arm["lr_at_edge"] else ""),
            number(arm["mean"]) + spread,
            "-" if arm["gain_share"] is None else f"{100 * arm['gain_share']:.1f}%",
        ]
        if base["before"] is not None:
            row.append(number(arm["before"]))
        if task.get("per_parameter"):
            row.append(number(arm["mean"] / arm["trainable"]))
        sizes = arm["bytes"]
        row += [size(sizes[k]) for k in ("weights", "gradients", "optimizer", "activations")]
        row.append(f"{arm['ms_per_step']:.1f}")
        lines.append(row)
    notes = [
        f"{task['name']}: {task['about']}.",
        f"{task['steps']} steps of {task['batch']} examples; each learning rate chosen on "
        "validation from "
        + rates_tried(record)
        + (" (* the highest or lowest of them)." if edge else "."),
        (
            f"{task['metric']}: mean ± standard deviation over {record['config']['seeds']} seeds "
            "on test data; the run that chose the rate is the first of them "
            "(between two rates that nearly tie on it, all of them chose)."
            if several
            else f"{task['metric']}: one seed, on test data; it also chose the rate."
        ),
        "Bytes as the engine counts them in one step; ms/step on one thread, timed apart.",
    ]
    return table([header, *lines]) + "\n\n" + "\n".join(notes)


def in_one_line(record: dict[str, Any]) -> str:
    """The scores of a comparison: base 0.000; full 1.000; LoRA r=1 0.164, r=2 0.734; QLoRA ..."""
    parts = [f"base {number(record['base']['score'])}"]
    for method, label in (("full", "full"), ("lora", "LoRA"), ("qlora", "QLoRA")):
        arms = [arm for arm in record["arms"] if arm["method"] == method]
        scores = [
            number(arm["mean"]) if arm["rank"] is None else f"r={arm['rank']} {number(arm['mean'])}"
            for arm in arms
        ]
        if scores:
            parts.append(f"{label} {', '.join(scores)}")
    return "; ".join(parts)


def base_row(header: list[str], record: dict[str, Any]) -> list[str]:
    """The first line: the base before any training."""
    row = ["base", "0", "0.00%", "-", number(record["base"]["score"]), "0.0%"]
    if record["base"]["before"] is not None:
        row.append(number(record["base"]["before"]))
    return row + ["-"] * (len(header) - len(row))


def rates_tried(record: dict[str, Any]) -> str:
    counts = sorted({len(arm["rates"]) for arm in record["arms"]})
    return " or ".join(str(n) for n in counts) + (" rates" if counts[-1] > 1 else " rate")


def number(value: float) -> str:
    """Three decimals where they say something, else a power of ten."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.1e}"


def size(n: int) -> str:
    """Bytes in the largest binary unit that leaves at least one: 512 B, 1.5 KiB, 2.0 MiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} B"


def table(rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right; a rule under the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])])


def write_record(record: dict, path: Path, draw: Callable, say: Callable = print) -> None:
    """The record, and its figure beside it; where matplotlib is missing, what to install."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=1).encode() + b"\n")
    say(f"\nrecord   {path}")
    try:
        say(f"figure   {draw(record, path.with_suffix('.png'))}")
    except MiniloraError as error:
        say(error)
