"""PiSSA, LoftQ and DoRA: what each starts as, what it is to training, and to a file."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_files import adapted_of, dora_of, logits, model_of

from minilora import (
    AdamW,
    Parameter,
    Tensor,
    adapt,
    count,
    freeze,
    generate,
    merge,
    parameters,
    rebuild,
    reference_rules,
    to_device,
    walk,
)
from minilora.engine.backend import to_numpy
from minilora.engine.bf16 import BFLOAT16
from minilora.engine.errors import AdapterError, MiniloraError, NumericsError
from minilora.engine.fused import linear
from minilora.engine.tensor import matmul
from minilora.lora.adapters import put
from minilora.lora.lora import LoRALinear
from minilora.lora.variants import (
    DoRALinear,
    SplitLinear,
    dora,
    learned,
    loftq,
    pissa,
    row_lengths,
)
from minilora.model.layers import Linear
from minilora.quant.bf16 import to_bf16
from minilora.quant.linear import QuantizedLinear, merge_quantized, quantize

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 80))
coarse = partial(quantize, code="int4", block=32, double=False)


def layer(device, sizes, alpha=3.0, bias=True, seed=0, **options):
    """An adapter with both factors away from zero, float64; and inputs for it."""
    d_out, d_in, r, n = sizes
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    base = Linear(Tensor(draw((d_out, d_in))), Tensor(draw(d_out)) if bias else None)
    A, B = Parameter(draw((min(r, d_out, d_in), d_in))), draw((d_out, min(r, d_out, d_in)))
    node = LoRALinear(base, A, Parameter(B), alpha, **options)
    return to_device(node, device), to_device(Tensor(draw((n, d_in))), device).data


def weight(host, node):
    """W0 + s B A"""
    return host(node.base.dense()) + node.scale * host(node.B.data) @ host(node.A.data)


def tail(W, r):
    """What the best matrix of rank r leaves of W."""
    return np.sqrt(np.square(np.linalg.svd(W, compute_uv=False)[r:]).sum())


def trained(tree, x, steps=3):
    optimizer = AdamW(tree, lr=1e-2)
    for _ in range(steps):
        y = optimizer.model(x)
        (y * y).sum().backward(into=optimizer.gradients)
        optimizer.step()
    return freeze(optimizer.model)


# ------------------------------------------------------------------------ PiSSA


@given(SIZES, st.booleans(), st.sampled_from([0.5, 3.0, 16.0]))
def test_pissa_splits_a_weight_into_its_best_part_and_the_rest(
    device, host, sizes, stabilized, alpha
):
    node, x = layer(device, sizes, alpha=alpha, rank_stabilized=stabilized)
    W0, r = host(node.base.weight.data), node.rank
    start = pissa(node)
    assert type(start) is SplitLinear
    assert (start.alpha, start.rank_stabilized, start.rank) == (alpha, stabilized, r)
    np.testing.assert_allclose(weight(host, start), W0, atol=1e-10)
    rest = np.linalg.norm(host(start.base.weight.data))
    assert rest == pytest.approx(tail(W0, r), rel=1e-9, abs=1e-9)
    root = np.linalg.norm(host(start.A.data), axis=1)  # of s B A: half lies in each factor
    np.testing.assert_allclose(root, np.linalg.norm(host(start.B.data), axis=0), atol=1e-12)
    np.testing.assert_allclose(host(start(x).data), host(node.base(x).data), atol=1e-9)
    assert host(node.base.weight.data).tobytes() == W0.tobytes()


@given(SIZES)
def test_what_pissa_learned_is_an_adapter_of_twice_the_rank_for_w0(device, host, sizes):
    node, x = layer(device, sizes)
    start = pissa(node)
    end = trained(start, x)
    assert np.abs(weight(host, end) - weight(host, start)).max() > 1e-3
    adapter = learned(start, end)
    assert adapter[""].A.shape[0] == 2 * node.rank
    on_w0 = put(node.base, adapter)
    np.testing.assert_allclose(weight(host, on_w0), weight(host, end), atol=1e-9)
    assert type(on_w0) is LoRALinear


def test_qpissa_quantizes_the_rest(device, host):
    node, _ = layer(device, (24, 16, 4, 3))
    W0 = host(node.base.weight.data)
    start = pissa(node, coarse)
    rest = coarse(pissa(node).base)
    assert isinstance(start.base, QuantizedLinear)
    assert host(start.base.dense()).tobytes() == host(rest.dense()).tobytes()
    error = np.linalg.norm(weight(host, start) - W0)
    assert 0 < error < np.linalg.norm(host(coarse(node.base).dense()) - W0)


# ------------------------------------------------------------------------ LoftQ


@given(SIZES, st.sampled_from([0.5, 3.0, 16.0]))
def test_loftq_gives_back_the_best_part_of_what_quantization_lost(device, host, sizes, alpha):
    node, _ = layer(device, sizes, alpha=alpha)
    W0 = host(node.base.weight.data)
    start = loftq(node, coarse)
    Q = host(coarse(node.base).dense())
    assert host(start.base.dense()).tobytes() == Q.tobytes()  # the base that QLoRA has
    error = np.linalg.norm(weight(host, start) - W0)
    assert error == pytest.approx(tail(W0 - Q, node.rank), rel=1e-6, abs=1e-9)


@given(SIZES, st.integers(2, 5))
def test_each_round_of_loftq_ends_with_the_best_factors_for_its_codes(device, host, sizes, rounds):
    node, _ = layer(device, sizes)
    W0 = host(node.base.weight.data)
    before, after = loftq(node, coarse, rounds - 1), loftq(node, coarse, rounds)
    left = W0 - before.scale * host(before.B.data) @ host(before.A.data)
    again = coarse(Linear(to_device(Tensor(left), device)))
    np.testing.assert_allclose(host(after.base.dense()), host(again.dense()), atol=1e-9)
    error = np.linalg.norm(weight(host, after) - W0)
    gap = tail(W0 - host(after.base.dense()), node.rank)
    assert error == pytest.approx(gap, rel=1e-6, abs=1e-9)


def test_more_rounds_of_loftq_help_coarse_codes_on_average(device, host):
    """24 drawn weights: five rounds leave less than one, and one less than QLoRA's start."""
    error = {rounds: [] for rounds in (0, 1, 5)}
    for seed in range(24):
        node, _ = layer(device, (24, 32, 4, 1), seed=seed)
        W0 = host(node.base.weight.data)
        error[0].append(np.linalg.norm(host(coarse(node.base).dense()) - W0))
        for rounds in (1, 5):
            start = loftq(node, coarse, rounds)
            error[rounds].append(np.linalg.norm(weight(host, start) - W0))
    assert np.all(np.less(error[1], error[0]))
    assert np.mean(error[5]) < np.mean(error[1])


