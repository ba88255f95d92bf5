"""The binding of cuBLAS and the linear layers over it: on the CPU at the level of addresses.

With `--device cuda` the same tests run cuBLAS itself.
"""

import sys
from ctypes import ArgumentError

import numpy as np
import pytest
import standin
from cuda_cpu import fakeblas
from cuda_cpu.checks import with_a_mistake
from hypothesis import given
from hypothesis import strategies as st

from minilora.engine.backend import to_device, to_numpy
from minilora.engine.bf16 import BF16, bits_of, float32_of
from minilora.engine.check import gradients
from minilora.engine.errors import MiniloraError
from minilora.engine.fused import frozen_linear, linear, lora_linear
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Parameter, Tensor
from minilora.fast import cublas, cuda_linear
from minilora.lora.variants import row_lengths
from minilora.model.layers import Linear
from minilora.model.module import to_device as tree_to_device
from minilora.quant.blockwise import quantize_array
from minilora.quant.double import double_quantize
from minilora.quant.linear import QuantizedLinear

RNG = np.random.default_rng


@pytest.fixture(scope="module", autouse=True)
def library(request):
    """The fake one; None on a card, which has its own."""
    if request.config.getoption("device") == "cuda":
        request.getfixturevalue("device")
        assert cublas.cublas(sys.modules["cupy"]) is not None
        yield None
        return
    with fakeblas.installed() as fake:
        yield fake


@pytest.fixture
def fake(library):
    if library is None:
        pytest.skip("for the fake")
    library.asked.clear()
    return library


def blas():
    return cublas.cublas(sys.modules["cupy"])


def dev(array):
    return to_device(np.asarray(array, np.float32), "cuda")


def inset(array, transposed=False):
    """The same matrix as a slice of a larger one full of NaN, stored by columns if asked."""
    a = np.asarray(array, np.float32)
    a = a.T if transposed else a
    wide = np.full((a.shape[0] + 3, a.shape[1] + 5), np.nan, np.float32)
    wide[1:-2, 2:-3] = a
    part = dev(wide)[1:-2, 2:-3]
    return part.T if transposed else part


def halved(array, transposed=False):
    """`inset` in bfloat16: rounded numbers between NaN."""
    a = np.asarray(array, np.float32)
    a = a.T if transposed else a
    wide = np.full((a.shape[0] + 3, a.shape[1] + 5), np.nan, np.float32)
    wide[1:-2, 2:-3] = a
    part = BF16(to_device(bits_of(wide), "cuda"))[1:-2, 2:-3]
    return part.T if transposed else part


def multiplied_in_bfloat16(binding, shape, ta, tb, beta, out_kind, alpha=0.75):
    """The gap to float64 of products of rounded numbers, into float32 or bfloat16."""
    M, K, N = shape
    rng = RNG(M * 100 + K * 10 + N)
    a, b, c = (float32_of(bits_of(rng.standard_normal(s))) for s in ((M, K), (K, N), (M, N)))
    made = halved if out_kind == "bfloat16" else inset
    out = made(c if beta else np.full((M, N), np.nan))
    assert binding.product(halved(a, ta), halved(b, tb), out, alpha=alpha, beta=beta) is out
    wanted = alpha * (a.astype(np.float64) @ b) + (beta * c if beta else 0)
    return np.linalg.norm(to_numpy(out) - wanted) / np.linalg.norm(wanted)


