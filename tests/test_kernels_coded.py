"""A few rows against a weight in codes: the kernel, run on a CPU, against float64."""

import sys

import numpy as np
import pytest
from cuda_cpu import fakeblas, fakeraw
from cuda_cpu.checks import apart, installed, launches, on_device, on_the_cpu, sanitized  # noqa: F401
from cuda_cpu.checks import kernels as kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import TransformerConfig, adapt, generate, init_transformer, to_device
from minilora.engine.backend import to_numpy
from minilora.engine.check import gradients
from minilora.engine.fused import frozen_linear
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Tensor
from minilora.fast import cuda_coded
from minilora.model.module import to_device as tree_to_device
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


def products(node, x, expect=("coded_product",)):
    """(on the device, in float64): x Ŵᵀ + b; two seeds of the scheduler give the same bits."""
    wanted = x.astype(np.float64) @ node.dense().astype(np.float64).T
    wanted += 0 if node.bias is None else node.bias.data
    moved, given = tree_to_device(node, "cuda"), on_device(x)
    runs = []
    for seed in (1, 2):
        value, names = launches(lambda: frozen_linear(given, base=moved), seed)
        if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
            assert names == list(expect)
        runs.append(to_numpy(value.data))
    assert runs[0].tobytes() == runs[1].tobytes()
    assert runs[0].dtype == np.float32
    return runs[0], wanted


def drawn(n, d_in, seed=0):
    return RNG(seed).standard_normal((n, d_in)).astype(np.float32)


@settings(max_examples=25)
@given(
    st.integers(1, 8), st.sampled_from([1, 3, 16, 37]), st.sampled_from([32, 96, 1024, 1056, 2080]),
    st.sampled_from(FOUR), st.sampled_from(BLOCKS), st.booleans(), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_any_code_any_block(n, d_out, d_in, name, block, double, bias, seed):
    node = base(d_out, d_in, name, block, double, bias, seed)
    found, wanted = products(node, drawn(n, d_in, seed))
    assert apart(found, wanted) < 2e-6


def test_a_row_does_not_depend_on_those_beside_it():
    node, x = base(20, 1120), drawn(8, 1120)
    whole, _ = products(node, x)
    for n in range(1, 8):
        found, _ = products(node, x[:n])
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


def test_codes_and_rows_that_stand_on_no_sixteen_bytes():
    node, x = base(20, 1056, double=False), drawn(3, 1056)
    wanted, _ = products(node, x)
    moved = tree_to_device(node, "cuda")
    wide = on_device(np.concatenate([node.weight.packed[:1], node.weight.packed]))
    odd = on_device(np.concatenate([x.ravel()[:1], x.ravel()]))[1:].reshape(3, 1056)
    packed = wide[1:]
    array = type(node.weight)(packed, moved.weight.scales, moved.weight.code, (20, 1056), 64,
                              node.weight.dtype)  # fmt: skip
    node = QuantizedLinear(array, moved.bias)
    value, _ = launches(lambda: frozen_linear(odd, base=node))
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


def test_a_qlora_model_decodes_from_its_codes():
    config = TransformerConfig(vocab=13, width=32, layers=1, heads=4, key_heads=2, hidden=64,
                               context=40)  # fmt: skip
    model = adapt(quantize(init_transformer(config, RNG(0), 0.3)), rank=2, rng=RNG(1))
    model = to_device(model, "cuda")
    prompts = [[1, 2, 3], [5, 7] * 6]  # 24 tokens with the padding, then 2 at a time
    with reference_rules():
        wanted = generate(model, prompts, 4)
    found, names = launches(lambda: generate(model, prompts, 4))
    assert found == wanted
    if issubclass(sys.modules["cupy"].RawModule, fakeraw.RawModule):
        assert names.count("coded_product") == 3 * 7
        assert names.count("dequantize") == 2 * 7


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
    "the bias twice": ("(bias ? bias[first + o]", "(bias ? 2 * bias[first + o]"),
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
    assert not apart(found, wanted) < 2e-6


SCRIPT = """
import standin; standin.install()
import numpy as np
from cuda_cpu import fakeblas, fakeraw
from cuda_cpu.checks import installed
from test_kernels_coded import base, drawn, products, apart
fakeraw.RawModule.flags = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
fakeraw.MARGIN = 0
with installed(fakeraw.planted(*{edits!r})), fakeblas.installed():
    for n, d_out, d_in, double in ((1, 3, 32, True), (3, 37, 1056, False), (8, 5, 96, True)):
        found, wanted = products(base(d_out, d_in, double=double), drawn(n, d_in))
        assert apart(found, wanted) < 2e-6
"""


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("edits", [[], [("min(first + o, d_out - 1)", "first + o")]])
def test_under_address_sanitizer(edits):
    run = sanitized(SCRIPT.format(edits=edits))
    assert ("heap-buffer-overflow" in run.stderr) == bool(edits), run.stderr
    assert (run.returncode == 0) == (not edits)