# ------------------------------------------------------------------------ DoRA


@given(SIZES)
def test_row_lengths_are_those_of_the_whole_weight(device, host, sizes):
    node, _ = layer(device, sizes)
    for base in (node.base, coarse(node.base)):
        W = host(base.dense()) + node.scale * host(node.B.data) @ host(node.A.data)
        for rules in (reference_rules, nullcontext):
            with rules():
                n = row_lengths(node.A.data, node.B.data, base=base, scale=node.scale)
            np.testing.assert_allclose(host(n), np.linalg.norm(W, axis=1), rtol=1e-9)


@given(SIZES, st.booleans())
def test_dora_starts_as_its_base_to_the_bit(device, host, sizes, bias):
    node, x = layer(device, sizes, bias=bias)
    plain = LoRALinear(node.base, node.A, Parameter(node.B.data * 0), node.alpha)
    start = dora(plain)
    assert host(start(x).data).tobytes() == host(plain(x).data).tobytes()
    assert isinstance(start.magnitude, Parameter)
    assert count(start, trainable=True) == count(plain, trainable=True) + node.base.shape[0]


@given(SIZES, st.booleans())
def test_the_rows_of_a_merged_dora_have_the_lengths_that_train(device, host, sizes, bias):
    node, x = layer(device, sizes, bias=bias)
    d_out = node.base.shape[0]
    m = np.random.default_rng(5).uniform(0.1, 2, d_out)
    node = with_magnitude(dora(node), to_device(Parameter(m), device))
    plain = merge(node)
    W = host(plain.weight.data)
    np.testing.assert_allclose(np.linalg.norm(W, axis=1), m, rtol=1e-9)
    np.testing.assert_allclose(W - host(node.base.weight.data), host(node.delta()), atol=1e-9)
    np.testing.assert_allclose(host(node(x).data), host(plain(x).data), atol=1e-9)
    straight = weight(host, node)  # the direction of W0 + s B A, row by row
    cosine = (W * straight).sum(1) / (np.linalg.norm(W, axis=1) * np.linalg.norm(straight, axis=1))
    np.testing.assert_allclose(cosine, 1, rtol=1e-9)


