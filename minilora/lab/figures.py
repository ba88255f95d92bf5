"""Pictures, drawn from records alone; one palette that survives color blindness and gray print."""

from pathlib import Path
from typing import Any

from ..engine.errors import MiniloraError

# Okabe and Ito's palette (2008), ordered by lightness where the bars are stacked.
BLUE, ORANGE, GREEN, RED, SKY, YELLOW, PURPLE, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#F0E442", "#CC79A7", "#000000",
)  # fmt: skip
KINDS = {"weights": BLUE, "gradients": RED, "optimizer": ORANGE, "activations": SKY}
MARKS = "osD^vP"
COLORS = (RED, BLUE, GREEN, PURPLE, ORANGE, BLACK)


def canvas(
    width: float = 6.4, height: float = 4.0, panels: int = 1, rows: int = 1
) -> tuple[Any, list]:
    """A figure and its axes, `panels` in each row, without touching matplotlib's global state.

    At 640 pixels, as a README shows it, a point is 640 / (72 width) pixels: wide panels make
    small letters.

    Errors: `MiniloraError` that says what to install where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MiniloraError('figures need matplotlib: pip install "minilora[lab]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, panels, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, list(axes)


def save(figure: Any, path: str | Path) -> Path:
    """Write a PNG without dates or versions in it, so that the same record gives the same file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def words(name: str) -> str:
    """A file's name as a figure can show it: what is no text as "?", and no dollar as a formula."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def rank_vs_quality(record: dict[str, Any], path: str | Path) -> Path:
    """Score against rank: every seed a dot, full fine-tuning and the base as lines."""
    task, base = record["task"], record["base"]
    figure, (ax,) = canvas(6.4, 4.4)
    adapters = [arm for arm in record["arms"] if arm["rank"] is not None]
    full = next((arm for arm in record["arms"] if arm["method"] == "full"), None)
    ranks = sorted({arm["rank"] for arm in adapters})
    for i, method in enumerate(dict.fromkeys(arm["method"] for arm in adapters)):
        arms = sorted((a for a in adapters if a["method"] == method), key=lambda a: a["rank"])
        x = [ranks.index(arm["rank"]) for arm in arms]
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKS[i % len(MARKS)]}
        label = {"lora": "LoRA", "qlora": "QLoRA"}.get(method, method)
        ax.plot(x, [arm["mean"] for arm in arms], label=label, zorder=3, **style)
        for place, arm in zip(x, arms, strict=True):
            scores = arm["scores"]
            ax.scatter([place] * len(scores), scores, s=18, color=style["color"], alpha=0.45)
        if base["before"] is not None:
            kept = f"{task['before_metric']} (with adapters)" if i == 0 else None
            before = [arm["before"] for arm in arms]
            marker = MARKS[i % len(MARKS)]
            ax.plot(
                x, before, color="0.35", ls=":", marker=marker, mfc="white", label=kept, zorder=3
            )
    if full is not None:
        ax.axhline(full["mean"], color=BLACK, linewidth=1.4, label="full fine-tuning")
        low, high = min(full["scores"]), max(full["scores"])
        ax.axhspan(low, high, color=BLACK, alpha=0.1, linewidth=0)
    ax.axhline(base["score"], color="0.45", ls="--", linewidth=1.2, label="base, not yet tuned")
    ax.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    ax.set_xlabel("rank r of the adapters")
    better = "lower" if task["lower_is_better"] else "higher"
    ax.set_ylabel(f"{task['metric']}, test data ({better} is better)")
    scores = [base["score"], *(s for arm in record["arms"] for s in arm["scores"])]
    if task["lower_is_better"] and 0 < 100 * min(scores) < max(scores):
        ax.set_yscale("log")
    elif not task["lower_is_better"]:  # a share of 1, or a count, from zero
        top = 1.0 if max(scores) <= 1 else max(scores)
        ax.set_ylim(-0.04 * top, 1.04 * top)
    seeds = record["config"]["seeds"]
    ax.set_title(
        f"{words(task['name'])}: {task['steps']} steps, "
        f"{seeds} seed{'s (dots)' if seeds > 1 else ''}, each arm at its own learning rate",
        loc="left",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(figure, path)


def memory(record: dict[str, Any], path: str | Path) -> Path:
    """Stacked bars: what each arm holds during a training step, in bytes by kind."""
    figure, (ax,) = canvas(6.4, 0.9 + 0.42 * len(record["arms"]) + 0.6)
    arms = record["arms"][::-1]
    top = max(sum(arm["bytes"].values()) for arm in arms)
    unit, scale = next(
        (u, s) for u, s in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)) if top >= s
    )
    left = [0.0] * len(arms)
    for kind, color in KINDS.items():
        widths = [arm["bytes"][kind] / scale for arm in arms]
        ax.barh(range(len(arms)), widths, left=left, color=color, label=kind, height=0.66)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.2f}", va="center", fontsize=9)
    ax.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    ax.set_xlabel(f"{unit} held in one training step of {record['task']['batch']} examples")
    ax.set_xlim(0, 1.12 * max(left))
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)
