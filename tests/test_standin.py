"""The stand-in refuses what CuPy refuses, counts what crosses the border, and computes right."""

import copy
import io
import pickle
import socket
import sys

import numpy as np
import pytest
import standin
from standin import stats

from minilora.engine.backend import is_array, to_device, to_numpy, xp_of
from minilora.engine.errors import MiniloraError
from minilora.engine.fused import linear
from minilora.engine.tensor import Parameter, Tensor

xp = standin.build()


@pytest.fixture(autouse=True)
def fresh_meter():
    """Counts start at zero, without a budget, and `cupy` means the stand-in for this test."""
    with pytest.MonkeyPatch.context() as patch:
        modules: dict = {}
        standin.install(modules)
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        standin.reset()
        yield
        standin.reset()


def counts(**expected):
    """The counts that differ from zero are these, and no others; they are zeroed."""
    names = ("h2d", "d2h", "h2d_bytes", "d2h_bytes", "syncs", "launches")
    found = {name: getattr(stats, name) for name in names if getattr(stats, name)}
    standin.reset()
    assert found == expected


# ------------------------------------------------------------------- planted mistakes

HOST = np.arange(6, dtype=np.float32).reshape(2, 3)


def device_array():
    return xp.asarray(HOST)


def add_to_host(d):
    copied = HOST.copy()
    copied += d


def add_to_device(d):
    d += HOST


def set_item(index, value):
    def mistake(d):
        d[index] = value

    return mistake


