"""The race against torch: who runs, from which weights, in how much time, and how it is told."""

from dataclasses import replace

import numpy as np
import pytest
from cuda_cpu.checks import kernels  # noqa: F401
from test_gpu_check import QUICK, each_call_once  # noqa: F401
from test_gpu_parts import cupy, graphs  # noqa: F401

from minilora.engine.bf16 import BFLOAT16
from minilora.engine.errors import MiniloraError
from minilora.engine.rounding import cast_array
from minilora.engine.rules import wide
from minilora.engine.tensor import Tensor
from minilora.lab import gpu_check, gpu_figures, gpu_race
from minilora.lab.bench_ours import whole_loss
from minilora.lab.bench_shapes import DTYPES, SHAPES, Job, starting_tree, tokens
from minilora.lab.gpu_report import gpu_report
from minilora.model.module import tensors

TINY = SHAPES["tiny"]


@pytest.mark.usefixtures("cupy")
def test_without_torch_the_race_says_so_and_the_check_passes(monkeypatch):
    monkeypatch.setattr(gpu_race, "missing", list)
    record = gpu_check.gpu_check(replace(QUICK, race=((TINY, "float32"), (TINY, "bf16")), rank=4))
    assert record["passed"], gpu_report(record)
    missing = "torch, peft, transformers not installed"
    assert record["races"] == ["float32, 4 x 16", "bf16, 4 x 16"]
    ran = [row.get("not run") for row in record["race"]]
    assert ran == [None] * 6 + [missing] * 4
    assert {row["step"] for row in record["race"][-2:]} == {gpu_race.COMPILED}
    assert record["race"][-1]["race"] == "float32, 4 x 16"  # the least wanted comes last
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [TINY, replace(TINY, key_heads=1, hidden=64)], ids=str)
def test_torch_starts_from_our_loss(shape, dtype):
    job = Job("torch", shape, rank=4, dtype=dtype)
    batch, scored = tokens(job).take(np.arange(shape.batch))
    ours = float(whole_loss(starting_tree(job), batch).data) / scored
    theirs = gpu_race.torch_step(job, 2, 100)
    assert theirs["ms"] > 0
    assert "peft" in theirs["versions"]
    assert abs(theirs["loss"] - ours) < {"float32": 1e-5, "bf16": 1e-3}[dtype] * ours


@pytest.mark.peers
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_holds_its_base_in_the_precision_of_the_job(dtype):
    import torch

    from minilora.lab.bench_torch import TheirStep

    step = TheirStep(Job("torch", TINY, rank=4, dtype=dtype))
    step.build()
    frozen = {p.dtype for p in step.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16 if dtype == "bf16" else torch.float32}
    assert {p.dtype for p in step.model.parameters() if p.requires_grad} == {torch.float32}
    assert step.model(step.ids).dtype in frozen
    assert step.mean_loss().dtype == torch.float32


def test_in_bf16_all_start_from_the_same_rounded_weights():
    job = Job("minilora", TINY, rank=4)
    plain, half = (starting_tree(replace(job, dtype=dtype)) for dtype in DTYPES)
    for a, b in zip(tensors(plain).items(), tensors(half).items(), strict=True):
        rounded = b[1].dtype == BFLOAT16
        assert rounded == (type(a[1]) is Tensor and "norm" not in a[0])
        wanted = cast_array(a[1].data, BFLOAT16) if rounded else a[1].data
        assert np.array_equal(wide(b[1].data), wide(wanted))
    with pytest.raises(MiniloraError, match="expected frozen weights"):
        starting_tree(Job("minilora", TINY, mode="full", dtype="bf16"))
    with pytest.raises(MiniloraError, match="expected dtype in"):
        Job("minilora", TINY, dtype="float16")


