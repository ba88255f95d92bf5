"""How far is a card from float64, and does it repeat?  Every op, code, step and optimizer."""

import sys
from typing import Any

import numpy as np

from ..engine.backend import cupy, is_array, to_device, to_numpy
from ..engine.bf16 import BFLOAT16
from ..engine.check import gradients
from ..engine.fused import embedding
from ..engine.rounding import cast_array
from ..engine.rules import reference_rules
from ..engine.tensor import Parameter, Tensor
from ..fast.cuda_embedding import kernels
from ..lora.lora import adapt
from ..model.module import cast
from ..model.module import to_device as tree_to_device
from ..model.transformer import TransformerConfig, init_transformer
from ..optim.adam8bit import AdamW8bit
from ..optim.adamw import AdamW
from ..optim.paged import PagedAdamW
from ..quant.bf16 import to_bf16
from ..quant.blockwise import quantize_array
from ..quant.codes import code
from ..quant.linear import quantize
from .gpu_report import LIMITS, TOLERANCE
from .op_samples import SAMPLES, Sample

STYLES = {
    "gpt2": "LoRA, gpt2",
    "llama": "LoRA, llama",
    "qlora": "QLoRA, llama",
    "bf16": "LoRA, llama, bf16",
    "qlora bf16": "QLoRA, llama, bf16",
}  # of a small model: what a step of it is called


def limit_of(style: str) -> float:
    """The largest gap that the precision of a style allows."""
    return LIMITS["bf16"] if "bf16" in style else TOLERANCE


def poison() -> None:
    """Leave NaN in memory that the next results will be written to."""
    import cupy

    for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20):
        cupy.full(size, np.nan, np.float32)


def by_atomics(sample: Sample, rules: str) -> bool:
    """Is a sum left to `xp.add.at`?  On a card that adds in whatever order its threads come."""
    return sample.op is embedding and (rules == "specification" or kernels.on(cupy()) is None)


def op_gap(sample: Sample, rng: np.random.Generator, rules: str) -> dict[str, Any]:
    """One op on the device against float64 on the host, forward and back.

    `rules` is "specification" or "fast", both in float32, or "bf16": arrays, cotangents and
    frozen bases rounded to bfloat16, for both sides.  "Repeats" is None where that is not
    asked: see `by_atomics`.
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
    same = None if by_atomics(sample, rules) else same
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
    """A LoRA model of one of the STYLES, with B away from zero."""
    shape = {"vocab": 512, "width": width, "layers": layers, "heads": 4, "context": length}
    if style == "gpt2":
        config = TransformerConfig.gpt2(**shape)
    else:
        config = TransformerConfig(key_heads=2, **shape)
    rng = np.random.default_rng(3)
    base = init_transformer(config, rng)
    adapted = adapt(quantize(base) if "qlora" in style else base, rank=8, rng=rng)
    optimizer = AdamW(adapted)
    optimizer.flat.data += rng.normal(0, 0.01, optimizer.flat.data.shape).astype(np.float32)
    return to_bf16(optimizer.model) if "bf16" in style else optimizer.model


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
    """A LoRA step on the device: its loss before each of three steps, and the weights after them.

    `eps` is a hundred times AdamW's own.  With that, an entry whose gradient is next to zero goes
    wherever rounding sends it: in float32 on the host, with the rows of the batch in other
    orders, one such entry brought half of all gaps above 1e-5; with this they are 2e-7.
    """
    model = model_for(style, 64, 2, 32)
    ids = np.random.default_rng(seed).integers(0, 512, (4, 32))

    def run(model: Any, device: str) -> tuple[list, np.ndarray]:
        optimizer = AdamW(tree_to_device(model, device), lr=1e-3, eps=1e-6)
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
    return {"step": STYLES[style], "gap": gap, "limit": limit_of(style), "repeats": repeats}


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
