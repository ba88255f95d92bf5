"""Every task: drawn from its seed, split without overlap, known by its base, learnable."""

import re
from pathlib import Path

import numpy as np
import pytest

import minilora
from minilora import (
    AdamW,
    MiniloraError,
    adapt,
    fit,
    get_task,
    parameters,
    schedule,
    to_device,
    unfreeze,
)
from minilora.engine.errors import FormatError
from minilora.engine.loss import IGNORE
from minilora.lab import forgetting, report, swap
from minilora.lab.compare import CompareConfig, compare
from minilora.lab.task_figures import forgetting_figure, swap_figure
from minilora.train import digits, facts, letters, text
from minilora.train.pretrain import RECIPES, pretrain
from minilora.train.tasks import TASKS

every_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("runs on the host; the models' own tests run on both")


def rows(data):
    """Each example as bytes."""
    arrays = data.arrays.values()
    return [b"".join(a[i].tobytes() for a in arrays) for i in range(len(data))]


@every_task
def test_data_come_from_the_seed(name):
    task = get_task(name)
    one, again, other = (task.splits(seed) for seed in (1, 1, 2))
    for part in ("train", "validation", "test"):
        assert rows(getattr(one, part)) == rows(getattr(again, part))
    assert rows(one.test) == rows(other.test) or name == "facts"  # one test for all seeds
    if name not in ("planted", "facts", "text"):
        assert rows(one.train) != rows(other.train)


LEARNED_BY_HEART = {"planted", "facts"}  # the data are the whole world


@every_task
def test_no_test_example_is_trained_on(name):
    if name in LEARNED_BY_HEART:
        pytest.skip("the task is to hold these very examples")
    s = get_task(name).splits(0)
    train, test = set(rows(s.train)), rows(s.test)
    assert sum(row in train for row in test) <= len(test) / 500  # words may be drawn twice
    assert not set(rows(s.validation)) & set(test)


@every_task
def test_the_base_is_frozen_and_new_to_the_task(name):
    task = get_task(name)
    base = task.base()
    assert not parameters(base)
    assert task.name == name
    assert len(task.settings.full_rates) >= 3
    assert len(task.settings.lora_rates) >= 3
    known = {
        "dates": 0.99, "digits-swap": 0.95, "digits-shuffle": 0.95, "facts": 2500,
        "cipher": 0.999, "cipher-head": 0.999, "caesar": 0.999, "sort": 0.999, "reverse": 0.999,
    }  # fmt: skip
    if name in known:
        assert task.before(base) >= known[name]
    if name == "text":
        assert task.before(base) < 1.75 < task.score(base, task.splits(0).test)


@every_task
def test_a_few_steps_help(name):
    task = get_task(name)
    s, data = task.settings, task.splits(0)
    rank = s.ranks[-1]
    alpha = s.alpha or rank
    model = adapt(task.base(), s.targets, rank=rank, alpha=alpha, rng=np.random.default_rng(0))
    before = task.score(model, data.validation)
    rate = s.lora_rates[1]
    o = AdamW(model, lr=rate, betas=s.betas, weight_decay=0)
    steps = 15 if name == "text" else 60
    result = fit(o, task.loss, data.train, steps=steps, batch=s.batch, clip=s.clip, every=15)
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"] or steps == 15
    after = task.score(result.model, data.validation)
    if task.lower_is_better:
        assert after < before
    else:
        assert after >= before


# ------------------------------------------------------------------------ what they hold


def test_letters_are_written_as_said():
    words = np.array([[3, 1, 2, 31, 0, 5]])
    expected = {
        "copy": [3, 1, 2, 31, 0, 5],
        "caesar": [6, 4, 5, 2, 3, 8],
        "sort": [0, 1, 2, 3, 5, 31],
        "reverse": [5, 0, 31, 2, 1, 3],
    }
    for way, wanted in expected.items():
        assert letters.WRITES[way](words)[0].tolist() == wanted
    assert sorted(letters.CIPHER.tolist()) == list(range(32))
    data = letters.examples("caesar", 4, 0)
    ids, targets = data.arrays["ids"], data.arrays["targets"]
    assert (ids[:, letters.N] == letters.ARROW).all()
    assert (targets[:, : letters.N] == IGNORE).all()
    assert ((ids[:, : letters.N] + 3) % 32 == targets[:, letters.N :]).all()


