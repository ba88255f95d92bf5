"""Every committed picture comes from a committed record, by the function that its command calls."""

import json
from pathlib import Path

import numpy as np
import pytest

from minilora.lab import (
    figures,
    memory_report,
    paging,
    perplexity,
    quantize,
    targets,
    task_figures,
    variants,
)
from minilora.lab.bench import SUITES
from minilora.lab.bench_report import bench_figure
from minilora.train.tasks import TASKS

FIGURES = Path(__file__).parent.parent / "figures"

# picture: (record, function that draws it).  The command is the record's "kind".
DRAWN = {
    "memory": ("compare_dates", figures.memory),
    "rank_vs_quality": ("compare_dates", figures.rank_vs_quality),
    "forgetting": ("forgetting", task_figures.forgetting_figure),
    "swap": ("swap", task_figures.swap_figure),
    "targets": ("targets", targets.targets_figure),
    "variants": ("variants", variants.variants_figure),
    "paging": ("paging", paging.paging_figure),
    "nf4_levels": ("nf4_levels", quantize.levels_figure),
    "codes_by_block": ("codes_by_block", quantize.codes_figure),
    "memory_by_model": ("memory_by_model", memory_report.memory_by_model),
    "perplexity": ("perplexity", perplexity.perplexity_figure),
}
DRAWN |= {
    f"rank_vs_quality_{task}": (f"compare_{task}", figures.rank_vs_quality)
    for task in TASKS
    if task != "dates"
}
DRAWN |= {f"bench_{suite}": (f"bench_{suite}", bench_figure) for suite in SUITES}
MORE = (
    "step_smollm2",
    "memory_smollm2",
    "generate_smollm2",
    "step_stock",
    "step_even",
    "step_wide",
    "generate_intel",
    "quantize_intel",
)
DRAWN |= {f"bench_{name}": (f"bench_{name}", bench_figure) for name in MORE}
PICTURES = sorted(path.stem for path in FIGURES.glob("*.png"))


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


def read(stem):
    return json.loads((FIGURES / f"{stem}.json").read_text())


def test_no_picture_without_a_record_and_no_record_without_a_kind():
    assert PICTURES
    assert set(PICTURES) <= set(DRAWN)
    for path in FIGURES.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["kind"] in {
            "compare", "forgetting", "swap", "targets", "variants", "paging", "quantize",
            "memory", "perplexity", "bench",
        }, path.name  # fmt: skip
        assert "config" in record or record["kind"] == "memory", path.name


@pytest.mark.parametrize("stem", PICTURES)
def test_a_picture_is_what_its_record_draws(stem, tmp_path):
    """The same size, and nearly the same pixels: another matplotlib may shift a letter."""
    image = pytest.importorskip("matplotlib.image")
    record, draw = DRAWN[stem]
    drawn, committed = (
        image.imread(path)[..., :3]
        for path in (draw(read(record), tmp_path / "a.png"), FIGURES / f"{stem}.png")
    )
    assert drawn.shape == committed.shape
    assert drawn.shape[1] <= 1080, "letters of 8 points would be too small at 640 pixels"
    assert np.abs(drawn - committed).mean() < 0.01


@pytest.mark.parametrize("name", ["a$b_$c^{.txt", "caf\udce9.txt", "\\$1.txt"])
def test_any_name_of_a_file_can_stand_in_a_figure(name, tmp_path):
    """One with two dollars was read as a formula, one in another encoding as no text."""
    record = read("perplexity")
    record["data"]["name"] = name
    perplexity.perplexity_figure(record, tmp_path / "a.png")
    record = read("compare_text")
    record["task"]["name"] = f"data:{name}"
    figures.rank_vs_quality(record, tmp_path / "a.png")


def test_counts_fit_on_their_axis(tmp_path, monkeypatch):
    """Bits stored are no share of one: the axis must reach them (it once ended at 1)."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    for task in ("facts", "dates", "text", "planted"):
        record = read(f"compare_{task}")
        figures.rank_vs_quality(record, tmp_path / "a.png")
        low, high = kept[-1].axes[0].get_ylim()
        scores = [s for arm in record["arms"] for s in arm["scores"]]
        assert low <= min(scores) <= max(scores) <= high
        assert (kept[-1].axes[0].get_yscale() == "log") == (task == "planted")