@given(SIZES, st.booleans())
def test_dora_has_the_gradients_of_its_equation_with_n_constant(device, host, sizes, bias):
    node, x = layer(device, sizes, bias=bias)
    node = dora(node)
    n = Tensor(node.lengths())
    W = (node.base.weight + matmul(node.B, node.A) * node.scale) * (node.magnitude / n).reshape(
        -1, 1
    )
    y = linear(Tensor(x), W, node.base.bias)
    expected, found = ((v * v).sum().backward() for v in (y, node(Tensor(x))))
    assert found.keys() == {node.A, node.B, node.magnitude}
    for parameter, g in found.items():
        scale = 1 + np.abs(host(expected[parameter])).max()
        assert np.abs(host(g) - host(expected[parameter])).max() <= 1e-10 * scale


def with_magnitude(node, m):
    return DoRALinear(
        node.base, node.A, node.B, node.alpha, node.rank_stabilized, node.dropout, m
    )  # fmt: skip


def test_dora_trains_lengths_and_leaves_the_base(device, host):
    node, x = layer(device, (6, 5, 2, 9))
    start = dora(node)
    before = host(start.base.weight.data).tobytes()
    end = trained(start, x)
    assert np.abs(host(end.magnitude.data) - host(start.magnitude.data)).min() > 1e-3
    assert end.base.weight.data is node.base.weight.data
    assert host(end.base.weight.data).tobytes() == before


def test_dropout_falls_on_what_the_adapter_reads_alone(device, host):
    node, x = layer(device, (6, 5, 2, 400), dropout=0.5)
    start = dora(LoRALinear(node.base, node.A, Parameter(node.B.data * 0), 3.0, dropout=0.5))
    y = start(Tensor(x), np.random.default_rng(3))
    np.testing.assert_allclose(host(y.data), host(node.base(x).data), atol=1e-12)
    moved = dora(node)(Tensor(x), np.random.default_rng(3))
    assert np.abs(host(moved.data) - host(dora(node)(Tensor(x)).data)).max() > 0.1


# ------------------------------------------------------------------------ whole models


def model_on(device, name="llama"):
    return to_device(model_of(name), device)


@pytest.mark.parametrize("name", ["gpt2", "llama biased"])
def test_a_merged_model_is_the_model(device, dev, name):
    model, ids = model_on(device, name), dev(np.arange(24).reshape(2, 12) * 13 % 320)
    scores = partial(logits, ids=ids)
    for tree in (dora_of(model), pissa(adapted_of(model)), loftq(adapted_of(model), quantize)):
        assert np.abs(scores(merge(tree)) - scores(tree)).max() <= 1e-4
    four = dora_of(quantize(model))
    for way in ("dequantized", "original"):
        whole, errors = merge_quantized(four, way, model)
        assert set(errors) == {p for p, n in walk(four) if isinstance(n, DoRALinear)}
        if way == "dequantized":
            assert np.abs(scores(whole) - scores(four)).max() <= 1e-4
    for start in (pissa, loftq):
        tree = start(adapted_of(model), quantize)
        whole, _ = merge_quantized(tree)
        assert np.abs(scores(whole) - scores(tree)).max() <= 1e-4
        with pytest.raises(AdapterError, match=r"original: .* began by splitting its weight"):
            merge_quantized(tree, "original", model)


def test_in_bfloat16_what_the_adapter_holds_stays_float32(device, dev):
    ids = dev(np.arange(24).reshape(2, 12) * 13 % 320)
    tree = freeze(dora_of(model_on(device, "llama biased")))
    half = to_bf16(tree)
    for _, node in walk(half):
        if isinstance(node, DoRALinear):
            assert {t.dtype for t in (node.A, node.B, node.magnitude)} == {np.dtype(np.float32)}
            assert node.base.weight.dtype == BFLOAT16
    node = half.blocks[0].mlp.up
    slightly = with_magnitude(node, Tensor(node.magnitude.data * np.float32(1.001)))
    x = Tensor(half.embedding(ids).data)
    bits = [to_numpy(layer(x).data.bits) for layer in (node, slightly)]
    assert np.mean(bits[0] == bits[1]) > 0.6  # as its docstring says, most of it is lost
    exact, found = logits(tree, ids), logits(half, ids)
    assert 0 < np.linalg.norm(found - exact) <= 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_lengths_is_that_of_the_merged_model(device, name):
    tree = dora_of(model_on(device, name))
    prompts = [[5, 9, 11], [7, 3]]
    assert generate(tree, prompts, 8) == generate(merge(tree), prompts, 8)


