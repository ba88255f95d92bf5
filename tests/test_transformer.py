"""One config, two families: counts, causality to the bit, recomputing, and generation."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import (
    MiniloraError,
    TransformerConfig,
    count,
    freeze,
    generate,
    init_transformer,
    parameters,
    to_device,
)
from minilora.engine.backend import to_numpy
from minilora.engine.bf16 import BF16, BFLOAT16, bits_of, float32_of
from minilora.engine.check import retained
from minilora.engine.errors import NumericsError
from minilora.engine.loss import IGNORE, cross_entropy
from minilora.model.cache import KVCache, LayerCache, remembered
from minilora.model.generate import draw, each_token, for_decoding
from minilora.model.module import cast, tensors

SHAPE = {"vocab": 19, "width": 24, "layers": 2, "heads": 4, "context": 48}
CONFIGS = {
    "gpt2": TransformerConfig.gpt2(**SHAPE),
    "llama": TransformerConfig(**SHAPE, key_heads=2, hidden=40),
    "mixed": TransformerConfig(**SHAPE, mlp="gelu", norm="layer", tied=False, bias=True),
}
every_style = pytest.mark.parametrize("style", CONFIGS)


def built(style, device="cpu", std=0.3):
    return to_device(init_transformer(CONFIGS[style], np.random.default_rng(3), std), device)


def some_ids(shape=(2, 20), seed=0):
    return np.random.default_rng(seed).integers(0, SHAPE["vocab"], shape)


def test_counts_are_those_of_the_formulas():
    V, C, L, T, I = 19, 24, 2, 48, 40
    assert count(built("gpt2")) == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    K = C // 2  # two key heads of four
    assert count(built("llama")) == V * C + L * (2 * C * C + 2 * C * K + 3 * C * I + 2 * C) + C


def test_a_tied_head_is_one_tensor():
    model = built("llama")
    assert model.head.weight is model.embedding.weight
    frozen = freeze(model)
    assert frozen.head.weight is frozen.embedding.weight
    assert built("mixed").head.weight is not built("mixed").embedding.weight


@every_style
def test_a_token_changes_no_logits_before_it_to_the_bit(style, device, dev, host):
    model = freeze(built(style, device))
    ids = some_ids()
    before = host(model(dev(ids)).data)
    for t in (0, 7, 19):
        other = ids.copy()
        other[:, t] = (other[:, t] + 1) % SHAPE["vocab"]
        after = host(model(dev(other)).data)
        assert np.array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t], before[:, t])


@every_style
def test_the_loss_is_the_cross_entropy_of_the_logits(style, device, dev, host):
    model = built(style, device)
    ids, targets = some_ids(), some_ids(seed=1)
    targets[0, :5] = IGNORE
    a = model.loss(dev(ids), dev(targets))
    b = cross_entropy(model(dev(ids)), targets=dev(targets))
    np.testing.assert_allclose(a.item(), b.item(), rtol=1e-5)
    ga, gb = a.backward(), b.backward()
    for path, p in parameters(model).items():
        np.testing.assert_allclose(host(ga[p]), host(gb[p]), rtol=2e-4, atol=2e-4, err_msg=path)


@every_style
def test_recomputed_blocks_give_the_same_bits_and_keep_less(style, device, dev, host):
    model = built(style, device)
    ids = dev(some_ids())
    plain, again = model.loss(ids, ids), model.loss(ids, ids, recompute_blocks=True)
    weights = [t.data for t in tensors(model).values()]
    assert sum(retained(again, weights).values()) < 0.5 * sum(retained(plain, weights).values())
    assert plain.item() == again.item()
    a, b = plain.backward(), again.backward()
    assert a.keys() == b.keys() == set(parameters(model).values())
    for p in a:
        np.testing.assert_array_equal(host(a[p]), host(b[p]))


@every_style
def test_the_gradient_of_a_whole_model(style):
    """One direction through everything, in float64."""
    model = cast(built(style), np.float64)
    ids = some_ids((1, 6))
    rng = np.random.default_rng(0)
    named = parameters(model)
    v = {path: rng.standard_normal(p.shape) for path, p in named.items()}
    grads = model.loss(ids, ids).backward()
    predicted = sum((grads[p] * v[path]).sum() for path, p in named.items())

    def along(t):
        for path, p in named.items():
            p.data[...] += t * v[path]
        value = model.loss(ids, ids).item()
        for path, p in named.items():
            p.data[...] -= t * v[path]
        return value

    h = 1e-4
    measured = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    assert abs(measured - predicted) <= 1e-7 * (1 + abs(predicted))


# -------------------------------------------------------------------------- generation


@every_style
def test_the_cache_gives_what_the_whole_forward_gives(style, device, dev, host):
    model = freeze(built(style, device))
    ids = some_ids((3, 30))
    whole = host(model(dev(ids)).data)
    cache = KVCache(model, 3, 30)
    positions = np.broadcast_to(np.arange(30), (3, 30)).copy()
    cuts = [0, 11, 12, 20, 30]
    for start, stop in pairwise(cuts):
        at = dev(positions[:, start:stop])
        part = model(dev(ids[:, start:stop].copy()), positions=at, cache=cache)
        np.testing.assert_allclose(host(part.data), whole[:, start:stop], rtol=2e-5, atol=2e-5)


@every_style
def test_greedy_tokens_are_those_of_the_whole_forward(style, device, dev, host):
    model = freeze(built(style, device))
    prompt = some_ids((1, 4))[0].tolist()
    (found,) = generate(model, [prompt], 20)
    ids, undecided = list(prompt), 0
    for token in found:
        logits = np.sort(host(model(dev(np.array([ids]))).data)[0, -1])
        best = int(host(model(dev(np.array([ids]))).data)[0, -1].argmax())
        if logits[-1] - logits[-2] > 1e-4:
            assert token == best
        else:
            undecided += 1
        ids.append(token)
    assert undecided < 5


@every_style
@pytest.mark.parametrize("way", ["plain", "cache", "recompute"])
def test_only_the_tokens_asked_for(style, way, device, dev, host):
    """Their hidden values, the cache and all gradients are those of the whole."""
    model = built(style, device)
    ids, at = dev(some_ids((3, 7))), dev(np.array([6, 0, 3]))
    positions = dev(np.broadcast_to(np.arange(7), (3, 7)).copy())
    caches = [KVCache(model, 3, 7) for _ in range(2)]
    options = [{}, {}]
    if way == "cache":
        model = freeze(model)
        options = [{"cache": cache, "positions": positions} for cache in caches]
    if way == "recompute":
        options = [{"recompute_blocks": True}] * 2
    whole = model.hidden(ids, **options[0])[dev(np.arange(3)), at]
    found = model.hidden(ids, at=at, **options[1])
    assert found.shape == (3, 1, SHAPE["width"])
    np.testing.assert_allclose(host(found.data)[:, 0], host(whole.data), rtol=0, atol=2e-6)
    for a, b in zip(*(cache.layers for cache in caches), strict=True):
        np.testing.assert_array_equal(host(a.keys), host(b.keys))
    if way != "cache":
        gradients = [(value * value).sum().backward() for value in (whole, found)]
        assert gradients[0].keys() == gradients[1].keys()
        for parameter, g in gradients[0].items():
            np.testing.assert_allclose(host(gradients[1][parameter]), host(g), rtol=0, atol=2e-4)


@every_style
def test_a_layout_for_decoding_holds_the_same_numbers(style, device, dev, host):
    model = built(style, device)
    laid_out = for_decoding(model)
    assert not parameters(laid_out)
    assert laid_out.embedding.weight.data is model.embedding.weight.data
    for path, held in tensors(model).items():
        np.testing.assert_array_equal(host(tensors(laid_out)[path].data), host(held.data))
    if device == "cpu":
        high, wide = (getattr(laid_out.blocks[0].mlp, name).weight.data for name in ("up", "down"))
        assert high.flags.f_contiguous
        assert wide.flags.c_contiguous
        for name, weight in (("up", high), ("down", wide)):
            assert not np.shares_memory(weight, getattr(model.blocks[0].mlp, name).weight.data)
    ids = dev(some_ids())
    np.testing.assert_allclose(host(laid_out(ids).data), host(model(ids).data), rtol=0, atol=2e-5)
    prompts = [row.tolist() for row in some_ids((3, 5))]
    assert generate(laid_out, prompts, 12) == generate(model, prompts, 12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 5}])
def test_batch_mates_make_no_difference(options, device):
    """Prompts of other lengths beside it leave a row's tokens as they are."""
    model = freeze(built("llama", device))
    prompts = [some_ids((1, n), seed=n)[0].tolist() for n in (1, 9, 4, 13)]
    together = generate(model, prompts, 8, seeds=[5, 6, 7, 8], **options)
    for i, prompt in enumerate(prompts):
        assert generate(model, [prompt], 8, seeds=[5 + i], **options) == [together[i]]
    assert generate(model, prompts[::-1], 8, seeds=[8, 7, 6, 5], **options) == together[::-1]


