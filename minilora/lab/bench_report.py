"""A benchmark in print and as a picture, from its record alone."""

from pathlib import Path
from typing import Any

from .bench import BASELINES, ERF_GATE, WEIGHED
from .figures import BLUE, COLORS, GREEN, MARKS, ORANGE, PURPLE, RED, SKY, YELLOW, canvas, save
from .report import size, table

MICRO_BATCHES = "The micro-batches are ours alone: torch takes the batch whole."
NAMES = {"minilora": "minilora"} | {name: said for name, (said, _) in BASELINES.items()}


def bench_report(record: dict[str, Any]) -> str:
    """One table: a line a case and contender; a ratio only behind the gate."""
    suite = record["config"]["suite"]
    memory = suite in WEIGHED
    header = ["case", "against", "threads", "ms", "ours / theirs", "range", "losses differ by"]
    if memory:
        header += ["peak", "ours / theirs", "range"]
    rows = [header]
    for case in record["cases"]:
        for row in case["rows"]:
            rows.append(line(case, row, memory))
    notes = [
        measured(record),
        f"A ratio below 1 is in our favor; it is printed where values of the first four steps "
        f"agree to {record['gate']:g}{looser(record)}.",
        about_machine(record),
    ]
    if suite == "micro":
        notes.insert(1, MICRO_BATCHES)
    if suite == "threads":
        notes += speedups(record)
    if record["missing"]:
        names = ", ".join(record["missing"])
        notes.append(
            f'Not installed: {names}: pip install "minilora[peers]".  Who needs them did not race.'
        )
    notes += sorted({
        f"{NAMES[row['contender']]} failed at {case['title']}: {row['error']}"
        for case in record["cases"]
        for row in case["rows"]
        if "error" in row
    })  # fmt: skip
    return table(rows) + "\n\n" + "\n".join(notes)


def looser(record: dict[str, Any]) -> str:
    """The gate of the one contender that computes another function, where it ran."""
    names = {row["contender"] for case in record["cases"] for row in case["rows"]}
    return f" (with erf-GELU, another function: to {ERF_GATE:g})" if "erf" in names else ""


def line(case: dict[str, Any], row: dict[str, Any], memory: bool) -> list[str]:
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    low_high = "{:.2f}-{:.2f}".format(*row["ratio_range"]) if "ratio_range" in row else "-"
    raced = row["contender"] != "minilora" and row.get("gap") is not None
    gap = f"{row['gap']:.0e}" if raced else "-"
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
        ends = "{:.2f}-{:.2f}".format(*row["bytes_range"]) if "bytes_range" in row else "-"
        cells += [size(row["bytes"]) if "bytes" in row else "-", share, ends]
    return cells


def speedups(record: dict[str, Any]) -> list[str]:
    """What more threads give each contender, by the clock: time over that on one thread."""
    ms = {
        (case["shape"], case["mode"], row["contender"], case["threads"]): row["ms"]
        for case in record["cases"]
        for row in case["rows"]
        if case["measure"] == "wall" and "ms" in row
    }

    def alone(shape: str, mode: str, name: str) -> float | None:
        name = "minilora" if name == "blas" else name  # on one thread they are the same
        return ms.get((shape, mode, name, 1))

    return [
        f"{shape} {mode}, {NAMES[name]}: {threads} threads take "
        f"{taken / alone(shape, mode, name):.2f} of the time of one."
        for (shape, mode, name, threads), taken in ms.items()
        if threads > 1 and alone(shape, mode, name)
    ]


def measured(record: dict[str, Any]) -> str:
    """By which clock, over how many rounds, and how many were dropped."""
    cases = [case for case in record["cases"] if "measure" in case]
    if not cases:
        n = processes(record)
        return f"Peak memory beyond what imports and data hold, the median of {n} processes each."
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
    key, spread = ("bytes_ratio", "bytes_range") if record["config"]["suite"] == "memory" else (
        "ratio", "ratio_range",
    )  # fmt: skip
    bars = [
        (case["title"], row["contender"], row.get(key), row.get(spread), why(row))
        for case in record["cases"]
        for row in case["rows"]
        if key in row or why(row)
    ]
    colors = {
        "minilora": BLUE, "torch": BLUE, "hf": SKY, "compile": ORANGE, "erf": PURPLE, "stock": SKY,
        "primitives": GREEN, "reference": RED, "blas": YELLOW, "bnb": BLUE,
    }  # fmt: skip
    figure, (ax,) = canvas(6.4, 1.4 + 0.27 * max(3, len(bars)))
    for y, (_, contender, ratio, ends, reason) in enumerate(reversed(bars)):
        if ratio is None:
            ax.text(0, y, f" {reason}", va="center", fontsize=8, style="italic")
            continue
        ax.barh(y, ratio, color=colors[contender], height=0.7)
        if ends:
            ax.plot(ends, [y, y], color="0.15", linewidth=1.4)
        ax.text(max(ratio, *(ends or [0])), y, f" {ratio:.2f}", va="center", fontsize=8)
    labels = [f"{title}: {NAMES[contender]}" for title, contender, *_ in reversed(bars)]
    ax.set_yticks(range(len(bars)), labels, fontsize=8)
    ax.set_ylim(-0.7, len(bars) - 0.3)
    ax.axvline(1, color="0.3", linewidth=1)
    what = "peak memory" if key == "bytes_ratio" else "time"
    ax.set_xlabel(f"our {what} over theirs (below 1: in our favor)")
    ax.set_xlim(0, 1.18 * max([1.0, *(b[2] or 0 for b in bars), *(b[3][1] for b in bars if b[3])]))
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    figure.suptitle(how(record), fontsize=9)
    return save(figure, path)


