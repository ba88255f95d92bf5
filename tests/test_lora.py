"""The laws of LoRA, on drawn shapes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import (
    SGD,
    AdamW,
    LoRALinear,
    Parameter,
    Tensor,
    TransformerConfig,
    adapt,
    count,
    fit,
    freeze,
    init_transformer,
    merge,
    parameters,
    to_device,
    trainable_share,
    unfreeze,
)
from minilora.engine.errors import AdapterError
from minilora.lora.lora import LoRAEmbedding, is_adapter
from minilora.model.layers import Embedding, Linear
from minilora.model.module import cast, tensors, walk
from minilora.train.data import Data

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 80))
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def layer(device, d_out, d_in, r, dtype=np.float64, alpha=3.0, seed=0, bias=True, **options):
    """An adapter with both factors away from zero, on drawn weights."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    base = Linear(Tensor(draw(d_out, d_in)), Tensor(draw(d_out)) if bias else None)
    node = LoRALinear(base, Parameter(draw(r, d_in)), Parameter(draw(d_out, r)), alpha, **options)
    return to_device(node, device)


def replaced(node, A=None, B=None, alpha=None):
    return LoRALinear(node.base, A or node.A, B or node.B, alpha or node.alpha)


def inputs(dev, n, d_in, dtype=np.float64, seed=9):
    return dev(np.random.default_rng(seed).standard_normal((n, d_in)).astype(dtype))


@DTYPES
@given(SIZES)
def test_with_b_zero_it_is_its_base_to_the_bit(dev, device, host, dtype, sizes):
    d_out, d_in, r, n = sizes
    node = layer(device, d_out, d_in, r, dtype)
    x = inputs(dev, n, d_in, dtype)
    start = replaced(node, B=Parameter(node.B.data * 0))
    assert host(start(x).data).tobytes() == host(node.base(x).data).tobytes()


@given(SIZES)
def test_at_step_zero_only_b_has_a_gradient(dev, device, host, sizes):
    d_out, d_in, r, n = sizes
    node = layer(device, d_out, d_in, r)
    start = replaced(node, B=Parameter(node.B.data * 0))
    g = (start(inputs(dev, n, d_in)) * 1.5).sum().backward()
    assert not host(g[start.A]).any()
    assert host(g[start.B]).any()


@given(SIZES)
def test_both_factors_zero_never_move(dev, device, host, sizes):
    d_out, d_in, r, n = sizes
    node = layer(device, d_out, d_in, r)
    dead = replaced(node, Parameter(node.A.data * 0), Parameter(node.B.data * 0))
    g = dead(inputs(dev, n, d_in)).sum().backward()
    assert not host(g[dead.A]).any()
    assert not host(g[dead.B]).any()


@given(SIZES)
def test_the_update_has_rank_r_at_most(device, host, sizes):
    d_out, d_in, r, _ = sizes
    delta = host(layer(device, d_out, d_in, r).delta())
    assert np.linalg.matrix_rank(delta) <= min(r, d_out, d_in)


@DTYPES
@given(SIZES)
def test_merged_is_unmerged(dev, device, host, dtype, sizes):
    d_out, d_in, r, n = sizes
    node = layer(device, d_out, d_in, r, dtype)
    x = inputs(dev, n, d_in, dtype)
    plain = merge(node)
    assert isinstance(plain, Linear)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    a, b = host(node(x).data), host(plain(x).data)
    assert np.abs(a - b).max() <= tolerance * (1 + np.abs(b).max())


@given(SIZES)
def test_it_is_linear_in_alpha(dev, device, host, sizes):
    d_out, d_in, r, n = sizes
    node, x = layer(device, d_out, d_in, r), inputs(dev, n, d_in)
    detour = lambda alpha: host((replaced(node, alpha=alpha)(x) - node.base(x)).data)
    np.testing.assert_allclose(detour(6.0), 2 * detour(3.0), rtol=1e-9, atol=1e-9)


