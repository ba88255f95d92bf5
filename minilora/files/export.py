"""The same adapter for other programs: llama.cpp reads a GGUF file, mlx-lm a directory.

    GGUF      blk.0.attn_q.weight.lora_a (r, d_in), .lora_b (d_out, r); s = alpha / r, always
    mlx-lm    model.layers.0.self_attn.q_proj.lora_a (d_in, r), .lora_b (r, d_out); s in a config

Neither knows a scale alpha / √r or one that differs from module to module, so what s is beyond
the one they will use is multiplied into B: the product s B A is the same.  An s of 0 goes into B
alone: llama.cpp takes an alpha of 0 for none, and adds B A as it is.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ..engine.backend import to_numpy
from ..engine.errors import AdapterError
from ..lora.lora import LoRAEmbedding, LoRALinear, expect_plain
from ..model.transformer import Transformer
from . import gguf, safetensors
from .atomic import replace_directory
from .names import family, gguf_name, hf_name, rotated_heads, to_neighbors
from .peft import adapter_nodes

Node = LoRALinear | LoRAEmbedding


def factors(node: Node, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A, and B times what the node's scale is beyond `scale`; untouched where that is 1."""
    A, B = to_numpy(node.A.data), to_numpy(node.B.data)
    return A, B if node.scale == scale else (B * (node.scale / scale)).astype(B.dtype)


def plain_nodes(what: str, adapted: Transformer) -> dict[str, Node]:
    """The adapters by path.

    Errors: `AdapterError` for a variant: llama.cpp has no place for one, and mlx-lm's form of
    DoRA is not written here.
    """
    nodes = adapter_nodes(adapted)
    for path, node in nodes.items():
        expect_plain(what, path, node)
    return nodes


def most_used(scales: Iterable[float]) -> float:
    """Of the scales that are not 0, the commonest; 1 where all are 0."""
    return Counter([s for s in scales if s] or [1.0]).most_common(1)[0][0]


def export_gguf(path: str | os.PathLike, adapted: Transformer) -> None:
    """Write an adapter file for llama.cpp.

    Errors: `AdapterError` where there is none, or one on a head that is the embedding table, which
    a GGUF file does not repeat, or on a table of positions, which llama.cpp would not take;
    `FormatError` for a form GGUF has no names for.
    """
    nodes, config = plain_nodes("gguf", adapted), adapted.config
    for place in nodes:
        if place == "positions" or (place == "head" and config.tied):
            raise AdapterError(f"gguf: expected what llama.cpp loads, found an adapter on {place}")
    alpha = most_used(node.alpha for node in nodes.values())
    tensors = {}
    for place, node in nodes.items():
        A, B = factors(node, alpha / node.rank)
        heads = rotated_heads(place, config)
        B = to_neighbors(B, heads) if heads else B
        name = f"{gguf_name(place, config)}.weight"
        tensors[f"{name}.lora_a"] = (A.T if isinstance(node, LoRAEmbedding) else A).astype(
            np.float32
        )
        tensors[f"{name}.lora_b"] = B.astype(np.float32)
    metadata = {
        "general.architecture": family(config), "general.type": "adapter",
        "adapter.type": "lora", "adapter.lora.alpha": float(alpha),
    }  # fmt: skip
    gguf.write(path, metadata, tensors)


def export_mlx(directory: str | os.PathLike, adapted: Transformer) -> None:
    """Write an adapter directory for mlx-lm.

    Errors: `AdapterError` for what it has no place for: ranks that differ, adapters on
    embeddings or the head, and modules that are adapted in some blocks only.
    """
    nodes, config = plain_nodes("mlx", adapted), adapted.config
    if family(config) == "gpt2":
        raise AdapterError("mlx: expected a model of the Llama or Qwen2 family, found GPT-2's form")
    if any(isinstance(n, LoRAEmbedding) or path == "head" for path, n in nodes.items()):
        raise AdapterError("mlx: expected adapters on the linears of blocks, found others")
    ranks = {node.rank for node in nodes.values()}
    if len(ranks) > 1:
        raise AdapterError(f"mlx: expected one rank, found {sorted(ranks)}")
    names = {path: hf_name(path, config) for path in nodes}
    keys = sorted({".".join(name.split(".")[3:]) for name in names.values()})
    if len(nodes) != len(keys) * config.layers:
        raise AdapterError("mlx: expected the same modules in every block")
    scale = most_used(node.scale for node in nodes.values())
    tensors = {}
    for path, node in nodes.items():
        A, B = factors(node, scale)
        tensors[f"{names[path]}.lora_a"] = np.ascontiguousarray(A.T)
        tensors[f"{names[path]}.lora_b"] = np.ascontiguousarray(B.T)
    parameters = {"rank": ranks.pop(), "scale": scale, "dropout": 0.0, "keys": keys}
    content = {
        "fine_tune_type": "lora", "num_layers": config.layers, "lora_parameters": parameters,
    }  # fmt: skip
    replace_directory(directory, {
        "adapter_config.json": json.dumps(content, indent=1).encode() + b"\n",
        "adapters.safetensors": safetensors.encode(tensors, {"format": "mlx"}),
    })  # fmt: skip
