"""Cross-entropy: a sum over scored tokens, the same in one piece and in chunks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.engine.check import gradients, retained
from minilora.engine.errors import MiniloraError, NumericsError
from minilora.engine.loss import IGNORE, cross_entropy, head_cross_entropy, scored
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Parameter


def plain(z, targets):
    """-Σ log softmax(z)[target] on the host."""
    z = z - z.max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    rows = np.flatnonzero(targets != IGNORE)
    return -log_p[rows, targets[rows]].sum()


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 50), st.floats(0, 1), st.integers(0, 9)
)
def test_all_ways_agree(dev, host, n, V, chunk, ignored, seed):
    rng = np.random.default_rng(seed)
    x, W = rng.standard_normal((n, 4)), rng.standard_normal((V, 4))
    targets = np.where(rng.random(n) < ignored, IGNORE, rng.integers(0, V, n))
    t, one = dev(targets), dev(np.array(1.0))
    wanted = plain(x @ W.T, targets)
    (dz,), loss = gradients(lambda z: cross_entropy(z, targets=t), [dev(x @ W.T)], one)
    np.testing.assert_allclose(host(loss.data), wanted, rtol=1e-12, atol=1e-12)
    for rules in (False, True):
        head = lambda x, W: head_cross_entropy(x, W, targets=t, chunk=chunk)
        if rules:
            with reference_rules():
                (dx, dW), value = gradients(head, [dev(x), dev(W)], one)
        else:
            (dx, dW), value = gradients(head, [dev(x), dev(W)], one)
        np.testing.assert_allclose(host(value.data), wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(host(dx), host(dz) @ W, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(host(dW), host(dz).T @ x, rtol=1e-10, atol=1e-12)


def test_ignored_tokens_cost_nothing_and_pull_nothing(dev, host):
    targets = np.array([[1, IGNORE], [IGNORE, IGNORE]])
    assert scored(targets) == 1
    z = Parameter(dev(np.random.default_rng(0).standard_normal((2, 2, 5))))
    g = host(cross_entropy(z, targets=dev(targets)).backward()[z])
    assert np.array_equal(np.abs(g).sum(axis=-1) > 0, targets != IGNORE)
    none = cross_entropy(z, targets=dev(np.full((2, 2), IGNORE)))
    assert none.item() == 0
    assert not host(none.backward()[z]).any()


def test_a_sum_splits_over_micro_batches(dev, host):
    rng = np.random.default_rng(0)
    x, W = dev(rng.standard_normal((6, 4))), dev(rng.standard_normal((5, 4)))
    targets = rng.integers(0, 5, 6)
    loss = lambda part: head_cross_entropy(x[part], W, targets=dev(targets[part])).item()
    np.testing.assert_allclose(loss(slice(None)), loss(slice(2)) + loss(slice(2, 6)), rtol=1e-13)


def test_logits_are_held_a_chunk_at_a_time(dev):
    x, W = Parameter(dev(np.ones((64, 4)))), Parameter(dev(np.ones((500, 4))))
    value = head_cross_entropy(x, W, targets=dev(np.zeros(64, np.int64)), chunk=8)
    kept = retained(value, besides=[x.data, W.data])["head_cross_entropy"]
    assert kept <= 8 * (64 * 4 + 500 * 4) + 1024  # dx and dW; all logits would be 8 * 64 * 500


def test_extreme_logits_stay_finite(dev, host):
    z = Parameter(dev(np.array([[1e4, -1e4, 0.0]])))
    value = cross_entropy(z, targets=dev(np.array([1])))
    assert value.item() == 2e4
    np.testing.assert_array_equal(host(value.backward()[z]), [[1, -1, 0]])


@pytest.mark.parametrize("wrong", [5, -1, 400])
def test_a_target_outside_the_vocabulary_is_named(wrong, device):
    if device != "cpu":
        pytest.skip("a device would have to wait for the answer")
    x, W = np.ones((2, 4), np.float32), np.ones((5, 4), np.float32)
    targets = np.array([0, wrong])
    with pytest.raises(NumericsError, match=rf"0\.\.4.* found {wrong}"):
        head_cross_entropy(x, W, targets=targets)
    for loss in (lambda: head_cross_entropy(x, W, targets=targets),
                 lambda: cross_entropy(x @ W.T, targets=targets)):  # fmt: skip
        with reference_rules(), pytest.raises(NumericsError, match=rf"0\.\.4.* found {wrong}"):
            loss()


@pytest.mark.parametrize(
    "targets", [np.zeros(2), np.zeros((2, 1), np.int64), np.zeros(3, np.int64)]
)
def test_targets_of_another_kind_are_refused(targets, dev):
    with pytest.raises(MiniloraError, match="whole-number targets"):
        cross_entropy(dev(np.ones((2, 5))), targets=dev(targets))
    with pytest.raises(MiniloraError, match="whole-number targets"):
        head_cross_entropy(dev(np.ones((2, 4))), dev(np.ones((5, 4))), targets=dev(targets))