def test_facts_are_pairs_once_each_and_bits_are_bits():
    data = facts.facts(3, 200)
    pairs = data.arrays["ids"][:, 0] * 64 + data.arrays["ids"][:, 1]
    assert len(set(pairs.tolist())) == 200
    values = data.arrays["targets"][:, 1]
    assert values.min() >= facts.KEYS
    assert values.max() < facts.KEYS + facts.VALUES
    assert facts.bits(get_task("facts").base(), data) == 0  # it knows none of these
    known = facts.facts(0, 512)
    assert 2550 < facts.bits(get_task("facts").base(), known) <= 2560


def test_digits_are_shifted_as_said():
    x, y = digits.images()
    assert x.shape == (1797, 64)
    assert (x.min(), x.max()) == (0, 1)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    plain, swapped, shuffled = (digits.splits(0, s).test.arrays for s in (None, "swap", "shuffle"))
    assert np.array_equal(plain["x"], swapped["x"])
    changed = plain["targets"] != swapped["targets"]
    assert np.array_equal(changed, plain["targets"] < 2)
    assert np.array_equal(np.sort(plain["x"], axis=1), np.sort(shuffled["x"], axis=1))
    with pytest.raises(MiniloraError, match="swap, shuffle"):
        digits.task("rotate")


def test_text_is_cut_by_place_and_comes_back():
    whole = text.shipped_text("genesis")
    assert whole.startswith("In the beginning")
    assert text.decode(text.encode(whole[:500]).tolist()) == whole[:500]
    assert not (text.encode(whole) == text.UNKNOWN).any()
    data = text.windows(text.encode(whole[:1000]))
    ids, targets = data.arrays["ids"], data.arrays["targets"]
    assert np.array_equal(ids[:, 1:], targets[:, :-1])
    assert ids[1, 0] == targets[0, -1]


# ----------------------------------------------------------------------- a text of one's own


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(("The cat sat on the mat. \u20ac \n" * 200), "utf-8")
    task = get_task(f"data:{path}")
    assert "200 characters outside the alphabet are not scored" in task.about
    targets = task.splits(0).train.arrays["targets"]
    assert (targets == IGNORE).any()
    assert (task.splits(0).train.arrays["ids"] == text.UNKNOWN).any()
    config = CompareConfig(task=task.name, methods=("lora",), ranks=(2,), seeds=1, steps=10, jobs=2)
    record = compare(config)
    assert record["arms"][0]["mean"] < record["base"]["score"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "expected a text file, found none"),
        (b"short", "at least 2,560 characters .* found 5"),
        (b"\xff\xfe" * 4000, "expected text in UTF-8"),
        ("\u3042".encode() * 4000, "found 4,000 of 4,000 characters outside it"),
    ],
)
def test_a_file_that_is_no_text_is_named(content, message, tmp_path):
    path = tmp_path / "odd.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"odd\.txt: .*{message}"):
        get_task(f"data:{path}")


def test_a_place_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file" / "inside"):
        with pytest.raises(FormatError, match="expected text in UTF-8"):
            get_task(f"data:{place}")


# ------------------------------------------------------------------------- a task of one's own


README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_task_of_the_readme_is_compared_like_any_other(monkeypatch):
    """Both blocks as they are printed; the first in fifteen lines."""
    match = re.search(
        r"<!-- task: begin -->\n```python\n(.*?)```\n<!-- task: end -->\n\n```python\n(.*?)```",
        README, re.DOTALL,
    )  # fmt: skip
    task, use = match.groups()
    assert len([line for line in task.splitlines() if line.strip()]) <= 15
    kept = []
    monkeypatch.setattr(report, "report", lambda record: kept.append(record) or "")
    monkeypatch.setitem(TASKS, "adding", None)  # so that it is taken out again
    exec(task + use, {"np": np, "ml": minilora})
    (record,) = kept
    assert record["base"]["score"] > 1
    assert [arm["name"] for arm in record["arms"]] == ["full", "lora r=1"]
    assert all(arm["mean"] < 1e-3 for arm in record["arms"])
    assert record["task"]["lower_is_better"]


