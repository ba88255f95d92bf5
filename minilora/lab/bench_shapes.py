"""What is raced: shapes, and the weights, tokens and settings that all contenders share."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..engine.tensor import Parameter
from ..lora.lora import LoRALinear, adapt
from ..model.layers import is_linear
from ..model.module import rebuild, walk
from ..model.transformer import Transformer, TransformerConfig, init_transformer
from ..quant.bf16 import to_bf16
from ..quant.linear import quantize
from ..train.data import Data

MODES = ("lora", "full", "qlora")
KINDS = ("step", "optimizer", "generate", "quantize")
DTYPES = ("float32", "bf16")
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 0.01
ALPHA = 16.0
STD = 0.05  # of weights and of B, so that no factor is zero and no logit tiny


@dataclass(frozen=True)
class Shape:
    """A model and a batch: N sequences of T tokens."""

    batch: int
    time: int
    vocab: int
    width: int
    layers: int
    heads: int
    key_heads: int | None = None  # a number makes it Llama-shaped; None: GPT-2, tied
    hidden: int | None = None
    tied: bool = False  # of a Llama: is the head the embedding table?

    @property
    def model(self) -> TransformerConfig:
        size = {
            "vocab": self.vocab,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "hidden": self.hidden,
            "context": self.time,
        }
        if self.key_heads is None:
            return TransformerConfig.gpt2(**size)
        return TransformerConfig(**size, key_heads=self.key_heads, tied=self.tied)

    @property
    def about(self) -> str:
        """ "L4 d256 H4 T128 V512 B16", and what makes a Llama of it."""
        text = (
            f"L{self.layers} d{self.width} H{self.heads} T{self.time} V{self.vocab} B{self.batch}"
        )
        if self.key_heads is None:
            return text
        tied = "tied" if self.tied else "untied"
        return f"{text}, Llama-shaped: {self.key_heads} key heads, hidden {self.hidden}, {tied}"


SMOLLM2 = {
    "vocab": 49152, "width": 576, "layers": 30, "heads": 9, "key_heads": 3, "hidden": 1536,
    "tied": True,
}  # fmt: skip


SHAPES = {
    "tiny": Shape(batch=4, time=16, vocab=64, width=32, layers=1, heads=2),  # a first try
    "S0": Shape(batch=8, time=64, vocab=256, width=128, layers=4, heads=4),
    "S1": Shape(batch=16, time=128, vocab=512, width=256, layers=4, heads=4),
    "S2": Shape(batch=8, time=256, vocab=8192, width=384, layers=6, heads=6),
    "S3": Shape(
        batch=16, time=128, vocab=2048, width=256, layers=4, heads=8, key_heads=4, hidden=688
    ),
    "smollm2": Shape(batch=4, time=128, **SMOLLM2),  # SmolLM2-135M, drawn weights
    "smollm2x1": Shape(batch=1, time=128, **SMOLLM2),  # one sequence: for decoding
}


@dataclass(frozen=True)
class Job:
    """What one worker process is asked to be ready for; plain values, sent as JSON."""

    contender: str
    shape: Shape
    kind: str = "step"
    mode: str = "lora"
    threads: int = 1
    rank: int = 8
    lr: float = LR
    micro: int | None = None  # sequences of a micro-batch in a shard; None: all at once
    new_tokens: int = 32  # generation: prompts of T - new_tokens tokens
    device: str = "cpu"  # where torch's steps run; "cuda" for the check of a card
    dtype: str = "float32"  # of frozen weights and activations; what trains is float32

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("mode", MODES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise MiniloraError(
                    f"bench: expected {name} in {known}, found {getattr(self, name)!r}"
                )
        for name in ("threads", "rank", "micro"):
            if (getattr(self, name) or 1) < 1:
                raise MiniloraError(f"bench: expected {name} >= 1, found {getattr(self, name)}")


def starting_tree(job: Job) -> Transformer:
    """The model all contenders start from, drawn from seed 0; adapters with B not zero.

    In "qlora" mode the same base in NF4 with double quantization, under the same adapters.
    In bf16 all that is frozen, but for the norms, is rounded in the end.
    Errors: `MiniloraError` for bf16 where nothing is frozen.
    """
    tree = float32_tree(job)
    return to_bf16(tree) if job.dtype == "bf16" else tree


def float32_tree(job: Job) -> Transformer:
    rng = np.random.default_rng(0)
    model = init_transformer(job.shape.model, rng, STD)
    if job.mode == "full":
        return model
    if job.mode == "qlora":
        model = quantize(model)
    model = adapt(model, rank=job.rank, alpha=ALPHA, rng=rng)

    def fill(path: str, node: Any) -> Any:
        if isinstance(node, Parameter) and path.endswith(".B"):
            return Parameter(rng.standard_normal(node.shape, np.float32) * np.float32(STD))
        return node

    return rebuild(model, fill)


def tokens(job: Job) -> Data:
    """ids and targets (N, T) from seed 1; every target is scored."""
    shape = (job.shape.batch, job.shape.time)
    rng = np.random.default_rng(1)
    return Data({name: rng.integers(0, job.shape.vocab, shape) for name in ("ids", "targets")})


def prompts(job: Job) -> np.ndarray:
    """ids (N, T - new_tokens).  Errors: `MiniloraError` where no prompt is left."""
    length = job.shape.time - job.new_tokens
    if length < 1:
        raise MiniloraError(
            f"bench: expected sequences longer than the {job.new_tokens} new tokens, "
            f"found {job.shape.time}"
        )
    return tokens(job).arrays["ids"][:, :length]


def adapted_paths(model: Any) -> list[str]:
    """Where the adapters sit."""
    return [path for path, node in walk(model) if isinstance(node, LoRALinear)]


def flops(job: Job) -> float:
    """Floating-point operations of a training step that keeps no table of attention.

    Linears 2 P n each way (none back below the lowest adapter, dW only in full mode), the
    skinny products of the adapters, the head, and the seen half of seven attention products,
    q kᵀ a second time on the way back among them.
    """
    shape, config = job.shape, job.shape.model
    model = init_transformer(config, np.random.default_rng(0))
    n, full = shape.batch * shape.time, job.mode == "full"
    total = 0.0
    for path, node in walk(model):
        if not is_linear(node):
            continue
        d_out, d_in = node.shape
        first = path.startswith("blocks.0.attention.") and not path.endswith("output")
        passes = 1 + (full or not first) + full
        total += passes * 2 * n * d_out * d_in
        if not full and path != "head":
            total += 2 * n * job.rank * (2 * d_in + 2 * d_out)
    seen = shape.time * (shape.time + 1) / 2
    return total + config.layers * 7 * 2 * shape.batch * seen * config.width
