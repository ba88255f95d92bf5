"""What a published model needs for a fine-tune, method by method, and on which card it fits."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..engine.errors import MiniloraError
from ..model.transformer import TransformerConfig
from .figures import BLUE, GREEN, ORANGE, RED, SKY, canvas, save
from .ledger import ledger
from .memory import Setting, parameter_count, trainable_count
from .report import size, table


def llama(width: int, hidden: int, layers: int, heads: int, key_heads: int, vocab: int, **more):
    shape = {"width": width, "hidden": hidden, "layers": layers, "heads": heads, "vocab": vocab}
    return TransformerConfig(
        key_heads=key_heads, **({"tied": False, "context": 8192} | shape | more)
    )


# Published shapes; `tests/test_memory.py` holds their parameter counts to the published ones.
MODELS = {
    "gpt2": TransformerConfig.gpt2(vocab=50257, width=768, layers=12, heads=12),
    "smollm2-135m": llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "llama-7b": llama(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": llama(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": llama(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": llama(8192, 22016, 80, 64, 64, 32000),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": llama(8192, 28672, 80, 64, 8, 128256),
}
CARDS = (8, 24, 48, 80)  # GB
KINDS = {
    "weights": (
        "weights", "codes", "scales", "nested scales", "code tables", "offsets", "adapters",
    ),
    "gradients": ("gradients",),
    "optimizer": ("optimizer", "control"),
}  # fmt: skip


def config_of(name: str) -> TransformerConfig:
    """A published shape by name.  Errors: `MiniloraError` listing the names there are."""
    if name not in MODELS:
        raise MiniloraError(f"model: expected one of {', '.join(MODELS)}; found {name!r}")
    return MODELS[name]


def memory_record(model: str, setting: Setting) -> dict[str, Any]:
    """The ledger of `setting`, and beside it those of the other methods on the same model."""
    entries = {}
    for method in ("full", "lora", "qlora"):
        one = replace(setting, method=method)
        entries[method] = ledger(one) | {"trainable": trainable_count(one)}
    shape = {"batch": setting.batch, "length": setting.length, "rank": setting.rank}
    return {
        "kind": "memory",
        "model": model,
        "method": setting.method,
        "parameters": parameter_count(setting.config),
        "setting": shape | {"dtype": setting.dtype, "recompute": setting.recompute},
        "config": asdict(setting.config),
        "methods": entries,
        "papers": papers(parameter_count(setting.config), setting.block),
    }


def papers(parameters: int, block: int) -> dict[str, float]:
    """The arithmetic of QLoRA's sections 1 and 3: every parameter counts alike, in GB and bits.

    full = 2 + 2 + 8 bytes a parameter; scales 32/B bits a weight, or 8/B + 32/(256 B).
    """
    plain, double = 32 / block, 8 / block + 32 / (256 * block)
    return {
        "full_16_bit": 12 * parameters / 1e9,
        "scale_bits": plain,
        "double_scale_bits": double,
        "double_saves": (plain - double) / 8 * parameters / 1e9,
    }


def papers_text(record: dict[str, Any]) -> str:
    """What the papers say of this model, and the term that they leave out."""
    said, entries = record["papers"], record["methods"]
    left = {m: (grouped(e)["saved"] + grouped(e)["scratch"]) / 1e9 for m, e in entries.items()}
    terms = ", ".join(f"{method} {gb:,.1f} GB" for method, gb in left.items())
    return (
        "The papers count weights, gradients and moments: in 16 bits with Adam 2 + 2 + 8 bytes a "
        f"parameter,\n{said['full_16_bit']:,.1f} GB; scales of {said['scale_bits']:.3g} bits a "
        f"weight, quantized again {said['double_scale_bits']:.3f}, which saves "
        f"{said['double_saves']:.1f} GB if all are quantized.\nThey leave out what a step holds "
        f"beside these, activations saved for the way back and scratch: {terms}."
    )


def memory_table(record: dict[str, Any]) -> str:
    """The record's own method array by array, then the three methods side by side."""
    mine = record["methods"][record["method"]]
    setting = record["setting"]
    rows = [["array", "bytes", ""]]
    for part in ("persistent", "saved", "scratch"):
        for name, n in mine[part].items():
            label = {"saved": "saved by ", "scratch": "scratch: "}.get(part, "") + name
            rows.append([label, f"{n:,}", size(n)])
    rows.append(["total", f"{mine['total']:,}", size(mine["total"])])
    rows.append(["peak of a step", f"{mine['peak']:,}", size(mine["peak"])])
    side = [["method", "trainable", "weights", "gradients", "optimizer", "saved", "total", "peak",
             "fits"]]  # fmt: skip
    for method, entry in record["methods"].items():
        groups = grouped(entry)
        gb = [f"{entry[key] / 1e9:,.1f} GB" for key in ("total", "peak")]
        card = card_of(entry)
        fits = f"{card} GB" if card else "no single card"
        cells = [size(groups[k]) for k in ("weights", "gradients", "optimizer", "saved")]
        side.append([method, f"{entry['trainable']:,}", *cells, *gb, fits])
    title = (
        f"{record['model']}: {record['parameters']:,} parameters, {record['method']}, "
        f"batch {setting['batch']} x {setting['length']} tokens, rank {setting['rank']}, "
        f"{setting['dtype']}" + (", blocks recomputed" if setting["recompute"] else "")
    )
    title += f"\nactivations and scratch: under the {mine['rules']}"
    return f"{title}\n\n{table(rows)}\n\n{table(side)}\n\n{papers_text(record)}"