MISTAKES = {
    # NumPy's functions, and conversion that nobody asked for
    "np.asarray(d)": (lambda d: np.asarray(d), TypeError),
    "np.array([d])": (lambda d: np.array([d]), TypeError),
    "np.exp(d)": (lambda d: np.exp(d), TypeError),
    "np.maximum(d, 0)": (lambda d: np.maximum(d, 0), TypeError),
    "np.sum(d)": (lambda d: np.sum(d), TypeError),
    "np.concatenate([d])": (lambda d: np.concatenate([d, d]), TypeError),
    "np.add.reduce(d)": (lambda d: np.add.reduce(d), TypeError),
    "np.add.at(d)": (lambda d: np.add.at(d, 0, 1.0), TypeError),
    "np.float32(d)": (lambda d: np.float32(d), TypeError),
    "memoryview(d)": (lambda d: memoryview(d), TypeError),
    "hash(d)": (lambda d: hash(d), TypeError),
    # two sides of the border in one call
    "d + host": (lambda d: d + HOST, TypeError),
    "host + d": (lambda d: HOST + d, TypeError),
    "d += host": (add_to_device, TypeError),
    "host += d": (add_to_host, TypeError),
    "d == host": (lambda d: d == HOST, TypeError),
    "d @ host": (lambda d: d @ HOST.T, TypeError),
    "d + 0-d host": (lambda d: d + np.array(1.0), TypeError),
    "xp.exp(host)": (lambda d: xp.exp(HOST), TypeError),
    "xp.sum(host)": (lambda d: xp.sum(HOST), TypeError),
    "xp.stack([d, host])": (lambda d: xp.stack([d, HOST]), TypeError),
    "xp.where(d, host, d)": (lambda d: xp.where(d > 0, HOST, d), TypeError),
    "out=host": (lambda d: xp.exp(d, out=HOST.copy()), TypeError),
    "sum(out=host)": (lambda d: d.sum(axis=0, out=np.zeros(3)), TypeError),
    "copyto(d, host)": (lambda d: xp.copyto(d, HOST), TypeError),
    "copyto(host, d)": (lambda d: xp.copyto(HOST.copy(), d), TypeError),
    "d[...] = host": (set_item(..., HOST), TypeError),
    "d[0] = list": (set_item(0, [1, 2, 3]), TypeError),
    "d.fill(host)": (lambda d: d.fill(np.array(1.0)), TypeError),
    # indices
    "d[list]": (lambda d: d[[0, 1]], TypeError),
    "d[host]": (lambda d: d[np.array([0, 1])], TypeError),
    "d[:, host]": (lambda d: d[:, np.array([0, 1])], TypeError),
    "d[host mask]": (lambda d: d[HOST > 1], TypeError),
    "d[list] = 0": (set_item([0, 1], 0.0), TypeError),
    "d[:count]": (lambda d: d[: xp.asarray(1)], TypeError),
    "two masks": (lambda d: d[d[:, 0] > 0, d[0] > 0], ValueError),
    "out of range": (lambda d: d[xp.asarray([0, 2])], IndexError),
    "repeats": (
        lambda d: set_item(xp.asarray([0, 0]), xp.zeros((2, 3)))(d),
        ValueError,
    ),
    # numbers of the device where the host needs one
    "range(d)": (lambda d: range(xp.asarray(3)), TypeError),
    "list[d]": (lambda d: [1, 2][xp.asarray(0)], TypeError),
    "zeros(d)": (lambda d: xp.zeros(xp.asarray(3)), TypeError),
    "zeros((2, d))": (lambda d: xp.zeros((2, xp.asarray(3))), TypeError),
    "reshape(d)": (lambda d: d.reshape(xp.asarray(6)), TypeError),
    "sum(axis=d)": (lambda d: xp.sum(d, axis=xp.asarray(0)), TypeError),
    "len(0-d)": (lambda d: len(d.sum()), TypeError),
    "iterate 0-d": (lambda d: list(d.sum()), TypeError),
    # keywords, functions and methods that CuPy lacks
    "sum(where=)": (lambda d: xp.sum(d, where=d > 0), TypeError),
    "max(initial=)": (lambda d: d.max(initial=0.0), TypeError),
    "exp(where=)": (lambda d: xp.exp(d, where=d > 0), TypeError),
    "take(mode=)": (lambda d: xp.take(d, xp.asarray([0]), mode="clip"), TypeError),
    "zeros(like=)": (lambda d: xp.zeros(3, like=d), TypeError),
    "xp.errstate": (lambda d: xp.errstate(all="ignore"), AttributeError),
    "cupyx.errstate(divide=)": (
        lambda d: sys.modules["cupyx"].errstate(divide="ignore"),
        TypeError,
    ),
    "xp.block": (lambda d: xp.block([[d]]), AttributeError),
    "xp.vecdot": (lambda d: xp.vecdot(d, d), AttributeError),
    "xp.memmap": (lambda d: xp.memmap, AttributeError),
    "xp.longdouble": (lambda d: xp.longdouble, AttributeError),
    "xp.linalg.multi_dot": (lambda d: xp.linalg.multi_dot([d, d.T]), AttributeError),
    "d.__array_namespace__": (lambda d: d.__array_namespace__(), AttributeError),
    "d.ctypes": (lambda d: d.ctypes, AttributeError),
    "d.setflags": (lambda d: d.setflags(write=False), AttributeError),
    "rng.normal": (lambda d: xp.random.default_rng(0).normal(), AttributeError),
    "rng.permutation": (lambda d: xp.random.default_rng(0).permutation(3), AttributeError),
    "rng.choice": (lambda d: xp.random.default_rng(0).choice(3), AttributeError),
    "maximum.reduce": (lambda d: xp.maximum.reduce(d), NotImplementedError),
    "multiply.at": (lambda d: xp.multiply.at(d, 0, 2.0), NotImplementedError),
    "logical_or.accumulate": (lambda d: xp.logical_or.accumulate(d), NotImplementedError),
    "add.at on complex": (lambda d: xp.add.at(d * 1j, xp.asarray([0]), 1.0), TypeError),
    # what is no array
    "xp.sum(list)": (lambda d: xp.sum([1.0, 2.0]), TypeError),
    "xp.exp(list)": (lambda d: xp.exp([1.0, 2.0]), TypeError),
    "xp.where(bool, ...)": (lambda d: xp.where(True, d, 0.0), TypeError),
    "d + None": (lambda d: d + None, TypeError),
    "d == None": (lambda d: d == None, TypeError),  # noqa: E711
    "asarray(text)": (lambda d: xp.asarray(["text"]), ValueError),
    "asarray(objects)": (lambda d: xp.asarray([None]), ValueError),
}


