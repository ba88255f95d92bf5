"""The kernels together: every sample of an op they serve, training steps, and what is refused."""

import re
import sys

import numpy as np
import pytest
from cuda_cpu import fakeraw
from cuda_cpu.checks import (  # noqa: F401
    agrees,
    apart,
    installed,
    kernels,
    launches,
    on_device,
    on_the_cpu,
    sanitized,
)

from minilora import AdamW, TransformerConfig, adapt, init_transformer, to_device
from minilora.engine.backend import to_numpy
from minilora.engine.rules import reference_rules
from minilora.fast.cuda import SCALARS, argument_kinds
from minilora.fast.cuda_norms import kernels as norms
from minilora.lab.op_samples import SAMPLES
from minilora.quant.linear import quantize

pytestmark = pytest.mark.usefixtures("kernels")
SERVED = [sample for sample in SAMPLES if "cupy" in sample.op.fast]


@pytest.mark.parametrize("sample", SERVED, ids=lambda s: s.op.__name__)
def test_every_sample_of_the_lab(sample):
    arrays, options = sample.draw(np.random.default_rng(0))
    agrees(sample.op, arrays, options)


# ------------------------------------------------------------------------ whole steps

SHAPE = {"vocab": 50, "width": 64, "layers": 1, "heads": 4, "context": 40}
MODELS = {
    "gpt2": TransformerConfig.gpt2(**SHAPE),
    "llama": TransformerConfig(**SHAPE, key_heads=2, hidden=96),
}
ALWAYS = {"embedding_forward", "norm_forward", "norm_backward", "attention_forward",
          "attention_delta", "attention_backward_q", "attention_backward_kv", "token_losses",
          "add_losses", "square_sums", "measure", "adamw"}  # fmt: skip
OF_ONE = {
    "gpt2": {"gelu_forward", "gelu_backward"},
    "llama": {"swiglu_forward", "swiglu_backward", "rope"},
}


def trained(style, kind, device, steps=3):
    """Losses, first gradient, last parameters; on a device the last step may not wait."""
    model = init_transformer(MODELS[style], np.random.default_rng(3), 0.1)
    if kind == "qlora":
        model = adapt(quantize(model), "all-linear", rank=4, alpha=8, rng=np.random.default_rng(0))
    optimizer = AdamW(to_device(model, device), lr=1e-3)
    rng = np.random.default_rng(1)
    losses, first = [], []
    for step in range(steps):
        ids, targets = (to_device_array(rng.integers(0, 50, (2, 33)), device) for _ in range(2))

        def one(ids=ids, targets=targets):
            value = optimizer.model.loss(ids, targets)
            value.backward(into=optimizer.gradients)
            if not losses:
                first.append(to_numpy(optimizer.flat.grad).copy())
            optimizer.step(divide_by=66.0, clip=1.0)
            return value

        if device == "cuda" and step == steps - 1 and "standin" in sys.modules["cupy"].__version__:
            standin = sys.modules["standin"]
            with standin.no_sync():
                standin.reset()
                value, names = launches(one)
            assert (standin.stats.h2d, standin.stats.d2h) == (0, 0)
            assert ALWAYS | OF_ONE[style] <= set(names)
            assert ("dequantize" in names) == (kind == "qlora")
            assert ("embedding_backward" in names) == (kind == "full")
        else:
            value = one()
        losses.append(float(value.data))
    return losses, first[0], to_numpy(optimizer.flat.data)


def to_device_array(array, device):
    return on_device(array) if device == "cuda" else array


@pytest.mark.parametrize("kind", ["full", "qlora"])
@pytest.mark.parametrize("style", MODELS)
def test_training_goes_the_way_of_the_specification(style, kind):
    with reference_rules():
        wanted_losses, wanted, _ = trained(style, kind, "cpu")
    losses, first, parameters = trained(style, kind, "cuda")
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert apart(first, wanted) <= 1e-5
    again = trained(style, kind, "cuda")
    assert again[0] == losses
    assert again[2].tobytes() == parameters.tobytes()


# --------------------------------------------------------------- what launching refuses


def a_kernel():
    """A kernel and arguments that it takes."""
    cupy = sys.modules["cupy"]
    module = fakeraw.RawModule(
        code=TINY, options=("-std=c++17",), name_expressions=("scaled<float>",)
    )
    function = module.get_function("scaled<float>")
    x = on_device(np.arange(8, dtype=np.float32))
    return function, [cupy.empty(8, np.float32), x, np.int64(8), np.float32(2)]


TINY = """
template <typename S> __global__ void scaled(S* y, const S* x, long long n, float by) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] * by;
}
"""


