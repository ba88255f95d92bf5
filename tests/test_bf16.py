"""bfloat16: rounding to the bit, what ops make of it, and models that are held in it."""

import operator

import numpy as np
import pytest
from op_table import TABLE, name_of

from minilora import (
    AdamW,
    MiniloraError,
    Parameter,
    Tensor,
    TransformerConfig,
    adapt,
    freeze,
    generate,
    init_transformer,
    merge,
    reference_rules,
    to_device,
)
from minilora.engine import fused, loss, ops, tensor
from minilora.engine.backend import is_array, to_numpy, xp_of
from minilora.engine.backend import to_device as array_to_device
from minilora.engine.bf16 import BF16, BFLOAT16, bits_of, float32_of
from minilora.engine.check import gradients
from minilora.engine.rounding import narrow, stored_as, summed
from minilora.engine.rules import wide, widen
from minilora.engine.tensor import op
from minilora.lab.op_samples import SAMPLES
from minilora.model.cache import KVCache
from minilora.model.layers import Linear
from minilora.model.module import cast, rebuild, tensors
from minilora.quant.bf16 import to_bf16
from minilora.quant.linear import dequantize, quantize

F32 = np.dtype(np.float32)
EPSILON = 2.0**-7  # from 1 to the next bfloat16


def rounded(array) -> BF16:
    return BF16(narrow(array))


# ---------------------------------------------------------------------- to the bit

EVERY = np.arange(1 << 16, dtype=np.uint16)


def test_all_of_them_go_to_float32_and_back(dev):
    values = to_numpy(widen(dev(EVERY)))
    assert values.tobytes() == (EVERY.astype(np.uint32) << 16).tobytes()
    back = to_numpy(narrow(dev(values)))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(back[number], EVERY[number])
    assert np.isnan(float32_of(back[~number])).all()


def nearest(x: np.ndarray) -> np.ndarray:
    """The bits by definition: of the two neighbors the nearer, of two as near the even one."""
    below = x.view(np.uint32) >> 16
    size = lambda bits: np.where(
        bits & 0x7FFF == 0x7F80, 2.0**128,
        abs(float32_of(bits.astype(np.uint16))).astype(np.float64),
    )  # fmt: skip
    down = abs(x.astype(np.float64)) - size(below)
    up = size(below + 1) - abs(x.astype(np.float64))
    upward = (up < down) | ((up == down) & (below % 2 == 1))
    return (below + (upward & np.isfinite(x))).astype(np.uint16)


def test_rounding_is_to_the_nearest_and_ties_are_even(dev):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = EVERY.astype(np.uint32) << 16 | 0x8000
    bits = np.concatenate([bits, ties, ties - 1, ties + 1, [0x7F7FFFFF, 0xFF7F8000, 0x80000000]])
    x = bits.astype(np.uint32).view(np.float32)
    number = ~np.isnan(x)
    found = to_numpy(narrow(dev(x)))
    np.testing.assert_array_equal(found[number], nearest(x[number]))
    assert np.isnan(float32_of(found[~number])).all()
    assert to_numpy(narrow(dev(x[number].astype(np.float64)))).tobytes() == found[number].tobytes()


def test_a_single_number_and_none_at_all(dev):
    one = rounded(dev(np.float32(1 + EPSILON / 2)))
    assert (one.shape, one.item()) == ((), 1.0)
    assert rounded(dev(np.zeros((0, 3), np.float32))).float32().shape == (0, 3)


def test_two_are_summed_and_rounded_once(dev):
    a, b = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32)
    a, b = bits_of(a), bits_of(b)
    wanted = bits_of(float32_of(a) + float32_of(b))
    np.testing.assert_array_equal(to_numpy(summed(dev(a), dev(b))), wanted)


# ------------------------------------------------------------------------- the class


