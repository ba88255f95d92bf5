"""The race is fair: a gate before any ratio, dirty rounds dropped, both sides told the same."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from minilora import MiniloraError, freeze
from minilora.engine.forked import can_fork
from minilora.lab import bench, bench_primitives, bench_worker
from minilora.lab.bench_ours import OurOptimizer, contender, expect_threads, sums
from minilora.lab.bench_report import bench_figure, bench_report, how, speedups, why
from minilora.lab.bench_shapes import SHAPES, Job, flops, starting_tree, tokens
from minilora.lab.bench_worker import Worker, blas_threads
from minilora.lab.machine import machine


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("runs on the host")


TURN = {"wall": 0.2, "cpu": 0.3, "others": 0.0, "values": [[1.0]]}


def turns(*pairs, others=0.0):
    return [TURN | {"wall": wall, "cpu": cpu, "others": others} for wall, cpu in pairs]


def test_a_ratio_is_the_median_of_ratios_within_a_round():
    rounds = [turns((1, 1), (2, 4)), turns((10, 1), (40, 4)), turns((3, 1), (3, 4))]
    mine = bench.figures(rounds, 1, 2, "wall")
    assert mine["ratio"] == 0.5  # of 1/2, 1/4 and 1
    assert mine["ratio_range"] == [0.25, 1.0]
    assert mine["ms"] == 1500.0
    assert bench.figures(rounds, 1, 2, "cpu")["ratio"] == 0.25
    assert "ratio" not in bench.figures(rounds, 0, 2, "wall")
    assert bench.figures([], 1, 2, "wall") == {}


def test_a_dirty_round_is_none():
    assert bench.is_clean(turns((1, 1), others=0.01), 0.07)
    assert not bench.is_clean(turns((1, 1), others=0.2), 0.07)
    assert not bench.is_clean([TURN | {"others": None}], 0.07)  # unknown is not clean
    config = bench.BenchConfig(rounds=3)
    clean, dirty = turns((1, 1)), turns((1, 1), others=1.0)
    assert bench.enough([clean] * 3, config, "wall")
    assert not bench.enough([clean, clean, dirty], config, "wall")
    assert bench.enough([dirty] * 3, config, "wall")  # never quiet: given up
    assert bench.enough([clean] + [dirty] * 8, config, "wall")
    assert bench.enough([dirty] * 3, config, "cpu")


@pytest.mark.parametrize("gap, passed", [(0, True), (9e-5, True), (2e-4, False), (np.nan, False)])
def test_the_gate(gap, passed):
    ours = {"contender": "minilora", "values": [[1.0], [2.0]]}
    row = {"contender": "torch", "values": [[1.0], [2.0 + gap]]}
    assert bench.passes(row, ours) == passed


def test_a_contender_that_computes_something_else_gets_no_ratio(monkeypatch):
    """A planted fault: our own specification with another learning rate."""
    first = Job("minilora", SHAPES["tiny"], threads=1)
    wrong = Job("reference", SHAPES["tiny"], threads=1, lr=1e-1)
    right = Job("reference", SHAPES["tiny"], threads=1)
    monkeypatch.setattr(bench, "TURN", 0.01)
    config = bench.BenchConfig(rounds=1, threads=1)
    found = bench.race([first, wrong, right], config, measure="cpu")
    rows = found["rows"]
    assert rows[1]["passed"] is False
    assert "ratio" not in rows[1]
    assert rows[2]["passed"]
    assert rows[2]["ratio"] > 0


def test_a_worker_that_fails_says_why():
    job = Job("minilora", SHAPES["tiny"], kind="generate")
    with Worker(job) as worker, pytest.raises(MiniloraError, match="longer than the 32 new tokens"):
        worker.prepare()


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("shape", ["tiny", "llama"])
def test_the_primitives_compute_the_same_function(mode, shape):
    from dataclasses import replace

    shapes = {"tiny": SHAPES["tiny"], "llama": replace(SHAPES["tiny"], key_heads=1, hidden=40)}
    job = Job("minilora", shapes[shape], mode=mode)
    model, batch = starting_tree(job), tokens(job).arrays
    ours = model.loss(batch["ids"], batch["targets"])
    theirs = bench_primitives.loss(model, batch)
    assert abs(ours.item() / theirs.item() - 1) <= 1e-5
    a, b = ours.backward(), theirs.backward()
    assert a.keys() == b.keys()
    for p in a:
        assert np.abs(a[p] - b[p]).max() <= 1e-3 * (1 + np.abs(b[p]).max())


def test_four_bits_stand_under_the_same_adapters():
    lora, qlora = (
        starting_tree(Job("minilora", SHAPES["tiny"], mode=m)) for m in ("lora", "qlora")
    )
    a, b = lora.blocks[0].mlp.up, qlora.blocks[0].mlp.up
    assert np.array_equal(a.A.data, b.A.data)
    assert np.array_equal(a.B.data, b.B.data)
    assert type(freeze(b).base).__name__ == "QuantizedLinear"


def test_operations_are_counted_by_hand_once():
    """One block, width 2, so that every product can be written down."""
    from minilora.lab.bench_shapes import Shape

    shape = Shape(batch=1, time=3, vocab=5, width=2, layers=1, heads=1)
    linears = 2 * 3 * (2 * 6 + 2 * 2 + 2 * 8 + 8 * 2)  # forward: qkv, output, up, down
    head = 2 * 3 * 5 * 2
    attention = 7 * 2 * 6 * 2
    assert flops(Job("minilora", shape, mode="full")) == 3 * (linears + head) + attention
    skinny = 2 * 3 * 8 * 2 * sum((2 + 6, 2 + 2, 2 + 8, 8 + 2))
    back = linears - 2 * 3 * 2 * 6  # no dx below the lowest adapter
    assert flops(Job("minilora", shape)) == linears + back + 2 * head + skinny + attention


# ---------------------------------------------------------------- without torch, in print


@pytest.fixture(scope="module")
def record():
    names = ("torch", "transformers", "peft", "bitsandbytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "missing", lambda: list(names))
        patch.setattr(bench, "TURN", 0.01)
        config = bench.BenchConfig(
            shapes=("tiny",), modes=("lora",), rounds=1, threads=1, patience=0.1,
            baselines=("torch", "primitives", "reference"), quiet=1.0,
        )  # fmt: skip
        return json.loads(json.dumps(bench.bench(config)))


def test_without_torch_it_benches_ourselves_and_says_what_to_install(record):
    (case,) = record["cases"]
    assert [row["contender"] for row in case["rows"]] == ["minilora", "primitives", "reference"]
    assert all(row["passed"] and row["ratio"] > 0 for row in case["rows"][1:])
    assert case["clean"] == 1
    assert case["gflop"] > 0
    assert record["ceilings"]["numpy"] > 1
    assert {"cpu", "cores", "blas", "numpy", "python"} <= set(record["machine"])
    text = bench_report(record)
    assert 'torch, transformers, peft, bitsandbytes: pip install "minilora[peers]"' in text
    assert "our primitives" in text


def test_the_report_refuses_and_owns_up(record):
    other = json.loads(json.dumps(record))
    row = other["cases"][0]["rows"][1]
    row |= {"passed": False, "gap": 0.5}
    del row["ratio"], row["ratio_range"]
    other["cases"][0]["measure"] = "cpu"
    other["cases"][0]["rows"][2]["error"] = "it fell over"
    text = bench_report(other)
    assert "REFUSED" in text
    assert "CPU times on one thread instead" in text
    assert "failed at tiny lora: it fell over" in text


@pytest.mark.parametrize("suite", ["step", "scaling", "memory"])
def test_its_figures(record, tmp_path, suite):
    drawn = json.loads(json.dumps(record))
    drawn["config"]["suite"] = suite
    for case in drawn["cases"]:
        case |= {"axis": "batch", "value": 4}
        for row in case["rows"]:
            row |= {"bytes": 1 << 20, "bytes_ratio": 0.5, "bytes_range": [0.4, 0.6]}
    path = bench_figure(drawn, tmp_path / "bench.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_a_figure_says_of_its_bars(record):
    case, row = record["cases"][0] | {"measure": "wall"}, record["cases"][0]["rows"][1]
    assert (why(row), why({"error": "x"}), why({"passed": False})) == (
        "", "failed", "refused by the gate",
    )  # fmt: skip
    said = lambda *clocks: how(record | {"cases": [case | {"measure": clock} for clock in clocks]})
    assert "up to 1 thread;\nbars: median over 1 clean rounds" in said("wall")
    said_of = how(record | {"cases": [], "ceilings": {"numpy": 476.4, "torch": 213.6},
                            "config": record["config"] | {"suite": "memory"}})  # fmt: skip
    assert "sgemm at 476 : 214 GFLOP/s" in said_of
    assert "no clean window" in said("cpu")
    assert "some by CPU time" in said("wall", "cpu")


def test_no_clean_window_means_cpu_time_on_one_thread(monkeypatch):
    """On a machine that is never quiet all rounds are dropped; then one thread, and it says so."""
    monkeypatch.setattr(bench, "TURN", 0.01)
    config = bench.BenchConfig(rounds=2, threads=2, patience=0.0, quiet=-1.0)
    jobs = [Job(name, SHAPES["tiny"], threads=2) for name in ("minilora", "reference", "blas")]
    case = bench.timed(jobs, config)
    assert (case["measure"], case["dropped"], case["clean"]) == ("cpu", 2, 2)
    assert [row["contender"] for row in case["rows"]] == ["minilora", "reference"]  # no "blas"
    assert [row["working"] for row in case["rows"]] == [1, 1]
    assert case["rows"][1]["ratio"] > 0
    whole = {
        "config": {"suite": "step"}, "gate": bench.GATE, "machine": bench.machine(),
        "missing": [], "ceilings": {}, "cases": [case | {"title": "tiny lora", "threads": 2}],
    }  # fmt: skip
    assert "No clean round for tiny lora: these are CPU times on one thread" in bench_report(whole)


# ------------------------------------------------------------------------------ threads


def test_threads_are_asserted(monkeypatch):
    import threadpoolctl

    def pools(*numbers):
        found = [{"user_api": "blas", "num_threads": n} for n in numbers]
        monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: found)

    pools(1)
    assert expect_threads(2, 2) == 2  # two workers of one
    assert expect_threads(1, 1) == 1
    for numbers, threads, workers in (((1,), 2, 1), ((2,), 2, 2), ((2,), 1, 1), ((), 2, 2)):
        pools(*numbers)
        with pytest.raises(MiniloraError, match=r"expected \d threads in all, found"):
            expect_threads(threads, workers)
    pools(2)
    assert expect_threads(2, 1) == 2  # one worker, and BLAS at two


@pytest.mark.parametrize(
    "contender, kind, n, width", [("minilora", "step", 2, 1), ("blas", "step", 2, 2),
    ("torch", "step", 2, 2), ("bnb", "quantize", 2, 2), ("minilora", "optimizer", 2, 1),
    ("minilora", "generate", 2, 1 if can_fork() else 2), ("blas", "generate", 2, 2),
    ("minilora", "generate", 8, 8)]  # more than heads
)  # fmt: skip
def test_the_width_of_a_product_in_each_worker(contender, kind, n, width):
    assert blas_threads(Job(contender, SHAPES["S0"], kind=kind, threads=n)) == width


@pytest.mark.parametrize(
    "name, kept", [("minilora", True), ("reference", True), ("torch", True), ("stock", False)]
)
def test_who_keeps_large_blocks(name, kept, monkeypatch):
    """All but torch as its users have it: `prepare` decides before it imports anything."""
    called = []

    def import_(*args):
        raise RuntimeError("far enough")

    monkeypatch.setattr(bench_worker, "keep_large_blocks", lambda: called.append(1))
    monkeypatch.setattr(bench_worker, "is_theirs", import_)
    job = asdict(Job(name, SHAPES["tiny"]))
    with pytest.raises(RuntimeError, match="far enough"):
        bench_worker.Answering().prepare(job)
    assert bool(called) == kept


def test_a_record_says_who_chose_the_kernels(monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert "OPENBLAS" not in machine()["blas"]
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert machine()["blas"].endswith(", by OPENBLAS_CORETYPE)")


def test_micro_batches_are_ours_alone_and_the_same_step():
    config = bench.BenchConfig(suite="micro", shapes=("tiny",), baselines=("reference",))
    ((facts, jobs),) = bench.cases(config)
    job = jobs[0]
    assert (facts["title"], job.micro) == ("tiny lora, 2 sequences at a time", 2)
    losses = []
    for micro in (None, 2, 1):
        step = contender(replace(job, micro=micro, threads=1))
        step.build()
        for _ in range(3):
            step.step()
        step.close()
        losses.append(step.losses)
        assert step.pieces == {None: 1, 2: 2, 1: 4}[micro]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)


def test_decoding_is_raced_for_one_row_and_for_eight():
    config = bench.BenchConfig(suite="generate", shapes=("tiny",), baselines=("reference",))
    found = [(facts["title"], jobs[0].shape.batch) for facts, jobs in bench.cases(config)]
    assert found == [("tiny full, batch 1", 1), ("tiny full, batch 8", 8)]


def test_the_suite_of_threads():
    config = bench.BenchConfig(suite="threads", shapes=("tiny",), threads=3, baselines=("blas",))
    found = [(facts["title"], [(j.contender, j.threads) for j in jobs])
             for facts, jobs in bench.cases(config)]  # fmt: skip
    assert found == [
        ("tiny lora, 1 thread", [("minilora", 1)]),
        ("tiny lora, 2 threads", [("minilora", 2), ("blas", 2)]),
        ("tiny lora, 3 threads", [("minilora", 3), ("blas", 3)]),
    ]
    row = lambda name, ms: {"contender": name, "ms": ms}
    cases = [
        {"shape": "S1", "mode": "lora", "measure": "wall", "threads": k, "rows": rows}
        for k, rows in ((1, [row("minilora", 8.0)]), (2, [row("minilora", 5.0), row("blas", 6.0)]))
    ]
    assert speedups({"cases": cases}) == [
        "S1 lora, minilora: 2 threads take 0.62 of the time of one.",
        "S1 lora, minilora, BLAS threads: 2 threads take 0.75 of the time of one.",
    ]


# ----------------------------------------------------------------------- gates that can fail


@pytest.mark.parametrize("change, passed", [({}, True), ({"lr": 1.01e-3}, False)])
def test_the_gate_of_the_optimizer_sees_another_rate(change, passed):
    """One percent of a rate: lost in the weights themselves, not in how far they went."""
    rows = []
    for options in ({}, change):
        job = Job("reference", SHAPES["tiny"], kind="optimizer", threads=1, **options)
        theirs = OurOptimizer(job)
        theirs.build()
        theirs.job = Job("reference", SHAPES["tiny"], kind="optimizer")  # both in the same unit
        values = []
        for _ in range(bench.GATE_STEPS):
            theirs.before()
            theirs.step()
            values.append(theirs.value())
        theirs.close()
        rows.append({"contender": "x", "values": values})
    assert bench.passes(rows[1], rows[0]) == passed


def test_the_gate_of_quantization_sees_one_code():
    codes, scales = np.arange(4096, dtype=np.uint8), np.ones(128, np.float32)
    whole = sums(codes, scales)
    assert sum(whole[:64]) == codes.sum()
    other = codes.copy()
    other[-1] ^= 1
    a, b = ({"contender": "x", "values": [sums(c, scales)]} for c in (other, codes))
    assert not bench.passes(a, b)
    assert bench.passes(dict(b), b)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"suite": "speed"}, "suite: expected some of step"),
        ({"shapes": ("S9",)}, "shapes: .*'S9'"),
        ({"modes": ("half",)}, "modes"),
        ({"baselines": ("jax",)}, "baselines"),
        ({"rounds": 0}, "rounds"),
        ({"threads": 0}, "threads"),
    ],
)
def test_configs_of_no_meaning(options, message):
    with pytest.raises(MiniloraError, match=message):
        bench.BenchConfig(**options)


def test_the_command_refuses_in_one_line():
    command = [sys.executable, "-m", "minilora", "bench", "--suite", "speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.peers
def test_torch_passes_the_gate(monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "TURN", 0.01)
    config = bench.BenchConfig(
        shapes=("tiny",), modes=("lora", "full"), rounds=1, threads=1, patience=0.1,
        baselines=("torch", "stock", "hf"), quiet=1.0,
    )  # fmt: skip
    for case in bench.bench(config)["cases"]:
        assert [row["contender"] for row in case["rows"]] == ["minilora", "torch", "stock", "hf"]
        assert all(row.get("passed", True) and "error" not in row for row in case["rows"])


@pytest.mark.peers
@pytest.mark.parametrize(
    "suite, mode, names",
    [
        ("optimizer", "lora", ["minilora", "torch"]),
        ("optimizer", "full", ["minilora", "torch"]),
        ("quantize", "qlora", ["minilora", "bnb"]),
    ],
)
def test_torch_passes_the_other_gates(suite, mode, names, monkeypatch):
    for name in bench.missing():
        pytest.skip(f"needs {name}")
    monkeypatch.setattr(bench, "TURN", 0.01)
    config = bench.BenchConfig(
        suite=suite, shapes=("S0",), modes=(mode,), rounds=1, threads=2, patience=0.1, quiet=1.0
    )
    (case,) = bench.bench(config)["cases"]
    assert [row["contender"] for row in case["rows"]] == names
    assert [row["working"] for row in case["rows"]] == [2, 2]
    assert all(row["passed"] and "error" not in row for row in case["rows"])
