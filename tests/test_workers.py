"""Spreading blocks over threads changes when they are done, and nothing else."""

import threading

import numpy as np
import pytest

from minilora.engine.workers import spread, threads
from minilora.optim.adam8bit import AdamW8bit
from minilora.optim.adamw import AdamW
from minilora.quant.blockwise import quantize_array
from minilora.train.data import Data
from minilora.train.parallel import Shards

pytestmark = pytest.mark.usefixtures("on_the_host")


@pytest.fixture(scope="module")
def on_the_host(device):
    if device != "cpu":
        pytest.skip("threads are for NumPy arrays")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_results_come_in_the_order_of_the_parts(count):
    names = set()

    def square(part):
        names.add(threading.get_ident())
        return part * part

    with threads(count):
        for n in (0, 1, 2, 7, 50):
            assert spread(square, range(n)) == [i * i for i in range(n)]
    assert len(names) <= count + 1  # the caller takes a stretch too


def test_an_error_reaches_the_caller():
    def fail(part):
        if part == 9:
            raise ValueError("part 9")

    with threads(2), pytest.raises(ValueError, match="part 9"):
        spread(fail, range(10))


def test_one_thread_or_three_the_same_bytes():
    """Codes, dense weights and optimizer steps over several blocks, to the bit."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(700_001).astype(np.float32)
    g = rng.standard_normal(w.size).astype(np.float32)

    def results():
        from minilora.engine.tensor import Parameter

        array = quantize_array(w)
        found = [array.packed, array.scales, array.dense()]
        for make in (AdamW, AdamW8bit):
            optimizer = make([Parameter(w.copy())], lr=0.01)
            for _ in range(2):
                optimizer.flat.grad[...] = g
                optimizer.step(clip=1.0)
            found += [optimizer.flat.data, optimizer.control]
        return [a.tobytes() for a in found]

    alone = results()
    with threads(3):
        assert results() == alone


def test_a_shard_that_spreads_does_not_wait_for_itself():
    from minilora.engine.tensor import Parameter, Tensor

    w = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)

    def loss(model, batch, rng):
        return (model[0] * Tensor(quantize_array(w).dense()[: model[0].size])).sum()

    optimizer = AdamW([Parameter(np.ones(200_000, np.float32))])
    data = Data({"ids": np.zeros((4, 1), np.int64)})
    with Shards(optimizer.flat, 2) as shards:
        shards.add(loss, data, np.arange(4), (0,))
        optimizer.step()
    np.testing.assert_allclose(
        optimizer.norm(), np.linalg.norm(2 * quantize_array(w).dense()[:200_000]), rtol=1e-5
    )
