"""From a model directory and a file to an adapter, by the commands that a reader types."""

import json
import os
import signal

import numpy as np
import pytest
from real_files import command, model_of, small_place, tokenizer_of

from minilora.engine.forked import can_fork, copies
from minilora.files.huggingface import read_huggingface, save_huggingface
from minilora.files.peft import load_adapter
from minilora.lab import finetune as lab
from minilora.lab.report import size
from minilora.lora.variants import DoRALinear
from minilora.model.generate import generate
from minilora.quant.linear import quantize

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_place(tmp_path_factory.mktemp("place"))


def finetuned(capsys, place, out, *more, data="data.jsonl"):
    return command(
        capsys, "finetune", "--model", place / "model", "--data", place / data,
        "--out", out, "--lr", "0.02", "--max-len", "32", *more,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_fine_tune_leaves_an_adapter_with_its_papers(tmp_path, capsys, place, method):
    code, told, _ = finetuned(
        capsys,
        place,
        tmp_path / "out",
        "--method",
        method,
        "--rank",
        4,
        "--prompt",
        "red",
        "--epochs",
        12,
    )
    assert code == 0
    assert sorted(os.listdir(tmp_path)) == ["out"]  # no checkpoints, nothing stale
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "finetune.json",
        "loss.png",
    ]  # fmt: skip
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    losses = record["losses"]
    assert losses["adapted"] < losses["base"] / 3
    assert losses["adapted"] == min(entry["val"] for entry in record["history"])
    assert ("quantized base" in losses) == (method == "qlora")
    assert record["steps"]["taken"] == record["steps"]["planned"] == 66  # 12 epochs of 22 lines
    assert record["samples"][0]["after"] == "red"
    assert record["samples"][0]["before"] != "red"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: model" in card
    assert f"{losses['adapted']:.4f}" in card
    assert f"{losses['base']:.3f}" in told
    assert " tokens/s" in told
    assert "peak memory of the process" in told
    assert f"beside a base of {size(record['base_bytes'])}" in told
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    base = read_huggingface(place / "model")
    if method == "qlora":
        assert (
            record["base_bytes"]
            < 0.6 * sum(t.nbytes for t in [base.embedding.weight.data] * 2) + 2e5
        )
        base = quantize(base)
    tuned = load_adapter(tmp_path / "out", base, strict_base=True)
    ids = tokenizer_of().chat([{"role": "user", "content": "blue"}])
    (answer,) = generate(tuned, [ids], 5, stop=tokenizer_of().stop)
    assert tokenizer_of().decode(answer) == "blue"


def test_text_and_more_options(tmp_path, capsys, place):
    code, told, _ = finetuned(
        capsys, place, tmp_path / "out", "--targets", "query,value", "--rslora", "--batch", 2,
        "--grad-accum", 3, "--epochs", 2, "--alpha", 3, "--dropout", "0.1", "--seed", 4, "--dora",
        "--json",
        data="text.txt",
    )  # fmt: skip
    assert code == 0
    record = json.loads(told)
    assert record["data"]["kind"] == "text"
    assert record["losses"]["adapted"] < record["losses"]["base"]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert (settings["use_rslora"], settings["lora_alpha"], settings["lora_dropout"]) == (
        True, 3, 0.1,
    )  # fmt: skip
    assert record["config"]["epochs"] == 2
    assert settings["use_dora"] is True
    tuned = load_adapter(tmp_path / "out", read_huggingface(place / "model"))
    node = tuned.blocks[0].attention.query
    assert isinstance(node, DoRALinear)
    moved = node.magnitude.data / np.linalg.norm(node.base.weight.data, axis=1)
    assert np.abs(moved - 1).max() > 1e-3  # it trained
    assert "# A DoRA adapter for model" in (tmp_path / "out" / "README.md").read_text()
    code, told, _ = command(capsys, "inspect", tmp_path / "out")
    assert code == 0
    assert "DoRA: norms and spectra are of s B A alone" in told
    assert f"{record['trainable']:,} numbers" in told


def test_shards_learn_the_same_and_what_they_hold_is_counted(tmp_path, capsys, place, monkeypatch):
    from minilora.train import parallel

    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 2)  # so that they work at one time
    seen, plain = [], lab.held_at_most
    monkeypatch.setattr(lab, "held_at_most", lambda: (seen.append(len(copies())), plain())[1])
    one, two = (
        json.loads(finetuned(capsys, place, tmp_path / str(n), "--shards", n, "--json")[1])
        for n in (1, 2)
    )
    assert one["losses"]["adapted"] == pytest.approx(two["losses"]["adapted"], rel=1e-3)
    assert (one["config"]["shards"], two["config"]["shards"]) == (1, 2)
    assert max(seen) == can_fork()  # a copy was there when the memory was taken