# --------------------------------------------------------------------- bases, paths, matrix


@pytest.mark.parametrize("name, steps, least", [("digits", 150, 0.9), ("facts", 400, 500)])
def test_a_short_remake_of_a_base_learns(name, steps, least):
    result, score = pretrain(name, steps=steps)
    assert score > least
    assert result.steps == steps


@pytest.mark.slow
@pytest.mark.parametrize("name, steps", [("letters", 400), ("text", 200)])
def test_a_short_remake_of_a_larger_base_learns(name, steps):
    result, score = pretrain(name, steps=steps)
    assert result.history[-1]["val"] < 0.9 * result.history[0]["val"]
    assert score > 0.9 if name == "letters" else score < 2.3
    assert set(RECIPES) == {"dates", "digits", "facts", "letters", "text"}


def test_forgetting_paths_are_recorded_and_drawn(tmp_path):
    config = forgetting.ForgettingConfig(
        steps=4, marks=(2, 4), seeds=2, jobs=1, arms=((None, 1e-3), (2, 4e-3)), batch=4
    )
    record = forgetting.forgetting(config)
    assert [p["step"] for p in record["arms"][0]["mean"]] == [0, 2, 4]
    first = [arm["mean"][0] for arm in record["arms"]]
    assert first[0]["new"] == pytest.approx(first[1]["new"], abs=1e-6)  # all start from the base
    assert record["arms"][0]["mean"][-1]["new"] < first[0]["new"]
    assert "lora r=2, lr 0.004" in forgetting.forgetting_report(record)
    assert forgetting_figure(record, tmp_path / "f.png").exists()


def test_the_matrix_in_print_and_as_a_picture(tmp_path):
    record = {
        "config": {"rank": 4, "seeds": 1},
        "tasks": ["copy", "cipher"],
        "rows": [
            {"adapter": None, "seeds": [[1.0, 0.0]]},
            {"adapter": "cipher", "seeds": [[0.1, 0.9]]},
        ],
    }
    assert "cipher" in swap.swap_report(record)
    assert swap_figure(record, tmp_path / "s.png").exists()


@pytest.mark.slow
def test_an_adapter_does_its_own_task_and_no_other():
    row = swap.row_of(swap.SwapConfig(), "caesar", 0)
    columns = ("copy", *swap.SwapConfig().ways)
    assert row[columns.index("caesar")] > 0.95
    assert max(v for c, v in zip(columns, row, strict=True) if c != "caesar") < 0.3


@pytest.mark.slow
def test_a_cipher_through_the_head_needs_rank_three():
    """Least squares would need nearly full rank for a permutation; the largest logit does not."""
    task, scores = get_task("cipher-head"), {}
    s, data = task.settings, task.splits(0)
    for rank in (1, 4):
        model = adapt(task.base(), s.targets, rank=rank, alpha=16.0, rng=np.random.default_rng(0))
        o = AdamW(model, lr=3.2e-2, betas=s.betas, weight_decay=0)
        run = fit(
            o, task.loss, data.train, steps=s.steps, batch=s.batch, clip=1.0,
            schedule=schedule("linear", s.steps, 0.05),
        )  # fmt: skip
        scores[rank] = task.score(run.model, data.test)
    assert scores[1] < 0.4
    assert scores[4] > 0.98


def test_full_fine_tuning_of_a_small_net_beats_its_base():
    task = get_task("digits-shuffle")
    data = task.splits(0)
    o = AdamW(to_device(unfreeze(task.base()), "cpu"), lr=6e-3)
    run = fit(o, task.loss, data.train, steps=100, batch=100)
    assert task.score(run.model, data.test) > task.score(task.base(), data.test) + 0.5
