"""The kernels over bfloat16, run on a CPU: float32 math, rounded once, against float64."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_cpu import fakeblas, fakeraw
from cuda_cpu.checks import (  # noqa: F401
    agrees,
    apart,
    in_bf16,
    installed,
    kernels,
    launches,
    on_device,
    on_the_cpu,
    sanitized,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import AdamW, Parameter, TransformerConfig, adapt, generate, init_transformer
from minilora.engine import attention, fused, loss, tensor
from minilora.engine.backend import to_numpy
from minilora.engine.bf16 import BF16, BFLOAT16, bits_of, float32_of
from minilora.engine.rounding import narrow, summed
from minilora.engine.rules import reference_rules, widen
from minilora.fast import cuda_attention
from minilora.lab.op_samples import SAMPLES
from minilora.model.module import to_device
from minilora.quant.bf16 import to_bf16
from minilora.quant.blockwise import dequantize_blocks, quantize_blocks
from minilora.quant.codes import code
from minilora.quant.linear import quantize

pytestmark = pytest.mark.usefixtures("kernels")
few = settings(max_examples=8)
WIDTHS = st.sampled_from([1, 3, 4, 31, 48, 64, 129, 132, 260])
RNG = np.random.default_rng


@pytest.fixture(scope="module")
def blas(request, kernels):  # noqa: F811
    """cuBLAS as a fake on the stand-in; a card has its own."""
    if request.config.getoption("device") == "cuda":
        yield None
        return
    raw = sys.modules["cupy"].RawModule
    with fakeblas.installed() as library:
        vars(sys.modules["cupy"])["RawModule"] = raw
        yield library


def half(array):
    return BF16(on_device(bits_of(np.asarray(array, np.float32))))


# ------------------------------------------------------------------------- conversions


def test_conversions_are_the_specification_to_the_bit():
    every = np.arange(1 << 16, dtype=np.uint16)
    values, names = launches(lambda: widen(on_device(every)))
    assert to_numpy(values).tobytes() == float32_of(every).tobytes()
    assert names == ["converted"]
    bits = RNG(0).integers(0, 1 << 32, 30_001, dtype=np.uint32)
    ties = every.astype(np.uint32) << 16 | 0x8000
    x = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    found, names = launches(lambda: narrow(on_device(x)))
    assert to_numpy(found).tobytes() == bits_of(x).tobytes()
    assert names == ["converted"]


def test_a_sum_is_the_specification_to_the_bit():
    a, b = (bits_of(x) for x in RNG(0).standard_normal((2, 1003)))
    found, names = launches(lambda: summed(on_device(a), on_device(b)))
    with reference_rules():
        assert to_numpy(found).tobytes() == summed(a, b).tobytes()
    assert names == ["added"]


def test_a_residual_connection_is_one_launch():
    x = RNG(0).standard_normal((2, 5, 33, 7))
    agrees(tensor.add, x, half=(0, 1), expect={"added"})
    _, names = launches(lambda: tensor.add(half(x[0]), half(x[1])))
    assert names == ["added"]


# -------------------------------------------------------------- norms and activations


@few
@given(st.integers(1, 70), WIDTHS, st.booleans(), st.integers(0, 99))
def test_norms(rows, C, centered, seed):
    rng = RNG(seed)
    x = rng.standard_normal((rows, C)) + centered
    arrays = [x, rng.standard_normal(C), rng.standard_normal(C)][: 2 + centered]
    norm = fused.layer_norm if centered else fused.rms_norm
    expect = {"norm_forward", "norm_backward", "norm_columns"}
    scale = 100 * np.sqrt(rows) if C < 4 else np.sqrt(rows)
    agrees(norm, arrays, {"eps": 1e-5}, expect=expect, half=(0,), scale=scale)


@few
@given(st.sampled_from([(7,), (3, 5), (2, 130, 17), (1030,)]), st.integers(0, 99))
def test_gelu_and_swiglu(shape, seed):
    x = RNG(seed).standard_normal((2, *shape))
    agrees(fused.gelu, 3 * x[:1], half=(0,), expect={"gelu_forward", "gelu_backward"}, scale=0.1)
    expect = {"swiglu_forward", "swiglu_backward"}
    agrees(fused.swiglu, x, half=(0, 1), expect=expect, scale=0.1)


@few
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.sampled_from([2, 6, 64]),
       st.booleans(), st.integers(0, 99))  # fmt: skip
def test_rope(N, T, H, D, placed, seed):
    rng = RNG(seed)
    options = {"theta": 1000.0}
    if placed:
        options["positions"] = rng.integers(0, 5000, (N, T))
    agrees(attention.rope, [rng.standard_normal((N, T, H, D))], options, half=(0,),
           expect={"rope"})  # fmt: skip


def test_heads_cut_from_a_packed_product_are_not_copied():
    x = RNG(0).standard_normal((2, 5, 32)).astype(np.float32)

    def turned(x):
        _, k, _ = attention.split_heads(x, heads=(2, 1, 1), width=8)
        return attention.rope(k, theta=100.0).data

    y, names = launches(lambda: turned(half(x)))
    wanted = turned(float32_of(bits_of(x)))
    assert apart(to_numpy(y), wanted) < 4e-3
    assert names == ["rope"]


# ---------------------------------------------------------------------- tokens and losses


@few
@given(st.sampled_from([(1,), (3, 37)]), st.sampled_from([1, 33, 200]),
       st.sampled_from([1, 7, 64, 300]), st.integers(0, 99))  # fmt: skip
def test_embedding_copies_rows(shape, V, C, seed):
    rng = RNG(seed)
    table, ids = bits_of(rng.standard_normal((V, C))), rng.integers(0, V, shape)
    y, names = launches(lambda: fused.embedding(BF16(on_device(table)), ids=on_device(ids)))
    assert to_numpy(y.data.bits).tobytes() == table[ids].tobytes()
    assert names == ["embedding_forward"]


def test_an_id_outside_the_table_gives_nan():
    y = fused.embedding(half(np.ones((5, 4))), ids=on_device(np.array([0, 5, -1])))
    assert np.isnan(y.numpy()).all(axis=1).tolist() == [False, True, True]


def targets_for(rng, shape, V):
    targets = rng.integers(0, V, shape)
    targets[rng.random(shape) < 0.3] = loss.IGNORE
    return targets


@few
@given(st.sampled_from([(1,), (3, 7), (40,)]), st.sampled_from([1, 2, 31, 64, 513, 3000]),
       st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 99))  # fmt: skip
def test_cross_entropy(shape, V, spread, seed):
    rng = RNG(seed)
    options = {"targets": targets_for(rng, shape, V)}
    arrays = [spread * rng.standard_normal((*shape, V))]
    value, _ = agrees(loss.cross_entropy, arrays, options, half=(0,), scale=1.0,
                      expect={"token_losses", "add_losses", "scaled"})  # fmt: skip
    with reference_rules():
        wanted = loss.cross_entropy(float32_of(bits_of(arrays[0])).astype(np.float64), **options)
    assert apart(value, wanted.data, 1.0) < 1e-5  # the loss itself is float32


@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.parametrize("frozen", [(), (0,)])
def test_head_cross_entropy(blas, chunk, frozen):
    """The head's weight is frozen; logits are rounded, so that losses are near and no nearer."""
    rng = RNG(0)
    arrays = rng.standard_normal((40, 16)), rng.standard_normal((66, 16))
    options = {"targets": targets_for(rng, (40,), 66), "chunk": chunk}
    agrees(loss.head_cross_entropy, arrays, options, half=(0, 1), frozen=(1, *frozen), scale=1.0,
           expect={"token_losses"}, tolerance=6e-3)  # fmt: skip
    _, names = launches(lambda: loss.head_cross_entropy(
        *map(half, arrays), **{k: on_device(v) for k, v in options.items()}))  # fmt: skip
    assert names == ["token_losses"] * -(-40 // chunk) + ["add_losses"]


# ----------------------------------------------------------------------------- attention

BACK = {"attention_delta_mma", "attention_backward_q_mma", "attention_backward_kv_mma"}


def drawn(N, T, H, K, D, S=None, seed=0):
    rng = RNG(seed)
    shapes = (N, T, H, D), (N, S or T, K, D), (N, S or T, K, D)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("T", [1, 5, 64, 65, 130])
@pytest.mark.parametrize("D", [7, 16, 64, 96, 128])
def test_attention(T, D):
    scale = 1e-2 if T == 1 else 0.0  # of a single key: dq and dk are 0
    agrees(attention.attention, drawn(1, T, 2, 1, D), half=(0, 1, 2), scale=scale,
           expect=BACK | {"attention_forward_mma"})  # fmt: skip


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_attention_over_few_keys_that_weigh_unequally(T, D):
    """Row sums of dO and the rounded O would miss dq by 1e-2 to 1."""
    q, k, v = drawn(2, T, 4, 2, D)
    for sharp in (1, 3, 6):
        agrees(attention.attention, [sharp * q, k, v], half=(0, 1, 2),
               scale=1e-2 if T == 1 else 0.0, expect=BACK)  # fmt: skip


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("T", [2, 3])  # of one key O is V, and exact
def test_the_rounded_output_is_felt_over_few_keys(T):
    edit = ("if (start > 0) {", "if (true) {")
    assert cuda_attention.tiled["bf16", 64].source().count(edit[0]) == 1
    with installed(fakeraw.planted(edit)), pytest.raises(AssertionError):
        test_attention_over_few_keys_that_weigh_unequally(T, 64)


@pytest.mark.parametrize("T", [65, 130])
def test_attention_over_many_keys_of_which_few_weigh(T):
    q, k, v = drawn(1, T, 2, 1, 64)
    agrees(attention.attention, [10 * q, k, v], half=(0, 1, 2), tolerance=7e-3, expect=BACK)


def test_attention_reads_packed_heads_where_they_lie():
    def layer(x):
        return attention.attention(*attention.split_heads(x, heads=(4, 2, 2), width=16))

    x = drawn(2, 70, 8, 1, 16)[0].reshape(2, 70, -1)
    agrees(layer, [x], half=(0,), expect=BACK | {"attention_forward_mma"})


@pytest.mark.usefixtures("on_the_cpu")
def test_an_older_card_is_given_float32(monkeypatch):
    cuda, device = sys.modules["cupy"].cuda, sys.modules["cupy"].cuda.Device()
    old = SimpleNamespace(**vars(device) | {"compute_capability": "75"})
    monkeypatch.setattr(cuda, "Device", lambda: old)
    agrees(attention.attention, drawn(1, 20, 2, 1, 16), half=(0, 1, 2),
           expect={"converted", "attention_forward", "attention_backward_q"})  # fmt: skip


@pytest.mark.parametrize("T, S", [(1, 300), (3, 140), (20, 90)])
def test_attention_over_a_cache(T, S):
    q, k, v = drawn(2, T, 4, 2, 24, S)
    at = np.sort(RNG(1).integers(0, S, (2, T)), axis=1)
    value, names = launches(lambda: attention.attention(
        half(q), half(k), half(v), positions=on_device(at)))  # fmt: skip
    assert value.dtype == BFLOAT16
    with reference_rules():
        wide = [float32_of(bits_of(a)).astype(np.float64) for a in (q, k, v)]
        wanted = attention.attention(*wide, positions=at).data
    assert apart(value.numpy(), wanted) < 4e-3
    assert names == (
        ["attention_cached_mma"] if T > 8 else ["attention_decode", "attention_combine"]
    )


# ------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("name", ["nf4", "dynamic"])
@pytest.mark.parametrize("n", [64, 130, 4097])
def test_codes_are_made_dense_straight_in_bfloat16(name, n):
    w = RNG(0).standard_normal(n).astype(np.float32)
    with reference_rules():
        packed, scales = quantize_blocks(w, code=code(name), block=64)
        exact = dequantize_blocks(packed, scales, code=code(name), block=64, out=w * 0)
    out = half(np.zeros(n))
    table = to_device(code(name), "cuda")
    found, names = launches(lambda: dequantize_blocks(
        on_device(packed), on_device(scales), code=table, block=64, out=out))  # fmt: skip
    assert found is out
    assert names == ["dequantize"]
    assert to_numpy(out.bits).tobytes() == bits_of(exact).tobytes()


# ----------------------------------------------------------------------- linear layers


def products(library):
    return None if library is None else library.asked.count("cublasGemmEx")


LAYERS = {"linear": (2, (0, 1, 2)), "frozen_linear": (2, (0,)), "lora_linear": (8, (0,))}


@pytest.mark.parametrize("name", LAYERS)
def test_linear_layers(blas, name):
    sample = next(s for s in SAMPLES if s.op.__name__ == name)
    arrays, options = sample.draw(RNG(0))
    count, kinds = LAYERS[name]
    if blas is not None:
        blas.asked.clear()
    frozen = (1, 2) if name == "linear" else ()
    found = agrees(sample.op, arrays, options, half=kinds, frozen=frozen, expect={"add_to_rows"})
    assert all(a.dtype == np.float32 for a in found)
    assert products(blas) in (None, 2 * count)


@pytest.mark.parametrize("codes", [False, True])
def test_with_B_at_zero_the_bits_are_those_of_the_base(blas, codes):
    base = layer(40, 64, codes)
    x, A, B = half(RNG(1).standard_normal((70, 64))), *adapter(40, 64, 0.0)
    y = fused.lora_linear(x, A, B, base=base, scale=2.0)
    assert to_numpy(y.data.bits).tobytes() == to_numpy(base(tensor.Tensor(x)).data.bits).tobytes()


def layer(d_out, d_in, codes=False):
    model = init_transformer(TransformerConfig(vocab=3, width=d_in, layers=1, heads=1, hidden=d_out,
                                               bias=True), RNG(0), 0.2)  # fmt: skip
    up = (quantize(model) if codes else adapt(model, rank=1, rng=RNG(0))).blocks[0].mlp.up
    up = up if codes else up.base
    up.bias.data[...] = RNG(2).standard_normal(d_out) * 3
    return to_device(to_bf16(up), "cuda")


def adapter(d_out, d_in, size):
    rng = RNG(3)
    A, B = rng.standard_normal((4, d_in)), size * rng.standard_normal((d_out, 4))
    return [on_device(a.astype(np.float32)) for a in (A, B)]


def test_an_update_below_the_rounding_of_the_weights_is_not_lost(blas):
    """Of a step that moves outputs by 1/50 of their spacing the mean over many comes through."""
    base, x = layer(40, 64), half(RNG(1).standard_normal((3000, 64)))
    A, B = adapter(40, 64, 2e-5)
    run = lambda B: fused.lora_linear(x, A, B, base=base, scale=1.0).numpy().astype(np.float64)
    moved = run(B) - run(B * 0)
    wanted = to_numpy(x).astype(np.float64) @ (to_numpy(B).astype(np.float64) @ to_numpy(A)).T
    assert 0 < np.abs(wanted).max() < 2.5e-3
    share = (moved * wanted).sum() / (wanted * wanted).sum()
    assert 0.8 < share < 1.2  # 0 where W0 + s B A is rounded, or a rounded x W0ᵀ added to
    W = base.dense().float32()
    merged = BF16(narrow(W + B @ A))
    lost = x.float32() @ (merged.float32() - W).T
    assert abs((to_numpy(lost) * wanted).sum() / (wanted * wanted).sum() - 1) > 0.2


# --------------------------------------------------------------------------- whole steps

SHAPE = {"vocab": 50, "width": 64, "layers": 1, "heads": 4, "context": 40}
MODELS = {
    "gpt2": TransformerConfig.gpt2(**SHAPE),
    "llama": TransformerConfig(**SHAPE, key_heads=2, hidden=96),
}
HOT = BACK | {"norm_forward", "norm_backward", "attention_forward_mma", "token_losses",
              "embedding_forward", "added"}  # fmt: skip


def steps(model, device, count=6):
    optimizer = AdamW(to_device(model, device), lr=1e-2)
    rng, losses = RNG(1), []
    ids = rng.integers(0, 50, (2, 33))
    ids = on_device(ids) if device == "cuda" else ids
    for step in range(count):

        def one():
            value = optimizer.model.loss(ids, ids)
            value.backward(into=optimizer.gradients)
            optimizer.step(divide_by=66.0, clip=1.0)
            return value

        if device == "cuda" and step and "standin" in sys.modules["cupy"].__version__:
            standin = sys.modules["standin"]
            with standin.no_sync():
                standin.reset()
                value, names = launches(one)
            assert (standin.stats.h2d, standin.stats.d2h) == (0, 0)
            assert set(names) >= HOT
        else:
            value = one()
        losses.append(float(value.data))
    return losses, to_numpy(optimizer.flat.data)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("style", MODELS)
def test_a_run_follows_that_in_float32_and_repeats(blas, style, kind):
    model = init_transformer(MODELS[style], RNG(3), 0.1)
    model = adapt(quantize(model) if kind == "qlora" else model, rank=4, alpha=8, rng=RNG(0))
    with reference_rules():
        wanted, _ = steps(model, "cpu")
    losses, weights = steps(to_bf16(model), "cuda")
    assert wanted[-1] < 0.8 * wanted[0]
    np.testing.assert_allclose(losses, wanted, rtol=1e-2)
    again = steps(to_bf16(model), "cuda")
    assert again[0] == losses
    assert again[1].tobytes() == weights.tobytes()


def test_generation(blas):
    model = adapt(init_transformer(MODELS["llama"], RNG(3), 0.1), rank=4, rng=RNG(0))
    model = to_device(to_bf16(model), "cuda")
    made, names = launches(lambda: generate(model, [[1, 2, 3], [4]], 4))
    assert [len(row) for row in made] == [4, 4]
    assert {"attention_decode", "norm_forward", "swiglu_forward"} <= set(names)


# ---------------------------------------------------------------------- planted mistakes

PLANTED = {
    "ties away from even": ("whole + 0x7FFF + (whole >> 16 & 1)", "whole + 0x8000"),
    "cut off instead of rounded": ("whole + 0x7FFF + (whole >> 16 & 1)", "whole"),
    "NaN becomes infinite": ("if ((whole & 0x7FFFFFFF) > 0x7F800000)", "if (false)"),
    "one half of a word twice": ("{{__uint_as_float(a.x << 16)", "{{__uint_as_float(a.y << 16)"),
    "written in the wrong order": ("narrow(a.v[2]).bits | narrow(a.v[3]).bits << 16",
                                   "narrow(a.v[3]).bits | narrow(a.v[2]).bits << 16"),
    "read as eight bytes where only six are left": ("on16(x) && on16(y),\n", "true,\n"),
}  # fmt: skip


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_caught(name):
    edit = PLANTED[name]
    with installed(fakeraw.planted(edit)):
        if "eight" in name:  # 16 bytes from the wrong place: the shim sees the bits, ASan the place
            run = sanitized(MISALIGNED.format(edit=edit))
            assert run.returncode != 0
            assert "misaligned address" in run.stderr
            return
        with pytest.raises(AssertionError):
            test_conversions_are_the_specification_to_the_bit()


MISALIGNED = """
import standin; standin.install()
import numpy as np
from cuda_cpu import fakeraw
from cuda_cpu.checks import installed, on_device
from minilora.engine.rules import widen
fakeraw.RawModule.flags = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
with installed(fakeraw.planted({edit!r})):
    widen(on_device(np.zeros(70, np.uint16))[1:])
"""
ATTENTION = {
    "delta from the wrong row": ("load(outputs + row *", "load(outputs + (row ^ 1) *"),
    "half a row of delta": ("sum += __shfl_xor_sync(ALL, sum, 1);\n        if", "if"),
    "delta read before it is there": (
        "T - start, D);\n        __syncthreads();\n        const", "T - start, D);\n        const"),
    "the first delta of half its keys": ("sum += __shfl_xor_sync(ALL, sum, 2);\n        if", "if"),
    "the mask off by one for delta": ("lane % 4 * 2 + e % 2 <= t;", "lane % 4 * 2 + e % 2 < t;"),
    "keys that are hidden in delta": ("lane % 4 * 2 + e % 2 <= t;", "lane % 4 * 2 >= 0;"),
    "the first delta read before it is there": (
        "    __syncthreads();\n    float s[8][4], dp", "    float s[8][4], dp"),
    "the left side's halves swapped": ("{pair(w[j][0], w[j][1]), pair(w[j][2], w[j][3]),",
                                       "{pair(w[j][2], w[j][3]), pair(w[j][0], w[j][1]),"),
    "the right side's registers swapped": ("multiply(s[j], left, right[0], right[1])",
                                           "multiply(s[j], left, right[1], right[0])"),
    "values not transposed": ("fetch<true>(right, b", "fetch<false>(right, b"),
    "rows 8 and on read for columns 8 and on": (
        "(threadIdx.x / LANES * 16 + low + 8 * odd) * ROW<WIDTH> + 8 * far",
        "(threadIdx.x / LANES * 16 + low + 8 * far) * ROW<WIDTH> + 8 * odd"),
    "the next eight keys are the same": ("multiply(s[j + 1], left, right[2], right[3])",
                                         "multiply(s[j + 1], left, right[0], right[1])"),
    "the mask off by one": ("e % 2 <= limit[i]", "e % 2 <= limit[i] + 1"),
    "the mask off by one for dq": ("ds[j][e] = key <= mine", "ds[j][e] = key < mine"),
    "the mask off by one for dk": ("(e / 2) <= start + column", "(e / 2) < start + column"),
    "old sums not scaled down": ("sum[c][2 * i] *= shrink;", ";"),
    "a lane left out of the sum": ("total[i] += __shfl_xor_sync(ALL, total[i], 2);", ""),
    "a lane left out of the maximum": ("fmaxf(high, __shfl_xor_sync(ALL, high, 1))", "high"),
    "lse without its maximum": ("= top[i] + log2f(total[i])", "= log2f(total[i])"),
    "heads grouped the wrong way": ("h < (key_head + 1) * group", "h < key_head * group + 1"),
    "no wait for the tiles before": ("__syncthreads();  // the tiles", "// the tiles"),
    "read before it is there": ("        __syncthreads();\n        float s[8][4];\n",
                                "        float s[8][4];\n"),
    "slopes read before they are there": ("            __syncthreads();\n            float p[8][4]",
                                          "            float p[8][4]"),
    "an odd width written in pairs": ("if (D % 2 == 0 && d < D)", "if (d < D)"),
}  # fmt: skip


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("edit", ATTENTION.values(), ids=ATTENTION)
def test_a_planted_mistake_in_attention_is_caught(edit):
    assert edit[0] in cuda_attention.tiled["bf16", 32].source()
    with installed(fakeraw.planted(edit)), pytest.raises((AssertionError, RuntimeError)):
        agrees(attention.attention, drawn(1, 130, 4, 2, 31), half=(0, 1, 2), scale=1.0)


FRAGMENTS = """
__global__ void product(float* d, const unsigned* a, const unsigned* b) {
    float sum[4] = {1, 1, 1, 1};
    unsigned left[4] = {a[4 * threadIdx.x], a[4 * threadIdx.x + 1], a[4 * threadIdx.x + 2],
                        a[4 * threadIdx.x + 3]};
    multiply(sum, left, b[2 * threadIdx.x], b[2 * threadIdx.x + 1]);
    for (int i = 0; i < 4; i++) d[4 * threadIdx.x + i] = sum[i];
}
"""


@pytest.mark.usefixtures("on_the_cpu")
def test_the_tensor_core_of_the_cpu_is_that_of_the_manual():
    """Fragments as the PTX manual draws them, for mma.m16n8k16 with .bf16, lane by lane."""
    rng = RNG(0)
    A, B = (bits_of(rng.standard_normal(s)) for s in ((16, 16), (16, 8)))
    a, b = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):  # ai: row groupID + 8 for 2, 3, 6, 7; column + 8 for i >= 4
            row = group + (0 if i < 2 or 4 <= i < 6 else 8)
            a[lane, i] = A[row, thread * 2 + (i & 1) + (0 if i < 4 else 8)]
        for i in range(4):
            b[lane, i] = B[thread * 2 + (i & 1) + (0 if i < 2 else 8), group]
    code = cuda_attention.tiled["bf16", 32].source() + FRAGMENTS
    module = fakeraw.RawModule(code=code, options=("-std=c++17",), name_expressions=("product",))
    d = sys.modules["cupy"].empty((32, 4), np.float32)
    words = [on_device(np.ascontiguousarray(m).view(np.uint32)) for m in (a, b)]
    module.get_function("product")((1,), (32,), (d, *words))
    wanted = 1 + float32_of(A).astype(np.float64) @ float32_of(B)
    d = to_numpy(d)
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)
            assert d[lane, i] == pytest.approx(wanted[row, column], rel=1e-5)


