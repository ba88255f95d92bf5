"""Recomputing gives the same numbers and keeps less."""

import gc
import weakref

import numpy as np
import pytest

from minilora.engine.check import retained
from minilora.engine.errors import MiniloraError
from minilora.engine.fused import dropout, gelu, linear
from minilora.engine.graph import pull
from minilora.engine.recompute import recompute
from minilora.engine.rules import reference_rules, rule
from minilora.engine.tensor import Parameter, Tensor


@pytest.fixture
def parts(dev):
    rng = np.random.default_rng(0)
    W1, W2, x = (Parameter(dev(rng.standard_normal(s))) for s in ((6, 4), (4, 6), (3, 4)))
    return W1, W2, x


def both(host, function, *arguments):
    """Value and gradients, straight and recomputed, must be equal to the bit."""
    inner = [a * 2.0 for a in arguments]  # values of an outer graph, one for each run
    straight = function(*inner)
    again = recompute(function, *[a * 2.0 for a in arguments])
    np.testing.assert_array_equal(host(straight.data), host(again.data))
    a, b = straight.sum().backward(), again.sum().backward()
    assert a.keys() == b.keys()
    for p in a:
        np.testing.assert_array_equal(host(a[p]), host(b[p]))
    return a


def test_the_same_value_and_gradients(parts, host):
    W1, W2, x = parts
    block = lambda x: linear(gelu(linear(x, W1)), W2)
    assert both(host, block, x).keys() == {W1, W2, x}
    assert both(host, block, Tensor(x.data)).keys() == {W1, W2}
    assert both(host, lambda x: recompute(block, block(x)), x).keys() == {W1, W2, x}


def test_dropout_sees_the_same_mask_twice(parts, host):
    W1, W2, x = parts

    def block(x, rng=None):
        h = linear(dropout(gelu(linear(x, W1)), rate=0.5, rng=rng), W2)
        return dropout(h, rate=0.5, rng=rng)

    y = recompute(block, x, rng=np.random.default_rng(3))
    seed = int(np.random.default_rng(3).integers(1 << 63))
    z = block(x, rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(host(y.data), host(z.data))
    a, b = y.sum().backward(), z.sum().backward()
    for p in a:
        np.testing.assert_array_equal(host(a[p]), host(b[p]))


def test_several_outputs_and_some_unused(parts, host):
    W1, _, x = parts
    two = lambda x: (linear(x, W1), linear(x, W1) * 2.0)
    a, b = recompute(two, x)
    assert a.node is b.node
    grads = pull([b], [b.data * 0 + 1])
    np.testing.assert_allclose(host(grads[x]), 2 * host(W1.data).sum(axis=0) * np.ones((3, 1)))


def test_it_keeps_its_arguments_and_nothing_else(parts):
    W1, W2, x = parts
    weights = [W1.data, W2.data]
    block = lambda x: linear(gelu(linear(x, W1)), W2)
    entry = x * 1.0
    straight = sum(retained(block(entry), besides=weights).values())
    kept = retained(recompute(block, entry), besides=weights)
    assert kept == {"recompute": entry.data.nbytes}
    assert straight > kept["recompute"]


def test_the_outer_graph_is_not_held_by_the_inner(parts, dev):
    x = parts[2]
    outer = x * Tensor(dev(np.ones((3, 4))))
    gone = weakref.ref(outer)
    y = recompute(lambda x: gelu(x), outer)
    del outer
    gc.collect()
    assert gone() is None
    assert y.sum().backward().keys() == {x}


def test_what_is_no_tensor_is_refused(parts):
    for wrong, found in ((lambda x: [x], "list"), (lambda x: (x, 1.0), "float")):
        with pytest.raises(MiniloraError, match=f"recompute: expected a Tensor .* found {found}"):
            recompute(wrong, parts[2] * 2.0)


def test_a_frozen_function_builds_no_graph(parts):
    W1, _, x = parts
    y = recompute(lambda x: linear(x, Tensor(W1.data)), Tensor(x.data))
    assert y.node is None


def test_the_rule_setting_is_that_of_the_way_out(dev, xp):
    calls = []

    @rule
    def probe(xp, x):
        calls.append("specification")
        return x

    @probe.on(xp.__name__)
    def _(xp, x):
        calls.append("fast")
        return x

    def block(x):
        probe(x.data)
        return x * 2.0

    x = Parameter(dev(np.ones(2)))
    with reference_rules():
        y = recompute(block, x)
    y.sum().backward()
    assert calls == ["specification", "specification"]
