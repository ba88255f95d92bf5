"""Every op against evidence that knows nothing of its pullbacks."""

import gc
import importlib
import pkgutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from op_table import AXIS_WANTED, KINKED, LINEAR, TABLE, UPDATES, name_of, placed

import minilora
from minilora.engine import fused, tensor
from minilora.engine.check import (
    adjoint_gap,
    complex_step_gap,
    directional_gap,
    gradients,
    inner,
    retained,
)
from minilora.engine.graph import together
from minilora.engine.rules import Rule, reference_rules
from minilora.engine.tensor import Op, Parameter, Tensor, op

every_op = pytest.mark.parametrize("sample", TABLE, ids=name_of)


def rules_of_the_library():
    found = {}
    for info in pkgutil.walk_packages(minilora.__path__, "minilora."):
        if info.name.endswith(("__main__", "bench_peers", "bench_torch")):  # these need torch
            continue
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, Rule):  # under one name, one rule: none may hide another
                assert found.setdefault(value.__name__, value) is value, value.__name__
    return found


def test_every_op_has_an_entry_and_every_other_rule_a_test():
    rules = rules_of_the_library()
    ops = {name for name, rule in rules.items() if isinstance(rule, Op)}
    assert ops == {sample.op.__name__ for sample in TABLE}
    assert rules.keys() - ops == UPDATES.keys()
    for name, file in UPDATES.items():
        assert name in (Path(__file__).parent / file).read_text(), name


def test_every_op_meets_no_entries_and_a_single_number():
    """0-size and 0-d arguments; the other tests of the table then say what they give."""
    names = {sample.op.__name__ for sample in TABLE}
    empty = set()
    for sample in TABLE:
        function, arrays, _, _ = placed(sample, "cpu")
        sizes = [a.size for a in arrays] + [p.size for p in parts(function(*map(Tensor, arrays)))]
        empty |= {sample.op.__name__} if 0 in sizes else set()
    assert names - empty == set()
    single = {sample.op.__name__ for sample in TABLE if () in sample.shapes}
    assert names - single == AXIS_WANTED


@every_op
def test_gradient_is_that_of_a_difference_quotient(sample, device):
    with reference_rules():
        function, arrays, w, directions = placed(sample, device)
        assert directional_gap(function, arrays, directions, w) <= 1e-8


@every_op
def test_gradient_is_that_of_a_complex_step(sample, device):
    if sample.op.__name__ in KINKED:
        pytest.skip("not analytic")
    function, arrays, w, directions = placed(sample, device)
    with reference_rules():
        assert complex_step_gap(function, arrays, directions, w) <= 1e-12


@every_op
def test_linear_ops_and_their_pullbacks_are_adjoint(sample, device):
    if sample.op.__name__ not in LINEAR:
        pytest.skip("not linear")
    function, arrays, w, _ = placed(sample, device)
    if sample.op.__name__ == "frozen_linear":  # affine: take the bias away
        offset = function(arrays[0] * 0).data
        plain = lambda x: function(x) - offset
    else:
        plain = function
    assert adjoint_gap(plain, arrays[0], w) <= 1e-12


@every_op
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
def test_dtype_is_kept_and_arguments_are_left_alone(sample, dtype, device, host):
    if dtype == np.float32 and has_base(sample):
        pytest.skip("the sample's base is float64")
    function, arrays, w, _ = placed(sample, device)
    arrays = [a.astype(dtype) for a in arrays]
    w = tuple(p.astype(dtype) for p in w) if isinstance(w, tuple) else w.astype(dtype)
    before = [host(a).tobytes() for a in arrays] + [host(p).tobytes() for p in parts(w)]
    found, value = gradients(function, arrays, w)
    assert all(part.dtype == dtype for part in parts(value))
    for g, a in zip(found, arrays, strict=True):
        assert type(g) is type(a)  # an array even where NumPy has made a number of it
        assert g.dtype == dtype
        assert g.shape == a.shape
    assert [host(a).tobytes() for a in arrays] + [host(p).tobytes() for p in parts(w)] == before


def has_base(sample):
    return "base" in sample.options(np.random.default_rng(0))


def parts(value):
    return value if isinstance(value, tuple) else (value,)


