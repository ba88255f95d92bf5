"""A value that remembers how it was made, so that a gradient can find its way back.

The letters, everywhere in minilora:

    N T C H      batch, time, channels, heads; D = C / H, the width of a head
    d_in d_out   the two sides of a linear map;  r  rank,  alpha  its strength
    W0 A B       frozen weight (d_out, d_in), adapter factors (r, d_in) and (d_out, r)
    g            the incoming cotangent: the gradient of the loss by this op's value
    xp           the array library of the arguments: numpy or cupy
    rng          a numpy.random.Generator on the host
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .backend import as_array, is_array, to_numpy, xp_of
from .bf16 import BF16
from .errors import MiniloraError
from .graph import Node, pull, shared, together
from .rounding import in_two_bytes, moves, narrowed, parts
from .rules import Rule, common_library, wide


class Tensor:
    """An array plus the edges along which a gradient would flow back.

    `Tensor(data)` wraps a float array as it is; numbers and lists become float32.
    Errors: `MiniloraError` for integers and booleans: those are indices, not values.
    """

    __slots__ = ("data", "node", "slot", "__weakref__")
    __array_ufunc__ = None  # array + Tensor asks Tensor.__radd__

    def __init__(self, data: Any, node: Node | None = None, slot: int = 0):
        if type(data) is not np.ndarray:
            data = as_array(data)
        if data.dtype.kind not in "fc":
            expect_float(type(self).__name__, data)
        self.data, self.node, self.slot = data, node, slot

    # What an op asks: to whom is a cotangent owed?  None: to nobody.
    @property
    def target(self) -> "Node | Parameter | None":
        return self.node

    @property
    def edges(self) -> tuple:
        """The edges kept for the way back; () for a constant or a frozen result."""
        return (self.node.edges or ()) if self.node is not None else ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def numpy(self) -> np.ndarray:
        """The values on the host."""
        return to_numpy(self.data)

    def item(self) -> float:
        """The one value as a Python number (waits for the device)."""
        return self.data.item()

    def backward(self, cotangent: Any = None, into: dict | None = None) -> dict:
        """Gradients of this value by every Parameter that it was made from.

        Returns `{Parameter: array}`; with `into={Parameter: array}` it adds to those
        arrays in place and returns `into`.  Arrays returned may share memory with one
        another: read them, do not write to them.  The graph is freed on the way.
        A cotangent is stored as its value: float32 for a float32 Parameter (see `BF16`).
        Errors: `MiniloraError` if this is not one number and no cotangent is given, if
        nothing here wants a gradient, or if the graph has been walked before.
        """
        if cotangent is None:
            if self.data.size != 1:
                raise MiniloraError(
                    f"backward: expected a single number or a cotangent, found shape {self.shape}"
                )
            cotangent = xp_of(self.data).ones_like(wide(self.data))
        if self.target is None:
            raise MiniloraError("backward: nothing that this value was made from is a Parameter")
        return pull([self], [cotangent], into)

    def __repr__(self) -> str:
        made_by = "" if self.node is None else f", made by {self.node.name}"
        return f"{type(self).__name__}(shape {self.shape}, {self.dtype}{made_by})"

    def __add__(self, other: Any) -> "Tensor":
        return add(self, other)

    def __radd__(self, other: Any) -> "Tensor":
        return add(other, self)

    def __sub__(self, other: Any) -> "Tensor":
        return sub(self, other)

    def __rsub__(self, other: Any) -> "Tensor":
        return sub(other, self)

    def __mul__(self, other: Any) -> "Tensor":
        return mul(self, other)

    def __rmul__(self, other: Any) -> "Tensor":
        return mul(other, self)

    def __truediv__(self, other: Any) -> "Tensor":
        return div(self, other)

    def __rtruediv__(self, other: Any) -> "Tensor":
        return div(other, self)

    def __neg__(self) -> "Tensor":
        return neg(self)

    def __pow__(self, exponent: Any) -> "Tensor":
        return pow(self, exponent)

    def __matmul__(self, other: Any) -> "Tensor":
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> "Tensor":
        return matmul(other, self)

    def __getitem__(self, index: Any) -> "Tensor":
        return getitem(self, index=index)

    @property
    def T(self) -> "Tensor":
        return transpose(self)

    def sum(self, axis: Any = None, keepdims: bool = False) -> "Tensor":
        return sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> "Tensor":
        return mean(self, axis=axis, keepdims=keepdims)

    def reshape(self, *shape: int) -> "Tensor":
        return reshape(self, shape=shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: int) -> "Tensor":
        return transpose(self, axes=axes or None)


class Parameter(Tensor):
    """A Tensor that wants a gradient; the only one that an optimizer writes."""

    __slots__ = ()

    @property
    def target(self) -> "Parameter":
        return self


class Op(Rule):
    """A rule that also returns its pullbacks: `value, (pullback, ...)`, one per argument.

    Differentiable values are positional.  Only an argument that wants a gradient keeps
    its pullback; the others are dropped here, and with them all that they close over.
    """

    def rounded(self, value: Any, arguments: Sequence) -> Any:
        value, pullbacks = value
        narrow = tuple(type(a) is BF16 for a in arguments)  # closed over in place of the arrays
        if isinstance(pullbacks, together):
            pullbacks = together(narrowed(pullbacks.pullback, narrow))
        elif pullbacks is not None:
            pullbacks = tuple(map(narrowed, pullbacks, narrow))  # defaults not given have none
        return parts(in_two_bytes, value), pullbacks

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        arrays, parents, wants = [], [], []
        for value in arguments:
            parent = None
            if isinstance(value, Tensor):
                if value.node is not None or isinstance(value, Parameter):
                    parent = (value.target, value.slot)
                value = value.data
            elif isinstance(value, np.generic):
                value = value.item()  # so that float32 stays float32
            elif is_array(value):
                expect_float(self.__name__, value)
            elif not (value is None or isinstance(value, (int, float, complex))):
                raise MiniloraError(
                    f"{self.__name__}: expected Tensors, arrays, numbers or None, "
                    f"found {type(value).__name__}"
                )
            arrays.append(value)
            parents.append(parent)
            wants.append(parent is not None)
        for name, value in options.items():
            if isinstance(value, Tensor):
                raise MiniloraError(f"{self.__name__}: {name} takes no Tensor; pass .data")
        xp = common_library(self.__name__, arrays, options)
        wants = tuple(wants)
        value, pullbacks = self.run(xp, arrays, options, wants)

        if True not in wants or pullbacks is None:  # None: from a rule that was told so
            edges = ()
        elif isinstance(pullbacks, together):
            kept = tuple(parent for parent in parents if parent is not None)
            edges = ((kept, shared(pullbacks.pullback, wants)),)
        else:
            edges = tuple(
                ((parent,), pullback)
                for parent, pullback in zip(parents, pullbacks, strict=False)  # defaults not given
                if parent is not None
            )
        return wrap(self.__name__, value, edges)


def op(specification: Callable) -> Op:
    """Turn `f(xp, *arrays, **options) -> value, pullbacks` into a differentiable function."""
    return Op(specification)


def wrap(name: str, value: Any, edges: tuple) -> Any:
    """The Tensor, or the tuple of Tensors that share one node."""
    if isinstance(value, tuple):
        node = Node(name, edges, len(value)) if edges else None
        return tuple(Tensor(part, node, slot) for slot, part in enumerate(value))
    return Tensor(value, Node(name, edges) if edges else None)


def expect_float(name: str, array: Any) -> None:
    """Refuse integers and booleans where a differentiable value is due."""
    if array.dtype.kind not in "fc":
        raise MiniloraError(f"{name}: expected a float array, found dtype {array.dtype}")


# ------------------------------------------------- arithmetic, and what methods need


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array; () for a Python number."""
    return getattr(value, "shape", ())


