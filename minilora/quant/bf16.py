"""Frozen weights in two bytes a number; what trains, and what norms, stays in four."""

from dataclasses import replace
from typing import Any

from ..engine.bf16 import BFLOAT16
from ..engine.errors import MiniloraError
from ..engine.rounding import in_two_bytes
from ..engine.tensor import Tensor
from ..lora.lora import is_adapter
from ..model.layers import LayerNorm, RMSNorm
from ..model.module import children, parameters, rebuild, tensors, walk
from .linear import QuantizedLinear


def to_bf16(model: Any) -> Any:
    """The same tree with its frozen weights rounded to bfloat16, and hence its activations.

    Parameters stay, and so do the factors of adapters and the weights of norms, frozen or not:
    float32.  A weight in codes keeps them, and is made dense in bfloat16.  Tied weights stay
    tied; on a device the tree stays there.  It commutes with `quantize` no more than rounding
    does: quantize first, where both are wanted.
    Errors: `MiniloraError` where nothing is frozen: `adapt` or `freeze` the model first.
    """
    if not set(map(id, tensors(model).values())) - set(map(id, parameters(model).values())):
        raise MiniloraError("to_bf16: expected frozen weights, found none; adapt or freeze first")
    kept, codes = set(), set()
    for _, node in walk(model):
        if isinstance(node, (LayerNorm, RMSNorm)):
            kept |= set(map(id, tensors(node).values()))
        elif is_adapter(node):
            kept |= {id(part) for _, part in children(node) if isinstance(part, Tensor)}
        elif isinstance(node, QuantizedLinear):
            codes.add(id(node.weight))

    def convert(path: str, node: Any) -> Any:
        if id(node) in codes:
            return replace(node, dtype=BFLOAT16)
        if type(node) is Tensor and id(node) not in kept:
            return Tensor(in_two_bytes(node.data))
        return node

    return rebuild(model, convert)
