"""W0 stays, BA moves: a frozen weight and a trainable detour of rank r around it."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..engine.backend import device_of, to_device
from ..engine.bf16 import BFLOAT16
from ..engine.check import expect_finite
from ..engine.errors import AdapterError, RankWarning
from ..engine.fused import dropout, embedding, linear, lora_linear
from ..engine.rules import wide
from ..engine.tensor import Parameter, Tensor, transpose
from ..model.layers import Embedding, Linear, LinearLike, Rng, is_linear
from ..model.module import count, freeze, module, parameters, rebuild, walk
from ..model.targets import ALL_LINEAR, matches, select

MAX_RANK = 65536  # above it stands a typing error, or a file made to fill the memory


def expect_factors(node: Any, d_out: int, d_in: int) -> None:
    """What an adapter around a frozen (d_out, d_in) must satisfy.  Errors: `AdapterError`."""
    name, A, B = type(node).__name__, node.A, node.B
    if parameters(node.base):
        raise AdapterError(f"{name}: expected a frozen base, found a Parameter in it")
    r = A.shape[0]
    if A.shape != (r, d_in) or B.shape != (d_out, r) or r < 1:
        raise AdapterError(
            f"{name}: expected A (r, {d_in}) and B ({d_out}, r), found {A.shape} and {B.shape}"
        )
    if not math.isfinite(node.alpha) or not 0 <= node.dropout < 1:
        raise AdapterError(
            f"{name}: expected a finite alpha and 0 <= dropout < 1, "
            f"found alpha {node.alpha}, dropout {node.dropout}"
        )


def scale_of(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """s = alpha / r, or alpha / √r"""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


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
        expect_factors(self, *self.base.shape)

    @property
    def rank(self) -> int:
        """r"""
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """s = alpha / r, or alpha / √r"""
        return scale_of(self.rank, self.alpha, self.rank_stabilized)

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        if self.dropout and rng is not None:
            return self.base(x) + self.detour(dropout(x, rate=self.dropout, rng=rng))
        return lora_linear(x, self.A, self.B, base=self.base, scale=self.scale)

    def detour(self, x: Tensor) -> Tensor:
        """s (x Aᵀ) Bᵀ: what the adapter adds."""
        return linear(linear(x, self.A), self.B) * self.scale

    def delta(self) -> Any:
        """ΔW = s B A, an array (d_out, d_in)."""
        return self.scale * (self.B.data @ self.A.data)

    def merged(self) -> Linear:
        """A plain Linear with W = W0 + s B A, and arrays of its own."""
        bias = self.base.bias
        weight = Tensor(wide(self.base.dense()) + self.delta())
        return Linear(weight, None if bias is None else Tensor(bias.data.copy()))


@module
class LoRAEmbedding:
    """y = W0[id] + s (Aᵀ[id]) Bᵀ: a table of V rows, changed by one of rank r.

    Here A (r, V) starts zero and B (C, r) normal, so that an id that was never seen keeps
    its row.  A head tied to the table is not changed by it.  (PEFT's `LoraLayer` for
    embeddings; loralib before it.)  No dropout: the input is an index.
    """

    base: Embedding
    A: Tensor  # (r, V)
    B: Tensor  # (C, r)
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0  # always 0: it would have nothing to act on

    def __post_init__(self) -> None:
        V, C = self.base.weight.shape
        expect_factors(self, C, V)
        if self.dropout:
            raise AdapterError(f"LoRAEmbedding: expected no dropout, found {self.dropout}")

    @property
    def rank(self) -> int:
        """r"""
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """s = alpha / r, or alpha / √r"""
        return scale_of(self.rank, self.alpha, self.rank_stabilized)

    def __call__(self, ids: Any, rng: Rng | None = None) -> Tensor:
        return self.base(ids) + self.detour(ids)

    def detour(self, ids: Any) -> Tensor:
        """s (Aᵀ[id]) Bᵀ: what the adapter adds."""
        return linear(embedding(transpose(self.A), ids=ids), self.B) * self.scale

    def delta(self) -> Any:
        """ΔW = s (B A)ᵀ, an array (V, C)."""
        return self.scale * (self.B.data @ self.A.data).T

    def merged(self) -> Embedding:
        """A plain Embedding with its own table, W0 + s (B A)ᵀ."""
        return Embedding(Tensor(wide(self.base.weight.data) + self.delta()))


def is_adapter(node: Any) -> bool:
    return isinstance(node, (LoRALinear, LoRAEmbedding))


def expect_plain(what: str, path: str, node: Any) -> None:
    """Refuse an adapter that is more than s B A on the weight it was made for: a variant."""
    if type(node) not in (LoRALinear, LoRAEmbedding):
        raise AdapterError(
            f"{what}: expected plain LoRA{f' at {path}' if path else ''}, "
            f"found a {type(node).__name__}: merge it"
        )


def is_adaptable(node: Any) -> bool:
    return is_linear(node) or isinstance(node, Embedding)


def warn_of_rank(adapted: Any) -> None:
    """A RankWarning for adapters of a rank that no ΔW (d_out, d_in) can have.

    Nothing about them is wrong; they hold numbers to no purpose, and often a typing error.
    """
    odd = [
        f"{path}: {node.rank} > min{(node.B.shape[0], node.A.shape[1])}"
        for path, node in walk(adapted)
        if is_adapter(node) and node.rank > min(node.B.shape[0], node.A.shape[1])
    ]
    if odd:
        warnings.warn(f"rank above what ΔW can have in {len(odd)} modules, the first "
                      f"{odd[0]}", RankWarning, stacklevel=3)  # fmt: skip


def by_pattern(
    name: str, paths: Iterable[str], default: Any, pattern: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The value of each path: the default, or that of the last target that matches it.

    Errors: `AdapterError` for a target that matches none.
    """
    values = dict.fromkeys(paths, default)
    for target, value in (pattern or {}).items():
        hit = [path for path in values if matches(path, target)]
        if not hit:
            raise AdapterError(f"{name}: {target!r} matches none of the targets")
        values |= dict.fromkeys(hit, value)
    return values


