"""The block formats of GGUF: a few weights with a scale of their own, made float32 again.

Each function takes blocks (n, bytes of a block) and returns (n, weights of a block), with the
products and sums in float32 and in ggml's order, so that the values are its own to the bit.

    Q4_0   18 bytes for 32:   d f16, codes           w = d (q - 8)
    Q4_1   20 bytes for 32:   d f16, m f16, codes    w = d q + m
    Q8_0   34 bytes for 32:   d f16, codes           w = d q
    Q4_K  144 bytes for 256:  d, dmin f16, 8 six-bit scales and minima, codes
                                                     w = (d s) q - dmin m
    Q6_K  210 bytes for 256:  codes (4 low bits, then 2 high), 16 scales int8, d f16
                                                     w = (d s) (q - 32)

In Q4_0 and Q4_1 the low halves of the bytes come first: weights 0..15, then 16..31.
Source: ggml's quantization structures (ggml-common.h of github.com/ggml-org/llama.cpp).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..engine.bf16 import float32_of


def halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 (n, 1)."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """(n, ..., b) bytes -> (n, ..., 2, b): the low halves, then the high ones."""
    return np.stack([packed & 15, packed >> 4], axis=-2)


def q4_0(blocks: np.ndarray) -> np.ndarray:
    q = nibbles(blocks[:, 2:]).reshape(-1, 32).astype(np.float32) - 8
    return halves(blocks, 0) * q


def q4_1(blocks: np.ndarray) -> np.ndarray:
    q = nibbles(blocks[:, 4:]).reshape(-1, 32).astype(np.float32)
    return halves(blocks, 0) * q + halves(blocks, 2)


def q8_0(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def q4_k(blocks: np.ndarray) -> np.ndarray:
    # Twelve bytes hold 8 scales and 8 minima of six bits: of the first four each, all six bits
    # are in one byte; of the last four, the low four here and the high two in the former's rest.
    a, b, c = np.moveaxis(blocks[:, 4:16].reshape(-1, 3, 4), 1, 0)
    scale = np.concatenate([a & 63, (c & 15) | ((a >> 2) & 48)], axis=1).astype(np.float32)
    least = np.concatenate([b & 63, (c >> 4) | ((b >> 2) & 48)], axis=1).astype(np.float32)
    q = nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32)
    d, m = halves(blocks, 0) * scale, halves(blocks, 2) * least
    return (d[:, :, None] * q - m[:, :, None]).reshape(-1, 256)


def q6_k(blocks: np.ndarray) -> np.ndarray:
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    q = (low | ((high & 3) << 4).reshape(-1, 8, 32)).astype(np.int8) - np.int8(32)
    d = halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (d[:, :, None] * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def float16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float16).astype(np.float32)


def bfloat16(blocks: np.ndarray) -> np.ndarray:
    return float32_of(blocks.view(np.uint16))


class BlockType(NamedTuple):
    """How a tensor's type stores its weights, along the last axis."""

    name: str
    weights: int  # in a block
    bytes: int  # of a block
    decode: Callable[[np.ndarray], np.ndarray]


TYPES = {
    0: BlockType("F32", 1, 4, lambda blocks: blocks.view(np.float32)),
    1: BlockType("F16", 1, 2, float16),
    2: BlockType("Q4_0", 32, 18, q4_0),
    3: BlockType("Q4_1", 32, 20, q4_1),
    8: BlockType("Q8_0", 32, 34, q8_0),
    12: BlockType("Q4_K", 256, 144, q4_k),
    14: BlockType("Q6_K", 256, 210, q6_k),
    30: BlockType("BF16", 1, 2, bfloat16),
}

# What else a file may hold, so that it can be refused by name.
OTHERS = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def decode(data: np.ndarray, kind: BlockType, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a tensor as float32 (shape), some thousand blocks at a time."""
    if kind.name == "F32":
        return (data if data.ctypes.data % 4 == 0 else data.copy()).view(np.float32).reshape(shape)
    out = np.empty(len(data) // kind.bytes * kind.weights, np.float32)
    blocks, values = data.reshape(-1, kind.bytes), out.reshape(-1, kind.weights)
    step = max(1, (1 << 18) // kind.weights)
    with np.errstate(invalid="ignore", over="ignore"):  # the caller looks for what is not finite
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            values[part] = kind.decode(np.ascontiguousarray(blocks[part])).reshape(-1, kind.weights)
    return out.reshape(shape)