def test_interrupted_and_resumed_is_the_run_never_interrupted(tmp_path, capsys, place, monkeypatch):
    finetuned(capsys, place, tmp_path / "whole")
    plain, calls = lab.token_loss, [0]

    def pressing(model, batch, rng):
        calls[0] += rng is not None
        if calls[0] == 8 and rng is not None:
            signal.raise_signal(signal.SIGINT)
        return plain(model, batch, rng)

    monkeypatch.setattr(lab, "token_loss", pressing)
    code, told, _ = finetuned(capsys, place, tmp_path / "out")
    monkeypatch.undo()
    assert code == 130
    assert "go on with --resume" in told
    assert sorted(os.listdir(tmp_path)) == ["out-checkpoints", "whole"]
    with monkeypatch.context() as patch:  # before any work
        patch.setattr(lab, "open_for_text", None)
        code, _, error = finetuned(capsys, place, tmp_path / "out")
    assert code == 2
    assert "holds checkpoints of a run; resume it" in error
    code, _, error = finetuned(capsys, place, tmp_path / "out", "--resume", "--method", "qlora")
    assert code == 2
    assert "belongs to another run (about: saved" in error
    counted = []
    monkeypatch.setattr(lab, "tokens_seen", lambda *arguments: counted.append(arguments[-1]) or 0)
    code, told, _ = finetuned(capsys, place, tmp_path / "out", "--resume")
    assert code == 0
    whole, record = (
        json.loads((tmp_path / out / "finetune.json").read_text()) for out in ("whole", "out")
    )
    taken, here = record["steps"]["taken"], record["steps"]["here"]
    assert (whole["steps"]["here"], 0 < here < taken) == (taken, True)
    assert f"{taken} of {taken} steps, {here} of them after a stop, in" in told
    assert counted == [here]  # only these are divided by the seconds of this run
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rank", "0"], "rank: expected >= 1"),
        (["--batch", "0"], "batch: expected >= 1"),
        (["--grad-accum", "0"], "grad_accum"),
        (["--shards", "0"], "shards: expected >= 1"),
        (["--lr", "nan"], "lr: expected a number > 0"),
        (["--epochs", "-1"], "epochs: expected a number > 0"),
        (["--epochs", "1e308"], "epochs: expected fewer than 1e+09 steps"),
        (["--seed", "-1"], "seed: expected >= 0, found -1"),
        (["--batch", "1000000000000"], "Unable to allocate"),
        (["--alpha", "0"], "alpha: expected a number > 0"),
        (["--held-out", "1"], "share in (0, 1)"),
        (["--max-len", "1"], "length >= 2"),
        (["--targets", "nowhere"], "nowhere"),
        (["--method", "qlora", "--code", "nf3"], "nf3"),
        (["--dropout", "1"], "dropout"),
        (["--model", "nowhere"], "found nothing there"),
        (["--data", "nowhere.txt"], "found nothing"),
    ],
)
def test_one_line_for_what_cannot_be_done(tmp_path, capsys, place, more, message):
    code, told, error = finetuned(capsys, place, tmp_path / "out", *more)
    assert code == 2
    assert message in error
    assert error.startswith("minilora finetune: ")
    assert told == ""
    assert not (tmp_path / "out").exists()


def test_lengths_beside_a_table_are_refused_before_training(tmp_path, capsys, place, monkeypatch):
    """PEFT would want a length of each adapted module; it was said when all was learned."""
    monkeypatch.setattr(lab, "train", None)
    code, _, error = finetuned(
        capsys, place, tmp_path / "out", "--dora", "--targets", "query,embedding"
    )
    assert (code, "DoRA: expected one value for all adapters" in error) == (2, True)


def test_a_directory_with_other_things_is_refused_before_any_work(tmp_path, capsys, place):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    code, _, error = finetuned(capsys, place, tmp_path / "out")
    assert code == 2
    assert "thesis.txt, which would be lost" in error


def test_of_a_long_question_the_end_is_asked(tmp_path, capsys, place):
    question = "red blue green one two three " * 2
    line = json.dumps({"prompt": question, "completion": "red"})
    (tmp_path / "long.jsonl").write_text("\n".join([line] * 4))
    code, told, _ = finetuned(capsys, place, tmp_path / "out", "--max-len", 64, "--json",
                              data=tmp_path / "long.jsonl")  # fmt: skip
    assert code == 0
    record = json.loads(told)
    for sample in record["samples"]:
        assert len(tokenizer_of().encode(sample["prompt"])) == 64 - lab.SAMPLE_TOKENS
        assert question.endswith(sample["prompt"])


def test_a_model_without_a_tokenizer(tmp_path, capsys, place):
    save_huggingface(tmp_path / "bare", model_of("llama"))
    for name, *more in (("finetune", "--out", tmp_path / "o"), ("generate", "--prompt", "x"),
                        ("perplexity",)):  # fmt: skip
        code, _, error = command(capsys, name, "--model", tmp_path / "bare", *more)
        assert code == 2
        assert "expected a model with a tokenizer, found none" in error
