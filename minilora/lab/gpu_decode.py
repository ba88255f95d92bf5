"""Tokens a second on a card: launched one by one and from a recording, dense and in four bits."""

import time
from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from ..fast.capture import WARM, replayed
from ..model.generate import each_token
from ..model.module import tensors, walk
from ..model.transformer import Transformer, TransformerConfig, assemble
from ..quant.bf16 import to_bf16
from ..quant.linear import QuantizedLinear, quantize
from .bench_shapes import Shape

READY = 2 + WARM  # tokens: the prompt's, the eager ones, the one that is recorded


def decode_speeds(cupy: Any, shape: Shape, new_tokens: int) -> list[dict[str, Any]]:
    """Greedy tokens for `shape.batch` prompts that fill what `new_tokens` leave of `shape.time`.

    Each row: tokens a second of one sequence, counted when a recording has been made; the bytes
    of the weights that a token needs, and how fast that reads them; whether eager and recorded
    tokens are the same; why nothing was recorded, where that is so.
    """
    model = drawn_model(cupy, shape.model)
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, shape.vocab, (shape.batch, shape.time - READY - new_tokens)).tolist()
    rows, made = [], []

    def recorded(xp: Any, step: Any) -> Any:
        made.append(replayed(xp, step))
        return made[-1]

    coded = quantize(model)
    for name, tree in (
        ("float32", model), ("NF4", coded),
        ("bf16", to_bf16(model)), ("NF4 under bf16", to_bf16(coded)),
    ):  # fmt: skip
        found = {
            way: timed(cupy, tree, prompts, new_tokens, replay)
            for way, replay in (("eager", None), ("captured", recorded))
        }
        size = weight_bytes(tree)
        same = found["eager"][0] == found["captured"][0]
        why = getattr(made[-1], "eager", f"{cupy.__name__} captures nothing")
        for way, (_, rate) in found.items():
            rows.append({
                "decoding": f"{name}, {way}", "tokens_s": rate, "bytes": size,
                "gb_s": rate * size / 1e9, "same_tokens": same,
                "why_eager": why if way == "captured" else None,
            })  # fmt: skip
    return rows


def timed(
    cupy: Any, model: Any, prompts: list[list[int]], new_tokens: int, replay: Any
) -> tuple[list, float]:
    """The tokens, and how many a second came after those that were made to get ready."""
    wait = cupy.cuda.Device().synchronize
    tokens = each_token(model, prompts, READY + new_tokens, replay=replay)
    made = [next(tokens) for _ in range(READY)]
    wait()
    began = time.perf_counter()
    made += tokens
    wait()
    rate = new_tokens / (time.perf_counter() - began)
    return cupy.stack(made).get().tolist(), rate


def weight_bytes(model: Any) -> int:
    """Bytes of all that a token needs: every weight but the table that ids pick a row of, unless
    the head reads it too."""
    size = sum(t.data.nbytes for path, t in tensors(model).items() if path != "embedding.weight")
    if model.config.tied:
        size += model.embedding.weight.data.nbytes
    return size + sum(n.weight.nbytes for _, n in walk(model) if isinstance(n, QuantizedLinear))


def drawn_model(cupy: Any, config: TransformerConfig) -> Transformer:
    """A frozen model made on the card, N(0, 1/C), from a million drawn numbers, again and again."""
    drawn = cupy.asarray(np.random.default_rng(0).standard_normal(1_000_003, np.float32))
    drawn /= np.float32(np.sqrt(config.width))
    used = 0

    def make(path: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return Tensor(cupy.full(shape, float(path.endswith("norm.weight")), cupy.float32))
        nonlocal used
        flat, filled = cupy.empty(int(np.prod(shape)), cupy.float32), 0
        while filled < flat.size:
            part = drawn[used : used + flat.size - filled]
            flat[filled : filled + part.size] = part
            filled, used = filled + part.size, (used + part.size) % drawn.size
        return Tensor(flat.reshape(shape))

    return assemble(config, make)