def test_the_race_in_print():
    rows = [{"race": "bf16, 8 x 512"} | row for row in (
        {"step": "minilora, captured", "ms": 3.0, "bytes": 2e9, "loss": 1.0},
        {"step": "torch + PEFT, eager", "ms": 4.0, "bytes": 8e9, "loss": 1.0},
        {"step": "torch + PEFT, torch.compile", "not run": "no time"},
    )]  # fmt: skip
    table = gpu_race.race_rows(rows)
    assert table[1] == ["bf16, 8 x 512: minilora, captured", "3.00", "0.75", "2000", "0.25",
                        "1.00000"]  # fmt: skip
    assert table[3][-1] == "not run: no time"
    rows[0]["why_eager"] = "a wait"
    assert gpu_race.race_rows(rows)[1][0] == "bf16, 8 x 512: minilora, captured, eager: a wait"
    assert gpu_race.race_rows(rows[:1])[1][2] == "-"
    other = rows[0] | {"race": "float32, 8 x 512"}  # whose torch has not run
    assert gpu_race.race_rows([*rows, other])[-1][2] == "-"


def test_the_race_in_bars(monkeypatch, tmp_path):
    """A bar for who ran, as high as its milliseconds, in the group of its race."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(gpu_figures, "save", lambda figure, path: drawn.append(figure) or path)
    times = {("bf16, 8 x 512", gpu_race.OURS[1]): 6.0, ("bf16, 8 x 512", gpu_race.EAGER): 9.0,
             ("float32, 8 x 512", gpu_race.OURS[1]): 30.0}  # fmt: skip
    rows = [{"race": race, "step": step, "ms": ms} for (race, step), ms in times.items()]
    rows.append({"race": "bf16, 8 x 512", "step": gpu_race.COMPILED, "not run": "no triton"})
    record = {"race": rows, "races": ["bf16, 8 x 512", "float32, 8 x 512"], "kernels": [],
              "curves": [], "device": "a card", "config": {"rank": 16}}  # fmt: skip
    assert gpu_figures.gpu_figures(record, tmp_path) == [tmp_path / "gpu_race.png"]
    (ax,) = drawn[0].axes
    bars = [(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in ax.patches]
    assert sorted(bars) == [(0, 6.0), (0, 9.0), (1, 30.0)]
    assert [label.get_text() for label in ax.get_xticklabels()] == record["races"]
    assert gpu_figures.gpu_figures(record | {"race": rows[3:]}, tmp_path) == []


def test_a_worker_that_cannot_says_why(monkeypatch):
    def refuse(self):
        raise MiniloraError("no triton")

    monkeypatch.setattr(gpu_race, "missing", lambda names: [])
    monkeypatch.setattr(gpu_race.Worker, "prepare", refuse)
    row = gpu_race.torch_step(Job("compile", TINY, device="cuda"), 1, 60)
    assert row == {"not run": "no triton"}


def test_our_steps_start_from_one_loss(cupy, graphs):  # noqa: F811
    rows = []
    for dtype in ("float32", "bf16"):
        calls = gpu_race.racers(cupy, TINY, dtype, 4, 3, lambda: 1.0)
        race = {"race": gpu_race.race_name(TINY, dtype)}
        found = [race | {"step": name} | calls[name]() for name in gpu_race.OURS]
        assert all(row["why_eager"] is None and row["ms"] > 0 for row in found)
        assert found[0]["loss"] == found[1]["loss"] != found[2]["loss"]
        assert found[0]["bytes"] > 0
        rows += found
    assert rows[0]["loss"] != rows[3]["loss"]  # each race is judged by itself
    assert gpu_race.losses_agree(rows)
    for i, near in ((0, 1.00005), (3, 1.0005)):
        row = rows[i] | {"step": "torch"}
        assert gpu_race.losses_agree([*rows, row | {"loss": row["loss"] * near}])
        assert not gpu_race.losses_agree([*rows, row | {"loss": row["loss"] * (near + 0.002)}])
        assert not gpu_race.losses_agree([*rows, row | {"loss": np.nan}])
