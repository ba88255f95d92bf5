"""Many adapters on one base: each a set of factors by path, put on a tree, added up, or mixed.

A tree is a snapshot.  Putting another adapter on the base makes another tree, so a forward
pass, a generation or a mixed batch that is running keeps the adapters that it began with.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..engine.backend import device_of, to_device, xp_of
from ..engine.errors import AdapterError
from ..engine.ops import concat
from ..engine.rules import wide
from ..engine.tensor import Tensor
from ..model.layers import Embedding, Rng, is_linear
from ..model.module import freeze, module, rebuild, walk
from ..model.targets import ALL_LINEAR, select
from .lora import (
    LoRAEmbedding,
    LoRALinear,
    expect_plain,
    is_adaptable,
    is_adapter,
    scale_of,
)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
WAYS = ("concat", "linear", "svd")


class Factors(NamedTuple):
    """The two factors of one adapted module, and what scales them."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """s = alpha / r, or alpha / √r"""
        return scale_of(self.A.shape[0], self.alpha, self.rank_stabilized)


Adapter = Mapping[str, Factors]  # by the path of the module


def take(adapted: Any) -> Adapter:
    """The adapter of a tree, by path.  Arrays are shared; Parameters become Tensors.

    Errors: `AdapterError` if there is none, or for one that is more than s B A on its base,
    or one of a mixed batch.
    """
    for path, node in walk(adapted):
        if isinstance(node, MixedLoRA):
            node.merged()  # refuses: a layer is several
        if is_adapter(node):
            expect_plain("take", path, node)
    return factors(adapted)


def factors(adapted: Any) -> Adapter:
    """The factors of all adapters of a tree, whatever else these hold.  Errors: `AdapterError`."""
    found = {
        path: Factors(node.A, node.B, node.alpha, node.rank_stabilized, node.dropout)
        for path, node in walk(freeze(adapted))
        if is_adapter(node)
    }
    if not found:
        raise AdapterError("adapter: expected a model with adapters, found none")
    return found


def put(model: Any, adapter: Adapter) -> Any:
    """A new tree: the plain `model`, frozen, with the adapter on it.

    Errors: `AdapterError` for a path that is no module here, or factors that do not fit it.
    """
    return on_paths(model, adapter, wrapped)


def wrapped(node: Any, factors: Factors) -> LoRALinear | LoRAEmbedding:
    return (LoRAEmbedding if isinstance(node, Embedding) else LoRALinear)(node, *factors)


def on_paths(model: Any, by_path: Mapping[str, Any], wrap: Any) -> Any:
    """`wrap(node, value)` at each path.  Errors: `AdapterError` for a path without a module."""
    nodes = dict(walk(model))
    if any(is_adapter(node) for node in nodes.values()):
        raise AdapterError("adapter: expected a plain model, found one with adapters")
    for path in by_path:
        if not is_adaptable(nodes.get(path)):
            raise AdapterError(f"adapter: nothing to adapt at {path} in this model")
    return rebuild(
        freeze(model), lambda path, node: wrap(node, by_path[path]) if path in by_path else node
    )


class Adapters:
    """A base and named adapters; `model` is the tree in use, the base alone to begin with.

    `activate` and `disable` put another tree in its place in one step: who has read `model`
    before goes on with what it read, whatever other threads do.
    """

    def __init__(self, base: Any):
        if any(is_adapter(node) for _, node in walk(base)):
            raise AdapterError("Adapters: expected a plain base, found one with adapters")
        self.base = freeze(base)
        self.held: dict[str, Adapter] = {}
        self.current: tuple[str | None, Any] = (None, self.base)  # replaced as a whole
        self.lock = threading.Lock()  # for changes of `held`; readers need none

    @property
    def model(self) -> Any:
        """The tree in use."""
        return self.current[1]

    @property
    def active(self) -> str | None:
        """The name of the adapter in use; None for the base."""
        return self.current[0]

    @property
    def names(self) -> list[str]:
        """What is held, in order of addition."""
        return list(self.held)

    def add(self, name: str, adapter: Adapter) -> None:
        """Hold an adapter under a new name (letters, digits, - and _, at most 64).

        Errors: `AdapterError` for another name, one that is taken, or factors that do not fit.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise AdapterError(f"name: expected 1 to 64 of A-Z a-z 0-9 _ -, found {name!r}")
        put(self.base, adapter)  # raises if it does not fit
        with self.lock:
            if name in self.held:
                raise AdapterError(f"add: {name!r} is there already; remove it first")
            self.held[name] = dict(adapter)

    def remove(self, name: str) -> None:
        """Forget an adapter.  Errors: `AdapterError` if it is not there, or is in use."""
        with self.lock:
            self.get(name)
            if name == self.active:
                raise AdapterError(f"remove: {name!r} is in use; activate another, or disable")
            del self.held[name]

    def get(self, name: str) -> Adapter:
        """An adapter by name.  Errors: `AdapterError` listing what is there."""
        if name not in self.held:
            raise AdapterError(f"expected one of {self.names}, found {name!r}")
        return self.held[name]

    def activate(self, name: str) -> Any:
        """Use this adapter from now on; returns the tree."""
        self.current = (name, put(self.base, self.get(name)))
        return self.model

    def disable(self) -> Any:
        """Use the base alone; returns it."""
        self.current = (None, self.base)
        return self.base

    def mixed(self, rows: Sequence[str | None]) -> Any:
        """A tree for a batch in which row n uses the adapter `rows[n]`, None for the base."""
        return mix(self.base, [None if name is None else self.get(name) for name in rows])


