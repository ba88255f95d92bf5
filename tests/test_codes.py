"""Every level of every code: against its derivation, against bitsandbytes, against a change."""

from contextlib import nullcontext
from dataclasses import FrozenInstanceError
from statistics import NormalDist, StatisticsError

import golden_quant as golden
import numpy as np
import pytest

from minilora.engine.errors import QuantError
from minilora.engine.rules import reference_rules
from minilora.model.module import to_device
from minilora.quant.blockwise import dequantize_blocks, quantize_blocks, unpack
from minilora.quant.codes import CODES, NF4, code, dynamic_levels, make, normal_levels

ANSWERS = golden.read()
FOUR_BIT = [name for name in CODES if code(name).bits == 4]


def bits(array):
    return np.asarray(array, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", CODES)
def test_a_code_is_consistent(name):
    c = code(name)
    assert code(name) is c
    assert (np.diff(c.levels) >= 0).all()
    assert np.abs(c.levels).max() == 1
    assert (c.levels[:-1] <= c.thresholds).all()
    assert (c.thresholds <= c.levels[1:]).all()
    assert len(c.levels) == len(c.order) == len(set(c.order.tolist())) <= 2**c.bits
    assert len(c.table) == 2**c.bits
    assert (c.table[c.order] == c.levels).all()
    assert np.isnan(np.delete(c.table, c.order)).all()  # what no level stores means nothing
    assert 0 in c.levels
    assert {a.dtype.name for a in (c.levels, c.thresholds, c.table)} == {"float32"}
    assert c.order.dtype == np.uint8


def test_how_many_levels():
    assert {name: len(np.unique(code(name).levels)) for name in CODES} == {
        "nf4": 16, "fp4": 15, "e2m1": 15, "int4": 15, "int4_max": 16, "int8": 255,
        "dynamic": 256, "dynamic_unsigned": 256,
    }  # fmt: skip


def test_unknown_code():
    with pytest.raises(QuantError, match=r"expected one of nf4, fp4, .*, found 'nf5'"):
        code("nf5")


def test_codes_are_frozen_and_move_with_their_tree(device, xp):
    with pytest.raises(FrozenInstanceError):
        code("nf4").name = "other"
    moved = to_device(code("nf4"), device)
    tables = (moved.levels, moved.thresholds, moved.order, moved.table)
    assert all(isinstance(table, xp.ndarray) for table in tables)


# ------------------------------------------------------------------ derivations


def test_nf4_is_the_normal_quantiles_and_what_bitsandbytes_has():
    derived = normal_levels()
    assert (bits(derived) == bits(NF4)).all()
    assert (bits(code("nf4").levels) == bits(ANSWERS["tables"]["nf4"])).all()
    assert ((derived < 0).sum(), (derived == 0).sum(), (derived > 0).sum()) == (7, 1, 8)


def test_nf4_offset_is_halfway_between_two_slices():
    assert abs(0.9677083 - (1 - (1 / 32 + 1 / 30) / 2)) < 5e-8


def test_equation_4_of_the_paper_gives_no_table():
    with pytest.raises(StatisticsError):
        NormalDist().inv_cdf(0)  # its first quantile: -infinity


def test_the_widest_gap_of_nf4():
    """Half of it bounds the error of an entry, as a part of its scale."""
    assert np.diff(np.float64(NF4)).max() / 2 == pytest.approx(0.1519037, abs=1.1e-7)


def test_fp4_in_the_order_of_its_bits():
    c = code("fp4")
    assert (bits(c.table) == bits(ANSWERS["tables"]["fp4"])).all()
    assert c.order.tolist() == [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]


def test_e2m1_from_its_bits():
    """Sign, two bits of exponent with bias 1, one of mantissa (OCP MX 1.0, section 5.3.3)."""

    def value(pattern):
        sign, exponent, mantissa = -1 if pattern & 8 else 1, pattern >> 1 & 3, pattern & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        return sign * size / 6

    expected = np.float32([value(pattern) for pattern in range(16)])
    assert (code("e2m1").table == expected).all()


def test_dynamic_maps():
    signed, unsigned = code("dynamic").levels, code("dynamic_unsigned").levels
    assert golden.digest(signed) == ANSWERS["tables"]["dynamic"]
    assert golden.digest(unsigned) == ANSWERS["tables"]["dynamic_unsigned"]
    assert len(signed) == len(unsigned) == 256
    assert (signed[127], signed.max(), unsigned[0], unsigned.max()) == (0, 1, 0, 1)
    assert signed.min() == np.float32(-0.99296874)
    assert np.abs(signed[signed != 0]).min() == pytest.approx(5.5e-7)
    assert unsigned[1] == pytest.approx(3.25e-7)
    assert (-signed[:127] == signed[128:255][::-1]).all()
    assert (dynamic_levels(True) == signed).all()


# ---------------------------------------------------------------------- choices


def stored_for(c, v):
    """What is stored for each v in [-1, 1], by way of blocks whose scale is 1."""
    anchor = -1 if c.scaled_by == "extreme" else 1  # the extreme -1 makes the scale +1
    blocks = np.full((-(-len(v) // 31), 32), anchor, np.float32)
    for row, part in zip(blocks, np.split(v, range(31, len(v), 31)), strict=True):
        row[1 : 1 + len(part)] = part
    packed, scales = quantize_blocks(blocks, code=c, block=32)
    assert (scales == 1).all()
    stored = unpack(np, packed) if c.bits == 4 else packed
    return stored.reshape(-1, 32)[:, 1:].reshape(-1)[: len(v)]


def chosen(c, v):
    return c.table[stored_for(c, v)]


def away_from_ties(levels, count=4000):
    """Numbers on [-1, 1], among them both sides of every midpoint."""
    middle = (np.float64(levels[1:]) + np.float64(levels[:-1])) / 2
    v = np.concatenate([np.linspace(-0.999, 0.999, count), middle - 1e-5, middle + 1e-5])
    v = v[np.abs(v[:, None] - middle).min(axis=1) > 5e-6]
    return v[np.abs(v) < 1].astype(np.float32)


def integers(low, high, unit):
    return lambda v: np.clip(np.rint(np.float64(v) * unit), low, high) / unit


def nearest_of(levels):
    levels = np.array(levels)
    return lambda v: levels[np.abs(np.float64(v)[:, None] - levels).argmin(axis=1)]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
ORACLES = {
    "nf4": nearest_of(ANSWERS["tables"]["nf4"]),
    "fp4": nearest_of(ANSWERS["tables"]["fp4"]),
    "e2m1": nearest_of([*-E2M1, *E2M1]),
    "int4": integers(-7, 7, 7),
    "int4_max": integers(-8, 7, 8),
    "int8": integers(-127, 127, 127),
}


def agrees(c):
    """Is this, level by level, the code of that name?"""
    v = away_from_ties(code(c.name).levels)
    return np.allclose(chosen(c, v), ORACLES[c.name](v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_the_nearest_level_is_chosen(name):
    assert agrees(code(name))
    with reference_rules():
        assert agrees(code(name))


@pytest.mark.parametrize("change", [-1e-3, 1e-3])
@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.parametrize("k", range(16))
def test_a_changed_level_is_noticed(name, k, change):
    """The checks above are sharp: one literal, changed by 1e-3, and they fail."""
    c = code(name)
    if k == len(c.levels):
        return  # int4 has fifteen
    table = c.table[: len(c.levels)].copy()
    table[k] += change
    changed = make(name, 4, table, c.scaled_by)
    assert not agrees(changed)
    if name in ANSWERS:
        assert golden_disagreements(changed)


def test_a_changed_level_of_eight_bits_is_noticed():
    c = code("int8")
    for k in range(255):
        table = c.table[:255].copy()
        table[k] += 1e-3
        assert not agrees(make("int8", 8, table))


def golden_disagreements(c):
    """In what the code departs from what bitsandbytes answered."""
    answers = ANSWERS[c.name]
    block = golden.near_midpoints(np.sort(np.float32(ANSWERS["tables"][c.name])))
    packed, _ = quantize_blocks(block, code=c, block=64)
    found = [] if packed.tobytes().hex() == answers["midpoints"] else ["midpoints"]
    for kind in golden.KINDS:
        w = golden.weights(64 * 64, kind)
        packed, scales = quantize_blocks(w, code=c, block=64)
        dense = dequantize_blocks(packed, scales, code=c, block=64, out=np.empty_like(w))
        digests = {"packed": packed, "scales": scales, "dense": dense}
        expected = answers[kind]["64"]
        found += [f"{kind} {k}" for k, a in digests.items() if golden.digest(a) != expected[k]]
    return found


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_would_answer_the_same(name):
    assert golden_disagreements(code(name)) == []


@pytest.mark.parametrize("name", CODES)
def test_ties_and_the_next_numbers(name):
    """At a threshold the lower level, one ulp above it the upper: all of them."""
    c = code(name)
    t = np.unique(c.thresholds)
    up = np.nextafter(t, np.float32(2))
    for rules in (nullcontext, reference_rules):
        with rules():
            assert (stored_for(c, t) == c.order[np.searchsorted(c.thresholds, t)]).all()
            assert (stored_for(c, up) == c.order[np.searchsorted(c.thresholds, up)]).all()
            assert (chosen(c, up) >= chosen(c, t)).all()


def test_thresholds_round_the_midpoints():
    """Not every midpoint of NF4 is a float32; ours are the nearest ones, as bitsandbytes'."""
    c = code("nf4")
    exact = (np.float64(c.levels[1:]) + np.float64(c.levels[:-1])) / 2
    assert (np.float32(exact) == c.thresholds).all()
    assert (exact != c.thresholds).sum() == 9
