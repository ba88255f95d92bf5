"""Many adapters on one base: named, swapped, mixed, added up, and taken out of a full fine-tune."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_files import adapted_of, model_of

from minilora.engine.errors import AdapterError, NumericsError
from minilora.engine.tensor import Tensor
from minilora.lora.adapters import Adapters, Factors, combine, extract, mix, put, take
from minilora.lora.lora import is_adapter, merge
from minilora.model.generate import generate
from minilora.model.module import freeze, rebuild, tensors, to_device, walk
from minilora.quant.linear import quantize

IDS = np.random.default_rng(3).integers(0, 320, (5, 9))


@pytest.fixture(scope="module")
def base(device):
    return to_device(model_of("llama"), device)


@pytest.fixture(scope="module")
def three(base):
    """Adapters of different ranks and modules, embedding and head included."""
    return {
        "a": take(adapted_of(base, seed=1, rank=3)),
        "b": take(adapted_of(base, seed=2, rank=2, targets=["query", "down", "embedding"])),
        "c": take(adapted_of(base, seed=3, rank=4, targets=["head", "up"], rank_stabilized=True)),
    }


def out(model, dev, ids=IDS):
    return model(dev(ids)).numpy()


def delta(adapter, host):
    """{path: ΔW} in float64."""
    return {p: f.scale * host(f.B.data).astype(float) @ host(f.A.data) for p, f in adapter.items()}


# ------------------------------------------------------------------ one at a time


def test_an_adapter_taken_and_put_is_the_same(base, dev):
    adapted = adapted_of(base, dropout=0.25, rank_stabilized=True)
    again = put(base, take(adapted))
    assert np.array_equal(out(again, dev), out(freeze(adapted), dev))
    kept = again.blocks[0].mlp.up
    assert (kept.dropout, kept.rank_stabilized) == (0.25, True)
    with pytest.raises(AdapterError, match="found none"):
        take(base)
    with pytest.raises(AdapterError, match="found one with adapters"):
        put(adapted, take(adapted))
    with pytest.raises(AdapterError, match=r"nothing to adapt at blocks\.9"):
        put(base, {"blocks.9.mlp.up": take(adapted)["blocks.0.mlp.up"]})


def test_a_set_of_adapters(base, three, dev):
    held = Adapters(base)
    plain = out(base, dev)
    assert (held.active, held.names) == (None, [])
    for name, adapter in three.items():
        held.add(name, adapter)
    assert held.names == ["a", "b", "c"]
    seen = {}
    for name in held.names:
        tree = held.activate(name)
        assert (held.active, held.model) == (name, tree)
        seen[name] = out(tree, dev)
        assert np.array_equal(seen[name], out(put(base, three[name]), dev))
    assert not np.allclose(seen["a"], seen["b"])
    assert np.array_equal(out(held.disable(), dev), plain)
    assert held.active is None
    held.remove("b")
    assert held.names == ["a", "c"]


@pytest.mark.parametrize("name", ["", "a.b", "x" * 65, "../a", "a b", None, 3])
def test_names_that_are_refused(base, three, name):
    with pytest.raises(AdapterError, match="1 to 64 of A-Z"):
        Adapters(base).add(name, three["a"])


def test_what_a_set_refuses(base, three, dev):
    held = Adapters(base)
    held.add("a", three["a"])
    with pytest.raises(AdapterError, match="there already"):
        held.add("a", three["b"])
    for refused in (held.remove, held.activate, held.get):
        with pytest.raises(AdapterError, match=r"expected one of \['a'\], found 'z'"):
            refused("z")
    held.activate("a")
    with pytest.raises(AdapterError, match="in use"):
        held.remove("a")
    with pytest.raises(AdapterError, match="nothing to adapt"):
        held.add("odd", {"nowhere": three["a"]["blocks.0.mlp.up"]})
    with pytest.raises(AdapterError, match="expected A"):
        held.add("odd", {"blocks.0.mlp.down": three["a"]["blocks.0.mlp.up"]})
    with pytest.raises(AdapterError, match="plain base"):
        Adapters(held.model)


def test_the_base_is_bit_equal_after_merging_an_adapter_with_nan(base, three, host):
    before = {path: host(t.data).tobytes() for path, t in tensors(base).items()}
    f = three["a"]["blocks.0.mlp.up"]
    spoiled = dict(three["a"]) | {"blocks.0.mlp.up": f._replace(A=Tensor(f.A.data * np.nan))}
    with pytest.raises(NumericsError, match=r"merge: blocks\.0\.mlp\.up"):
        merge(put(base, spoiled))
    assert {path: host(t.data).tobytes() for path, t in tensors(base).items()} == before


def test_an_adapter_on_learned_positions(device, dev):
    """Alone, merged, in a mixed batch and in generation, as one on any other table."""
    gpt2 = to_device(model_of("gpt2"), device)
    adapted = freeze(adapted_of(gpt2, targets=["positions"]))
    for node in (n for _, n in walk(adapted) if is_adapter(n)):
        node.A.data[...] = 0.1
    merged = merge(adapted)
    assert np.abs(out(merged, dev) - out(gpt2, dev)).max() > 0.1
    np.testing.assert_allclose(out(adapted, dev), out(merged, dev), rtol=0, atol=1e-5)
    rows = out(mix(gpt2, [take(adapted), None, None, take(adapted), None]), dev)
    np.testing.assert_allclose(rows[[0, 3]], out(merged, dev)[[0, 3]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows[[1, 2, 4]], out(gpt2, dev)[[1, 2, 4]], rtol=0, atol=1e-5)
    prompts = [[1, 2, 3], [4]]
    assert generate(adapted, prompts, 5) == generate(merged, prompts, 5)


# ------------------------------------------------------------------ a batch of many


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_each_row_of_a_mixed_batch_is_its_own_run(base, three, dev, kind):
    model = base if kind == "plain" else quantize(base)
    rows = ["b", None, "a", "c", "a"]
    held = Adapters(model)
    for name, adapter in three.items():
        held.add(name, adapter)
    found = out(held.mixed(rows), dev)
    for n, name in enumerate(rows):
        single = model if name is None else held.activate(name)
        wanted = out(single, dev, IDS[n : n + 1])[0]
        assert np.abs(found[n] - wanted).max() <= 1e-6 * max(1, np.abs(wanted).max()), name


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7))
def test_any_mixture_of_rows(base, three, dev, rows):
    ids = np.random.default_rng(len(rows)).integers(0, 320, (len(rows), 4))
    mixed = mix(base, [None if name is None else three[name] for name in rows])
    found = out(mixed, dev, ids)
    for name in set(rows):
        mine = [n for n, other in enumerate(rows) if other == name]
        single = base if name is None else put(base, three[name])
        assert np.abs(found[mine] - out(single, dev, ids[mine])).max() <= 2e-6


def test_a_mixed_generation_is_each_rows_own(base, three):
    prompts = [row[: 3 + n].tolist() for n, row in enumerate(IDS[:3])]
    rows = [three["a"], None, three["c"]]
    found = generate(mix(base, rows), prompts, 6)
    for n, adapter in enumerate(rows):
        single = base if adapter is None else put(base, adapter)
        assert found[n] == generate(single, [prompts[n]], 6)[0]


def test_what_a_mixture_refuses(base, three, dev):
    with pytest.raises(AdapterError, match="at least one row"):
        mix(base, [])
    with pytest.raises(AdapterError, match="expected 2 rows, found 5"):
        out(mix(base, [three["a"], None]), dev)
    with pytest.raises(AdapterError, match="found one with adapters"):
        mix(put(base, three["a"]), [three["a"]])
    mixed = mix(base, [next(iter(three.values())), None])
    for way in (merge, take):
        with pytest.raises(AdapterError, match="one adapter for all rows, found 2 groups"):
            way(mixed)


@pytest.mark.parametrize("forwards", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_forward_never_mixes_two_adapters(base, three, dev, forwards):
    """Row 33: with PEFT, 226 of 300 forwards beside a swapping thread mixed two."""
    held = Adapters(base)
    for name, adapter in three.items():
        held.add(name, adapter)
    ids = IDS[:1, :4]
    known = {name: out(held.activate(name), dev, ids).tobytes() for name in three}
    known[None] = out(held.disable(), dev, ids).tobytes()

    def swap():
        for name in three:
            held.activate(name)
            merge(held.model)
        held.disable()

    seen, swaps = beside(swap, lambda: out(held.model, dev, ids).tobytes(), forwards)
    assert seen <= set(known.values())
    assert len(seen) > 1
    assert swaps > 10


def beside(other, forward, times):
    """What `forward` gives while another thread repeats `other`; and how often that was."""
    done, turns, before = threading.Event(), [0], sys.getswitchinterval()

    def loop():
        while not done.is_set():
            other()
            turns[0] += 1

    thread = threading.Thread(target=loop)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        return {forward() for _ in range(times)}, turns[0]
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)


def test_the_threads_would_mix_what_is_changed_in_place(base, three, dev, device):
    """The same race on a tree that is changed in place, as no tree here is: it is noticed."""
    if device != "cpu":
        pytest.skip("shows the harness, once")
    trees = [put(base, take(adapted_of(base, seed=s))) for s in (1, 2)]
    ids = IDS[:1, :4]
    known = {out(tree, dev, ids).tobytes() for tree in trees}
    nodes = [[node for _, node in walk(tree) if is_adapter(node)] for tree in trees]
    factors = [[(n.A, n.B) for n in part] for part in nodes]

    def swap():
        for new in factors[::-1]:
            for node, (A, B) in zip(nodes[0], new, strict=True):
                object.__setattr__(node, "A", A)
                object.__setattr__(node, "B", B)

    for _ in range(20):  # on a busy machine the threads may not meet at once
        seen, _ = beside(swap, lambda: out(trees[0], dev, ids).tobytes(), 300)
        if seen - known:
            break
    assert seen - known


# ------------------------------------------------------------------ sums


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_concatenation_is_the_exact_sum(base, host, weights, stabilized):
    adapters = [
        take(adapted_of(base, seed=s, rank=s + 1, rank_stabilized=flag, targets=["up", "down"]))
        for s, flag in zip(range(len(weights)), stabilized, strict=False)
    ]
    made, errors = combine(adapters, weights)
    wanted = [delta(a, host) for a in adapters]
    for path, found in delta(made, host).items():
        total = sum(w * d[path] for w, d in zip(weights, wanted, strict=True))
        assert np.abs(found - total).max() <= 1e-6 * max(1, np.abs(total).max())
        assert errors[path] == 0
    assert made["blocks.0.mlp.up"].A.shape[0] == sum(range(1, len(weights) + 1))


def test_linear_combination_and_its_cross_terms(base, host):
    adapters = [take(adapted_of(base, seed=s, targets=["up"])) for s in (1, 2)]
    made, errors = combine(adapters, [0.5, -1.5], way="linear")
    wanted = [delta(a, host) for a in adapters]
    for path, found in delta(made, host).items():
        total = 0.5 * wanted[0][path] - 1.5 * wanted[1][path]
        gap = np.linalg.norm(found - total) / np.linalg.norm(total)
        assert abs(gap - errors[path]) < 1e-5
        assert gap > 0.1  # the terms B_i A_j are not small
    alone, errors = combine(adapters[:1], [2.0], way="linear")
    assert max(errors.values()) < 1e-6
    for path, found in delta(alone, host).items():
        assert np.abs(found - 2 * wanted[0][path]).max() < 1e-6


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_svd_gives_the_nearest_of_its_rank(base, host, rank):
    adapters = [take(adapted_of(base, seed=s, targets=["up"])) for s in (1, 2)]
    made, errors = combine(adapters, way="svd", rank=rank)
    wanted = [delta(a, host) for a in adapters]
    for path, found in delta(made, host).items():
        total = wanted[0][path] + wanted[1][path]
        values = np.linalg.svd(total, compute_uv=False)
        best = np.sqrt(np.square(values[rank:]).sum()) / np.linalg.norm(total)
        assert abs(errors[path] - best) < 1e-5
        assert abs(np.linalg.norm(found - total) / np.linalg.norm(total) - best) < 1e-5


def test_what_combining_refuses(base, three):
    a, b = three["a"], three["b"]
    for call, message in (
        (lambda: combine([]), "a way in"),
        (lambda: combine([a], way="average"), "a way in"),
        (lambda: combine([a, b], [1.0]), "a weight for each"),
        (lambda: combine([a], way="svd"), "rank"),
        (lambda: combine([a], way="svd", rank=0), "rank"),
        (lambda: combine([a], rank=2), "rank"),
        (lambda: combine([a, b], way="linear"), "rank"),
        (lambda: combine([a], [float("nan")]), "finite"),
    ):
        with pytest.raises(AdapterError, match=message):
            call()


def test_an_adapter_out_of_a_full_fine_tune(base, host, dev):
    rng = np.random.default_rng(9)
    update = {}

    def tuned(path, node):
        if path in ("blocks.0.mlp.up.weight", "blocks.1.attention.query.weight"):
            low = rng.standard_normal((node.shape[0], 3)) @ rng.standard_normal((3, node.shape[1]))
            update[path.removesuffix(".weight")] = low
            return Tensor(node.data + dev((0.1 * low).astype(np.float32)))
        return node

    full = rebuild(base, tuned)
    made, errors = extract(base, full, 3)
    for path, error in errors.items():
        assert error < 1e-5 if path in update else error == 0
    assert np.abs(out(put(base, made), dev) - out(full, dev)).max() < 1e-4
    made, errors = extract(base, full, 1, targets=["up"])
    values = np.linalg.svd(update["blocks.0.mlp.up"], compute_uv=False)
    best = np.sqrt(np.square(values[1:]).sum() / np.square(values).sum())
    assert abs(errors["blocks.0.mlp.up"] - best) < 1e-3
    with pytest.raises(AdapterError, match="rank >= 1"):
        extract(base, full, 0)
    with pytest.raises(AdapterError, match="in both"):
        extract(base, quantize(model_of("gpt2")), 2)


def test_factors_know_their_scale():
    A, B = Tensor(np.zeros((4, 3))), Tensor(np.zeros((2, 4)))
    assert Factors(A, B, 8.0).scale == 2
    assert Factors(A, B, 8.0, True).scale == 4
