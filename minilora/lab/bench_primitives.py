"""The transformer once more, on the primitives alone: what the fused ops are measured against.

The same tree, adapters included, and the same function; but every norm, activation, attention
and loss is spelled out in the small ops of `engine/tensor.py` and `engine/ops.py`, and every
intermediate value is kept for the way back.
"""

import math
from typing import Any

import numpy as np

from ..engine.fused import GELU_CUBE, GELU_SCALE
from ..engine.ops import concat, log_softmax, sigmoid, softmax, sqrt, tanh, where
from ..engine.tensor import Tensor, transpose
from ..lora.lora import LoRALinear
from ..model.layers import MLP, LayerNorm
from ..model.transformer import PackedAttention, Transformer


def loss(model: Transformer, batch: dict[str, Any], rng: Any = None) -> Tensor:
    """Σ cross-entropy over all targets (N, T); none may be ignored."""
    ids, targets = batch["ids"], batch["targets"]
    x = model.embedding.weight[ids]  # (N, T, C)
    if model.positions is not None:
        x = x + model.positions.weight[: ids.shape[1]]
    for block in model.blocks:
        x = x + attended(block.attention, norm(block.attention_norm, x))
        x = x + mlp(block.mlp, norm(block.mlp_norm, x))
    logp = log_softmax(linear(model.head, norm(model.norm, x)))  # (N, T, V)
    rows, columns = np.indices(targets.shape)
    return -logp[rows, columns, targets].sum()


def linear(node: Any, x: Tensor) -> Tensor:
    """x Wᵀ + b, and the adapter's detour where there is one."""
    if isinstance(node, LoRALinear):
        return linear(node.base, x) + (x @ node.A.T) @ node.B.T * node.scale
    y = x @ node.weight.T
    return y if node.bias is None else y + node.bias


def norm(node: Any, x: Tensor) -> Tensor:
    if isinstance(node, LayerNorm):
        x = x - x.mean(axis=-1, keepdims=True)
    n = x / sqrt((x * x).mean(axis=-1, keepdims=True) + node.eps)
    return n * node.weight + node.bias if isinstance(node, LayerNorm) else n * node.weight


def mlp(node: Any, x: Tensor) -> Tensor:
    if isinstance(node, MLP):
        h = linear(node.up, x)
        y = 0.5 * h * (1 + tanh(GELU_SCALE * (h + GELU_CUBE * h * h * h)))
    else:
        gate = linear(node.gate, x)
        y = gate * sigmoid(gate) * linear(node.up, x)
    return linear(node.down, y)


def attended(node: Any, x: Tensor) -> Tensor:
    """Attention with its whole T x T table."""
    N, T, _ = x.shape
    H, K = node.heads, node.key_heads
    if isinstance(node, PackedAttention):
        packed = linear(node.qkv, x)
        D = packed.shape[-1] // (H + 2 * K)
        q, k, v = packed[..., : H * D], packed[..., H * D : -K * D], packed[..., -K * D :]
    else:
        q, k, v = (linear(part, x) for part in (node.query, node.key, node.value))
    q, k, v = (
        transpose(part.reshape(N, T, K, heads // K, -1), axes=(0, 2, 3, 1, 4))  # (N, K, h/K, T, D)
        for part, heads in ((q, H), (k, K), (v, K))
    )
    if node.rope_theta is not None:
        q, k = rotated(q, node.rope_theta), rotated(k, node.rope_theta)
    s = (q @ transpose(k, axes=(0, 1, 2, 4, 3))) * (1 / math.sqrt(q.shape[-1]))  # (.., T, T)
    visible = np.tril(np.ones((T, T), bool))
    out = softmax(where(s, -math.inf, mask=visible)) @ v  # (N, K, H/K, T, D)
    return linear(node.output, transpose(out, axes=(0, 3, 1, 2, 4)).reshape(N, T, -1))


def rotated(x: Tensor, theta: float) -> Tensor:
    """RoPE over the last two axes (T, D)."""
    T, D = x.shape[-2:]
    angle = np.arange(T)[:, None] * theta ** (np.arange(D // 2) * (-2 / D))
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return concat(a * cos - b * sin, b * cos + a * sin)