def test_a_model_that_trains_writes_as_its_frozen_view_does(device):
    model = built("llama", device)
    assert generate(model, [[1, 2, 3]], 6) == generate(freeze(model), [[1, 2, 3]], 6)


def test_streams_belong_to_rows_and_repeat(device):
    model = freeze(built("llama", device))
    same = [[1, 2, 3]] * 4
    first = generate(model, same, 10, temperature=1.0, seeds=3)
    assert first == generate(model, same, 10, temperature=1.0, seeds=3)
    assert len({tuple(row) for row in first}) > 1
    assert first != generate(model, same, 10, temperature=1.0, seeds=4)


def test_a_stop_token_ends_a_row_and_is_not_returned(device):
    model = freeze(built("gpt2", device))
    prompts = [[1, 2], [3, 4, 5]]
    free = generate(model, prompts, 12)
    stop = free[0][3]
    for row, ended in zip(free, generate(model, prompts, 12, stop=[stop]), strict=True):
        assert ended == (row[: row.index(stop)] if stop in row else row)
    assert generate(model, prompts, 0) == [[], []]


@pytest.mark.parametrize("kind", [list, set, np.array])
def test_stop_tokens_in_any_collection_end_the_work(kind, device, monkeypatch):
    module, made = sys.modules["minilora.model.generate"], []
    each = module.each_token
    monkeypatch.setattr(module, "each_token", lambda *a, **o: map(watch, each(*a, **o)))
    watch = lambda token: made.append(token) or token
    model = freeze(built("llama", device))
    free = generate(model, [[1, 2]], 12)[0]
    made.clear()
    assert generate(model, [[1, 2]], 12, stop=kind([free[3], 18])) == [free[: free.index(free[3])]]
    assert len(made) == free.index(free[3]) + 1


