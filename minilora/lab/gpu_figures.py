"""Pictures of a card's record: who takes how long, which kernel reads how fast, how losses fall."""

from pathlib import Path
from typing import Any

from .figures import BLUE, COLORS, GREEN, ORANGE, RED, SKY, canvas, save
from .gpu_race import COMPILED, EAGER, OURS
from .gpu_report import OF_COPY

RACERS = dict(zip((*OURS, EAGER, COMPILED), (SKY, BLUE, GREEN, ORANGE, RED), strict=True))


def gpu_figures(record: dict[str, Any], folder: Path) -> list[Path]:
    """`gpu_race.png`, `gpu_kernels.png`, `gpu_curves.png`: those that there are data for."""
    drawn = {
        "gpu_race": (race_figure, any("ms" in row for row in record["race"])),
        "gpu_kernels": (kernels_figure, any("of_copy" in row for row in record["kernels"])),
        "gpu_curves": (curves_figure, bool(record["curves"])),
    }
    return [draw(record, folder / f"{name}.png") for name, (draw, has) in drawn.items() if has]


def race_figure(record: dict[str, Any], path: Path) -> Path:
    """Milliseconds of a step, a bar a contender, a group a race; who did not run has no bar."""
    rows = [row for row in record["race"] if "ms" in row]
    races = [race for race in record["races"] if race in {row["race"] for row in rows}]
    figure, (ax,) = canvas(6.4, 4.2)
    wide = 0.8 / len(RACERS)
    top = max(row["ms"] for row in rows)
    for i, (name, color) in enumerate(RACERS.items()):
        found = {row["race"]: row["ms"] for row in rows if row["step"] == name}
        places = [races.index(race) + (i - 2) * wide for race in found]
        ax.bar(places, list(found.values()), wide, color=color, label=name)
        for x, ms in zip(places, found.values(), strict=True):
            ax.text(x, ms + 0.01 * top, f"{ms:.3g}", ha="center", va="bottom", fontsize=7)
    ax.set_xticks(range(len(races)), races)
    ax.set_ylabel("ms of a training step (median)")
    ax.set_title(f"LoRA r={record['config']['rank']}, {record['device']}", loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(figure, path)


def kernels_figure(record: dict[str, Any], path: Path) -> Path:
    """The share of a copy's bandwidth that each kernel reaches; a mark where it is to be."""
    rows = [row for row in record["kernels"] if "of_copy" in row][::-1]
    figure, (ax,) = canvas(6.4, 0.9 + 0.2 * len(rows))
    colors = [SKY if row["kernel"].endswith("bf16") else BLUE for row in rows]
    ax.barh(range(len(rows)), [row["of_copy"] for row in rows], color=colors, height=0.7)
    for y, row in enumerate(rows):
        if row["kernel"] in OF_COPY:
            ax.plot([OF_COPY[row["kernel"]]] * 2, [y - 0.45, y + 0.45], color=RED, lw=2)
    ax.set_yticks(range(len(rows)), [row["kernel"] for row in rows], fontsize=8)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.set_xlabel("GB/s, of a copy's (red: the goal)")
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    copy = next((row["gb_s"] for row in rows if row["kernel"] == "copy"), float("nan"))
    ax.set_title(f"{record['device']}: a copy moves {copy:.0f} GB/s", loc="left", fontsize=10)
    return save(figure, path)


def curves_figure(record: dict[str, Any], path: Path) -> Path:
    """Losses over steps: float64 on the host a wide gray line, the device's a thin one on it."""
    curves = record["curves"]
    figure, axes = canvas(3.2 * len(curves), 3.4, panels=len(curves))
    for ax, row, color in zip(axes, curves, COLORS, strict=False):
        steps = range(1, len(row["host"]) + 1)
        ax.plot(steps, row["host"], color="0.75", lw=5, label="NumPy, float64")
        ax.plot(steps, row["device"], color=color, lw=1.2)
        ax.set_title(f"{row['curve']}\ngap {row['gap']:.0e}", loc="left", fontsize=9)
        ax.set_xlabel("steps")
    axes[0].set_ylabel("loss, nats a token")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{record['device']} (thin) on NumPy's float64 (gray)", fontsize=10)
    return save(figure, path)
