"""Each fast rule for NumPy arrays against its float64 specification, on drawn shapes."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_ops import rules_of_the_library

from minilora.engine import attention, fused, loss
from minilora.engine.check import gradients
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Op, Parameter, Tensor
from minilora.fast import cpu
from minilora.fast.cpu import few_rows, height_of_few, over_rows, skinny, stack_height
from minilora.model.layers import Linear

pytestmark = pytest.mark.usefixtures("on_the_host")


@pytest.fixture(scope="module")
def on_the_host(device):
    if device != "cpu":
        pytest.skip("these rules are for NumPy arrays")


def normal(*shapes):
    return lambda rng: [rng.standard_normal(s) for s in shapes]


def lora_options(rng, d_out, d_in, bias):
    W, b = rng.standard_normal((d_out, d_in)), rng.standard_normal(d_out)
    return {"base": (W, b if bias else None), "scale": float(rng.uniform(-2, 2))}


# op name: a strategy for (arrays, options) from a shape drawn by Hypothesis
def cases(name, rng, n, T, d):
    if name == "gelu":
        return [3 * rng.standard_normal((n, T, d))], {}
    if name == "swiglu":
        return [30 * rng.standard_normal((n, T, d)), rng.standard_normal((n, T, d))], {}
    if name == "layer_norm":
        return [a + 1 for a in normal((n, T, d), d, d)(rng)], {"eps": 1e-5}
    if name == "rms_norm":
        return normal((n, T, d), d)(rng), {"eps": 1e-6}
    if name == "embedding":
        return normal((11, d))(rng), {"ids": rng.integers(0, 11, (n, T))}
    if name == "attention":
        return normal((n, T, 4, d), (n, T, 2, d), (n, T, 2, d))(rng), {"tile": 1 + d % 7 * 16}
    if name == "rope":
        scaling = attention.RopeScaling(8.0, 1.0, 4.0, 64) if T % 2 else None
        return normal((n, T, 3, 2 * d))(rng), {"theta": 1000.0, "scaling": scaling}
    if name == "head_cross_entropy":
        targets = rng.integers(-1, 11, (n, T))
        targets[targets < 0] = loss.IGNORE
        return normal((n, T, d), (11, d))(rng), {"targets": targets, "chunk": 1 + d}
    if name == "linear":
        return normal((n, T, d), (7, d), 7)(rng)[: 2 + T % 2], {}
    if name == "lora_linear":
        arrays = normal((n, T, d), (3, d), (7, 3))(rng)
        return arrays, lora_options(rng, 7, d, bias=bool(T % 2))
    raise AssertionError(f"no case for the fast rule of {name}")


FAST_OPS = {
    name: rule
    for name, rule in rules_of_the_library().items()
    if isinstance(rule, Op) and "numpy" in rule.fast
}
UPDATES_TESTED_ELSEWHERE = {
    "measure",
    "adamw_update",
    "adamw8bit_update",
    "quantize_blocks",
    "dequantize_blocks",
    "row_lengths",
}


def test_every_fast_rule_is_tested():
    others = {n for n, r in rules_of_the_library().items() if "numpy" in r.fast} - set(FAST_OPS)
    assert others == UPDATES_TESTED_ELSEWHERE
    for name in FAST_OPS:
        cases(name, np.random.default_rng(0), 2, 3, 4)


def with_base(options, dtype):
    if "base" not in options:
        return options
    W, b = (None if a is None else Tensor(a.astype(dtype)) for a in options["base"])
    return options | {"base": Linear(W, b)}


@pytest.mark.parametrize("name", FAST_OPS)
@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 33), st.integers(0, 99))
@example(1, 1, 9, 0)  # a single row has ways of its own
def test_it_is_its_specification(name, n, T, d, seed):
    rng = np.random.default_rng(seed)
    arrays, options = cases(name, rng, n, T, d)
    op = FAST_OPS[name]
    shape = op(*arrays, **with_base(options, np.float64)).shape
    w = rng.standard_normal(shape)
    with reference_rules():
        wanted, value = gradients(lambda *a: op(*a, **with_base(options, np.float64)), arrays, w)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        small = [a.astype(dtype) for a in arrays]
        call = lambda *a, dtype=dtype: op(*a, **with_base(options, dtype))
        found, fast = gradients(call, small, w.astype(dtype))
        pairs = [(fast.data, value.data), *zip(found, wanted, strict=True)]
        for a, b in pairs:
            assert a.dtype == dtype
            gap = np.linalg.norm((a - b).ravel()) / (1 + np.linalg.norm(b.ravel()))
            assert gap <= tolerance * (50 if name == "layer_norm" and d < 3 else 1)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [1e20, 1e-25, np.nan, 0.0])
def test_norms_of_rows_out_of_range(name, rows, size):
    """The specification answers where squares overflow or vanish, for one row as for several."""
    arrays, options = cases(name, np.random.default_rng(0), 1, rows, 6)
    arrays = [a.astype(np.float32) for a in arrays]
    arrays[0] *= np.float32(size)
    with np.errstate(all="ignore"):
        found = FAST_OPS[name](*arrays, **options).data
        with reference_rules():
            wanted = FAST_OPS[name](*arrays, **options).data
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gates_far_from_zero(dtype, recwarn):
    """A sigmoid of 0 by way of infinity, without a warning; NaN where the specification has it."""
    gate = np.array([-1e38, -1e30, -200, -90, -80, 0, 80, 1e30, np.nan, -np.inf], dtype)

    def found(gate):
        p, q = Parameter(gate), Parameter(np.ones_like(gate))
        value = fused.swiglu(p, q)
        back = value.backward(np.ones_like(gate))
        return value.data, back[p], back[q]

    with reference_rules(), np.errstate(all="ignore"):
        wanted = found(gate.astype(np.float64))
    for a, b in zip(found(gate[:-1]), wanted, strict=True):
        np.testing.assert_allclose(a, b[:-1], rtol=1e-5, atol=1e-30)
    exact = [0, 0, 0, 0, -80 * np.exp(-80), 0, 80, 1e30]  # the specification has 0 at -80
    slope = [0, 0, 0, 0, -79 * np.exp(-80), 0.5, 1, 1]
    for a, b in zip(found(gate[:-2]), (exact, slope, exact), strict=True):
        np.testing.assert_allclose(a, np.array(b, dtype), rtol=1e-5, atol=1e-35)
    assert not recwarn.list
    with np.errstate(invalid="ignore"):  # -inf times 0
        for a, b in zip(found(gate), wanted, strict=True):
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))


@given(
    st.integers(1, 4), st.integers(1, 40), st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from([1, 6, 16]), st.sampled_from(["newest", "ragged", "prompt"]),
    st.integers(0, 99),
)  # fmt: skip
def test_attention_and_turns_over_a_cache(N, S, heads, D, kind, seed):
    """One query a row at its own position, or a prompt that fills the cache."""
    rng = np.random.default_rng(seed)
    (H, K), T = heads, S if kind == "prompt" else 1
    held = rng.standard_normal((2, N, S + 3, K, D))[:, :, :S]  # views, as a cache gives them
    q, (k, v) = rng.standard_normal((N, T, H, D)), held
    positions = {
        "newest": np.full((N, 1), S - 1),
        "ragged": rng.integers(0, S, (N, 1)),
        "prompt": np.broadcast_to(np.arange(S), (N, S)),
    }[kind]
    turn = {"theta": 1000.0, "positions": positions}
    pair = np.concatenate([q, q], axis=-1)
    with reference_rules():
        wanted = attention.attention(q, k, v, positions=positions).data
        turned = attention.rope(pair, **turn).data
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        small = [a.astype(dtype) for a in (q, k, v)]
        found = attention.attention(*small, positions=positions).data
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
        found = attention.rope(pair.astype(dtype), **turn).data
        np.testing.assert_allclose(found, turned, rtol=tolerance, atol=tolerance)
    assert np.isnan(attention.attention(q, k, v * np.nan, positions=positions).data).all()


@pytest.mark.parametrize("name", FAST_OPS)
def test_only_what_is_wanted_is_computed_and_the_same(name):
    rng = np.random.default_rng(1)
    arrays, options = cases(name, rng, 2, 40, 6)
    options = with_base(options, np.float64)
    op = FAST_OPS[name]
    w = rng.standard_normal(op(*arrays, **options).shape)
    whole, _ = gradients(lambda *a: op(*a, **options), arrays, w)
    for i, array in enumerate(arrays):
        p = Parameter(array)
        value = op(*[p if j == i else a for j, a in enumerate(arrays)], **options)
        np.testing.assert_allclose(value.backward(w)[p], whole[i], rtol=1e-12, atol=1e-13)


@pytest.fixture
def in_stacks(monkeypatch):
    """As where BLAS has kernels for small products, and one thread."""
    monkeypatch.setattr(cpu, "small_kernels", lambda: True)
    monkeypatch.setattr(cpu, "on_one_thread", lambda: True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 700), st.sampled_from([1, 100, 256, 1000]), st.sampled_from([1, 8, 64]),
    st.sampled_from([np.float32, np.float64]), st.sampled_from("CF"), st.integers(0, 99),
)  # fmt: skip
@example(128, 256, 8, np.float32, "C", 0)  # whole stacks
@example(700, 1000, 8, np.float32, "F", 0)  # and a rest
def test_products_in_stacks_are_products(in_stacks, n, d, r, dtype, order, seed):
    """Rows that fill stacks, rows left over, and too few or too wide for any."""
    rng = np.random.default_rng(seed)
    x, M, u = (rng.standard_normal(s).astype(dtype) for s in ((n, d), (d, r), (n, r)))
    M = np.asarray(M, order=order)
    for along, most in ((False, np.inf), (True, 1200)):
        height = stack_height(n, d, r, along)
        assert height == 0 or (height < n and height * d * r <= 800_000 and height * r <= most)
    few, W = M.T, np.asarray(x, order=order)  # x transposed, as the weight of r rows
    for found, a, b in (
        (skinny(x, M), x, M),
        (over_rows(u, x), u.T, x),
        (few_rows(few, W, height_of_few(r, W)), few, W.T),
    ):
        wanted = a.astype(np.float64) @ b.astype(np.float64)
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        gap = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert gap <= 8 * np.finfo(dtype).eps * max(1, np.sqrt(max(n, d)) / 8)


def test_stacks_are_used_where_they_pay(in_stacks, monkeypatch):
    assert stack_height(1024, 256, 8) == 256
    assert stack_height(1024, 256, 8, along=True) == 128
    assert stack_height(1024, 1536, 8) == 64
    assert stack_height(1024, 384, 64) == 32
    assert stack_height(1024, 1536, 64) == 0  # wide enough for a packed product
    assert stack_height(64, 256, 8) == 0
    W = np.zeros((1536, 384), np.float32)
    assert [height_of_few(n, W) for n in (1, 2, 8, 16, 17)] == [0, 512, 128, 64, 0]
    monkeypatch.setattr(cpu, "on_one_thread", lambda: False)
    assert height_of_few(8, W) == 0
    monkeypatch.setattr(cpu, "small_kernels", lambda: False)
    assert stack_height(1024, 256, 8) == 0


@pytest.mark.parametrize("name", FAST_OPS)
def test_scratch_is_never_what_is_kept(name):
    """A value and a graph stay as they are while the same op runs on, here and in a thread."""
    rng = np.random.default_rng(2)
    arrays, options = cases(name, rng, 2, 70, 6)
    arrays = [a.astype(np.float32) for a in arrays]
    options = with_base(options, np.float32)
    op = FAST_OPS[name]
    alone = [Parameter(a) for a in arrays]
    value = op(*alone, **options)
    w = rng.standard_normal(value.shape).astype(np.float32)
    back = value.backward(w)
    wanted = [value.data.copy()] + [back[p].copy() for p in alone]

    given = [Parameter(a) for a in arrays]
    first = op(*given, **options)

    def disturb():
        for _ in range(3):
            other = [Parameter(2 * a + 1) for a in arrays]
            result = op(*other, **options)
            result.backward(w + 1)

    thread = threading.Thread(target=disturb)
    thread.start()
    disturb()
    found = first.backward(w)
    thread.join()
    for a, b in zip([first.data] + [found[p] for p in given], wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_adapter_at_zero_is_its_base_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    x, W, b, A = (
        rng.standard_normal(s).astype(dtype) for s in ((2, 40, 24), (16, 24), 16, (4, 24))
    )
    W[0, 0] = -0.0
    base = Linear(Tensor(W), Tensor(b))
    B = np.zeros((16, 4), dtype)
    y = fused.lora_linear(x, A, B, base=base, scale=2.0)
    assert y.data.tobytes() == fused.linear(x, W, b).data.tobytes()


def test_what_a_rule_does_not_take_the_specification_answers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))
    mixed = fused.rms_norm(x, np.ones(4, np.float32), eps=1e-5)  # two dtypes
    assert mixed.shape == x.shape
    imaginary = fused.gelu(x + 1e-30j)
    assert imaginary.dtype == np.complex128
    few = Linear(Tensor(rng.standard_normal((5, 4))))
    y = fused.lora_linear(x, np.ones((1, 4)), np.ones((5, 1)), base=few, scale=1.0)
    with reference_rules():
        z = fused.lora_linear(x, np.ones((1, 4)), np.ones((5, 1)), base=few, scale=1.0)
    assert y.data.tobytes() == z.data.tobytes()
    assert attention.attention(x[..., None], x[..., None], x[..., None]).shape == (2, 3, 4, 1)


def test_an_id_outside_the_table_is_named():
    from minilora import MiniloraError

    for wrong in (-1, 11):
        with pytest.raises(MiniloraError, match=rf"0\.\.10, found {wrong}"):
            fused.embedding(np.ones((11, 2), np.float32), ids=np.array([[0, wrong]]))