def test_once_all_rows_have_stopped_no_token_is_asked_for(device, monkeypatch):
    asked = []

    def counting(*arguments, **options):
        for token in each_token(*arguments, **options):
            asked.append(to_numpy(token))
            yield token

    monkeypatch.setattr("minilora.model.generate.each_token", counting)
    model = freeze(built("gpt2", device))
    prompts = [[1, 2], [3, 4, 5]]
    free = generate(model, prompts, 12)
    stops = [free[0][2], free[1][5]]
    ends = [min(row.index(stop) for stop in stops if stop in row) for row in free]
    asked.clear()
    generate(model, prompts, 12, stop=stops)
    assert len(asked) == max(ends) + 1 < 12


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.floats(0.1, 3),
    st.none() | st.integers(1, 12), st.none() | st.floats(0.05, 1.0),
)  # fmt: skip
@settings(max_examples=60)
def test_a_token_is_drawn_with_its_probability(logits, temperature, top_k, top_p):
    """`draw` is a quantile function: over an even grid of u, shares are probabilities."""
    z = np.array(logits)
    p = np.exp((z - z.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    keep = order[: top_k or len(p)]
    if top_p is not None:
        share = np.cumsum(p[keep]) / p[keep].sum()
        keep = keep[: 1 + int((share < top_p - 1e-12).sum())]
    wanted = np.zeros(len(p))
    wanted[keep] = p[keep] / p[keep].sum()
    grid = (np.arange(2000) + 0.5) / 2000
    found = np.bincount(
        [draw(z, u, temperature, top_k, top_p) for u in grid], minlength=len(p)
    ) / len(grid)
    if top_p is None or np.count_nonzero(found) == len(keep):
        np.testing.assert_allclose(found, wanted, atol=2 / 2000)
    assert abs(np.count_nonzero(found) - len(keep)) <= (0 if top_p is None else 1) or (
        wanted[wanted > 0].min() < 1 / 2000
    )


def test_top_k_one_is_greedy_and_cold_is_greedy():
    z = np.array([0.0, 3.0, 3.0, -1.0])
    for u in (0.0, 0.5, 0.999999):
        assert draw(z, u, 1.0, 1, None) == 1  # ties to the lower id
        for temperature in (1e-4, 1e-308, 5e-324):  # 3 / 1e-308 is no float
            assert draw(np.array([0.0, 3.0, 2.0]), u, temperature, None, None) == 1
        assert draw(np.array([0.0, 3.0, 2.0]), u, 1.0, None, 1e-9) == 1


def test_no_cut_is_plain_sampling_and_cold_is_greedy_in_a_whole_generation(device):
    model = freeze(built("llama", device))
    prompts = [[1, 2, 3], [4, 5], [6]]
    plain = generate(model, prompts, 12, temperature=1.3)
    assert generate(model, prompts, 12, temperature=1.3, top_k=19, top_p=1.0) == plain
    assert plain != generate(model, prompts, 12)
    assert generate(model, prompts, 12, temperature=1e-6) == generate(model, prompts, 12)


@pytest.mark.parametrize("cut", [{"top_k": 5, "top_p": None}, {"top_k": None, "top_p": 0.0225}])
def test_of_tokens_as_likely_the_lower_are_kept(cut):
    z = np.where(np.arange(400) % 2, 0.0, -60.0)  # enough for a sort that keeps no order
    assert [draw(z, u, 1.0, **cut) for u in (0.0, 0.3, 0.5, 0.7, 0.99)] == [1, 3, 5, 7, 9]


def test_the_whole_is_kept_at_top_p_one_however_unlikely():
    z = np.array([0.0, -60.0, 1.0])  # the second has a share of 2e-27, lost in any sum
    for u in (0.0, 0.3, np.nextafter(1, 0)):
        assert draw(z, u, 1.0, 3, 1.0) == draw(z, u, 1.0, None, None)
    only = np.array([-60.0, 1.0, 0.0])  # and comes first, where u = 0 finds it
    assert draw(only, 0.0, 1.0, None, 1.0) == draw(only, 0.0, 1.0, None, None) == 0


# chi-squared with 15 degrees of freedom exceeds this with probability 1e-4 (in SciPy's words
# chi2.isf(1e-4, 15)).
CHI2_15 = 44.263


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_a_hundred_thousand_draws_of_sixteen_tokens(temperature):
    z = np.random.default_rng(11).standard_normal(16) * 1.5
    p = np.exp(z / temperature) / np.exp(z / temperature).sum()
    stream, n = np.random.default_rng(12), 100_000
    counts = np.bincount(
        [draw(z, u, temperature, None, None) for u in stream.random(n)], minlength=16
    )
    assert ((counts - n * p) ** 2 / (n * p)).sum() < CHI2_15
    off = p * np.where(np.arange(16) % 2, 1.05, 0.95)  # what a biased sampler would draw from
    assert ((counts - n * off) ** 2 / (n * off)).sum() > CHI2_15


@pytest.mark.parametrize(
    "options, draws",
    [((None, None), 10_000), ((5, None), 10_000), ((None, 0.7), 10_000), ((9, 0.9), 100_000)],
)
def test_banned_tokens_are_never_drawn(options, draws):
    """A token of logit -inf, and one that top-k or top-p cut; all others are."""
    z = np.random.default_rng(13).standard_normal(16)
    z[[0, 6, 15]] = -np.inf
    top_k, top_p = options
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or 13]
    if top_p is not None:
        kept = kept[: 1 + int((np.cumsum(p[kept]) / p[kept].sum() < top_p).sum())]
    u = np.concatenate([[0.0, np.nextafter(1, 0)], np.random.default_rng(14).random(draws)])
    assert {draw(z, v, 1.0, top_k, top_p) for v in u} == set(kept.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_broke_generates_nothing(temperature, device, host):
    model = freeze(built("llama", device))
    model.norm.weight.data[...] = math.nan
    with pytest.raises(NumericsError, match="finite logits"):
        generate(model, [[1, 2], [3]], 3, temperature=temperature)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([], 1), {}, "at least one token"),
        (([[]], 1), {}, "at least one token"),
        (([[1]], -1), {}, "new_tokens"),
        (([[1]], 1), {"temperature": -1.0}, "temperature"),
        (([[1]], 1), {"temperature": math.inf}, "temperature"),
        (([[1]], 1), {"top_k": 0}, "top_k"),
        (([[1]], 1), {"top_p": 0.0}, "top_p"),
        (([[1]], 1), {"top_p": 1.1}, "top_p"),
        (([[19]], 1), {}, r"generate: .* 0\.\.18, found 19 at \(0, 0\)"),
        (([[1, -1]], 1), {}, r"generate: .* 0\.\.18, found -1 at \(0, 1\)"),
        (([[1.5, 2]], 1), {}, r"prompts: expected lists of whole numbers, found \[1.5, 2\]"),
        (([[True]], 1), {}, "prompts: expected lists of whole numbers"),
        (([1, 2], 1), {}, "prompts: expected lists of whole numbers, found 1"),
        (("ab", 1), {}, "prompts: expected lists of whole numbers, found 'a'"),
        (([[[1, 2], [3]]], 1), {}, "prompts: expected lists of whole numbers"),
        (([[10**30]], 1), {}, "prompts: expected lists of whole numbers"),
        (([[1]], 1), {"stop": 3}, "stop: expected lists of whole numbers, found 3"),
        (([[1]], 1), {"stop": "a"}, "stop: expected lists of whole numbers, found 'a'"),
        (([[1]], 2), {"seeds": None}, "seeds: expected whole numbers >= 0, found None"),
        (([[1]], 48), {}, "at most 48 positions, found 49"),
        (([[1]], 2), {"seeds": [1, 2]}, "one for each of 1 prompts, found 2"),
        (([[1]], 2), {"seeds": -1}, "seeds: expected whole numbers >= 0, found -1"),
        (([[1]], 2), {"seeds": [0.5]}, "seeds: expected whole numbers >= 0, found 0.5"),
        (([[1]], 2), {"top_k": 2.5}, "top_k: expected a whole number"),
        (([[1]], 2.5), {}, "new_tokens: expected a whole number"),
    ],
)
def test_what_generate_refuses(arguments, options, message, device):
    with pytest.raises(MiniloraError, match=message):
        generate(built("llama", device), *arguments, **options)


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(NumericsError, match="finite logits"):
        draw(np.array([np.nan, 1.0]), 0.5, 1.0, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 5}, {"key_heads": 3}, {"norm": "batch"}, {"mlp": "relu"}, {"layers": 0},
        {"key_heads": 0}, {"key_heads": -2}, {"hidden": -1}, {"layers": 1.5}, {"heads": None},
    ],
)  # fmt: skip
def test_configs_that_make_no_model(change):
    with pytest.raises(MiniloraError, match=r"config: .*expected"):
        TransformerConfig(**(SHAPE | change))


