"""Is this card right, and how fast?  Every op, code, step and optimizer against NumPy."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ..engine.backend import is_array, to_device, to_numpy
from ..engine.bf16 import BFLOAT16
from ..engine.check import gradients
from ..engine.progress import progress
from ..engine.rounding import cast_array
from ..engine.rules import reference_rules
from ..engine.tensor import Parameter, Tensor
from ..lora.lora import adapt
from ..model.module import cast
from ..model.module import to_device as tree_to_device
from ..model.transformer import TransformerConfig, init_transformer
from ..optim.adam8bit import AdamW8bit
from ..optim.adamw import AdamW
from ..optim.paged import PagedAdamW
from ..quant.bf16 import to_bf16
from ..quant.blockwise import quantize_array
from ..quant.codes import CODES, code
from ..quant.linear import quantize
from . import gpu_speed as speed
from .bench_shapes import Shape
from .gpu_decode import decode_speeds
from .gpu_race import losses_agree, racers
from .gpu_report import LIMITS, TOLERANCE, survived, within
from .gpu_spike import memory_spike
from .gpu_watch import TOOLS, watched
from .op_samples import SAMPLES, Sample

GPT2_SMALL = Shape(batch=8, time=512, vocab=50257, width=768, layers=12, heads=12)
BILLION = Shape(
    batch=1, time=512, vocab=32000, width=2048, layers=16, heads=16, key_heads=8, hidden=5632
)


@dataclass(frozen=True)
class GpuCheckConfig:
    """What is checked, and for how long steps are timed."""

    seed: int = 0
    width: int = 256  # of the model whose step is timed: S1 of the benchmarks
    layers: int = 4
    length: int = 128
    batch: int = 16
    rounds: int = 20
    size: int = 256 << 20  # bytes of an array whose kernel is timed
    product: int = 8192  # rows and columns of a product that is timed
    race: Shape | None = GPT2_SMALL  # of the step that torch makes too; None: not asked for
    rank: int = 16  # of that step's adapters
    decode: Shape | None = BILLION  # of the model that writes tokens; None: not asked for
    new_tokens: int = 128
    spike: int = 4 << 20  # numbers that train, where an optimizer meets a spike
    watch: bool = True  # with compute-sanitizer, where it is
    seconds: float = 500  # what no longer fits is left out, and named


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

    What is right comes first, what is fast after it.  A part that raises is recorded with its
    error; one that `seconds` leave no time for is named in `left_out`.
    """
    reason = why_not()
    record: dict[str, Any] = {"kind": "gpu-check", "config": asdict(config)}
    if reason is not None:
        return record | {"skipped": reason}
    import cupy

    began = time.monotonic()
    rng = np.random.default_rng(config.seed)
    record |= {"device": device_name(cupy), "cupy": cupy.__version__, "left_out": [], "errors": {}}

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

    record["ops"] = each({
        f"op {i}, {sample.op.__name__}, {rules}": partial(op_gap, sample, rng, rules)
        for i, sample in enumerate(SAMPLES)
        for rules in ("specification", "fast", "bf16")
        if rules != "fast" or "cupy" in sample.op.fast
    })  # fmt: skip
    record["codes"] = each({f"code {name}": partial(code_gap, name, rng) for name in CODES})
    styles = ("gpt2", "llama", "qlora", "bf16")
    record["steps"] = each({f"steps, {s}": partial(step_gap, s, config.seed) for s in styles})
    record["optimizers"] = each({
        "paged AdamW, 1 page": partial(page_gap, 1),
        "paged AdamW, 3 pages": partial(page_gap, 3),
        "8-bit AdamW": eight_bit_gap,
    })  # fmt: skip
    record["spike"] = attempt("spike", partial(memory_spike, cupy, config.spike), {})
    record["decoding"] = []
    if config.decode is not None:
        tokens = partial(decode_speeds, cupy, config.decode, config.new_tokens)
        record["decoding"] = attempt("decoding", tokens, [])
    right = not record["left_out"]
    shape = (config.batch, config.length)

    def timed(style: str) -> dict[str, Any]:
        model = model_for(style, config.width, config.layers, config.length)
        name = f"{style}, LoRA r=8, d{config.width}, {shape[0]} x {shape[1]} tokens"
        return {"step": name} | speed.step_times(
            cupy, lambda: tree_to_device(model, "cuda"), shape, config.rounds
        )

    record["timing"] = each({f"step time, {s}": partial(timed, s) for s in styles})
    record["launches"] = attempt(
        "launches", lambda: speed.launch_costs(cupy, 50 * config.rounds), {}
    )
    for name, part in (
        ("kernels", partial(speed.kernel_speeds, cupy, config.size, late)),
        ("products", partial(speed.product_speeds, cupy, config.product, late)),
    ):
        record[name] = attempt(name, part, [])
    record["race"] = []
    if config.race is not None:
        for name, call in racers(cupy, config.race, config.rank, config.rounds, left):
            row = attempt(name, call)
            record["race"] += [] if row is None else [{"step": name} | row]
    command = [sys.executable, "-m", "minilora.lab.gpu_check"]
    record["watch"] = each({
        f"compute-sanitizer, {tool}": partial(watched, tool, command, left)
        for tool in (TOOLS if config.watch else ())
    })  # fmt: skip
    checked = (*record["ops"], *record["codes"], *record["steps"], *record["optimizers"])
    quiet = [row["to_host"] + row["to_device"] == 0 for row in record["timing"]]
    same = [row["same_bits"] is not False for row in record["timing"]]
    record["seconds"] = round(time.monotonic() - began, 1)
    record["passed"] = (
        right and not record["errors"] and all(quiet) and all(same)
        and survived(record["spike"]) and losses_agree(record["race"])
        and all(row["same_tokens"] for row in record["decoding"])
        and all(row.get("clean", True) for row in record["watch"])
        and all(within(row) and row["repeats"] for row in checked)
    )  # fmt: skip
    return record


