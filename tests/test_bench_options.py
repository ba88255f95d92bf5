"""A benchmark refuses what it would silently do otherwise, and survives a contender that fails."""

import numpy as np
import pytest

from minilora import MiniloraError
from minilora.lab import bench
from minilora.lab.bench_ours import contender
from minilora.lab.bench_report import MICRO_BATCHES, bench_report, how
from minilora.lab.bench_shapes import SHAPES, Job
from minilora.model.module import walk
from minilora.train import parallel


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("runs on the host")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shapes": ()}, "shapes: expected at least one"),
        ({"modes": ()}, "modes: expected at least one"),
        ({"baselines": ("torch", "torch")}, "baselines: expected each once"),
        ({"suite": "optimizer", "baselines": ("hf",)}, "hf does not run in the suite optimizer"),
        ({"suite": "scaling", "shapes": ("S0", "S1")}, "shapes: scaling goes out from one"),
        # bitsandbytes would have run under the name of torch
        ({"suite": "quantize", "modes": ("lora",)}, "quantize has qlora alone"),
    ],
)
def test_what_would_be_left_out_silently_is_refused(options, message):
    with pytest.raises(MiniloraError, match=message):
        bench.BenchConfig(**options)


def test_no_baselines_is_a_race_of_ourselves_alone():
    assert bench.BenchConfig(baselines=()).contenders() == []


@pytest.mark.parametrize(
    "absent, left",
    [
        ((), ["torch", "hf", "compile", "bnb"]),
        (("bitsandbytes",), ["torch", "hf", "compile"]),
        (("peft",), []),
    ],
)
def test_bitsandbytes_is_missed_by_its_own_baseline_alone(absent, left, monkeypatch):
    monkeypatch.setattr(bench, "missing", lambda: list(absent))
    found = bench.BenchConfig().contenders()
    assert [name for name in found if name != "primitives"] == left


def test_more_threads_than_processors_are_not_called_at_work(monkeypatch):
    """`Shards` takes no more workers than there are: torch would have run on all that it asked."""
    pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 2)
    monkeypatch.setattr("threadpoolctl.threadpool_info", lambda: [
        {"user_api": "blas", "num_threads": 1}
    ])  # fmt: skip
    for threads in (2, 4):
        step = contender(Job("minilora", SHAPES["tiny"], threads=threads))
        try:
            if threads == 2:
                step.build()
                assert step.working == 2
            else:
                with pytest.raises(MiniloraError, match="expected 4 threads in all, found 2"):
                    step.build()
        finally:
            step.close()


class Fake:
    """A worker whose turns are given; None is one that fails."""

    turns: dict[str, list]

    def __init__(self, job):
        self.job, self.left = job, iter(self.turns[job.contender])

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def prepare(self):
        return {"versions": {}, "working": 1}

    def run(self, steps):
        wall = next(self.left)
        if wall is None:
            raise MiniloraError(f"bench: {self.job.contender}: the worker ended")
        return {"wall": wall, "cpu": wall, "others": 0.0, "values": [[1.0]] * steps}


def test_a_baseline_that_fails_in_a_round_ends_nothing_but_itself(monkeypatch):
    ready = [1.0, 1.0]  # the gate, and one step
    monkeypatch.setattr(bench, "Worker", Fake)
    monkeypatch.setattr(Fake, "turns", {
        "minilora": [*ready, 1.0, 2.0, 3.0, 4.0], "torch": [*ready, 1.0, None],
        "hf": [*ready, 2.0, 4.0, 6.0, 8.0],
    }, raising=False)  # fmt: skip
    jobs = [Job(name, SHAPES["tiny"]) for name in Fake.turns]
    found = bench.race(jobs, bench.BenchConfig(rounds=3, patience=0.0))
    ours, torch, hf = found["rows"]
    assert torch["error"] == "bench: torch: the worker ended"
    assert "ratio" not in torch
    assert (found["clean"], hf["ratio"], ours["ms_range"]) == (3, 0.5, [1000.0, 4000.0])
    monkeypatch.setitem(Fake.turns, "minilora", [*ready, None])
    with pytest.raises(MiniloraError, match="minilora: the worker ended"):
        bench.race(jobs, bench.BenchConfig(rounds=3, patience=0.0))


def test_a_base_in_codes_is_our_own_to_hold():
    """What `build` makes is weighed, what `__init__` drew is not: codes too are loaded anew."""
    job = Job("minilora", SHAPES["tiny"], mode="qlora")
    step = contender(job)
    step.build()
    drawn, held = (
        [a for _, a in walk(tree) if isinstance(a, np.ndarray)]
        for tree in (step.start, step.optimizer.model)
    )
    step.close()
    assert len(drawn) == len(held) > 0
    assert not any(np.shares_memory(a, b) for a, b in zip(drawn, held, strict=True))


@pytest.mark.peers
def test_bitsandbytes_is_not_charged_for_a_second_tree(monkeypatch):
    for name in bench.missing():
        pytest.skip(f"needs {name}")
    from minilora.lab import bench_torch

    theirs = bench_torch.contender(Job("bnb", SHAPES["S0"], mode="qlora"))
    start = theirs.start
    theirs.build()
    assert theirs.start is start


def test_what_a_report_says_of_gates_and_micro_batches():
    row = {"contender": "minilora", "gap": 0.0, "passed": True}
    case = {"title": "tiny lora", "threads": 1, "measure": "wall", "clean": 1, "dropped": 0}
    record = {
        "config": {"suite": "step", "threads": 1}, "gate": bench.GATE, "machine": bench.machine(),
        "missing": ["bitsandbytes"], "ceilings": {}, "cases": [case | {"rows": [row]}],
    }  # fmt: skip
    assert "agree to 0.0001.\n" in bench_report(record)
    assert "Not installed: bitsandbytes" in bench_report(record)
    record["cases"][0]["rows"].append(row | {"contender": "erf"})
    assert "agree to 0.0001 (with erf-GELU, another function: to 0.01)." in bench_report(record)
    micro = record | {"config": {"suite": "micro", "threads": 1}}
    assert MICRO_BATCHES in bench_report(micro)
    assert MICRO_BATCHES in how(micro)
    assert MICRO_BATCHES not in how(record)


def test_memory_is_that_of_several_processes(monkeypatch):
    peaks = {"minilora": iter([30, 10, 20]), "torch": iter([50, 40, 80])}

    class Weighed(Fake):
        def ask(self, command):
            return {"bytes": next(peaks[self.job.contender])}

    monkeypatch.setattr(Fake, "turns", {name: [1.0] * 4 for name in peaks}, raising=False)
    monkeypatch.setattr(bench, "Worker", Weighed)
    jobs = [Job(name, SHAPES["tiny"]) for name in peaks]
    ours, theirs = bench.with_memory({}, jobs)["rows"]
    assert (ours["bytes"], theirs["bytes"]) == (20, 50)
    assert ours["bytes_each"] == [10, 20, 30]
    assert (theirs["bytes_ratio"], theirs["bytes_range"]) == (20 / 50, [10 / 80, 30 / 40])
