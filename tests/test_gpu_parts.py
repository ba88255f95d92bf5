"""The parts of the check for a card that train, write, spike and watch: each says what it found,
or why it did not run."""

import os
from dataclasses import replace

import numpy as np
import pytest
from cuda_cpu import fakeblas, fakegraph
from cuda_cpu.checks import kernels  # noqa: F401
from test_gpu_check import QUICK, SMALL, WRITER, each_call_once  # noqa: F401

from minilora.engine import tensor
from minilora.lab import (
    gpu_check,
    gpu_curve,
    gpu_decode,
    gpu_gaps,
    gpu_race,
    gpu_spike,
    gpu_watch,
)
from minilora.lab.bench_ours import whole_loss
from minilora.lab.bench_shapes import SHAPES
from minilora.lab.gpu_report import goals, survived, within
from minilora.optim.pager import Pager

TINY = SHAPES["tiny"]
RIGHT = {"unpaged": "raises", "paged": "survives", "same_bits": True}


@pytest.fixture
def cupy(device, xp):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")
    return xp


@pytest.fixture
def graphs(cupy, kernels):  # noqa: F811
    """Graphs and cuBLAS on the stand-in; a card has its own."""
    if "standin" not in cupy.__version__:
        yield
        return
    with fakeblas.installed() as library, fakegraph.installed(cupy, library):
        yield


# -------------------------------------------------------------------------------- the curve


def test_losses_on_the_device_follow_those_of_the_host(cupy):
    for style, limit in gpu_curve.CURVES.items():
        row = gpu_curve.loss_curve(style, 12, 0)
        assert within(row), row
        assert row["limit"] == limit
        assert row["repeats"]
        assert len(row["host"]) == len(row["device"]) == 12
        assert row["device"][-1] < row["device"][0] - 0.1  # it learns: there is a curve to follow
        assert np.allclose(row["host"], row["device"], rtol=limit)


def test_a_wrong_gradient_is_seen_in_the_losses(cupy, monkeypatch):
    right = tensor.add.specification
    wrong = lambda xp, a, b: (right(xp, a, b)[0], (lambda g: g, lambda g: 0.9 * g))
    monkeypatch.setitem(tensor.add.fast, "cupy", wrong)
    row = gpu_curve.loss_curve("llama", 12, 0)
    assert row["repeats"]
    assert not within(row)


def test_a_device_that_does_not_repeat_is_seen(cupy, monkeypatch):
    draws = iter(range(100))
    losses = lambda model, batch, rng: whole_loss(model, batch) * (1 + 1e-6 * next(draws))
    monkeypatch.setattr(gpu_curve, "whole_loss", losses)
    assert not gpu_curve.loss_curve("llama", 2, 0)["repeats"]


# ------------------------------------------------------------------------------ the tokens


def test_other_tokens_fail_the_check(cupy, monkeypatch):
    def stale(xp, function):
        value = function()
        return lambda: value

    monkeypatch.setattr(gpu_decode, "replayed", stale)
    record = gpu_check.gpu_check(SMALL)
    assert not any(row["same_tokens"] for row in record["decoding"])
    assert not record["passed"]
    assert [row["why_eager"] for row in record["decoding"]][1::2] == ["cupy captures nothing"] * 4
    assert ["the same tokens captured", "yes", "no", "no"] in goals(record)


# ------------------------------------------------------------------------------- the spike


def test_a_spike_is_survived_by_paging_alone(cupy):
    assert gpu_spike.memory_spike(cupy, 250) == RIGHT
    assert survived(RIGHT)


def test_pages_that_keep_their_room_do_not_survive(cupy, monkeypatch):
    monkeypatch.setattr(Pager, "shrink", lambda self, slots: None)
    with pytest.raises(MemoryError):
        gpu_spike.memory_spike(cupy, 250)
    record = gpu_check.gpu_check(QUICK)
    assert "spike" in record["errors"]
    assert not record["passed"]


@pytest.mark.usefixtures("cupy")
def test_a_limit_that_is_none_is_seen(cupy, monkeypatch):
    pool = cupy.get_default_memory_pool()
    if "standin" not in cupy.__version__:
        pytest.skip("for the stand-in")
    monkeypatch.setattr(pool, "set_limit", lambda size: None)
    found = gpu_spike.memory_spike(cupy, 250)
    assert found["unpaged"] == found["paged"] == "fits"
    assert not survived(found)