def unbroadcast(g: Any, shape: tuple[int, ...]) -> Any:
    """Sum `g` over the axes along which an argument of `shape` was repeated."""
    if g.shape == shape:
        return g
    lead = g.ndim - len(shape)
    axes = tuple(i for i in range(g.ndim) if i < lead or shape[i - lead] == 1)
    return g.sum(axis=axes, keepdims=True).reshape(shape)


def swap(a: Any) -> Any:
    """Transpose the last two axes (a view)."""
    return a.swapaxes(-1, -2)


@op
def add(xp, a, b):
    """C = A + B.   dA = dB = dC"""
    sa, sb = shape_of(a), shape_of(b)
    return a + b, (lambda g: unbroadcast(g, sa), lambda g: unbroadcast(g, sb))


@op
def sub(xp, a, b):
    """C = A - B.   dA = dC   dB = -dC"""
    sa, sb = shape_of(a), shape_of(b)
    return a - b, (lambda g: unbroadcast(g, sa), lambda g: unbroadcast(-g, sb))


@op
def mul(xp, a, b):
    """C = A B, entry by entry.   dA = dC B   dB = dC A"""
    sa, sb = shape_of(a), shape_of(b)
    return a * b, (lambda g: unbroadcast(g * b, sa), lambda g: unbroadcast(g * a, sb))


