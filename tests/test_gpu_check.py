"""The check for a card runs, and catches what it is there to catch, on the stand-in."""

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import standin
from cuda_cpu import fakeblas, fakegraph
from cuda_cpu.checks import kernels  # noqa: F401

from minilora import MiniloraError
from minilora.engine import tensor
from minilora.engine.loss import cross_entropy
from minilora.engine.rules import wide
from minilora.engine.tensor import Op
from minilora.lab import gpu_check, gpu_gaps
from minilora.lab import gpu_speed as speed
from minilora.lab.bench_shapes import Shape
from minilora.lab.gpu_report import gpu_report
from minilora.lab.gpu_speed import milliseconds
from minilora.lab.op_samples import SAMPLES

WRITER = Shape(batch=2, time=20, vocab=29, width=32, layers=1, heads=4, key_heads=2, hidden=64)
SMALL = gpu_check.GpuCheckConfig(width=32, layers=1, length=16, batch=2, rounds=2, size=1 << 14,
                                 product=16, race=(), decode=WRITER, new_tokens=8, spike=250,
                                 curve=2, watch=False)  # fmt: skip
QUICK = replace(SMALL, decode=None, curve=0)


@pytest.fixture(autouse=True)
def each_call_once(monkeypatch):
    """What is timed is called once, and said to take a millisecond."""
    monkeypatch.setattr(speed, "milliseconds", lambda cupy, call: (call(), 1.0)[1])


def engine_ops() -> set[str]:
    modules = [m for name, m in sys.modules.items() if name.startswith("minilora.engine.")]
    return {v.__name__ for m in modules for v in vars(m).values() if isinstance(v, Op)}


def test_every_op_has_a_sample():
    assert {sample.op.__name__ for sample in SAMPLES} == engine_ops()


