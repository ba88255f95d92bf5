"""The parts of a transformer: each a frozen record of its weights and one call."""

from typing import Any, Protocol

import numpy as np

from ..engine.fused import embedding, gelu, layer_norm, linear, rms_norm, swiglu
from ..engine.rounding import stored_as
from ..engine.tensor import Parameter, Tensor
from .module import module

Rng = np.random.Generator


class LinearLike(Protocol):
    """What may stand where a Linear stands, and under an adapter."""

    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        ...

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor: ...

    def dense(self, out: Any = None) -> Any:
        """The weight W0 (d_out, d_in) as an array; written into `out` where that is given."""


def is_linear(node: Any) -> bool:
    """Is this something an adapter can sit on?"""
    return hasattr(node, "dense") and hasattr(node, "bias")


@module
class Linear:
    """y = x Wᵀ + b"""

    weight: Tensor  # (d_out, d_in)
    bias: Tensor | None = None  # (d_out,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        return linear(x, self.weight, self.bias)

    def dense(self, out: Any = None) -> Any:
        if out is None:
            return self.weight.data
        out[...] = stored_as(out, self.weight.data)
        return out


@module
class Embedding:
    """Row i of the table for id i."""

    weight: Tensor  # (V, C)

    def __call__(self, ids: Any, rng: Rng | None = None) -> Tensor:
        return embedding(self.weight, ids=ids)


@module
class LayerNorm:
    """w (x - mean) / √(var + eps) + b"""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float = 1e-5

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


@module
class RMSNorm:
    """w x / √(mean x² + eps)"""

    weight: Tensor  # (C,)
    eps: float = 1e-5

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


@module
class MLP:
    """down(gelu(up(x)))"""

    up: LinearLike
    down: LinearLike

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        return self.down(gelu(self.up(x, rng)), rng)


@module
class GatedMLP:
    """down(silu(gate(x)) up(x))"""

    gate: LinearLike
    up: LinearLike
    down: LinearLike

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        return self.down(swiglu(self.gate(x, rng), self.up(x, rng)), rng)


@module
class Net:
    """Linears with a GELU between each two: the plainest network that is not linear."""

    layers: tuple[LinearLike, ...]

    def __call__(self, x: Any, rng: Rng | None = None) -> Tensor:
        for layer in self.layers[:-1]:
            x = gelu(layer(x, rng))
        return self.layers[-1](x, rng)


def init_linear(d_in: int, d_out: int, rng: Rng, *, std: float, bias: bool) -> Linear:
    """A trainable Linear: weights N(0, std²), bias zero."""
    weight = rng.standard_normal((d_out, d_in), dtype=np.float32) * np.float32(std)
    return Linear(Parameter(weight), Parameter(np.zeros(d_out, np.float32)) if bias else None)
