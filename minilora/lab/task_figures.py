"""Pictures of the forgetting paths and of the adapter matrix, from their records."""

from pathlib import Path
from typing import Any

import numpy as np

from .figures import BLACK, BLUE, GREEN, MARKS, ORANGE, PURPLE, RED, canvas, save


def forgetting_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Left: forgotten against learned, a path an arm.  Right: the same over steps."""
    figure, (plane, time) = canvas(7.2, 4.8, panels=2)
    colors = (BLACK, BLACK, RED, ORANGE, BLUE, GREEN, PURPLE)
    for i, arm in enumerate(record["arms"]):
        style = {"color": colors[i % len(colors)], "marker": MARKS[i % len(MARKS)], "ms": 4}
        style["ls"] = "--" if arm["rank"] is None and i % 2 else "-"
        mean = arm["mean"]
        new, old = ([p[k] for p in mean] for k in ("new", "old"))
        plane.plot(new, old, label=arm["name"], **style)
        steps = [p["step"] for p in mean]
        time.plot(steps, old, **style)
        spread = np.array([p["spread"] for p in mean])
        time.fill_between(steps, old - spread, old + spread, color=style["color"], alpha=0.12)
    start = record["arms"][0]["mean"][0]
    plane.plot(start["new"], start["old"], marker="*", ms=14, color="0.4", ls="none", label="base")
    plane.set_xlabel("held-out Genesis, nats per character\n(left: learned)")
    plane.set_ylabel("the plays, nats per character (up: forgotten)")
    time.set_xlabel("steps")
    time.set_ylabel("the plays, nats per character")
    seeds = record["config"]["seeds"]
    time.set_title(f"means of {seeds} seeds; shaded: ± their deviation", loc="left", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def swap_figure(record: dict[str, Any], path: str | Path) -> Path:
    """The matrix as shades, with its numbers."""
    rows = record["rows"]
    means = np.array([np.mean(row["seeds"], axis=0) for row in rows])
    spread = np.array([np.ptp(row["seeds"], axis=0) for row in rows]) / 2
    figure, (ax,) = canvas(5.6, 4.2)
    ax.grid(visible=False)
    ax.imshow(means, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(means):
        color = "white" if value > 0.6 else "black"
        half = f"\n±{spread[i, j]:.2f}" if spread[i, j] >= 0.005 else ""
        ax.text(j, i, f"{value:.2f}{half}", ha="center", va="center", color=color, fontsize=10)
    ax.set_xticks(range(len(record["tasks"])), record["tasks"])
    ax.set_yticks(range(len(rows)), [row["adapter"] or "no adapter" for row in rows])
    ax.set_xlabel("what is asked for")
    ax.set_ylabel("adapter on the base")
    c = record["config"]
    title = f"letters right, rank {c['rank']}: mean of {c['seeds']} seeds, ± half their range"
    ax.set_title(title, loc="left", fontsize=10)
    return save(figure, path)