def test_without_a_device_it_says_so_and_is_no_failure(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    record = gpu_check.gpu_check(SMALL)
    assert "not installed" in record["skipped"]
    assert "skipped" in gpu_report(record)
    bare = ModuleType("cupy")
    bare.cuda = ModuleType("cupy.cuda")
    bare.cuda.runtime = ModuleType("cupy.cuda.runtime")
    bare.cuda.runtime.getDeviceCount = lambda: 0
    monkeypatch.setitem(sys.modules, "cupy", bare)
    assert "no device" in gpu_check.gpu_check(SMALL)["skipped"]


@pytest.fixture(scope="module")
def record(device):
    """Of a whole check, where atomics add in whatever order they come."""
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    with standin.disordered():
        return gpu_check.gpu_check(SMALL)


def test_it_passes_on_the_stand_in(record):
    assert record["passed"], gpu_report(record)
    assert json.loads(json.dumps(record))["passed"]
    assert "passed" in gpu_report(record)


def test_a_wrong_rule_on_the_device_fails_it(device, monkeypatch):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    wrong = lambda xp, a, b: (a * b, (lambda g: g * b, lambda g: (g * a * 1.001).sum((0, 1))))
    monkeypatch.setitem(tensor.mul.fast, "cupy", wrong)
    record = gpu_check.gpu_check(QUICK)
    assert not record["passed"]
    bad = [row for row in record["ops"] if not gpu_check.within(row)]
    assert [(row["op"], row["rules"]) for row in bad] == [("mul", "fast")]
    assert "FAILED" in gpu_report(record)


def test_a_wrong_rule_for_bf16_fails_it(device, monkeypatch):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    mul = tensor.mul.specification
    wrong = lambda xp, a, b: tensor.mul.rounded(mul(xp, 1.02 * wide(a), wide(b)), (a, b))
    monkeypatch.setitem(tensor.mul.fast, "cupy bf16", wrong)
    rows = [gpu_gaps.op_gap(s, np.random.default_rng(0), "bf16") for s in SAMPLES
            if s.op.__name__ in ("mul", "sub")]  # fmt: skip
    assert {row["op"]: gpu_check.within(row) for row in rows} == {"mul": False, "sub": True}
    assert all(row["limit"] == 1e-2 for row in rows)


@pytest.mark.usefixtures("kernels")
def test_a_sum_by_atomics_need_not_repeat_but_ours_does(device):
    (sample,) = [s for s in SAMPLES if s.op.__name__ == "embedding"]
    with standin.disordered():
        rows = {rules: gpu_gaps.op_gap(sample, np.random.default_rng(0), rules)
                for rules in ("specification", "fast", "bf16")}  # fmt: skip
    assert {rules: row["repeats"] for rules, row in rows.items()} == {
        "specification": None, "fast": True, "bf16": True,
    }  # fmt: skip
    assert all(map(gpu_check.within, rows.values()))


def test_a_seed_below_zero_is_refused_before_anything_runs():
    with pytest.raises(MiniloraError, match="seed: expected a whole number >= 0, found -1"):
        gpu_check.GpuCheckConfig(seed=-1)


def test_a_step_is_checked_where_rounding_is_not_felt(device):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    for seed in range(2):
        assert gpu_gaps.step_gap("gpt2", seed)["gap"] < 5e-7


def test_the_command_writes_the_record_and_its_figures(record, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from minilora.cli import main

    monkeypatch.setattr(gpu_check, "gpu_check", lambda config: record)
    assert main(["gpu-check", "--out", str(tmp_path / "gpu")]) == 0
    assert json.loads((tmp_path / "gpu" / "gpu_check.json").read_text())["passed"]
    drawn = {path.name for path in (tmp_path / "gpu").glob("*.png")}
    assert drawn == {"gpu_kernels.png", "gpu_curves.png"}  # there was no race
    said = capsys.readouterr().out
    assert all(name in said for name in ("gpu_check.json", *drawn))


def test_the_command_says_skipped_and_exits_with_zero(device, monkeypatch, tmp_path, capsys):
    from minilora.cli import main

    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["gpu-check", "--out", str(tmp_path / "gpu")]) == 0
    assert "gpu-check skipped: CuPy is not installed" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()


# ------------------------------------------------------------------------ what is fast


@pytest.fixture
def cupy(device, xp):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    return xp


def test_the_record_holds_rates_and_costs(cupy, record):
    rates = {row["kernel"]: row for row in record["kernels"]}
    assert rates["copy"]["of_copy"] == 1
    assert {
        "adamw",
        "nf4 dequantize",
        "layer_norm, there and back",
        "rope",
        "nf4 product, 1 row, double",
    } <= rates.keys()
    moved = dict((name, size) for name, size, _ in speed.kernels_of(cupy, SMALL.size))
    for name, row in rates.items():
        assert row["gb_s"] * row["ms"] * 1e6 == pytest.approx(moved[name])
    assert moved["copy"] == 2 * SMALL.size
    assert moved["adamw"] == 7 * SMALL.size
    assert moved["nf4 dequantize"] == SMALL.size * (1 + 1 / 8 + 1 / 64)
    of_codes = SMALL.size * (1 / 2 + 1 / 16) + 4 * 4096 + 4 * SMALL.size // 4096
    assert moved["nf4 product, 1 row"] == of_codes
    for name in ("rms_norm", "layer_norm, there and back", "gelu", "swiglu", "rope"):
        assert 2 * moved[f"{name}, bf16"] == moved[name]
    assert moved["nf4 dequantize, bf16"] == moved["nf4 dequantize"] - SMALL.size / 2
    assert moved["nf4 product, 1 row, bf16"] == of_codes - (4 * 4096 + 4 * SMALL.size // 4096) / 2
    assert all(row["tflop_s"] > 0 for row in record["products"])
    assert {(row["product"], row["dtype"]) for row in record["products"]} >= {
        ("CuPy", "float32"), ("attention", "float32"), ("attention", "bf16"),
        ("attention, there and back", "bf16"),
    }  # fmt: skip
    assert {row["dtype"] for row in record["products"] if row["product"] == "CuPy"} == {"float32"}
    assert "an op (rms_norm)" in record["launches"]
    assert [row["to_host"] + row["to_device"] for row in record["timing"]] == [0] * 5
    report = gpu_report(record)
    for word in ("of a copy", "TFLOP/s", "us of the host", "captured ms"):
        assert word in report


def test_a_call_is_timed(cupy):
    assert 2 <= milliseconds(cupy, lambda: time.sleep(0.002), least=0.004) < 100


def test_what_does_not_fit_in_the_time_is_named(cupy):
    record = gpu_check.gpu_check(gpu_check.GpuCheckConfig(seconds=-1))
    assert record["ops"] == record["steps"] == record["kernels"] == []
    assert {"kernels", "products", "launches", "steps, qlora bf16", "losses, bf16", "spike",
            "decoding", "bf16, 8 x 512: minilora, captured", "bf16, 16 x 1024: torch + PEFT, eager",
            "float32, 8 x 512: torch + PEFT, torch.compile", "compute-sanitizer, racecheck",
            } <= set(record["left_out"])  # fmt: skip
    assert not record["passed"]
    report = gpu_report(record)
    assert "left out, for want of time" in report
    assert "FAILED" in report
    found = speed.kernel_speeds(cupy, 1 << 14, lambda: True)
    assert {row["left out"] for row in found} == {"no time"}


def test_a_part_that_raises_is_recorded_and_the_others_run(cupy, monkeypatch):
    def broken(cupy, count):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(speed, "launch_costs", broken)
    record = gpu_check.gpu_check(QUICK)
    assert record["errors"] == {"launches": "RuntimeError: an illegal memory access"}
    assert record["kernels"]
    assert not record["passed"]
    assert "ERROR in launches" in gpu_report(record)


def test_crossings_are_counted_once_each_and_no_longer_afterwards(cupy):
    before = (cupy.asarray, cupy.ndarray.get, cupy.ndarray.item)
    a = cupy.zeros(3)
    with speed.crossings(cupy) as counts:
        assert counts == {"to_host": 0, "to_device": 0, "unwatched": 0}
        float(a.sum())
        a.get()
        bool(a[0] > 0)
        a.sum().item()
        assert counts["to_host"] == 4
        cupy.asarray(np.ones(3))
        cupy.array([1.0, 2.0])
        a.set(np.ones(3))
        assert counts["to_device"] == 3
        cupy.asarray(a)
        cupy.asarray(2.0)
        assert counts["to_device"] == 3
    a.get()
    assert counts["to_host"] == 4
    assert (cupy.asarray, cupy.ndarray.get, cupy.ndarray.item) == before


def test_a_step_that_waits_fails_it(cupy, monkeypatch):
    def waiting(model, batch, rng):
        value = model.loss(batch["ids"], batch["ids"])
        float(value.data)
        return value

    monkeypatch.setattr(speed, "loss_of", waiting)
    record = gpu_check.gpu_check(QUICK)
    assert [row["to_host"] for row in record["timing"]] == [1] * 5
    assert not record["passed"]


def by_logits(model, batch, rng):
    return cross_entropy(model(batch["ids"]), targets=batch["ids"])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("style", ["gpt2", "qlora", "bf16", "qlora bf16"])
def test_eager_and_captured_steps_are_compared(cupy, style, monkeypatch):
    monkeypatch.setattr(speed, "loss_of", by_logits)
    model = gpu_gaps.model_for(style, 32, 1, 16)
    make = lambda: gpu_gaps.tree_to_device(model, "cuda")
    with fakes(cupy):
        entry = speed.step_times(cupy, make, (4, 16), 2)
        assert entry["why_eager"] is None
        assert entry["same_bits"] is True
        assert entry["captured_ms"] > 0
        assert entry["to_host"] == entry["to_device"] == 0


@pytest.mark.usefixtures("kernels")
def test_with_kernels_there_are_more_rates(cupy):
    with fakes(cupy):
        costs = speed.launch_costs(cupy, 3)
        assert {"a kernel", "a product of ours", "a graph of 20 kernels"} <= costs.keys()
        found = speed.product_speeds(cupy, 16, lambda: False)
        assert {(row["product"], row["dtype"]) for row in found} >= {
            ("cuBLAS", "float32"), ("cuBLAS", "bf16"), ("attention", "bf16"),
        }  # fmt: skip
        rows = speed.kernel_speeds(cupy, 1 << 13, lambda: False)
        assert {"rope, bf16", "nf4 dequantize, bf16", "nf4 product, 8 rows, bf16"} <= {
            row["kernel"] for row in rows
        }


@contextmanager
def fakes(cupy):
    """cuBLAS and graphs on the stand-in; a card has its own."""
    if "standin" not in cupy.__version__:
        yield
        return
    raw = cupy.RawModule
    with fakeblas.installed() as library, fakegraph.installed(cupy, library):
        assert sys.modules["cupy"].RawModule is raw
        yield