@pytest.mark.parametrize("mistake, error", MISTAKES.values(), ids=MISTAKES)
def test_planted_mistake_is_refused(mistake, error):
    d = device_array()
    before = d.get()
    with pytest.raises(error):
        mistake(d)
    np.testing.assert_array_equal(d.get(), before)


WAITS = {
    "float": lambda d: float(d[0, 0]),
    "int": lambda d: int(d[0, 0]),
    "complex": lambda d: complex(d[0, 0]),
    "if": lambda d: 1 if d[0, 0] else 0,
    "in": lambda d: 2.0 in d[0],
    "item": lambda d: d[0, 0].item(),
    "tolist": lambda d: d.tolist(),
    "get": lambda d: d.get(),
    "asnumpy": lambda d: xp.asnumpy(d),
    "to_numpy": lambda d: to_numpy(d),
    "print": lambda d: str(d),
    "repr": lambda d: repr(d),
    "format": lambda d: f"{d[0, 0]:.3f}",
    "mask": lambda d: d[d > 1],
    "mask = 0": lambda d: set_item(d > 1, 0.0)(d),
    "nonzero": lambda d: d.nonzero(),
    "where": lambda d: xp.where(d > 1),
    "unique": lambda d: xp.unique(d),
    "repeat": lambda d: xp.repeat(d[0], xp.asarray([1, 0, 2])),
    "np.save": lambda d: np.save(io.BytesIO(), d),
    "np.save(arr=)": lambda d: np.save(io.BytesIO(), arr=d),
    "xp.save": lambda d: xp.save(io.BytesIO(), d),
    "pickle": lambda d: pickle.dumps(d),
    "synchronize": lambda d: xp.cuda.get_current_stream().synchronize(),
}


@pytest.mark.parametrize("waits", WAITS.values(), ids=WAITS)
def test_waiting_is_counted_and_can_be_forbidden(waits):
    d = device_array()
    waits(d)
    assert stats.syncs > 0
    with standin.no_sync(), pytest.raises(RuntimeError, match="waits for the device"):
        waits(d)
    waits(d)  # allowed again


def test_computing_does_not_wait():
    d = device_array()
    with standin.no_sync():
        token = d.argmax(axis=-1)
        y = xp.where(d > 1, xp.exp(d), 0)[xp.arange(2), token]
        d[xp.arange(2), token] -= y
        d[0, 1] = 3.0
        xp.copyto(d, 1.0, where=d > 2)
        assert xp.allclose(d, d).shape == ()
        list(d)
    assert stats.syncs == 0


# ------------------------------------------------------------------------- the counts


def test_counts_of_a_known_sequence():
    d = xp.asarray(HOST)
    counts(h2d=1, h2d_bytes=24)
    y = d * 2 + 1
    counts(launches=2)
    y += d
    counts(launches=1)
    y[0] += d[1]
    counts(launches=1)
    views = (y.T, y[0], y[1, 2], y.reshape(3, 2), y[:, None], y.view(xp.int32), y.swapaxes(0, 1))
    views += (xp.broadcast_to(y, (4, 2, 3)), y.ravel(), y.astype(y.dtype, copy=False))
    assert all(view.base is y for view in views[:-1])
    counts()
    rows = y[xp.arange(2)]
    counts(launches=2)
    assert rows.base is None
    y.sum(axis=0, out=xp.empty(3, xp.float32))
    counts(launches=1)
    y[0, 0] = 7.0
    y[1] = d[0]
    y.fill(0)
    xp.copyto(y, d, where=d > 0)
    counts(launches=5)
    xp.add.at(y, xp.zeros(2, xp.int64), xp.ones((2, 3), xp.float32))
    counts(launches=3)
    xp.empty((2, 3)), xp.empty_like(y), xp.zeros((0, 3)) * 2
    counts()
    xp.asarray(3.0)
    counts(launches=1)
    float(y[0, 0])
    counts(d2h=1, d2h_bytes=4, syncs=1)
    y.set(HOST)
    counts(h2d=1, h2d_bytes=24)
    y.get(out=np.empty_like(HOST), blocking=False)
    counts(d2h=1, d2h_bytes=24)
    assert xp.asarray(y) is y
    assert xp.array(y) is not y
    counts(launches=1)


