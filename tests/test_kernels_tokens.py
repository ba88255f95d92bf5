"""The kernels that meet token numbers: embedding and cross-entropy."""

import sys

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

from minilora import Parameter
from minilora.engine import fused, loss
from minilora.engine.backend import to_numpy

pytestmark = pytest.mark.usefixtures("kernels")
few = settings(max_examples=8)


# --------------------------------------------------------------------------- embedding


@few
@given(
    st.sampled_from([(1,), (3, 37), (600,)]),
    st.sampled_from([1, 31, 33, 200]),
    st.sampled_from([1, 7, 64, 300]),
    st.sampled_from([np.int64, np.int32, np.uint8]),
    st.integers(0, 99),
)
def test_embedding(shape, V, C, kind, seed):
    rng = np.random.default_rng(seed)
    ids = (V * rng.random(shape) ** 3).astype(kind)  # small numbers come often
    agrees(fused.embedding, [rng.standard_normal((V, C))], {"ids": ids},
           expect={"embedding_forward", "embedding_backward"})  # fmt: skip


def test_an_id_outside_the_table_gives_nan_and_touches_nothing():
    p = Parameter(on_device(np.ones((5, 4), np.float32)))
    ids = on_device(np.array([0, 5, -1, 4, 1 << 40]))
    y, _ = launches(lambda: fused.embedding(p, ids=ids))
    assert np.isnan(to_numpy(y.data)).all(axis=1).tolist() == [False, True, True, False, True]
    dtable = to_numpy(y.backward(on_device(np.ones((5, 4), np.float32)))[p])
    np.testing.assert_array_equal(dtable[:, 0], [1, 0, 0, 0, 1])


# ----------------------------------------------------------------------- cross-entropy


def targets_for(rng, shape, V, ignored=0.3):
    targets = rng.integers(0, V, shape)
    targets[rng.random(shape) < ignored] = loss.IGNORE
    return targets


@few
@given(
    st.sampled_from([(1,), (3, 7), (40,)]),
    st.sampled_from([1, 2, 31, 64, 513, 3000]),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.integers(0, 99),
)
def test_cross_entropy(shape, V, spread, seed):
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((*shape, V))
    options = {"targets": targets_for(rng, shape, V)}
    agrees(loss.cross_entropy, [logits], options, expect={"token_losses", "add_losses"},
           scale=1.0)  # fmt: skip


@few
@given(
    st.sampled_from([(1,), (3, 7), (40,)]), st.sampled_from([2, 31, 64, 513]),
    st.sampled_from([1, 16, 256]), st.sampled_from([(), (0,), (1,)]), st.integers(0, 99),
)  # fmt: skip
def test_head_cross_entropy(shape, V, chunk, frozen, seed):
    rng = np.random.default_rng(seed)
    arrays = rng.standard_normal((*shape, 12)), rng.standard_normal((V, 12))
    options = {"targets": targets_for(rng, shape, V).astype(np.int32), "chunk": chunk}
    agrees(loss.head_cross_entropy, arrays, options, expect={"token_losses", "add_losses"},
           frozen=frozen, scale=1.0)  # fmt: skip


def test_logits_without_end():
    inf = np.inf
    z = np.array([[1, -inf, 2], [-inf, -inf, -inf], [3e38, -3e38, 3e38], [0, np.nan, 1]])
    z = z.astype(np.float32)
    agrees(loss.cross_entropy, [z[[0, 2]]], {"targets": np.array([0, 2])})
    p = Parameter(on_device(z))
    y = loss.cross_entropy(p, targets=on_device(np.array([0, 0, 2, 0])))
    assert np.isnan(y.item())
    dz = to_numpy(y.backward()[p])
    assert np.isnan(dz).any(axis=1).tolist() == [False, False, False, True]
    infinite = np.array([[inf, 0], [inf, inf]], np.float32)
    y = loss.cross_entropy(on_device(infinite), targets=on_device(np.array([0, 0])))
    assert np.isnan(y.item())


@pytest.mark.parametrize("wrong", [-1, 7, 1 << 40])
def test_a_target_outside_gives_nan_and_reads_nothing(wrong):
    p = Parameter(on_device(np.ones((2, 7), np.float32)))
    y = loss.cross_entropy(p, targets=on_device(np.array([3, wrong])))
    assert np.isnan(y.item())
    dz = to_numpy(y.backward()[p])
    assert np.isnan(dz).all(axis=1).tolist() == [False, True]


def test_evaluation_writes_no_gradient():
    x, W = on_device(np.ones((9, 4), np.float32)), on_device(np.ones((5, 4), np.float32))
    targets = on_device(np.zeros(9, np.int64))
    y, names = launches(lambda: loss.head_cross_entropy(x, W, targets=targets, chunk=4))
    assert names == ["token_losses"] * 3 + ["add_losses"]
    np.testing.assert_allclose(y.item(), 9 * np.log(5), rtol=1e-6)


def test_logits_are_held_once_and_one_chunk_at_a_time(request):
    if request.config.getoption("device") != "standin":
        pytest.skip("the stand-in counts bytes")
    cupy = sys.modules["standin"]
    x = Parameter(on_device(np.ones((64, 8), np.float32)))
    W, targets = on_device(np.ones((500, 8), np.float32)), on_device(np.zeros(64, np.int64))
    with cupy.no_sync():
        before = cupy.reset().used
        loss.head_cross_entropy(x, W, targets=targets, chunk=16).backward()
    logits = 16 * 500 * 4
    assert logits <= cupy.stats.peak - before <= 1.5 * logits
    assert cupy.stats.h2d == 0


def tables_and_losses():
    rng = np.random.default_rng(0)
    agrees(fused.embedding, [rng.standard_normal((40, 70))], {"ids": rng.integers(0, 40, 600)})
    targets = rng.integers(0, 2000, 20)
    agrees(loss.cross_entropy, [rng.standard_normal((20, 2000))], {"targets": targets})


PLANTED = {
    "lists": ("__syncthreads();  // the lists", "// the lists"),
    "tokens": ("(long long)listed[k] * C", "(long long)(start + k) * C"),
    "logits": ("__syncthreads();  // and z_target", "// and z_target"),
}


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("edit", PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_caught(edit):
    with installed(fakeraw.planted(edit)), pytest.raises((AssertionError, RuntimeError)):
        tables_and_losses()
