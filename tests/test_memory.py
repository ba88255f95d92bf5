"""The ledger against the engine, to the byte; against the allocator; against the papers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_meter import weighed

from minilora import MiniloraError, TransformerConfig, count, init_transformer
from minilora.cli import main
from minilora.engine.backend import is_array
from minilora.fast.cpu import LEAST, arena
from minilora.lab.activations import transient_peak
from minilora.lab.bench_shapes import SHAPES
from minilora.lab.ledger import counted, ledger, start
from minilora.lab.memory import (
    Setting,
    code_bytes,
    moment_bytes,
    parameter_count,
    persistent,
    trainable_count,
)
from minilora.lab.memory_report import (
    MODELS,
    card_of,
    config_of,
    memory_by_model,
    memory_record,
    memory_table,
)
from minilora.model.module import tensors, walk


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("counts host memory")


SHAPE = {"vocab": 97, "width": 32, "layers": 3, "heads": 4, "context": 64}
STYLES = {
    "gpt2": TransformerConfig.gpt2(**SHAPE),
    "llama": TransformerConfig(**SHAPE, key_heads=2, tied=False, hidden=96),
    "mixed": TransformerConfig(**SHAPE, mlp="gelu"),
}
every_style = pytest.mark.parametrize("style", STYLES)
every_method = pytest.mark.parametrize("method", ["full", "lora", "qlora"])
either_way = pytest.mark.parametrize("recompute", [False, True])


def same(setting):
    """Persistent bytes and saved activations, predicted and counted, are equal."""
    predicted, real = ledger(setting), counted(setting)
    stays = predicted["persistent"]
    assert predicted["saved"] == real["saved"]
    assert stays["weights"] + stays.get("adapters", 0) == real["weights"]
    coded = ("codes", "scales", "nested scales", "code tables", "offsets")
    assert sum(stays.get(kind, 0) for kind in coded) == real["codes"]
    assert stays["gradients"] == real["gradients"]
    assert stays["optimizer"] == real["optimizer"]
    assert stays["control"] == real["control"] == 56
    kinds = {"weights", "adapters", *coded, "gradients", "optimizer", "control"}
    assert stays.keys() <= kinds  # whatever is predicted was counted here
    assert predicted["rules"] == real["rules"] == "fast NumPy rules"
    return predicted, real


def engine_peak(setting):
    """Bytes that the engine holds at most on the way back, counted there."""
    optimizer = start(setting)
    model, shape = optimizer.model, (setting.batch, setting.length)
    ids = np.random.default_rng(1).integers(0, setting.config.vocab, shape)
    loss = lambda: model.loss(ids, ids, recompute_blocks=setting.recompute)
    loss().backward(into=optimizer.gradients)
    found = optimizer.flat.grad.tobytes()
    optimizer.flat.grad.fill(0)
    last = loss()
    stays = [a for _, a in walk(model) if is_array(a)]
    stays += [t.data for t in tensors(model).values()]
    with weighed([*stays, optimizer.flat.grad, *arena.buffers.values()]) as meter:
        last.backward(into=optimizer.gradients)
    assert optimizer.flat.grad.tobytes() == found  # the walk that was weighed is the engine's
    return meter.peak


@every_style
@every_method
@either_way
def test_the_prediction_is_what_the_engine_holds(style, method, recompute):
    same(Setting(STYLES[style], method, rank=3, batch=4, length=40, recompute=recompute))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_scratch_is_bounded_by_the_largest_weight_not_by_how_many(method):
    scratch = {}
    for layers in (2, 6):
        shape = TransformerConfig(**SHAPE | {"layers": layers})
        setting = Setting(shape, method, batch=4, length=40, optimizer="sgd")
        scratch[layers] = counted(setting)["scratch"]
        assert scratch[layers] <= sum(ledger(setting)["scratch"].values())
    assert scratch[2] == scratch[6] > 0


@pytest.mark.parametrize("length", [LEAST - 1, LEAST])
def test_few_tokens_need_no_dense_weight(length):
    """An adapter's fast rule leaves them to the specification."""
    setting = Setting(STYLES["gpt2"], "lora", batch=1, length=length, optimizer="sgd")
    found = ledger(setting)["scratch"]["adapted weight"]
    assert (found > 0) == (length == LEAST)
    arena.buffers.clear()
    counted(setting)
    assert any("lora weight" in key for key in arena.buffers) == (length == LEAST)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw8bit"])
