"""One model in several processes: each has some of the heads and some of the hidden channels.

A block is cut so that it meets twice: the matrices that read the residual stream by rows, those
that write to it by columns, whose products are added up (Shoeybi et al. 2019, Megatron-LM,
section 3).  With one token at a time a model does little else than read its weights; this way
each processor reads its own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import numpy as np

from ..engine.backend import xp_of
from ..engine.blas import one_blas_thread
from ..engine.errors import MiniloraError, expect_whole
from ..engine.forked import Forked, can_fork
from ..engine.rules import only_reference, wide
from ..engine.team import SLOT, Team, all_gather, all_reduce
from ..engine.tensor import Tensor
from ..engine.workers import working
from .generate import decoding_order
from .layers import MLP, GatedMLP, Linear, Rng
from .module import freeze, module, rebuild
from .transformer import Attention, PackedAttention, Transformer


@module
class SummedLinear:
    """y = x Wᵀ + b, where each process has some of the columns of W, and those of x."""

    part: Linear  # the bias has one of them
    team: Team

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        return Tensor(all_reduce(frozen(self.part(x)), team=self.team))


@module
class GatheredLinear:
    """y = x Wᵀ + b, where each process has some of the rows of W, and all get all of y."""

    part: Linear
    widths: tuple[int, ...]  # how many rows each has
    team: Team

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        return Tensor(all_gather(frozen(self.part(x)), team=self.team, widths=self.widths))


def frozen(y: Tensor) -> np.ndarray:
    """Its array.  Errors: `MiniloraError` where a gradient would end here."""
    if y.target is not None:
        raise MiniloraError("tensor parallel: expected an input that wants no gradient")
    return y.data


class TensorParallel:
    """A frozen model on `workers` processes: this one and copies forked from it.

    with TensorParallel(model, 2) as parallel:
        parallel.run(generate, prompts, 32)

    calls `generate(part, prompts, 32)` in each of them on its own part of the model, and returns
    what it returned here.  The function must do the same with the same numbers everywhere, as
    does all that draws from seeds.  The weights must stay as they are inside `with`, and a copy
    has all else as it was when it was made, at the first call of a function.  Sums are added in
    another order than by one process: to rounding, the numbers are the model's.
    Use as a context manager: BLAS has one thread in each of several processes meanwhile.
    Errors: `MiniloraError` for a model with other layers than Linears (merge adapters, dequantize
    codes first) or fewer key heads than workers, and where nothing can be forked.
    """

    def __init__(self, model: Any, workers: int):
        expect_parts(model, workers)
        self.whole, self.workers = freeze(model), workers
        logits = 8 * -(-model.config.vocab // workers)  # bytes of a row's, at most
        self.team = Team(workers, max(SLOT, logits))
        self.resources = ExitStack()
        self.copies: Forked | None = None
        self.made_for: Any = None  # the function that copies call, and by which rules
        self.part: Any = None
        self.at_work = False

    def __enter__(self) -> "TensorParallel":
        if self.part is not None:
            raise MiniloraError("tensor parallel: expected to be entered once at a time")
        with ExitStack() as stack:
            if self.workers > 1:
                stack.enter_context(one_blas_thread())
            self.part = part_of(self.whole, self.team)
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.let_go()
        finally:
            self.part = None
            self.resources.close()

    def run(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """`function(part, *arguments, **options)` in all processes, to which the arguments are
        sent; what the function returned in this one."""
        with self.together(function, arguments, options):
            value = function(self.part, *arguments, **options)
            if isinstance(value, Iterator):
                raise MiniloraError("tensor parallel: expected a value, found an iterator: stream")
            return value

    def stream(self, function: Callable, *arguments: Any, **options: Any) -> Iterator:
        """What `function` gives piece by piece, as `each_token` does.  Who stops asking stops
        all processes."""
        with self.together(function, arguments, options):
            yield from function(self.part, *arguments, **options)

    @contextmanager
    def together(self, function: Callable, arguments: tuple, options: dict) -> Iterator[None]:
        if self.part is None or self.at_work:
            raise MiniloraError(
                "tensor parallel: expected a call at a time, inside `with`; found "
                + ("one that has not ended" if self.at_work else "none entered")
            )
        self.at_work = True
        try:
            others = range(self.workers - 1)
            if others:
                self.have_copies(function)
            for copy in others:
                self.copies.ask(copy, arguments, options)
            yield
            if others:
                self.copies.results()
        except BaseException:  # they may wait for one that does not come any more
            self.let_go()
            raise
        finally:
            self.at_work = False

    def have_copies(self, function: Callable) -> None:
        """That call this function, by the rules of now: those that there are, or others."""
        made_for = (function, only_reference())
        if self.copies is None or self.made_for != made_for:
            self.let_go()
            self.made_for = made_for
            self.part = part_of(self.whole, self.team)  # again, of the same moment as theirs
            self.team.gather()
            self.copies = Forked(self.workers - 1, partial(self.follow, function), self.begin)
            self.team.watch = lambda rank: self.copies.left(rank - 1)

    def begin(self, copy: int) -> None:
        """In a copy: its own part."""
        self.team.begin(copy + 1)
        self.part = part_of(self.whole, self.team)

    def follow(self, function: Callable, arguments: tuple, options: dict) -> None:
        """In a copy: the same call, to its end.  The asker has what it gives already."""
        with working(None):  # threads are not copied
            value = function(self.part, *arguments, **options)
            if isinstance(value, Iterator):
                for _ in value:
                    pass

    def let_go(self) -> None:
        copies, self.copies = self.copies, None
        self.team.watch = lambda rank: nobody_is_left
        if copies is not None:
            copies.close()


def nobody_is_left() -> NoReturn:
    raise MiniloraError("tensor parallel: expected to be inside `with`, found the processes gone")


def expect_parts(model: Any, workers: int) -> None:
    """Can the model be cut into so many parts, and is there who would compute them?"""
    name = "tensor parallel"
    expect_whole(f"{name}: workers", workers, 1)
    if not isinstance(model, Transformer):
        raise MiniloraError(f"{name}: expected a Transformer, found {type(model).__name__}")
    if xp_of(model.norm.weight.data) is not np:
        raise MiniloraError(f"{name}: expected a model on the host, found one on a card")
    if workers > model.config.kv:
        raise MiniloraError(
            f"{name}: expected no more workers than key heads, "
            f"found {workers} for {model.config.kv}"
        )
    if workers > 1 and not can_fork():
        raise MiniloraError(f"{name}: expected Linux, and a process that may fork others")
    if workers > 1:
        try:
            import threadpoolctl  # noqa: F401
        except ImportError:
            raise MiniloraError(
                f'{name}: expected threadpoolctl, found none: pip install "minilora[fast]"'
            ) from None


def part_of(model: Any, team: Team) -> Any:
    """The part of a frozen model that is the process's own: heads, hidden channels and rows of
    the output head.  Norms, embeddings and the residual stream all of them have whole."""

    def mine(n: int, rank: int = team.rank) -> slice:
        return slice(n * rank // team.size, n * (rank + 1) // team.size)

    def some_rows(linear: Any, *slices: slice) -> Linear:
        W, b = weights(linear)
        kept = W[slices[0]] if len(slices) == 1 else np.concatenate([W[s] for s in slices])
        bias = None if b is None else Tensor(np.concatenate([b[s] for s in slices]))
        return Linear(laid_out(kept), bias)

    def some_columns(linear: Any, columns: slice) -> SummedLinear:
        W, b = weights(linear)
        bias = None if b is None or team.rank > 0 else Tensor(b)
        return SummedLinear(Linear(laid_out(W[:, columns]), bias), team)

    def convert(path: str, node: Any) -> Any:
        if isinstance(node, (Attention, PackedAttention)):
            heads, width = mine(node.key_heads), model.config.head_width
            group = node.heads // node.key_heads * width  # channels that share a key head
            q, k = stretch(heads, group), stretch(heads, width)
            changed = {
                "output": some_columns(node.output, q),
                "heads": (q.stop - q.start) // width,
                "key_heads": heads.stop - heads.start,
            }
            if isinstance(node, PackedAttention):
                H, K = node.heads * width, node.key_heads * width
                changed["qkv"] = some_rows(node.qkv, q, moved(k, H), moved(k, H + K))
            else:
                changed["query"] = some_rows(node.query, q)
                changed |= {name: some_rows(getattr(node, name), k) for name in ("key", "value")}
            return replace(node, **changed)
        if isinstance(node, (MLP, GatedMLP)):
            hidden = mine(weights(node.down)[0].shape[1])
            inputs = ("up",) if isinstance(node, MLP) else ("gate", "up")
            rows = {name: some_rows(getattr(node, name), hidden) for name in inputs}
            return replace(node, **rows, down=some_columns(node.down, hidden))
        if path == "head":
            outputs = [mine(len(weights(node)[0]), rank) for rank in range(team.size)]
            widths = tuple(s.stop - s.start for s in outputs)
            return GatheredLinear(some_rows(node, outputs[team.rank]), widths, team)
        return node

    return rebuild(model, convert)


def weights(linear: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """W and b of a plain Linear.  Errors: `MiniloraError` for anything else."""
    if not isinstance(linear, Linear):
        raise MiniloraError(
            "tensor parallel: expected plain Linears (merge adapters, dequantize codes first), "
            f"found a {type(linear).__name__}"
        )
    bias = None if linear.bias is None else wide(linear.bias.data)
    return wide(linear.weight.data), bias


def laid_out(W: np.ndarray) -> Tensor:
    """For decoding; where it lies like that already, the same memory."""
    return Tensor(np.asarray(W, order=decoding_order(*W.shape)))


def stretch(s: slice, factor: int) -> slice:
    return slice(s.start * factor, s.stop * factor)


def moved(s: slice, by: int) -> slice:
    return slice(s.start + by, s.stop + by)
