"""The check of a card in print: what is right, what is fast, and a short table to end with."""

from typing import Any

from .gpu_race import COMPILED, EAGER, OURS, precision_of, race_rows
from .report import table

TOLERANCE = 1e-5  # of float32, relative in norm
LIMITS = {"bf16": 1e-2}  # what is checked in other precision than float32


def within(row: dict[str, Any]) -> bool:
    """Is the gap of a check as small as its precision allows?"""
    return row["gap"] <= row.get("limit", TOLERANCE)


def gpu_report(record: dict[str, Any]) -> str:
    """Short tables: what is right, the worst last; then what is fast."""
    if "skipped" in record:
        return f"gpu-check skipped: {record['skipped']}"
    rows = [["what", "rules", "gap to float64", "repeats to the bit"]]
    worst = sorted(record["ops"], key=lambda row: row["gap"] / row["limit"])[-8:]
    rows += [[r["op"], r["rules"], f"{r['gap']:.1e}", str(r["repeats"])] for r in worst]
    rows += [[f"quantize {r['code']}", "all", f"{r['gap']:.1e}", str(r["repeats"])]
             for r in record["codes"]]  # fmt: skip
    rows += [
        [r["step"], "all", f"{r['gap']:.1e}", str(r["repeats"])]
        for r in record["steps"] + record["optimizers"]
    ]
    rows += [[f"losses, {r['curve']}: {len(r['device'])} steps", "fast", f"{r['gap']:.1e}",
              str(r["repeats"])] for r in record["curves"]]  # fmt: skip
    parts = [f"{record['device']}, CuPy {record['cupy']}, {len(record['ops'])} checks of ops",
             table(rows), *speeds(record)]  # fmt: skip
    parts += [f"ERROR in {name}: {error}" for name, error in record["errors"].items()]
    if record["left_out"]:
        parts.append(f"left out, for want of time: {', '.join(record['left_out'])}")
    verdict = "passed" if record["passed"] else (
        f"FAILED: a gap above {TOLERANCE:g} (bf16: {LIMITS['bf16']:g}), other losses, not "
        "repeated, a hidden transfer, another token, a spike not survived, a finding of "
        "compute-sanitizer, an error, or no time to check"
    )  # fmt: skip
    parts.append(table(goals(record)))
    return "\n\n".join([*parts, f"gpu-check {verdict} in {record['seconds']} s"])


def speeds(record: dict[str, Any]) -> list[str]:
    """Tables of steps, launches, kernels and products, those that there are."""

    def number(row: dict[str, Any], key: str, digits: int = 2) -> str:
        return f"{row[key]:.{digits}f}" if key in row else "-"

    steps = [["step", "eager ms", "captured ms", "copies", "same bits", "why eager"]]
    steps += [[r["step"], number(r, "eager_ms"), number(r, "captured_ms"),
               str(r["to_host"] + r["to_device"]), str(r["same_bits"]), r["why_eager"] or ""]
              for r in record["timing"]]  # fmt: skip
    launches = [["one call", "us of the host"]]
    launches += [[name, f"{us:.1f}"] for name, us in record["launches"].items()]
    kernels = [["kernel", "ms", "GB/s", "of a copy"]]
    kernels += [[r["kernel"], number(r, "ms", 3), number(r, "gb_s", 0), number(r, "of_copy")]
                for r in record["kernels"]]  # fmt: skip
    products = [["product", "ms", "TFLOP/s"]]
    products += [[f"{r['product']}, {r['dtype']}, {r['shape']}", number(r, "ms", 3),
                  number(r, "tflop_s", 1)] for r in record["products"]]  # fmt: skip
    decoding = [["decoding", "tokens/s", "GB/s of weights", "same tokens", "why eager"]]
    decoding += [[r["decoding"], number(r, "tokens_s", 1), number(r, "gb_s", 0),
                  str(r["same_tokens"]), r["why_eager"] or ""]
                 for r in record["decoding"]]  # fmt: skip
    parts = steps, launches, kernels, products, decoding, race_rows(record["race"])
    return [table(rows) for rows in parts if len(rows) > 1]


