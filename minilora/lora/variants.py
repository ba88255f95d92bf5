"""Relatives of LoRA: two other places to start from, and one more thing that trains.

    PiSSA   s B A starts as the best part of rank r of W0 itself; what is left of W0 stays
    LoftQ   s B A starts as the best part of rank r of what codes lose of W0
    DoRA    each row of W0 + s B A keeps its direction and gets a length m that trains

Each takes an adapted tree and gives another:  pissa(adapt(model, rank=8, alpha=8, rng=rng)).
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..engine.check import expect_finite
from ..engine.errors import AdapterError, expect_whole
from ..engine.progress import progress
from ..engine.rules import rule, wide
from ..engine.tensor import Parameter, Tensor
from ..model.layers import Linear, LinearLike, Rng
from ..model.module import branches, module, parameters, rebuild, walk
from .adapters import Adapter, combine, factors, truncated
from .lora import LoRALinear, expect_plain

Quantize = Callable[[Linear], LinearLike]


@module
class SplitLinear(LoRALinear):
    """A LoRALinear that began by splitting W0 into its base and s B A.

    On W0 itself its factors are another function: they are not taken or saved alone.  `learned`
    gives what training changed as an adapter for W0, `merge` a whole model.
    """


def pissa(adapted: Any, quantize: Quantize | None = None) -> Any:
    """A new tree whose adapters start as the principal part of their weights.

    W0 = U S Vᵀ:  A = √(S_r/s) V_rᵀ  (r, d_in),  B = U_r √(S_r/s)  (d_out, r), and what stays is
    W0 - s B A, or what `quantize` makes of a Linear with that weight (QPiSSA); where W0 was in
    bfloat16, in float32.  Unquantized, the model is what it was, to rounding; but the directions
    in which W0 does most are now those that train.  (Meng et al. 2024, section 3.)
    Errors: `AdapterError`, `NumericsError` as `loftq`.
    """

    def start(W0: Any, base: Linear, rank: int, scale: float) -> tuple:
        A, B = principal(W0, rank, scale)
        left = remainder(base, W0, A, B, scale)
        return left if quantize is None else quantize(left), A, B

    return split(adapted, start)


def loftq(adapted: Any, quantize: Quantize, rounds: int = 1) -> Any:
    """A new tree on a quantized base, whose adapters start as what quantization lost.

    Each round takes Q = quantize(W0 - s B A), at first with s B A = 0, then the s B A of rank r
    nearest to W0 - Q.  After one, Q is the base of QLoRA, and ‖W0 - Q - s B A‖ is at most
    ‖W0 - Q‖; more rounds need not lower it further, because the quantizer does not minimize it.
    `quantize` maps a Linear to what stands in its place, e.g. `minilora.quant.linear.quantize`.
    (Li et al. 2023, algorithm 1.  PEFT's `loftq_init` leaves out s: it is right for s = 1.)
    Errors: `MiniloraError` for rounds that are no whole number >= 1; `AdapterError` for a tree
    without adapters, or an adapter that is not plain LoRA on a plain Linear, has s <= 0, or a rank
    above min(d_out, d_in); `NumericsError` for a weight that is not finite.
    """
    expect_whole("rounds", rounds, 1)

    def start(W0: Any, base: Linear, rank: int, scale: float) -> tuple:
        left = base
        for _ in range(rounds):
            kept = quantize(left)
            A, B = principal(W0 - wide(kept.dense()), rank, scale)
            left = remainder(base, W0, A, B, scale)
        return kept, A, B

    return split(adapted, start)


def principal(W: Any, rank: int, scale: float) -> tuple[Any, Any]:
    """A (r, d_in), B (d_out, r) with s B A the matrix of rank r nearest to W (Eckart, Young)."""
    A, B, _ = truncated(W, rank)
    root = scale**0.5
    return (A / root).astype(W.dtype), (B / root).astype(W.dtype)


def remainder(base: Linear, W0: Any, A: Any, B: Any, scale: float) -> Linear:
    """The Linear of W0 - s B A."""
    return Linear(Tensor(W0 - scale * (B @ A)), base.bias)


def split(adapted: Any, start: Callable[..., tuple]) -> Any:
    """The tree with a SplitLinear of what `start(W0, base, rank, scale)` gives at each adapter."""
    nodes = plain_adapters(adapted)
    for path, node in nodes.items():
        if type(node.base) is not Linear:
            kind = type(node.base).__name__
            raise AdapterError(f"{at(path)}expected an adapter on a plain Linear, found a {kind}")
        if not node.scale > 0 or node.rank > min(node.base.shape):
            raise AdapterError(
                f"{at(path)}expected s > 0 and a rank up to {min(node.base.shape)}, "
                f"found s = {node.scale:g} and rank {node.rank}"
            )
    made = {}
    for path, node in progress(nodes.items(), total=len(nodes), label="singular values"):
        W0 = wide(node.base.dense())
        expect_finite(f"{at(path)}weight", W0)
        base, A, B = start(W0, node.base, node.rank, node.scale)
        made[path] = SplitLinear(
            base, type(node.A)(A), type(node.B)(B), node.alpha, node.rank_stabilized, node.dropout
        )
    return rebuild(adapted, lambda path, node: made.get(path, node))


def plain_adapters(adapted: Any) -> dict[str, LoRALinear]:
    """The adapters on linears by path; those on embeddings stay as they are.

    Errors: `AdapterError` if there are none, or for one that is no plain LoRA.
    """
    nodes = {path: node for path, node in walk(adapted) if isinstance(node, LoRALinear)}
    if not nodes:
        raise AdapterError("adapter: expected a model with adapters on its linears, found none")
    for path, node in nodes.items():
        expect_plain("adapter", path, node)
    return nodes


def at(path: str) -> str:
    """What an error begins with; nothing where the tree is the adapter itself."""
    return f"{path}: " if path else ""


def learned(start: Any, trained: Any) -> Adapter:
    """What training changed, as an adapter of rank 2 r for W0:  s (B A - B_start A_start).

    After `pissa`, put on the model as it was before, it is the trained model, to rounding; where
    the base was quantized, it is what was learned on the way, on weights that lost nothing.
    (The same conversion stands in PEFT's guide to PiSSA.)
    Errors: `AdapterError` for trees without adapters, or whose adapters are not the same modules;
    and for DoRA, of whose change the factors are a part.
    """
    for path, node in (*walk(start), *walk(trained)):
        if isinstance(node, DoRALinear):
            raise AdapterError(
                f"learned: {at(path)}expected factors alone, found a DoRALinear: merge it"
            )
    before, after = factors(start), factors(trained)
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise AdapterError(f"learned: expected the same adapters in both trees, found {odd[:3]}")
    return combine([after, before], [1.0, -1.0])[0]


# ------------------------------------------------------------------------------- DoRA


@rule
def row_lengths(xp, A, B, *, base, scale):
    """n_i = ‖(W0 + s B A)_i‖, the length of each row: (d_out,)"""
    W = wide(base.dense()) + scale * (B @ A)
    return xp.sqrt(xp.square(W).sum(axis=1))


@module
class DoRALinear(LoRALinear):
    """y = c (W0 + s B A) x + b   with c = m / n, row by row;   n_i = ‖(W0 + s B A)_i‖.

    The direction of a row is LoRA's, its length m_i is a number that trains.  (A row of W here,
    as in PEFT; the paper, whose W is turned, writes columns.)  n is taken as a constant on the
    way back, which saves its gradient (Liu et al. 2024, section 4.3; PEFT does the same).
    Dropout acts on the adapter's input, as in LoRA (in PEFT also on (c - 1) W0 x).  In bfloat16
    y is rounded before c, and a change of c by a thousandth is lost.
    Errors: `AdapterError` as LoRALinear, or for an m that is not (d_out,).
    """

    magnitude: Tensor | None = None  # m (d_out,)

    def __post_init__(self) -> None:
        super().__post_init__()
        found = None if self.magnitude is None else self.magnitude.shape
        if found != (self.base.shape[0],):
            raise AdapterError(
                f"DoRALinear: expected magnitude ({self.base.shape[0]},), found {found}"
            )

    def lengths(self) -> Any:
        """n, an array (d_out,)."""
        return row_lengths(self.A.data, self.B.data, base=self.base, scale=self.scale)

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        y = super().__call__(x, rng)
        c = self.magnitude / Tensor(self.lengths())
        if self.base.bias is None:
            return y * c
        return y * c + self.base.bias * (1 - c)  # the bias itself keeps its length

    def delta(self) -> Any:
        """ΔW = c (W0 + s B A) - W0, an array (d_out, d_in)."""
        W0 = wide(self.base.dense())
        c = self.magnitude.data / self.lengths()
        return c[:, None] * (W0 + self.scale * (self.B.data @ self.A.data)) - W0


def dora(adapted: Any) -> Any:
    """A new tree in which each adapter also trains the lengths of its rows; the base may be
    quantized (QDoRA).  Factors are shared; adapters on embeddings stay as they are.

    m starts as the row lengths of W0 + s B A as it is, so that step 0 is the model itself.
    Errors: `AdapterError` for a tree without adapters, one that is not plain LoRA, or a row of
    W0 + s B A that is zero: it has no direction; `NumericsError` for one that is not finite.
    """
    lengths = {}
    for path, node in plain_adapters(adapted).items():
        n = row_lengths(node.A.data, node.B.data, base=node.base, scale=node.scale)
        expect_finite(f"{at(path)}row lengths", n)
        if not (n > 0).all():
            row = int(n.argmin())
            raise AdapterError(f"{at(path)}row {row} of the weight is zero: it has no direction")
        lengths[path] = (Parameter if parameters(node) else Tensor)(n)
    return with_lengths(adapted, lengths)


def with_lengths(adapted: Any, lengths: Mapping[str, Tensor]) -> Any:
    """The tree with a DoRALinear of these m in place of the LoRALinear at each path."""

    def wrap(path: str, node: Any) -> Any:
        if path not in lengths:
            return node
        return DoRALinear(*(getattr(node, name) for name in branches(LoRALinear)), lengths[path])

    return rebuild(adapted, wrap)