def test_other_optimizers(optimizer):
    for method in ("full", "lora"):
        same(Setting(STYLES["gpt2"], method, batch=2, length=20, optimizer=optimizer))


@pytest.mark.parametrize("options", [{"double": False}, {"code": "int8"}, {"block": 256}])
def test_other_codes(options):
    same(Setting(STYLES["llama"], "qlora", batch=2, length=20, **options))


@every_style
@every_method
@either_way
def test_the_peak_is_what_the_engine_holds_at_most(style, method, recompute):
    """But for what a pullback makes for itself: that is scratch, and the allocator's to see."""
    setting = Setting(STYLES[style], method, rank=3, batch=4, length=40, recompute=recompute)
    assert transient_peak(setting) == pytest.approx(engine_peak(setting), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["S1", "S2", "S3"])
@every_method
@either_way
def test_the_peak_is_what_the_engine_holds_at_most_in_real_sizes(name, method, recompute):
    shape = SHAPES[name]
    setting = Setting(
        shape.model, method, batch=shape.batch, length=shape.time, recompute=recompute
    )
    assert transient_peak(setting) == pytest.approx(engine_peak(setting), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["S1", "S2", "S3"])
@every_method
@either_way
def test_the_peak_is_that_of_the_allocator_within_five_percent(name, method, recompute):
    """Predicted from the config, scratch included; tracemalloc sees every array of a step."""
    shape = SHAPES[name]
    setting = Setting(
        shape.model, method, batch=shape.batch, length=shape.time, recompute=recompute
    )
    predicted, real = same(setting)
    assert 0.95 <= predicted["peak"] / real["peak"] <= 1.05


@every_style
def test_the_count_of_parameters(style):
    model = init_transformer(STYLES[style], np.random.default_rng(0))
    assert parameter_count(STYLES[style]) == count(model)


# --------------------------------------------------------------------- what papers say