def goals(record: dict[str, Any]) -> list[list[str]]:
    """[what, wanted, found, does it hold] of a record; "not run" with the reason, where known."""
    gaps = [row for part in ("ops", "codes", "steps", "optimizers") for row in record[part]]
    worst = {
        limit: max((r["gap"] for r in gaps if r.get("limit", TOLERANCE) == limit), default=None)
        for limit in (TOLERANCE, *LIMITS.values())
    }
    rows = [
        at_most("worst gap to float64", TOLERANCE, worst[TOLERANCE], "{:.0e}"),
        at_most("the same in bf16", LIMITS["bf16"], worst[LIMITS["bf16"]], "{:.0e}"),
        *([at_most(f"losses of {len(r['device'])} steps, {r['curve']}", r["limit"], r["gap"],
                   "{:.0e}") for r in record["curves"]] or [["losses", "-", "-", "not run"]]),
        holds("the same bits run after run", [r["repeats"] for r in gaps + record["curves"]]),
        holds("the same bits captured", [row["same_bits"] for row in record["timing"]]),
        holds("the same tokens captured", [row["same_tokens"] for row in record["decoding"]]),
        holds("a spike: paging survives it", [survived(record["spike"])] * bool(record["spike"])),
    ]  # fmt: skip
    for race in record["races"]:
        rows += race_goals(race, {r["step"]: r for r in record["race"] if r["race"] == race})
    kernels = {row["kernel"]: row.get("of_copy") for row in record["kernels"]}
    for name, least in OF_COPY.items():
        rows.append(at_least(f"{name}, of a copy's GB/s", least, kernels.get(name)))
    rate = next((r["tflop_s"] for r in record["products"]
                 if (r["product"], r["dtype"]) == ("attention", "bf16")), None)  # fmt: skip
    rows.append(at_least("attention in bf16, TFLOP/s", ATTENTION, rate, "{:.0f}"))
    rows += [judged(f"decoding, {r['decoding']}, tokens/s", "known", r["tokens_s"], "{:.0f}",
                    lambda rate: rate > 0)
             for r in record["decoding"] if "captured" in r["decoding"]
            ] or [["decoding, tokens/s", "known", "-", "not run"]]  # fmt: skip
    for row in record["watch"]:
        name, why = f"compute-sanitizer, {row['tool']}", row.get("not run")
        rows.append(holds(name, [row["clean"]] if why is None else [], why))
    return [["what", "wanted", "found", "holds"], *rows]


OF_COPY = {  # the least share of a copy's bandwidth
    "nf4 dequantize": 0.80,
    "nf4 dequantize, bf16": 0.80,
    "nf4 product, 1 row": 0.70,
    "nf4 product, 1 row, bf16": 0.70,
    "adamw": 0.85,
}
ATTENTION = 150.0  # TFLOP/s on the way out, T = 1024, D = 64
OF_EAGER = {"bf16": 0.7, "float32": 0.9}  # the most of torch's eager time, and of its memory


def race_goals(race: str, rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """What a captured step is to be against torch's, and on a base in codes; rows by contender."""
    _, captured, coded = (rows.get(name, {}) for name in OURS)
    eager, compiled = rows.get(EAGER, {}), rows.get(COMPILED, {})
    limit = OF_EAGER[precision_of(race)]
    return [
        at_most(f"{race}: {what}", most, share(a.get(key), b.get(key)), why=b.get("not run"))
        for what, most, key, a, b in (
            ("step of torch eager, time", limit, "ms", captured, eager),
            ("step of torch eager, memory", limit, "bytes", captured, eager),
            ("step of torch.compile, time", 1.0, "ms", captured, compiled),
            ("QLoRA step of LoRA step, time", 1.25, "ms", coded, captured),
        )
    ]


def survived(spike: dict[str, Any]) -> bool:
    """Was it what it has to be: refused without pages, survived with them, the same weights?"""
    return spike == {"unpaged": "raises", "paged": "survives", "same_bits": True}


def share(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def at_most(
    what: str, limit: float, found: float | None, form: str = "{:.2f}", why: str | None = None
) -> list[str]:
    return judged(what, f"<= {form.format(limit)}", found, form, lambda x: x <= limit, why)


def at_least(what: str, limit: float, found: float | None, form: str = "{:.2f}") -> list[str]:
    return judged(what, f">= {form.format(limit)}", found, form, lambda x: x >= limit)


def holds(what: str, found: list[bool | None], why: str | None = None) -> list[str]:
    """Do all that were run hold?  None is one that was not."""
    ran = [one for one in found if one is not None]
    return judged(what, "yes", all(ran) if ran else None, "{}", lambda x: x, why)


def judged(
    what: str, wanted: str, found: Any, form: str, fits: Any, why: str | None = None
) -> list[str]:
    if found is None:
        return [what, wanted, "-", "not run" + (f": {why}" if why else "")]
    said = {True: "yes", False: "no"}
    text = said[found] if isinstance(found, bool) else form.format(found)
    return [what, wanted, text, said[bool(fits(found))]]