# ------------------------------------------------------------------------------ the watch

SAYS = {
    "clean": ('echo "========= ERROR SUMMARY: 0 errors"', {"clean": True}),
    "a finding": ('echo "========= Invalid read"; echo "========= ERROR SUMMARY: 1 error"; exit 86',
                  {"clean": False}),
    "no start": ('echo "========= Error: no permission"; exit 1',
                 {"not run": "Error: no permission"}),
    "too long": ("sleep 60", {"not run": "not done within 1 s"}),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="a script of the shell")
@pytest.mark.parametrize("says", SAYS)
def test_what_compute_sanitizer_says(says, tmp_path, monkeypatch):
    script, wanted = SAYS[says]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\n[ "$2" = memcheck ] && [ "$5" = run ] || exit 3\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = gpu_watch.watched("memcheck", ["run"], lambda: 1.0)
    assert wanted.items() <= found.items()
    if says == "a finding":
        assert "Invalid read" in found["said"]


@pytest.mark.skipif(os.name != "posix", reason="a script of the shell")
def test_ctrl_c_leaves_nothing_running(tmp_path, monkeypatch):
    tool, started = tmp_path / "compute-sanitizer", []
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    class Pressed(gpu_watch.subprocess.Popen):
        def communicate(self, timeout=None):
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            return super().communicate(timeout)

    monkeypatch.setattr(gpu_watch.subprocess, "Popen", Pressed)
    with pytest.raises(KeyboardInterrupt):
        gpu_watch.watched("memcheck", ["run"])
    left = started[0].poll() is None
    started[0].kill()
    assert not left


def test_where_there_is_none_it_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_watch.shutil, "which", lambda name, path: None)
    found = gpu_watch.watched("racecheck", [])
    assert found == {"tool": "racecheck", "not run": "compute-sanitizer is not installed"}


def test_a_finding_fails_the_check(cupy, monkeypatch):
    finding = lambda tool, command, left: {"tool": tool, "clean": tool == "racecheck", "said": ""}
    monkeypatch.setattr(gpu_check, "watched", finding)
    record = gpu_check.gpu_check(replace(QUICK, watch=True))
    assert not record["passed"]
    assert ["compute-sanitizer, memcheck", "yes", "no", "no"] in goals(record)
    assert ["compute-sanitizer, racecheck", "yes", "yes", "yes"] in goals(record)


