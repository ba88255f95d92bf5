"""The README is true: its example runs, its table is the record's, its commands are CI's."""

import doctest
import json
import re
import statistics
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from minilora.lab.bench_report import bench_summary
from minilora.lab.report import in_one_line, report
from minilora.train.tasks import TASKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def record_of(name):
    """The record that the README tells of.  `minilora compare` writes over the committed one:
    where the README is as committed, so is the record that it is held to."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    path = f"figures/{name}.json"
    with suppress(FileNotFoundError):  # no git here
        if git("diff", "--quiet", "HEAD", "--", "README.md").returncode == 0:
            committed = git("show", f"HEAD:./{path}")
            if committed.returncode == 0:
                return json.loads(committed.stdout)
    return json.loads((ROOT / path).read_text())


def test_the_example_prints_what_it_says(device):
    if device != "cpu":
        pytest.skip("the example runs on the host")
    parsed = doctest.DocTestParser().get_doctest(README, {}, "README.md", "README.md", 0)
    assert parsed.examples
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(parsed)
    assert results.failed == 0


def test_the_table_is_that_of_the_committed_record():
    record = record_of("compare_dates")
    shown = re.search(r"<!-- compare: begin -->\n```\n(.*?)\n```\n", README, re.DOTALL).group(1)
    assert shown.strip() == report(record).strip()


def test_what_it_says_of_a_tie_between_two_rates_is_in_the_record():
    arm = next(arm for arm in record_of("compare_dates")["arms"] if arm["name"] == "lora r=4")
    first, second = sorted(arm["rates"], key=lambda rate: rate["val_loss"])[:2]
    assert (first["lr"], second["lr"], arm["lr"]) == (0.016, 0.008, 0.008)
    losses = "({:.4f} and {:.4f} nats on".format(first["val_loss"], second["val_loss"])
    means = [statistics.mean(rate["val_losses"]) for rate in (first, second)]
    flat = " ".join(README.split())
    assert f"the rates 0.016 and 0.008 nearly tie on the first seed {losses} validation)" in flat
    assert len(first["val_losses"]) == len(second["val_losses"]) == 3
    assert "trained on all three, and their means are {:.3f} and {:.3f}.".format(*means) in flat


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
        record = record_of(f"compare_{name}")
        assert row.group(1) == f"{record['task']['metric']}: {in_one_line(record)}"
        assert record["config"]["seeds"] >= 3


def bench_record(name):
    return record_of(f"bench_{name}")


def raced(name, contender, mode="lora"):
    """Rows of a committed record against one contender, at S1 and S2 if there are more shapes."""
    cases = bench_record(name)["cases"]
    few = [c for c in cases if c["shape"] in ("S1", "S2") and c["mode"] == mode] or cases
    return [
        row | {"threads": case["threads"], "title": case["title"]}
        for case in few
        for row in case["rows"]
        if row["contender"] == contender and row["passed"]
    ]


def said(rows, key="ratio"):
    return " and ".join(f"{row[key]:.2f}" for row in rows)


def test_the_table_of_speed_is_that_of_the_committed_records():
    machines = [bench_record(name) for name in ("step", "step_even", "step_wide")]
    assert bench_summary(machines, bench_record("memory")) in README


def test_what_it_says_of_speed_is_in_the_records():
    flat = " ".join(README.split())
    slow, even, wide = (
        bench_record(name)["ceilings"] for name in ("step", "step_even", "step_wide")
    )
    rates = ["{numpy:.0f} : {torch:.0f}".format(**found) for found in (slow, even, wide)]
    assert (
        "in torch is faster ({}), an AMD EPYC where both are alike ({}), and one".format(*rates)
        in flat
    )
    assert f"at full width and the MKL in torch does not ({rates[2]})" in flat
    assert slow["torch"] > 1.05 * slow["numpy"]
    assert all(abs(rate - 200) < 20 for rate in even.values())
    assert wide["numpy"] > 1.5 * wide["torch"]
    compiled = [f"{row['ratio']:.2f}" for row in raced("step", "compile")]
    assert "torch.compile LoRA takes {} of the time at S1 and {} at S2".format(*compiled) in flat
    assert f"allocator setting, {said(raced('step_stock', 'stock'))} (" in flat
    assert f"in the same rounds {said(raced('step_stock', 'torch'))} against torch with" in flat
    alone = [row for row in raced("threads", "torch") if row["threads"] == 1]
    assert f"on one thread {said(alone)} (" in flat
    small = raced("micro", "torch")
    assert f"it takes {said(small, 'bytes_ratio')} of their memory" in flat
    assert f"in {said(small)} of their time" in flat


def test_what_it_says_of_the_machine_where_torch_multiplies_faster():
    """About half of a step is products; LoRA about as fast as torch; full fine-tuning slower."""
    record = bench_record("step")
    ratio = {
        case["title"]: row["ratio"]
        for case in record["cases"]
        for row in case["rows"]
        if row["contender"] == "torch"
    }
    for shape in ("S0", "S1", "S2", "S3"):
        assert 0.85 <= ratio[f"{shape} lora"] <= 1.05
        assert ratio[f"{shape} full"] > 1.1
    for case in record["cases"]:
        if case["title"] in ("S1 lora", "S2 lora"):
            ours = next(row for row in case["rows"] if row["contender"] == "minilora")
            share = case["gflop"] / (ours["ms"] / 1e3) / record["ceilings"]["numpy"]
            assert 0.4 <= share <= 0.6


def test_what_it_says_of_the_speed_of_writing_of_codes_and_of_the_real_model():
    flat = " ".join(README.split())

    def speed(name, batch):
        return [
            f"{1 / row['ratio']:.1f}"
            for i in range(4)
            for case in bench_record(name)["cases"]
            for row in case["rows"]
            if case["title"] == f"S{i} full, batch {batch}" and row["contender"] == "torch"
        ]

    one, eight = (speed("generate", batch) for batch in (1, 8))
    assert "written at {}, {}, {} and {} times torch's speed at S0 to S3".format(*one) in flat
    assert "eight at {}, {}, {} and {} times (".format(*eight) in flat
    one, eight = (speed("generate_intel", batch) for batch in (1, 8))
    assert "it is {}, {}, {} and {} times for one sequence and".format(*one) in flat
    assert "and {}, {}, {} and {} for eight. One process".format(*eight) in flat
    single = {
        case["title"]: row["ratio"]
        for case in bench_record("generate_intel")["cases"]
        for row in case["rows"]
        if row["contender"] == "blas"
    }
    assert all(abs(1 - single[f"S{i} full, batch 1"]) < 0.06 for i in (1, 2, 3))
    assert f"at S0, where two processes take {single['S0 full, batch 1']:.2f} of its time" in flat
    assert f"eight sequences they take {single['S0 full, batch 8']:.2f} of its time at S0" in flat
    wide = [single[f"S{i} full, batch 8"] for i in (1, 2, 3)]
    assert f"{min(wide):.2f} to {max(wide):.2f} at S1 to S3" in flat
    for name, words in (("quantize", "of bitsandbytes' time"), ("quantize_intel", "(`figures/")):
        codes = [row["ratio"] for case in bench_record(name)["cases"] for row in case["rows"]
                 if row["contender"] == "bnb"]  # fmt: skip
        assert len(codes) == 4
        assert f"in {min(codes):.2f} to {max(codes):.2f} {words}" in flat
    (step,), (memory,) = raced("step_smollm2", "torch"), raced("memory_smollm2", "torch")
    assert (
        f"takes {step['ratio']:.2f} of the time of torch and PEFT at "
        f"{memory['bytes_ratio']:.2f} of their memory" in flat
    )
    written = next(r for r in raced("generate_smollm2", "torch") if "batch 1" in r["title"])
    assert f"one sequence {1 / written['ratio']:.1f} times as fast as torch eager" in flat
    assert "the products of both reach about 150 GFLOP/s" in flat
    assert all(abs(rate - 150) < 15 for name in ("generate", "generate_smollm2")
               for rate in bench_record(name)["ceilings"].values())  # fmt: skip


def test_what_it_says_of_four_bits_on_the_real_model_is_in_the_record():
    record = record_of("perplexity")
    flat = " ".join(README.split())
    _, nf4, double, fp4, int4 = record["rows"]
    assert [row["code"] for row in record["rows"]] == record["config"]["codes"]
    assert (
        "perplexity {:.1f} in float32, {:.1f} in NF4, {:.1f} with double quantization, "
        "{:.1f} in FP4, {:.1f} in INT4".format(*(row["perplexity"] for row in record["rows"]))
    ) in flat
    assert f"over {record['data']['windows']} windows" in flat
    more = ["{above:.2f} ± {error:.2f}".format(**row) for row in (nf4, double, fp4, int4)]
    assert more[0] == more[1]
    assert "{} for NF4 either way, {} for FP4, {} for INT4".format(*more[1:]) in flat


def test_what_it_says_of_forgetting_is_in_the_record():
    record = record_of("forgetting")
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


def test_what_it_says_of_where_adapters_start_is_in_the_record():
    record = record_of("variants")
    loss = {row["arm"]: f"{statistics.mean(row['losses']):.3f}" for row in record["rows"]}
    flat = " ".join(README.split())
    told = "`minilora variants --seeds {seeds}`: dates at rank {rank}, each start at its own best"
    assert told.format(**record["config"]) in flat
    assert f"loss LoRA {loss['LoRA']}, PiSSA {loss['PiSSA']}, DoRA {loss['DoRA']}." in flat
    low = (loss[f"{name}, 2 bits"] for name in ("QLoRA", "LoftQ", "LoftQ, 5 rounds"))
    assert (
        "start ends at {}, LoftQ's, nearer to W0, at {}, and after five rounds, which end farther "
        "from it again, at {};".format(*low)
        in flat
    )
    starts = {(row["start"], row["code"]): row for row in record["starts"]}
    at = record["config"]["ranks"].index(record["config"]["rank"])
    near, five, far = (
        starts[name, "2 bits"]["distance"][at] for name in ("LoftQ", "LoftQ, 5 rounds", "QLoRA")
    )
    assert near < five < far
    assert max(starts["QLoRA", "NF4"]["loss"]) < 1e-3


@pytest.mark.parametrize("name", ["step_wide", "step_even"])
def test_the_record_of_speed_holds_what_the_fused_ops_are_for(name):
    """A step at least 1.15 times as fast as on the primitives; LoRA no slower than torch."""
    record = bench_record(name)
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