@every_op
def test_a_frozen_argument_gives_no_edge(sample, device, host):
    function, arrays, w, _ = placed(sample, device)
    assert all(not part.edges for part in parts(function(*[Tensor(a) for a in arrays])))
    whole, _ = gradients(function, arrays, w)
    for i in range(len(arrays)):
        given = [Parameter(a) if j == i else Tensor(a) for j, a in enumerate(arrays)]
        value = parts(function(*given))
        targets = {t for part in value for parents, _ in part.edges for t, _ in parents}
        assert targets == {given[i]}
        (alone,), _ = gradients(
            lambda x, i=i: function(*[x if j == i else a for j, a in enumerate(arrays)]),
            [arrays[i]],
            w,
        )
        np.testing.assert_allclose(host(alone), host(whole[i]), rtol=1e-12, atol=1e-12)


@every_op
def test_float32_is_near_float64(sample, device, host):
    """Fast rules included, where the library has them."""
    function, arrays, w, _ = placed(sample, device)
    with reference_rules():
        wanted, value = gradients(function, arrays, w)
    if has_base(sample):
        pytest.skip("the sample's base is float64; test_fast_cpu.py has one in float32")
    narrow = [a.astype(np.float32) for a in arrays]
    w32 = tuple(p.astype(np.float32) for p in w) if isinstance(w, tuple) else w.astype(np.float32)
    found, value32 = gradients(function, narrow, w32)
    pairs = [(a.data, b.data) for a, b in zip(parts(value32), parts(value), strict=True)]
    for a, b in pairs + list(zip(found, wanted, strict=True)):
        gap = np.linalg.norm((host(a) - host(b)).ravel())
        assert gap <= 2e-6 * (1 + np.linalg.norm(host(b).ravel()))


# ------------------------------------------------------------------- planted mistakes


@op
def double_gradient(xp, a, b):
    return a * b, (lambda g: 2 * g * b, lambda g: g * a)


@op
def wrong_sign(xp, a, b):
    return a - b, (lambda g: g, lambda g: g)


@op
def missing_term(xp, a, b):
    s = 1 / (1 + xp.exp(-a))
    return a * s * b, (lambda g: g * b * s, lambda g: g * a * s)


@op
def swapped(xp, a, b):
    return a * a * b, together(lambda g, wants: (g * a * a, 2 * g * a * b))


@op
def nearly(xp, a, b):
    return xp.tanh(a) * b, (
        lambda g: g * b * (1.000001 - xp.tanh(a) ** 2),
        lambda g: g * xp.tanh(a),
    )


@pytest.mark.parametrize("wrong", [double_gradient, wrong_sign, missing_term, swapped, nearly])
def test_a_wrong_pullback_is_caught(wrong, dev):
    rng = np.random.default_rng(0)
    a, b, v1, v2, w = (dev(rng.standard_normal((3, 4))) for _ in range(5))
    assert directional_gap(wrong, [a, b], [v1, v2], w) > 1e-8
    assert complex_step_gap(wrong, [a, b], [v1, v2], w) > 1e-12


def test_a_forgotten_broadcast_is_caught(dev):
    @op
    def careless(xp, a, b):
        return a + b, (lambda g: g, lambda g: g)

    rng = np.random.default_rng(0)
    a, b, w = dev(rng.standard_normal((3, 4))), dev(rng.standard_normal(4)), dev(np.ones((3, 4)))
    found, _ = gradients(careless, [a, b], w)
    assert found[1].shape != b.shape  # what the table's shape test looks at


def test_a_wrong_adjoint_is_caught(dev):
    @op
    def wrong(xp, x):
        return x[::2], (lambda g: xp.concatenate([g, g]),)

    rng = np.random.default_rng(0)
    assert adjoint_gap(wrong, dev(rng.standard_normal(6)), dev(rng.standard_normal(3))) > 1e-3


# ----------------------------------------------------------------- what is not retained


