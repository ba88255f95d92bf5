"""A long run holds no more at its end than near its beginning, and a step waits for nothing."""

import gc
import sys
import tracemalloc
from types import ModuleType

import numpy as np
import pytest
import standin

from minilora import (
    AdamW,
    Data,
    TransformerConfig,
    adapt,
    fit,
    freeze,
    init_transformer,
    schedule,
    to_device,
)
from minilora.quant.linear import quantize

CONFIG = TransformerConfig(vocab=11, width=16, layers=1, heads=2, context=16)


@pytest.fixture
def meter(xp) -> ModuleType:
    """The stand-in, which counts; NumPy and a card do not."""
    if "standin" not in xp.__version__:
        pytest.skip("counts are the stand-in's")
    return standin


def model(device, quantized=False):
    rng = np.random.default_rng(0)
    base = freeze(init_transformer(CONFIG, rng))
    base = quantize(base) if quantized else base
    return to_device(adapt(base, rank=2, rng=rng), device)


def step(optimizer, ids, clip=1.0):
    optimizer.model.loss(ids, ids).backward(into=optimizer.gradients)
    optimizer.step(divide_by=ids.size, clip=clip)


def test_a_thousand_steps_leak_nothing(device, dev):
    if device != "cpu":
        pytest.skip("tracemalloc sees host memory alone")
    optimizer = AdamW(model(device))
    ids = dev(np.random.default_rng(0).integers(0, 11, (2, 8)))
    for _ in range(20):
        step(optimizer, ids)
    gc.collect()
    gc.disable()  # cyclic garbage would pile up
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            step(optimizer, ids)
        assert gc.collect() == 0  # which also empties Python's own lists of free tuples
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert grown < 16 * 1024


def batches(n=16):
    ids = np.random.default_rng(0).integers(0, 11, (n, 8))
    return Data({"ids": ids, "targets": ids})


def loss(model, batch, rng):
    return model.loss(batch["ids"], batch["targets"], rng=rng)


def test_nor_does_the_loop_with_its_shards_and_records(device):
    if device != "cpu":
        pytest.skip("tracemalloc sees host memory alone")
    held = []

    def watched(step):
        """A schedule, which the loop asks between two steps."""
        if step in (100, 500):
            assert gc.collect() == 0
            # It keeps names that NumPy's C code looked up.
            getattr(sys, "_clear_internal_caches", sys._clear_type_cache)()
            held.append(tracemalloc.get_traced_memory()[0])
        return 1.0

    optimizer = AdamW(model(device))
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        fit(
            optimizer, loss, batches(), steps=501, batch=4, shards=2, clip=1.0, every=50,
            schedule=watched,
        )  # fmt: skip
    finally:
        tracemalloc.stop()
        gc.enable()
    before, after = held
    assert after - before < 8 * 1024  # eight records of the history are meant to stay


def test_the_loop_waits_for_its_records_alone(device, meter):
    """Syncs and copies to the host do not grow with the steps; what goes in is the batches."""

    def counted(steps):
        optimizer = AdamW(model(device))
        stats = meter.reset()
        fit(
            optimizer, loss, batches(), steps=steps, batch=4, accumulate=2, clip=1.0, every=steps,
            schedule=schedule("linear", steps),
        )  # fmt: skip
        return stats.syncs, stats.d2h, stats.h2d, stats.h2d_bytes

    few, many = counted(4), counted(12)
    assert many[:2] == few[:2]
    rows = 2 * 8 * 8  # ids and targets, eight numbers of eight bytes each
    assert (many[2] - few[2], many[3] - few[3]) == (8 * 2 * 2, 8 * 4 * rows)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_step_makes_no_sync_and_moves_only_its_batch(device, meter, quantized):
    host_ids = np.random.default_rng(0).integers(0, 11, (2, 8))
    optimizer = AdamW(model(device, quantized))
    step(optimizer, to_device(host_ids, device))
    stats = meter.reset()
    ids, targets = (to_device(a, device) for a in (host_ids, host_ids))
    optimizer.model.loss(ids, targets).backward(into=optimizer.gradients)
    optimizer.step(divide_by=host_ids.size, clip=1.0)
    assert (stats.syncs, stats.d2h) == (0, 0)
    assert (stats.h2d, stats.h2d_bytes) == (2, 2 * host_ids.nbytes)
    first = stats.launches
    meter.reset()
    step(optimizer, ids)
    assert abs(meter.stats.launches - first) <= 2  # the same work every step


def test_device_memory_is_given_back(device, meter):
    optimizer = AdamW(model(device))
    ids = to_device(np.random.default_rng(0).integers(0, 11, (2, 8)), device)
    for _ in range(3):
        step(optimizer, ids)
    gc.collect()  # what earlier tests left in cycles is not ours
    used = meter.stats.used
    for _ in range(20):
        step(optimizer, ids)
    assert meter.stats.used == used