def multiplied(binding, shape, ta, tb, beta, alpha=0.75):
    """The gap to NumPy in float64, and whether anything around the output was touched."""
    M, K, N = shape
    rng = RNG(M * 100 + K * 10 + N)
    a, b, c = (rng.standard_normal(s) for s in ((M, K), (K, N), (M, N)))
    out = inset(c if beta else np.full((M, N), np.nan))
    before = to_numpy(out.base if out.base is not None else out).copy()
    given = inset(a, ta), inset(b, tb)
    kept = [to_numpy(g).copy() for g in given]
    found = binding.product(*given, out, alpha=alpha, beta=beta)
    assert found is out
    for g, k in zip(given, kept, strict=True):
        np.testing.assert_array_equal(to_numpy(g), k)
    after = to_numpy(out.base if out.base is not None else out)
    around = np.ones(before.shape, bool)
    around[1:-2, 2:-3] = False
    np.testing.assert_array_equal(after[around], before[around])
    wanted = alpha * (a @ b) + (beta * c if beta else 0)
    return np.linalg.norm(to_numpy(found) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("ta", [False, True])
def test_eight_cases_on_slices_of_larger_matrices(ta, tb, beta):
    assert multiplied(blas(), (5, 7, 4), ta, tb, beta) < 1e-6


@pytest.mark.parametrize("out", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("ta", [False, True])
def test_bfloat16_in_and_either_out(ta, tb, beta, out):
    gap = multiplied_in_bfloat16(blas(), (5, 7, 4), ta, tb, beta, out)
    assert gap < (1e-6 if out == "float32" else 4e-3)


def test_kinds_that_do_not_go_together_are_refused():
    a, b = dev(np.ones((2, 3))), dev(np.ones((3, 4)))
    ha, hb = (BF16(to_device(bits_of(to_numpy(m)), "cuda")) for m in (a, b))
    for arguments in ((ha, b), (a, hb), (a, b, halved(np.ones((2, 4))))):
        with pytest.raises(MiniloraError, match="product: expected float32 or bfloat16"):
            blas().product(*arguments)
    assert blas().product(ha, hb).dtype == "bfloat16"


sizes = st.integers(1, 6)


@given(shape=st.tuples(sizes, sizes, sizes), ta=st.booleans(), tb=st.booleans(),
       beta=st.sampled_from([0.0, 1.0, -0.5]))  # fmt: skip
def test_any_shape(shape, ta, tb, beta):
    assert multiplied(blas(), shape, ta, tb, beta) < 1e-5


def test_what_no_leading_dimension_describes_is_copied():
    rng = RNG(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((4, 6), (6, 8)))
    xp = sys.modules["cupy"]
    odd = {
        "every other column": (dev(np.repeat(a, 2, 1))[:, ::2], dev(b)),
        "backwards": (dev(a[:, ::-1].copy())[:, ::-1], dev(b)),
        "one row repeated": (xp.broadcast_to(dev(a[:1]), (4, 6)), dev(b)),
        "one column repeated": (xp.broadcast_to(dev(a[:, :1]), (4, 6)), dev(b)),
    }
    for left, right in odd.values():
        found = to_numpy(blas().product(left, right))
        np.testing.assert_allclose(found, to_numpy(left) @ to_numpy(right), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    a, b = dev(np.ones((2, 3))), dev(np.ones((3, 4)))
    product = blas().product
    for arguments in (
        (a, b[:2]), (a, b, dev(np.ones((2, 5)))), (a, b, dev(np.ones((4, 2))).T), (a[:0], b),
        (a, b.astype(np.float64)), (a, b, dev(np.ones((2, 8)))[:, ::2]),
    ):  # fmt: skip
        with pytest.raises(MiniloraError, match="product"):
            product(*arguments)


PLANTED = {
    "transposes": ("tb, ta, N, M, K", "ta, tb, N, M, K"),
    "sizes": ("tb, ta, N, M, K", "tb, ta, M, N, K"),
    "leading dimensions": ("at_b, kind, ldb", "at_b, kind, lda"),
    "beta": ("byref(c_float(beta))", "byref(c_float(0))"),
    "alpha": ("byref(c_float(alpha))", "byref(c_float(1))"),
    "swap": ("at_b, kind, ldb, at_a, kind, lda", "at_a, kind, lda, at_b, kind, ldb"),
    "workspace": ('self.ask("cublasSetWorkspace_v2", self.handle, self.workspace.data.ptr, '
                  "WORKSPACE)", "pass"),
    "an integer too few": ("c_void_p, c_int, c_int, c_int, c_int, c_int, POINTER",
                           "c_void_p, c_int, c_int, c_int, c_int, POINTER"),
}  # fmt: skip


PLANTED_IN_BFLOAT16 = {
    "the result's type": ("at_out, made", "at_out, kind"),
    "the type's number": ("BFLOAT16: 14", "BFLOAT16: 2"),
    "bytes of an entry": ("size = matrix.itemsize", "size = 4"),
    "rounded parts of sums": ("WHOLE_SUMS = 16", "WHOLE_SUMS = 0"),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", PLANTED_IN_BFLOAT16)
def test_planted_mistakes_in_bfloat16_are_caught(name):
    wrong, caught = with_a_mistake(cublas, *PLANTED_IN_BFLOAT16[name]), 0
    for ta, tb in np.ndindex(2, 2):
        try:
            binding = wrong.Cublas(sys.modules["cupy"], fakeblas.Library())
            gap = multiplied_in_bfloat16(binding, (5, 7, 4), bool(ta), bool(tb), 1.0, "float32")
            caught += not gap <= 1e-3  # or NaN
        except (MiniloraError, AssertionError, ArgumentError, TypeError):
            caught += 1
    assert caught


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_caught(name):
    wrong = with_a_mistake(cublas, *PLANTED[name])
    cupy = sys.modules["cupy"]
    caught = 0
    for ta, tb, beta in np.ndindex(2, 2, 2):
        try:
            binding = wrong.Cublas(cupy, fakeblas.Library())
            gap = multiplied(binding, (5, 7, 4), bool(ta), bool(tb), float(beta))
            caught += not gap <= 1e-3  # or NaN
        except (MiniloraError, AssertionError, ArgumentError):
            caught += 1
    assert caught


def test_the_workspace_is_given_once_a_stream(fake):
    binding = cublas.Cublas(sys.modules["cupy"], library := fakeblas.Library())
    a = dev(np.ones((2, 2)))
    with standin.no_sync():
        standin.reset()
        binding.product(a, a)
        binding.product(a, a)
        assert (standin.stats.h2d, standin.stats.d2h, standin.stats.launches) == (0, 0, 2)
    assert library.asked == ["cublasCreate_v2", "cublasSetMathMode", "cublasSetStream_v2",
                             "cublasSetWorkspace_v2", "cublasGemmEx", "cublasGemmEx"]  # fmt: skip


def test_a_status_raises(fake):
    library = fakeblas.Library()
    binding = cublas.Cublas(sys.modules["cupy"], library)
    binding.handle.value = 1
    with pytest.raises(MiniloraError, match="cublasSetStream_v2 returned status 7"):
        binding.product(dev(np.ones((2, 2))), dev(np.ones((2, 2))))


def test_without_cublas_there_is_none(fake, monkeypatch):
    cupy = sys.modules["cupy"]
    monkeypatch.delitem(cublas.opened, (cupy, 0))
    assert cublas.cublas(cupy) is None
    x, W = dev(np.ones((70, 3))), dev(np.ones((2, 3)))
    assert to_numpy(linear(x, W).data).tolist() == [[3, 3]] * 70
    assert fake.asked == []
    monkeypatch.delitem(cublas.opened, (cupy, 0))


# ------------------------------------------------------------------------- the layers


def base(d_out=10, d_in=12, bias=True, codes=False, seed=3):
    rng = RNG(seed)
    weight = Tensor(rng.standard_normal((d_out, d_in)).astype(np.float32))
    b = Tensor(rng.standard_normal(d_out).astype(np.float32)) if bias else None
    if codes:
        return QuantizedLinear(double_quantize(quantize_array(weight.data)), b)
    return Linear(weight, b)


def held(op, arrays, options, products):
    """Value and gradients within 1e-5 of float64, with so many products, the same bits twice."""
    fixed = {k: tree_to_device(v, "cuda") if hasattr(v, "dense") else v for k, v in options.items()}
    w = RNG(9).standard_normal((*arrays[0].shape[:-1], 10)).astype(np.float32)
    with reference_rules():
        wide = {k: widened(v) for k, v in options.items()}
        double = [a.astype(np.float64) for a in arrays]
        wanted, value = gradients(lambda *a: op(*a, **wide), double, w.astype(np.float64))
    runs = []
    for _ in range(2):
        fake = fakeblas_library()
        if fake is not None:
            fake.asked.clear()
        found, fast = gradients(lambda *a: op(*a, **fixed), [dev(a) for a in arrays], dev(w))
        assert fake is None or fake.asked.count("cublasGemmEx") == products
        runs.append([to_numpy(a) for a in (fast.data, *found)])
    for a, b, c in zip(*runs, (value.data, *wanted), strict=True):
        assert a.tobytes() == b.tobytes()
        assert a.shape == c.shape
        assert np.linalg.norm(a - c) <= 1e-5 * np.linalg.norm(c)


def fakeblas_library():
    library = blas().library
    return library if isinstance(library, fakeblas.Library) else None


class widened:
    """A base in float64."""

    def __new__(cls, value):
        if not hasattr(value, "dense"):
            return value
        return super().__new__(cls)

    def __init__(self, node):
        self.node = node
        self.shape = node.shape
        self.bias = None if node.bias is None else Tensor(node.bias.data.astype(np.float64))

    def dense(self, out=None):
        return self.node.dense().astype(np.float64)


def drawn(*shapes, seed=1):
    rng = RNG(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(1,), (3, 5), (2, 40), ()])
def test_linear(tokens, bias):
    shapes = [(*tokens, 12), (10, 12), (10,)]
    held(linear, drawn(*shapes[: 2 + bias]), {}, 3)


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linear(bias, codes):
    held(frozen_linear, drawn((3, 5, 12)), {"base": base(bias=bias, codes=codes)}, 2)


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear(bias, codes):
    arrays = drawn((2, 40, 12), (3, 12), (10, 3))
    options = {"base": base(bias=bias, codes=codes), "scale": 0.7}
    held(lora_linear, arrays, options, 8)  # out: W, y, u; back: W, dx, gB, dA, dB


@pytest.mark.parametrize("codes", [True, False])
def test_row_lengths(fake, codes):
    A, B = drawn((3, 12), (10, 3))
    node = base(codes=codes)
    W = node.dense().astype(np.float64) + 0.7 * B.astype(np.float64) @ A
    n = row_lengths(dev(A), dev(B), base=tree_to_device(node, "cuda"), scale=0.7)
    assert fake.asked.count("cublasGemmEx") == 1
    assert np.abs(to_numpy(n) / np.linalg.norm(W, axis=1) - 1).max() <= 1e-6


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_few_tokens_take_the_detour(bias, codes):
    arrays = drawn((3, 21, 12), (3, 12), (10, 3))
    options = {"base": base(bias=bias, codes=codes), "scale": 2.0}
    held(lora_linear, arrays, options, 8)  # out: base, u, + B; back: gB, dx, + A, dA, dB
    assert cuda_linear.FEW == 64


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("codes", [True, False])
def test_with_B_at_zero_the_bits_are_those_of_the_base(codes, rows):
    node = tree_to_device(base(codes=codes), "cuda")
    x, A = (dev(a) for a in drawn((rows, 12), (3, 12)))
    B = dev(np.zeros((10, 3)))
    y = lora_linear(Tensor(x), Parameter(A), Parameter(B), base=node, scale=2.0)
    assert to_numpy(y.data).tobytes() == to_numpy(node(Tensor(x)).data).tobytes()


def test_what_is_frozen_asks_for_no_product(fake):
    node = tree_to_device(base(), "cuda")
    x, A, B = (dev(a) for a in drawn((70, 12), (3, 12), (10, 3)))
    with standin.no_sync():
        standin.reset()
        y = lora_linear(Tensor(x), Tensor(A), Parameter(B), base=node, scale=2.0)
        y.backward(dev(np.ones((70, 10))))
        assert (standin.stats.h2d, standin.stats.d2h) == (1, 0)  # the ones
    assert fake.asked.count("cublasGemmEx") == 4  # W, y, u and dB


def test_what_does_not_fit_is_named_by_the_specification():
    node = tree_to_device(base(), "cuda")
    x, A, B = (dev(a) for a in drawn((70, 12), (3, 12), (10, 3)))
    with pytest.raises(MiniloraError, match="lora_linear: expected"):
        lora_linear(x, A, B[:9], base=node, scale=1.0)
    with pytest.raises(MiniloraError, match=r"linear: expected x \(\.\.\., 12\)"):
        linear(x[:, :11], A)
    with pytest.raises(MiniloraError, match="frozen_linear: expected"):
        frozen_linear(x[:, :11], base=node)


def test_other_dtypes_stay_with_the_specification(fake):
    x, W = (to_device(a.astype(np.float64), "cuda") for a in drawn((70, 12), (10, 12)))
    linear(x, W)
    assert fake.asked == []