def adapt(
    model: Any,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    rng: Rng,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    init: str = "kaiming",
    modules_to_save: None = None,
) -> Any:
    """A new tree: the model frozen, with an adapter around each linear or embedding targeted.

    `targets` as in `select` ("all-linear" leaves out embeddings and the output head);
    `rank_pattern` and `alpha_pattern` map targets to what differs from `rank` and `alpha`.
    `init` of A: "kaiming", uniform in ±1/√d_in (PEFT's default), or "gaussian", N(0, 1/r²)
    (PEFT's "gaussian").  B is zero.  For an embedding, A is zero and B N(0, 1).
    Errors: `AdapterError` for a rank below 1 or above `MAX_RANK`, an unknown init, a pattern that
    matches no target, or a model that is adapted already; and for PEFT's `modules_to_save`.
    """
    if modules_to_save is not None:
        raise AdapterError(
            "modules_to_save: not taken, because an adapter would then carry whole weights and "
            "no longer merge as W0 + s B A; thaw them with unfreeze(adapted, where=...) and save "
            "the model"
        )
    if any(is_adapter(node) for _, node in walk(model)):
        raise AdapterError("adapt: expected a plain model, found one with adapters; merge it first")
    if init not in ("kaiming", "gaussian"):
        raise AdapterError(f'init: expected "kaiming" or "gaussian", found {init!r}')
    chosen = select(model, targets, is_adaptable)
    ranks = by_pattern("rank_pattern", chosen, rank, rank_pattern)
    alphas = by_pattern("alpha_pattern", chosen, alpha, alpha_pattern)
    for path, r in ranks.items():
        if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= MAX_RANK:
            raise AdapterError(
                f"rank: expected a whole number in 1..{MAX_RANK} for {path}, found {r!r}"
            )

    def wrap(path: str, node: Any) -> Any:
        if path not in ranks:
            return node
        r = ranks[path]
        if isinstance(node, Embedding):
            (V, C), weight = node.weight.shape, node.weight.data
            kind, A, B = LoRAEmbedding, np.zeros((r, V)), rng.standard_normal((C, r))
        else:
            (d_out, d_in), weight = node.shape, node.dense()
            if init == "kaiming":
                A = rng.uniform(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), (r, d_in))
            else:
                A = rng.standard_normal((r, d_in)) / r
            kind, B = LoRALinear, np.zeros((d_out, r))
        device = device_of(weight)
        dtype = np.float32 if weight.dtype == BFLOAT16 else weight.dtype
        A, B = (Parameter(to_device(f.astype(dtype), device)) for f in (A, B))
        rate = 0.0 if kind is LoRAEmbedding else dropout
        return kind(node, A, B, float(alphas[path]), rank_stabilized, rate)

    return rebuild(freeze(model), wrap)


def merge(adapted: Any, retie: bool = False) -> Any:
    """A new model without adapters, W = W0 + s B A; `adapted` is left as it is.

    Its arrays are its own, but for weights in codes that had no adapter, which stay and are shared.

    A head tied to an adapted embedding keeps the old table, as it had it in training; with
    `retie` it takes the merged one, which is another function.  There is no unmerge:
    nothing was overwritten.
    Errors: `NumericsError` naming the module whose merged weight would not be finite;
    `AdapterError` for a mixed batch, whose rows have no one weight.
    """
    merged_tables: dict[int, Tensor] = {}

    def fold(path: str, node: Any) -> Any:
        if hasattr(node, "merged"):  # an adapter, or a mixed batch, which refuses
            plain = node.merged()
            expect_finite(f"merge: {path}", plain.weight.data)
            if retie and isinstance(node, LoRAEmbedding):
                merged_tables[id(node.base.weight)] = plain.weight
            return plain
        if isinstance(node, Tensor):
            return merged_tables.get(id(node)) or Tensor(node.data.copy())
        return node

    return rebuild(adapted, fold)


def trainable_share(model: Any) -> float:
    """The share of a model's numbers that train, between 0 and 1."""
    return count(model, trainable=True) / count(model)
