"""One decoder-only transformer, from GPT-2 to Llama, by one config."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..engine.attention import RopeScaling, attention, rope, split_heads
from ..engine.backend import xp_of
from ..engine.errors import MiniloraError, expect_whole
from ..engine.loss import IGNORE, cross_entropy, head_cross_entropy
from ..engine.recompute import recompute
from ..engine.tensor import Parameter, Tensor
from .cache import KVCache, LayerCache
from .layers import (
    MLP,
    Embedding,
    GatedMLP,
    LayerNorm,
    Linear,
    LinearLike,
    RMSNorm,
    Rng,
)
from .module import module


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer.  Defaults are Llama's; `TransformerConfig.gpt2` has GPT-2's."""

    vocab: int  # V, size of the vocabulary
    width: int  # C, channels of the residual stream
    layers: int
    heads: int  # H query heads of width C / H
    key_heads: int | None = None  # heads of keys and values; None: as many as queries
    hidden: int | None = None  # width inside the MLP; None: 4 C
    context: int = 1024  # longest sequence
    norm: str = "rms"  # "rms" or "layer"
    mlp: str = "swiglu"  # "swiglu" or "gelu"
    rope_theta: float | None = 10000.0  # None: learned positions
    rope_scaling: RopeScaling | None = None
    packed: bool = False  # one matrix for queries, keys and values, as in GPT-2
    bias: bool = False  # biases on the linears
    qkv_bias: bool | None = None  # those on queries, keys and values; None: as `bias`
    tied: bool = True  # the output head is the embedding table
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "heads", "key_heads", "hidden", "context"):
            value = getattr(self, name)
            if value is not None or name not in ("key_heads", "hidden"):
                expect_whole(f"config: {name}", value, 1)
        if self.width % self.heads or self.heads % self.kv:
            raise MiniloraError(
                f"config: expected heads to divide width, and key heads to divide heads; "
                f"found width {self.width}, heads {self.heads}, key heads {self.kv}"
            )
        for name, known in (("norm", ("rms", "layer")), ("mlp", ("swiglu", "gelu"))):
            if getattr(self, name) not in known:
                raise MiniloraError(
                    f"config: expected {name} in {known}, found {getattr(self, name)!r}"
                )

    @property
    def kv(self) -> int:
        """Key heads."""
        return self.heads if self.key_heads is None else self.key_heads

    @property
    def head_width(self) -> int:
        """D = C / H."""
        return self.width // self.heads

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return 4 * self.width if self.hidden is None else self.hidden

    def biased(self, path: str) -> bool:
        """Does the linear at `path` have a bias?  The head never has."""
        name = path.rpartition(".")[2]
        if name in ("query", "key", "value", "qkv") and self.qkv_bias is not None:
            return self.qkv_bias
        return self.bias and name != "head"

    @classmethod
    def gpt2(cls, **shape: Any) -> "TransformerConfig":
        """LayerNorm, learned positions, GELU, biases, packed q k v, tied head."""
        style = {"norm": "layer", "mlp": "gelu", "rope_theta": None, "packed": True, "bias": True}
        return cls(**(style | shape))


@module
class Attention:
    """Causal self-attention over separate projections; key heads may be fewer than heads."""

    query: LinearLike
    key: LinearLike
    value: LinearLike
    output: LinearLike
    heads: int
    key_heads: int
    rope_theta: float | None
    rope_scaling: RopeScaling | None = None

    def __call__(
        self,
        x: Tensor,
        rng: Rng | None,
        positions: Any = None,
        cache: LayerCache | None = None,
        at: Any = None,
    ) -> Tensor:
        N, T, _ = x.shape  # (N, T, C)
        q = self.query(x, rng)
        D = q.shape[-1] // self.heads  # not -1, which a batch of no rows would leave open
        q = q.reshape(N, T, self.heads, D)  # (N, T, H, D)
        k = self.key(x, rng).reshape(N, T, self.key_heads, D)  # (N, T, K, D)
        v = self.value(x, rng).reshape(N, T, self.key_heads, D)
        return self.output(attend(self, q, k, v, positions, cache, at), rng)


