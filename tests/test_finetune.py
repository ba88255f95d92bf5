"""From a model directory and a file to an adapter, by the commands that a reader types."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from real_files import adapted_of, logits, model_of, tokenizer_of

from minilora import cli
from minilora.engine.errors import BaseMismatchWarning
from minilora.engine.forked import can_fork, copies
from minilora.engine.tensor import Tensor
from minilora.files import safetensors
from minilora.files.huggingface import read_huggingface, save_huggingface
from minilora.files.peft import load_adapter, save_adapter
from minilora.lab import finetune as lab
from minilora.lab.inspect_adapter import effective_rank, inspect_adapter
from minilora.lab.perplexity import above
from minilora.lab.report import size
from minilora.lora.lora import merge
from minilora.model.generate import each_token, generate
from minilora.model.layers import Linear
from minilora.quant.linear import quantize

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small model with a tokenizer, and data that it can learn."""
    folder = tmp_path_factory.mktemp("finetune")
    save_huggingface(folder / "model", model_of("llama"), tokenizer_of())
    words = ("red", "blue", "green")
    lines = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]}
        for w in words * 8
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "text.txt").write_text("one two three four five six seven. " * 40)
    return folder


def command(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = cli.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


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
        "--grad-accum", 3, "--epochs", 2, "--alpha", 3, "--dropout", "0.1", "--seed", 4, "--json",
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


# ------------------------------------------------------------------ the other commands


@pytest.fixture(scope="module")
def adapter(place):
    save_adapter(place / "adapter", adapted_of(model_of("llama"), alpha=60.0), base="model")
    return place / "adapter"


def test_generate_streams_what_generate_returns(capsys, place, adapter):
    tokenizer, model = tokenizer_of(), model_of("llama")
    common = ("generate", "--model", place / "model", "--prompt", "red blue", "--tokens", 12)
    ids = tokenizer.encode("red blue")
    for more, tree in (((), model), (("--adapter", adapter), merge(load_adapter(adapter, model)))):
        code, told, _ = command(capsys, *common, *more)
        (answer,) = generate(tree, [ids], 12, stop=tokenizer.stop)
        assert (code, told) == (0, tokenizer.decode(answer) + "\n")
    code, told, _ = command(capsys, *common, "--temperature", "0.9", "--top-k", 5, "--top-p", "0.9",
                            "--seed", 3)  # fmt: skip
    options = {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "seeds": [3]}
    (answer,) = generate(model, [ids], 12, stop=tokenizer.stop, **options)
    assert told == tokenizer.decode(answer) + "\n"


def test_several_adapters_answer_in_one_batch(capsys, place, adapter):
    common = ("generate", "--model", place / "model", "--chat", "--prompt", "red", "--tokens", 8)
    code, told, _ = command(capsys, *common, "--adapter", "base", "--adapter", adapter)
    assert code == 0
    alone = [command(capsys, *common)[1].strip(),
             command(capsys, *common, "--adapter", adapter)[1].strip()]  # fmt: skip
    assert told == f"[base] {alone[0]}\n[{adapter}] {alone[1]}\n"
    assert alone[0] != alone[1]


def test_generate_from_standard_input_and_what_it_refuses(capsys, place, monkeypatch):
    import io

    common = ("generate", "--model", place / "model", "--tokens", 3)
    monkeypatch.setattr("sys.stdin", io.StringIO("red"))
    assert command(capsys, *common, "--prompt", "-") == command(capsys, *common, "--prompt", "red")
    for more, message in (
        (("--prompt", ""), "prompt: expected some text"),
        (("--prompt", "x", "--system", "y"), "expected --chat"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--top-p", "2"), "top_p"),
        (("--prompt", "x", "--adapter", place / "none"), "expected the directory of an adapter"),
    ):
        code, _, error = command(capsys, *common, *more)
        assert code == 2
        assert message in error


def test_tokens_are_made_only_when_asked_for(place):
    steps = each_token(model_of("llama"), [[1, 2]], 5)
    assert [next(steps).tolist() for _ in range(2)] == [
        [t] for t in generate(model_of("llama"), [[1, 2]], 2)[0]
    ]


def test_merge_writes_the_merged_model(tmp_path, capsys, place, adapter):
    code, _, _ = command(capsys, "merge", "--model", place / "model", "--adapter", adapter,
                         "--out", tmp_path / "merged")  # fmt: skip
    assert code == 0
    wanted = merge(load_adapter(adapter, model_of("llama")))
    assert np.array_equal(logits(read_huggingface(tmp_path / "merged")), logits(wanted))
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_convert(tmp_path, capsys, place, adapter):
    common = ("convert", "--model", place / "model", "--adapter", adapter)
    for to, out in (("peft", "p"), ("mlx", "m"), ("gguf", "a.gguf")):
        code, told, _ = command(capsys, *common, "--to", to, "--out", tmp_path / out)
        assert (code, told) == (0, f"wrote {tmp_path / out}\n")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "p" / weights).read_bytes() == (adapter / weights).read_bytes()


def test_inspect(tmp_path, capsys, place, adapter):
    code, told, _ = command(capsys, "inspect", adapter)
    assert code == 0
    assert "every tensor matches its sha256" in told
    record = inspect_adapter(adapter)
    tree = adapted_of(model_of("llama"), alpha=60.0)
    entry = next(m for m in record["modules"] if m["module"].endswith("layers.1.mlp.up_proj"))
    values = np.linalg.svd(tree.blocks[1].mlp.up.delta(), compute_uv=False)[:3]
    assert np.allclose(entry["singular"], values, rtol=1e-5)
    assert abs(entry["norm"] - np.linalg.norm(tree.blocks[1].mlp.up.delta())) < 1e-4
    assert len(record["modules"]) == 14
    assert record["numbers"] == sum(3 * sum(m["shape"]) for m in record["modules"])
    assert json.loads(command(capsys, "inspect", adapter, "--json")[1])["numbers"] > 0
    code, _, error = command(capsys, "inspect", tmp_path)
    assert (code, "no such file" in error) == (2, True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for a, b in (((4, 32), (32, 8)), ((4,), (32, 4)), ((0, 32), (32, 0)), ((3, 32), (32, 3))):
        factors = {"A.weight": np.ones(a, np.float32), "B.weight": np.ones(b, np.float32)}
        safetensors.write(tmp_path / "adapter_model.safetensors",
                          {prefix + name: f for name, f in factors.items()})  # fmt: skip
        code, _, error = command(capsys, "inspect", tmp_path)
        assert (code, "q_proj: expected A (4, d_in) and B (d_out, 4)" in error) == (2, True)
    assert effective_rank(np.array([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(np.zeros(3)) == 0


def test_perplexity(tmp_path, capsys, place, adapter):
    common = ("perplexity", "--model", place / "model", "--data", place / "text.txt", "--max-len",
              32, "--windows", 6, "--out", tmp_path)  # fmt: skip
    code, told, _ = command(capsys, *common, "--codes", "float32,nf4,nf4+dq")
    assert code == 0
    record = json.loads((tmp_path / "perplexity.json").read_text())
    assert [row["code"] for row in record["rows"]] == ["float32", "nf4", "nf4+dq"]
    assert "The base itself: safetensors; what it lost before" in told
    first = record["rows"][0]
    assert first["perplexity"] == pytest.approx(np.exp(first["loss"]))
    assert record["rows"][1]["bytes"] < first["bytes"]
    assert (first["above"], first["error"]) == (0, 0)
    for row in record["rows"][1:]:
        assert row["above"] == pytest.approx(row["loss"] - first["loss"], abs=1e-6)
        assert row["error"] > 0
        assert f"{row['above']:.4f} ± {row['error']:.4f}" in told
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    adapted = command(capsys, *common, "--adapter", adapter, "--json")[1]
    assert json.loads(adapted)["rows"][0]["loss"] != first["loss"]
    for more, message in ((("--codes", "nf5"), "nf5"), (("--codes", "nf4+x"), "NAME or NAME+dq"),
                          (("--codes", ","), "at least one"),
                          (("--windows", 1), "at least 2")):  # fmt: skip
        code, _, error = command(capsys, *common, *more)
        assert code == 2
        assert message in error


def test_a_model_that_predicts_nothing_has_no_perplexity(tmp_path, capsys, place):
    """exp of its loss is no float."""
    tree = model_of("llama")
    head = Linear(Tensor(tree.head.weight.data * np.float32(1e4)), tree.head.bias)
    save_huggingface(tmp_path / "wild", replace(tree, head=head), tokenizer_of())
    code, _, error = command(capsys, "perplexity", "--model", tmp_path / "wild", "--data",
                             place / "text.txt", "--max-len", 32, "--out", tmp_path)  # fmt: skip
    assert (code, "float32: expected a loss below 700, found" in error) == (2, True)


def test_the_standard_error_of_a_weighted_mean():
    d = np.array([1.0, 2.0, 4.0, 9.0])
    found = above(d, np.full(4, 0.25))
    assert found["above"] == 4
    assert found["error"] == pytest.approx(np.std(d, ddof=1) / 2)
    twice = above(np.array([1.0, 3.0]), np.array([0.75, 0.25]))  # mean 1.5: 2 (9/16 1/4 + 1/16 9/4)
    assert twice == {"above": 1.5, "error": pytest.approx(0.75)}
    assert above(np.ones(1), np.ones(1)) == {"above": 1, "error": None}


def test_an_adapter_of_another_base_is_told(place, adapter):
    with pytest.warns(BaseMismatchWarning):
        load_adapter(adapter, model_of("llama", seed=3))
