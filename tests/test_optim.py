"""The writers of parameters against textbook loops, and what they do when numbers go wrong."""

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import SGD, AdamW, MiniloraError, Parameter, Tensor, module, schedule, to_device
from minilora.engine.bf16 import BFLOAT16
from minilora.engine.errors import CheckpointError
from minilora.engine.rules import reference_rules
from minilora.model.module import cast
from minilora.optim.adam8bit import AdamW8bit
from minilora.optim.adamw import adamw_update
from minilora.optim.flat import CALLS, FACTOR, LR, NORM, STEP, Flat, Group, lora_plus, measure
from minilora.optim.paged import PagedAdamW


@module
class Three:
    gain: Tensor  # a vector: no decay
    matrix: Tensor
    tail: tuple


def drawn(device="cpu", dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: Parameter(rng.standard_normal(shape).astype(dtype))
    tree = Three(draw(5), draw(4, 3), (draw(2, 2), Tensor(np.ones(2, dtype)), draw(1)))
    return to_device(tree, device)


def host_values(optimizer, host):
    return {path: host(p.data).copy() for path, p in optimizer.flat.named.items()}


def push(optimizer, gradients, dev):
    """Add host gradients by path to the flat buffer."""
    optimizer.flat.add({optimizer.flat.named[p]: dev(g) for p, g in gradients.items()})


def drawn_gradients(optimizer, rng):
    named = optimizer.flat.named
    return {p: rng.standard_normal(t.shape).astype(t.dtype) for p, t in named.items()}


def textbook_adamw(p, g, m, v, t, lr, decay, b1=0.9, b2=0.999, eps=1e-8):
    p = p - lr * decay * p
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), m, v


@pytest.mark.parametrize("reference", [False, True])
def test_adamw_is_the_textbook(reference, device, dev, host):
    optimizer = AdamW(drawn(device), lr=0.05, weight_decay=0.1)
    rng = np.random.default_rng(1)
    p = host_values(optimizer, host)
    state = {path: (0.0, 0.0) for path in p}
    for t in range(1, 30):
        g = drawn_gradients(optimizer, rng)
        norm = math.sqrt(sum((x**2).sum() for x in g.values())) / 4
        push(optimizer, g, dev)
        if reference:
            with reference_rules():
                optimizer.step(divide_by=4, clip=1.0)
        else:
            optimizer.step(divide_by=4, clip=1.0)
        np.testing.assert_allclose(optimizer.norm(), norm, rtol=1e-12)
        for path in p:
            scaled = g[path] / 4 * min(1, 1 / norm)
            decay = 0.1 if p[path].ndim == 2 else 0.0
            p[path], *state[path] = textbook_adamw(p[path], scaled, *state[path], t, 0.05, decay)
        for path, value in host_values(optimizer, host).items():
            np.testing.assert_allclose(value, p[path], rtol=1e-11, atol=1e-12)
        assert not host(optimizer.flat.grad).any()
    assert optimizer.control[STEP] == 29


def test_sgd_update_is_the_textbook(device, dev, host):
    optimizer = SGD(drawn(device), lr=0.1, momentum=0.9, weight_decay=0.01)
    rng = np.random.default_rng(1)
    p = host_values(optimizer, host)
    u = {path: 0.0 for path in p}
    for _ in range(10):
        g = drawn_gradients(optimizer, rng)
        push(optimizer, g, dev)
        optimizer.step()
        for path in p:
            decay = 0.01 if p[path].ndim == 2 else 0.0
            u[path] = 0.9 * u[path] + g[path]
            p[path] = p[path] * (1 - 0.1 * decay) - 0.1 * u[path]
        for path, value in host_values(optimizer, host).items():
            np.testing.assert_allclose(value, p[path], rtol=1e-12)


USUAL = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}  # PyTorch's too


@pytest.mark.parametrize("make, usual", [
    (SGD, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}),
    (AdamW, USUAL),
    (AdamW8bit, USUAL),
    (PagedAdamW, USUAL),
])  # fmt: skip
def test_what_is_not_said_is_the_usual(make, usual, device, dev, host):
    silent, said = (make(drawn(device, np.float32), **options) for options in ({}, usual))
    rng = np.random.default_rng(0)
    for _ in range(3):
        g = {p: x * np.float32(1e-7) for p, x in drawn_gradients(silent, rng).items()}  # near eps
        for optimizer, options in ((silent, {}), (said, {"divide_by": 1, "clip": None})):
            push(optimizer, g, dev)
            optimizer.step(**options)
    assert host(silent.flat.data).tobytes() == host(said.flat.data).tobytes()


