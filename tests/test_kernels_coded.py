"""A few rows against a weight in codes: the kernel, run on a CPU, against float64."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from cuda_cpu import fakeblas, fakeraw
from cuda_cpu.checks import apart, installed, launches, on_device, on_the_cpu, sanitized  # noqa: F401
from cuda_cpu.checks import kernels as kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import TransformerConfig, adapt, generate, init_transformer, to_device
from minilora.engine.backend import to_numpy
from minilora.engine.bf16 import BF16, BFLOAT16, bits_of, float32_of
from minilora.engine.check import gradients
from minilora.engine.fused import frozen_linear, lora_linear
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Tensor
from minilora.fast import cuda_coded
from minilora.model.module import to_device as tree_to_device
from minilora.quant.bf16 import to_bf16
from minilora.quant.blockwise import BLOCKS, quantize_array
from minilora.quant.codes import CODES, code
from minilora.quant.double import double_quantize
from minilora.quant.linear import QuantizedLinear, quantize

RNG = np.random.default_rng
FOUR = sorted(n for n in CODES if code(n).bits == 4 and code(n).scaled_by != "maximum")


@pytest.fixture(scope="module", autouse=True)
def blas(kernels, request):
    """Products go through cuBLAS: its fake on the stand-in, the card's own on a card."""
    if request.config.getoption("device") == "cuda":
        yield
        return
    raw = sys.modules["cupy"].RawModule
    with fakeblas.installed():
        assert sys.modules["cupy"].RawModule is raw
        yield


def base(d_out, d_in, name="nf4", block=64, double=True, bias=True, seed=3):
    rng = RNG(seed)
    rows = 10.0 ** rng.uniform(-1, 1, (d_out, 1))  # so that a scale of another block is seen
    weight = (rng.standard_normal((d_out, d_in)) * rows).astype(np.float32)
    array = quantize_array(weight, name, block)
    b = Tensor(rng.standard_normal(d_out).astype(np.float32)) if bias else None
    return QuantizedLinear(double_quantize(array) if double else array, b)


def rounded(array):
    return BF16(bits_of(np.asarray(array, np.float32)))


def in_bf16(node):
    """The base as `to_bf16` leaves it: made dense in bfloat16, with such a bias."""
    bias = None if node.bias is None else Tensor(rounded(node.bias.data))
    return QuantizedLinear(replace(node.weight, dtype=BFLOAT16), bias)


def products(node, x, expect=("coded_product",), half=False):
    """(on the device, in float64): x Ŵᵀ + b; two seeds of the scheduler give the same bits.

    With `half` x and b are rounded to bfloat16 beforehand, and Ŵ is not.
    """
    exact = lambda a: (float32_of(bits_of(a)) if half else a).astype(np.float64)
    wanted = exact(x) @ node.dense().astype(np.float64).T
    wanted += 0 if node.bias is None else exact(node.bias.data)
    moved = tree_to_device(in_bf16(node) if half else node, "cuda")
    given = BF16(on_device(bits_of(x))) if half else on_device(x)
    runs = []
    for seed in (1, 2):
        value, names = launches(lambda: frozen_linear(given, base=moved), seed)
        if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
            assert names == list(expect)
        assert value.dtype == (BFLOAT16 if half else np.float32)
        runs.append(to_numpy(value.data))
    assert runs[0].tobytes() == runs[1].tobytes()
    return runs[0], wanted


def near(found, wanted, half=False):
    """Within 2e-6 in norm; in bfloat16 each entry within one rounding, and not two."""
    if not half:
        return apart(found, wanted) < 2e-6
    rounding = 2.0**-8 * np.abs(wanted)
    return bool((np.abs(found - wanted) <= rounding + 2e-6 * np.abs(wanted).max()).all())


def drawn(n, d_in, seed=0):
    return RNG(seed).standard_normal((n, d_in)).astype(np.float32)


@settings(max_examples=25)
@given(
    st.integers(1, 8), st.sampled_from([1, 3, 16, 37]), st.sampled_from([32, 96, 1024, 1056, 2080]),
    st.sampled_from(FOUR), st.sampled_from(BLOCKS), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 9),
)  # fmt: skip
def test_any_code_any_block(n, d_out, d_in, name, block, double, bias, half, seed):
    node = base(d_out, d_in, name, block, double, bias, seed)
    found, wanted = products(node, drawn(n, d_in, seed), half=half)
    assert near(found, wanted, half)


@pytest.mark.parametrize("n", range(1, 9))
def test_in_bfloat16_it_is_rounded_once(n):
    found, wanted = products(base(37, 2112), drawn(n, 2112), half=True)
    assert near(found, wanted, half=True)
    assert apart(found, wanted) > 2e-4  # it is bfloat16 at all