def test_views_share_memory_and_bytes_are_freed_with_the_last():
    start = stats.used
    d = xp.zeros((4, 8), xp.float32)
    assert stats.used - start == 128
    half = d.T[:4].reshape(16)  # a copy: this reshape has no view
    row, number = d[1], d[1, 2]
    assert row.base is number.base is d
    assert half.base is None
    assert stats.used - start == 128 + 64
    row[:] = 5.0
    assert float(number) == 5.0, "a[i, j] is a view"
    del half
    assert stats.used - start == 128
    del d, row
    assert stats.used - start == 128, "the last view holds the memory"
    del number
    assert stats.used == start
    assert stats.peak - start == 128 + 64


def test_copies_have_their_own_memory():
    d = device_array()
    for twin in (d.copy(), copy.deepcopy(d), pickle.loads(pickle.dumps(d)), xp.array(d)):
        twin[0, 0] = 9.0
        assert twin.base is None
    assert float(d[0, 0]) == 0.0


def test_budget_raises_and_leaves_the_account_right():
    d = device_array()
    start = stats.used
    standin.reset(budget=start + 100)
    kept = xp.zeros(20, xp.float32)
    with pytest.raises(xp.cuda.memory.OutOfMemoryError, match="80 bytes asked"):
        xp.ones_like(kept)
    with pytest.raises(MemoryError):
        to_device(np.zeros(1000), "cuda")
    assert stats.used == start + 80
    del kept
    assert (d * 2 * 2).shape == d.shape
    assert stats.used == start


# ----------------------------------------------------------------------- the results


def test_answers_are_those_of_numpy():
    d = device_array()
    cases = {
        "scalar keeps float32": (d * 2.0, HOST * 2.0),
        "np.float32 from the left": (np.float32(2) * d, np.float32(2) * HOST),
        "np.float64 promotes": (np.float64(2) * d, np.float64(2) * HOST),
        "shift": (xp.arange(4, dtype=xp.uint32) >> xp.uint32(1), np.arange(4, dtype="u4") >> 1),
        "reflected": (2 - d, 2 - HOST),
        "power": (2.0**d, 2.0**HOST),
        "matmul": (d @ d.T, HOST @ HOST.T),
        "einsum": (xp.einsum("ij,kj->ik", d, d), HOST @ HOST.T),
        "complex": ((d * 1j).conj().imag, -HOST),
        "mean": (d.mean(axis=-1, keepdims=True), HOST.mean(axis=-1, keepdims=True)),
        "argmax": (d.argmax(axis=0), HOST.argmax(axis=0)),
        "gather": (d[xp.asarray([1, 0]), None, :2], HOST[np.array([1, 0]), None, :2]),
        "take": (xp.take(d, xp.asarray([2, 2]), axis=1), HOST[:, [2, 2]]),
        "stack": (xp.stack([d, d], axis=1), np.stack([HOST, HOST], axis=1)),
        "concatenate": (xp.concatenate((d, d)), np.concatenate((HOST, HOST))),
        "tril": (xp.tril(d), np.tril(HOST)),
        "full": (xp.full((2, 2), -xp.inf, xp.float32), np.full((2, 2), -np.inf, np.float32)),
        "logical": (xp.logical_and(d > 1, ~xp.isfinite(d)), np.zeros((2, 3), bool)),
        "mask": (d[d > 1], HOST[HOST > 1]),
        "reduce": (xp.add.reduce(d), HOST.sum(axis=0)),
        "norm": (xp.linalg.norm(d), np.linalg.norm(HOST)),
        "divmod": (divmod(d, 2)[1], HOST % 2),
        "in place": (d.__iadd__(1), HOST + 1),
    }
    for name, (found, expected) in cases.items():
        assert type(found) is xp.ndarray, name
        assert found.dtype == np.asarray(expected).dtype, name
        np.testing.assert_allclose(found.get(), expected, rtol=1e-6, err_msg=name)


