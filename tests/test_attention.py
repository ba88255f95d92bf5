"""Attention is causal to the bit, the same by tile and by head, and never holds T x T."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.engine.attention import RopeScaling, attention, rope, rope_rates, split_heads
from minilora.engine.check import gradients, retained
from minilora.engine.errors import MiniloraError
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Parameter, Tensor


def drawn(dev, N, T, H, K, D, S=None, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((N, T, H, D), (N, S or T, K, D), (N, S or T, K, D))
    return [dev(rng.standard_normal(s).astype(dtype)) for s in shapes]


def plain(q, k, v):
    """softmax(q kᵀ / √D + mask) v by einsum, on host arrays, heads repeated."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    s = np.einsum("nthd,nshd->nhts", q, k) / np.sqrt(q.shape[-1])
    s = np.where(np.tri(s.shape[-1], dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return np.einsum("nhts,nshd->nthd", p / p.sum(axis=-1, keepdims=True), v)


@given(
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.integers(1, 5), st.integers(1, 50), st.integers(0, 9),
)  # fmt: skip
def test_it_is_the_textbook_formula_at_every_tile(dev, host, N, T, heads, D, tile, seed):
    q, k, v = drawn(dev, N, T, *heads, D, seed=seed)
    out = attention(q, k, v, tile=tile)
    wanted = plain(host(q), host(k), host(v))
    np.testing.assert_allclose(host(out.data), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rules", ["fast", "specification"])
def test_a_later_token_changes_nothing_before_it_to_the_bit(rules, dev, host):
    T = 130
    q, k, v = (host(a) for a in drawn(dev, 2, T, 4, 2, 8, dtype=np.float32))

    def run():
        return host(attention(dev(q), dev(k), dev(v)).data)

    with reference_rules() if rules == "specification" else nullcontext():
        before = run()
        for t in (0, 63, 64, 100, T - 1):
            saved = [a[:, t].copy() for a in (q, k, v)]
            for a in (q, k, v):
                a[:, t] += 100
            after = run()
            assert np.array_equal(after[:, :t], before[:, :t])
            assert not np.array_equal(after[:, t:], before[:, t:])
            for a, old in zip((q, k, v), saved, strict=True):
                a[:, t] = old


def test_shared_key_heads_are_repeated_ones(dev, host, xp):
    q, k, v = drawn(dev, 2, 20, 6, 2, 4)
    w = dev(np.random.default_rng(1).standard_normal(q.shape))
    repeat = lambda a: xp.repeat(a, 3, axis=2)
    (dq, dk, dv), out = gradients(attention, [q, k, v], w)
    (eq, ek, ev), wide = gradients(attention, [q, repeat(k), repeat(v)], w)
    fold = lambda a: host(a).reshape(2, 20, 2, 3, 4).sum(axis=3)
    pairs = [(host(out.data), host(wide.data)), (host(dq), host(eq))]
    for a, b in [*pairs, (host(dk), fold(ek)), (host(dv), fold(ev))]:
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_positions_in_a_cache_see_what_a_whole_sequence_sees(dev, host, xp):
    q, k, v = drawn(dev, 2, 9, 4, 2, 4)
    whole = host(attention(q, k, v).data)
    positions = np.array([[3, 4], [7, 8]])
    rows = np.arange(2)[:, None]
    part = attention(dev(host(q)[rows, positions]), k, v, positions=dev(positions))
    np.testing.assert_allclose(host(part.data), whole[rows, positions], rtol=1e-13)


@pytest.mark.parametrize("rules", ["fast", "specification"])
def test_what_is_kept_grows_with_length_and_not_with_its_square(rules, dev):
    def kept(T):
        q, k, v = (Parameter(a) for a in drawn(dev, 1, T, 2, 1, 8))
        with reference_rules() if rules == "specification" else nullcontext():
            return retained(attention(q, k, v), besides=[q.data, k.data, v.data])["attention"]

    assert kept(256) <= 2 * kept(128) + 64


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 99))
def test_rotation_keeps_length_and_knows_only_distance(dev, host, i, j, seed):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))

    def product(i, j):
        at = lambda x, p: host(rope(dev(x), theta=100.0, positions=dev(np.array([[p]]))).data)
        a, b = at(q, i), at(k, j)
        np.testing.assert_allclose((a * a).sum(), (q * q).sum(), rtol=1e-12)
        return (a * b).sum()

    np.testing.assert_allclose(product(i, j), product(i + 17, j + 17), rtol=1e-9, atol=1e-10)


def test_position_zero_does_not_turn(dev, host):
    x = np.random.default_rng(0).standard_normal((2, 1, 3, 4))
    np.testing.assert_array_equal(host(rope(dev(x), theta=10.0).data), x)


def test_split_heads_are_views_and_zeros_come_back_for_the_unused(dev, host):
    x = Parameter(dev(np.random.default_rng(0).standard_normal((2, 3, 24))))
    q, k, v = split_heads(x, heads=(4, 1, 1), width=4)
    assert (q.shape, k.shape, v.shape) == ((2, 3, 4, 4), (2, 3, 1, 4), (2, 3, 1, 4))
    np.testing.assert_array_equal(host(v.data)[:, :, 0], host(x.data)[:, :, 20:])
    g = host(k.sum().backward()[x])
    np.testing.assert_array_equal(g.sum(axis=(0, 1)), [0] * 16 + [6] * 4 + [0] * 4)


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 3, 4, 2), (1, 3, 3, 2), (1, 3, 3, 2)),  # 3 does not divide 4
        ((1, 3, 4, 2), (1, 4, 4, 2), (1, 4, 4, 2)),  # other lengths, and no positions
        ((1, 3, 4, 2), (1, 3, 4, 2), (1, 3, 2, 2)),
        ((2, 3, 4, 2), (1, 3, 4, 2), (1, 3, 4, 2)),
    ],
)
def test_shapes_that_do_not_fit(shapes, dev):
    with pytest.raises(MiniloraError, match="do not fit"):
        attention(*[Tensor(dev(np.ones(s))) for s in shapes])


def test_turns_for_a_longer_context_are_those_of_llama_3(xp, host):
    """Pair by pair, by wavelengths, as Hugging Face's transformers has it."""
    theta, D, factor, low, high, context = 500_000.0, 64, 8.0, 1.0, 4.0, 8192
    found = host(rope_rates(xp, D, theta, RopeScaling(factor, low, high, context)))
    kinds = set()
    for i, rate in enumerate(found):
        plain = theta ** (-2 * i / D)
        wavelength = 2 * math.pi / plain
        if wavelength < context / high:
            wanted, kind = plain, "as before"
        elif wavelength > context / low:
            wanted, kind = plain / factor, "slower"
        else:
            smooth = (context / wavelength - low) / (high - low)
            wanted, kind = (1 - smooth) * plain / factor + smooth * plain, "between"
        assert rate == pytest.approx(wanted, rel=1e-12)
        kinds.add(kind)
    assert len(kinds) == 3