PUBLISHED = {
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


def test_published_counts():
    assert {name: parameter_count(config) for name, config in MODELS.items()} == PUBLISHED


def test_sixty_five_billion_with_adam_in_sixteen_bits():
    """QLoRA, section 1: "more than 780 GB" for 16-bit fine-tuning of a 65B model."""
    held = persistent(Setting(config_of("llama-65b"), "full", dtype="bf16", length=1))
    total = sum(held.values()) / 1e9
    assert abs(total - 12 * PUBLISHED["llama-65b"] / 1e9) < 1e-6  # 2 + 2 + 8 bytes
    assert 780 < total < 785


def test_what_double_quantization_saves():
    """QLoRA, section 3: 0.373 bits a parameter, about 3 GB for a 65B model."""
    n = 1 << 24
    plain, double = (sum(code_bytes(n, "nf4", 64, d).values()) for d in (False, True))
    assert 8 * plain / n == 4.5
    assert 8 * double / n == 4.126953125
    assert 8 * (plain - double) / n == 0.373046875
    assert 2.9 < (plain - double) / n * PUBLISHED["llama-65b"] / 1e9 < 3.1


def test_the_command_says_what_the_papers_say_and_leave_out():
    """783 GB, 0.127 bit, 3.0 GB; and the activations, which their arithmetic has not."""
    setting = Setting(config_of("llama-65b"), "qlora", rank=64, dtype="bf16", length=512)
    record = memory_record("llama-65b", setting)
    said = record["papers"]
    assert said["full_16_bit"] == pytest.approx(783.4, abs=0.05)
    assert (said["scale_bits"], said["double_scale_bits"]) == (0.5, 0.126953125)
    assert said["double_saves"] == pytest.approx(3.04, abs=0.01)
    text = memory_table(record)
    for words in ("783.4 GB", "0.127", "3.0 GB", "They leave out", "activations", "offsets",
                  "peak of a step", "fast NumPy rules"):  # fmt: skip
        assert words in text
    entry = record["methods"]["qlora"]
    left = sum(entry["saved"].values()) + sum(entry["scratch"].values())
    assert f"qlora {left / 1e9:,.1f} GB" in text
    assert entry["persistent"]["offsets"] == 4 * 7 * 80  # a float32 for each quantized weight
    assert entry["peak"] <= 1.05 * entry["total"]


def test_the_published_counts_of_adapters():
    """facts.md 2.8: LLaMA-7B at r = 64 on seven linears 159.9M, at r = 8 on q and v 4.19M."""
    seven = Setting(config_of("llama-7b"), "lora", rank=64, length=1)
    two = Setting(config_of("llama-7b"), "lora", rank=8, length=1,
                  targets=("*.query", "*.value"))  # fmt: skip
    assert (trainable_count(seven), trainable_count(two)) == (159_907_840, 4_194_304)


def test_forty_eight_gigabytes_hold_it_without_the_activations():
    setting = Setting(config_of("llama-65b"), "qlora", rank=64, dtype="bf16", length=512)
    stays = sum(persistent(setting).values()) / 1e9
    assert 47 < stays < 49
    book = ledger(setting)
    assert book["total"] / 1e9 > 55  # the term that the arithmetic leaves out
    again = ledger(Setting(config_of("llama-65b"), "qlora", rank=64, dtype="bf16",
                           length=512, recompute=True))  # fmt: skip
    assert sum(again["saved"].values()) < 0.1 * sum(book["saved"].values())


def test_eight_bit_moments():
    big, small = 1 << 20, 4095
    setting = Setting(STYLES["gpt2"], length=8, optimizer="adamw8bit")
    assert moment_bytes(setting, big) / big == 2.03125
    assert moment_bytes(setting, small) == 8 * small


def test_the_counts_of_adapters():
    setting = Setting(STYLES["gpt2"], "lora", rank=5, length=8)
    per_block = (96 + 32) + (32 + 32) + (128 + 32) + (32 + 128)
    assert trainable_count(setting) == 5 * 3 * per_block


# ---------------------------------------------------------------------------- the command


def test_a_card_holds_the_peak_of_a_step_and_not_its_total_alone():
    setting = Setting(config_of("llama-7b"), "qlora", rank=64, batch=8, dtype="bf16",
                      recompute=True)  # fmt: skip
    record = memory_record("llama-7b", setting)
    entry = record["methods"]["qlora"]
    assert entry["total"] < 8e9 < entry["peak"]
    assert card_of(entry) == 24
    (row,) = [row for row in memory_table(record).splitlines() if row.startswith("qlora")]
    assert row.split()[-6:] == ["7.8", "GB", "8.5", "GB", "24", "GB"]


def test_the_table_and_the_figure(tmp_path):
    records = [
        memory_record(name, Setting(config_of(name), "qlora", rank=8, dtype="bf16"))
        for name in ("gpt2", "llama-7b")
    ]
    text = memory_table(json.loads(json.dumps(records[1])))
    assert "6,738,415,616 parameters" in text
    assert "saved by attention" in text
    assert "fits" in text
    path = memory_by_model({"records": records}, tmp_path / "m.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_committed_record_is_what_the_command_writes_today(tmp_path):
    """It is computed, not measured: another figure is another ledger."""
    assert main(["memory", "--out", str(tmp_path)]) == 0
    committed = Path(__file__).parent.parent / "figures" / "memory_by_model.json"
    assert json.loads((tmp_path / committed.name).read_text()) == json.loads(committed.read_text())


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "gpt9"], "gpt9"),
        (["--rank", "0"], "rank: expected a whole number >= 1, found 0"),
        (["--length", "99999"], "length"),
        (["--block", "0"], "block: expected one of"),
        (["--block", "48"], "block: expected one of"),
        (["--optimizer", "lion"], "lion"),
        (["--method", "dora"], "dora"),
    ],
)
def test_bad_options_are_one_line(options, words, tmp_path):
    command = [sys.executable, "-m", "minilora", "memory", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_settings_of_no_meaning():
    for options in (
        {"method": "dora"}, {"rank": 0}, {"length": 65}, {"dtype": "int3"}, {"scored": -1},
    ):  # fmt: skip
        with pytest.raises(MiniloraError, match="expected"):
            Setting(**({"config": STYLES["gpt2"], "length": 8} | options))


@pytest.mark.parametrize("targets", ["head", ("up", "head"), "*", "embedding", "none", ()])
def test_targets_that_are_not_in_the_ledger(targets):
    """Of a tied head it once knew no shape, and of an adapter on a table no byte."""
    for style in STYLES.values():
        setting = Setting(style, method="lora", length=8, targets=targets)
        for function in (persistent, trainable_count, ledger):
            with pytest.raises(MiniloraError, match="targets: expected linears of blocks, found"):
                function(setting)