@given(SIZES)
def test_a_change_of_basis_inside_changes_nothing(dev, device, host, sizes):
    d_out, d_in, r, n = sizes
    node, x = layer(device, d_out, d_in, r), inputs(dev, n, d_in)
    M = np.eye(r) + 0.1 * np.random.default_rng(1).standard_normal((r, r))
    A, B = M @ host(node.A.data), host(node.B.data) @ np.linalg.inv(M)
    other = replaced(node, Parameter(dev(A)), Parameter(dev(B)))
    np.testing.assert_allclose(host(other(x).data), host(node(x).data), rtol=1e-9, atol=1e-9)


@given(SIZES, st.sampled_from([AdamW, SGD]))
def test_training_leaves_the_bytes_of_the_base(dev, device, host, sizes, make):
    d_out, d_in, r, n = sizes
    node, x = layer(device, d_out, d_in, r), inputs(dev, n, d_in)
    before = {path: host(t.data).tobytes() for path, t in tensors(node.base).items()}
    optimizer = make(node, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        (optimizer.model(x) * 1.5).sum().backward(into=optimizer.gradients)
        optimizer.step()
    trained = optimizer.model
    assert host(trained.B.data).tobytes() != host(node.B.data).tobytes()
    assert host(trained.A.data).tobytes() != host(node.A.data).tobytes()
    assert trained.base.weight.data is node.base.weight.data
    assert {p: host(t.data).tobytes() for p, t in tensors(trained.base).items()} == before


@pytest.mark.parametrize("stabilized", [False, True])
@given(st.integers(1, 64), st.floats(0.5, 64))
def test_the_scale(device, stabilized, r, alpha):
    options = {"rank_stabilized": True} if stabilized else {}  # not so unless it is said
    node = layer(device, 3, 3, r, alpha=alpha, **options)
    assert node.scale == alpha / (math.sqrt(r) if stabilized else r)
    assert node.rank == r


def test_dropout_acts_on_the_detour_alone_and_only_with_an_rng(dev, device, host):
    node, x = layer(device, 5, 400, 2, dropout=0.5), inputs(dev, 3, 400)
    plain = layer(device, 5, 400, 2)
    assert host(node(x).data).tobytes() == host(plain(x).data).tobytes()
    drawn = [host(node(x, np.random.default_rng(s)).data) for s in range(400)]
    assert not np.array_equal(drawn[0], drawn[1])
    mean, spread = np.mean(drawn, axis=0), np.std(drawn, axis=0) / np.sqrt(len(drawn))
    assert (np.abs(mean - host(plain(x).data)) <= 5 * spread).all()  # unbiased
    quiet = LoRALinear(node.base, node.A, Parameter(node.B.data * 0), 3.0, dropout=0.5)
    np.testing.assert_array_equal(
        host(quiet(x, np.random.default_rng(0)).data), host(node.base(x).data)
    )


# ------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def model(device):
    config = TransformerConfig(vocab=11, width=16, layers=2, heads=2, context=16)
    return to_device(freeze(init_transformer(config, np.random.default_rng(0), 0.2)), device)


def some_ids(dev, shape=(2, 8)):
    return dev(np.random.default_rng(1).integers(0, 11, shape))


NAMES = ("query", "key", "value", "output", "gate", "up", "down", "head")


@given(st.integers(1, 20), st.sets(st.sampled_from(NAMES), min_size=1))
def test_the_count_is_the_formula(model, rank, targets):
    """Σ r (d_in + d_out) over the linears that are targeted, and no other number trains."""
    adapted = adapt(model, targets, rank=rank, rng=np.random.default_rng(0))
    linears = [
        n for p, n in walk(model) if isinstance(n, Linear) and p.rpartition(".")[2] in targets
    ]
    expected = sum(rank * sum(n.shape) for n in linears)
    assert count(adapted, trainable=True) == expected
    assert trainable_share(adapted) == expected / (count(model) + expected)
    assert set(parameters(adapted)) == {
        f"{p}.{f}" for p, n in walk(adapted) if is_adapter(n) for f in "AB"
    }


@pytest.mark.parametrize("init, bound", [("kaiming", 1 / 4), ("gaussian", None)])
def test_a_starts_as_said_and_b_at_zero(init, bound, model, host):
    adapted = adapt(model, rank=8, rng=np.random.default_rng(0), init=init)
    wide = [n for _, n in walk(adapted) if is_adapter(n) and n.A.shape[1] == 16]
    A = np.concatenate([host(n.A.data).ravel() for n in wide])
    if bound is None:
        assert abs(A.std() - 1 / 8) <= 0.01  # N(0, 1/r²)
    else:
        assert np.abs(A).max() <= bound
        assert abs(A.std() - bound / math.sqrt(3)) <= 0.01
    assert not any(host(n.B.data).any() for _, n in walk(adapted) if is_adapter(n))
    a = adapt(model, rank=8, rng=np.random.default_rng(0), init=init)
    for p, t in parameters(a).items():
        assert host(t.data).tobytes() == host(parameters(adapted)[p].data).tobytes()


def test_what_is_not_said_is_rank_8_and_scale_2(model):
    nodes = [n for _, n in walk(adapt(model, rng=np.random.default_rng(0))) if is_adapter(n)]
    assert {(n.rank, n.alpha, n.scale, n.dropout) for n in nodes} == {(8, 16.0, 2.0, 0.0)}


def test_adapting_shares_the_base_and_leaves_it_alone(model, dev, host):
    before = {p: host(t.data).tobytes() for p, t in tensors(model).items()}
    adapted = adapt(model, rank=2, rng=np.random.default_rng(0))
    assert adapted.blocks[0].mlp.up.base.weight.data is model.blocks[0].mlp.up.weight.data
    ids = np.random.default_rng(1).integers(0, 11, (32, 8))
    loss = lambda m, b, rng: m.loss(b["ids"], b["targets"])
    run = fit(AdamW(adapted, lr=1e-2), loss, Data({"ids": ids, "targets": ids}), steps=5, batch=8)
    moved = [p for p, t in parameters(run.model).items() if host(t.data).any() and p[-1] == "B"]
    assert len(moved) == 14
    assert {p: host(t.data).tobytes() for p, t in tensors(model).items()} == before
    merged = merge(run.model)
    assert not any(is_adapter(n) for _, n in walk(merged))
    assert set(tensors(merged)) == set(tensors(model))
    assert not parameters(merged)
    mine, theirs = (host(m(dev(ids)).data) for m in (run.model, merged))
    assert np.abs(mine - theirs).max() <= 1e-5 * (1 + np.abs(theirs).max())
    for path, tensor in tensors(merged).items():  # arrays of its own
        assert tensor.data is not tensors(model)[path].data
    assert merged.head.weight is merged.embedding.weight


def test_ranks_by_pattern(model):
    adapted = adapt(
        model, ["query", "up"], rank=2, rng=np.random.default_rng(0), rank_pattern={"up": 5}
    )
    ranks = {p: n.rank for p, n in walk(adapted) if is_adapter(n)}
    assert set(ranks.values()) == {2, 5}
    assert all((r == 5) == p.endswith("up") for p, r in ranks.items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: expected a whole number in 1..65536 for blocks.0"),
        ({"rank": 10**20}, "rank: expected a whole number in 1..65536 for blocks.0"),
        ({"rank": 2.0}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"init": "xavier"}, '"kaiming" or "gaussian"'),
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern: 'nothing' matches none"),
        ({"modules_to_save": ["head"]}, "modules_to_save: not taken, because"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
        ({"alpha": math.nan}, "finite alpha"),
        ({"targets": "nowhere"}, "matches nothing"),
    ],
)
def test_what_adapt_refuses(options, message, model):
    with pytest.raises(AdapterError, match=message):
        adapt(model, rng=np.random.default_rng(0), **options)