def test_it_has_a_shape_and_is_cut_and_written_like_an_array(dev):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    a = rounded(dev(x))
    assert (a.shape, a.ndim, a.size, a.nbytes, a.itemsize, len(a)) == ((3, 4), 2, 12, 24, 2, 3)
    assert (a.dtype, a.dtype.kind, str(a.dtype)) == (BFLOAT16, "f", "bfloat16")
    for move in (lambda a: a[1:, ::2], lambda a: a.reshape(2, 6), lambda a: a.T,
                 lambda a: a.swapaxes(0, 1), lambda a: a[..., None]):  # fmt: skip
        np.testing.assert_array_equal(to_numpy(move(a)), move(x))
    part = a[0]
    part[...] = dev(np.full(4, 1 + EPSILON / 2, np.float32))
    part[1:2] = rounded(dev(np.full(1, 7.0, np.float32)))
    part[3] = 1.5
    assert to_numpy(a)[0].tolist() == [1, 7, 1, 1.5]
    assert is_array(a)
    assert xp_of(a) is xp_of(a.bits)
    with pytest.raises(AttributeError, match="mean"):
        _ = a.mean


def test_nobody_calculates_with_it(dev):
    x = dev(np.ones(3, np.float32))
    a = rounded(x)
    for f in (operator.add, operator.mul, operator.matmul, operator.sub):
        for pair in ((a, a), (a, x), (x, a), (a, 2.0)):
            with pytest.raises(TypeError):
                f(*pair)
    with pytest.raises(TypeError, match="implicitly"):
        np.asarray(a)
    for wrong in (dev(np.ones(3, np.int16)), x, [1, 2]):
        with pytest.raises(TypeError, match="uint16"):
            BF16(wrong)


def test_bits_alone_are_no_numbers(dev):
    bits = dev(np.ones((2, 2), np.uint16))
    for wrong in (lambda: Tensor(bits), lambda: ops.exp(bits), lambda: fused.linear(bits, bits)):
        with pytest.raises(MiniloraError, match="expected a float array, found dtype uint16"):
            wrong()


def test_host_and_device_never_mix(device):
    if device == "cpu":
        pytest.skip("needs a device or its stand-in")
    a = rounded(np.ones(3, np.float32))
    for b in (array_to_device(a, device), array_to_device(np.ones(3, np.float32), device)):
        with pytest.raises(MiniloraError, match="arrays of numpy and cupy meet"):
            tensor.add(a, b)


def test_it_moves_between_devices(device):
    a = rounded(np.arange(3, dtype=np.float32))
    moved = array_to_device(a, device)
    assert array_to_device(moved, device) is moved
    back = array_to_device(moved, "cpu")
    assert back.bits.tobytes() == a.bits.tobytes()
    tree = to_device(Linear(Tensor(a.reshape(1, 3))), device)
    assert tree.weight.dtype == BFLOAT16
    assert tree.weight.numpy().dtype == np.float32


# ---------------------------------------------------------------------- what ops do


@op
def seen(xp, a, b):
    """a + b, which notes what it was given."""
    noted.append((type(a), a.dtype, b.dtype))
    return a + b, (lambda g: g, lambda g: g)


noted: list = []


def test_a_rule_not_written_for_it_gets_float32_and_is_rounded(dev):
    noted.clear()
    x = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    a = rounded(dev(x))
    y = seen(Parameter(a), dev(x))
    assert noted == [(type(dev(x)), np.float32, np.float32)]
    wanted = bits_of(to_numpy(a) + x)
    assert y.dtype == BFLOAT16
    np.testing.assert_array_equal(to_numpy(y.data.bits), wanted)


def test_a_rule_written_for_it_gets_it_and_may_decline(dev, xp):
    a = rounded(dev(np.ones(3, np.float32)))
    kind = f"{xp.__name__} bf16"
    answers = [NotImplemented, (rounded(dev(np.full(3, 9.0, np.float32))), (None, None))]
    given = []

    @seen.on(kind)
    def _(xp, a, b):
        given.append(type(a))
        return answers.pop(0)

    try:
        assert to_numpy(seen(a, a).data).tolist() == [2, 2, 2]
        assert to_numpy(seen(a, a).data).tolist() == [9, 9, 9]
        with reference_rules():
            assert to_numpy(seen(a, a).data).tolist() == [2, 2, 2]
        seen(dev(np.ones(3, np.float32)), 1.0 * dev(np.ones(3, np.float32)))
    finally:
        del seen.fast[kind]
    assert given == [BF16, BF16]


