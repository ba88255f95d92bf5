"""The kernels of codes and scales against the specification, bit by bit."""

import numpy as np
import pytest
from cuda_cpu import fakeraw
from cuda_cpu.checks import installed, kernels, launches, on_device  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import MiniloraError
from minilora.engine.backend import to_numpy
from minilora.engine.rules import reference_rules
from minilora.model.module import to_device as tree_to_device
from minilora.quant.blockwise import BLOCKS, dequantize_blocks, quantize_array, quantize_blocks
from minilora.quant.codes import CODES, code
from minilora.quant.double import double_quantize

pytestmark = pytest.mark.usefixtures("kernels")
some = settings(max_examples=15)
FOUR = sorted(name for name in CODES if code(name).bits == 4)
SIZES = st.sampled_from([1, 2, 31, 64, 65, 130, 1000, 4097])


def on_card(name):
    return tree_to_device(code(name), "cuda")


def numbers(rng, n, block):
    """Blocks of all magnitudes of which 1/s and x/s are normal; among them zeros, ties, and the
    largest twice."""
    w = rng.standard_normal(n).astype(np.float32)
    for start in range(0, n, block):
        part = w[start : start + block]
        part *= np.float32(10.0 ** rng.integers(-30, 38))
        kind = rng.integers(5)
        if kind == 0:
            part[...] = 0
        elif kind == 1:
            part[...] = rng.choice(np.concatenate([NF4_EDGES, -NF4_EDGES]), part.size)
        elif kind == 2 and part.size > 3:
            part[[1, 3]] = -abs(part).max(), abs(part).max()
    return w


NF4_EDGES = np.concatenate([code("nf4").thresholds, [1, 0]]).astype(np.float32)


@some
@given(st.sampled_from(FOUR), SIZES, st.sampled_from(BLOCKS), st.integers(0, 99))
def test_there_and_back(name, n, block, seed):
    w = numbers(np.random.default_rng(seed), n, block)
    with reference_rules():
        packed, scales = quantize_blocks(w, code=code(name), block=block)
        wanted = dequantize_blocks(packed, scales, code=code(name), block=block, out=w * 0)
    table, moved = on_card(name), on_device(w)
    for run in (1, 2):
        (p, s), names = launches(lambda: quantize_blocks(moved, code=table, block=block), run)
        assert names == ["quantize4"]
        assert to_numpy(p).tobytes() == packed.tobytes()
        assert to_numpy(s).tobytes() == scales.tobytes()
        out = moved * np.float32(np.nan)
        back = lambda p=p, s=s, o=out: dequantize_blocks(p, s, code=table, block=block, out=o)
        _, names = launches(back, run)
        assert names == ["dequantize"]
        assert to_numpy(out).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", FOUR)
def test_tiny_blocks_are_zeros_and_so_is_what_is_no_normal_number(name):
    """CuPy compiles with -ftz=true, which the host does not do."""
    w = np.random.default_rng(0).standard_normal(6 * 64).astype(np.float32).reshape(6, 64)
    w *= np.float32([[1e-45], [1e-41], [1e-39], [1e-38], [1e-37], [1e-30]])
    found = quantize_array(on_device(w.reshape(-1)), on_card(name))
    dense = to_numpy(found.dense()).reshape(w.shape)
    assert (to_numpy(found.scales)[:3] == 0).all()
    assert (dense[:3] == 0).all()
    least = np.float32(2.0**-126)
    assert ((dense == 0) | (abs(dense) >= least)).all()
    with reference_rules():
        host = quantize_array(w.reshape(-1), name).dense().reshape(w.shape)
    assert ((abs(host) > 0) & (abs(host) < least)).any()
    normal = abs(host) >= least
    np.testing.assert_allclose(dense[5], host[5], rtol=1e-6)
    assert np.isclose(dense[normal], host[normal], rtol=1e-6).mean() > 0.99


@pytest.mark.parametrize("name", FOUR)
def test_blocks_whose_scale_has_no_normal_inverse(name):
    w = np.random.default_rng(0).uniform(-3.4e38, 3.4e38, 1000)
    found = quantize_array(on_device(w.astype(np.float32)), on_card(name))
    gap = np.abs(to_numpy(found.dense()).astype(np.float64) - w).max() / 3.4e38
    assert gap < 1.01 * np.diff(code(name).levels).max()  # and not 1: all of them zeros


@some
@given(SIZES, st.sampled_from(BLOCKS), st.integers(0, 99))
def test_eight_bits_back(n, block, seed):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, n, np.uint8)
    scales = rng.random(-(-n // block), np.float32)
    table = on_card("dynamic")
    with reference_rules():
        out = np.empty(n, np.float32)
        wanted = dequantize_blocks(packed, scales, code=code("dynamic"), block=block, out=out)
    out = on_device(wanted * np.float32(np.nan))
    _, names = launches(
        lambda: dequantize_blocks(
            on_device(packed), on_device(scales), code=table, block=block, out=out
        )
    )
    assert names == ["dequantize"]
    assert to_numpy(out).tobytes() == wanted.tobytes()


def test_double_quantized_weights_are_those_of_the_host():
    w = np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32)
    with reference_rules():
        wanted = double_quantize(quantize_array(w))
    found = double_quantize(quantize_array(on_device(w)))
    assert to_numpy(found.packed).tobytes() == wanted.packed.tobytes()
    value, names = launches(found.dense)
    assert names == ["dequantize", "dequantize"]
    assert to_numpy(value).tobytes() == wanted.dense().tobytes()


def test_codes_that_stand_on_no_sixteen_bytes():
    w = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    packed, scales = quantize_blocks(w, code=code("nf4"))
    wanted = dequantize_blocks(packed, scales, code=code("nf4"), out=w * 0)
    wide = on_device(np.concatenate([packed[:1], packed]))
    out = dequantize_blocks(wide[1:], on_device(scales), code=on_card("nf4"), out=on_device(w))
    assert to_numpy(out).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    w = np.ones(1000, np.float32)
    w[[700, 900]] = bad
    with pytest.raises(MiniloraError, match="at flat 700"):
        quantize_blocks(on_device(w), code=on_card("nf4"))


def test_swapped_halves_of_a_byte_are_caught():
    edit = ("code[0] = pair >> 4 & 15, code[1] = pair & 15",
            "code[1] = pair >> 4 & 15, code[0] = pair & 15")  # fmt: skip
    w = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    packed, scales = quantize_blocks(w, code=code("nf4"))
    wanted = dequantize_blocks(packed, scales, code=code("nf4"), out=w * 0)
    found = lambda: to_numpy(
        dequantize_blocks(on_device(packed), on_device(scales), code=on_card("nf4"),
                          out=on_device(w))
    )  # fmt: skip
    assert found().tobytes() == wanted.tobytes()
    with installed(fakeraw.planted(edit)):
        assert found().tobytes() != wanted.tobytes()