def test_an_adapted_model_is_not_adapted_again(model):
    once = adapt(model, rng=np.random.default_rng(0))
    with pytest.raises(AdapterError, match="merge it first"):
        adapt(once, rng=np.random.default_rng(0))


def test_a_base_that_trains_is_refused(device):
    node = layer(device, 3, 4, 2)
    with pytest.raises(AdapterError, match="frozen base, found a Parameter"):
        LoRALinear(unfreeze(node.base), node.A, node.B, 1.0)
    with pytest.raises(AdapterError, match="frozen base"):
        unfreeze(freeze(node))


@pytest.mark.parametrize("A, B", [((2, 5), (3, 2)), ((2, 4), (2, 2)), ((2, 4), (3, 1))])
def test_factors_that_do_not_fit_are_refused(A, B, device, dev):
    base = layer(device, 3, 4, 2).base
    with pytest.raises(AdapterError, match=r"expected A \(r, 4\) and B \(3, r\)"):
        LoRALinear(base, Tensor(dev(np.ones(A))), Tensor(dev(np.ones(B))), 1.0)
    table = Embedding(Tensor(dev(np.ones((4, 3)))))  # a row an id: d_in of them
    with pytest.raises(AdapterError, match=r"expected A \(r, 4\) and B \(3, r\)"):
        LoRAEmbedding(table, Tensor(dev(np.ones(A))), Tensor(dev(np.ones(B))), 1.0)


