"""Is this card right, and how fast?  Every op, code, step and optimizer, then what they take."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ..engine.errors import expect_whole
from ..engine.progress import progress
from ..model.module import to_device as tree_to_device
from ..quant.codes import CODES
from . import gpu_speed as speed
from .bench_shapes import Shape
from .gpu_curve import CURVES, loss_curve
from .gpu_decode import decode_speeds
from .gpu_gaps import STYLES, code_gap, eight_bit_gap, model_for, op_gap, page_gap, step_gap
from .gpu_race import COMPILED, EAGER, OURS, losses_agree, precision_of, race_name, racers
from .gpu_report import survived, within
from .gpu_spike import memory_spike
from .gpu_watch import TOOLS, watched
from .op_samples import SAMPLES

GPT2_SMALL = Shape(batch=8, time=512, vocab=50257, width=768, layers=12, heads=12)
GPT2_LONG = Shape(batch=16, time=1024, vocab=50257, width=768, layers=12, heads=12)
BILLION = Shape(
    batch=1, time=512, vocab=32000, width=2048, layers=16, heads=16, key_heads=8, hidden=5632
)


@dataclass(frozen=True)
class GpuCheckConfig:
    """What is checked, and for how long steps are timed."""

    seed: int = 0
    curve: int = 200  # steps of the losses that are compared; 0: none
    width: int = 256  # of the model whose step is timed: S1 of the benchmarks
    layers: int = 4
    length: int = 128
    batch: int = 16
    rounds: int = 20
    size: int = 256 << 20  # bytes of a float32 array whose kernel is timed
    product: int = 8192  # rows and columns of a product that is timed
    # The steps that torch makes too, the most wanted first; (): none.
    race: tuple[tuple[Shape, str], ...] = (
        (GPT2_SMALL, "bf16"),
        (GPT2_LONG, "bf16"),
        (GPT2_SMALL, "float32"),
    )
    rank: int = 16  # of those steps' adapters
    decode: Shape | None = BILLION  # of the model that writes tokens; None: not asked for
    new_tokens: int = 128
    spike: int = 4 << 20  # numbers that train, where an optimizer meets a spike
    watch: bool = True  # with compute-sanitizer, where it is
    seconds: float = 500  # what no longer fits is left out, and named

    def __post_init__(self) -> None:
        expect_whole("seed", self.seed, 0)


def why_not() -> str | None:
    """Why nothing can be checked here; None where CuPy finds a device."""
    try:
        import cupy

        found = cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return "CuPy is not installed"
    except RuntimeError as error:  # CuPy's own errors are RuntimeErrors
        return f"CuPy finds no device ({error})"
    return None if found else "CuPy finds no device"


def gpu_check(config: GpuCheckConfig) -> dict[str, Any]:
    """The whole check as a record; `{"skipped": reason}` where there is no device.

    What is right comes first, what is fast after it, the most wanted first.  A part that raises
    is recorded with its error; one that `seconds` leave no time for is named in `left_out`.
    Nothing starts after `seconds`, and no other process gets more than what is left of them: the
    whole ends within 9 minutes.  `spent` says when each group was done.  The budget, in seconds;
    "host" was measured on two slow cores, all else is estimated, for no card has run it yet:

        ops, codes, steps, optimizers, spike; their kernels compiled    80
        200 steps, three models: 15 on the host, twice 2 on the card    20
        decoding, four models in two ways                               25
        launches, kernels, products                                     15
        our steps in three races: six trees at 3 to 5 on the host,
        and nine times 3 on the card                                    50
        torch eager, three times: on the host 9 to import, 5 for a
        tree, 3 to build it; then CUDA, and 25 steps                    75  (80 each at most)
        step times                                                      20
        torch.compile in bfloat16, two shapes                          150  (120 each at most)
        compute-sanitizer, two tools                                    60  (90 each at most)
        in all                                                         495
        torch.compile in float32, the least wanted: what is left, if anything is
    """
    reason = why_not()
    record: dict[str, Any] = {"kind": "gpu-check", "config": asdict(config)}
    if reason is not None:
        return record | {"skipped": reason}
    import cupy

    began = time.monotonic()
    rng = np.random.default_rng(config.seed)
    record |= {"device": device_name(cupy), "cupy": cupy.__version__, "left_out": [], "errors": {}}
    spent = record["spent"] = {}  # seconds after which a group of checks was done

    def left() -> float:
        return config.seconds - (time.monotonic() - began)

    def late() -> bool:
        return left() < 0

    def attempt(name: str, part: Callable[[], Any], otherwise: Any = None) -> Any:
        if late():
            record["left_out"].append(name)
            return otherwise
        try:
            return part()
        except Exception as error:  # a card's first contact should tell all that it can
            record["errors"][name] = f"{type(error).__name__}: {error}"[:400]
            return otherwise

    def each(calls: dict[str, Callable[[], Any]]) -> list:
        found = [attempt(name, call) for name, call in progress(calls.items(), label="checks")]
        return [row for row in found if row is not None]

    def done(group: str) -> None:
        spent[group] = round(time.monotonic() - began, 1)

    record["ops"] = each({
        f"op {i}, {sample.op.__name__}, {rules}": partial(op_gap, sample, rng, rules)
        for i, sample in enumerate(SAMPLES)
        for rules in ("specification", "fast", "bf16")
        if rules != "fast" or "cupy" in sample.op.fast
    })  # fmt: skip
    record["codes"] = each({f"code {name}": partial(code_gap, name, rng) for name in CODES})
    record["steps"] = each({f"steps, {s}": partial(step_gap, s, config.seed) for s in STYLES})
    record["optimizers"] = each({
        "paged AdamW, 1 page": partial(page_gap, 1),
        "paged AdamW, 3 pages": partial(page_gap, 3),
        "8-bit AdamW": eight_bit_gap,
    })  # fmt: skip
    record["curves"] = each({
        f"losses, {s}": partial(loss_curve, s, config.curve, config.seed)
        for s in (CURVES if config.curve else ())
    })  # fmt: skip
    record["spike"] = attempt("spike", partial(memory_spike, cupy, config.spike), {})
    done("what is right")
    record["decoding"] = []
    if config.decode is not None:
        tokens = partial(decode_speeds, cupy, config.decode, config.new_tokens)
        record["decoding"] = attempt("decoding", tokens, [])
    right = not record["left_out"]
    done("decoding")
    record["launches"] = attempt(
        "launches", lambda: speed.launch_costs(cupy, 50 * config.rounds), {}
    )
    for name, part in (
        ("kernels", partial(speed.kernel_speeds, cupy, config.size, late)),
        ("products", partial(speed.product_speeds, cupy, config.product, late)),
    ):
        record[name] = attempt(name, part, [])
    done("kernels")
    races = {
        race_name(*race): racers(cupy, *race, config.rank, config.rounds, left)
        for race in config.race
    }
    record["race"], record["races"] = [], list(races)

    def run_race(*contenders: str, dtypes: tuple[str, ...] = ("bf16", "float32")) -> None:
        for race, calls in races.items():
            for name in contenders if precision_of(race) in dtypes else ():
                row = attempt(f"{race}: {name}", calls[name])
                record["race"] += [] if row is None else [{"race": race, "step": name} | row]

    run_race(*OURS)
    done("our steps")
    run_race(EAGER)
    done("torch's eager steps")
    shape = (config.batch, config.length)

    def timed(style: str) -> dict[str, Any]:
        model = model_for(style, config.width, config.layers, config.length)
        name = f"{STYLES[style]}, r=8, d{config.width}, {shape[0]} x {shape[1]} tokens"
        return {"step": name} | speed.step_times(
            cupy, lambda: tree_to_device(model, "cuda"), shape, config.rounds
        )

    record["timing"] = each({f"step time, {s}": partial(timed, s) for s in STYLES})
    done("step times")
    run_race(COMPILED, dtypes=("bf16",))
    done("torch.compile in bf16")
    command = [sys.executable, "-m", "minilora.lab.gpu_gaps"]
    record["watch"] = each({
        f"compute-sanitizer, {tool}": partial(watched, tool, command, left)
        for tool in (TOOLS if config.watch else ())
    })  # fmt: skip
    done("compute-sanitizer")
    run_race(COMPILED, dtypes=("float32",))
    checked = [row for part in CHECKED for row in record[part]]
    quiet = [row["to_host"] + row["to_device"] == 0 for row in record["timing"]]
    same = [row["same_bits"] is not False for row in record["timing"]]
    record["seconds"] = round(time.monotonic() - began, 1)
    record["passed"] = (
        right and not record["errors"] and all(quiet) and all(same)
        and survived(record["spike"]) and losses_agree(record["race"])
        and all(row["same_tokens"] for row in record["decoding"])
        and all(row.get("clean", True) for row in record["watch"])
        and all(within(row) and row["repeats"] is not False for row in checked)
    )  # fmt: skip
    return record


# What has a gap, and repeats, or does not, or need not (None).
CHECKED = ("ops", "codes", "steps", "optimizers", "curves")


def device_name(cupy: Any) -> str:
    """The card's name, as far as the runtime tells."""
    try:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"]
    except (AttributeError, KeyError):
        return "unknown"
    return name.decode() if isinstance(name, bytes) else str(name)