def test_a_loss_stays_float32(dev):
    x = rounded(dev(np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)))
    targets = dev(np.arange(40) % 30)
    for value in (loss.cross_entropy(x, targets=targets), tensor.sum(x), tensor.mean(x)):
        assert (value.dtype, value.shape) == (np.float32, ())
    wanted = loss.cross_entropy(x.float32(), targets=targets).item()
    found = loss.cross_entropy(x, targets=targets).item()
    assert found == pytest.approx(wanted, rel=1e-6)
    assert float(float32_of(bits_of(np.float32(wanted)))) != pytest.approx(wanted, rel=1e-6)


def test_a_cotangent_is_stored_as_its_value(dev):
    rng = np.random.default_rng(0)
    draw = lambda *shape: dev(rng.standard_normal(shape).astype(np.float32))
    x, w, W = Parameter(rounded(draw(5, 8))), Parameter(draw(8)), rounded(draw(3, 8))
    went = []

    @op
    def watch(xp, y):
        """y, whose cotangent is noted."""
        return y, (lambda g: went.append(g.dtype) or g,)

    watch.on(f"{xp_of(w.data).__name__} bf16")(
        lambda xp, y: (y, (lambda g: went.append(g.dtype) or g,))
    )
    y = fused.linear(watch(fused.rms_norm(x, w, eps=1e-5)), W)
    found = y.backward(draw(5, 3))  # float32: it is rounded on entering
    assert went == [BFLOAT16]
    assert found[x].dtype == BFLOAT16
    assert found[w].dtype == np.float32


def test_a_value_used_thrice_sums_its_cotangents(dev):
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    p = Parameter(rounded(dev(x)))
    y = (ops.exp(p) + p) + ops.tanh(p)
    g = to_numpy(y.backward(dev(np.ones((4, 6), np.float32)))[p])
    x = to_numpy(p.data).astype(np.float64)
    wanted = np.exp(x) + 1 + 1 - np.tanh(x) ** 2
    assert np.linalg.norm(g - wanted) <= 1e-2 * np.linalg.norm(wanted)


def test_sums_go_into_given_arrays(dev):
    w = Parameter(dev(np.ones(3, np.float32)))
    x = rounded(dev(np.array([[1.0, 2.0, 3.0]] * 4, np.float32)))
    into = {w: dev(np.ones(3, np.float32))}
    tensor.mul(x, w).sum().backward(into=into)
    assert to_numpy(into[w]).tolist() == [5, 9, 13]


def placed(option, device):
    """An option on the device; a frozen base in bfloat16."""
    if is_array(option):
        return array_to_device(option, device)
    if not hasattr(option, "dense"):
        return option
    base = cast(option, np.float32)
    return to_device(rebuild(base, lambda _, n: Tensor(rounded(n.data)) if isinstance(n, Tensor)
                             else n), device)  # fmt: skip


def held_to_float64(sample, device, kinds, tolerance=1e-2):
    """Value and gradients of a sample whose arrays are BF16 where `kinds` says so."""
    arrays, options = sample.draw(np.random.default_rng(0))
    if sample.op.__name__ == "max":  # far from ties, which rounding would make
        arrays = [np.random.default_rng(0).permutation(a.size).reshape(a.shape) % 251.0
                  for a in arrays]  # fmt: skip
    given = [rounded(a) if k else a.astype(np.float32) for a, k in zip(arrays, kinds, strict=True)]
    exact = [to_numpy(a).astype(np.float64) for a in given]
    fresh = lambda o: o | {"rng": np.random.default_rng(5)} if "rng" in o else o

    def run(arrays, options):
        f = lambda *a: sample.op(*a, **fresh(options))
        value = f(*map(Tensor, arrays))
        several = isinstance(value, tuple)
        draw = np.random.default_rng(9)
        w = [bits_of(draw.standard_normal(v.shape)) for v in (value if several else (value,))]
        w = [float32_of(b).astype(np.float64) for b in w]
        here = lambda like: "cpu" if xp_of(like) is np else device
        place = lambda like, a: stored_as(
            like, array_to_device(a.astype(wide(like).dtype), here(like))
        )
        w = [place(v.data, a) for v, a in zip(value if several else (value,), w, strict=True)]
        found, value = gradients(f, arrays, tuple(w) if several else w[0])
        return list(value if several else (value,)), found

    on = {name: placed(option, device) for name, option in options.items()}
    wanted_options = {
        n: cast(o, np.float64) if hasattr(o, "dense") else options[n]
        for n, o in {n: placed(o, "cpu") for n, o in options.items()}.items()
    }
    with reference_rules():
        values, wanted = run(exact, wanted_options)
    found, back = run([array_to_device(a, device) for a in given], on)
    for v in found:
        assert v.dtype == (BFLOAT16 if any(kinds) and v.ndim else np.float32)
    for g, k in zip(back, kinds, strict=True):
        assert g.dtype == (BFLOAT16 if k else np.float32)
    pairs = [*zip([v.data for v in found], [v.data for v in values], strict=True),
             *zip(back, wanted, strict=True)]  # fmt: skip
    for a, b in pairs:
        gap = np.linalg.norm((to_numpy(a).astype(np.float64) - b).ravel())
        assert gap <= tolerance * max(np.linalg.norm(b.ravel()), 1e-30)


