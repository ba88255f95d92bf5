"""Every op of the engine with its arguments, and what the tests may ask of it.

The samples of `minilora.lab.op_samples` are large enough for tiles and blocks; those added
here are the small and the strange: numbers, broadcasting, 0-d, 0-size, repeated indices.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.engine import attention, fused, loss, ops, tensor
from minilora.engine.backend import is_array, to_device
from minilora.lab.op_samples import SAMPLES, Sample, drawn, fixed, frozen_base, tokens
from minilora.model.module import to_device as tree_to_device

SMALL = (2, 3, 4)
NONE = (0, 3)  # no entries at all
EDGES = (
    Sample(tensor.add, ((4, 1), (1, 5))),
    Sample(tensor.add, ((), (2, 3))),
    Sample(tensor.sub, ((3,), (2, 1))),
    Sample(tensor.mul, ((2, 1, 4), (3, 1))),
    Sample(tensor.mul, ((0, 3), (3,))),
    Sample(tensor.div, ((2, 1), (3,)), positive=True),
    Sample(tensor.pow, ((2, 3), (3,)), positive=True),
    Sample(tensor.pow, ((2, 1), ()), positive=True),
    Sample(tensor.matmul, ((5, 1, 3, 4), (2, 4, 6))),
    Sample(tensor.matmul, ((0, 3), (3, 2))),
    Sample(tensor.sum, (SMALL,)),
    Sample(tensor.sum, (SMALL,), fixed(axis=-1, keepdims=True)),
    Sample(tensor.sum, ((0, 3),), fixed(axis=0)),
    Sample(tensor.mean, (SMALL,), fixed(axis=(0, -1))),
    Sample(tensor.mean, ((),)),
    Sample(tensor.reshape, ((0, 4),), fixed(shape=(2, 0))),
    Sample(tensor.reshape, ((),), fixed(shape=(1, 1))),
    Sample(tensor.transpose, (SMALL,)),
    Sample(tensor.getitem, (SMALL,), fixed(index=(..., 1))),
    Sample(tensor.getitem, (SMALL,), fixed(index=(None, 0))),
    Sample(tensor.getitem, ((5, 2),), drawn(index=lambda rng: np.array([[3, 0, 3], [4, 3, 0]]))),
    Sample(ops.max, (SMALL,), fixed(axis=(0, 2), keepdims=True)),
    Sample(ops.max, (SMALL,)),
    Sample(ops.where, ((4,), (3, 1)), drawn(mask=lambda rng: rng.random((3, 4)) < 0.5)),
    Sample(ops.concat, ((2, 0), (2, 3), (2, 1))),
    Sample(ops.stack, (SMALL, SMALL, SMALL), fixed(axis=-1)),
    Sample(ops.softmax, (SMALL,), fixed(axis=0)),
    Sample(ops.log_softmax, (SMALL,), fixed(axis=1)),
    Sample(ops.logsumexp, (SMALL,), fixed(axis=1, keepdims=True)),
    Sample(fused.linear, ((4,), (3, 4), (3,))),
    Sample(fused.linear, ((2, 0, 4), (3, 4))),
    Sample(fused.gelu, ((),)),
    Sample(fused.gelu, ((0, 4),)),
    Sample(fused.swiglu, ((0, 4), (0, 4))),
    Sample(fused.layer_norm, ((0, 4), (4,), (4,)), fixed(eps=1e-5)),
    Sample(fused.rms_norm, ((4,), (4,)), fixed(eps=1e-5)),
    Sample(fused.embedding, ((5, 2),), drawn(ids=lambda rng: np.array(3))),
    Sample(fused.embedding, ((5, 2),), drawn(ids=lambda rng: np.zeros((2, 0), np.int64))),
    Sample(
        fused.lora_linear,
        ((70, 4), (2, 4), (3, 2)),
        lambda rng: frozen_base(3, 4)(rng) | {"scale": -0.5},
    ),
    Sample(fused.frozen_linear, ((4,),), frozen_base(3, 4)),
    Sample(attention.attention, ((2, 7, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3)), fixed(tile=3)),
    Sample(attention.attention, ((2, 1, 2, 3), (2, 1, 1, 3), (2, 1, 1, 3))),
    Sample(
        attention.attention,
        ((2, 3, 4, 2), (2, 9, 2, 2), (2, 9, 2, 2)),
        drawn(positions=lambda rng: np.array([[2, 3, 4], [6, 7, 8]])),
    ),
    Sample(
        attention.rope,
        ((2, 3, 2, 4),),
        drawn(theta=100.0, positions=lambda rng: np.array([[5, 6, 7], [0, 1, 2]])),
    ),
    Sample(loss.cross_entropy, ((6, 5),), drawn(targets=tokens((6,), 5))),
    Sample(loss.cross_entropy, ((3, 5),), drawn(targets=lambda rng: np.full(3, loss.IGNORE))),
    Sample(loss.head_cross_entropy, ((9, 4), (5, 4)), drawn(targets=tokens((9,), 5), chunk=4)),
    Sample(
        loss.head_cross_entropy, ((3, 4), (5, 4)), drawn(targets=lambda rng: np.full(3, -100))
    ),
)  # fmt: skip

EMPTY = (
    *(Sample(op, (NONE, (3,))) for op in (tensor.add, tensor.sub, tensor.div, tensor.pow)),
    Sample(tensor.add, ((0, 1), (1, 3))),
    Sample(tensor.mul, (NONE, ())),
    *(
        Sample(op, (NONE,))
        for op in (
            tensor.neg, tensor.sum, tensor.transpose, ops.exp, ops.log, ops.sqrt, ops.tanh,
            ops.sigmoid, ops.softmax, ops.log_softmax, ops.logsumexp,
        )
    ),
    Sample(tensor.matmul, ((2, 0), (0, 3))),
    Sample(tensor.mean, (NONE,), fixed(axis=-1)),
    Sample(tensor.getitem, (NONE,), fixed(index=(slice(None), 1))),
    Sample(tensor.getitem, (SMALL,), drawn(index=lambda rng: np.zeros(0, np.int64))),
    Sample(ops.max, (NONE,), fixed(axis=-1)),
    Sample(ops.where, (NONE, (3,)), drawn(mask=lambda rng: np.zeros(NONE, bool))),
    Sample(ops.stack, (NONE, NONE), fixed(axis=1)),
    Sample(fused.linear, ((2, 0), (3, 0), (3,))),
    Sample(fused.frozen_linear, ((2, 0, 4),), frozen_base(3, 4)),
    Sample(
        fused.lora_linear,
        ((2, 0, 4), (2, 4), (3, 2)),
        lambda rng: frozen_base(3, 4)(rng) | {"scale": 2.0},
    ),
    Sample(fused.rms_norm, ((2, 0, 4), (4,)), fixed(eps=1e-5)),
    Sample(fused.dropout, (NONE,), lambda rng: {"rate": 0.3, "rng": np.random.default_rng(5)}),
    Sample(attention.split_heads, ((2, 0, 8),), fixed(heads=(2, 1, 1), width=2)),
    Sample(attention.rope, ((0, 3, 2, 4),), fixed(theta=100.0)),
    Sample(attention.rope, ((2, 0, 2, 4),), fixed(theta=100.0)),
    Sample(attention.attention, ((0, 3, 4, 2), (0, 3, 2, 2), (0, 3, 2, 2))),
    Sample(attention.attention, ((2, 0, 4, 2), (2, 0, 2, 2), (2, 0, 2, 2))),
    Sample(loss.cross_entropy, ((0, 5),), drawn(targets=tokens((0,), 5))),
    Sample(loss.head_cross_entropy, ((2, 0, 4), (5, 4)), drawn(targets=tokens((2, 0), 5))),
)  # fmt: skip

SINGLE = (
    *(
        Sample(op, ((), ()), positive=True)
        for op in (tensor.add, tensor.sub, tensor.mul, tensor.div, tensor.pow, fused.swiglu)
    ),
    *(
        Sample(op, ((),), positive=True)
        for op in (
            tensor.neg, tensor.sum, tensor.transpose, ops.exp, ops.log, ops.sqrt, ops.tanh,
            ops.sigmoid, ops.max,
        )
    ),
    Sample(tensor.getitem, ((),), fixed(index=...)),
    Sample(tensor.getitem, ((3,),), fixed(index=1)),
    Sample(ops.where, ((), ()), drawn(mask=lambda rng: np.array(True))),
    Sample(ops.stack, ((), ())),
    Sample(fused.dropout, ((),), lambda rng: {"rate": 0.3, "rng": np.random.default_rng(6)}),
)  # fmt: skip
TABLE = SAMPLES + EDGES + EMPTY + SINGLE

# Defined along an axis, so that a single number is no argument of theirs.
AXIS_WANTED = {
    "matmul", "concat", "softmax", "log_softmax", "logsumexp", "linear", "frozen_linear",
    "lora_linear", "layer_norm", "rms_norm", "embedding", "split_heads", "rope", "attention",
    "cross_entropy", "head_cross_entropy",
}  # fmt: skip

KINKED = {"max"}  # no complex step: the order of complex numbers is not that of their real parts
LINEAR = {
    "neg", "sum", "mean", "reshape", "transpose", "getitem", "frozen_linear", "embedding",
    "dropout", "split_heads", "rope",
}  # fmt: skip

# Rules without pullbacks, and the file that holds each to its formula.
UPDATES = {
    "measure": "test_optim.py",
    "sgd_update": "test_optim.py",
    "adamw_update": "test_optim.py",
    "adamw8bit_update": "test_adam8bit.py",
    "quantize_blocks": "test_blockwise.py",
    "dequantize_blocks": "test_blockwise.py",
    "widen": "test_bf16.py",
    "narrow": "test_bf16.py",
    "summed": "test_bf16.py",
    "remembered": "test_transformer.py",
    "row_lengths": "test_variants.py",
    "all_reduce": "test_team.py",
    "all_gather": "test_team.py",
}


def name_of(sample: Sample) -> str:
    return f"{sample.op.__name__}{'x'.join(str(s).replace(' ', '') for s in sample.shapes)}"


def call(sample: Sample, options: dict[str, Any]) -> Callable:
    """The op as a function of its arrays; a Generator among the options starts anew each time."""

    def function(*arrays: Any) -> Any:
        fresh = {
            name: copy.deepcopy(value) if isinstance(value, np.random.Generator) else value
            for name, value in options.items()
        }
        return sample.op(*arrays, **fresh)

    return function


def placed(sample: Sample, device: str, seed: int = 0) -> tuple[Callable, list, Any, list]:
    """The function, its arrays, a cotangent and a direction for each array, on `device`."""
    rng = np.random.default_rng(seed)
    arrays, options = sample.draw(rng)
    if sample.op.__name__ in KINKED:  # far from ties, so that no step crosses one
        arrays = [rng.permutation(a.size).reshape(a.shape) * 0.1 for a in arrays]
    options = {name: on(value, device) for name, value in options.items()}
    arrays = [to_device(a, device) for a in arrays]
    function = call(sample, options)
    value = function(*[tensor.Tensor(a) for a in arrays])
    draw = lambda shape: to_device(rng.standard_normal(shape), device)
    if isinstance(value, tuple):
        cotangent = tuple(draw(part.shape) for part in value)
    else:
        cotangent = draw(value.shape)
    return function, arrays, cotangent, [draw(a.shape) for a in arrays]


def on(option: Any, device: str) -> Any:
    """An option's arrays and trees on `device`."""
    if is_array(option):
        return to_device(option, device)
    return tree_to_device(option, device) if hasattr(option, "dense") else option
