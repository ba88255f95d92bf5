"""A strict stand-in for CuPy: NumPy computes, CuPy's refusals stand guard, a meter counts.

What CuPy 14 refuses, this refuses: host arrays beside device arrays, implicit conversion,
functions, methods and keywords that CuPy lacks, a device number as a shape.  It is stricter
where CuPy goes on in silence:

    np.f(device array)        works there; here only np.save does, for `xp` is the one door
    a list or host index      is copied to the device there
    an index out of range     wraps around there
    a[i] = v, i with repeats  leaves there what happened to come last
    empty(...)                holds there what the pool left; here NaN, or -1
    add.at(...)               adds there in whatever order; here so inside `disordered()`

`stats` counts.  A call that takes or writes memory is one launch, a view is none.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass
class Stats:
    """What crossed the border, and what lives beyond it."""

    h2d: int = 0  # copies from the host
    d2h: int = 0  # copies to the host
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    syncs: int = 0  # how often the host waited
    launches: int = 0
    allocations: int = 0
    used: int = 0  # bytes
    peak: int = 0
    budget: int | None = None
    may_wait: bool = True  # False inside `no_sync`


stats = Stats()


class OutOfMemoryError(MemoryError):
    """The budget given to `reset` is spent."""


def reset(budget: int | None = None) -> Stats:
    """Zero the counts, keep what lives, and allow `budget` bytes in all (None: any number)."""
    vars(stats).update(vars(Stats(used=stats.used, peak=stats.used, budget=budget)))
    return stats


@contextmanager
def no_sync() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises `RuntimeError`."""
    before, stats.may_wait = stats.may_wait, False
    try:
        yield
    finally:
        stats.may_wait = before


def wait(reason: str) -> None:
    """Count one synchronization, or refuse it."""
    if not stats.may_wait:
        raise RuntimeError(f"{reason} waits for the device inside no_sync()")
    stats.syncs += 1


# ---------------------------------------------------------------------- the streams
class Stream:
    """A queue of copies, each run as late as is legal: when something waits for it.

    The null stream, on which all else is computed, never falls behind.
    """

    def __init__(self, null: bool = False, non_blocking: bool = False):
        self.null, self.queue, self.done = null, [], 0

    def issue(self, act: Callable[[], Any]) -> None:
        self.queue.append(act)
        if self.null:
            self.run()

    def run(self, until: int | None = None) -> None:
        """Whatever was issued, or the first `until` acts of it."""
        end = len(self.queue) if until is None else until
        while self.done < end:
            act, self.queue[self.done] = self.queue[self.done], None
            self.done += 1
            act()

    def record(self) -> "Event":
        return Event(self, len(self.queue))

    def wait_event(self, event: "Event") -> None:
        self.issue(lambda: event.stream.run(event.position))

    def synchronize(self) -> None:
        wait("synchronize")
        self.run()


@dataclass(frozen=True)
class Event:
    """A place in the queue of a stream."""

    stream: Stream
    position: int


null_stream = Stream(null=True)
get_current_stream = lambda: null_stream


def set_limit(size: int = 0) -> None:
    """The pool's limit is the budget; 0 lifts it."""
    stats.budget = size or None


pool = SimpleNamespace(  # which keeps nothing back
    set_limit=set_limit, total_bytes=lambda: stats.used, free_all_blocks=lambda: None
)


def alloc_pinned_memory(nbytes: int) -> bytearray:
    """Host memory with whatever was there."""
    return bytearray(b"\xff" * nbytes)