@pytest.mark.usefixtures("on_the_cpu")
def test_launching_refuses_what_would_go_wrong():
    function, good = a_kernel()
    function((2,), (4,), tuple(good))
    assert to_numpy(good[0]).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    y, x, n, by = good
    wrong = {
        "argument 3: expected f4, found np.float64": [y, x, n, 2.0],  # as CuPy passes a float
        "expected i8, found np.int32": [y, x, np.int32(8), by],
        "4 parameters, 3 given": [y, x, n],
        "argument 1: expected a device array": [y, np.zeros(8, np.float32), n, by],
        "argument 2: expected i8": [y, x, by, n],
        "argument 1: expected an array of f4": [y, on_device(np.zeros(8)), n, by],
        "not C-contiguous": [y, on_device(np.zeros(16, np.float32))[::2], n, by],
        "overlaps": [on_device(np.zeros(9, np.float32))[1:], None, n, by],
    }
    wrong["overlaps"][1] = wrong["overlaps"][0].base[:8]
    for message, arguments in wrong.items():
        with pytest.raises(TypeError, match=re.escape(message)):
            function((2,), (4,), tuple(arguments))
    for grid, block in (((0,), (4,)), ((1,), (2048,)), ((1, 70000), (4,))):
        with pytest.raises(ValueError, match=r"too large|grid"):
            function(grid, block, tuple(good))
    with pytest.raises(ValueError, match="shared memory"):
        function((2,), (4,), tuple(good), shared_mem=1 << 20)
    assert fakeraw.compiler
    with pytest.raises(SyntaxError, match="bye"):
        fakeraw.RawModule(code=TINY.replace("* by;", "* bye;"), options=("-std=c++17",),
                          name_expressions=("scaled<float>",))  # fmt: skip


def test_scalars_get_the_type_that_the_kernel_says():
    kinds = argument_kinds(norms.source(), "norm_forward<float, true>")
    assert [kind is SCALARS["int"] for kind in kinds] == [False] * 6 + [True, False]
    assert kinds[-1] is np.float64
    assert kinds[0](None) == np.uint64(0)
    with pytest.raises(KeyError):
        argument_kinds("__global__ void f(size_t n)", "f")
    with pytest.raises(OverflowError):
        SCALARS["int"](1 << 31)


@pytest.mark.usefixtures("on_the_cpu")
def test_without_a_compiler_the_specification_answers():
    library = vars(sys.modules["cupy"])
    kept = library.pop("RawModule")
    try:
        assert norms.on(sys.modules["cupy"]) is None
        arrays = [on_device(np.ones((2, 4), np.float32)), on_device(np.ones(4, np.float32))]
        from minilora.engine.fused import rms_norm

        _, names = launches(lambda: rms_norm(*arrays, eps=1e-5))
        assert names == []
    finally:
        library["RawModule"] = kept


# -------------------------------------------------------------------- AddressSanitizer

SCRIPT = """
import standin; standin.install()
import numpy as np
from cuda_cpu import fakeraw
from cuda_cpu.checks import agrees, installed
from minilora.engine.fused import layer_norm
from minilora.lab.op_samples import SAMPLES
fakeraw.RawModule.flags = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
fakeraw.MARGIN = 0
edits = {edits!r}
with installed(fakeraw.planted(*edits)):
    if edits:
        agrees(layer_norm, [np.ones((99, 47)), np.ones(47), np.ones(47)], {{"eps": 1e-5}})
    for sample in SAMPLES:
        if sample.op.__name__ in {ours!r} and not edits:
            agrees(sample.op, *sample.draw(np.random.default_rng(0)))
            print(sample.op.__name__)
"""
OURS = sorted({s.op.__name__ for s in SERVED} - {"attention"})
WILD = {
    "heap-buffer-overflow": ("if (column >= C) return;", "if (column >= C + 9) return;"),
    "global-buffer-overflow": ("parts[1][warp][lane] = plain", "parts[1][warp][lane + 8] = plain"),
    "misaligned address": ("return ((unsigned long long)p & 15) == 0", "return true || p"),
}


@pytest.mark.usefixtures("on_the_cpu")
def test_every_kernel_of_ours_under_address_sanitizer():
    run = sanitized(SCRIPT.format(edits=[], ours=OURS))
    assert run.returncode == 0, run.stderr
    assert sorted(set(run.stdout.split())) == sorted(OURS)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("found", WILD)
def test_address_sanitizer_sees_a_planted_mistake(found):
    edits = [WILD[found]]
    if found == "misaligned address":
        edits.append(("C % 4 == 0 && on16(x)", "C > 4 && on16(x)"))
    run = sanitized(SCRIPT.format(edits=edits, ours=OURS))
    assert run.returncode != 0
    assert found in run.stderr