def test_ids_that_do_not_fit(dev, device):
    model = built("llama", device)
    for shape in ((3,), (1, 49), (1, 0)):
        with pytest.raises(MiniloraError, match="ids: expected shape"):
            model(dev(np.zeros(shape, np.int64)))
    assert freeze(model)(dev(np.zeros((0, 5), np.int64))).shape == (0, 5, SHAPE["vocab"])


def test_a_cache_wants_positions_and_a_frozen_model(dev, device):
    model = built("llama", device)
    with pytest.raises(MiniloraError, match="positions: expected"):
        freeze(model)(dev(np.array([[1]])), cache=KVCache(model, 1, 1))
    with pytest.raises(MiniloraError, match="freeze"):
        model(dev(np.array([[1]])), positions=dev(np.array([[0]])), cache=KVCache(model, 1, 4))


@pytest.mark.parametrize("half", [False, True])
def test_what_is_remembered(half, xp, dev):
    """Each row's keys and values at its own positions; all before `stop`, as views."""
    layer = LayerCache(xp, (2, 5, 1, 3), BFLOAT16 if half else np.float32)
    k, v = np.random.default_rng(0).standard_normal((2, 2, 2, 1, 3)).astype(np.float32)
    at = np.array([[0, 1], [2, 3]])
    stored = lambda a: BF16(dev(bits_of(a))) if half else dev(a)
    rounded = lambda a: float32_of(bits_of(a)) if half else a
    layer.stop = 4
    seen = remembered(stored(k), stored(v), layer=layer, positions=dev(at))
    for found, new, held in zip(seen, (k, v), (layer.keys, layer.values), strict=True):
        wanted = np.zeros((2, 5, 1, 3), np.float32)
        wanted[[[0], [1]], at] = rounded(new)
        np.testing.assert_array_equal(to_numpy(held), wanted)
        np.testing.assert_array_equal(to_numpy(found), wanted[:, :4])
        held[:, 0] = stored(np.full((2, 1, 3), 7, np.float32))  # seen too: no copy was made
        np.testing.assert_array_equal(to_numpy(found)[:, 0], np.full((2, 1, 3), 7))


def test_dropout_in_adapters_survives_recomputing(device, dev, host):
    from minilora import adapt

    base = freeze(built("llama", device))
    model = adapt(base, rank=2, rng=np.random.default_rng(0), dropout=0.5)
    ids = dev(some_ids())
    run = lambda: model.loss(ids, ids, rng=np.random.default_rng(1), recompute_blocks=True)
    a, b = run(), run()
    assert a.item() == b.item()
    ga, gb = a.backward(), b.backward()
    for p in ga:
        np.testing.assert_array_equal(host(ga[p]), host(gb[p]))
