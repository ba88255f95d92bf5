"""W0 stays, BA moves: a frozen weight and a trainable detour of rank r around it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..engine.backend import to_device, xp_of
from ..engine.errors import AdapterError
from ..engine.fused import dropout, linear, lora_linear
from ..engine.tensor import Parameter, Tensor
from ..model.layers import Linear, LinearLike, Rng, is_linear
from ..model.module import count, freeze, module, parameters, rebuild, walk
from ..model.targets import ALL_LINEAR, matches, select


@module
class LoRALinear:
    """y = base(x) + s (x Aᵀ) Bᵀ,   s = alpha / r, or alpha / √r if rank-stabilized.

    A (r, d_in) starts random and B (d_out, r) zero, so that step 0 is the base itself.
    Dropout acts on the adapter's input, and only when an `rng` is passed.
    (Hu et al. 2021, section 4.1; the scale alpha / √r is Kalajdzievski's, 2023.)
    Errors: `AdapterError` if the base holds a Parameter, or the factors do not fit it.
    """

    base: LinearLike  # frozen: nothing below here is ever written
    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        d_out, d_in = self.base.shape
        if parameters(self.base):
            raise AdapterError("LoRALinear: expected a frozen base, found a Parameter in it")
        r = self.A.shape[0]
        if self.A.shape != (r, d_in) or self.B.shape != (d_out, r) or r < 1:
            raise AdapterError(
                f"LoRALinear: expected A (r, {d_in}) and B ({d_out}, r), "
                f"found {self.A.shape} and {self.B.shape}"
            )
        if not math.isfinite(self.alpha) or not 0 <= self.dropout < 1:
            raise AdapterError(
                f"LoRALinear: expected a finite alpha and 0 <= dropout < 1, "
                f"found alpha {self.alpha}, dropout {self.dropout}"
            )

    @property
    def rank(self) -> int:
        """r"""
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """s = alpha / r, or alpha / √r"""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        if self.dropout and rng is not None:
            detour = linear(linear(dropout(x, rate=self.dropout, rng=rng), self.A), self.B)
            return self.base(x) + detour * self.scale
        return lora_linear(x, self.A, self.B, base=self.base, scale=self.scale)

    def delta(self) -> Any:
        """ΔW = s B A, an array (d_out, d_in)."""
        return self.scale * (self.B.data @ self.A.data)


def adapt(
    model: Any,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    rng: Rng,
    rank_pattern: Mapping[str, int] | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    init: str = "kaiming",
) -> Any:
    """A new tree: the model frozen, with a LoRALinear around each linear that is targeted.

    `targets` as in `select`; `rank_pattern` maps targets to ranks that differ from `rank`.
    `init` of A: "kaiming", uniform in ±1/√d_in (PEFT's default), or "gaussian", N(0, 1/r²)
    (PEFT's "gaussian").  B is zero.
    Errors: `AdapterError` for a rank below 1, an unknown init, a pattern that matches no
    target, or a model that is adapted already.
    """
    if any(isinstance(node, LoRALinear) for _, node in walk(model)):
        raise AdapterError("adapt: expected a plain model, found one with adapters; merge it first")
    if init not in ("kaiming", "gaussian"):
        raise AdapterError(f'init: expected "kaiming" or "gaussian", found {init!r}')
    chosen = select(model, targets, is_linear)
    ranks = dict.fromkeys(chosen, rank)
    for target, r in (rank_pattern or {}).items():
        hit = [path for path in chosen if matches(path, target)]
        if not hit:
            raise AdapterError(f"rank_pattern: {target!r} matches none of the targets")
        ranks |= dict.fromkeys(hit, r)
    for path, r in ranks.items():
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise AdapterError(f"rank: expected a whole number >= 1 for {path}, found {r!r}")

    def wrap(path: str, node: Any) -> Any:
        if path not in ranks:
            return node
        r, (d_out, d_in), weight = ranks[path], node.shape, node.dense()
        if init == "kaiming":
            A = rng.uniform(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), (r, d_in))
        else:
            A = rng.standard_normal((r, d_in)) / r
        device = "cpu" if xp_of(weight) is np else "cuda"
        A = Parameter(to_device(A.astype(weight.dtype), device))
        B = Parameter(to_device(np.zeros((d_out, r), weight.dtype), device))
        return LoRALinear(node, A, B, float(alpha), rank_stabilized, dropout)

    return rebuild(freeze(model), wrap)


def merge(adapted: Any) -> Any:
    """A new plain model, W = W0 + s B A, with arrays of its own; `adapted` is left as it is.

    There is no unmerge: nothing was overwritten.
    """

    def fold(path: str, node: Any) -> Any:
        if isinstance(node, LoRALinear):
            bias = node.base.bias
            weight = Tensor(node.base.dense() + node.delta())
            return Linear(weight, None if bias is None else Tensor(bias.data.copy()))
        return Tensor(node.data.copy()) if isinstance(node, Tensor) else node

    return rebuild(adapted, fold)


def trainable_share(model: Any) -> float:
    """The share of a model's numbers that train, between 0 and 1."""
    return count(model, trainable=True) / count(model)