def test_in_bfloat16_it_is_nearer_than_the_specification():
    """Which rounds Ŵ as well; both are within what is asked of bfloat16."""
    node, x = base(60, 2048), drawn(4, 2048)
    found, wanted = products(node, x, half=True)
    with reference_rules():
        specified = frozen_linear(rounded(x), base=in_bf16(node)).numpy()
    assert apart(found, wanted) < apart(specified, wanted) < 4e-3
    assert apart(found, specified) < 4e-3


@pytest.mark.parametrize("half", [False, True])
def test_a_row_does_not_depend_on_those_beside_it(half):
    node, x = base(20, 1120), drawn(8, 1120)
    whole, _ = products(node, x, half=half)
    for n in range(1, 8):
        found, _ = products(node, x[:n], half=half)
        assert found.tobytes() == whole[:n].tobytes()


def test_an_input_of_more_axes_and_its_gradient():
    node, x, w = base(20, 64), drawn(6, 64).reshape(2, 3, 64), drawn(6, 20).reshape(2, 3, 20)
    moved = tree_to_device(node, "cuda")
    op = lambda x: frozen_linear(x, base=moved)
    (found,), value = gradients(op, [on_device(x)], on_device(w))
    dense = node.dense().astype(np.float64)
    assert apart(to_numpy(value.data), x @ dense.T + node.bias.data) < 2e-6
    assert apart(to_numpy(found), w @ dense) < 2e-6


@pytest.mark.parametrize(
    "n, d_in, name, expect",
    [(9, 64, "nf4", ["dequantize"] * 2), (2, 48, "nf4", ["dequantize"] * 2),
     (2, 64, "dynamic", ["dequantize"] * 2)],
)  # fmt: skip
def test_what_it_does_not_take_is_made_dense(n, d_in, name, expect):
    found, wanted = products(base(10, d_in, name), drawn(n, d_in), expect)
    assert apart(found, wanted) < 2e-6


@pytest.mark.parametrize("half", [False, True])
def test_codes_and_rows_that_stand_on_no_sixteen_bytes(half):
    node, x = base(20, 1056, double=False), drawn(3, 1056)
    wanted, _ = products(node, x, half=half)
    moved = tree_to_device(in_bf16(node) if half else node, "cuda")
    packed = on_device(np.concatenate([node.weight.packed[:1], node.weight.packed]))[1:]
    entries = bits_of(x) if half else x
    odd = on_device(np.concatenate([entries.ravel()[:1], entries.ravel()]))[1:].reshape(3, 1056)
    node = QuantizedLinear(replace(moved.weight, packed=packed), moved.bias)
    value, _ = launches(lambda: frozen_linear(BF16(odd) if half else odd, base=node))
    assert to_numpy(value.data).tobytes() == wanted.tobytes()


@pytest.mark.usefixtures("on_the_cpu")
def test_it_neither_waits_nor_copies_and_takes_memory_for_the_result_alone():
    standin = sys.modules["standin"]
    moved, x = tree_to_device(base(20, 64), "cuda"), on_device(drawn(3, 64))
    with standin.no_sync():
        standin.reset()
        cuda_coded.coded_product(sys.modules["cupy"], x, moved)
        stats = standin.stats
        assert (stats.h2d, stats.d2h, stats.launches, stats.allocations) == (0, 0, 1, 1)