@module
class MixedLoRA:
    """y[n] = base(x)[n] + detour of the adapter of row n: one base product for all rows.

    `order` lists the rows adapter by adapter, `counts` how many each has, `back` undoes it.
    """

    base: Any  # a linear or an embedding
    nodes: tuple[LoRALinear | LoRAEmbedding | None, ...]  # None: the rows without one
    counts: tuple[int, ...]
    order: Any  # (N,)
    back: Any  # (N,)

    def __call__(self, x: Any, rng: Rng | None = None) -> Tensor:
        if x.shape[0] != len(self.order):
            raise AdapterError(f"mixed batch: expected {len(self.order)} rows, found {x.shape[0]}")
        y, parts, start = self.base(x), [], 0
        for node, n in zip(self.nodes, self.counts, strict=True):
            rows = self.order[start : start + n]
            if node is None:
                parts.append(Tensor(xp_of(y.data).zeros_like(wide(y.data[:n]))))
            else:
                parts.append(node.detour(x[rows]))
            start += n
        return y + concat(*parts, axis=0)[self.back]

    def merged(self) -> NoReturn:
        """Errors: `AdapterError`, always: the rows have no one weight."""
        raise AdapterError(
            f"mixed batch: expected one adapter for all rows, found {len(self.nodes)} groups"
        )


