"""The ledger of a training step, predicted from a config; and the same counted in a real one."""

import gc
import tracemalloc
from typing import Any

import numpy as np

from ..engine.backend import is_array
from ..engine.check import retained
from ..fast.cpu import arena
from ..lora.lora import adapt
from ..model.module import freeze, tensors, walk
from ..model.transformer import init_transformer
from ..optim.adam8bit import AdamW8bit
from ..optim.adamw import SGD, AdamW
from ..quant.blockwise import QuantizedArray
from ..quant.double import DoubleScales
from ..quant.linear import quantize
from .activations import saved_activations, transient_peak
from .memory import OFFSET, RULES, Setting, persistent, scratch


def ledger(setting: Setting) -> dict[str, Any]:
    """The whole prediction: what stays, what is saved by op, scratch, and the peak of a step.

    peak = persistent + max over the way back of (saved and not yet freed + cotangents) + scratch
    """
    parts = {
        "persistent": persistent(setting),
        "saved": saved_activations(setting),
        "scratch": scratch(setting),
    }
    held = sum(parts["persistent"].values()) + sum(parts["scratch"].values())
    return parts | {
        "total": held + sum(parts["saved"].values()),
        "peak": held + transient_peak(setting),
        "rules": RULES,
    }


def held_bytes(tree: Any) -> int:
    """What the arrays and codes of a tree take, each once."""
    weights = [t.data for t in tensors(tree).values()]
    codes = {id(n): n for _, n in walk(tree) if isinstance(n, QuantizedArray) and len(n.shape) == 2}
    return sum(held.nbytes for held in (*weights, *codes.values()))


def start(setting: Setting, seed: int = 0) -> Any:
    """A model of this setting, and its optimizer."""
    rng = np.random.default_rng(seed)
    model = init_transformer(setting.config, rng)
    if setting.method != "full":
        model = freeze(model)
        if setting.method == "qlora":
            model = quantize(model, setting.targets, code=setting.code, block=setting.block,
                             double=setting.double)  # fmt: skip
        model = adapt(model, setting.targets, rank=setting.rank, rng=rng)
    kinds = {"adamw": AdamW, "adamw8bit": AdamW8bit, "sgd": SGD}
    return kinds[setting.optimizer](model)


def counted(setting: Setting) -> dict[str, Any]:
    """The same in a real float32 step under the fast rules, on one thread.

    Persistent arrays by their size; saved activations by the graph's root buffers; the peak by
    tracemalloc, which sees what NumPy allocates, from before the model was made.
    """
    arena.buffers.clear()
    gc.collect()
    tracemalloc.start()
    try:
        optimizer = start(setting)
        rng = np.random.default_rng(1)
        shape = (setting.batch, setting.length)
        ids = rng.integers(0, setting.config.vocab, shape)

        def loss() -> Any:
            return optimizer.model.loss(ids, ids, recompute_blocks=setting.recompute)

        def step() -> None:
            loss().backward(into=optimizer.gradients)
            optimizer.step(divide_by=ids.size)

        step()  # scratch grows to its size
        gc.collect()
        tracemalloc.reset_peak()
        step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    weights = [t.data for t in tensors(optimizer.model).values()]
    held = {id(a): a for _, a in walk(optimizer.model) if is_array(a)}.values()
    offsets = sum(isinstance(node, DoubleScales) for _, node in walk(optimizer.model))
    return {
        "weights": sum(a.nbytes for a in weights),
        "codes": sum(a.nbytes for a in held) + OFFSET * offsets,
        "gradients": optimizer.flat.grad.nbytes,
        "optimizer": moments_of(optimizer),
        "control": optimizer.control.nbytes,
        "saved": retained(loss(), besides=weights),
        "scratch": sum(b.nbytes for b in arena.buffers.values()),
        "peak": peak,
        "rules": RULES,
    }


def moments_of(optimizer: Any) -> int:
    """Bytes of an optimizer's moments."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.state_bytes
    names = ("m", "v") if isinstance(optimizer, AdamW) else ("momentum",)
    return sum(getattr(optimizer, name).nbytes for name in names)
