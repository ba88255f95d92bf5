"""The graph: what it keeps, in which order it is walked, and what it refuses."""

import gc
import sys
import weakref

import numpy as np
import pytest
import standin

from minilora.engine import ops
from minilora.engine.check import gradients
from minilora.engine.errors import MiniloraError
from minilora.engine.fused import linear
from minilora.engine.graph import together
from minilora.engine.rules import reference_rules, rule
from minilora.engine.tensor import Parameter, Tensor, add, matmul, mul, op


def vector(dev, *values, dtype=np.float64):
    return Parameter(dev(np.array(values, dtype)))


def test_a_graph_fifty_thousand_deep(dev, host):
    x = vector(dev, 1.0, 2.0)
    y = x
    for _ in range(50_000):
        y = y + 0.0
    np.testing.assert_array_equal(host(y.sum().backward()[x]), [1, 1])
    for _ in range(50_000):  # and one that is dropped unwalked
        y = y * 1.0
    del y


def test_a_diamond_adds_up(dev, host):
    x = vector(dev, 3.0)
    y = x * x
    z = y + y * x + x  # 2x + 3x² + 1
    np.testing.assert_array_equal(host(z.backward()[x]), [2 * 3 + 27 + 1])


def test_two_live_graphs_do_not_disturb_each_other(dev, host):
    x, y = vector(dev, 2.0), vector(dev, 5.0)
    a = (x * y).sum()
    b = (x * x * y).sum()
    grads_b = b.backward()
    grads_a = a.backward()
    assert [host(grads_a[p]).item() for p in (x, y)] == [5, 2]
    assert [host(grads_b[p]).item() for p in (x, y)] == [20, 4]


def test_a_graph_is_walked_once(dev):
    x = vector(dev, 2.0)
    y = x * x
    z = y + 1.0
    z.backward()
    for walked in (z, y, y * 3.0):
        with pytest.raises(MiniloraError, match="walked before"):
            walked.backward()


def test_into_adds_and_knows_its_parameters(dev, host):
    x, y = vector(dev, 2.0), vector(dev, 3.0)
    into = {x: dev(np.array([10.0])), y: dev(np.array([20.0]))}
    arrays = dict(into)
    assert (x * y).backward(into=into) is into
    (x * x).backward(into=into)
    assert all(into[p] is arrays[p] for p in (x, y))
    assert [host(into[p]).item() for p in (x, y)] == [10 + 3 + 4, 22]
    with pytest.raises(MiniloraError, match="no array in `into`"):
        (x * y).backward(into={x: into[x]})


def test_sums_leave_the_arrays_of_others_alone(dev, host):
    """An op whose pullback returns its own state: a sum in place would corrupt it."""
    kept = dev(np.array([1.0, 1.0]))

    @op
    def lender(xp, x):
        return x * 1.0, (lambda g: kept,)

    x = vector(dev, 1.0, 1.0)
    y = lender(x) + lender(x) + lender(x)
    np.testing.assert_array_equal(host(y.sum().backward()[x]), [3, 3])
    np.testing.assert_array_equal(host(kept), [1, 1])


def test_several_outputs_share_one_node(dev, host):
    seen = []

    @op
    def both(xp, x):
        def pullback(g):
            seen.append(tuple(part is None for part in g))
            return sum(f * part for f, part in zip((2, 3), g, strict=True) if part is not None)

        return (x * 2.0, x * 3.0), (pullback,)

    x = vector(dev, 1.0)
    a, b = both(x)
    assert a.node is b.node
    np.testing.assert_array_equal(host((a + b).backward()[x]), [5])
    a, b = both(x)
    np.testing.assert_array_equal(host(b.backward()[x]), [3])
    assert seen == [(False, False), (True, False)]


def test_a_joint_pullback_is_told_what_is_wanted(dev):
    told = []

    @op
    def joint(xp, a, b, *, wants):
        told.append(wants)

        def pullback(g, wants):
            told.append(wants)
            return tuple(g if wanted else None for wanted in wants)

        return a + b, together(pullback)

    x = vector(dev, 1.0)
    joint(x, Tensor(x.data)).backward()
    joint(Tensor(x.data), x).backward()
    assert told == [(True, False)] * 2 + [(False, True)] * 2


def test_numbers_and_none_pass_without_an_edge(dev):
    x = vector(dev, 1.0, dtype=np.float32)
    for number in (2, 2.0, np.float64(2), np.int64(2), np.float32(2)):
        assert (x * number).dtype == np.float32
        assert len((number * x).edges) == 1
    y = linear(x[None], Parameter(dev(np.ones((1, 1), np.float32))), None)
    assert len(y.edges) == 2


