"""The commands around a fine-tune: generate, merge, convert, inspect, perplexity."""

import json
from dataclasses import replace

import numpy as np
import pytest
from real_files import (
    adapted_of,
    command,
    dora_of,
    logits,
    model_of,
    small_place,
    tokenizer_of,
)

from minilora.engine.errors import BaseMismatchWarning
from minilora.engine.tensor import Tensor
from minilora.files import safetensors
from minilora.files.huggingface import read_huggingface, save_huggingface
from minilora.files.peft import load_adapter, save_adapter
from minilora.lab.inspect_adapter import effective_rank, inspect_adapter
from minilora.lab.perplexity import above
from minilora.lora.lora import merge
from minilora.model.generate import each_token, generate
from minilora.model.layers import Linear

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_place(tmp_path_factory.mktemp("place"))


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
    monkeypatch.setattr("sys.stdin", None)  # as Python has it where none is open
    for more, message in (
        (("--prompt", "-"), "prompt: expected a text on the standard input, found it closed"),
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


def test_lengths_are_merged_before_other_adapters_or_not_at_all(tmp_path, capsys, place, adapter):
    """DoRA's m is that of the base: after another adapter it would take back what that changed."""
    save_adapter(tmp_path / "dora", dora_of(model_of("llama")), base="model")
    common = ("merge", "--model", place / "model", "--out", tmp_path / "merged", "--adapter")
    code, _, error = command(capsys, *common, adapter, "--adapter", tmp_path / "dora")
    assert (code, "dora: expected DoRA as the first adapter" in error) == (2, True)
    assert not (tmp_path / "merged").exists()
    assert command(capsys, *common, tmp_path / "dora", "--adapter", adapter)[0] == 0
    first = merge(load_adapter(tmp_path / "dora", model_of("llama")))
    wanted = merge(load_adapter(adapter, first))
    assert np.array_equal(logits(read_huggingface(tmp_path / "merged")), logits(wanted))


@pytest.mark.parametrize("run", [("merge",), ("convert", "--to", "peft")])
def test_what_is_made_of_a_model_does_not_take_its_place(capsys, place, adapter, run):
    before = {path: path.read_bytes() for path in (place / "model").iterdir()}
    code, _, error = command(capsys, *run, "--model", place / "model", "--adapter", adapter,
                             "--out", place / "adapter" / ".." / "model")  # fmt: skip
    assert (code, "expected another place than that of the model" in error) == (2, True)
    assert {path: path.read_bytes() for path in (place / "model").iterdir()} == before


def test_convert(tmp_path, capsys, place, adapter, monkeypatch):
    common = ("convert", "--model", place / "model", "--adapter", adapter)
    for to, out in (("peft", "p"), ("mlx", "m"), ("gguf", "a.gguf")):
        code, told, _ = command(capsys, *common, "--to", to, "--out", tmp_path / out)
        assert (code, told) == (0, f"wrote {tmp_path / out}\n")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "p" / weights).read_bytes() == (adapter / weights).read_bytes()
    monkeypatch.chdir(place / "model")  # a model has a name where it stands, too
    common = ("convert", "--model", ".", "--adapter", adapter, "--to", "peft")
    assert command(capsys, *common, "--out", tmp_path / "q")[0] == 0
    config = "adapter_config.json"
    assert (tmp_path / "q" / config).read_bytes() == (tmp_path / "p" / config).read_bytes()


def test_inspect(tmp_path, capsys, place, adapter, monkeypatch):
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
    monkeypatch.chdir(adapter)
    assert command(capsys, "inspect", ".")[1] == told
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
    settings["use_dora"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    factors = {"A.weight": np.ones((4, 32), np.float32), "B.weight": np.ones((8, 4), np.float32)}
    safetensors.write(tmp_path / "adapter_model.safetensors",
                      {prefix + name: f for name, f in factors.items()})  # fmt: skip
    code, _, error = command(capsys, "inspect", tmp_path)
    assert (code, "q_proj: DoRA's magnitude is missing" in error) == (2, True)
    factors["magnitude_vector"] = np.ones(7, np.float32)
    safetensors.write(tmp_path / "adapter_model.safetensors",
                      {prefix + name: f for name, f in factors.items()})  # fmt: skip
    code, _, error = command(capsys, "inspect", tmp_path)
    assert (code, "q_proj: expected a magnitude (8,), found (7,)" in error) == (2, True)
    factors["magnitude_vector"] = np.ones(8, np.float32)
    safetensors.write(tmp_path / "adapter_model.safetensors",
                      {prefix + name: f for name, f in factors.items()})  # fmt: skip
    assert command(capsys, "inspect", tmp_path)[0] == 0
    raw = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(raw)
    code, _, error = command(capsys, "inspect", tmp_path)
    assert (code, "sha256" in error) == (2, True)
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
                          (("--codes", "nf4+"), "NAME+dq"), (("--codes", ","), "at least one"),
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
