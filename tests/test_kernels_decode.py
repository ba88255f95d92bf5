"""Attention over a cache: the decoding kernels, run on a CPU, against the float64 specification."""

import numpy as np
import pytest
from cuda_cpu import fakeraw
from cuda_cpu.checks import apart, installed, launches, on_device
from cuda_cpu.checks import kernels as kernels
from test_kernels_attention import drawn, ran
from test_kernels_attention import on_the_cpu as on_the_cpu

from minilora import TransformerConfig, generate, init_transformer, to_device
from minilora.engine.attention import attention, split_heads
from minilora.engine.backend import to_numpy
from minilora.engine.rules import reference_rules
from minilora.fast import cuda_attention

pytestmark = pytest.mark.usefixtures("kernels")


def cached(arrays, positions):
    """The value of both, and the kernels: on the device twice, and in float64."""
    with reference_rules(), np.errstate(all="ignore"):
        wide = [a.astype(np.float64) for a in arrays]
        wanted = attention(*wide, positions=positions).data
    given, at = list(map(on_device, arrays)), on_device(positions)
    values = []
    for seed in (1, 2):
        value, names = launches(lambda: attention(*given, positions=at), seed)
        values.append(to_numpy(value.data))
    assert values[0].tobytes() == values[1].tobytes()
    return values[0], wanted, names


def assert_right(arrays, positions):
    found, wanted, names = cached(arrays, positions)
    assert apart(found, wanted) < 2e-6
    return names


@pytest.mark.parametrize(
    "T, D, S",
    [(1, 5, 300), (1, 8, 128), (1, 32, 129), (3, 64, 200), (1, 80, 300), (2, 128, 257), (8, 8, 20),
     (9, 8, 150), (70, 64, 40), (20, 128, 65)],
)  # fmt: skip
def test_new_tokens_over_a_cache(T, D, S):
    arrays = drawn(2, T, 4, 2, D, S)
    positions = np.random.default_rng(1).integers(0, S, (2, T))
    positions[0, 0], positions[1, 0] = 0, S - 1
    names = assert_right(arrays, positions)
    few = ["attention_decode", "attention_combine"]
    ran(names, *(few if T <= cuda_attention.FEW else ["attention_cached"]))


@pytest.mark.parametrize("T", [2, 20])
def test_positions_that_are_out_of_range(T):
    """Beyond the cache every key is seen; before it none, which is 0 / 0."""
    arrays = drawn(2, T, 2, 1, 8, 150)
    positions = np.full((2, T), 149)
    positions[0, 1], positions[1, 0] = 1000, -1
    found, wanted, _ = cached(arrays, positions)
    assert np.isnan(found[1, 0]).all()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    assert apart(np.nan_to_num(found), np.nan_to_num(wanted)) < 2e-6


def test_what_stands_beyond_a_position_is_not_read_when_decoding():
    arrays = drawn(2, 1, 4, 2, 16, 300)
    positions = np.array([[130], [7]])
    clean, _, _ = cached(arrays, positions)
    for n, (p,) in enumerate(positions):
        for a in arrays[1:]:
            a[n, p + 1 :] = np.nan
    found, _, _ = cached(arrays, positions)
    assert found.tobytes() == clean.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("T", [2, 20])
def test_a_nan_in_a_cache_reaches_those_who_see_it(T, i, bad):
    arrays = drawn(1, T, 2, 1, 8, 200)
    positions = np.arange(150, 150 + T)[None]
    arrays[i][0, 0 if i == 0 else 140, 0, 3] = bad
    found, wanted, _ = cached(arrays, positions)
    assert np.isnan(wanted).any() or bad != np.nan
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


def test_generation_writes_the_same_tokens():
    """A prompt through tiles, but for its last query in the last block; then a token at a time."""
    config = TransformerConfig(vocab=13, width=32, layers=2, heads=4, key_heads=2, context=200)
    model = to_device(init_transformer(config, np.random.default_rng(0)), "cuda")
    prompts = [[1, 2, 3], [5, 7] * 6]
    with reference_rules():
        wanted = generate(model, prompts, 4)
    found, names = launches(lambda: generate(model, prompts, 4))
    assert found == wanted
    few = ["attention_decode", "attention_combine"]
    ran([n for n in names if n.startswith("attention")], "attention_cached", *few * 7)


def test_a_cache_is_read_through_views():
    """Queries from a packed product; half of a longer cache."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1, 64)).astype(np.float32)
    _, k, v = drawn(2, 1, 4, 2, 8, 400)
    q, _, _ = split_heads(on_device(x), heads=(4, 2, 2), width=8)
    keys, values = (on_device(a)[:, 100:300] for a in (k, v))
    at = np.array([[199], [20]])
    value, names = launches(lambda: attention(q, keys, values, positions=on_device(at)))
    ran(names, "attention_decode", "attention_combine")
    with reference_rules():
        wide = [a.astype(np.float64) for a in (x[..., :32].reshape(2, 1, 4, 8), k, v)]
        wanted = attention(wide[0], *(a[:, 100:300] for a in wide[1:]), positions=at).data
    assert apart(to_numpy(value.data), wanted) < 2e-6


DECODING = {
    "a chunk not scaled down": ("total += share * part[D + 1]", "total += part[D + 1]"),
    "a group left out": ("    __syncthreads();\n\n    float high", "\n    float high"),
    "a key too many": ("p < S ? (int)p + 1 : S", "p < S - 1 ? (int)p + 2 : S"),
    "a chunk too few": ("(seen + CHUNK - 1) / CHUNK", "seen / CHUNK"),
}


@pytest.mark.parametrize("old, new", DECODING.values(), ids=DECODING)
def test_a_planted_mistake_in_decoding_is_caught(old, new, on_the_cpu):
    assert cuda_attention.decoding["float"].source().count(old) == 1
    arrays = drawn(1, 2, 2, 1, 40, 300)
    with installed(fakeraw.planted((old, new))), pytest.raises(AssertionError):
        assert_right(arrays, np.array([[200, 127]]))