def why(row: dict[str, Any]) -> str:
    """Why a row has no ratio; empty where nothing is wrong with it."""
    if "error" in row:
        return "failed"
    return "refused by the gate" if row.get("passed") is False else ""


def processes(record: dict[str, Any]) -> int:
    """Of how many each figure of memory is the median: 1 in a record without `bytes_each`."""
    rows = [row for case in record["cases"] for row in case["rows"]]
    return max((len(row.get("bytes_each", [0])) for row in rows), default=1)


def how(record: dict[str, Any]) -> str:
    """How a figure was measured, in a line or two."""
    config, cases = record["config"], record["cases"]
    rates = " : ".join(f"{rate:.0f}" for rate in record["ceilings"].values())
    where = f"{record['machine']['cpu']}, sgemm at {rates} GFLOP/s"
    threads = f"{config['threads']} thread{'s' if config['threads'] > 1 else ''}"
    if config["suite"] == "memory":
        n = processes(record)
        return f"{where}, {threads};\nbars: medians of {n} fresh processes, lines: range"
    clocks = {case["measure"] for case in cases}
    rounds = min(case["clean"] for case in cases)
    if clocks == {"cpu"}:
        return f"{where}, CPU time on 1 thread: no clean window"
    mixed = "; some by CPU time on 1 thread" if "cpu" in clocks else ""
    alone = f"\n{MICRO_BATCHES}" if config["suite"] == "micro" else ""
    return (
        f"{where}, up to {threads};\n"
        f"bars: median over {rounds} clean rounds, lines: range{mixed}{alone}"
    )


ALONG = {
    "batch": "sequences in a batch",
    "time": "tokens in a sequence",
    "width": "width",
    "layers": "blocks",
    "rank": "rank r",
}


def scaling_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Two columns of panels, an axis a row: milliseconds and MiB of a step, both axes log.

    A line through a point is the range over rounds; an older record has only its lower end.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    named = list(dict.fromkeys(case["axis"] for case in record["cases"]))
    figure = Figure(figsize=(6.4, 1.65 * len(named) + 1.1), layout="constrained")
    grid = figure.subplots(len(named), 2, squeeze=False, sharey="col")
    contenders = list(dict.fromkeys(r["contender"] for c in record["cases"] for r in c["rows"]))
    for panels, axis in zip(grid, named, strict=True):
        cases = [case for case in record["cases"] if case["axis"] == axis]
        values = sorted({case["value"] for case in cases})
        for ax, key, scale in zip(panels, ("ms", "bytes"), (1.0, 1 << 20), strict=True):
            for i, name in enumerate(contenders):
                style = {"color": COLORS[(i + 1) % 6], "marker": MARKS[i % 6]}
                rows = [
                    (case["value"], row)
                    for case in cases
                    for row in case["rows"]
                    if row["contender"] == name and key in row
                ]
                label = NAMES[name] if ax is grid[0][0] else None
                ax.plot(
                    [v for v, _ in rows],
                    [row[key] / scale for _, row in rows],
                    label=label,
                    **style,
                )
                for value, row in rows if key == "ms" else ():
                    ends = row.get("ms_range", [row.get("ms_best", row[key]), row[key]])
                    ax.plot([value, value], ends, color=style["color"], linewidth=2.5, alpha=0.4)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(values, [str(v) for v in values])
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.minorticks_off()
            ax.grid(color="0.9", linewidth=0.8)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xlabel(ALONG[axis])
        panels[0].set_ylabel("ms a step")
        panels[1].set_ylabel("MiB at the peak")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    return save(figure, path)


def bench_summary(steps: list[dict[str, Any]], memory: dict[str, Any]) -> str:
    """Time and peak memory of a step in one Markdown table: ours over theirs, by case.

    `steps` are records of the same steps on several machines, each named by what the products
    of NumPy and of torch reach there.
    """

    def row_of(record: dict[str, Any], title: str, contender: str) -> dict[str, Any]:
        case = next(case for case in record["cases"] if case["title"] == title)
        return next(row for row in case["rows"] if row["contender"] == contender)

    def ratio(row: dict[str, Any]) -> str:
        return f"{row['ratio']:.2f}" if "ratio" in row else "refused by the gate"

    rates = ["{numpy:.0f} : {torch:.0f}".format(**record["ceilings"]) for record in steps]
    times = [f"time at {rate}" for rate in rates]
    lines = [
        f"| {' | '.join(['case', 'against', *times, 'memory'])} |",
        "|" + "---|" * (len(steps) + 3),
    ]
    for case in steps[0]["cases"]:
        for row in case["rows"]:
            title, contender = case["title"], row["contender"]
            if contender not in ("torch", "bnb"):
                continue
            held = row_of(memory, title, contender).get("bytes_ratio")
            cells = (
                title,
                NAMES[contender],
                *(ratio(row_of(record, title, contender)) for record in steps),
                "-" if held is None else f"{held:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
