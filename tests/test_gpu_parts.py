"""The parts of the check for a card that race, write, spike and watch: each says what it found, or
why it did not run."""

import os
from dataclasses import replace

import numpy as np
import pytest
from cuda_cpu import fakeblas, fakegraph
from cuda_cpu.checks import kernels  # noqa: F401
from test_gpu_check import SMALL, WRITER

from minilora.engine import tensor
from minilora.engine.errors import MiniloraError
from minilora.lab import gpu_check, gpu_decode, gpu_race, gpu_spike, gpu_watch
from minilora.lab.bench_ours import whole_loss
from minilora.lab.bench_shapes import SHAPES, Job, starting_tree, tokens
from minilora.lab.gpu_report import goals, gpu_report, survived
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


# -------------------------------------------------------------------------------- the race


def test_without_torch_the_race_says_so_and_the_check_passes(cupy, monkeypatch):
    monkeypatch.setattr(gpu_race, "missing", list)
    record = gpu_check.gpu_check(replace(SMALL, race=TINY, rank=4))
    assert record["passed"], gpu_report(record)
    missing = "torch, peft, transformers not installed"
    assert [row.get("not run") for row in record["race"]] == [None] * 3 + [missing] * 2
    assert f"not run: {missing}" in gpu_report(record)


def test_torch_has_so_much_time_and_no_more(monkeypatch):
    monkeypatch.setattr(gpu_race, "missing", lambda names: [])
    for limit, left in ((0.1, 9.0), (9.0, 0.1)):
        row = gpu_race.torch_step(Job("torch", TINY, device="cuda"), 1, limit, lambda n=left: n)
        assert row == {"not run": "not done within 0 s"}


@pytest.mark.peers
def test_torch_without_a_card_says_so():
    row = gpu_race.torch_step(Job("torch", TINY, device="cuda"), 1, 100)
    assert "torch finds no CUDA device" in row["not run"]


@pytest.mark.peers
@pytest.mark.parametrize("shape", [TINY, replace(TINY, key_heads=1, hidden=64)], ids=str)
def test_torch_starts_from_our_loss(shape):
    job = Job("torch", shape, rank=4)
    batch, scored = tokens(job).take(np.arange(shape.batch))
    ours = float(whole_loss(starting_tree(job), batch).data) / scored
    theirs = gpu_race.torch_step(job, 2, 100)
    assert theirs["ms"] > 0
    assert "peft" in theirs["versions"]
    assert abs(theirs["loss"] - ours) < 1e-5 * ours


def test_the_race_in_print():
    rows = [{"step": "minilora, captured", "ms": 3.0, "bytes": 2e9, "loss": 1.0},
            {"step": "torch + PEFT, eager", "ms": 4.0, "bytes": 8e9, "loss": 1.0},
            {"step": "torch + PEFT, torch.compile", "not run": "no time"}]  # fmt: skip
    table = gpu_race.race_rows(rows)
    assert table[1] == ["minilora, captured", "3.00", "0.75", "2000", "0.25", "1.00000"]
    assert table[3][-1] == "not run: no time"
    rows[0]["why_eager"] = "a wait"
    assert gpu_race.race_rows(rows)[1][0] == "minilora, captured, eager: a wait"
    assert gpu_race.race_rows(rows[:1])[1][2] == "-"


# ------------------------------------------------------------------------------ the tokens


def test_other_tokens_fail_the_check(cupy, monkeypatch):
    def stale(xp, function):
        value = function()
        return lambda: value

    monkeypatch.setattr(gpu_decode, "replayed", stale)
    record = gpu_check.gpu_check(SMALL)
    assert not any(row["same_tokens"] for row in record["decoding"])
    assert not record["passed"]
    assert [row["why_eager"] for row in record["decoding"]][1::2] == ["cupy captures nothing"] * 2
    assert ["the same tokens captured", "yes", "no", "no"] in goals(record)


# ------------------------------------------------------------------------------- the spike


def test_a_spike_is_survived_by_paging_alone(cupy):
    assert gpu_spike.memory_spike(cupy, 250) == RIGHT
    assert survived(RIGHT)


def test_pages_that_keep_their_room_do_not_survive(cupy, monkeypatch):
    monkeypatch.setattr(Pager, "shrink", lambda self, slots: None)
    with pytest.raises(MemoryError):
        gpu_spike.memory_spike(cupy, 250)
    record = gpu_check.gpu_check(SMALL)
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
    record = gpu_check.gpu_check(replace(SMALL, watch=True))
    assert not record["passed"]
    assert ["compute-sanitizer, memcheck", "yes", "no", "no"] in goals(record)
    assert ["compute-sanitizer, racecheck", "yes", "yes", "yes"] in goals(record)