def adapted(node, B, r=4):
    """A and B (d_out, r) on the device, and a function from x to y under the adapter."""
    A = on_device(RNG(5).standard_normal((r, node.shape[1])).astype(np.float32))
    moved, B = tree_to_device(node, "cuda"), on_device(B.astype(np.float32))
    return A, B, lambda x: lora_linear(x, A, B, base=moved, scale=2.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_an_adapter_whose_B_is_zero_leaves_the_bits_of_the_base(half, bias):
    node, x = base(37, 96, bias=bias), drawn(3, 96)
    wanted, _ = products(node, x, half=half)
    _, _, forward = adapted(in_bf16(node) if half else node, np.zeros((37, 4)))
    value, names = launches(lambda: forward(BF16(on_device(bits_of(x))) if half else on_device(x)))
    assert to_numpy(value.data).tobytes() == wanted.tobytes()
    if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
        assert "coded_product" in names
        assert "dequantize" not in names


def under_an_adapter(n=3, size=0.5):
    """(on the device, in float64): x Ŵᵀ + 2 x Aᵀ Bᵀ + b in bfloat16 throughout."""
    node, x, B = base(37, 1056), drawn(n, 1056), size * RNG(6).standard_normal((37, 4))
    A, B, forward = adapted(in_bf16(node), B)
    runs = []
    for seed in (1, 2):
        value, names = launches(lambda: forward(BF16(on_device(bits_of(x)))), seed)
        runs.append(to_numpy(value.data))
        if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
            assert names == ["converted", "converted", "coded_product"]
    assert runs[0].tobytes() == runs[1].tobytes()
    exact = lambda a: float32_of(bits_of(to_numpy(a))).astype(np.float64)
    wanted = exact(x) @ node.dense().astype(np.float64).T + exact(node.bias.data)
    return runs[0], wanted + 2 * exact(x) @ exact(A).T @ exact(B).T


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_an_adapter_in_bfloat16_over_codes(n):
    found, wanted = under_an_adapter(n)
    assert apart(found, wanted) < 4e-3


@pytest.mark.parametrize("half", [False, True])
def test_a_qlora_model_decodes_from_its_codes(half):
    config = TransformerConfig(vocab=13, width=32, layers=1, heads=4, key_heads=2, hidden=64,
                               context=40)  # fmt: skip
    model = adapt(quantize(init_transformer(config, RNG(0), 0.3)), rank=2, rng=RNG(1))
    model = to_device(to_bf16(model) if half else model, "cuda")
    prompts = [[1, 2, 3], [5, 7] * 6]  # 24 tokens with the padding, then 2 at a time
    with reference_rules():
        wanted = generate(model, prompts, 4)
    found, names = launches(lambda: generate(model, prompts, 4))
    assert found == wanted or half  # of two tokens that are as likely rounding may take either
    if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
        # seven a token, and the four after the prompt's attention, for its newest tokens alone
        assert names.count("coded_product") == 3 * 7 + 4
        assert names.count("dequantize") == 2 * 3


PLANTED = {
    "swapped halves": ("mine[(pairs >> 4 & 15) * LANES]", "mine[(pairs >> 8 & 15) * LANES]"),
    "no barrier before the tile": ("__syncthreads();  // those who read the last tile", "//"),
    "no barrier behind the tile": ("__syncthreads();\n        if (after", "if (after"),
    "the scale of the next block": ("b = entry >> shift", "b = (entry + PIECE) >> shift"),
    "the offset left out": ("* meanings[codes[b]] + offset", "* meanings[codes[b]]"),
    "the next piece left out": ("now[o] = next[o]", "now[o].scale = next[o].scale"),
    "x of another lane": ("tile[r][f][lane], Width", "tile[r][f][lane ^ 1], Width"),
    "the scale beside the sum": ("+= now[o].scale * part", "+= part"),
    "a row of the weight too many": ("&& first + o < d_out", "&& first + o <= d_out"),
    "a row of x too many": ("lane == 0 && r < rows &&", "lane == 0 &&"),
    "the bias twice": ("sum += bias ? load(", "sum += bias ? 2 * load("),
}  # fmt: skip


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("old, new", PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_caught(old, new):
    assert cuda_coded.kernels.source().count(old) == 1
    node, x = base(37, 2112), drawn(3, 2112)
    try:
        with installed(fakeraw.planted((old, new))):
            found, wanted = products(node, x)
    except (AssertionError, RuntimeError):
        return  # the seeds differ, or a write beyond the array
    assert not near(found, wanted)


IN_BF16 = {  # and the test that sees it
    "what is added left out": (
        "sum += more ?", "sum += false ?", lambda: test_an_adapter_in_bfloat16_over_codes(3)),
    "what is added to another row": (
        "load(more + at,", "load(more + first + o,",
        lambda: test_an_adapter_in_bfloat16_over_codes(3)),
    "rounded before the bias": (
        "sum += bias ?", "sum = widen(narrow(sum)), sum += bias ?",
        lambda: test_in_bfloat16_it_is_rounded_once(3)),
    "the bias of another output": (
        "load(bias + first + o,", "load(bias + first,",
        lambda: test_in_bfloat16_it_is_rounded_once(3)),
    "one entry for four": (
        "load(from + j,", "load(from,",
        lambda: test_codes_and_rows_that_stand_on_no_sixteen_bytes(True)),
}  # fmt: skip


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("old, new, test", IN_BF16.values(), ids=IN_BF16)
def test_a_planted_mistake_in_bfloat16_is_caught(old, new, test):
    assert cuda_coded.kernels.source().count(old) == 1
    with installed(fakeraw.planted((old, new))), pytest.raises(AssertionError):
        test()


SCRIPT = """
import standin; standin.install()
import numpy as np
from cuda_cpu import fakeblas, fakeraw
from cuda_cpu.checks import installed
from test_kernels_coded import base, drawn, near, products, under_an_adapter
fakeraw.RawModule.flags = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
fakeraw.MARGIN = 0
with installed(fakeraw.planted(*{edits!r})), fakeblas.installed():
    for n, d_out, d_in, half in ((1, 3, 32, True), (3, 37, 1056, False), (8, 5, 96, True)):
        found, wanted = products(base(d_out, d_in, double=half), drawn(n, d_in), half=half)
        assert near(found, wanted, half)
    under_an_adapter()
"""


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("edits", [[], [("min(first + o, d_out - 1)", "first + o")]])
def test_under_address_sanitizer(edits):
    run = sanitized(SCRIPT.format(edits=edits))
    assert ("heap-buffer-overflow" in run.stderr) == bool(edits), run.stderr
    assert (run.returncode == 0) == (not edits)
