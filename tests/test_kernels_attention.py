"""The attention kernels, run on a CPU, against the float64 specification."""

import sys

import numpy as np
import pytest
import standin
from cuda_cpu import fakeraw
from cuda_cpu.checks import agrees, apart, installed, launches, on_device, sanitized
from cuda_cpu.checks import kernels as kernels

from minilora.engine.attention import attention, split_heads
from minilora.engine.backend import to_numpy
from minilora.engine.check import retained
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Parameter
from minilora.fast import cuda_attention

pytestmark = pytest.mark.usefixtures("kernels")
BACK = {"attention_delta", "attention_backward_q", "attention_backward_kv"}
FLASH = BACK | {"attention_forward"}


def on_a_card() -> bool:
    """There, no one notes which kernels run, and nothing is counted."""
    return not sys.modules["cupy"].__version__.endswith("standin")


def ran(names, *expected):
    assert on_a_card() or names == list(expected)


@pytest.fixture
def on_the_cpu():
    if on_a_card():
        pytest.skip("for the stand-in")


def drawn(N, T, H, K, D, S=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (N, T, H, D), (N, S or T, K, D), (N, S or T, K, D)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


# ---------------------------------------------------------------------- a whole sequence


@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("D", [8, 16, 64, 96, 128])
def test_every_length_and_width(T, D):
    scale = 10.0 if T == 1 else 0.0  # of a single key: dq and dk are 0
    agrees(attention, drawn(1, T, 2, 1, D), expect=FLASH, tolerance=2e-6, scale=scale)


@pytest.mark.parametrize(
    "H, K", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (6, 3), (6, 6)]
)
def test_every_grouping_of_heads(H, K):
    agrees(attention, drawn(2, 20, H, K, 4), expect=FLASH, tolerance=2e-6)


@pytest.mark.parametrize("D", [1, 2, 3, 7, 31, 33, 65, 67, 127])
def test_widths_that_no_vector_divides(D):
    agrees(attention, drawn(2, 6, 2, 2, D), expect=FLASH, tolerance=2e-6, scale=1.0)


def test_large_scores_do_not_overflow():
    q, k, v = drawn(1, 70, 2, 1, 16)  # times 900, some are 3000: float32 knows them to 2e-4
    agrees(attention, [30 * q, 30 * k, v], expect=FLASH, tolerance=1e-3, scale=1.0)


@pytest.mark.parametrize("width", [16, 5])
def test_packed_heads_are_read_where_they_lie(width):
    """On the way out two arrays are taken, the output and lse: nothing is copied."""
    heads = (4, 2, 2)
    x = drawn(2, 70, 8, 1, width)[0].reshape(2, 70, -1)

    def layer(x):
        return attention(*split_heads(x, heads=heads, width=width))

    agrees(layer, [x], expect=FLASH, tolerance=2e-6)
    parts = split_heads(on_device(x), heads=heads, width=width)
    standin.reset()
    launches(lambda: attention(*parts))
    assert on_a_card() or standin.stats.allocations == 2


def test_axes_in_another_order_are_copied():
    q, k, v = drawn(2, 9, 4, 2, 8)
    turned = lambda q, k, v: attention(*(a.transpose(0, 3, 1, 2) for a in (q, k, v)))
    arrays = [a.transpose(0, 2, 3, 1) for a in (q, k, v)]
    agrees(turned, arrays, expect=FLASH, tolerance=2e-6)


def test_a_cotangent_of_one_number_repeated():
    """The sum's cotangent is a view of one number, its strides all zero."""
    q, k, v = (Parameter(on_device(a)) for a in drawn(1, 66, 2, 1, 8))
    found, names = launches(lambda: attention(q, k, v).sum().backward())
    with reference_rules():
        wanted = attention(q, k, v).sum().backward()
    ran(sorted(names), *sorted(FLASH))
    for p in (q, k, v):
        assert apart(to_numpy(found[p]), to_numpy(wanted[p]), scale=1.0) < 1e-5