def mix(model: Any, rows: Sequence[Adapter | None]) -> Any:
    """A new tree for batches of `len(rows)` rows, each with its own adapter or none.

    Errors: `AdapterError` for no rows, or as `put`.
    """
    if not rows:
        raise AdapterError("mixed batch: expected at least one row, found none")
    kinds: dict[int, Adapter | None] = {id(adapter): adapter for adapter in rows}
    order = np.concatenate([
        [n for n, adapter in enumerate(rows) if id(adapter) == kind] for kind in kinds
    ]).astype(np.int64)  # fmt: skip
    counts = tuple(sum(id(adapter) == kind for adapter in rows) for kind in kinds)
    device = device_of(model.norm.weight.data)
    places = {"order": to_device(order, device), "back": to_device(np.argsort(order), device)}
    paths = {path for adapter in kinds.values() if adapter for path in adapter}
    by_path = {path: [(a or {}).get(path) for a in kinds.values()] for path in paths}

    def wrap(node: Any, factors: list[Factors | None]) -> MixedLoRA:
        nodes = tuple(None if f is None else wrapped(node, f) for f in factors)
        return MixedLoRA(node, nodes, counts, **places)

    return on_paths(model, by_path, wrap)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    way: str = "concat",
    rank: int | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """One adapter for Σ w_i ΔW_i, and the relative error of its ΔW, path by path.

        "concat"   A = [A_1; A_2; ...],  B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]     exact, ranks add
        "linear"   A = Σ √|w_i s_i| A_i, B = Σ ±√|w_i s_i| B_i     B_i A_j with i ≠ j comes too
        "svd"      the nearest of rank `rank` to the sum           (Eckart and Young 1936)

    Errors: `AdapterError` for another way, other lengths, ranks that differ ("linear"), a rank
    that is missing ("svd"), or adapters of different modules where that has no meaning.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if way not in WAYS or not adapters or len(weights) != len(adapters):
        raise AdapterError(
            f"combine: expected a way in {WAYS} and a weight for each adapter; found {way!r}, "
            f"{len(adapters)} adapters, {len(weights)} weights"
        )
    if not np.isfinite(weights).all():
        raise AdapterError(f"combine: expected finite weights, found {weights}")
    if (way == "svd") != (rank is not None) or (rank is not None and rank < 1):
        raise AdapterError(f'combine: expected a rank >= 1 with "svd" only, found {rank}')
    made, errors = {}, {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        present = [(a[path], w) for a, w in zip(adapters, weights, strict=True) if path in a]
        xp = xp_of(present[0][0].A.data)
        A = xp.concatenate([f.A.data for f, _ in present])  # (Σ r, d_in)
        B = xp.concatenate([f.B.data * (w * f.scale) for f, w in present], axis=1)
        if way == "linear":
            ranks = {f.A.shape[0] for f, _ in present}
            if len(ranks) > 1:
                raise AdapterError(f"combine: {path}: expected one rank, found {sorted(ranks)}")
            roots = [abs(w * f.scale) ** 0.5 for f, w in present]
            signs = [-1.0 if w * f.scale < 0 else 1.0 for f, w in present]
            new_A = sum(c * f.A.data for c, (f, _) in zip(roots, present, strict=True))
            new_B = sum(
                c * sign * f.B.data for c, sign, (f, _) in zip(roots, signs, present, strict=True)
            )
        elif way == "svd":
            new_A, new_B = nearest(xp, A, B, min(rank, *A.shape, B.shape[0]))
        else:
            new_A, new_B = A, B
        # ‖B' A' - B A‖ = ‖[B', -B] [A'; A]‖, which needs no (d_out, d_in) product
        gap = size(xp, xp.concatenate([new_A, A]), xp.concatenate([new_B, -B], axis=1))
        whole = size(xp, A, B)
        errors[path] = 0.0 if way == "concat" or not whole else gap / whole
        made[path] = Factors(
            Tensor(new_A.astype(A.dtype)), Tensor(new_B.astype(A.dtype)), float(len(new_A))
        )
    return made, errors


def size(xp: Any, A: Any, B: Any) -> float:
    """‖B A‖ over all entries, from the two small Gram matrices: √ Σ (BᵀB) ∘ (AAᵀ)."""
    A, B = A.astype(xp.float64), B.astype(xp.float64)
    return float(xp.sqrt(xp.maximum(((B.T @ B) * (A @ A.T)).sum(), 0)))


def nearest(xp: Any, A: Any, B: Any, rank: int) -> tuple[Any, Any]:
    """The factors of rank `rank` nearest to B A, from a small SVD: B A = Q_B (R_B R_Aᵀ) Q_Aᵀ."""
    Qa, Ra = xp.linalg.qr(A.T.astype(xp.float64))
    Qb, Rb = xp.linalg.qr(B.astype(xp.float64))
    U, S, Vt = xp.linalg.svd(Rb @ Ra.T)
    root = xp.sqrt(S[:rank])
    return (root[:, None] * Vt[:rank]) @ Qa.T, Qb @ (U[:, :rank] * root)


def extract(
    base: Any, tuned: Any, rank: int, targets: Any = ALL_LINEAR
) -> tuple[Adapter, dict[str, float]]:
    """The adapter of rank `rank` nearest to a full fine-tune, and what it misses by path.

    ΔW = W_tuned - W_base = U S Vᵀ is cut after `rank` singular values; the error is the norm
    of what was cut, by that of ΔW (0 where nothing changed).  (Eckart and Young 1936.)
    Errors: `AdapterError` for a rank below 1, or trees whose linears differ.
    """
    if rank < 1:
        raise AdapterError(f"extract: expected a rank >= 1, found {rank}")
    old, new = dict(walk(base)), dict(walk(tuned))
    made, errors = {}, {}
    for path in select(base, targets):
        if path not in new or not is_linear(new[path]) or new[path].shape != old[path].shape:
            raise AdapterError(f"extract: expected a linear {old[path].shape} at {path} in both")
        change = wide(new[path].dense()) - wide(old[path].dense())
        dtype = change.dtype
        A, B, errors[path] = truncated(change, rank)
        made[path] = Factors(Tensor(A.astype(dtype)), Tensor(B.astype(dtype)), float(len(A)))
    return made, errors


def truncated(M: Any, rank: int) -> tuple[Any, Any, float]:
    """A (r, d_in), B (d_out, r) in float64 with B A nearest to M, and ‖M - B A‖ / ‖M‖.

    M = U S Vᵀ:  A = √S_r V_rᵀ,  B = U_r √S_r;  r is at most min(d_out, d_in).
    """
    xp = xp_of(M)
    U, S, Vt = xp.linalg.svd(M.astype(xp.float64), full_matrices=False)
    r = min(rank, len(S))
    root = xp.sqrt(S[:r])
    whole = float(xp.sqrt(xp.square(S).sum()))
    error = float(xp.sqrt(xp.square(S[r:]).sum())) / whole if whole else 0.0
    return root[:, None] * Vt[:r], U[:, :r] * root, error