def device_name(cupy: Any) -> str:
    """The card's name, as far as the runtime tells."""
    try:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"]
    except (AttributeError, KeyError):
        return "unknown"
    return name.decode() if isinstance(name, bytes) else str(name)


def poison() -> None:
    """Leave NaN in memory that the next results will be written to."""
    import cupy

    for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20):
        cupy.full(size, np.nan, np.float32)


def op_gap(sample: Sample, rng: np.random.Generator, rules: str) -> dict[str, Any]:
    """One op on the device against float64 on the host, forward and back.

    `rules` is "specification" or "fast", both in float32, or "bf16": arrays, cotangents and
    frozen bases rounded to bfloat16, for both sides.
    """
    arrays, options = sample.draw(rng)
    dtype = BFLOAT16 if rules == "bf16" else np.float32
    if rules == "bf16":
        arrays = [cast_array(cast_array(a, dtype), np.float64) for a in arrays]
        options = {k: move_option(v, "cpu", dtype) for k, v in options.items()}

    def call(arrays: list, device: str) -> tuple[list, list, Any]:
        if "rng" in options:  # the same key for both
            options["rng"] = np.random.default_rng(5)
        moved = {k: move_option(v, device, arrays[0].dtype) for k, v in options.items()}
        given = [to_device(a, device) for a in arrays]
        value = sample.op(*[Tensor(a) for a in given], **moved)
        values = value if isinstance(value, tuple) else (value,)
        draw = np.random.default_rng(9)
        w = tuple(to_device(cotangent(draw, v, arrays[0].dtype, rules), device) for v in values)
        if "rng" in moved:
            moved["rng"] = np.random.default_rng(5)
        back, _ = gradients(lambda *a: sample.op(*a, **moved), given, w)
        return [to_numpy(v.data) for v in values], [to_numpy(g) for g in back]

    with reference_rules():
        wanted = call(arrays, "cpu")
    narrow = [cast_array(a, dtype) for a in arrays]

    def on_device() -> tuple[list, list]:
        poison()
        if rules != "specification":
            return call(narrow, "cuda")
        with reference_rules():
            return call(narrow, "cuda")

    found, again = on_device(), on_device()
    names = ["forward"] * len(wanted[0]) + ["backward"] * len(wanted[1])
    gaps = {"forward": 0.0, "backward": 0.0}
    for name, a, b in zip(names, [*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        gaps[name] = max(gaps[name], relative(a, b))
    same = all(
        np.array_equal(a, b)
        for a, b in zip([*found[0], *found[1]], [*again[0], *again[1]], strict=True)
    )
    entry = {"op": sample.op.__name__, "rules": rules, "repeats": same}
    entry |= {"limit": LIMITS.get(rules, TOLERANCE)}
    return entry | gaps | {"gap": max(gaps.values())}


def cotangent(rng: np.random.Generator, value: Tensor, dtype: Any, rules: str) -> Any:
    """Drawn numbers of a value's shape, in a type of the array library."""
    w = rng.standard_normal(value.shape)
    w = cast_array(cast_array(w, BFLOAT16), np.float32) if rules == "bf16" else w
    return w.astype(np.float32 if dtype == BFLOAT16 else dtype)


def move_option(value: Any, device: str, dtype: Any) -> Any:
    """An option's arrays on the device, a frozen base in the dtype of the arrays."""
    if is_array(value):
        return to_device(value, device)
    if hasattr(value, "dense"):
        return tree_to_device(cast(value, dtype), device)
    return value


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """‖found - wanted‖ / ‖wanted‖; infinite where a NaN came through."""
    gap = float(np.linalg.norm((found - wanted).ravel()))
    return gap / max(float(np.linalg.norm(wanted.ravel())), 1e-30) if np.isfinite(gap) else np.inf


def model_for(style: str, width: int, layers: int, length: int) -> Any:
    """A LoRA model in GPT-2's or Llama's style, or in Llama's a QLoRA one or one in bfloat16;
    B away from zero."""
    shape = {"vocab": 512, "width": width, "layers": layers, "heads": 4, "context": length}
    if style == "gpt2":
        config = TransformerConfig.gpt2(**shape)
    else:
        config = TransformerConfig(key_heads=2, **shape)
    rng = np.random.default_rng(3)
    base = init_transformer(config, rng)
    adapted = adapt(quantize(base) if style == "qlora" else base, rank=8, rng=rng)
    optimizer = AdamW(adapted)
    optimizer.flat.data += rng.normal(0, 0.01, optimizer.flat.data.shape).astype(np.float32)
    return to_bf16(optimizer.model) if style == "bf16" else optimizer.model


def code_gap(name: str, rng: np.random.Generator) -> dict[str, Any]:
    """Codes and scales made on the device and on the host: the same bytes, or an infinite gap."""
    w = rng.standard_normal((37, 129)).astype(np.float32)
    if code(name).scaled_by == "maximum":
        w = np.abs(w)
    with reference_rules():
        host = quantize_array(w, name)
    found, again = (quantize_array(to_device(w, "cuda"), name) for _ in range(2))
    parts = [
        (to_numpy(getattr(a, part)), to_numpy(getattr(b, part)))
        for part in ("packed", "scales")
        for a, b in ((found, host), (found, again))
    ]
    same = all(np.array_equal(a, b) for a, b in parts)
    gap = relative(to_numpy(found.dense()), host.dense()) if same else np.inf
    return {"code": name, "gap": gap, "repeats": same}


def step_gap(style: str, seed: int) -> dict[str, Any]:
    """A LoRA step on the device: its loss, its gradients and the weights after three steps."""
    model = model_for(style, 64, 2, 32)
    ids = np.random.default_rng(seed).integers(0, 512, (4, 32))

    def run(model: Any, device: str) -> tuple[list, np.ndarray]:
        optimizer = AdamW(tree_to_device(model, device), lr=1e-3)
        batch, losses = to_device(ids, device), []
        for _ in range(3):
            loss = optimizer.model.loss(batch, batch)
            loss.backward(into=optimizer.gradients)
            optimizer.step(divide_by=ids.size, clip=1.0)
            losses.append(float(loss.data))
        return losses, to_numpy(optimizer.flat.data)

    losses, weights = run(cast(model, np.float64), "cpu")
    poison()
    found, again = run(model, "cuda"), run(model, "cuda")
    gap = max(relative(np.array(found[0]), np.array(losses)), relative(found[1], weights))
    repeats = found[0] == again[0] and np.array_equal(found[1], again[1])
    name = {"qlora": "QLoRA, llama", "bf16": "LoRA, llama, bf16"}.get(style, f"LoRA, {style}")
    limit = LIMITS.get(style, TOLERANCE)
    return {"step": name, "gap": gap, "limit": limit, "repeats": repeats}


PAGE = 1 << 12  # numbers; of the paged optimizer that is checked


def drive(make: Any, device: str, spike: bool = False) -> tuple[Any, np.ndarray]:
    """An optimizer after six steps on drawn gradients, and the weights; it may shrink and grow."""
    rng = np.random.default_rng(4)
    shapes = ((100, 130), (3000,), (70, 70))
    tree = tuple(Parameter(rng.standard_normal(s).astype(np.float32)) for s in shapes)
    optimizer = make(tree_to_device(tree, device))
    for step in range(6):
        g = rng.standard_normal(optimizer.flat.data.size).astype(np.float32)
        optimizer.flat.grad[...] = to_device(g, device)
        if spike and step in (2, 4):
            optimizer.pager.shrink(1) if step == 2 else optimizer.pager.grow(3)
        optimizer.step(divide_by=2, clip=1.0)
    return optimizer, to_numpy(optimizer.flat.data)


def page_gap(slots: int) -> dict[str, Any]:
    """Paged AdamW against AdamW, both on the device: the same bits, or an infinite gap.

    "Repeats" says that the log of moves is that of the simulated device.
    """

    def paged(tree: Any) -> PagedAdamW:
        return PagedAdamW(tree, lr=0.1, page=PAGE, budget=slots * 8 * PAGE)

    plain, wanted = drive(lambda tree: AdamW(tree, lr=0.1), "cuda")
    poison()
    found, weights = drive(paged, "cuda", spike=True)
    here, _ = drive(paged, "cpu", spike=True)
    states = plain.state(), found.state()
    same = np.array_equal(wanted, weights) and all(
        np.array_equal(states[0][key], states[1][key]) for key in states[0]
    )
    log = found.pager.log[: len(here.pager.log)]  # reading the state has moved pages since
    name = f"AdamW paged, {slots} of {found.pager.pages} pages"
    return {"step": name, "gap": 0.0 if same else np.inf, "repeats": log == here.pager.log}


def eight_bit_gap() -> dict[str, Any]:
    """Six steps of AdamW with 8-bit moments on the device against the specification here."""
    with reference_rules():
        _, wanted = drive(lambda tree: AdamW8bit(tree, lr=1e-3), "cpu")
    poison()
    (_, found), (_, again) = (drive(lambda t: AdamW8bit(t, lr=1e-3), "cuda") for _ in range(2))
    return {
        "step": "AdamW, 8 bits",
        "gap": relative(found, wanted),
        "repeats": np.array_equal(found, again),
    }


def small() -> None:
    """Every fast rule once, on small arrays of their own: what compute-sanitizer watches.

    Without CuPy's pool each array is an allocation, so that a read beyond it is seen.
    """
    import cupy

    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)
    gaps = [op_gap(s, rng, "fast")["gap"] for s in SAMPLES if "cupy" in s.op.fast]
    gaps += [code_gap("nf4", rng)["gap"], page_gap(3)["gap"], eight_bit_gap()["gap"]]
    print(f"{len(gaps)} checks, the worst gap {max(gaps):.1e}")
    sys.exit(max(gaps) > TOLERANCE)


if __name__ == "__main__":
    small()
