"""Figures to explore without a kernel: one SVG a setting, drawn from records, and a slider."""

import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import FormatError, MiniloraError, MissingFileError
from ..lab.figures import BLACK, BLUE, GREEN, MARKS, ORANGE, PURPLE, RED, SKY, canvas
from ..lab.memory import Setting
from ..lab.memory_report import CARDS, MODELS, card_of, grouped, memory_record
from ..train.tasks import TASKS

CODES = {
    "nf4": ("NF4", BLUE),
    "fp4": ("FP4", RED),
    "e2m1": ("E2M1", PURPLE),
    "int4": ("INT4, 15 levels", ORANGE),
    "int4_max": ("INT4, 16 levels", GREEN),
}
KINDS = {"weights": BLUE, "gradients": RED, "optimizer": ORANGE, "saved": SKY, "scratch": GREEN}
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind words that a line crosses

PAGE = """\
# Explore

Three figures with a slider: drag it, or focus it and use the arrow keys. Every picture was drawn
from a committed record or from the library's own arithmetic; nothing runs while you read.

## How much does a rank gain?

Twelve tasks, each fine-tuned at several ranks with learning rates swept for every method
(`minilora compare --task NAME`). Some need no more than rank 1; where a rank was planted, the bar
is full from that rank on. Chapter 05 asks why.

{rank}

## What does a block size cost?

Each block of weights shares one float32 scale: small blocks fit better, and pay 32 bits a block
for it (`minilora quantize`). Watch which code is the best one. Chapter 06 derives them.

{block}

## Which model fits on which card?

Published shapes, smallest first: {setting} (`minilora memory`). Each model has a scale of its
own. Chapter 09 keeps the books.

{model}

{script}
"""

# Shows the frame under the slider, and says what it is to those who do not see it.
SCRIPT = """\
<script>
for (const figure of document.querySelectorAll(".explorer")) {
  const slider = figure.querySelector("input"), said = figure.querySelector("output");
  const frames = figure.querySelectorAll("img");
  const show = () => {
    frames.forEach((frame, i) => { frame.hidden = i != slider.value; });
    const label = frames[slider.value].dataset.label;
    said.textContent = label;
    slider.setAttribute("aria-valuetext", label);
  };
  slider.addEventListener("input", show);
  show();
}
</script>
"""


@dataclass(frozen=True)
class Frame:
    """One position of a slider: its name, its figures in words, its picture."""

    label: str
    words: str
    svg: bytes