@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_every_op_is_near_float64(sample, device):
    held_to_float64(sample, device, [True] * len(sample.shapes))


# The kinds as they meet in a model: weights of norms and factors of adapters are float32.
MIXED = {
    "lora_linear": (True, False, False), "layer_norm": (True, False, False),
    "rms_norm": (True, False), "add": (True, False), "concat": (False, True),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_ops_of_two_kinds_are_near_float64(name, device):
    sample = next(s for s in SAMPLES if s.op.__name__ == name)
    held_to_float64(sample, device, MIXED[name])


@pytest.mark.parametrize("name", ["frozen_linear", "lora_linear"])
def test_a_float32_input_meets_a_base_in_bfloat16(name, device):
    sample = next(s for s in SAMPLES if s.op.__name__ == name)
    held_to_float64(sample, device, [False] * len(sample.shapes), 1e-5)


def test_the_bound_sees_a_wrong_gradient(device, xp, monkeypatch):
    sample = next(s for s in SAMPLES if s.op.__name__ == "sigmoid")
    right = sample.op.specification
    wrong = lambda xp, x: (right(xp, x)[0], (lambda g: 1.02 * right(xp, x)[1][0](g),))
    monkeypatch.setitem(sample.op.fast, xp.__name__, wrong)
    with pytest.raises(AssertionError):
        held_to_float64(sample, device, [True])


MOVING = [s for s in TABLE if "numpy bf16" in s.op.fast]


@pytest.mark.parametrize("sample", MOVING, ids=name_of)
def test_what_only_moves_entries_is_exact(sample, device):
    arrays, options = sample.draw(np.random.default_rng(0))
    given = [rounded(a) for a in arrays]
    on = {n: placed(o, device) for n, o in options.items()}
    wanted = sample.op(*map(to_numpy, given), **options)
    found = sample.op(*[array_to_device(a, device) for a in given], **on)
    several = isinstance(found, tuple)
    for a, b in zip(found if several else (found,), wanted if several else (wanted,), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.data)


def test_rows_that_come_twice_add_up(dev):
    p = Parameter(rounded(dev(np.ones((4, 2), np.float32))))
    y = p[dev(np.array([1, 1, 3]))]
    g = y.backward(dev(np.array([[1, 2], [4, 8], [3, 5]], np.float32)))[p]
    assert to_numpy(g).tolist() == [[0, 0], [5, 10], [0, 0], [3, 5]]


# -------------------------------------------------------------------------- whole models

SHAPE = {"vocab": 40, "width": 32, "layers": 2, "heads": 4, "context": 24}
STYLES = {
    "gpt2": TransformerConfig.gpt2(**SHAPE),
    "llama": TransformerConfig(**SHAPE, key_heads=2, hidden=48),
}


def adapted(style, codes=False):
    base = init_transformer(STYLES[style], np.random.default_rng(0), 0.15)
    return adapt(quantize(base) if codes else base, rank=4, rng=np.random.default_rng(1))


@pytest.mark.parametrize("style", STYLES)
def test_frozen_weights_become_bf16_and_nothing_else_does(style):
    model = adapted(style)
    half = to_bf16(model)
    for path, t in tensors(half).items():
        stays = path[-2:] in (".A", ".B") or "norm" in path
        assert t.dtype == (np.float32 if stays else BFLOAT16), path
        assert isinstance(t, Parameter) == isinstance(tensors(model)[path], Parameter)
    assert half.head.weight is half.embedding.weight
    assert half.blocks[0].mlp_norm is model.blocks[0].mlp_norm
    frozen = tensors(to_bf16(freeze(model)))
    assert {t.dtype for p, t in frozen.items() if p[-2:] in (".A", ".B")} == {F32}
    with pytest.raises(MiniloraError, match="expected frozen weights"):
        to_bf16(init_transformer(STYLES[style], np.random.default_rng(0)))


@pytest.mark.parametrize("style", STYLES)
def test_a_model_in_bfloat16_gets_factors_in_float32(style, device):
    """The very ones that one in float32 gets."""
    base = freeze(init_transformer(STYLES[style], np.random.default_rng(0), 0.15))
    draw = lambda model: adapt(model, "*", rank=4, rng=np.random.default_rng(1))
    wanted, found = tensors(to_bf16(draw(base))), tensors(draw(to_device(to_bf16(base), device)))
    assert found.keys() == wanted.keys()
    for path, t in found.items():
        assert t.dtype == wanted[path].dtype, path
        assert isinstance(t, Parameter) == isinstance(wanted[path], Parameter)
        assert t.numpy().tobytes() == wanted[path].numpy().tobytes(), path


def trained(model, device, steps=12):
    """Losses of a run in which a tenth of them is lost."""
    optimizer = AdamW(to_device(model, device), lr=1e-2)
    rng = np.random.default_rng(2)
    ids = array_to_device(rng.integers(0, 40, (4, 24)), device)
    losses = []
    for _ in range(steps):
        value = optimizer.model.loss(ids, ids)
        assert value.dtype == np.float32
        value.backward(into=optimizer.gradients)
        optimizer.step(divide_by=96, clip=1.0)
        losses.append(value.item())
    return np.array(losses), optimizer.model


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_run_follows_that_in_float32(style, codes, device):
    wanted, _ = trained(adapted(style, codes), "cpu")
    found, model = trained(to_bf16(adapted(style, codes)), device)
    assert wanted[-1] < 0.9 * wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-2)
    assert {p.dtype for p in tensors(model).values() if isinstance(p, Parameter)} == {F32}


