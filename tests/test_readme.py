"""The README is true: its example runs, its table is the record's, its commands are CI's."""

import doctest
import json
import re
from pathlib import Path

import pytest

from minilora.lab.bench_report import bench_summary
from minilora.lab.report import in_one_line, report
from minilora.train.tasks import TASKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_prints_what_it_says(device):
    if device != "cpu":
        pytest.skip("the example runs on the host")
    parsed = doctest.DocTestParser().get_doctest(README, {}, "README.md", "README.md", 0)
    assert parsed.examples
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(parsed)
    assert results.failed == 0


def test_the_table_is_that_of_the_committed_record():
    record = json.loads((ROOT / "figures" / "compare_dates.json").read_text())
    shown = re.search(r"<!-- compare: begin -->\n```\n(.*?)\n```\n", README, re.DOTALL).group(1)
    assert shown.strip() == report(record).strip()


def test_both_commands_set_themselves_up_and_ci_runs_them():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert all('pip install -q -e ".[test]"' in command for command in commands)
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-m minilora compare$" in ci
    assert "-m pytest" in ci


def test_files_and_figures_that_it_names_exist():
    for path in re.findall(r"\]\(((?:figures|chapters|minilora)/[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    floors = {p.name for p in (ROOT / "minilora").iterdir() if (p / "__init__.py").exists()}
    named = set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE))
    assert named == floors


def test_every_task_is_named_with_the_figures_of_its_record():
    for name in TASKS:
        row = re.search(rf"^\| `{name}` \| .* \| (.*) \|$", README, re.MULTILINE)
        assert row, name
        record = json.loads((ROOT / "figures" / f"compare_{name}.json").read_text())
        assert row.group(1) == f"{record['task']['metric']}: {in_one_line(record)}"
        assert record["config"]["seeds"] >= 3


def test_the_table_of_speed_is_that_of_the_committed_records():
    steps, memory = (
        json.loads((ROOT / "figures" / f"bench_{suite}.json").read_text())
        for suite in ("step", "memory")
    )
    assert bench_summary(steps, memory) in README


def test_what_it_says_of_the_speed_of_the_real_model_and_of_codes_is_in_the_records():
    def rows(name):
        record = json.loads((ROOT / "figures" / f"bench_{name}.json").read_text())
        cases = record["cases"]
        return [row | {"shape": c["shape"]} for c in cases for row in c["rows"] if row["passed"]]

    def only(name, key):
        return next(row[key] for row in rows(name) if row["contender"] != "minilora")

    step, memory = only("step_smollm2", "ratio"), only("memory_smollm2", "bytes_ratio")
    flat = " ".join(README.split())
    assert f"takes {step:.2f} of the time of torch and PEFT at {memory:.2f} of their memory" in flat
    faster = 1 / only("generate_smollm2", "ratio")
    assert f"{faster:.1f} times as fast as torch eager" in flat
    codes = [row["ratio"] for row in rows("quantize") if row["contender"] == "bnb"]
    assert len(codes) == 4
    assert f"in {min(codes):.2f} to {max(codes):.2f} of bitsandbytes' time" in flat
    theirs = {"micro": [], "threads": []}  # of S1 and S2
    for name, found in theirs.items():
        found += [
            row for row in rows(name)
            if row["contender"] == "torch" and row["shape"] in ("S1", "S2")
        ]  # fmt: skip
    small = [f"{row[key]:.2f}" for key in ("bytes_ratio", "ratio") for row in theirs["micro"]]
    assert "took {} and {} of their memory".format(*small[:2]) in flat
    assert "in {} and {} of their time".format(*small[2:]) in flat
    one, two = ([f"{row['ratio']:.2f}" for row in theirs["threads"][i::2]] for i in (0, 1))
    assert "took {} (S1) and {} (S2) of the time of torch and PEFT on one".format(*one) in flat
    assert "on one thread, {} and {} on two".format(*two) in flat
    stock, same = (
        [f"{row['ratio']:.2f}" for row in rows("step_stock") if row["contender"] == name]
        for name in ("stock", "torch")
    )
    assert (
        "allocator setting, it took {} and {} (`figures/bench_step_stock.json`;".format(*stock)
        in flat
    )
    assert "in the same rounds {} and {} against torch with it".format(*same) in flat


def test_what_it_says_of_forgetting_is_in_the_record():
    record = json.loads((ROOT / "figures" / "forgetting.json").read_text())
    assert record["config"]["seeds"] >= 3
    paths = {arm["name"]: arm["mean"] for arm in record["arms"]}
    lost = {name: path[-1]["old"] - path[0]["old"] for name, path in paths.items()}
    assert f"has lost {lost['full, lr 0.001']:.1f} nats on the plays" in README
    most = max(loss for name, loss in lost.items() if "r=2" in name)
    assert re.search(rf"at most {most:.1f}; but of all runs", README)
    best = {name: min(path, key=lambda p: p["new"]) for name, path in paths.items()}
    for key in ("new", "old"):  # learned most, and forgot least
        assert min(best, key=lambda name: best[name][key]) == "full, lr 0.0003"
    assert "full fine-tuning at its\nslower rate is the best on the new text" in README


def test_the_record_of_speed_holds_what_the_fused_ops_are_for():
    """A step at least 1.15 times as fast as on the primitives; LoRA no slower than torch."""
    record = json.loads((ROOT / "figures" / "bench_step.json").read_text())
    ratios = {
        (case["title"], row["contender"]): row["ratio"]
        for case in record["cases"]
        for row in case["rows"]
        if "ratio" in row
    }
    fused = [ratio for (_, contender), ratio in ratios.items() if contender == "primitives"]
    assert len(fused) >= 6
    assert max(fused) <= 1 / 1.15
    assert max(ratios["S1 lora", "torch"], ratios["S2 lora", "torch"]) <= 1