def test_what_it_watches_fails_on_a_wrong_rule(cupy, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_gaps.small()
    assert end.value.code == 0
    assert "the worst gap" in capsys.readouterr().out
    wrong = lambda xp, a, b: (a * b, (lambda g: g * b, lambda g: (g * a * 1.001).sum((0, 1))))
    monkeypatch.setitem(tensor.mul.fast, "cupy", wrong)
    with pytest.raises(SystemExit) as end:
        gpu_gaps.small()
    assert end.value.code == 1


# ------------------------------------------------------------------------- the short table


def test_what_holds_and_what_was_not_run():
    race = lambda name, *rows: [{"race": name, "step": step} | row for step, row in rows]
    eager, compiled = gpu_race.EAGER, gpu_race.COMPILED
    _, captured, coded = gpu_race.OURS
    curve = {"curve": "LoRA, bf16", "device": [2.0, 1.0], "gap": 3e-2, "limit": 2e-2}
    record = {
        "ops": [{"gap": 3e-7, "repeats": True}], "codes": [], "optimizers": [],
        "steps": [{"gap": 2e-5, "repeats": True}], "timing": [{"same_bits": None}],
        "curves": [curve | {"repeats": True}],
        "decoding": [{"decoding": "NF4, captured", "tokens_s": 512.4, "same_tokens": True}],
        "spike": RIGHT, "races": ["bf16, 8 x 512", "bf16, 16 x 1024", "float32, 8 x 512"],
        "race": [
            *race("bf16, 8 x 512", (captured, {"ms": 8.0, "bytes": 7}),
                  (coded, {"ms": 9.0, "bytes": 5}), (eager, {"ms": 10.0, "bytes": 10}),
                  (compiled, {"not run": "no triton"})),
            *race("float32, 8 x 512", (captured, {"ms": 8.0, "bytes": 9}),
                  (coded, {"ms": 12.0, "bytes": 5}), (eager, {"ms": 10.0, "bytes": 10}),
                  (compiled, {"ms": 8.0, "bytes": 1})),
        ],
        "kernels": [{"kernel": "adamw", "of_copy": 0.9}, {"kernel": "nf4 dequantize",
                                                          "left out": "no time"}],
        "products": [
            {"product": "attention", "dtype": "float32", "tflop_s": 20.0},
            {"product": "attention, there and back", "dtype": "bf16", "tflop_s": 30.0},
            {"product": "attention", "dtype": "bf16", "tflop_s": 149.0},
        ],
        "watch": [{"tool": "memcheck", "not run": "not installed"}],
    }  # fmt: skip
    found = {row[0]: row[1:] for row in goals(record)}
    assert found["worst gap to float64"] == ["<= 1e-05", "2e-05", "no"]
    assert found["the same in bf16"] == ["<= 1e-02", "-", "not run"]
    assert found["losses of 2 steps, LoRA, bf16"] == ["<= 2e-02", "3e-02", "no"]
    assert found["the same bits run after run"] == ["yes", "yes", "yes"]
    assert found["the same bits captured"] == ["yes", "-", "not run"]
    theirs, nf4 = "step of torch eager", "QLoRA step of LoRA step, time"
    assert found[f"bf16, 8 x 512: {theirs}, time"] == ["<= 0.70", "0.80", "no"]
    assert found[f"bf16, 8 x 512: {theirs}, memory"] == ["<= 0.70", "0.70", "yes"]
    assert found["bf16, 8 x 512: step of torch.compile, time"][2] == "not run: no triton"
    assert found[f"bf16, 8 x 512: {nf4}"] == ["<= 1.25", "1.12", "yes"]
    assert found[f"bf16, 16 x 1024: {theirs}, time"] == ["<= 0.70", "-", "not run"]
    assert found[f"float32, 8 x 512: {theirs}, time"] == ["<= 0.90", "0.80", "yes"]
    assert found[f"float32, 8 x 512: {theirs}, memory"] == ["<= 0.90", "0.90", "yes"]
    assert found["float32, 8 x 512: step of torch.compile, time"] == ["<= 1.00", "1.00", "yes"]
    assert found[f"float32, 8 x 512: {nf4}"] == ["<= 1.25", "1.50", "no"]
    assert found["adamw, of a copy's GB/s"] == [">= 0.85", "0.90", "yes"]
    assert found["nf4 dequantize, of a copy's GB/s"] == [">= 0.80", "-", "not run"]
    assert found["nf4 product, 1 row, bf16, of a copy's GB/s"] == [">= 0.70", "-", "not run"]
    assert found["attention in bf16, TFLOP/s"] == [">= 150", "149", "no"]
    assert found["decoding, NF4, captured, tokens/s"] == ["known", "512", "yes"]
    assert found["compute-sanitizer, memcheck"] == ["yes", "-", "not run: not installed"]


# ------------------------------------------- with kernels from here on, which takes longer


def test_tokens_a_second(cupy, graphs):
    rows = gpu_decode.decode_speeds(cupy, WRITER, 8)
    assert [row["decoding"] for row in rows] == [
        "float32, eager", "float32, captured", "NF4, eager", "NF4, captured",
        "bf16, eager", "bf16, captured", "NF4 under bf16, eager", "NF4 under bf16, captured",
    ]  # fmt: skip
    assert all(row["same_tokens"] and row["tokens_s"] > 0 for row in rows)
    assert [row["why_eager"] for row in rows] == [None] * 8
    assert (
        len(
            {
                r
                for row in gpu_decode.timed(
                    cupy, gpu_decode.drawn_model(cupy, WRITER.model), [[1], [2]], 8, None
                )[0]
                for r in row
            }
        )
        > 3
    )
    C, inner, V = 32, 64, 29
    linears = C * (2 * C + C + 3 * inner)  # q, o; k and v of half the heads
    assert rows[0]["bytes"] == 4 * (linears + 3 * C + V * C)
    assert rows[2]["bytes"] < rows[0]["bytes"] - 3 * linears
    assert rows[4]["bytes"] == 2 * linears + 4 * 3 * C + 2 * V * C
    assert rows[6]["bytes"] == rows[2]["bytes"] - 2 * V * C  # the head