def svg(figure: Any) -> bytes:
    """A figure as SVG, its letters as paths, the same bytes for the same record."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "minilora"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def rank_frames(records: Sequence[dict[str, Any]]) -> list[Frame]:
    """A frame a rank of the first record: what LoRA gains, of what full fine-tuning gains.

    Errors: `MiniloraError` for a record without LoRA, or without a gain to compare it with.
    """
    arms = {r["task"]["name"]: {a["rank"]: a for a in r["arms"] if is_lora(a)} for r in records}
    by_name = {r["task"]["name"]: r for r in records}
    ranks = sorted(arms[records[0]["task"]["name"]])
    for name, by in arms.items():
        if not by or any(arm["gain_share"] is None for arm in by.values()):
            raise MiniloraError(f"compare {name}: expected LoRA beside a full one that gains")
    order = sorted(arms, key=lambda name: -arms[name][min(arms[name])]["gain_share"])
    frames = []
    for rank in ranks:
        figure, (ax,) = canvas(5.4, 1.3 + 0.34 * len(order))
        words = []
        for y, name in enumerate(order):
            arm = arms[name].get(rank)
            if arm is None:
                ax.text(0.01, y, f"not run at rank {rank}", va="center", fontsize=9, color="0.4")
                continue
            ax.barh(y, arm["gain_share"], height=0.6, color=BLUE, alpha=0.85)
            before = [a["gain_share"] for r, a in arms[name].items() if r < rank]
            ax.scatter(before, [y] * len(before), marker="|", s=70, color="0.75", zorder=3)
            seeds = gains(by_name[name], arm)
            ax.scatter(seeds, [y] * len(seeds), s=14, color=BLACK, zorder=4)
            ax.text(1.08, y, f"{100 * arm['share']:.1f}%", va="center", fontsize=9, color="0.3")
            words.append(f"{name} {arm['gain_share']:.2f}")
        ax.axvline(1, color=BLACK, linewidth=1.2)
        ax.text(1.08, -0.9, "trains", fontsize=9, color="0.3", va="center")
        ax.text(1, -0.9, "full", fontsize=9, ha="center", va="center")
        ax.set_xlim(-0.02, 1.24)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        ax.set_ylim(len(order) - 0.4, -1.3)
        ax.set_yticks(range(len(order)), order)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color="0.9", linewidth=0.8)
        ax.set_xlabel("gain over the base, as a share of full fine-tuning's\n"
                      "bar: mean; dots: seeds; gray: lower ranks", fontsize=10)  # fmt: skip
        ax.set_title(f"LoRA at rank {rank}", loc="left", fontsize=12)
        frames.append(Frame(str(rank), "; ".join(words), svg(figure)))
    return frames


def is_lora(arm: dict[str, Any]) -> bool:
    return arm["method"] == "lora"


def gains(record: dict[str, Any], arm: dict[str, Any]) -> list[float]:
    """Each seed's gain over the base, as a share of full fine-tuning's mean gain."""
    base = record["base"]["score"]
    full = next(a["mean"] for a in record["arms"] if a["method"] == "full")
    return [(score - base) / (full - base) for score in arm["scores"]]


def block_frames(record: dict[str, Any]) -> list[Frame]:
    """A frame a block size: the error of five codes on a bell curve, and its price in bits."""
    by_code = {CODES[name]: by for name, by in record["by_block"].items()}
    blocks = list(next(iter(by_code.values())))
    top = 1.06 * max(e["rmse"] for by in by_code.values() for e in by.values())
    frames = []
    for block in blocks:
        figure, (ax,) = canvas(5.4, 4.6)
        ends = []
        for i, ((name, color), by) in enumerate(by_code.items()):
            x, y = [int(b) for b in by], [e["rmse"] for e in by.values()]
            ax.plot(x, y, color=color, linewidth=1, alpha=0.55)
            here = by[block]["rmse"]
            ax.plot(int(block), here, MARKS[i], color=color, ms=9, zorder=4)
            ends.append((here, name, color, MARKS[i]))
        ax.axvline(int(block), color="0.5", linewidth=0.8, linestyle=":")
        for here, name, color, mark in sorted(ends):
            ax.plot([], [], mark, color=color, ms=8, label=f"{here:.4f}  {name}")
        ax.set_xscale("log", base=2)
        ax.set_xticks([int(b) for b in blocks], blocks)
        ax.set_ylim(0, top)
        ax.set_xlabel("weights in a block")
        ax.set_ylabel("RMSE on N(0, 1)")
        ax.legend(loc="lower right", frameon=False, fontsize=10, title="least error first")
        bits = by_code[CODES["nf4"]][block]["bits"]
        ax.set_title(f"Blocks of {block}: {bits:.3f} bits a weight", loc="left", fontsize=12)
        words = "; ".join(f"{name} {here:.4f}" for here, name, *_ in sorted(ends))
        frames.append(Frame(block, words, svg(figure)))
    return frames


def models(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every published shape, smallest first, under the setting of a record of `minilora memory`."""
    setting = record["records"][0]["setting"]
    entries = [memory_record(m, Setting(c, "qlora", **setting)) for m, c in MODELS.items()]
    return sorted(entries, key=lambda entry: entry["parameters"])


