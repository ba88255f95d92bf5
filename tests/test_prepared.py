"""What a recording runs in place of a rule gives what the specification gives, run after run."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_fast_cpu import lora_options, with_base
from test_ops import rules_of_the_library

from minilora.engine.attention import RopeScaling
from minilora.engine.bf16 import BF16
from minilora.engine.errors import NumericsError
from minilora.engine.recorded import Recorded
from minilora.engine.rounding import narrow
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Op
from minilora.fast import cpu, cpu_recorded
from minilora.fast.cpu import BLOCK
from minilora.model.cache import LayerCache

pytestmark = pytest.mark.usefixtures("on_the_host")

PREPARED = {n: r for n, r in rules_of_the_library().items() if "numpy" in r.prepared}
OPS = sorted(n for n, r in PREPARED.items() if isinstance(r, Op))


@pytest.fixture(scope="module")
def on_the_host(device):
    if device != "cpu":
        pytest.skip("these functions are for NumPy arrays")


def cases(name, n, d, seed):
    """Arrays in float64 and options of a call for n rows of one token: once as it is written
    down and once as it is run again, with all changed that may change."""
    first, again = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    return drawn(name, first, n, d, 0), drawn(name, again, n, d, 5)


def drawn(name, rng, n, d, later):
    normal = rng.standard_normal
    if name == "add":
        return normal((2, n, 1, d)), {}
    if name == "getitem":
        return [normal((n, 1, d))], {"index": (slice(None), 0)}
    if name == "reshape":
        return [normal((n, 1, 2, d))], {"shape": (n, 1, 2 * d)}
    if name == "embedding":
        return [normal((11, d))], {"ids": rng.integers(0, 11, (n, 1))}
    if name == "linear":
        W = np.asfortranarray(normal((7, d))) if d % 2 else normal((7, d))
        return [normal((n, 1, d)), W, *([normal(7)] if d % 3 else [])], {}
    if name == "lora_linear":
        arrays = [normal((n, 1, d)), normal((3, d)), normal((7, 3))]
        return arrays, lora_options(np.random.default_rng(d), 7, d, bias=bool(d % 3))
    if name == "layer_norm":
        return [normal((n, 1, d)) + 1, normal(d), normal(d)], {"eps": 1e-5}
    if name == "rms_norm":
        return [normal((n, 1, d)), normal(d)], {"eps": 1e-6}
    if name == "gelu":
        return [3 * normal((n, 1, d))], {}
    if name == "swiglu":
        return 3 * normal((2, n, 1, d)), {}
    if name == "split_heads":
        return [normal((n, 1, 4 * d))], {"heads": (2, 1, 1), "width": d}
    if name == "attention":
        S = 8 + later  # the cache has grown
        positions = np.full((n, 1), S - 1) if d % 2 else rng.integers(0, S, (n, 1))
        held = normal((2, n, 2, S + 3, d)).transpose(0, 1, 3, 2, 4)[:, :, :S]
        return [normal((n, 1, 4, d)), *held], {"positions": positions}
    if name == "rope":
        scaling = RopeScaling(8.0, 1.0, 4.0, 64) if d % 2 else None
        positions = np.full((n, 1), 30 + later)  # past the table's 32 rows
        return [normal((n, 1, 3, 2 * d))], {
            "theta": 1000.0, "scaling": scaling, "positions": positions,
        }  # fmt: skip
    raise AssertionError(f"no case for what is prepared for {name}")


def test_everything_prepared_is_tested():
    assert set(PREPARED) == {*OPS, "remembered", "all_reduce"}  # the last in test_team.py
    for name in OPS:
        cases(name, 1, 4, 0)


def in_dtype(arguments, dtype):
    return [a.astype(dtype, order="K") for a in arguments]


def parts(value):
    return value if isinstance(value, tuple) else (value,)


def specified(name, arguments, options):
    """The arrays that the specification gives."""
    with reference_rules():
        value = PREPARED[name](*arguments, **with_base(options, arguments[0].dtype))
    return [tensor.data for tensor in parts(value)]


def prepared(name, arguments, options):
    return PREPARED[name].prepared["numpy"](*arguments, **with_base(options, arguments[0].dtype))


@pytest.mark.parametrize("name", OPS)
@given(st.integers(1, 9), st.integers(2, 33), st.integers(0, 99))
@example(1, 8, 0)
def test_it_is_its_specification(name, n, d, seed):
    """What one call prepared is asked again, of other numbers: no answer is scratch, and no
    argument is written to."""
    (before, options), (after, changed) = cases(name, n, d, seed)
    wanted = specified(name, before, options), specified(name, after, changed)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        small, later = in_dtype(before, dtype), in_dtype(after, dtype)
        live = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in options.items()}
        run = prepared(name, small, live)
        if name == "rope" and n > 1:  # rows may stand at different positions
            assert run is NotImplemented
            continue
        one = parts(run(*small))
        kept = [a.copy() for a in one]
        for option, value in live.items():
            if isinstance(value, np.ndarray):
                value[...] = changed[option]
        two = parts(run(*later))
        for a, b in zip((*one, *two), (*wanted[0], *wanted[1]), strict=True):
            assert (a.dtype, a.shape) == (dtype, b.shape)
            gap = np.linalg.norm((a - b).ravel()) / (1 + np.linalg.norm(b.ravel()))
            assert gap <= tolerance * (50 if name == "layer_norm" and d < 3 else 1)
        for a, b in zip((*one, *small, *later), (*kept, *in_dtype(before, dtype),
                        *in_dtype(after, dtype)), strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_wide_weight_meets_a_few_rows_in_stacks(order, monkeypatch):
    monkeypatch.setattr(cpu, "small_kernels", lambda: True)
    monkeypatch.setattr(cpu, "on_one_thread", lambda: True)
    rng = np.random.default_rng(0)
    x, W, b = (rng.standard_normal(s, np.float32) for s in ((8, 1, 256), (1040, 256), 1040))
    W = np.asarray(W, order=order)
    heights = []

    def seen(x, W, height):
        heights.append(height)
        return cpu.few_rows(x, W, height)

    monkeypatch.setattr(cpu_recorded, "few_rows", seen)
    (wanted,) = specified("linear", (x, W, b), {})
    found = prepared("linear", (x, W, b), {})(x, W, b)
    assert heights == [128 if order == "C" else 256]
    assert found.shape == (8, 1, 1040)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_cache_is_written_to_and_seen_up_to_its_end(rows, ragged):
    rng, shape = np.random.default_rng(0), (rows, 6, 2, 4)
    layers = [LayerCache(np, shape, np.dtype(np.float32)) for _ in range(2)]
    rule = PREPARED["remembered"]
    k, v = rng.standard_normal((2, rows, 1, 2, 4)).astype(np.float32)
    positions = np.zeros((rows, 1), int)
    run = prepared("remembered", (k, v), {"layer": layers[0], "positions": positions})
    for step in range(3):
        k, v = rng.standard_normal((2, rows, 1, 2, 4)).astype(np.float32)
        positions[...] = 2 + step - ragged * np.arange(rows)[:, None] % 2
        for layer in layers:
            layer.stop = 3 + step
        found = run(k, v)
        wanted = rule(k, v, layer=layers[1], positions=positions)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == (rows, 3 + step, 2, 4)
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [1e20, 1e-25, np.nan, 0.0])
def test_norms_of_rows_out_of_range(name, rows, size, recwarn):
    (arguments, options), _ = cases(name, rows, 6, 0)
    arguments = in_dtype(arguments, np.float32)
    run = prepared(name, arguments, options)
    arguments[0] *= np.float32(size)
    with np.errstate(all="ignore"):
        wanted = specified(name, arguments, options)[0]
    np.testing.assert_allclose(run(*arguments), wanted, rtol=2e-5, atol=2e-6)
    if name == "rms_norm":  # it can take them
        assert not recwarn.list


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("wrong", [-1, 11])
def test_an_id_outside_the_table_is_named(n, wrong):
    table, ids = np.ones((11, 2), np.float32), np.zeros((n, 1), int)
    run = prepared("embedding", [table], {"ids": ids})
    ids[-1] = wrong
    with pytest.raises(NumericsError, match=rf"0\.\.10, found {wrong}"):
        run(table)


def test_a_turn_before_the_first_is_left_to_the_specification():
    (arguments, options), _ = cases("rope", 1, 4, 0)
    run = prepared("rope", arguments, options)
    options["positions"][...] = -2
    np.testing.assert_allclose(run(*arguments), specified("rope", arguments, options)[0], 1e-12)


@pytest.mark.parametrize("name", sorted(set(OPS) - {"add", "getitem", "reshape", "split_heads"}))
def test_what_it_does_not_take(name):
    """Complex numbers and two dtypes: declined, or answered as the specification would."""
    (arguments, options), _ = cases(name, 1, 4, 0)
    others = [[a.astype(complex) for a in arguments]]
    if len(arguments) > 1:
        others.append([arguments[0].astype(np.float32), *arguments[1:]])
    for given_ones in others:
        run = prepared(name, given_ones, options)
        if run is NotImplemented:
            continue
        for a, b in zip(parts(run(*given_ones)), specified(name, given_ones, options), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "lora_linear", "layer_norm", "gelu", "swiglu"])
def test_large_arrays_are_left_to_the_rule(name):
    """It goes by blocks."""
    (arguments, options), _ = cases(name, BLOCK // 8 + 1, 8, 0)
    assert prepared(name, arguments, options) is NotImplemented


def test_two_bytes_are_left_to_the_rule():
    """A recording of BF16 arguments asks the rules as ever."""
    x = np.ones((1, 1, 4), np.float32)
    half = BF16(narrow(x))
    recorded = Recorded(lambda: PREPARED["add"](half, half).data)
    for _ in range(4):
        assert recorded().float32().tolist() == (2 * x).tolist()
    assert recorded.program is not None
    rows = LayerCache(np, (1, 2, 1, 4), half.dtype)
    options = {"layer": rows, "positions": np.zeros((1, 1), int)}
    assert prepared("remembered", (x[None], x[None]), options) is NotImplemented
