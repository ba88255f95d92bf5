"""A benchmark in print and as a picture, from its record alone."""

from pathlib import Path
from typing import Any

from .figures import BLUE, COLORS, GREEN, MARKS, ORANGE, PURPLE, RED, SKY, canvas, save
from .report import size, table

NAMES = {
    "minilora": "minilora",
    "torch": "torch eager + PEFT",
    "hf": "Hugging Face + PEFT",
    "compile": "torch.compile + PEFT",
    "erf": "torch, erf-GELU",
    "primitives": "our primitives",
    "reference": "our specifications",
    "blas": "minilora, BLAS threads",
    "bnb": "bitsandbytes + PEFT",
}


def bench_report(record: dict[str, Any]) -> str:
    """One table: a line a case and contender; a ratio only behind the gate."""
    suite = record["config"]["suite"]
    memory = suite in ("memory", "scaling")
    header = ["case", "against", "threads", "ms", "ours / theirs", "range", "losses differ by"]
    if memory:
        header += ["peak", "ours / theirs"]
    rows = [header]
    for case in record["cases"]:
        for row in case["rows"]:
            rows.append(line(case, row, memory))
    notes = [
        measured(record),
        f"A ratio below 1 is in our favor; it is printed where values of the first four steps "
        f"agree to {record['gate']:g}.",
        about_machine(record),
    ]
    if record["missing"]:
        names = ", ".join(record["missing"])
        notes.append(f'Not installed, so not raced: {names}: pip install "minilora[peers]".')
    notes += sorted({
        f"{NAMES[row['contender']]} failed at {case['title']}: {row['error']}"
        for case in record["cases"]
        for row in case["rows"]
        if "error" in row
    })  # fmt: skip
    return table(rows) + "\n\n" + "\n".join(notes)


def line(case: dict[str, Any], row: dict[str, Any], memory: bool) -> list[str]:
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    low_high = "{:.2f}-{:.2f}".format(*row["ratio_range"]) if "ratio_range" in row else "-"
    gap = f"{row['gap']:.0e}" if row.get("gap") else "-"
    if row.get("passed") is False:
        gap += " REFUSED"
    threads = row.get("working", 1 if case.get("measure") == "cpu" else case["threads"])
    cells = [
        case["title"],
        NAMES[row["contender"]],
        str(threads),
        f"{row['ms']:.1f}" if "ms" in row else "-",
        ratio,
        low_high,
        gap,
    ]
    if memory:
        share = f"{row['bytes_ratio']:.2f}" if "bytes_ratio" in row else "-"
        cells += [size(row["bytes"]) if "bytes" in row else "-", share]
    return cells


def measured(record: dict[str, Any]) -> str:
    """By which clock, over how many rounds, and how many were dropped."""
    cases = [case for case in record["cases"] if "measure" in case]
    if not cases:
        return "Peak memory of fresh processes beyond what their imports and data hold."
    by_cpu = [case["title"] for case in cases if case["measure"] == "cpu"]
    text = (
        f"Median over {min(c['clean'] for c in cases)} or more rounds of the ratio within a round; "
        f"{sum(c['dropped'] for c in cases)} rounds dropped because others used the processors."
    )
    if by_cpu:
        text += (
            f" No clean round for {', '.join(by_cpu)}: these are CPU times on one thread instead."
        )
    return text


def about_machine(record: dict[str, Any]) -> str:
    m = record["machine"]
    ceilings = ", ".join(f"{k} {v:.0f}" for k, v in record["ceilings"].items())
    versions = {}
    for case in record["cases"]:
        for row in case["rows"]:
            versions |= row.get("versions", {})
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{m['cpu']}, {m['cores']} cores; Python {m['python']}, NumPy {m['numpy']}, {m['blas']}"
        + (f"; {libraries}" if libraries else "")
        + (f"; sgemm ceiling, GFLOP/s: {ceilings}." if ceilings else ".")
    )