@module
class PackedAttention:
    """The same over one matrix for queries, keys and values (GPT-2's `c_attn`)."""

    qkv: LinearLike
    output: LinearLike
    heads: int
    key_heads: int
    rope_theta: float | None
    rope_scaling: RopeScaling | None = None

    def __call__(
        self,
        x: Tensor,
        rng: Rng | None,
        positions: Any = None,
        cache: LayerCache | None = None,
        at: Any = None,
    ) -> Tensor:
        heads = (self.heads, self.key_heads, self.key_heads)
        packed = self.qkv(x, rng)  # (N, T, (H + 2K) D)
        q, k, v = split_heads(packed, heads=heads, width=packed.shape[-1] // sum(heads))
        return self.output(attend(self, q, k, v, positions, cache, at), rng)


def attend(
    layer: Attention | PackedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Any,
    cache: LayerCache | None,
    at: Any,
) -> Tensor:
    """Rotate, remember, attend, and put the heads side by side: (N, T, C).

    With `at` (N,), only the queries at these indices ask: (N, 1, C).
    """
    if layer.rope_theta is not None:
        turn = {"theta": layer.rope_theta, "scaling": layer.rope_scaling, "positions": positions}
        q, k = rope(q, **turn), rope(k, **turn)
    if cache is not None:
        k, v = cache.extend(k, v, positions)
    seen = None if cache is None else positions  # the last key that each query sees; None: its own
    if at is not None:
        q = only(q, at)
        seen = at[:, None] if seen is None else only(seen, at)
    out = attention(q, k, v, positions=seen)
    N, T, H, D = out.shape
    return out.reshape(N, T, H * D)


def only(x: Any, at: Any) -> Any:
    """The entry of each row at its index in `at` (N,): (N, T, ...) -> (N, 1, ...); None: all."""
    return x if at is None else x[xp_of(at).arange(len(at))[:, None], at[:, None]]


@module
class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    attention_norm: LayerNorm | RMSNorm
    attention: Attention | PackedAttention
    mlp_norm: LayerNorm | RMSNorm
    mlp: MLP | GatedMLP

    def __call__(
        self,
        x: Tensor,
        rng: Rng | None = None,
        positions: Any = None,
        cache: LayerCache | None = None,
        at: Any = None,
    ) -> Tensor:
        x = only(x, at) + self.attention(self.attention_norm(x), rng, positions, cache, at)
        return x + self.mlp(self.mlp_norm(x), rng)


@module
class Transformer:
    """ids (N, T) -> logits (N, T, V)."""

    config: TransformerConfig
    embedding: Embedding
    positions: Embedding | None  # None with rotary positions
    blocks: tuple[Block, ...]
    norm: LayerNorm | RMSNorm
    head: LinearLike

    def hidden(
        self,
        ids: Any,
        *,
        rng: Rng | None = None,
        positions: Any = None,
        cache: KVCache | None = None,
        at: Any = None,
        recompute_blocks: bool = False,
    ) -> Tensor:
        """The normalized residual stream before the head: (N, T, C).

        `positions` (N, T) says where each id stands, None: 0..T-1; a `cache` needs it.
        With `at` (N,), only what stands there at these indices: (N, 1, C).  Of the last block
        the other tokens need no more than keys and values.
        With `recompute_blocks`, a block keeps its input only and runs again on the way back.
        """
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[1] > self.config.context:
            raise MiniloraError(
                f"ids: expected shape (N, T) with 1 <= T <= {self.config.context}, "
                f"found {ids.shape}"
            )
        if cache is not None and positions is None:
            raise MiniloraError("positions: expected some beside a cache, found None")
        x = self.embedding(ids)  # (N, T, C)
        if self.positions is not None:
            if positions is None and isinstance(self.positions, Embedding):
                x = x + self.positions.weight[: ids.shape[1]]  # no lookup: the rows in order
            elif positions is None:  # an adapter on the table looks rows up, as for any ids
                xp = xp_of(ids)
                x = x + self.positions(xp.broadcast_to(xp.arange(ids.shape[1]), ids.shape))
            else:
                x = x + self.positions(positions)
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layers[i]
            here = at if i == len(self.blocks) - 1 else None
            run = partial(block, positions=positions, cache=layer, at=here)
            x = recompute(run, x, rng=rng) if recompute_blocks else run(x, rng=rng)
        return self.norm(x)

    def __call__(self, ids: Any, **options: Any) -> Tensor:
        return self.head(self.hidden(ids, **options), options.get("rng"))

    def loss(self, ids: Any, targets: Any, *, rng: Rng | None = None, **options: Any) -> Tensor:
        """Σ cross-entropy over the targets (N, T) that are not `IGNORE`: a sum, not a mean."""
        x = self.hidden(ids, rng=rng, **options)
        if isinstance(self.head, Linear) and self.head.bias is None:
            return head_cross_entropy(x, self.head.weight, targets=targets, ignore_index=IGNORE)
        return cross_entropy(self.head(x, rng), targets=targets, ignore_index=IGNORE)


def assemble(
    config: TransformerConfig, make: Callable[[str, tuple[int, ...]], Tensor]
) -> Transformer:
    """The tree of `config`; `make(path, shape)` gives its Tensors, in the order of the paths.

    A tied head is the embedding table and is not asked for.
    """
    C, D = config.width, config.head_width

    def dense(path: str, d_in: int, d_out: int) -> Linear:
        weight = make(f"{path}.weight", (d_out, d_in))
        return Linear(weight, make(f"{path}.bias", (d_out,)) if config.biased(path) else None)

    def norm(path: str) -> LayerNorm | RMSNorm:
        weight = make(f"{path}.weight", (C,))
        if config.norm == "rms":
            return RMSNorm(weight, config.eps)
        return LayerNorm(weight, make(f"{path}.bias", (C,)), config.eps)

    def attention(path: str) -> Attention | PackedAttention:
        names = ("qkv",) if config.packed else ("query", "key", "value")
        heads = {"query": config.heads, "qkv": config.heads + 2 * config.kv}
        inputs = [dense(f"{path}.{name}", C, heads.get(name, config.kv) * D) for name in names]
        return (PackedAttention if config.packed else Attention)(
            *inputs, dense(f"{path}.output", C, C), config.heads, config.kv,
            config.rope_theta, config.rope_scaling,
        )  # fmt: skip

    def mlp(path: str) -> MLP | GatedMLP:
        names = ("up",) if config.mlp == "gelu" else ("gate", "up")
        inputs = [dense(f"{path}.{name}", C, config.inner) for name in names]
        return (MLP if config.mlp == "gelu" else GatedMLP)(
            *inputs, dense(f"{path}.down", config.inner, C)
        )

    def block(path: str) -> Block:
        return Block(
            norm(f"{path}.attention_norm"), attention(f"{path}.attention"),
            norm(f"{path}.mlp_norm"), mlp(f"{path}.mlp"),
        )  # fmt: skip

    table = Embedding(make("embedding.weight", (config.vocab, C)))
    positions = None
    if config.rope_theta is None:
        positions = Embedding(make("positions.weight", (config.context, C)))
    blocks = tuple(block(f"blocks.{i}") for i in range(config.layers))
    head = Linear(table.weight) if config.tied else dense("head", C, config.vocab)
    return Transformer(config, table, positions, blocks, norm("norm"), head)


def init_transformer(config: TransformerConfig, rng: Rng, std: float = 0.02) -> Transformer:
    """A trainable model: weights N(0, std²), those that write into the residual stream
    scaled by 1/√(2 layers), norms one, biases zero (Radford et al. 2019, for C >= 768;
    narrow models start better with an std near 1/√C)."""
    into_stream = std / math.sqrt(2 * config.layers)

    def make(path: str, shape: tuple[int, ...]) -> Parameter:
        owner, kind = path.split(".")[-2:]
        if kind == "bias":
            return Parameter(np.zeros(shape, np.float32))
        if owner.endswith("norm"):
            return Parameter(np.ones(shape, np.float32))
        scale = into_stream if owner in ("output", "down") else std
        return Parameter(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))

    return assemble(config, make)
