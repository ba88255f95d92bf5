"""The instruments themselves: they see what is there, and name what they found."""

import numpy as np
import pytest

from minilora.engine import check, fused, ops
from minilora.engine.errors import NumericsError
from minilora.engine.tensor import Parameter, Tensor, op


def test_assert_same_passes_equals_and_shows_the_first_counterexample(dev):
    draw = lambda rng: (dev(rng.standard_normal(3)),)
    check.assert_same(lambda x: x + 1, lambda x: 1 + x, draw)
    check.assert_same(lambda x: Tensor(x) * 2.0, lambda x: x + x, draw)
    with pytest.raises(AssertionError, match=r"case 0: gap .*\narguments: [^$]*mine: [^$]*theirs:"):
        check.assert_same(lambda x: x, lambda x: x + 1e-3, draw)
    with pytest.raises(AssertionError, match=r"shapes \(3,\) and \(1,\)"):
        check.assert_same(lambda x: x, lambda x: x[:1], draw)
    with pytest.raises(AssertionError, match="gap nan"):
        check.assert_same(lambda x: x * float("nan"), lambda x: x, draw)


def test_assert_same_finds_what_is_rarely_wrong(dev):
    wrong = lambda x: np.where(x > 1.5, 0, x)
    with pytest.raises(AssertionError, match=r"case [1-9]"):
        check.assert_same(wrong, lambda x: x, lambda rng: (rng.standard_normal(2),))


def test_assert_same_is_not_misled_by_one_that_writes_into_its_argument(dev):
    """Had it cleared what the other is given, both would say zero."""

    def clearing(x):
        x.fill(0)
        return x

    draw = lambda rng: (dev(rng.standard_normal(2)),)
    with pytest.raises(AssertionError, match="case 0: gap"):
        check.assert_same(clearing, lambda x: x * 2, draw)
    with pytest.raises(AssertionError, match="case 0: gap"):  # of masks too
        check.assert_same(lambda x: x > -9, lambda x: x > 9, draw)


def test_retained_counts_each_buffer_once(dev):
    x = Parameter(dev(np.ones((4, 5))))
    y = x * 2.0
    assert check.retained(y) == {}  # dx = 2 dy needs no array
    z = y * y  # both pullbacks hold the same y
    assert check.retained(z) == {"mul": 160}
    views = y.reshape(5, 4) * y.T
    assert check.retained(views) == {"mul": 160}
    assert check.retained(views, besides=[y.data]) == {}
    assert check.retained([z, views]) == {"mul": 160}
    assert check.retained(ops.exp(x)) == {"exp": 160}
    assert check.retained(Tensor(x.data) * 3.0) == {}


def test_retained_enters_what_a_joint_pullback_holds(dev):
    x = Parameter(dev(np.ones((4, 5))))
    w = Tensor(dev(np.ones(5)))
    sizes = check.retained(fused.rms_norm(x, w, eps=1e-5), besides=[w.data, x.data])
    assert sizes["rms_norm"] >= 160  # n, or what n is made from


def test_gaps_of_a_function_of_several_outputs(dev):
    @op
    def halves(xp, x):
        return (x[:2] * x[:2], x[2:] * 3.0), (
            lambda g: xp.concatenate([2 * x[:2] * g[0], 3 * g[1]]),
        )

    rng = np.random.default_rng(0)
    x, v = (dev(rng.standard_normal(4)) for _ in range(2))
    w = tuple(dev(rng.standard_normal(2)) for _ in range(2))
    assert check.directional_gap(halves, [x], [v], w) <= 1e-8
    assert check.complex_step_gap(halves, [x], [v], w) <= 1e-12


def test_a_gap_that_is_not_a_number_does_not_pass(dev):
    @op
    def hole(xp, x):
        return x * 1.0, (lambda g: g * float("nan"),)

    one = dev(np.ones(2))
    assert not check.directional_gap(hole, [one], [one], one) <= 1e-8


def test_expect_finite_names_the_first_place(dev):
    check.expect_finite("weights", dev(np.ones((2, 2))))
    with pytest.raises(NumericsError, match=r"weights: expected finite .* found nan at \(1, 0\)"):
        check.expect_finite("weights", dev(np.array([[1, 2], [np.nan, np.inf]])))