def test_the_experiment_starts_where_it_says(device):
    """The distances of `minilora variants`: constant for QLoRA, falling with rank for the others,
    and for LoftQ below QLoRA's."""
    if device != "cpu":
        pytest.skip("on the host")
    from minilora.lab.variants import ARMS, start_of, starts

    rows = {(row["start"], row["code"]): row for row in starts((1, 8))}
    for code in ("NF4", "2 bits"):
        low, high = rows["QLoRA", code]["distance"]
        assert low == high
        for name in ("QPiSSA", "LoftQ", "LoftQ, 5 rounds"):
            first, last = rows[name, code]["distance"]
            assert last < first < low
    base, *others = (count(start_of(arm, 2, 0)) for arm in ("LoRA", "PiSSA", "DoRA"))
    assert others[0] == base < others[1]
    assert len(ARMS) == 7


def test_a_run_that_diverges_is_a_finding(device):
    if device != "cpu":
        pytest.skip("on the host")
    from minilora.lab.variants import train_variant

    with np.errstate(all="ignore"):
        run = train_variant("LoRA", 1e30, seed=0, steps=4, every=4)
    assert run["val_loss"] is run["score"] is None
    assert "is not finite" in run["diverged"] or "expected a finite number" in run["diverged"]
    assert run["curve"][0][0] == 0


# ------------------------------------------------------------------------ refusals


def test_what_cannot_be_split_or_measured_is_refused(device):
    model = model_on(device)
    adapted = adapted_of(model)
    for variant in (pissa, partial(loftq, quantize=quantize), dora):
        with pytest.raises(AdapterError, match="with adapters on its linears, found none"):
            variant(model)
        with pytest.raises(AdapterError, match=r"plain LoRA at blocks\.0\..*, found a DoRALinear"):
            variant(dora(adapted))
    for start in (pissa, partial(loftq, quantize=quantize)):
        with pytest.raises(AdapterError, match="plain Linear, found a QuantizedLinear"):
            start(adapted_of(quantize(model)))
        with pytest.raises(AdapterError, match="expected s > 0 and a rank up to"):
            start(adapted_of(model, alpha=-1.0))
        with pytest.raises(AdapterError, match=r"found s = 0\.125 and rank 40"):
            start(adapted_of(model, rank=40))
    for rounds in (0, 1.5):
        with pytest.raises(MiniloraError, match="rounds: expected a whole number >= 1, found"):
            loftq(adapted, quantize, rounds=rounds)
    up = model.blocks[0].mlp.up.weight
    dead = rebuild(model, lambda _, n: Tensor(zero_row(n.data, 3)) if n is up else n)
    with pytest.raises(AdapterError, match=r"blocks\.0\.mlp\.up: row 3 of the weight is zero"):
        dora(adapt(dead, rank=2, rng=np.random.default_rng(0)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(device, wrong):
    model = model_on(device)
    up = model.blocks[0].mlp.up.weight
    bad = rebuild(model, lambda _, n: Tensor(n.data * wrong) if n is up else n)
    adapted = adapt(bad, rank=2, rng=np.random.default_rng(0))
    with np.errstate(all="ignore"):
        for variant in (pissa, partial(loftq, quantize=quantize), dora):
            with pytest.raises(NumericsError, match=r"blocks\.0\.mlp\.up: "):
                variant(adapted)


def test_where_only_one_factor_trains_the_lengths_train(device):
    node, _ = layer(device, (6, 5, 2, 1))
    half = LoRALinear(node.base, Tensor(node.A.data), node.B, 3.0)
    assert isinstance(dora(half).magnitude, Parameter)
    assert not parameters(dora(freeze(half)))


def zero_row(W, row):
    W = W.copy()
    W[row] = 0
    return W


def test_a_magnitude_that_does_not_fit_is_refused(device):
    node = dora(layer(device, (6, 5, 2, 1))[0])
    for m in (None, Parameter(node.magnitude.data[:5])):
        with pytest.raises(AdapterError, match=r"expected magnitude \(6,\), found"):
            with_magnitude(node, m)
