"""Forked copies of a process: what they share, what they do not, when they end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minilora.engine.errors import MiniloraError, NumericsError
from minilora.engine.forked import Forked, can_fork, copies, shared_zeros

pytestmark = pytest.mark.usefixtures("where_it_forks")


def test_shared_arrays_are_seen_both_ways_and_others_are_not():
    shared, own = shared_zeros(np.ones((2, 3), np.float32)), np.zeros(1)

    def write(value):
        seen = shared[0, 0].item(), own[0].item()
        shared[1], own[0] = value, value
        return os.getpid(), seen

    with Forked(2, write) as forked:
        shared[0], own[0] = 5, 5
        forked.ask(0, 7)
        pid, seen = forked.result(0)
        assert seen == (5, 0)
        assert pid != os.getpid()
        assert shared.tolist() == [[5] * 3, [7] * 3]
        assert own[0] == 5
        forked.ask(1, 8)
        assert forked.result(1)[0] not in (pid, os.getpid())
        forked.ask(0, 9)
        assert forked.result(0)[1] == (5, 7)  # a copy keeps what it changed
    assert not copies()


def test_an_array_without_entries_can_be_shared():
    assert shared_zeros(np.zeros((0, 4))).shape == (0, 4)


class Awkward(Exception):
    """Pickles, and cannot be made again of what was pickled."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (NumericsError("not finite"), NumericsError, "not finite"),
        (KeyError("name"), KeyError, "name"),
        (Awkward(1, 2), MiniloraError, "Awkward: 1 and 2"),
        (ValueError(lambda: "cannot be sent"), MiniloraError, "ValueError: <function"),
    ],
)
def test_an_error_comes_back_as_it_was_raised(error, kind, words):
    def fail():
        raise error

    with Forked(1, fail) as forked:
        forked.ask(0)
        with pytest.raises(kind, match=words) as caught:
            forked.result(0)
        assert type(caught.value) is kind
        assert "in fail" in caught.value.__notes__[0]  # where it was raised
        forked.ask(0)  # and the copy lives on
        with pytest.raises(kind):
            forked.result(0)


def test_a_copy_that_died_says_how():
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    with Forked(2, die) as forked:
        forked.ask(0)
        with pytest.raises(MiniloraError, match=r"forked to share the work, ended with -9"):
            forked.result(0)
        with pytest.raises(MiniloraError, match=r"ended with -9"):
            forked.ask(0)


def test_copies_end_with_the_process_that_made_them(tmp_path):
    """Killed at once, it cannot tell them: they find their pipes closed, each by itself."""
    script = """if True:
        import os, time, sys
        from minilora.engine.forked import Forked
        forked = Forked(3, os.getpid)
        for i in range(3):
            forked.ask(i)
        print(*(forked.result(i) for i in range(3)), flush=True)
        forked.ask(0)  # an answer that nobody reads
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        time.sleep(0.2)
        parent.kill()
        assert parent.stderr.read() == ""  # until the last copy has closed it
    end = time.monotonic() + 60
    while (alive := [pid for pid in pids if running(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive


def test_signals_are_for_the_process_that_asks():
    def handlers():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with Forked(1, handlers) as forked:
            forked.ask(0)
            assert forked.result(0) == (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_where_the_second_cannot_be_forked_the_first_ends(monkeypatch):
    plain, calls = os.fork, []

    def fork():
        calls.append(1)
        if len(calls) == 2:
            raise BlockingIOError("no more processes")
        return plain()

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(BlockingIOError, match="no more processes"):
        Forked(2, os.getpid)
    assert not copies()


def running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended; who inherits it has not noticed


def test_a_daemon_may_have_no_children():
    def inside(pipe):
        pipe.send(can_fork())

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    daemon = fork.Process(target=inside, args=(theirs,), daemon=True)
    daemon.start()
    assert ours.recv() is False
    daemon.join()
    for end in (ours, theirs):
        end.close()


def test_what_copies_use_is_counted():
    """Processor time and memory of a copy, in what a benchmark reports of its worker."""
    from minilora.lab.machine import Load, Peak, cpu_seconds

    held = []

    def work(mib, seconds):
        held.append(np.ones(mib << 18, np.float32))
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    peak = Peak()
    with Forked(1, work) as forked:
        before, load, began = cpu_seconds(), Load(), time.perf_counter()
        forked.ask(0, 64, 0.5)
        forked.result(0)
        wall = time.perf_counter() - began
        assert 0.45 <= cpu_seconds() - before <= wall + 0.2
        assert load.others() is not None
        assert peak.bytes() >= 64 << 20
    assert cpu_seconds() - before >= 0.45  # once it has ended too