def test_it_generates_and_merges(device):
    _, model = trained(to_bf16(adapted("llama")), device)
    prompts = [[1, 2, 3], [4]]
    made = generate(model, prompts, 6)
    assert [len(row) for row in made] == [6, 6]
    plain = merge(model)
    assert plain.blocks[0].mlp.up.weight.dtype == np.float32
    ids = array_to_device(np.array([[1, 2, 3, 4]]), device)
    a, b = (m(ids).numpy() for m in (freeze(model), plain))
    assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)


def test_keys_and_values_are_kept_as_the_activations_are():
    model = init_transformer(STYLES["llama"], np.random.default_rng(0))
    sizes = [KVCache(m, 2, 10).layers[0].keys for m in (model, to_bf16(freeze(model)))]
    assert [(a.dtype, a.nbytes) for a in sizes] == [(F32, 1280), (BFLOAT16, 640)]


def test_codes_are_made_dense_in_bfloat16(device):
    base = quantize(init_transformer(STYLES["llama"], np.random.default_rng(0), 0.15))
    half = to_device(to_bf16(base), device)
    node, exact = half.blocks[0].mlp.up, base.blocks[0].mlp.up
    assert node.dense().dtype == BFLOAT16
    assert to_numpy(node.dense().bits).tobytes() == bits_of(exact.dense()).tobytes()
    assert node.weight.packed.nbytes == exact.weight.packed.nbytes
    assert dequantize(half).blocks[0].mlp.up.weight.dtype == BFLOAT16


def test_a_weight_in_bfloat16_is_quantized_as_its_numbers(device):
    base = freeze(init_transformer(STYLES["llama"], np.random.default_rng(0), 0.15))
    half = to_bf16(base)
    codes = quantize(to_device(half, device)).blocks[0].mlp.up.weight
    whole = cast(half, np.float32)
    assert {t.dtype for t in tensors(whole).values()} == {F32}
    assert {t.dtype for t in tensors(cast(whole, BFLOAT16)).values()} == {BFLOAT16}
    wanted = quantize(whole).blocks[0].mlp.up.weight
    assert to_numpy(codes.packed).tobytes() == wanted.packed.tobytes()
    assert codes.dense().dtype == BFLOAT16
