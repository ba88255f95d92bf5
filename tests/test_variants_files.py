"""Variants of LoRA and files: DoRA as PEFT writes it, and what no file may hold."""

import json

import numpy as np
import pytest
from real_files import FAMILIES, adapted_of, dora_of, logits, model_of

from minilora import adapt, freeze, parameters, rebuild, walk
from minilora.engine.errors import AdapterError
from minilora.files.export import export_gguf, export_mlx
from minilora.files.peft import WEIGHTS, load_adapter, save_adapter
from minilora.files.peft_config import CONFIG
from minilora.lora.adapters import take
from minilora.lora.variants import DoRALinear, SplitLinear, dora, learned, pissa


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


def test_a_variant_is_not_taken_for_plain_lora(tmp_path):
    model = model_of()
    split, lengths = pissa(adapted_of(model)), dora_of(model)
    for tree, kind in ((split, "SplitLinear"), (lengths, "DoRALinear")):
        with pytest.raises(AdapterError, match=f"take: expected plain LoRA at .* {kind}: merge"):
            take(tree)
        for export in (export_gguf, export_mlx):
            with pytest.raises(AdapterError, match=f"plain LoRA at .* {kind}: merge"):
                export(tmp_path / "out", tree)
    with pytest.raises(AdapterError, match=r"learned\(start, adapted\)"):
        save_adapter(tmp_path / "out", split)
    with pytest.raises(AdapterError, match="factors alone, found a DoRALinear: merge it"):
        learned(lengths, lengths)
    with pytest.raises(AdapterError, match="learned: expected the same adapters in both trees"):
        learned(split, pissa(adapted_of(model, targets=["query"])))
    some = adapted_of(model)
    up = some.blocks[0].mlp.up
    some = rebuild(some, lambda _, n: dora(up) if n is up else n)
    with pytest.raises(AdapterError, match="DoRA: expected one value for all adapters"):
        save_adapter(tmp_path / "out", some)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------ files


def same_factors(a, b):
    ours, theirs = (
        {
            path: getattr(node, name).data.tobytes()
            for path, node in walk(tree)
            if isinstance(node, DoRALinear)
            for name in ("A", "B", "magnitude")
        }
        for tree in (a, b)
    )
    assert ours == theirs
    assert ours


@pytest.mark.parametrize("name", FAMILIES)
def test_dora_comes_back_from_its_files_to_the_bit(tmp_path, name):
    model = model_of(name)
    adapted = dora_of(model, rank_pattern={"down": 2})
    save_adapter(tmp_path / "adapter", adapted)
    back = load_adapter(tmp_path / "adapter", model)
    same_factors(adapted, back)
    assert not parameters(back)
    assert logits(back).tobytes() == logits(freeze(adapted)).tobytes()
    again = load_adapter(tmp_path / "adapter", model, trainable=True)
    assert parameters(again).keys() == parameters(adapted).keys()


def test_a_dora_directory_that_lacks_lengths_or_does_not_say_so_is_refused(tmp_path):
    model = model_of()
    save_adapter(tmp_path / "dora", dora_of(model))
    save_adapter(tmp_path / "lora", adapted_of(model))

    def refused(weights, config, message):
        folder = tmp_path / "mixed"
        folder.mkdir(exist_ok=True)
        content = json.loads((tmp_path / config / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content))
        raw = (tmp_path / weights / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(raw.replace(b"minilora.config_sha256", b"x" * 22))
        with pytest.raises(AdapterError, match=message):
            load_adapter(folder, model)

    refused("lora", "dora", r"missing: .*lora_magnitude_vector")
    refused("dora", "lora", r"no place in this model: .*lora_magnitude_vector")


# ------------------------------------------------------------------------ against PEFT


@pytest.fixture
def peft():
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def theirs_on_disk(tmp_path, model):
    import transformers

    from minilora.files.huggingface import save_huggingface

    save_huggingface(tmp_path / "model", model)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama biased"])
def test_dora_is_that_of_peft_there_and_back_and_in_training(tmp_path, peft, name):
    import torch

    model = model_of(name)
    adapted = dora_of(model)
    save_adapter(tmp_path / "adapter", adapted)
    theirs = peft.PeftModel.from_pretrained(
        theirs_on_disk(tmp_path, model), tmp_path / "adapter", is_trainable=True
    )
    ids = np.random.default_rng(7).integers(0, 320, (2, 12))
    scores = theirs(torch.tensor(ids)).logits
    expected = scores.detach().numpy()
    assert np.abs(logits(adapted, ids) - expected).max() <= 2e-5 * np.abs(expected).max()
    scores.square().sum().backward()
    y = adapted(ids)
    found = (y * y).sum().backward()
    gradients = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(found) == len(gradients) == len(parameters(adapted))
    size = lambda arrays: sorted(float(np.linalg.norm(g)) for g in arrays)
    np.testing.assert_allclose(size(found.values()), size(gradients.values()), rtol=2e-4)
    theirs.save_pretrained(tmp_path / "back")
    same_factors(load_adapter(tmp_path / "back", model), adapted)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_pissa_is_that_of_peft(tmp_path, peft, name):
    """The same base and the same products B A; and their adapter itself is refused by name."""
    import torch

    model = model_of(name)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear",
                             init_lora_weights="pissa")  # fmt: skip
    theirs = peft.get_peft_model(theirs_on_disk(tmp_path, model), config).eval()
    start = pissa(adapt(model, rank=3, alpha=6, rng=np.random.default_rng(0)))
    ours = sorted(
        (float(np.linalg.norm(n.base.dense())), float(np.linalg.norm(n.delta())))
        for _, n in walk(start) if isinstance(n, SplitLinear)
    )  # fmt: skip
    found = sorted(
        (float(m.base_layer.weight.norm()), float(m.get_delta_weight("default").norm()))
        for m in theirs.modules() if hasattr(m, "base_layer")
    )  # fmt: skip
    np.testing.assert_allclose(ours, found, rtol=1e-4)
    ids = np.random.default_rng(7).integers(0, 320, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits(start, ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="init_lora_weights: expected an initialization that"):
        load_adapter(tmp_path / "adapter", model)