# -------------------------------------------------------------------------- embeddings


def test_an_adapted_embedding_starts_as_its_table(model, dev, host):
    adapted = adapt(model, ["embedding", "query"], rank=3, rng=np.random.default_rng(0))
    node = adapted.embedding
    assert isinstance(node, LoRAEmbedding)
    assert (node.A.shape, node.B.shape) == ((3, 11), (16, 3))
    assert not host(node.A.data).any()
    assert abs(host(node.B.data).std() - 1) < 0.3
    ids = some_ids(dev)
    np.testing.assert_array_equal(host(adapted(ids).data), host(model(ids).data))


def trained_embedding(model, host, dev):
    adapted = adapt(model, "embedding", rank=3, alpha=6.0, rng=np.random.default_rng(0))
    A = np.random.default_rng(2).standard_normal((3, 11)).astype(np.float32)
    A[:, 4] = 0  # an id that was never seen
    adapted.embedding.A.data[...] = dev(A)
    return adapted


def test_its_rows_are_those_of_the_table_plus_delta(model, dev, host):
    node = trained_embedding(model, host, dev).embedding
    ids = some_ids(dev)
    delta = 6.0 / 3 * host(node.A.data).T @ host(node.B.data).T
    np.testing.assert_allclose(host(node.delta()), delta, rtol=1e-5, atol=1e-5)
    table = host(node.base.weight.data) + host(node.delta())
    np.testing.assert_allclose(host(node(ids).data), table[host(ids)], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(host(node.delta())[4], 0)
    g = node(ids).sum().backward()
    assert set(g) == {node.A, node.B}
    unseen = sorted(set(range(11)) - set(host(ids).ravel().tolist()))
    assert not host(g[node.A])[:, unseen].any()


def test_after_a_merge_the_tied_head_is_the_old_one_unless_asked(model, dev, host):
    adapted = trained_embedding(model, host, dev)
    old, new = host(model.embedding.weight.data), host(adapted.embedding.merged().weight.data)
    merged, retied = merge(adapted), merge(adapted, retie=True)
    np.testing.assert_array_equal(host(merged.embedding.weight.data), new)
    np.testing.assert_array_equal(host(merged.head.weight.data), old)
    assert retied.head.weight is retied.embedding.weight
    np.testing.assert_array_equal(host(retied.head.weight.data), new)
    ids = some_ids(dev)
    a, b = host(adapted(ids).data), host(merged(ids).data)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.abs(host(retied(ids).data) - a).max() > 1e-2


def test_an_embedding_takes_no_dropout(model, dev):
    adapted = adapt(model, ["embedding"], rank=2, rng=np.random.default_rng(0), dropout=0.5)
    assert adapted.embedding.dropout == 0
    table = Embedding(Tensor(dev(np.ones((3, 2)))))
    A, B = Tensor(dev(np.ones((1, 3)))), Tensor(dev(np.ones((2, 1))))
    with pytest.raises(AdapterError, match="no dropout"):
        LoRAEmbedding(table, A, B, 1.0, dropout=0.1)


def test_float64_models_get_float64_adapters(model):
    adapted = adapt(cast(model, np.float64), rng=np.random.default_rng(0))
    assert {p.dtype for p in parameters(adapted).values()} == {np.dtype(np.float64)}
