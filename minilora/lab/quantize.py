"""What a code costs and what it loses: error, usage, bits, on a bell curve and on real weights."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import QuantError
from ..files import safetensors
from ..files.trees import DATA
from ..quant.blockwise import BLOCKS, dequantize_blocks, quantize_array, unpack
from ..quant.codes import code
from ..quant.double import double_quantize
from .compare import versions
from .figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas, save
from .report import number, table

FOUR_BITS = ("nf4", "fp4", "e2m1", "int4", "int4_max")


@dataclass(frozen=True)
class QuantizeConfig:
    """`tensor` is FILE.safetensors:NAME, or None for a weight of a shipped base."""

    code: str = "nf4"
    block: int = 64
    double: bool = True
    tensor: str | None = None
    samples: int = 1 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        code(self.code)
        if self.block not in BLOCKS:
            raise QuantError(f"block: expected one of {BLOCKS}, found {self.block}")


def errors(x: np.ndarray, name: str, block: int, double: bool) -> dict[str, float]:
    """Mean |e|, root mean square, mean |e| / |x|, bits a weight, entropy of the codes in bits."""
    held = quantize_array(x, name, block)
    if double:
        held = double_quantize(held)
    gap = np.abs(held.dense().ravel() - x.ravel()).astype(np.float64)
    of = np.abs(x.ravel())
    counts = usage(held.packed, name, x.size)
    share = counts[counts > 0] / counts.sum()
    return {
        "l1": float(gap.mean()),
        "rmse": float(np.sqrt((gap**2).mean())),
        "relative": float((gap[of > 0] / of[of > 0]).mean()),
        "bits": 8 * held.nbytes / x.size,
        "entropy": float(-(share * np.log2(share)).sum()),
    }


def usage(packed: np.ndarray, name: str, n: int) -> np.ndarray:
    """How often each level is used."""
    stored = unpack(np, packed)[:n] if code(name).bits == 4 else packed
    return np.bincount(stored, minlength=len(code(name).table))


def weight_of(spec: str | None) -> tuple[str, np.ndarray]:
    """The tensor FILE:NAME, or a shipped weight.  Errors: `QuantError`, or the reader's own."""
    if spec is None:
        spec = f"{DATA / 'text.safetensors'}:blocks.0.mlp.up.weight"
    path, _, name = spec.rpartition(":")
    stored = safetensors.read(path or spec)
    if name not in stored:
        raise QuantError(f"tensor: expected FILE:NAME with a name of {', '.join(stored)}")
    weight = stored[name]
    if weight.dtype.kind != "f":  # such as codes, which are no weights
        raise QuantError(f"tensor: expected floats in {name}, found {weight.dtype}")
    weight = weight.astype(np.float32)
    if not weight.any():  # nothing to be wrong about: |e| / |x| has no mean
        raise QuantError(f"tensor: expected some number but zero in {name}, found none")
    return f"{Path(path).name}:{name}", weight


def quantize_lab(config: QuantizeConfig) -> dict[str, Any]:
    """One code in full, all four-bit codes by block size, and what equal bits buy."""
    rng = np.random.default_rng(config.seed)
    bell = rng.standard_normal(config.samples, np.float32)
    label, real = weight_of(config.tensor)
    chosen = code(config.code)
    held = quantize_array(bell, config.code, config.block)
    K = len(chosen.levels)  # what is stored beyond them has no level: NaN, which is no JSON
    return {
        "kind": "quantize",
        "config": asdict(config),
        "tensor": label,
        "levels": [float(v) for v in chosen.table[:K]],
        "usage": usage(held.packed, config.code, bell.size)[:K].tolist(),
        "bell": errors(bell, config.code, config.block, config.double),
        "real": errors(real, config.code, config.block, config.double),
        "by_block": {
            name: {str(b): errors(bell, name, b, False) for b in BLOCKS} for name in FOUR_BITS
        },
        "equal_bits": equal_bits(bell),
        "versions": versions(),
    }


def equal_bits(bell: np.ndarray) -> list[dict[str, Any]]:
    """Codes with scales as they are stored in practice, by bits a weight.

    NF4 with float32 scales, or scales of scales; INT4 with float16 scales in blocks of 32,
    which is GGUF's Q4_0; both integers in larger blocks.
    """
    found = []
    for name, blocks, kinds in (
        ("nf4", (32, 64, 128, 256), ("float32", "double")),
        ("int4_max", (32, 64, 128, 256), ("float16",)),
        ("int4", (32, 64, 128, 256), ("float16",)),
        ("fp4", (64, 128), ("float32", "double")),
    ):
        for block in blocks:
            for kind in kinds:
                e = errors(bell, name, block, kind == "double")
                if kind == "float16":
                    e |= half_scales(bell, name, block)
                found.append({"code": name, "block": block, "scales": kind} | e)
    return found


def half_scales(bell: np.ndarray, name: str, block: int) -> dict[str, float]:
    """The same codes with their scales rounded to float16: 16 bits a block instead of 32."""
    held = quantize_array(bell, name, block)
    scales = held.scales.astype(np.float16).astype(np.float32)
    out = np.empty_like(bell)
    dequantize_blocks(held.packed, scales, code=held.code, block=block, out=out)
    gap = np.abs(out - bell).astype(np.float64)
    rmse = float(np.sqrt((gap**2).mean()))
    return {"rmse": rmse, "l1": float(gap.mean()), "bits": 4 + 16 / block}


