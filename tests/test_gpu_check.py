"""The check for a card runs, and catches what it is there to catch, on the stand-in."""

import json
import sys
from types import ModuleType

import pytest

from minilora.engine import tensor
from minilora.engine.tensor import Op
from minilora.lab import gpu_check
from minilora.lab.op_samples import SAMPLES

SMALL = gpu_check.GpuCheckConfig(width=32, layers=1, length=16, batch=2, rounds=2)


def engine_ops() -> set[str]:
    modules = [m for name, m in sys.modules.items() if name.startswith("minilora.engine.")]
    return {v.__name__ for m in modules for v in vars(m).values() if isinstance(v, Op)}


def test_every_op_has_a_sample():
    assert {sample.op.__name__ for sample in SAMPLES} == engine_ops()


def test_without_a_device_it_says_so_and_is_no_failure(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    record = gpu_check.gpu_check(SMALL)
    assert "not installed" in record["skipped"]
    assert "skipped" in gpu_check.gpu_report(record)
    bare = ModuleType("cupy")
    bare.cuda = ModuleType("cupy.cuda")
    bare.cuda.runtime = ModuleType("cupy.cuda.runtime")
    bare.cuda.runtime.getDeviceCount = lambda: 0
    monkeypatch.setitem(sys.modules, "cupy", bare)
    assert "no device" in gpu_check.gpu_check(SMALL)["skipped"]


def test_it_passes_on_the_stand_in(device):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    record = gpu_check.gpu_check(SMALL)
    assert record["passed"], gpu_check.gpu_report(record)
    assert json.loads(json.dumps(record))["passed"]
    assert "passed" in gpu_check.gpu_report(record)


def test_a_wrong_rule_on_the_device_fails_it(device, monkeypatch):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    wrong = lambda xp, a, b: (a * b, (lambda g: g * b, lambda g: (g * a * 1.001).sum((0, 1))))
    monkeypatch.setitem(tensor.mul.fast, "cupy", wrong)
    record = gpu_check.gpu_check(SMALL)
    assert not record["passed"]
    bad = [row for row in record["ops"] if row["gap"] > gpu_check.TOLERANCE]
    assert [(row["op"], row["rules"]) for row in bad] == [("mul", "fast")]
    assert "FAILED" in gpu_check.gpu_report(record)


def test_the_command_says_skipped_and_exits_with_zero(device, monkeypatch, tmp_path, capsys):
    from minilora.cli import main

    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["gpu-check", "--out", str(tmp_path / "gpu")]) == 0
    assert "gpu-check skipped: CuPy is not installed" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()
