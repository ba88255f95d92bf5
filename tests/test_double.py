"""Scales of scales: what they cost, what they lose, and that nothing but the scales changes it."""

import math

import golden_quant as golden
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.engine.errors import QuantError
from minilora.fast import cpu_quant  # noqa: F401  (registers the fast rules)
from minilora.model.module import to_device, walk
from minilora.quant.blockwise import BLOCKS, quantize_array
from minilora.quant.codes import code
from minilora.quant.double import DoubleScales, double_quantize, mean_scale

ANSWERS = golden.read()["double"]


def normal(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def doubled(w, name="nf4", block=64):
    return double_quantize(quantize_array(w, name, block))


@pytest.mark.parametrize("block", BLOCKS)
def test_bits_per_weight(block, dev):
    """4 + 8/B + 32/(256 B), to the bit, where blocks are whole."""
    n = 256 * block
    single = quantize_array(dev(normal(n)), "nf4", block)
    double = double_quantize(single)
    assert single.nbytes * 8 / n == 4 + 32 / block
    assert double.nbytes * 8 / n == 4 + 8 / block + 32 / (256 * block)


def test_the_published_bits():
    bits = {block: 4 + 8 / block + 32 / (256 * block) for block in (32, 64, 128)}
    assert bits == {32: 4.25390625, 64: 4.126953125, 128: 4.0634765625}
    assert doubled(normal(1 << 16)).nbytes * 8 / (1 << 16) == bits[64]


@pytest.mark.parametrize("n", [0, 1, 63, 65, 441, 64 * 257])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4_max", "int8"])
def test_codes_stay(n, name, dev, host):
    single = quantize_array(dev(normal(n)), name)
    double = double_quantize(single)
    assert double.packed is single.packed
    assert isinstance(double.scales, DoubleScales)
    assert (double.shape, double.dtype, double.block) == (single.shape, single.dtype, 64)
    assert host(double.dense()).shape == (n,)


@given(
    seed=st.integers(0, 99), n=st.integers(1, 3000), power=st.sampled_from([1, 3, 5]),
    name=st.sampled_from(["nf4", "int4_max"]),
)  # fmt: skip
def test_scales_are_off_by_half_a_step(seed, n, power, name, dev, host):
    single = quantize_array(dev(normal(n, seed) ** power), name, 32)
    double = double_quantize(single)
    s, again = host(single.scales), host(double.scales.dense())
    around = np.float64(s) - double.scales.offset
    nested = np.repeat(host(double.scales.residual.scales), 256)[: len(s)]
    levels = np.float64(code("dynamic").levels)
    v = np.divide(around, nested, out=np.zeros(len(s)), where=nested > 0)
    above = np.clip(np.searchsorted(levels, v), 1, 255)
    half_step = np.maximum(levels[above] - levels[above - 1], 2 * (1 + levels[0])) / 2
    half_step = np.where(v < levels[0], levels[0] - v, half_step)  # -1 is no level
    rounding = 4 * 2.0**-24 * (np.abs(s) + abs(double.scales.offset) + nested)
    assert (np.abs(np.float64(s) - again) <= half_step * nested + rounding).all()


def test_the_most_negative_residual_is_clipped(dev, host):
    w = np.ones((256, 64), np.float32)
    w[0] = 0.5
    double = doubled(dev(w))
    lowest, nested = host(double.scales.dense())[0], host(double.scales.residual.scales)[0]
    assert lowest - 0.5 == pytest.approx((1 - 0.99296874) * nested, rel=1e-5)


def test_a_small_scale_may_come_back_negative(dev, host):
    """Then its block changes sign: as in bitsandbytes, and smaller than half a step."""
    w = np.ones((256, 64), np.float32)
    w[0], w[1] = 1e-6, np.float32(2.475)
    double = doubled(dev(w))
    s, nested = host(double.scales.dense())[0], host(double.scales.residual.scales)[0]
    assert -0.9 / 64 / 2 * nested <= s < 0
    assert (host(double.dense())[0] < 0).all()


def test_what_it_costs_in_error(dev, host):
    """0.16% in the mean of a scale, 0.1% more error, on N(0,1) at block 64."""
    w = normal(1 << 20)
    single = quantize_array(dev(w))
    double = double_quantize(single)
    s = host(single.scales)
    relative = np.abs(host(double.scales.dense()) - s) / s
    assert relative.mean() == pytest.approx(0.0016, rel=0.05)
    assert relative.max() < 0.0173
    before, after = (np.abs(host(q.dense()) - w).mean(dtype=float) for q in (single, double))
    assert before == pytest.approx(0.072809, rel=0.01)
    assert after == pytest.approx(0.072879, rel=0.01)
    assert after / before - 1 == pytest.approx(0.001, abs=0.0004)


# ------------------------------------------------------------------- the offset


@given(order=st.randoms(use_true_random=False), power=st.sampled_from([1, 5]))
def test_the_offset_does_not_depend_on_the_order(order, power):
    scales = np.abs(normal(1000)) ** power
    shuffled = scales.copy()
    order.shuffle(shuffled)
    assert mean_scale(scales) == mean_scale(shuffled)


def test_the_offset_is_correctly_rounded(dev):
    scales = np.float32([1e8] + [1] * 4095)
    assert mean_scale(dev(scales)) == float(np.float32((10**8 + 4095) / 4096))
    assert mean_scale(scales) == mean_scale(np.concatenate([scales[1:], scales[:1]]))
    assert mean_scale(dev(np.zeros(0, np.float32))) == 0
    assert mean_scale(dev(np.float32([3]))) == 3


def test_the_offset_is_a_float32(dev):
    offset = doubled(dev(normal(10_000))).scales.offset
    assert isinstance(offset, float)
    assert offset == np.float32(offset)


def test_blocks_of_zeros(dev, host):
    double = doubled(dev(np.zeros(1000, np.float32)))
    assert (host(double.dense()) == 0).all()
    w = normal(64 * 300)
    w[64:128] = 0
    x = host(doubled(dev(w)).dense())
    assert (x[64:128] == 0).all()  # whatever became of its scale
    assert math.isfinite(x.sum())


def test_it_is_a_tree_and_shares_its_tables(device, xp, host):
    q = doubled(normal(64 * 700))
    moved = to_device(q, device)
    arrays = {path for path, node in walk(moved) if isinstance(node, xp.ndarray)}
    assert {"packed", "scales.residual.packed", "scales.residual.scales"} < arrays
    assert host(moved.dense()).tobytes() == q.dense().tobytes()
    assert moved.scales.offset == q.scales.offset
    assert q.scales.residual.code is code("dynamic")


def test_twice_is_refused(dev):
    with pytest.raises(QuantError, match="quantized already"):
        double_quantize(doubled(dev(normal(100))))


# ----------------------------------------------------------------- bitsandbytes


def agree(double, offset, stored, scales, host):
    """Offset to 1e-6, scales of scales to 1e-5; codes to one step, or 2^-15 near zero.

    (The offset of bitsandbytes depends on its threads, and its lookup of an eight-bit code
    on a CPU is right to 2^-15 of the scale: near zero that is more than one step.)
    """
    residual = double.scales.residual
    assert double.scales.offset == pytest.approx(offset, rel=1e-6)
    assert np.abs(host(residual.scales) / scales - 1).max() <= 1e-5
    steps = np.abs(host(residual.packed).astype(int) - stored)
    levels = code("dynamic").levels.astype(float)
    gap = np.abs(levels[host(residual.packed)] - levels[stored])
    assert ((steps <= 1) | (gap <= 2.0**-15)).all()
    assert (steps == 0).mean() > 0.99


def test_golden(dev, host):
    double = doubled(dev(golden.weights(golden.DOUBLE)))
    stored = np.frombuffer(bytes.fromhex(ANSWERS["stored"]), np.uint8)
    agree(double, ANSWERS["offset"], stored, np.float32(ANSWERS["scales"]), host)


@pytest.mark.peers
def test_bitsandbytes(host):
    torch = pytest.importorskip("torch")
    F = pytest.importorskip("bitsandbytes").functional
    for w in (normal(1 << 20), normal(1 << 20) ** 3, normal(64 * 5000 + 17) * np.float32(0.02)):
        packed, state = F.quantize_4bit(
            torch.from_numpy(w), quant_type="nf4", compress_statistics=True
        )
        double = doubled(w)
        assert (double.packed == packed.numpy().ravel()).all()
        agree(double, state.offset.item(), state.absmax.numpy(), state.state2.absmax.numpy(), host)
