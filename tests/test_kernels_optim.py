"""The optimizers' kernels write what the specification writes, to the bit."""

import sys

import numpy as np
import pytest
from cuda_cpu import fakeraw
from cuda_cpu.checks import installed, kernels, launches, on_device  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import AdamW, Parameter
from minilora.engine.backend import to_numpy
from minilora.engine.rules import reference_rules
from minilora.model.module import to_device as tree_to_device
from minilora.optim.adam8bit import AdamW8bit, adamw8bit_update
from minilora.optim.adamw import adamw_update
from minilora.optim.flat import BAD_CALL, BAD_INDEX, CALLS, FACTOR, LR, NORM, STEP, measure
from minilora.quant.codes import code

pytestmark = pytest.mark.usefixtures("kernels")
few = settings(max_examples=8)
SIZES = st.sampled_from([1, 5, 256, 257, 1000, 4100])
OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.01, "lr_factor": 2.0}


def controls(step=6, norm=2.0):
    control = np.zeros(7)
    control[[LR, STEP, NORM, FACTOR]] = 1e-3, step, norm, 0.3
    return control


def both(rule, arrays, options, codes=None, start=0):
    """The arrays after the rule: as the specification leaves them, and as the kernel does.

    With `start`, the arrays are views into larger ones, and stand on no 16 bytes.
    """
    host = [a.copy() for a in arrays]
    with reference_rules():
        rule(*host, **options, **(codes or {}))
    moved = {name: tree_to_device(c, "cuda") for name, c in (codes or {}).items()}
    results = []
    for seed in (1, 2):
        padded = [
            on_device(np.concatenate([np.zeros(start, a.dtype), a])) if a.size != 7 else
            on_device(a) for a in arrays
        ]  # fmt: skip
        views = [a[start:] if a.size != 7 else a for a in padded]
        _, names = launches(lambda v=views: rule(*v, **options, **moved), seed)
        assert names
        results.append([to_numpy(v) for v in views])
        assert not any(to_numpy(a[:start]).any() for a in padded if a.size != 7)
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes()
    return host, results[0]


@few
@given(SIZES, st.sampled_from([None, 0.5, 1e9]), st.integers(0, 3), st.integers(0, 99))
def test_measure(n, clip, start, seed):
    g = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    options = {"divide_by": 3.0, "clip": clip}
    (_, wanted), (_, found) = both(measure, [g, controls(norm=0)], options, start=start)
    np.testing.assert_allclose(found, wanted, rtol=1e-14)


@pytest.mark.parametrize("n, places", [(7000, (6999,)), (5, (0,)), (9000, (8000, 4500, 8999))])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_the_first_bad_gradient_is_recorded_once(n, places, bad):
    g = np.ones(n, np.float32)
    g[list(places)] = bad
    control = on_device(controls())
    measure(on_device(g), control, divide_by=1.0, clip=1.0)
    seen = to_numpy(control)
    assert (seen[BAD_CALL], seen[BAD_INDEX], seen[CALLS]) == (1, min(places), 1)
    assert np.isnan(seen[FACTOR])
    assert not np.isfinite(seen[NORM])
    measure(on_device(np.full(n, np.nan, np.float32)), control, divide_by=1.0, clip=1.0)
    seen = to_numpy(control)
    assert (seen[BAD_CALL], seen[BAD_INDEX], seen[CALLS]) == (1, min(places), 2)
    measure(on_device(np.full(n, 2.0, np.float32)), control, divide_by=1.0, clip=None)
    np.testing.assert_allclose(to_numpy(control)[[NORM, FACTOR]], [2 * np.sqrt(n), 1], rtol=1e-15)


@few
@given(SIZES, st.integers(0, 3), st.integers(0, 99), st.booleans())
def test_adamw(n, start, seed, finite):
    rng = np.random.default_rng(seed)
    p, g, m = rng.standard_normal((3, n)).astype(np.float32)
    arrays = [p, g, m, m * m, controls(norm=2.0 if finite else np.inf)]
    wanted, found = both(adamw_update, arrays, OPTIONS, start=start)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.array_equal(found[0], p) != finite


@few
@given(SIZES, st.integers(0, 99), st.booleans())
def test_adamw8bit(n, seed, finite):
    rng = np.random.default_rng(seed)
    p, g = rng.standard_normal((2, n)).astype(np.float32)
    g *= np.exp(4 * rng.standard_normal(n).astype(np.float32))
    m, v = rng.integers(0, 256, (2, n), np.uint8)
    g[: n // 9] = 0
    scales = rng.random((2, -(-n // 256)), np.float32)
    codes = {"signed": code("dynamic"), "unsigned": code("dynamic_unsigned")}
    arrays = [p, g, m, v, *scales, controls(norm=2.0 if finite else np.nan)]
    wanted, found = both(adamw8bit_update, arrays, OPTIONS, codes)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.array_equal(found[2], m) != finite or n < 3


@pytest.mark.parametrize("optimizer", [AdamW, AdamW8bit])
def test_a_step_waits_for_nothing_and_launches_little(optimizer, request):
    tree = Parameter(on_device(np.ones((64, 65), np.float32)))
    o = optimizer(tree)
    o.flat.grad[...] = o.flat.data
    o.step(clip=1.0)
    if request.config.getoption("device") == "standin":
        cupy = sys.modules["standin"]
        with cupy.no_sync():
            cupy.reset()
            _, names = launches(lambda: o.step(clip=1.0))
        assert cupy.stats.h2d == cupy.stats.d2h == 0
        assert names == ["square_sums", "measure", f"adamw{'8bit' * (optimizer is AdamW8bit)}"]
        assert cupy.stats.launches <= 7  # and the count of steps, and the gradient cleared


def test_the_factors_of_an_adapter_are_one_launch():
    tree = [Parameter(on_device(np.ones((16, 256 + 64 * i), np.float32))) for i in range(6)]
    o = AdamW8bit(tree)
    for p in o.flat.named.values():
        o.flat.gradients[p] += p.data
    _, names = launches(lambda: o.step(clip=1.0))
    if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
        assert names == ["square_sums", "measure", "adamw8bit"]


def test_a_forgotten_barrier_is_caught():
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 700)).astype(np.float32)
    arrays = [p, g, p * 0, p * 0, controls()]
    edit = ("    __syncthreads();\n    return step;", "    return step;")
    with installed(fakeraw.planted(edit)), pytest.raises(AssertionError):
        same_bits(adamw_update, arrays)


def same_bits(rule, arrays):
    wanted, found = both(rule, arrays, OPTIONS)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