@given(st.integers(1, 70_000), st.integers(0, 99), st.sampled_from([np.float32, np.float64]))
def test_updates_in_blocks_are_their_specifications(dev, host, n, seed, dtype):
    rng = np.random.default_rng(seed)
    p, g, m = (rng.standard_normal(n).astype(dtype) for _ in range(3))
    v = np.abs(rng.standard_normal(n)).astype(dtype)
    control = np.zeros(7)
    control[[LR, STEP, NORM, FACTOR]] = 0.01, 3, 1.0, 0.5
    results = []
    for reference in (False, True):
        arrays = [dev(a.copy()) for a in (p, g, m, v, control)]
        options = {"betas": (0.9, 0.99), "eps": 1e-8, "decay": 0.1, "lr_factor": 2.0}
        if reference:
            with reference_rules():
                adamw_update(*arrays, **options)
                measure(arrays[1], arrays[4], divide_by=2.0, clip=0.1)
        else:
            adamw_update(*arrays, **options)
            measure(arrays[1], arrays[4], divide_by=2.0, clip=0.1)
        results.append([host(a) for a in arrays])
    tolerance = 3e-6 if dtype == np.float32 else 1e-12
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    assert results[0][1].tobytes() == g.tobytes()  # the gradient itself is left alone


# -------------------------------------------------------------------------- flat buffers


def test_the_trained_tree_looks_into_one_buffer(device, dev, host):
    old = drawn(device)
    optimizer = AdamW(old)
    flat = optimizer.flat
    assert flat.data.size == 5 + 12 + 4 + 1
    flat.data.fill(3)
    assert (host(optimizer.model.matrix.data) == 3).all()
    assert not (host(old.matrix.data) == 3).any()  # the old tree keeps its values
    assert optimizer.model.tail[1] is old.tail[1]
    covered = np.zeros(flat.data.size, int)
    for path, span in flat.spans.items():
        covered[span] += 1
        assert {flat.name_at(i) for i in range(span.start, span.stop)} == {path}
    assert (covered == 1).all()


def test_a_tied_parameter_has_one_place(device):
    p = to_device(drawn(), device).matrix
    flat = Flat(Three(p, p, (p,)))
    assert flat.data.size == 12
    assert flat.model.gain is flat.model.matrix is flat.model.tail[0]


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_groups_are_separate_optimizers(make, device, dev, host):
    """Factors on rate and decay do what two optimizers with those settings would."""
    groups = lambda path, p: Group(0.5, 2.0) if path == "matrix" else Group(3.0, 0.0)
    together = make(drawn(device), lr=0.02, weight_decay=0.1, groups=groups)
    assert [group for _, group in together.flat.parts] == [Group(3.0, 0.0), Group(0.5, 2.0)]
    every = lambda path, p: Group()
    alone = {
        "matrix": make(drawn(device), lr=0.01, weight_decay=0.2, groups=every),
        "gain": make(drawn(device), lr=0.06, weight_decay=0.0, groups=every),
    }
    rng = np.random.default_rng(0)
    for _ in range(5):
        g = drawn_gradients(together, rng)
        for optimizer in (together, *alone.values()):
            push(optimizer, g, dev)
            optimizer.step()
    for path, optimizer in alone.items():
        a, b = (host(o.flat.named[path].data) for o in (together, optimizer))
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_lora_plus_speeds_up_b_alone():
    @module
    class Pair:
        A: Tensor
        B: Tensor
        bias: Tensor

    pair = Pair(*(Parameter(np.ones(s)) for s in ((2, 3), (4, 2), (4,))))
    parts = Flat(pair, lora_plus(8.0)).parts
    assert [group for _, group in parts] == [Group(8.0, 1.0), Group(1.0, 1.0), Group(1.0, 0.0)]


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf])
def test_groups_of_no_meaning_are_refused(factor):
    with pytest.raises(MiniloraError, match="groups: expected finite factors"):
        AdamW(drawn(), groups=lambda path, p: Group(lr=factor))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AdamW(Tensor(np.ones(2))), "expected Parameters in the model, found none"),
        (lambda: AdamW(drawn(), lr=-1), "lr: expected"),
        (lambda: AdamW(drawn(), lr=math.nan), "lr: expected"),
        (lambda: AdamW(drawn(), lr=math.inf), "lr: expected a finite number >= 0, found inf"),
        (lambda: AdamW(drawn(), betas=(0.9, 1.0)), "betas"),
        (lambda: AdamW(drawn(), betas=0.9), "betas: expected two numbers .* found 0.9"),
        (lambda: AdamW(drawn(), eps=math.nan), "eps: expected a finite number >= 0, found nan"),
        (lambda: AdamW(drawn(), weight_decay=-1), "weight_decay: expected .* found -1"),
        (lambda: SGD(drawn(), momentum="a"), "momentum: expected .* found a"),
        (lambda: AdamW(cast(drawn(), BFLOAT16)), "float32 or float64, found bfloat16"),
        (lambda: AdamW(cast(drawn(), np.float16)), "float32 or float64, found float16"),
        (lambda: AdamW(Parameter(np.ones((0, 3)))), "expected Parameters in the model, found none"),
        (lambda: AdamW(drawn()).set_lr(math.nan), "lr: expected a finite number >= 0, found nan"),
        (lambda: schedule("linear", -5), "schedule: steps: expected .* found -5"),
        (lambda: schedule("linear", 5, "a"), "0 <= warmup <= 1, found 'linear' and a"),
        (
            lambda: AdamW((Parameter(np.ones(2)), Parameter(np.ones(2, np.float32)))),
            "one dtype and device",
        ),
    ],
)
def test_what_an_optimizer_refuses(make, message):
    with pytest.raises(MiniloraError, match=message):
        make()


