"""The CUDA kernels of `minilora/fast`, run on a CPU, against the float64 specification."""

import numpy as np
import pytest
from cuda_cpu import fakeraw
from cuda_cpu.checks import (  # noqa: F401
    agrees,
    installed,
    kernels,
    launches,
    on_device,
    on_the_cpu,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.engine import attention, fused
from minilora.engine.backend import to_numpy

pytestmark = pytest.mark.usefixtures("kernels")
few = settings(max_examples=8)


# ------------------------------------------------------------------------------- norms

WIDTHS = st.sampled_from([1, 3, 4, 31, 48, 64, 129, 132, 260])
NORM = {"norm_forward", "norm_backward"}


def norm_arrays(rng, rows, C, centered=True):
    x = rng.standard_normal((rows, C)) + centered
    return [x, rng.standard_normal(C), rng.standard_normal(C)][: 2 + centered]


@few
@given(st.integers(1, 70), WIDTHS, st.booleans(), st.integers(0, 99))
def test_rms_norm(rows, C, frozen, seed):
    arrays = norm_arrays(np.random.default_rng(seed), rows, C, centered=False)
    expect = NORM if frozen else NORM | {"norm_columns"}
    agrees(fused.rms_norm, arrays, {"eps": 1e-5}, expect=expect, frozen=(1,) * frozen,
           scale=np.sqrt(rows))  # fmt: skip


@few
@given(st.integers(1, 70), WIDTHS, st.booleans(), st.integers(0, 99))
def test_layer_norm(rows, C, frozen, seed):
    arrays = norm_arrays(np.random.default_rng(seed), rows, C)
    expect = NORM if frozen else NORM | {"norm_columns"}
    agrees(fused.layer_norm, arrays, {"eps": 1e-5}, expect=expect, frozen=(1, 2) * frozen,
           scale=100 * np.sqrt(rows) if C < 4 else np.sqrt(rows))  # fmt: skip


def test_the_gradients_of_many_rows_are_summed_in_strips():
    arrays = norm_arrays(np.random.default_rng(0), 150, 40)
    agrees(fused.layer_norm, arrays, {"eps": 1e-5}, expect=NORM | {"norm_columns", "add_strips"})


def test_squares_that_overflow_float32():
    x = np.full((2, 8), 1e20, np.float32)
    y, names = launches(lambda: fused.rms_norm(on_device(x), on_device(x[0] * 0 + 1), eps=1e-5))
    np.testing.assert_allclose(to_numpy(y.data), 1, rtol=1e-6)
    assert names == ["norm_forward"]


def test_weights_that_stand_on_no_sixteen_bytes(xp):
    """A Parameter is a view of a flat buffer and may start anywhere."""
    rng = np.random.default_rng(0)
    flat, x = rng.standard_normal(66).astype(np.float32), rng.standard_normal((3, 64))
    x = x.astype(np.float32)
    weight = on_device(flat)[1:65]
    y, _ = launches(lambda: fused.rms_norm(on_device(x), weight, eps=1e-5))
    wanted = fused.rms_norm(x, flat[1:65], eps=1e-5)
    np.testing.assert_allclose(to_numpy(y.data), wanted.data, rtol=1e-5)


def test_what_the_kernels_do_not_take_the_specification_answers():
    x, w = np.ones((3, 8)), np.ones(8)
    for arrays in ([x, w], [x.astype(np.float32)[:0], w.astype(np.float32)]):
        y, names = launches(lambda a=arrays: fused.rms_norm(*map(on_device, a), eps=1e-5))
        assert y.shape == arrays[0].shape
        assert names == []


# --------------------------------------------------------- activations and rotation


@few
@given(st.sampled_from([(1,), (7,), (3, 5), (2, 130, 17), (1030,)]), st.integers(0, 99))
def test_gelu(shape, seed):
    x = 3 * np.random.default_rng(seed).standard_normal(shape)
    agrees(fused.gelu, [x], expect={"gelu_forward", "gelu_backward"}, scale=1e-2)


def test_gelu_and_swiglu_far_out():
    x = np.array([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4])
    agrees(fused.gelu, [x], scale=1.0)
    agrees(fused.swiglu, [x, x + 1], scale=1.0)


@few
@given(
    st.sampled_from([(1,), (7,), (3, 5), (2, 130, 17)]),
    st.sampled_from([(), (0,), (1,)]),
    st.integers(0, 99),
)
def test_swiglu(shape, frozen, seed):
    arrays = np.random.default_rng(seed).standard_normal((2, *shape))
    expect = {"swiglu_forward", "swiglu_backward"}
    agrees(fused.swiglu, arrays, expect=expect, frozen=frozen, scale=1e-2)


@few
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.sampled_from([2, 6, 64]),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_rope(N, T, H, D, scaled, placed, seed):
    rng = np.random.default_rng(seed)
    options = {"theta": 1000.0}
    if scaled:
        options["scaling"] = attention.RopeScaling(8.0, 1.0, 4.0, 64)
    if placed:
        options["positions"] = rng.integers(0, 5000, (N, T))
    agrees(attention.rope, [rng.standard_normal((N, T, H, D))], options, expect={"rope"})


def test_rope_of_packed_heads():
    """What split_heads gives is a view into wider rows, and is not copied."""
    x = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)

    def turned(x):
        _, k, _ = attention.split_heads(x, heads=(2, 1, 1), width=8)
        return attention.rope(k, theta=100.0).data

    y, names = launches(lambda: turned(on_device(x)))
    np.testing.assert_allclose(to_numpy(y), turned(x), rtol=1e-5, atol=1e-6)
    assert names == ["rope"]


# -------------------------------------------------------------------- planted mistakes

PLANTED = {
    "a barrier left out": ("    __syncthreads();\n    v = parts[0];", "    v = parts[0];"),
    "a divergent barrier": (
        "    if (threadIdx.x % LANES == 0) parts",
        "    if (threadIdx.x % LANES == 0) __syncthreads(), parts",
    ),
    "a swapped index": ("parts[warp][i][lane]", "parts[warp][lane % 8][i]"),
    "a read too far": ("i < C; i += 4 * blockDim.x", "i < C + 4; i += 4 * blockDim.x"),
    "a write too far": ("out[column] = sum", "out[column + 1] = sum"),
    "a strip too short": ("blockIdx.y + 1) * strip)", "blockIdx.y + 1) * strip - 1)"),
    "a lane too few": ("int d = LANES / 2; d > 0", "int d = LANES / 2; d > 1"),
    "a branch on the wrong alignment": ("C % 4 == 0 && on16(x)", "C % 3 == 0 && on16(x)"),
}


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("old, new", PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_caught(old, new):
    arrays = norm_arrays(np.random.default_rng(0), 150, 258 if "% 3" in new else 260)
    with installed(fakeraw.planted((old, new))), pytest.raises((AssertionError, RuntimeError)):
        agrees(fused.layer_norm, arrays, {"eps": 1e-5})
