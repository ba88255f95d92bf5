"""Keys and values already computed, so that a new token costs one row and not all of them."""

from typing import Any

from ..engine.backend import xp_of
from ..engine.bf16 import empty
from ..engine.errors import MiniloraError
from ..engine.rounding import bits_in, stored_as
from ..engine.rules import rule
from ..engine.tensor import Tensor
from .module import tensors


class LayerCache:
    """The keys and values of one layer: position p of row n stands at [n, p]."""

    def __init__(self, xp: Any, shape: tuple[int, int, int, int], dtype: Any):
        N, S, K, D = shape
        held = [empty(xp, (N, K, S, D), dtype) for _ in ("keys", "values")]
        for array in held:
            bits_in(array).fill(0)
        # (N, S, K, D), where what one head reads lies in one piece
        self.keys, self.values = (array.transpose(0, 2, 1, 3) for array in held)
        self.rows = xp.arange(shape[0])[:, None]  # (N, 1)
        self.stop = shape[1]  # positions from here on hold nothing yet

    def extend(self, k: Tensor, v: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        """Write k and v (N, T, K, D) at `positions` (N, T); return all before `stop`, as views."""
        if k.target is not None or v.target is not None:
            raise MiniloraError("cache: generate from a frozen model: freeze(model)")
        keys, values = remembered(k.data, v.data, layer=self, positions=positions)
        return Tensor(keys), Tensor(values)


@rule
def remembered(xp, k, v, *, layer, positions):
    """What `LayerCache.extend` does, as a rule, so that a recording knows of it."""
    layer.keys[layer.rows, positions] = stored_as(layer.keys, k)
    layer.values[layer.rows, positions] = stored_as(layer.values, v)
    return layer.keys[:, : layer.stop], layer.values[:, : layer.stop]


remembered.on("numpy bf16", "cupy bf16")(remembered.specification)


class KVCache:
    """One LayerCache a layer, for `batch` rows of up to `length` tokens.

    bytes = 2 layers · batch · length · key heads · D · bytes of a number
    """

    def __init__(self, model: Any, batch: int, length: int):
        config, table = model.config, next(iter(tensors(model.embedding).values())).data
        if length > config.context:
            raise MiniloraError(
                f"cache: expected at most {config.context} positions, found {length}"
            )
        xp, dtype, D = xp_of(table), table.dtype, config.head_width
        heads = [block.attention.key_heads for block in model.blocks]  # those of this process
        self.layers = [LayerCache(xp, (batch, length, K, D), dtype) for K in heads]

    def reach(self, stop: int) -> None:
        """From now on no row has a token at `stop` or beyond, and nobody need look there."""
        for layer in self.layers:
            layer.stop = stop