def card_of(entry: dict[str, Any]) -> int | None:
    """GB of the smallest card that holds a ledger's peak; None for more than one card has."""
    return next((card for card in CARDS if entry["peak"] / 1e9 <= card), None)


def grouped(entry: dict[str, Any]) -> dict[str, int]:
    """A ledger's bytes by the kinds of the figure."""
    held = entry["persistent"]
    groups = {kind: sum(held.get(name, 0) for name in names) for kind, names in KINDS.items()}
    return groups | {
        "saved": sum(entry["saved"].values()),
        "scratch": sum(entry["scratch"].values()),
    }


def memory_by_model(whole: dict[str, Any], path: str | Path) -> Path:
    """Stacked bars, a panel a model: full, LoRA, QLoRA, with the cards as lines."""
    records = whole["records"]
    figure, axes = canvas(6.4, 4.6, len(records))
    colors = {
        "weights": BLUE,
        "gradients": RED,
        "optimizer": ORANGE,
        "saved": SKY,
        "scratch": GREEN,
    }
    for ax, record in zip(axes, records, strict=True):
        totals = []
        for x, entry in enumerate(record["methods"].values()):
            bottom = 0.0
            for kind, n in grouped(entry).items():
                label = kind if ax is axes[0] and x == 0 else None
                ax.bar(x, n / 1e9, 0.7, bottom=bottom, color=colors[kind], label=label)
                bottom += n / 1e9
            ax.text(x, bottom, f"{bottom:,.0f}", ha="center", va="bottom", fontsize=9)
            totals.append(bottom)
        for card in CARDS:
            if card < max(totals):
                ax.axhline(card, color="0.35", linewidth=0.8, linestyle=":")
                if card > 0.04 * max(totals):  # below, the labels would cover one another
                    ax.text(
                        0.5,
                        card,
                        f"{card}",
                        fontsize=8,
                        color="0.25",
                        va="center",
                        ha="center",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                    )  # between two bars, where nothing else is written
        ax.set_xticks(range(3), record["methods"], fontsize=9)
        ax.set_title(record["model"], fontsize=10)
    axes[0].set_ylabel("GB held in a training step")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    setting = records[0]["setting"]
    figure.suptitle(
        f"batch {setting['batch']} x {setting['length']}, rank {setting['rank']}, "
        f"{setting['dtype']}, dotted: cards of 8, 24, 48, 80 GB",
        fontsize=10,
    )
    return save(figure, path)