@pytest.mark.parametrize("name, value", [("clip", -1.0), ("clip", math.nan), ("divide_by", 0.0)])
def test_a_step_out_of_range_is_not_made(name, value, device, dev, host):
    optimizer = AdamW(drawn(device))
    push(optimizer, drawn_gradients(optimizer, np.random.default_rng(0)), dev)
    before = host(optimizer.flat.data).copy()
    with pytest.raises(MiniloraError, match=f"{name}: expected a number > 0, found {value}"):
        optimizer.step(**{name: value})
    assert host(optimizer.flat.data).tobytes() == before.tobytes()
    assert host(optimizer.control)[[STEP, CALLS]].tolist() == [0, 0]


def test_a_gradient_for_another_tree_is_refused(device, dev, host):
    old = drawn(device)
    optimizer = AdamW(old)
    ours, ones = optimizer.model, dev(np.ones((4, 3)))
    with pytest.raises(MiniloraError, match=r"train optimizer\.model"):
        optimizer.flat.add({ours.matrix: ones, old.matrix: ones})
    with pytest.raises(MiniloraError, match=r"a gradient of shape \(4, 3\) for .*\(5,\)"):
        optimizer.flat.add({ours.matrix: ones, ours.gain: ones})
    assert not host(optimizer.flat.grad).any()


# ------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("make", [AdamW, SGD])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reference", [False, True])
def test_a_bad_gradient_writes_nothing_and_is_remembered(make, bad, reference, device, dev, host):
    optimizer = make(drawn(device), lr=0.1)
    rng = np.random.default_rng(0)

    def step(spoil=None):
        g = drawn_gradients(optimizer, rng)
        if spoil:
            g[spoil].ravel()[-1] = bad
        push(optimizer, g, dev)
        if reference:
            with reference_rules():
                optimizer.step(clip=1.0)
        else:
            optimizer.step(clip=1.0)

    step()
    assert optimizer.first_bad() is None
    before = {k: v.copy() for k, v in optimizer.state().items() if k != "control"}
    data = host(optimizer.flat.data).copy()
    step("tail.0")
    assert optimizer.first_bad() == (2, "tail.0")
    assert host(optimizer.flat.data).tobytes() == data.tobytes()
    for key, value in optimizer.state().items():
        if key != "control":
            assert value.tobytes() == before[key].tobytes()
    assert optimizer.control[STEP] == 1
    assert optimizer.control[CALLS] == 2
    step()
    step("gain")
    assert optimizer.first_bad() == (2, "tail.0")  # the first stays on record
    assert optimizer.control[STEP] == 2
    assert host(optimizer.flat.data).tobytes() != data.tobytes()


@pytest.mark.parametrize("reference", [False, True])
def test_a_zero_gradient_moves_nothing_but_decay(reference, device, dev, host):
    optimizer = AdamW(drawn(device), lr=0.1, weight_decay=0.0)
    data = host(optimizer.flat.data).copy()
    with reference_rules() if reference else nullcontext():
        optimizer.step(clip=1.0)
    np.testing.assert_array_equal(host(optimizer.flat.data), data)