@op
def div(xp, a, b):
    """C = A / B, entry by entry.   dA = dC / B   dB = -dC A / B²"""
    sa, sb = shape_of(a), shape_of(b)
    return a / b, (
        lambda g: unbroadcast(g / b, sa),
        lambda g: unbroadcast(-g * a / (b * b), sb),
    )


@op
def neg(xp, a):
    """C = -A.   dA = -dC"""
    return -a, (lambda g: -g,)


@op
def pow(xp, a, b):
    """C = A^B, entry by entry.   dA = dC B A^(B-1)   dB = dC A^B log A"""
    sa, sb = shape_of(a), shape_of(b)
    value = power(a, b)
    return value, (
        lambda g: unbroadcast(g * b * power(a, b - 1), sa),
        lambda g: unbroadcast(g * value * xp.log(a), sb),
    )


def power(a: Any, b: Any) -> Any:
    """a^b; small whole exponents as products, 300 times faster than NumPy's float32 power."""
    if isinstance(b, int) and 1 <= b <= 4 and is_array(a):
        value = a
        for _ in range(b - 1):
            value = value * a
        return value
    return a**b


@op
def matmul(xp, a, b):
    """C = A B over the last two axes.   dA = dC Bᵀ   dB = Aᵀ dC"""
    sa, sb = a.shape, b.shape
    if len(sa) < 2 or len(sb) < 2 or sa[-1] != sb[-2]:
        raise MiniloraError(f"matmul: expected (..., n, k) and (..., k, m), found {sa} and {sb}")
    return a @ b, (
        lambda g: unbroadcast(g @ swap(b), sa),
        lambda g: unbroadcast(swap(a) @ g, sb),
    )


@op
def sum(xp, x, *, axis=None, keepdims=False):
    """y = Σ x over `axis` (all axes for None).   dx = dy, repeated"""
    shape = x.shape
    return x.sum(axis=axis, keepdims=keepdims), (
        lambda g: xp.broadcast_to(reopened(g, shape, axis, keepdims), shape),
    )


@op
def mean(xp, x, *, axis=None, keepdims=False):
    """y = Σ x / n over `axis`.   dx = dy / n, repeated"""
    shape = x.shape
    value = x.mean(axis=axis, keepdims=keepdims)
    n = x.size // max(1, value.size)
    return value, (lambda g: xp.broadcast_to(reopened(g / n, shape, axis, keepdims), shape),)


def reopened(g: Any, shape: tuple[int, ...], axis: Any, keepdims: bool) -> Any:
    """Give a reduced array back the axes of length 1 that the reduction dropped."""
    if keepdims:
        return g
    axes = range(len(shape)) if axis is None else (axis if isinstance(axis, tuple) else (axis,))
    dropped = {a % len(shape) for a in axes}
    return g.reshape(tuple(1 if i in dropped else n for i, n in enumerate(shape)))


@moves
@op
def reshape(xp, x, *, shape):
    """The same entries in another shape.   dx = dy in the old one"""
    old = x.shape
    return x.reshape(shape), (lambda g: g.reshape(old),)


@moves
@op
def transpose(xp, x, *, axes=None):
    """Permute the axes (reverse them for None).   dx = dy, permuted back"""
    back = None if axes is None else tuple(int(i) for i in np.argsort([a % x.ndim for a in axes]))
    return x.transpose(axes), (lambda g: g.transpose(back),)


@op
def getitem(xp, x, *, index):
    """y = x[index].   dx = 0 but for dx[index] += dy, repeated indices adding up"""
    shape, plain = x.shape, names_each_once(index)

    def pullback(g):
        dx = xp.zeros(shape, g.dtype)
        if plain:
            dx[index] = g
        else:
            xp.add.at(dx, index, g)
        return dx

    return x[index], (pullback,)


def names_each_once(index: Any) -> bool:
    """Is this an index of slices and numbers, under which no entry comes twice?"""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in parts)


moves(getitem, lambda wants, index: not wants[0] or names_each_once(index))
