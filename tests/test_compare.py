"""The comparison: fair by construction, the same however many processes, plain in print."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from real_files import adapted_of, model_of

from minilora import MiniloraError, get_task
from minilora.cli import main
from minilora.engine.progress import progress
from minilora.files.peft import save_adapter
from minilora.lab import compare as lab
from minilora.lab import figures
from minilora.lab.report import report
from minilora.train import tasks


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("runs on the host")


TINY = lab.CompareConfig(task="planted", ranks=(1, 4), seeds=2, steps=30, jobs=1)


@pytest.fixture(scope="module")
def record():
    return lab.compare(TINY)


def test_the_record_holds_what_the_table_shows(record):
    assert json.loads(json.dumps(record))["arms"] == record["arms"]
    assert [a["name"] for a in record["arms"]] == ["full", "lora r=1", "lora r=4"]
    for arm in record["arms"]:
        assert len(arm["rates"]) >= 3
        assert len(arm["scores"]) == 2
        assert arm["mean"] == pytest.approx(np.mean(arm["scores"]))
        assert arm["spread"] == pytest.approx(np.std(arm["scores"], ddof=1))
        assert all(rate["val_losses"][0] == rate["val_loss"] for rate in arm["rates"])
        first, second, *_ = sorted(arm["rates"], key=lambda rate: rate["val_loss"])
        tied = [rate for rate in arm["rates"] if len(rate["val_losses"]) == 2]  # on both seeds
        ties = second["val_loss"] <= (1 + lab.TIE) * first["val_loss"]
        assert {rate["lr"] for rate in tied} == {first["lr"], *([second["lr"]] if ties else [])}
        best = min(tied, key=lambda rate: np.mean(rate["val_losses"]))
        assert arm["lr"] == best["lr"]
        assert arm["scores"][0] == best["score"]  # the selection run is the first of them
        tried = [rate["lr"] for rate in arm["rates"]]
        assert arm["lr_at_edge"] == (arm["lr"] in (min(tried), max(tried)))
        assert set(arm["bytes"]) == {"weights", "gradients", "optimizer", "activations"}
        assert arm["ms_per_step"] > 0
    full, lora, _ = record["arms"]
    assert lora["scores"][0] != lora["scores"][1]  # another seed, another A
    assert full["bytes"]["activations"] == 8 * (64 * 64 + 64 * 48)  # x and the gap, no weight
    assert full["trainable"] == 48 * 64
    assert lora["trainable"] == 48 + 64
    assert full["bytes"]["gradients"] == 8 * full["trainable"]
    assert full["bytes"]["optimizer"] == 2 * full["bytes"]["gradients"]
    assert lora["gain_share"] == pytest.approx(
        (lora["mean"] - record["base"]["score"]) / (full["mean"] - record["base"]["score"])
    )


def test_numbers_do_not_depend_on_the_number_of_processes(record):
    again = lab.compare(replace(TINY, jobs=2))
    for a, b in zip(record["arms"], again["arms"], strict=True):
        assert a["rates"] == b["rates"]
        assert a["scores"] == b["scores"]


def test_the_table_and_its_legend(record):
    text = report(record)
    assert all(len(line) <= 200 for line in text.splitlines())
    for word in ("method", "trainable", "share", "lr", "relative squared error", "ms/step"):
        assert word in text
    assert "over 2 seeds" in text
    assert "±" in text
    assert "the run that chose the rate is the first" in text


def test_figures_are_drawn_from_the_record_alone(record, tmp_path):
    for draw in (figures.rank_vs_quality, figures.memory):
        path = draw(json.loads(json.dumps(record)), tmp_path / f"{draw.__name__}.png")
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_a_rate_that_diverges_is_a_finding(monkeypatch):
    plain = get_task("planted")
    wild = replace(plain, settings=replace(plain.settings, lora_rates=(1e-2, 2e-2, 1e200)))
    monkeypatch.setitem(tasks.TASKS, "planted", lambda: wild)
    with np.errstate(all="ignore"):
        record = lab.compare(replace(TINY, methods=("lora",), ranks=(4,), seeds=1))
    rates = record["arms"][0]["rates"]
    assert [r["val_loss"] is None for r in rates] == [False, False, True]
    assert record["arms"][0]["gain_share"] is None  # no full fine-tuning to compare with
    with pytest.raises(MiniloraError, match="every rate diverged; why"):
        lab.closest("x", [{"lr": 1, "val_loss": None, "diverged": "why"}])


def run(lr, seed, loss):
    return {"lr": lr, "seed": seed, "val_loss": loss} | ({} if loss else {"diverged": "why"})


def test_rates_that_tie_on_the_first_seed_are_chosen_by_all_of_them():
    for losses, expected in (
        ((2.0, 2.19, 2.1, None), [1, 3]),  # at most two
        ((None, 2.21, 2.0), [3]),
        ((-2.0, -1.81), [1, 2]),
    ):
        first = [run(lr, 0, loss) for lr, loss in enumerate(losses, start=1)]
        assert [one["lr"] for one in lab.closest("x", first)] == expected
    fair = [[run(1, 0, 2.0), run(1, 1, 9.0)], [run(2, 0, 2.1), run(2, 1, 2.2)]]
    assert lab.choose("x", fair) == fair[1]
    lost = [[run(1, 0, 2.0), run(1, 1, 2.0)], [run(2, 0, 1.9), run(2, 1, None)]]
    assert lab.choose("x", lost) == lost[0]
    for gone, found in ((None, "why"), (np.inf, "validation loss inf")):
        with pytest.raises(MiniloraError, match=f"x at 2, seed 1: {found}"):
            lab.choose("x", [[run(2, 0, 1.9), run(2, 1, gone)]])


def test_quantized_arms_start_from_codes():
    config = lab.CompareConfig(methods=("lora", "qlora", "qlora-int4"), ranks=(2,), seeds=1)
    task = get_task("dates")
    names = [arm.name for arm in config.arms(task)]
    assert names == ["lora r=2", "qlora r=2", "qlora-int4 r=2"]
    sizes = [lab.footprint(arm, task)["bytes"]["weights"] for arm in config.arms(task)]
    assert sizes[1] < 0.5 * sizes[0]
    counts = {lab.footprint(arm, task)["trainable"] for arm in config.arms(task)}
    shares = [lab.footprint(arm, task)["share"] for arm in config.arms(task)]
    assert len(counts) == 1
    assert max(shares) == min(shares)  # four bits are no fewer numbers


def test_quick_is_the_same_in_small():
    task = get_task("dates")
    small = lab.quick(lab.CompareConfig(), task)
    assert (small.seeds, small.rates, small.ranks) == (1, 1, (1, 4, 16))
    assert small.steps < task.settings.steps
    assert len(lab.rates_of(lab.Arm("full"), task, 1)) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ("sgd",)}, "full, lora, qlora, qlora-CODE; found 'sgd'"),
        ({"methods": ("qlora-nf5",)}, "nf5"),
        ({"methods": ("lora", "lora")}, "each once"),
        ({"ranks": ()}, "at least one"),
        ({"ranks": (0,)}, "whole numbers >= 1"),
        ({"seeds": 0}, "seeds"),
        ({"jobs": 0}, "jobs"),
    ],
)
def test_configs_of_no_meaning(options, message):
    with pytest.raises(MiniloraError, match=message):
        lab.CompareConfig(**options)


# -------------------------------------------------------------------- the command line


def minilora(*arguments, cwd=None, env=None, stdout=subprocess.PIPE):
    """The command of the package under test, wherever it runs."""
    here = str(Path(lab.__file__).parents[2])
    env = dict(env or os.environ)
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), here])
    command = [sys.executable, "-m", "minilora", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env
    )


def test_alone_it_prints_a_screenful():
    done = minilora()
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert 10 <= len(lines) <= 23  # of a terminal's 24, the last for the prompt
    assert max(map(len, lines)) <= 80
    assert "compare" in done.stdout
    assert all(name in done.stdout for name in tasks.TASKS)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare", "--task", "dreams"], "dates"),
        (["compare", "--ranks", "0"], "ranks"),
        (["compare", "--ranks", "two"], "'two'"),
        (["compare", "--methods", "magic"], "magic"),
        (["compare", "--seeds", "0"], "seeds"),
        (["compare", "--nonsense"], "--nonsense"),
        (["compare", "--out", __file__], "expected a folder to write to, found"),
        (["compare", "--out", f"{__file__}/deeper"], "expected a folder to write to, found"),
        (["compare", "--task", "sort", "--data", "x.txt"], "--data"),
        (["conpare"], "conpare"),
        (["pretrain", "dreams"], "dates"),
        (["pretrain", "dates", "--seed", "-1"], "seed: expected a whole number >= 0"),
        (["pretrain", "dates", "--out", "no/folder"], "expected a file in a folder that is there"),
        (["memory", "--block", "0"], "block: expected one of"),
        (["memory", "--block", "-64"], "block: expected one of"),
        (["memory", "--out", "x" * 300], "expected a folder to write to"),
        (["bench", "--shapes", ""], "shapes: expected at least one"),
        (["book", "."], "Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, words, tmp_path):
    done = minilora(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_writes_its_record_and_figures(tmp_path):
    run = ["compare", "--task", "planted", "--quick", "--ranks", "2", "--out", "out"]
    done = minilora(*run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == [
        "compare_planted_quick.json", "memory_planted_quick.png",
        "rank_vs_quality_planted_quick.png",
    ]  # fmt: skip
    assert all(name in done.stdout for name in written)
    as_json = minilora(*run, "--json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["kind"] == "compare"


def test_a_file_named_as_a_task_leaves_the_record_of_the_task_alone(record, tmp_path, monkeypatch):
    text = tmp_path / "dates.txt"
    text.write_text("the cat sat on the mat. " * 200)
    monkeypatch.setattr(lab, "compare", lambda config: record)
    assert main(["compare", "--data", str(text), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "compare_data-dates.json", "memory_data-dates.png", "rank_vs_quality_data-dates.png",
    ]  # fmt: skip


def test_a_reader_who_stops_reading_loses_nothing(tmp_path):
    """`| head`: no traceback, and what was worked out is written all the same."""
    reading, writing = os.pipe()
    os.close(reading)
    run = ["compare", "--task", "planted", "--quick", "--ranks", "2", "--out", tmp_path, "--json"]
    done = minilora(*run, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=writing)
    assert done.returncode == 141
    assert done.stderr == ""
    assert json.loads((tmp_path / "compare_planted_quick.json").read_text())["kind"] == "compare"
    done = minilora("inspect", adapter_at(tmp_path / "adapter"), stdout=writing)  # told at the end
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_or_shown(tmp_path):
    adapter = adapter_at(tmp_path / "adapter")
    with open("/dev/full", "w") as full:
        done = minilora("inspect", adapter, stdout=full)
    assert done.returncode != 0
    assert done.stderr.startswith("minilora inspect: ")
    assert "Traceback" not in done.stderr
    with open("/dev/full", "w") as full:
        done = minilora(stdout=full)
    assert done.stderr == "minilora: [Errno 28] No space left on device\n"
    done = minilora("inspect", adapter, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "??W?" in done.stdout  # the norm of the update
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = minilora("inspect", adapter, env=os.environ | plain)  # kernels are read as UTF-8
    assert (done.returncode, done.stderr) == (0, "")


def adapter_at(path):
    save_adapter(path, adapted_of(model_of()))
    return path


def test_with_numpy_alone_the_table_still_comes(tmp_path):
    """Without matplotlib, and without what else makes it faster or shows how far it is."""
    blocked = tmp_path / "blocked"
    for name in ("matplotlib", "joblib", "tqdm", "threadpoolctl"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not here')\n")
    env = os.environ | {"PYTHONPATH": str(blocked)}
    run = ["compare", "--task", "planted", "--quick", "--ranks", "2", "--jobs", "2"]
    done = minilora(*run, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "lora r=2" in done.stdout
    assert 'pip install "minilora[lab]"' in done.stdout
    assert (tmp_path / "figures" / "compare_planted_quick.json").exists()
    assert not list((tmp_path / "figures").glob("*.png"))


def test_progress_is_a_bar_on_a_terminal_and_nothing_in_a_pipe(monkeypatch):
    class Screen(io.StringIO):
        isatty = lambda self: True

    for stream in (Screen(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = progress(total=3, label="compare dates")
        for _ in range(3):
            bar.update(1)
        bar.close()
        shown = stream.getvalue()
        assert ("compare dates" in shown and "0/3" in shown) == stream.isatty()
        assert bool(shown) == stream.isatty()


@pytest.mark.slow
def test_a_short_remake_of_the_date_base_learns():
    from minilora.train.pretrain import pretrain

    result, score = pretrain("dates", steps=300)
    assert score > 0.5
    assert result.history[0]["loss"] > 2 * result.history[-1]["loss"]


def test_the_shipped_base_knows_its_dates():
    task = get_task("dates")
    assert task.before(task.base()) >= 0.99
    assert task.score(task.base(), task.splits(0).test.first(100)) == 0