# ------------------------------------------------------------------------------- state


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_a_restored_optimizer_goes_on_to_the_bit(make, device, dev, host):
    one = make(drawn(device), lr=0.1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        push(one, drawn_gradients(one, rng), dev)
        one.step()
    two = make(drawn(device, seed=5), lr=0.3)
    weights = host_values(one, host)
    two.flat.restore(two.flat.data, weights, "weights")
    saved = one.state()
    assert all(isinstance(value, np.ndarray) for value in saved.values())
    two.restore(saved)
    for _ in range(3):
        g = drawn_gradients(one, rng)
        for optimizer in (one, two):
            push(optimizer, g, dev)
            optimizer.step(clip=0.5)
    assert host(one.flat.data).tobytes() == host(two.flat.data).tobytes()


def test_a_state_is_its_own_copy(device, dev):
    optimizer = AdamW(drawn(device), lr=0.1)
    saved = optimizer.state()
    push(optimizer, drawn_gradients(optimizer, np.random.default_rng(0)), dev)
    optimizer.step()
    assert not saved["m.matrix"].any()
    assert saved["control"][STEP] == 0


OPTIMIZERS = {
    "sgd": lambda tree: SGD(tree, momentum=0.9),
    "adamw": AdamW,
    "8 bits": AdamW8bit,
    "pages": lambda tree: PagedAdamW(tree, page=8),
}


@pytest.mark.parametrize("spoil", ["missing", "extra", "shape", "dtype", "last", "control"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(
    make, spoil, device, dev, host
):
    optimizer = make(drawn(device, np.float32))
    push(optimizer, drawn_gradients(optimizer, np.random.default_rng(0)), dev)
    optimizer.step()
    before = optimizer.state()
    wrong = {k: v * 0 for k, v in before.items()}
    name = next(key for key in before if key.endswith(".matrix"))
    if spoil == "missing":
        del wrong[name]
    elif spoil == "extra":
        wrong["m.other"] = np.zeros(2)
    elif spoil == "shape":
        wrong[name] = wrong[name].reshape(3, 4)
    elif spoil == "dtype":
        wrong[name] = wrong[name].astype(np.int8)
    elif spoil == "last":  # when all others fit
        name = list(before)[-1]
        wrong[name] = wrong[name][..., None]
    else:
        wrong["control"] = np.zeros(1)
    with pytest.raises(CheckpointError, match=rf"optimizer state: .*(m.other|control|{name})"):
        optimizer.restore(wrong)
    if spoil == "control":
        del wrong["control"]
        with pytest.raises(CheckpointError, match=r"optimizer state: .*control"):
            optimizer.restore(wrong)
    after = optimizer.state()
    assert after.keys() == before.keys()
    assert all(after[k].tobytes() == before[k].tobytes() for k in before)


# ---------------------------------------------------------------------------- schedules


@given(
    st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 500), st.floats(0, 1)
)  # fmt: skip
def test_schedules_stay_between_zero_and_one_and_fall(shape, steps, warmup):
    factor = [schedule(shape, steps, warmup)(step) for step in range(steps)]
    climb = round(warmup * steps)
    assert all(0 <= f <= 1 for f in factor)
    assert factor[:climb] == sorted(factor[:climb])
    assert factor[climb:] == sorted(factor[climb:], reverse=True)
    if climb < steps:
        assert factor[climb] == 1


def test_schedules_at_known_points():
    linear, cosine = (schedule(s, 100, 0.1) for s in ("linear", "cosine"))
    assert [linear(s) for s in (0, 9, 10, 55, 100, 200)] == [0.1, 1, 1, 0.5, 0, 0]
    np.testing.assert_allclose([cosine(10), cosine(55), cosine(100)], [1, 0.5, 0], atol=1e-12)
    assert [schedule("constant", 100)(s) for s in (0, 99)] == [1, 1]
    for bad in (("step", 10, 0), ("linear", 10, 1.5)):
        with pytest.raises(MiniloraError, match="schedule: expected"):
            schedule(*bad)


def test_moments_take_no_memory_before_the_first_step(device):
    """Nor does the gradient: what a process forked before it has to keep is the weights."""
    from minilora.lab.machine import memory

    if device != "cpu" or not Path("/proc/self/status").exists():
        pytest.skip("reads what Linux says of this process")
    weights = Parameter(np.ones(1 << 24, np.float32))  # 64 MiB
    before = memory("VmRSS")
    optimizer = AdamW([weights])
    assert memory("VmRSS") - before < 1.5 * weights.data.nbytes  # its own copy of them
    optimizer.flat.grad[...] = 1
    optimizer.step()
    assert memory("VmRSS") - before > 3.5 * weights.data.nbytes