def test_at_adds_for_every_index():
    table = xp.zeros((3, 2))
    xp.add.at(table, xp.asarray([[0, 2], [2, 2]]), xp.ones((2, 2, 2)))
    assert table[:, 0].tolist() == [1.0, 0.0, 3.0]


def test_empty_memory_is_dirty():
    assert xp.isnan(xp.empty((2, 3), xp.float32)).all()
    assert xp.isnan(xp.empty_like(device_array().T)).all()
    assert (xp.empty(3, xp.int64) == -1).all()


def test_division_by_zero_is_silent():
    zero = xp.zeros(2)
    assert xp.isnan(zero / zero).all()
    assert xp.isinf(xp.log(zero)).all()
    zero.astype(xp.float32)[0] = 1e300


def test_product_in_place_makes_a_new_array():
    d = before = xp.asarray(np.eye(2) * 2)
    d @= d
    assert d is not before
    assert d.tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert before.tolist() == [[2.0, 0.0], [0.0, 2.0]]


# ------------------------------------------------------------------- minilora meets it


def test_minilora_takes_it_for_cupy():
    d = to_device(HOST, "cuda")
    assert is_array(d)
    assert xp_of(d) is xp
    assert xp.__name__ == "cupy"
    assert to_device(d, "cuda") is d
    assert is_array(to_device(d, "cpu"))
    np.testing.assert_array_equal(to_numpy(d), HOST)


def test_an_op_and_its_pullbacks_agree_with_numpy():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((5, 3), (4, 3), (4,))]

    def gradients(device):
        given = [Parameter(to_device(a, device)) for a in arrays]
        found = (linear(*given) * 2.0).sum().backward()
        return [to_numpy(found[p]) for p in given]

    for on_host, on_device in zip(gradients("cpu"), gradients("cuda"), strict=True):
        np.testing.assert_array_equal(on_host, on_device)


def test_host_and_device_never_meet_in_an_op():
    with pytest.raises(MiniloraError, match="numpy and cupy meet"):
        Tensor(HOST) + device_array()
    assert type((device_array() + Tensor(device_array())).data) is xp.ndarray


def test_atomics_add_in_an_order_of_their_own():
    terms = xp.asarray(np.random.default_rng(0).standard_normal((1000, 50)).astype("f4"))
    sums = set()
    with standin.disordered():
        for _ in range(20):
            total = xp.zeros((2, 50), xp.float32)
            xp.add.at(total, xp.ones(1000, xp.int64), terms)
            sums.add(total.get().tobytes())
            np.testing.assert_allclose(total.get()[1], terms.get().sum(0), atol=1e-3)
            assert not total.get()[0].any()
    assert len(sums) > 1


# --------------------------------------------------------------- what conftest promises


def test_no_network():
    with socket.socket() as s, pytest.raises(RuntimeError, match="no network"):
        s.connect(("192.0.2.1", 80))


def test_fixtures_name_one_device(device, dev, host):
    array = dev(HOST)
    assert device in ("cpu", "cuda")
    assert type(array).__module__.partition(".")[0] == ("numpy" if device == "cpu" else "cupy")
    np.testing.assert_array_equal(host(array), HOST)


@pytest.mark.gpu
def test_gpu_tests_run_on_a_card(device):
    assert device == "cuda"