# ------------------------------------------------------------------------ the array
NUMBERS = (int, float, complex, np.generic)
PLAIN = words("shape ndim size nbytes itemsize strides flags")  # known to the host
FETCHED = words("item tolist __bool__ __int__ __float__ __complex__ __repr__ __str__ __format__")
MISSING_METHODS = words(  # and what nobody here needs
    "ctypes getfield resize setfield setflags to_device data device dump dumps flat tobytes tofile"
)
OPERATORS = words(
    "add subtract multiply matmul divide floor_divide remainder divmod power left_shift "
    "right_shift bitwise_and bitwise_or bitwise_xor invert negative positive absolute less "
    "less_equal equal not_equal greater greater_equal"
)


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the device.  `base` is the array whose memory it looks at, None for its own."""

    __module__ = "cupy"
    __slots__ = ("_a", "base", "owned", "__weakref__")
    __hash__ = None
    __imatmul__ = np.lib.mixins.NDArrayOperatorsMixin.__matmul__  # a @= b makes a new array
    __len__ = lambda self: len(self._a)
    __iter__ = lambda self: (self[i] for i in range(len(self)))
    __reduce__ = lambda self: (asarray, (self.get(),))
    dtype = property(lambda self: self._a.dtype)  # CuPy's is an attribute of the class too
    data = property(lambda self: SimpleNamespace(ptr=self._a.ctypes.data))  # an address, no look

    def __init__(self, host: np.ndarray, base: "ndarray | None", owned: int):
        self._a, self.base, self.owned = host, base, owned
        stats.allocations += owned > 0
        stats.used += owned
        stats.peak = max(stats.peak, stats.used)

    def __del__(self) -> None:
        stats.used -= self.owned

    def __getattr__(self, name: str) -> Any:
        kind = getattr(np.ndarray, name, None)
        if kind is None or name.startswith("__") or name in MISSING_METHODS:
            raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")
        if callable(kind):
            return partial(call, kind, self)
        return getattr(self._a, name) if name in PLAIN else on_device(getattr(self._a, name))

    def get(self, stream: Any = None, out: Any = None, blocking: bool = True) -> np.ndarray:
        """A copy on the host: the one door out, through which item, float, print, ... go too."""
        stream = stream or get_current_stream()
        stats.d2h += 1
        stats.d2h_bytes += self.nbytes
        host = np.empty(self.shape, self.dtype) if out is None else out
        stream.issue(lambda: np.copyto(host, self._a))
        if blocking:
            wait("a copy to the host")
            stream.run()
        return host

    def set(self, host: np.ndarray, stream: Any = None) -> None:
        """Overwrite with a host array."""
        if not isinstance(host, np.ndarray) or (host.dtype, host.shape) != (self.dtype, self.shape):
            raise TypeError(f"set: expected a host array, {self.dtype} {self.shape}")
        (stream or get_current_stream()).issue(lambda: np.copyto(self._a, host))
        stats.h2d += 1
        stats.h2d_bytes += self.nbytes

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed; use .get()")

    def __array_ufunc__(self, host: np.ufunc, method: str, *args: Any, **options: Any) -> Any:
        """What an operator comes to; for host + device and np.float32(2) * device as well."""
        if method != "__call__" or host.__name__ not in OPERATORS:
            raise TypeError(f"np.{host.__name__} of a device array; use xp.{host.__name__}")
        if "out" in options:
            (options["out"],) = options["out"]
        return ufunc(host)(*args, **options)

    def __array_function__(self, host: Callable, types: Any, args: Any, options: Any) -> Any:
        if host is np.save:  # CuPy answers it, with a hidden copy to the host
            return np.save(*map(asnumpy, args), **{k: asnumpy(v) for k, v in options.items()})
        raise TypeError(f"np.{host.__name__} of a device array; use xp.{host.__name__}")

    def __getitem__(self, index: Any) -> "ndarray":
        place, arrays = host_index(index)
        return made(lambda: np.array(self._a[place]) if arrays else self._a[place])

    def __setitem__(self, index: Any, value: Any) -> None:
        place, arrays = host_index(index)
        if not isinstance(value, (ndarray, *NUMBERS)):
            raise TypeError(f"Unsupported type {type(value)} written to device memory")
        if isinstance(value, ndarray):
            if self._a[place].__array_interface__ == value._a.__array_interface__:
                return  # the last act of `a[i] += b`, for which CuPy launches nothing either
            if arrays and value.size > 1:
                places = np.arange(self.size).reshape(self.shape)[place]
                if np.unique(places).size < places.size:
                    raise ValueError("a[i] = v where i repeats a place: undefined on a GPU")
        made(lambda: self._a.__setitem__(place, host_of(value)), writes=True)


for _name in FETCHED:
    setattr(ndarray, _name, lambda self, *args, name=_name: getattr(self.get(), name)(*args))

roots: WeakValueDictionary[int, ndarray] = WeakValueDictionary()  # by the id of the bytes' owner


def adopt(host: np.ndarray) -> ndarray:
    """The device array over `host`: a view of the array that owns its bytes, or their owner."""
    owner = host
    while getattr(owner, "base", None) is not None:
        owner = owner.base
    root = roots.get(id(owner))
    if root is not None and root._a is host:
        return root
    size = 0 if root is not None else owner.nbytes
    if host.dtype.char not in "?bhilqBHILQefdFD":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    if size and stats.budget is not None and stats.used + size > stats.budget:
        raise OutOfMemoryError(f"{size:,} bytes asked, {stats.used:,} of {stats.budget:,} used")
    array = ndarray(host, root, size)
    if root is None:
        roots[id(owner)] = array
    return array


def host_index(index: Any) -> tuple[tuple, list[ndarray]]:
    """The index for NumPy, and the device arrays in it; where there are none it makes a view."""
    parts = index if isinstance(index, tuple) else (index,)
    arrays = [part for part in parts if isinstance(part, ndarray)]
    if any(isinstance(part, (list, np.ndarray)) for part in parts):
        raise TypeError("a list or a host array as an index: a hidden copy to the device")
    if any(array.dtype == bool for array in arrays):
        if len(arrays) > 1:
            raise ValueError("CuPy takes one boolean mask and no index array beside it")
        wait("a boolean mask as an index")
    place = tuple(map(host_of, parts))
    if not arrays and not any(part is Ellipsis for part in parts):
        place += (Ellipsis,)  # a[3] is a 0-d view, as in CuPy; NumPy would copy a number out
    return place, arrays


# ------------------------------------------------------------------------- the call
REFUSED = words("where initial like subok device stable correction mode")
ALLOWED = {("copyto", "where"), ("pad", "mode")}
WAITS = words("nonzero argwhere flatnonzero unique compress extract choose bincount intersect1d")
ATOMIC = words("add subtract maximum minimum bitwise_and bitwise_or bitwise_xor")
WRITES = words("copyto fill put sort partition")
# Later arguments may be whole numbers of the device; elsewhere those are shapes, axes, counts.
VALUES = words("where copyto take put clip searchsorted fill full_like isclose allclose dot outer")


def flat(values: Iterable) -> list:
    """The values, and what lists and tuples among them hold."""
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]


def host_of(value: Any) -> Any:
    """What NumPy is given for `value`; a host array is refused, in lists and tuples too."""
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {np.ndarray}: a host array among device arrays")
    if isinstance(value, (list, tuple)):
        return type(value)(map(host_of, value))
    return value


def on_device(value: Any) -> Any:
    """What NumPy returned, as CuPy would: arrays, of no dimension where NumPy has numbers."""
    if isinstance(value, (np.ndarray, *NUMBERS)):
        return adopt(np.asarray(value))
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(on_device, value))
    return value


def made(compute: Callable[[], Any], writes: bool = False) -> Any:
    """The result of `compute`; counted as a launch if it took memory, or `writes`."""
    before = stats.allocations
    with np.errstate(all="ignore"):  # a GPU gives no floating-point warnings
        result = on_device(compute())
    stats.launches += writes or stats.allocations > before
    return result


def call(function: Callable, *args: Any, **options: Any) -> Any:
    """The one path by which NumPy computes on device arrays."""
    name, out = function.__name__, options.get("out")
    later = (*args[name not in CREATION :], *options.values())
    if odd := {o for o in options if o in REFUSED and (name, o) not in ALLOWED}:
        raise TypeError(f"{name}() got an unexpected keyword argument: {', '.join(odd)}")
    if name not in VALUES and not isinstance(function, np.ufunc):
        for value in flat(later):
            if isinstance(value, ndarray) and value.ndim == 0 and value.dtype.kind in "iu":
                raise TypeError("'cupy.ndarray' object cannot be interpreted as an integer")
    counts = name == "repeat" and any(isinstance(value, ndarray) for value in later)
    if name in WAITS or counts or (name == "where" and len(args) == 1):
        wait(name)
    compute = lambda: function(*map(host_of, args), **{k: host_of(v) for k, v in options.items()})
    if name in ("empty", "empty_like"):
        host = compute()
        host.ravel("K").view(np.uint8)[...] = 0xFF
        return adopt(host)
    result = made(compute, writes=out is not None or name in WRITES)
    return result if out is None else out


atomics: np.random.Generator | None = None  # draws who is first; None: as they come


@contextmanager
def disordered() -> Iterator[None]:
    """Inside, `add.at` adds as atomics do: what goes to one entry, in another order each time."""
    global atomics
    atomics = np.random.default_rng(0)
    try:
        yield
    finally:
        atomics = None


def in_any_order(at: Callable, target: np.ndarray, place: tuple, values: Any) -> None:
    """`at`, in order or not."""
    if atomics is None:
        return at(target, place, values)
    spots = np.asarray(np.arange(target.size).reshape(target.shape)[place])
    order = atomics.permutation(spots.size)
    values = np.broadcast_to(np.asarray(values, target.dtype), spots.shape)
    where = np.unravel_index(spots.reshape(-1)[order], target.shape)
    return at(target, where, values.reshape(-1)[order])


class ufunc:
    """An entry-by-entry function, with those of its methods that CuPy has."""

    def __init__(self, host: np.ufunc):
        self.host, self.__name__ = host, host.__name__

    def __call__(self, *args: Any, **options: Any) -> Any:
        for value in args:
            if not isinstance(value, (ndarray, *NUMBERS)):
                raise TypeError(f"Unsupported type {type(value)}")
        return call(self.host, *args, **options)

    def __getattr__(self, method: str) -> Any:
        if method not in ("at", "reduce", "accumulate"):
            raise AttributeError(f"'cupy.ufunc' object has no attribute {method!r}")
        if self.__name__ not in (ATOMIC if method == "at" else ("add", "multiply")):
            raise NotImplementedError(f"`cupy_{self.__name__}.{method}` is not supported yet")
        return self._at if method == "at" else partial(call, getattr(self.host, method))

    def _at(self, target: ndarray, indices: Any, values: Any = None) -> None:
        if target.dtype.char in "?bBhHFD":
            raise TypeError(f"{self.__name__}.at: no atomic operation on {target.dtype}")
        place, _ = host_index(indices)
        made(lambda: in_any_order(self.host.at, target._a, place, host_of(values)), writes=True)


# ---------------------------------------------------------------------- the library
MISSING = words(  # functions and dtypes of NumPy 2.4 that CuPy 14.2 has not
    "asmatrix block bmat bytes_ clongdouble complex256 datetime64 einsum_path float128 frompyfunc "
    "geomspace geterr histogram_bin_edges insert isnat longdouble matvec nanpercentile nanquantile "
    "object_ polyder polydiv polyint seterr spacing str_ timedelta64 unstack vecdot vecmat void"
)
NO_LINALG = words("diagonal matrix_norm multi_dot outer svdvals tensordot trace vecdot vector_norm")
GENERATOR = words("binomial exponential integers random standard_normal uniform")  # and a few more
CREATION = words("empty zeros ones full arange linspace logspace eye identity tri indices")
ABOUT = words("result_type can_cast promote_types issubdtype broadcast_shapes shape ndim size")


def function(host: Callable, *args: Any, **options: Any) -> Any:
    """A function of NumPy as one of CuPy, which takes device arrays and nothing like them."""
    name, first, *_ = host.__name__, *args, *options.values()
    if name in ABOUT:
        return host(*map(host_of, args), **options)
    if name not in CREATION and not isinstance(first, str):  # the formula of einsum
        for value in flat([first]):
            if not isinstance(value, ndarray):
                raise TypeError(f"{name}: expected a device array, found {type(value)}")
    return call(host, *args, **options)


def asarray(source: Any, dtype: Any = None, copy: bool = False) -> ndarray:
    """`source` on the device: the door in.  A device array of this dtype is returned itself."""
    if isinstance(source, ndarray):
        return source.astype(dtype or source.dtype, copy=copy)
    array = adopt(np.array(source, dtype))
    if array.ndim:
        stats.h2d += 1
        stats.h2d_bytes += array.nbytes
    else:
        stats.launches += 1  # a single number travels as a kernel's argument
    return array


asnumpy = lambda value: value.get() if isinstance(value, ndarray) else value


def default_rng(seed: Any = None) -> SimpleNamespace:
    """Random numbers made on the device: few methods, and not the numbers of NumPy."""
    rng = np.random.default_rng(seed)
    return SimpleNamespace(**{name: partial(call, getattr(rng, name)) for name in GENERATOR})


class Library(ModuleType):
    """What CuPy has of a NumPy module, each name made on first use."""

    def __init__(self, name: str, host: ModuleType, missing: frozenset[str], **own: Any):
        super().__init__(name)
        vars(self).update(own, _host=host, _missing=missing)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._host, name, self)
        has = not (name.startswith("_") or name in self._missing or isinstance(value, ModuleType))
        if isinstance(value, type):
            has &= issubclass(value, (np.generic, np.dtype, np.finfo, np.iinfo))
        elif isinstance(value, np.ufunc):
            value = ufunc(value)
        elif callable(value):
            value = partial(function, value)
        else:
            has &= value is None or isinstance(value, float)  # newaxis, pi, inf
        if not has:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        setattr(self, name, value)
        return value


@cache
def build() -> ModuleType:
    """The module, the same one each time; `sys.modules` is left as it is."""
    device = SimpleNamespace(id=0, synchronize=partial(wait, "synchronize"))
    cuda = SimpleNamespace(
        Device=lambda number=0: device, get_current_stream=get_current_stream, Stream=Stream,
        set_allocator=lambda malloc: None,
        alloc_pinned_memory=alloc_pinned_memory,
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        runtime=SimpleNamespace(getDeviceCount=lambda: 1, deviceSynchronize=device.synchronize),
    )  # fmt: skip
    return Library(
        "cupy", np, MISSING, __version__="14.2.0+standin", ndarray=ndarray, ufunc=ufunc,
        asarray=asarray, array=partial(asarray, copy=True), asnumpy=asnumpy, save=np.save,
        linalg=Library("cupy.linalg", np.linalg, NO_LINALG),
        random=SimpleNamespace(default_rng=default_rng), cuda=cuda,
        get_default_memory_pool=lambda: pool,
    )  # fmt: skip


def install(modules: MutableMapping[str, Any] = sys.modules) -> ModuleType:
    """Register the stand-in, so that `import cupy` finds it."""
    cupy = modules["cupy"] = build()
    modules["cupy.cuda"] = cupy.cuda
    modules["cupy.cuda.memory"], modules["cupy.cuda.runtime"] = cupy.cuda.memory, cupy.cuda.runtime
    modules["cupyx"] = SimpleNamespace(errstate=lambda *, linalg=None: nullcontext())
    return cupy