def test_what_it_watches_fails_on_a_wrong_rule(cupy, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.small()
    assert end.value.code == 0
    assert "the worst gap" in capsys.readouterr().out
    wrong = lambda xp, a, b: (a * b, (lambda g: g * b, lambda g: (g * a * 1.001).sum((0, 1))))
    monkeypatch.setitem(tensor.mul.fast, "cupy", wrong)
    with pytest.raises(SystemExit) as end:
        gpu_check.small()
    assert end.value.code == 1


# ------------------------------------------------------------------------- the short table


def test_what_holds_and_what_was_not_run():
    record = {
        "ops": [{"gap": 3e-7, "repeats": True}], "codes": [], "optimizers": [],
        "steps": [{"gap": 2e-5, "repeats": True}], "timing": [{"same_bits": None}],
        "decoding": [], "spike": RIGHT,
        "race": [{"step": "minilora, captured", "ms": 8.0, "bytes": 9},
                 {"step": "minilora, captured, NF4 base", "ms": 12.0, "bytes": 5},
                 {"step": "torch + PEFT, eager", "ms": 10.0, "bytes": 10},
                 {"step": "torch + PEFT, torch.compile", "not run": "no triton"}],
        "kernels": [{"kernel": "adamw", "of_copy": 0.9}, {"kernel": "nf4 dequantize",
                                                          "left out": "no time"}],
        "watch": [{"tool": "memcheck", "not run": "not installed"}],
    }  # fmt: skip
    found = {row[0]: row[1:] for row in goals(record)}
    assert found["worst gap to float64"] == ["<= 1e-05", "2e-05", "no"]
    assert found["the same bits run after run"] == ["yes", "yes", "yes"]
    assert found["the same bits captured"] == ["yes", "-", "not run"]
    assert found["captured step of torch eager: time"] == ["<= 0.90", "0.80", "yes"]
    assert found["captured step of torch eager: memory"] == ["<= 0.90", "0.90", "yes"]
    assert found["captured step of torch torch.compile: time"][2] == "not run: no triton"
    assert found["QLoRA step of LoRA step: time"] == ["<= 1.25", "1.50", "no"]
    assert found["adamw, of a copy's GB/s"] == [">= 0.85", "0.90", "yes"]
    assert found["nf4 dequantize, of a copy's GB/s"] == [">= 0.80", "-", "not run"]
    assert found["compute-sanitizer, memcheck"] == ["yes", "-", "not run: not installed"]


def test_a_worker_that_cannot_says_why(monkeypatch):
    def refuse(self):
        raise MiniloraError("no triton")

    monkeypatch.setattr(gpu_race, "missing", lambda names: [])
    monkeypatch.setattr(gpu_race.Worker, "prepare", refuse)
    row = gpu_race.torch_step(Job("compile", TINY, device="cuda"), 1, 60)
    assert row == {"not run": "no triton"}


# ------------------------------------------- with kernels from here on, which takes longer


def test_our_steps_start_from_one_loss(cupy, graphs):
    calls = dict(gpu_race.racers(cupy, TINY, 4, 3, lambda: 1.0))
    found = [{"step": name} | calls[name]() for name in list(calls)[:3]]
    assert [row["step"] for row in found] == [
        "minilora, eager", "minilora, captured", "minilora, captured, NF4 base",
    ]  # fmt: skip
    assert all(row["why_eager"] is None and row["ms"] > 0 for row in found)
    assert found[0]["loss"] == found[1]["loss"] != found[2]["loss"]
    assert found[0]["bytes"] > 0
    assert gpu_race.losses_agree(found)
    assert not gpu_race.losses_agree([*found, {"step": "torch", "loss": found[0]["loss"] * 1.01}])


def test_tokens_a_second(cupy, graphs):
    rows = gpu_decode.decode_speeds(cupy, WRITER, 8)
    assert [row["decoding"] for row in rows] == [
        "float32, eager", "float32, captured", "NF4, eager", "NF4, captured",
    ]  # fmt: skip
    assert all(row["same_tokens"] and row["tokens_s"] > 0 for row in rows)
    assert [row["why_eager"] for row in rows] == [None] * 4
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