def test_a_frozen_linear_lets_its_activation_go(dev):
    W = Tensor(dev(np.ones((2, 3))))
    b = Parameter(dev(np.ones(2)))
    array = dev(np.ones((4, 3)))
    held = weakref.ref(array)
    x = Parameter(dev(np.ones((4, 3)))) * array  # an activation, made inside the graph
    gone = weakref.ref(x.data)
    y = fused.linear(x, W, b)
    del x, array
    gc.collect()
    assert held() is not None  # the product's own pullback needs its other factor
    assert gone() is None  # but no dW is due, so the activation is gone
    assert retained(y).keys() <= {"mul", "linear"}
    assert retained(fused.linear(Parameter(dev(np.ones((4, 3)))), W), besides=[W.data]) == {}
    thawed = Parameter(W.data)
    x = Parameter(dev(np.ones((4, 3)))) * 2.0
    assert retained(fused.linear(x, thawed), besides=[W.data]) == {"linear": x.data.nbytes}


def test_adapters_keep_the_input_only_where_a_trains(dev):
    from minilora.model.layers import Linear

    base = Linear(Tensor(dev(np.ones((8, 6)))))
    x = Parameter(dev(np.ones((5, 6)))) * 2.0
    A, B = (dev(np.ones(s)) for s in ((2, 6), (8, 2)))
    keep = lambda A, B: retained(
        fused.lora_linear(x, A, B, base=base, scale=1.0), besides=[A.data, B.data]
    )
    both = keep(Parameter(A), Parameter(B)).get("lora_linear", 0)
    only_b = keep(Tensor(A), Parameter(B)).get("lora_linear", 0)
    assert both == x.data.nbytes + 5 * 2 * 8  # x, and u = x Aᵀ
    assert only_b == 5 * 2 * 8


# --------------------------------------------------------- values where limits are near


def test_softmax_of_extremes(dev, host, xp):
    x = dev(np.array([[1e4, 0.0], [-np.inf, 3.0], [-np.inf, -np.inf]]))
    y = host(minilora.engine.ops.softmax(x).data)
    np.testing.assert_array_equal(y, [[1, 0], [0, 1], [0, 0]])
    assert host(minilora.engine.ops.logsumexp(x).data)[2] == -np.inf
    assert np.isnan(host(minilora.engine.ops.softmax(dev(np.array([np.nan, 1.0]))).data)).all()
    big = minilora.engine.ops.sigmoid(dev(np.array([-1e5, 1e5])))
    np.testing.assert_array_equal(host(big.data), [0, 1])


def test_rms_norm_of_numbers_whose_squares_overflow(dev, host):
    x = dev(np.full((2, 4), 1e20, np.float32))
    one = dev(np.ones(4, np.float32))
    np.testing.assert_allclose(host(fused.rms_norm(x, one, eps=1e-5).data), 1, rtol=1e-6)


def test_maximum_shares_its_gradient_among_ties(dev, host):
    x = Parameter(dev(np.array([1.0, 3.0, 3.0])))
    g = minilora.engine.ops.max(x).backward()[x]
    np.testing.assert_array_equal(host(g), [0, 0.5, 0.5])


def test_dropout_keeps_the_share_it_says_and_the_mean(dev, host):
    x = dev(np.ones((200, 300), np.float32))
    y = host(fused.dropout(x, rate=0.3, rng=np.random.default_rng(0)).data)
    kept = (y != 0).mean()
    assert abs(kept - 0.7) <= 4 * np.sqrt(0.3 * 0.7 / y.size)
    assert abs(y.mean() - 1) <= 0.01
    again = host(fused.dropout(x, rate=0.3, rng=np.random.default_rng(0)).data)
    other = host(fused.dropout(x, rate=0.3, rng=np.random.default_rng(1)).data)
    assert np.array_equal(y, again)
    assert 0.5 < ((y != 0) == (other != 0)).mean() < 0.65  # 0.7² + 0.3² = 0.58: independent
    with pytest.raises(minilora.MiniloraError, match="rate"):
        fused.dropout(x, rate=1.0, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: tensor.matmul(x, x),
        lambda x: fused.linear(x, x[:, :2]),
        lambda x: minilora.engine.ops.softmax(x, axis=(0, 1)),
        lambda x: minilora.engine.attention.split_heads(x[None], heads=(2,), width=3),
        lambda x: minilora.engine.loss.cross_entropy(x, targets=x),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, dev):
    with pytest.raises(minilora.MiniloraError, match="expected"):
        call(dev(np.ones((2, 3))))


def test_inner_products_are_plain_numbers(dev):
    assert inner(Tensor(dev(np.ones(3))), dev(np.full(3, 2.0))) == 6.0