def test_only_what_is_wanted_is_computed_and_the_same():
    arrays = drawn(1, 70, 4, 2, 8)
    w = on_device(drawn(1, 70, 4, 2, 8, seed=1)[0])
    everything = [Parameter(on_device(a)) for a in arrays]
    whole, _ = launches(lambda: attention(*everything).backward(w))
    for i, kernel in enumerate(("q", "kv", "kv")):
        given = [on_device(a) for a in arrays]
        given[i] = Parameter(given[i])
        found, names = launches(lambda given=given: attention(*given).backward(w))
        ran(names, "attention_forward", "attention_delta", f"attention_backward_{kernel}")
        assert to_numpy(found[given[i]]).tobytes() == to_numpy(whole[everything[i]]).tobytes()


def test_what_is_kept_is_what_the_specification_keeps():
    q, k, v = (Parameter(on_device(a)) for a in drawn(1, 70, 4, 2, 8))
    kept = lambda: retained(attention(q, k, v), besides=[q.data, k.data, v.data])["attention"]
    fast = kept()
    with reference_rules():
        assert fast == kept() == 4 * 70 * 4 * (8 + 1)  # the output and lse


def test_a_step_waits_for_nothing_and_copies_nothing(on_the_cpu):
    q, k, v = (Parameter(on_device(a)) for a in drawn(1, 70, 4, 2, 8))
    w = on_device(drawn(1, 70, 4, 2, 8)[0])
    standin.reset()
    with standin.no_sync():
        launches(lambda: attention(q, k, v).backward(w))
    stats = standin.stats
    assert (stats.h2d, stats.d2h, stats.launches) == (0, 0, 4)