def quantize_report(record: dict[str, Any]) -> str:
    """The chosen code on both, then all codes by block size, then equal bits."""
    c = record["config"]
    rows = [["on", "mean |e|", "RMSE", "mean |e|/|x|", "bits/weight", "entropy of codes"]]
    for name, e in (("N(0, 1)", record["bell"]), (record["tensor"], record["real"])):
        rows.append([name, number(e["l1"]), number(e["rmse"]), f"{e['relative']:.4f}",
                     f"{e['bits']:.4f}", f"{e['entropy']:.3f}"])  # fmt: skip
    blocks = [["mean |e| on N(0, 1), block", *map(str, BLOCKS)]]
    for name, by in record["by_block"].items():
        blocks.append([name, *(f"{by[str(b)]['l1']:.4f}" for b in BLOCKS)])
    equal = [["equal bits", "block", "scales", "bits/weight", "RMSE", "mean |e|"]]
    for e in sorted(record["equal_bits"], key=lambda e: (e["bits"], e["rmse"])):
        equal.append([e["code"], str(e["block"]), e["scales"], f"{e['bits']:.3f}",
                      f"{e['rmse']:.4f}", f"{e['l1']:.4f}"])  # fmt: skip
    double = ", double quantization" if c["double"] else ""
    title = f"{c['code']}, block {c['block']}{double}; {c['samples']:,} numbers from a bell curve"
    return "\n\n".join([title, table(rows), table(blocks), table(equal)])


def frontier(entries: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(bits, RMSE) of those that no other beats in one without being worse in the other."""
    found: list[tuple[float, float]] = []
    for e in sorted(entries, key=lambda e: (e["bits"], e["rmse"])):
        if not found or e["rmse"] < found[-1][1]:
            found.append((e["bits"], e["rmse"]))
    return found


def levels_figure(record: dict[str, Any], path: str | Path) -> Path:
    """The levels on the bell curve that they were made for, and how often each is used."""
    figure, (ax, bars) = canvas(7.2, 3.8, panels=2)
    levels = np.array(record["levels"])
    order = np.argsort(levels, kind="stable")
    x = np.linspace(-1.15, 1.15, 400)
    sigma = 1 / 2.5  # a block of 64 has its largest magnitude near 2.5 σ
    ax.plot(x, np.exp(-0.5 * (x / sigma) ** 2), color=BLACK, linewidth=1.2)
    ax.vlines(levels, 0, np.exp(-0.5 * (levels / sigma) ** 2), color=BLUE, linewidth=1.6)
    ax.plot(levels, np.zeros(len(levels)), "o", color=BLUE, ms=4)
    ax.set_xlabel("weight over the largest of its block")
    ax.set_yticks([])
    ax.set_ylabel("density of weights")
    ax.set_title(f"{record['config']['code']}: {len(levels)} levels", loc="left", fontsize=10)
    share = np.array(record["usage"])[order] / sum(record["usage"])
    bars.bar(range(len(share)), share, color=SKY, edgecolor=BLUE)
    bars.set_xticks(range(0, len(share), 3))
    bars.axhline(1 / len(share), color="0.3", ls="--", linewidth=1)
    bars.set_xlabel("level, from the lowest up (dashed: equal use)")
    bars.set_ylabel("share of the weights")
    entropy = record["bell"]["entropy"]
    bits = math.log2(len(share))
    bars.set_title(f"entropy {entropy:.2f} of {bits:.0f} bits", loc="left", fontsize=10)
    return save(figure, path)


def codes_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Left: error by block size and code.  Right: error against bits, the scales included."""
    figure, (ax, pareto) = canvas(7.2, 5.2, panels=2)
    colors = dict(zip(FOUR_BITS, (BLUE, RED, PURPLE, ORANGE, GREEN), strict=True))
    names = {"nf4": "NF4", "fp4": "FP4", "e2m1": "E2M1", "int4": "INT4, 15 levels",
             "int4_max": "INT4, 16 levels, signed max"}  # fmt: skip
    dashes = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
    for (name, by), line in zip(record["by_block"].items(), dashes, strict=True):
        errors_of = [e["rmse"] for e in by.values()]
        ax.plot([int(b) for b in by], errors_of, color=colors[name], ls=line, label=names[name])
    ax.set_xscale("log", base=2)
    ax.set_xticks(BLOCKS, [str(b) for b in BLOCKS], fontsize=8)
    ax.set_xlabel("weights in a block")
    ax.set_ylabel("RMSE on N(0, 1)")
    for e in record["equal_bits"]:
        marker = {"float32": "o", "double": "s", "float16": "^"}[e["scales"]]
        pareto.plot(e["bits"], e["rmse"], marker, color=colors[e["code"]], ms=7)
        offset, side, height = {  # a side for each kind, since points of two kinds meet
            "float32": ((6, 0), "left", "center"),
            "float16": ((-6, 0), "right", "center"),
            "double": ((0, -5), "center", "top"),
        }[e["scales"]]
        pareto.annotate(str(e["block"]), (e["bits"], e["rmse"]), fontsize=8, va=height, ha=side,
                        xytext=offset, textcoords="offset points")  # fmt: skip
    pareto.margins(0.12, 0.06)
    best = frontier(record["equal_bits"])
    pareto.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0, label="Pareto front")
    for label, marker in (
        ("float32 scales", "o"),
        ("scales of scales", "s"),
        ("float16 scales", "^"),
    ):
        pareto.plot([], [], marker, color="0.4", label=label)
    pareto.set_xlabel("bits a weight, scales included\n(number: weights in a block)")
    pareto.set_ylabel("RMSE on N(0, 1)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)