ADDRESSES = """
import standin; standin.install()
import numpy as np
from cuda_cpu import fakeraw
from cuda_cpu.checks import installed, on_device
from minilora.engine.attention import attention
from minilora.engine.bf16 import BF16, bits_of
from minilora.engine.tensor import Parameter
fakeraw.RawModule.flags = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
rng = np.random.default_rng(0)
draw = lambda *shape: BF16(on_device(bits_of(rng.standard_normal(shape))))
odd = draw(1, 65, 4, 17)[..., 1:]  # sixteen wide, but for its strides and its start
with installed(fakeraw.planted(*{edits!r})):
    attention(odd, odd, odd)
    for D in (16, 9):
        q, k, v = (Parameter(draw(1, 65, n, D)) for n in (2, 1, 1))
        attention(q, k, v).backward(draw(1, 65, 2, D))
    at = on_device(np.array([[3, 40]]))
    attention(q.data[:, :2], k.data, v.data, positions=at)
    print("launched", len(fakeraw.RawModule.launched))
"""


@pytest.mark.usefixtures("on_the_cpu")
def test_attention_reads_and_writes_where_it_may():
    run = sanitized(ADDRESSES.format(edits=[]))
    assert run.stdout == "launched 11\n", run.stderr
    run = sanitized(ADDRESSES.format(edits=[("on16(from) && stride % 8 == 0 &&", "")]))
    assert "misaligned address" in run.stderr
    run = sanitized(ADDRESSES.format(edits=[("row < count && d < D ?", "d < D ?")]))
    assert "buffer-overflow" in run.stderr


def test_what_a_step_gives_to_parameters_is_float32(blas):
    base, x = layer(40, 64), Parameter(half(RNG(1).standard_normal((8, 64))))
    A, B = map(Parameter, adapter(40, 64, 1.0))
    y = fused.lora_linear(x, A, B, base=base, scale=1.0)
    found = y.backward(on_device(np.ones((8, 40), np.float32)))
    assert [found[p].dtype for p in (x, A, B)] == [BFLOAT16, np.float32, np.float32]
