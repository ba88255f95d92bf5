"""Shards by forked copies: the bytes of threads and of turns, errors, Ctrl-C, evaluations."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from minilora.engine.errors import MiniloraError
from minilora.engine.forked import Forked, copies
from minilora.engine.rules import only_reference, reference_rules
from minilora.engine.tensor import Parameter, Tensor
from minilora.engine.workers import at_work
from minilora.optim.adamw import AdamW
from minilora.train import parallel
from minilora.train.data import Data
from minilora.train.loop import evaluate
from minilora.train.parallel import Shards

pytestmark = pytest.mark.usefixtures("where_it_forks")


@pytest.fixture(autouse=True)
def three_processors(monkeypatch):
    """On a host with one, shards take turns: here there are always some workers."""
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 3)


def least_squares(model, batch, rng):
    residual = (model[0] * batch["x"]).sum(axis=1) - batch["y"]
    return (residual * residual).sum()


def problem(n=12):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 5)).astype(np.float32)
    return AdamW([Parameter(np.ones(5, np.float32))], lr=0.1), Data({"x": x, "y": x @ np.arange(5)})


def steps(shards, loss=least_squares, count=3):
    optimizer, data = problem()
    losses = []
    with Shards(optimizer.flat, shards) as workers:
        for step in range(count):
            total, scored = workers.add(loss, data, np.arange(len(data)), (0, step))
            optimizer.step(divide_by=scored)
            losses.append(float(total))
        many = len(copies())
    assert not copies()
    return optimizer.flat.data.tobytes(), losses, many


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_copies_threads_and_turns_give_the_same_bytes(shards, monkeypatch):
    forked = steps(shards)
    assert forked[2] == min(shards, 3) - 1
    monkeypatch.setattr(parallel, "can_fork", lambda: False)
    threads = steps(shards)
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 1)
    turns = steps(shards)
    assert threads[2] == turns[2] == 0
    assert forked[:2] == threads[:2] == turns[:2]
    assert forked[1][0] > forked[1][-1]


def test_fewer_rows_than_shards():
    optimizer, data = problem()
    with Shards(optimizer.flat, 3) as workers:
        for rows in ([0, 1, 2], [4], [5, 6]):  # stale gradients of the first must not count
            workers.add(least_squares, data, np.array(rows), (0,))
            found = optimizer.flat.grad.copy()
            optimizer.flat.grad.fill(0)
            least_squares(optimizer.model, data.take(np.array(rows))[0], None).backward(
                into=optimizer.gradients
            )
            np.testing.assert_allclose(found, optimizer.flat.grad, rtol=1e-5)
            optimizer.flat.grad.fill(0)


def test_another_loss_is_another_copy():
    optimizer, data = problem()
    rows = np.arange(len(data))

    def twice(model, batch, rng):
        return least_squares(model, batch, rng) * 2.0

    with Shards(optimizer.flat, 2) as workers:
        once, _ = workers.add(least_squares, data, rows, (0,))
        pid = copies()[0].pid
        workers.add(least_squares, data, rows, (0,))
        assert [child.pid for child in copies()] == [pid]
        double, _ = workers.add(twice, data, rows, (0,))
        assert [child.pid for child in copies()] != [pid]
    assert float(double) == pytest.approx(2 * float(once))


def test_copies_follow_the_choice_of_rules():
    """As threads do, which carry context variables along."""
    optimizer, data = problem()

    def loss(model, batch, rng):
        return least_squares(model, batch, rng) * 0.0 + float(only_reference())

    with Shards(optimizer.flat, 2) as workers:
        for inside, total in ((nullcontext(), 0), (reference_rules(), 2), (nullcontext(), 0)):
            with inside:
                assert workers.add(loss, data, np.arange(12), (0,))[0] == total


def test_an_interrupted_end_still_gives_the_threads_back(monkeypatch):
    from threadpoolctl import threadpool_info

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    def interrupted(self):
        plain(self)
        raise KeyboardInterrupt

    plain, before = Forked.close, threads()
    monkeypatch.setattr(Forked, "close", interrupted)
    optimizer, data = problem()
    with pytest.raises(KeyboardInterrupt), Shards(optimizer.flat, 2) as workers:
        workers.add(least_squares, data, np.arange(12), (0,))
    assert threads() == before
    assert not copies()


def test_no_rows_no_gradient():
    optimizer, data = problem()
    with Shards(optimizer.flat, 2) as workers:
        assert workers.add(least_squares, data, np.arange(0), (0,)) == (0.0, 0)
    assert not optimizer.flat.grad.any()


def test_an_error_here_leaves_no_answer_for_the_next_batch():
    optimizer, data = problem()
    rows, here = np.arange(len(data)), os.getpid()

    def sometimes(model, batch, rng):
        if os.getpid() == here and rng.bit_generator.seed_seq.entropy[0] == 1:
            raise ValueError("here alone")
        return least_squares(model, batch, rng)

    with Shards(optimizer.flat, 2) as workers:
        first, _ = workers.add(sometimes, data, rows, (0,))
        with pytest.raises(ValueError, match="here alone"):
            workers.add(sometimes, data, rows, (1,))
        assert not copies()
        optimizer.flat.data[...] = 0
        again, _ = workers.add(sometimes, data, rows, (0,))
    assert float(again) == pytest.approx(float((data.arrays["y"] ** 2).sum()), rel=1e-5)
    assert float(first) != pytest.approx(float(again), rel=1e-2)


@pytest.mark.parametrize("forks", [True, False])
def test_the_workers_are_the_optimizers_too_and_then_go(forks, monkeypatch):
    monkeypatch.setattr(parallel, "can_fork", lambda: forks)
    workers = Shards(problem()[0].flat, 2)
    with workers:
        assert at_work() == 2
    assert at_work() == 1


def test_without_threadpoolctl_they_take_turns(monkeypatch):
    wanted = steps(3)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert steps(3) == (*wanted[:2], 0)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("forks", [True, False])
def test_workers_share_an_evaluation(shards, forks, monkeypatch):
    """The same sum to the bit, of the weights as they are; a batch with nothing scored is none."""
    monkeypatch.setattr(parallel, "can_fork", lambda: forks)
    optimizer, data = problem(13)
    seen = Data({**data.arrays, "targets": np.where(np.arange(13) // 3 == 2, -100, 1)[:, None]})

    def loss(model, batch, rng):
        assert rng is not None or (batch["targets"] >= 0).any()
        assert (rng is None) == (type(model[0]) is Tensor)  # frozen, to evaluate
        return least_squares(model, batch, rng)

    with Shards(optimizer.flat, shards) as workers:
        for step in range(3):
            shared = evaluate(optimizer.model, loss, seen, 3, workers)
            assert shared == evaluate(optimizer.model, loss, seen, 3)
            workers.add(loss, data, np.arange(9), (0, step))
            optimizer.step()
            assert evaluate(optimizer.model, loss, seen, 3, workers) < shared
        double = lambda *arguments: loss(*arguments) * 2.0  # for which other copies are made
        now = evaluate(optimizer.model, loss, seen, 3)
        assert evaluate(optimizer.model, double, seen, 3, workers) == pytest.approx(2 * now)
        assert len(copies()) == (shards - 1 if forks else 0)  # and those of before are gone
        with pytest.raises(MiniloraError, match="the model that the workers train"):
            evaluate(problem()[0].model, loss, seen, 3, workers)


@pytest.mark.parametrize("presses", [1, 2])
def test_control_c_reaches_the_process_that_asked(presses, tmp_path):
    """A terminal sends it to copies too: once, the step is ended; twice, all end at once."""
    script = f"""if True:
        import os, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_shards
        from minilora.train import parallel
        from minilora.train.loop import fit
        parallel.os.cpu_count = lambda: 2
        optimizer, data = test_shards.problem()

        def slow(model, batch, rng):
            if rng.bit_generator.seed_seq.entropy[1] == 2:
                os.write(1, b"now\\n")  # in one stroke
                time.sleep(5 if {presses} == 1 else 60)
            return test_shards.least_squares(model, batch, rng)

        run = fit(optimizer, slow, data, steps=9, batch=4, every=1, shards=2)
        print(run.stopped, run.steps, flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with child:
        assert child.stdout.readline() == child.stdout.readline() == "now\n"  # both shards
        os.killpg(child.pid, signal.SIGINT)
        while presses > 1 and child.poll() is None:  # two that come at once would be one
            time.sleep(0.1)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)
        out, words = child.communicate(timeout=50)
    if presses == 1:
        assert (out, child.returncode) == ("interrupted 3\n", 0), words
    else:
        assert child.returncode != 0
        assert "KeyboardInterrupt" in words