def test_infix_operators_agree_with_their_ops(dev, host):
    a, b = Tensor(dev(np.array([[1.0, 2.0]]))), Tensor(dev(np.array([[3.0, 5.0]])))
    pairs = [
        (a + b, [[4, 7]]), (a - b, [[-2, -3]]), (a * b, [[3, 10]]), (b / a, [[3, 2.5]]),
        (-a, [[-1, -2]]), (b**2, [[9, 25]]), (a @ b.T, [[13]]), (1 - a, [[0, -1]]),
        (6 / b, [[2, 1.2]]), (1 + a, [[2, 3]]), (a[0, 1:], [2]), (a.sum(), 3), (a.mean(), 1.5),
        (a.reshape(2, 1), [[1], [2]]), (a.transpose(1, 0), [[1], [2]]), (b.data + a, [[4, 7]]),
        (a.sum(axis=1, keepdims=True), [[3]]), (b.data @ a.T, [[13]]),
    ]  # fmt: skip
    for found, wanted in pairs:
        assert isinstance(found, Tensor)
        np.testing.assert_array_equal(host(found.data), wanted)
    assert a.sum().item() == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda x, dev: Tensor(dev(np.arange(3))),
        lambda x, dev: mul(x, dev(np.array([True]))),
        lambda x, dev: add(x, [1.0]),
        lambda x, dev: add(x, "1"),
        lambda x, dev: ops.where(x, x, mask=x),
    ],
    ids=["integers", "booleans", "a list", "a string", "a Tensor as an option"],
)
def test_what_is_no_value_is_refused(call, dev):
    with pytest.raises(MiniloraError, match=r"expected|takes no Tensor"):
        call(vector(dev, 1.0), dev)


def test_two_libraries_never_mix_in_silence(monkeypatch):
    modules = {}
    standin.install(modules)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    xp = sys.modules["cupy"]
    there, here = xp.asarray(np.ones(2)), np.ones(2)
    for call in (lambda: add(there, here), lambda: add(Tensor(here), Tensor(there))):
        with pytest.raises(MiniloraError, match="meet"):
            call()


def test_backward_says_what_it_needs(dev):
    x = vector(dev, 1.0, 2.0)
    with pytest.raises(MiniloraError, match="single number"):
        (x * 2.0).backward()
    for cotangent, found in ((dev(np.ones(1)), r"\(1,\)"), (dev(np.ones((1, 2))), r"\(1, 2\)"),
                             (1.0, "1.0"), (Tensor(x.data), "")):  # fmt: skip
        with pytest.raises(MiniloraError, match=rf"cotangent array of shape \(2,\), found {found}"):
            (x * 2.0).backward(cotangent)
    with pytest.raises(MiniloraError, match="is a Parameter"):
        Tensor(x.data).sum().backward()
    with pytest.raises(MiniloraError, match="at least one array"):
        add(1.0, 2.0)


def test_a_cotangent_may_be_given(dev, host):
    x = vector(dev, 1.0, 2.0)
    g = (x * x).backward(dev(np.array([10.0, 1.0])))[x]
    np.testing.assert_array_equal(host(g), [20, 4])


def test_the_walk_frees_as_it_goes(dev):
    """When the first op's pullback runs, what later ones kept is gone."""
    alive = []

    @op
    def watcher(xp, x):
        def pullback(g):
            alive.append(held() is not None)
            return g

        return x * 1.0, (pullback,)

    x = Parameter(dev(np.ones((4, 4))))
    y = watcher(x)
    activation = y * 2.0
    held = weakref.ref(activation.data)
    z = (activation * activation).sum()
    del activation, y
    assert held() is not None
    z.backward()
    gc.collect()
    assert alive == [False]


def test_backward_leaves_no_cycles(dev):
    W = Parameter(dev(np.ones((3, 3))))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            ops.tanh(matmul(Tensor(dev(np.ones((2, 3)))), W)).sum().backward()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_rule_falls_back_and_the_setting_reaches_it(dev, xp):
    calls = []

    @rule
    def thrice(xp, x):
        calls.append("specification")
        return 3 * x

    @thrice.on(xp.__name__)
    def _(xp, x):
        calls.append("fast")
        return NotImplemented if x.ndim > 1 else 3 * x

    thrice(dev(np.ones(2)))
    thrice(dev(np.ones((2, 2))))
    with reference_rules():
        thrice(dev(np.ones(2)))
    assert calls == ["fast", "fast", "specification", "specification"]


def test_gradients_of_unused_arguments_are_none(dev):
    found, _ = gradients(lambda a, b: a * 2.0, [dev(np.ones(2)), dev(np.ones(2))], dev(np.ones(2)))
    assert found[1] is None