def test_a_later_token_changes_nothing_before_it_to_the_bit():
    arrays = drawn(1, 130, 2, 1, 8)
    run = lambda: to_numpy(launches(lambda: attention(*map(on_device, arrays)))[0].data)
    before = run()
    for t in (0, 63, 64, 129):
        saved = [a[:, t].copy() for a in arrays]
        for a in arrays:
            a[:, t] += 100
        after = run()
        assert np.array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])
        for a, old in zip(arrays, saved, strict=True):
            a[:, t] = old


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("D", [8, 72])
def test_a_nan_reaches_all_that_use_it(D, i, bad):
    """Every place that is NaN in exact causal arithmetic (one query a tile) is NaN here."""
    T = 70
    rng = np.random.default_rng(3)
    arrays = [*drawn(1, T, 2, 1, D), rng.standard_normal((1, T, 2, D)).astype(np.float32)]
    arrays[i][0, 65, 0, D // 2] = bad

    def run(place, **tile):
        q, k, v = (Parameter(place(a)) for a in arrays[:3])
        out = attention(q, k, v, **tile)
        found = out.backward(place(arrays[3]))
        return [to_numpy(a) for a in (out.data, found[q], found[k], found[v])]

    with reference_rules(), np.errstate(all="ignore"):
        wanted = run(lambda a: a.astype(np.float64), tile=1)
    found, names = launches(lambda: run(on_device))
    ran(sorted(names), *sorted(FLASH))
    lost = [np.isnan(b) & ~np.isnan(a) for a, b in zip(found, wanted, strict=True)]
    assert any(np.isnan(b).any() for b in wanted)
    assert not any(part.any() for part in lost)


# ----------------------------------------------------------------------------- what is declined


def test_what_the_kernels_do_not_take_the_specification_answers():
    small, at = drawn(1, 3, 2, 1, 4), np.zeros((1, 3), np.int64)
    free = lambda arrays: [Parameter(on_device(a)) for a in arrays]
    frozen = lambda arrays: [on_device(a) for a in arrays]
    cases = [
        (frozen([a.astype(np.float64) for a in small]), {}),
        (frozen([a + 0j for a in small]), {}),
        (frozen(drawn(1, 3, 2, 1, 129)), {}),
        (frozen([a[:0] for a in small]), {}),
        (free(small), {"positions": on_device(at)}),  # a gradient through a cache
        (frozen(small), {"positions": on_device(at.astype(np.int32))}),
        (frozen(small), {"positions": on_device(at[:, :1])}),
    ]
    for arrays, options in cases:
        value, names = launches(lambda a=arrays, o=options: attention(*a, **o))
        assert value.shape == arrays[0].shape
        ran(names)


def test_a_card_with_too_little_shared_memory(monkeypatch, on_the_cpu):
    """The way back at D = 128 asks for 109 KiB, of which some cards have 99."""

    class Small(fakeraw.Function):
        def __setattr__(self, name, value):
            if name == "max_dynamic_shared_size_bytes" and value > 99 << 10:
                raise RuntimeError("CUDA_ERROR_INVALID_VALUE")
            super().__setattr__(name, value)

    class RawModule(fakeraw.RawModule):
        __module__ = "cupy"

        def get_function(self, name):
            return Small(self, name)

    arrays = drawn(1, 3, 2, 1, 128)
    with installed(RawModule):
        for place, expected in ((Parameter, []), (lambda a: a, ["attention_forward"])):
            given = [place(on_device(a)) for a in arrays]
            _, names = launches(lambda given=given: attention(*given))
            assert names == expected


# -------------------------------------------------------------------------- planted mistakes


def without_barrier(text):
    return text, text.replace("__syncthreads();", "")


PLANTED = {
    "keys overwritten while they are read": without_barrier(
        "rows, y, x);\n        __syncthreads();"),
    "values added before they have come": without_barrier(
        "__syncthreads();\n        add_weighted<WIDTH, R>(sum, weights, rows, y, x);"),
    "a tile overwritten on the way back": without_barrier(
        "__syncthreads();\n            write_weights<R>(weights, ds, y, x);"),
    "no wait for the keys before": without_barrier("__syncthreads();  // the keys and weights"),
    "the mask off by one": ("first + x + 16 * j > limit[i]", "first + x + 16 * j > limit[i] + 1"),
    "the mask off by one on the way back": ("16 * j <= last ? p[i]", "16 * j < last ? p[i]"),
    "lse without its maximum": ("= top[i] + log2f(total[i])", "= log2f(total[i])"),
    "old sums not scaled down": ("sum[i][c] *= shrink;", ";"),
    "a lane left out of the sum": ("lane > 1; lane /= 2)\n            total",
                                   "lane > 2; lane /= 2)\n            total"),
    "heads grouped the wrong way": ("h < (key_head + 1) * group", "h < key_head * group + 1"),
    "the stride of another array": ("key_head * vh, vt, T - first", "key_head * vh, kt, T - first"),
}  # fmt: skip


@pytest.mark.parametrize("old, new", PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_caught(old, new, on_the_cpu):
    source = cuda_attention.tiled["float", 32].source()
    assert source.count(old) == 1
    x = drawn(1, 130, 6, 1, 8)[0].reshape(1, 130, -1)[..., :40]
    v = drawn(1, 130, 4, 2, 8)[2]

    def layer(x, v):
        q, k = split_heads(x, heads=(4, 1), width=8)
        return attention(q, k, v[:, :, :1])

    with installed(fakeraw.planted((old, new))), pytest.raises((AssertionError, RuntimeError)):
        agrees(layer, [x, v])


SCRIPT = """
import standin; standin.install()
import numpy as np
from cuda_cpu import fakeraw
from cuda_cpu.checks import installed, on_device
from minilora.engine.attention import attention
from minilora.engine.tensor import Parameter
fakeraw.RawModule.flags = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
rng = np.random.default_rng(0)
draw = lambda *shape: on_device(rng.standard_normal(shape).astype(np.float32))
odd = draw(1, 65, 4, 9)[..., 1:]  # eight wide, but for its strides and its start
edits = {edits!r}
with installed(fakeraw.planted(*edits)):
    attention(odd, odd, odd)
    if not edits:
        q, k, v = (Parameter(draw(1, 65, n, 9)) for n in (2, 1, 1))
        attention(q, k, v).backward(draw(1, 65, 2, 9))
        at = on_device(np.array([[3, 40]]))
        attention(q.data[:, :2], k.data, v.data, positions=at)
        attention(odd[:, :2], odd, odd, positions=at)
    print("launched", len(fakeraw.RawModule.launched))
"""
WILD = {
    "as they are": None,
    "heap-buffer-overflow": ("= rows + TILE * L::LD", "= rows + TILE * L::LD + 64"),
    "misaligned address": ("return on16(at) && stride % 4 == 0 &&", "return"),
}


@pytest.mark.parametrize("found", WILD)
def test_under_address_sanitizer(found, on_the_cpu):
    """The kernels read and write where they may, 16 bytes at a time only on 16 bytes."""
    edit = WILD[found]
    run = sanitized(SCRIPT.format(edits=[edit] if edit else []))
    if edit is None:
        assert run.stdout == "launched 9\n", run.stderr
    else:
        assert edit[0] in cuda_attention.tiled["float", 32].source()
        assert found in run.stderr
        assert run.returncode != 0
