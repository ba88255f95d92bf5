"""Arguments for every op, drawn from a Generator: what a device is checked with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine import attention, fused, loss, ops, tensor
from ..engine.tensor import Op
from ..model.layers import Linear
from ..quant.blockwise import quantize_array
from ..quant.double import double_quantize
from ..quant.linear import QuantizedLinear

Rng = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """How to call an op: float64 host arrays, and options whose arrays are moved with them."""

    op: Op
    shapes: tuple[tuple[int, ...], ...]
    options: Callable[[Rng], dict[str, Any]] = field(default=lambda rng: {})
    positive: bool = False  # log, sqrt and powers want arguments away from zero

    def draw(self, rng: Rng) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The arrays, and the options."""
        arrays = [rng.standard_normal(shape) for shape in self.shapes]
        if self.positive:
            arrays = [np.abs(a) + 0.5 for a in arrays]
        return arrays, self.options(rng)


def tokens(shape: tuple[int, ...], vocab: int, ignored: bool = False) -> Callable[[Rng], Any]:
    def draw(rng: Rng) -> np.ndarray:
        ids = rng.integers(0, vocab, shape)
        if ignored:
            ids[rng.random(shape) < 0.3] = loss.IGNORE
        return ids

    return draw


def frozen_base(d_out: int, d_in: int) -> Callable[[Rng], dict[str, Any]]:
    """Options of the adapters' ops: a frozen Linear with a bias."""

    def draw(rng: Rng) -> dict[str, Any]:
        weight, bias = rng.standard_normal((d_out, d_in)), rng.standard_normal(d_out)
        return {"base": Linear(tensor.Tensor(weight), tensor.Tensor(bias))}

    return draw


def coded_base(d_out: int, d_in: int) -> Callable[[Rng], dict[str, Any]]:
    """The same in NF4 with double quantization."""

    def draw(rng: Rng) -> dict[str, Any]:
        weight = quantize_array(rng.standard_normal((d_out, d_in)).astype(np.float32))
        return {
            "base": QuantizedLinear(
                double_quantize(weight), tensor.Tensor(rng.standard_normal(d_out))
            )
        }

    return draw


def fixed(**options: Any) -> Callable[[Rng], dict[str, Any]]:
    return lambda rng: options


def drawn(**draws: Any) -> Callable[[Rng], dict[str, Any]]:
    """Options of which the callable ones are drawn."""
    return lambda rng: {name: d(rng) if callable(d) else d for name, d in draws.items()}


X = (3, 37, 48)  # odd lengths, so that a block or a tile is left unfinished
SAMPLES = (
    Sample(tensor.add, (X, (48,))),
    Sample(tensor.sub, (X, (37, 1))),
    Sample(tensor.mul, (X, (48,))),
    Sample(tensor.div, (X, (48,)), positive=True),
    Sample(tensor.neg, (X,)),
    Sample(tensor.pow, (X, (48,)), positive=True),
    Sample(tensor.matmul, (X, (3, 48, 20))),
    Sample(tensor.sum, (X,), fixed(axis=(0, 2))),
    Sample(tensor.mean, (X,), fixed(axis=1, keepdims=True)),
    Sample(tensor.reshape, (X,), fixed(shape=(111, 48))),
    Sample(tensor.transpose, (X,), fixed(axes=(1, 2, 0))),
    Sample(tensor.getitem, (X,), fixed(index=(slice(None), slice(3, 30, 2)))),
    Sample(ops.exp, (X,)),
    Sample(ops.log, (X,), positive=True),
    Sample(ops.sqrt, (X,), positive=True),
    Sample(ops.tanh, (X,)),
    Sample(ops.sigmoid, (X,)),
    Sample(ops.max, (X,), fixed(axis=-1)),
    Sample(ops.where, (X, X), drawn(mask=lambda rng: rng.random(X) < 0.5)),
    Sample(ops.concat, (X, (3, 5, 48)), fixed(axis=1)),
    Sample(ops.stack, (X, X), fixed(axis=1)),
    Sample(ops.softmax, (X,)),
    Sample(ops.log_softmax, (X,)),
    Sample(ops.logsumexp, (X,)),
    Sample(fused.linear, (X, (40, 48), (40,))),
    Sample(fused.frozen_linear, (X,), frozen_base(40, 48)),
    Sample(fused.frozen_linear, ((2, 3, 64),), coded_base(37, 64)),
    Sample(
        fused.lora_linear,
        (X, (4, 48), (40, 4)),
        lambda rng: frozen_base(40, 48)(rng) | {"scale": 2.0},
    ),
    Sample(
        fused.lora_linear,
        ((2, 3, 64), (4, 64), (37, 4)),
        lambda rng: coded_base(37, 64)(rng) | {"scale": 2.0},
    ),
    Sample(fused.gelu, (X,)),
    Sample(fused.swiglu, (X, X)),
    Sample(fused.layer_norm, (X, (48,), (48,)), fixed(eps=1e-5)),
    Sample(fused.rms_norm, (X, (48,)), fixed(eps=1e-5)),
    Sample(fused.embedding, ((29, 48),), drawn(ids=tokens((3, 37), 29))),
    Sample(fused.dropout, (X,), lambda rng: {"rate": 0.3, "rng": np.random.default_rng(5)}),
    Sample(attention.split_heads, ((3, 37, 64),), fixed(heads=(4, 2, 2), width=8)),
    Sample(attention.rope, ((3, 37, 4, 8),), fixed(theta=10000.0)),
    Sample(
        attention.rope,
        ((3, 37, 4, 8),),
        fixed(theta=10000.0, scaling=attention.RopeScaling(8.0, 1.0, 4.0, 64)),
    ),
    Sample(attention.attention, ((3, 150, 4, 16), (3, 150, 2, 16), (3, 150, 2, 16))),
    Sample(attention.attention, ((2, 2, 4, 64), (2, 2, 2, 64), (2, 2, 2, 64))),  # few keys
    Sample(loss.cross_entropy, ((3, 37, 29),), drawn(targets=tokens((3, 37), 29, True))),
    Sample(
        loss.head_cross_entropy,
        (X, (29, 48)),
        drawn(targets=tokens((3, 37), 29, True), chunk=50),
    ),
)  # fmt: skip