def model_frames(record: dict[str, Any]) -> list[Frame]:
    """A frame a model: what full fine-tuning, LoRA and QLoRA hold, and the cards that hold it."""
    frames = []
    for entry in models(record):
        figure, (ax,) = canvas(5.4, 3.6)
        wide = 1.75 * max(one["total"] for one in entry["methods"].values()) / 1e9  # room for words
        words = []
        for y, (method, one) in enumerate(entry["methods"].items()):
            left = 0.0
            for kind, n in grouped(one).items():
                label = kind if y == 0 else None
                ax.barh(y, n / 1e9, 0.62, left=left, color=KINDS[kind], label=label)
                left += n / 1e9
            card = card_of(one)
            fits = f"a card of {card} GB" if card else "no single card"
            said = f"{one['peak'] / 1e9:,.1f} GB: {fits}"
            ax.text(left + 0.01 * wide, y, said, va="center", fontsize=10, bbox=PAPER)
            words.append(f"{method} {said}")
        for card in CARDS:
            if 0.08 * wide < card < 0.95 * wide:
                ax.axvline(card, color="0.35", linewidth=0.8, linestyle=":", zorder=0)
                ax.text(card, -0.62, f"{card}", fontsize=9, color="0.35", ha="center")
        ax.set_xlim(0, wide)
        ax.set_ylim(2.6, -0.85)
        ax.set_yticks(range(3), ["full", "LoRA", "QLoRA"])
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("GB held in a training step; dotted: cards")
        size = entry["parameters"] / 1e9
        ax.set_title(f"{entry['model']}: {size:,.2f} billion weights", loc="left", fontsize=12)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
        frames.append(Frame(entry["model"], "; ".join(words), svg(figure)))
    return frames


def explorer(name: str, what: str, frames: Sequence[Frame], folder: Path) -> str:
    """The frames written into `folder`, and the HTML that shows one of them by a slider.

    Errors: `MiniloraError` where there is nothing to slide between.
    """
    if len(frames) < 2:
        raise MiniloraError(f"{name}: expected at least 2 frames, found {len(frames)}")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for i, frame in enumerate(frames):
        (folder / f"{name}-{i}.svg").write_bytes(frame.svg)
        hidden = " hidden" if i else ""
        pictures.append(
            f'<img src="_static/{folder.name}/{name}-{i}.svg"{hidden} '
            f'data-label="{html.escape(frame.label)}" '
            f'alt="{html.escape(f"{what} {frame.label}. {frame.words}")}">'
        )
    return (
        f'<figure class="explorer" id="explore-{name}">\n'
        f"<label>{html.escape(what)} <output>{html.escape(frames[0].label)}</output>\n"
        f'<input type="range" min="0" max="{len(frames) - 1}" value="0"></label>\n'
        + "\n".join(pictures)
        + "\n</figure>"
    )


def explore_page(figures: Path, static: Path) -> str:
    """Three sliders over the records of `figures`, their frames written into `static`.

    Errors: `MissingFileError`, `FormatError` for a record that is not there, not JSON, or not one
    of the command that writes it.
    """

    def record(name: str, kind: str) -> dict[str, Any]:
        try:
            found = json.loads(text_of(figures / name))
        except json.JSONDecodeError as error:
            raise FormatError(f"{figures / name}: expected a record in JSON ({error})") from None
        if type(found) is not dict or found.get("kind") != kind:
            raise FormatError(f"{figures / name}: expected a record of `minilora {kind}`")
        return found

    names = ["dates", *(name for name in TASKS if name != "dates")]
    memory = record("memory_by_model.json", "memory")
    sliders = (
        (
            "rank",
            "Rank of the adapters:",
            rank_frames([record(f"compare_{n}.json", "compare") for n in names]),
        ),
        ("block", "Weights in a block:", block_frames(record("codes_by_block.json", "quantize"))),
        ("model", "Model:", model_frames(memory)),
    )
    shown = {name: raw(explorer(name, what, f, static / "explore")) for name, what, f in sliders}
    setting = memory["records"][0]["setting"]
    of_models = (
        f"{setting['batch']} x {setting['length']} tokens, rank {setting['rank']}, "
        f"{setting['dtype']} arithmetic"
    )
    return PAGE.format(**shown, setting=of_models, script=raw(SCRIPT))


def raw(text: str) -> str:
    """HTML inside of Markdown."""
    return "```{raw} html\n" + text + "\n```"


def text_of(path: Path) -> str:
    """What a file says.  Errors: `MissingFileError`; `FormatError` for what is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise MissingFileError(f"{path}: the site needs it, found none") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: expected text in UTF-8 ({error})") from None