def bench_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Ratios as bars, with their range; for the scaling suite time and bytes along each axis."""
    if record["config"]["suite"] == "scaling":
        return scaling_figure(record, path)
    key, spread = ("bytes_ratio", None) if record["config"]["suite"] == "memory" else (
        "ratio", "ratio_range",
    )  # fmt: skip
    bars = [
        (case["title"], NAMES[row["contender"]], row[key], row.get(spread))
        for case in record["cases"]
        for row in case["rows"]
        if key in row
    ]
    colors = dict(zip(NAMES.values(), (BLUE, BLUE, SKY, ORANGE, PURPLE, GREEN, RED, SKY, BLUE)))  # noqa: B905
    figure, (ax,) = canvas(6.4, 1.2 + 0.27 * max(3, len(bars)))
    for y, (_, name, ratio, ends) in enumerate(reversed(bars)):
        ax.barh(y, ratio, color=colors[name], height=0.7, label=name)
        if ends:
            ax.plot(ends, [y, y], color="0.15", linewidth=1.4)
        ax.text(max(ratio, *(ends or [0])), y, f" {ratio:.2f}", va="center", fontsize=8)
    labels = [f"{title}: {name}" for title, name, *_ in reversed(bars)]
    ax.set_yticks(range(len(bars)), labels, fontsize=8)
    ax.set_ylim(-0.7, len(bars) - 0.3)
    ax.axvline(1, color="0.3", linewidth=1)
    what = "peak memory" if key == "bytes_ratio" else "time"
    ax.set_xlabel(f"our {what} over theirs (below 1: in our favor)")
    ax.set_xlim(0, 1.18 * max([1.0, *(b[2] for b in bars), *(b[3][1] for b in bars if b[3])]))
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    return save(figure, path)


def scaling_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Two rows of panels, an axis a column: milliseconds and bytes of a step."""
    from matplotlib.figure import Figure

    axes_named = list(dict.fromkeys(case["axis"] for case in record["cases"]))
    figure = Figure(figsize=(2.1 * len(axes_named) + 1, 4.8), layout="constrained")
    grid = figure.subplots(2, len(axes_named), squeeze=False, sharey="row")
    contenders = list(dict.fromkeys(r["contender"] for c in record["cases"] for r in c["rows"]))
    for column, axis in enumerate(axes_named):
        cases = [case for case in record["cases"] if case["axis"] == axis]
        for top, (key, scale) in enumerate((("ms", 1.0), ("bytes", 1 << 20))):
            ax = grid[top][column]
            for i, name in enumerate(contenders):
                points = [
                    (case["value"], row[key] / scale)
                    for case in cases
                    for row in case["rows"]
                    if row["contender"] == name and key in row
                ]
                if points:
                    style = {"color": COLORS[(i + 1) % 6], "marker": MARKS[i % 6]}
                    label = NAMES[name] if (top, column) == (0, 0) else None
                    ax.plot(*zip(*points, strict=True), label=label, **style)
            values = sorted({case["value"] for case in cases})
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(values, [str(v) for v in values])
            ax.minorticks_off()
            ax.grid(color="0.9", linewidth=0.8)
            ax.spines[["top", "right"]].set_visible(False)
            if top:
                ax.set_xlabel(axis)
            if not column:
                ax.set_ylabel("MiB at the peak" if top else "ms a step")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def bench_summary(steps: dict[str, Any], memory: dict[str, Any]) -> str:
    """Both suites in one Markdown table: ours over theirs in time and in peak memory, by case."""
    peaks = {case["title"]: case for case in memory["cases"]}
    lines = ["| case | against | time, ours / theirs | range | memory, ours / theirs |",
             "|---|---|---|---|---|"]  # fmt: skip
    for case in steps["cases"]:
        for row in case["rows"]:
            if row["contender"] not in ("torch", "bnb"):
                continue
            beside = next(
                r for r in peaks[case["title"]]["rows"] if r["contender"] == row["contender"]
            )
            time = f"{row['ratio']:.2f}" if "ratio" in row else "refused by the gate"
            low_high = "{:.2f} to {:.2f}".format(*row["ratio_range"]) if "ratio" in row else "-"
            held = f"{beside['bytes_ratio']:.2f}" if "bytes_ratio" in beside else "-"
            name = NAMES[row["contender"]]
            lines.append(f"| {case['title']} | {name} | {time} | {low_high} | {held} |")
    return "\n".join(lines)
