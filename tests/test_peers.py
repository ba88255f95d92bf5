"""The same weights and inputs in torch, transformers and PEFT: the same numbers come out.

Run with `-m peers`.  The libraries are imported inside the tests, so that the default suite
neither needs them nor waits for them; what their imports warn of is theirs.
"""

from contextlib import nullcontext

import numpy as np
import pytest

from minilora import SGD, AdamW, Parameter, adapt, freeze, merge, rebuild, unfreeze
from minilora.engine import attention as attention_file
from minilora.engine import fused, loss
from minilora.engine.check import gradients
from minilora.engine.rules import reference_rules
from minilora.files.names import hf_name, is_transposed
from minilora.lora.lora import LoRALinear
from minilora.model.module import module, parameters, walk
from minilora.model.transformer import TransformerConfig, init_transformer

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

GPT2 = TransformerConfig.gpt2(vocab=61, width=32, layers=2, heads=4, context=24)
LLAMA = TransformerConfig(
    vocab=61, width=32, layers=2, heads=4, key_heads=2, hidden=48, context=24, tied=False
)
LLAMA_TIED = TransformerConfig(vocab=61, width=32, layers=2, heads=4, key_heads=1, context=24)


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers")


@pytest.fixture
def peft(transformers):
    return pytest.importorskip("peft")


# ------------------------------------------------------------------ the same model twice


def hugging_face(config, transformers):
    """The transformers model of this shape, evaluation mode, eager attention."""
    if config.packed:
        theirs = transformers.GPT2Config(
            vocab_size=config.vocab,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.inner,
            layer_norm_epsilon=config.eps,
            activation_function="gelu_new",
        )
        return transformers.GPT2LMHeadModel(theirs).eval()
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.inner,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv,
        max_position_embeddings=config.context,
        rms_norm_eps=config.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
    )
    return transformers.LlamaForCausalLM(theirs).eval()


def pair(config, torch, transformers, seed=0):
    """Our model and theirs with the same weights, none of them at a special value."""
    rng = np.random.default_rng(seed)

    def shaken(path, node):
        if not isinstance(node, Parameter):
            return node
        noise = rng.standard_normal(node.shape, dtype=np.float32)
        return Parameter(node.data + np.float32(0.1) * noise)

    ours = rebuild(init_transformer(config, rng, std=0.1), shaken)
    theirs = hugging_face(config, transformers)
    state = dict(theirs.named_parameters())
    for path, p in parameters(ours).items():
        array = p.data.T if is_transposed(path, config) and p.ndim == 2 else p.data
        with torch.no_grad():
            state[hf_name(path, config)].copy_(torch.tensor(array.copy()))
    return ours, theirs


def batch(config, seed=1):
    """ids and targets (3, T); a few targets are not scored."""
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(0, config.vocab, (2, 3, config.context))
    targets[:, :4] = loss.IGNORE
    return ids, targets


def their_gradients(model, torch, ids, targets):
    """Logits and {name: gradient of the mean loss}."""
    logits = model(torch.tensor(ids)).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets).flatten()
    ).backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().numpy(), found


def our_gradients(model, ids, targets):
    """{path: gradient of the mean loss}."""
    found = model.loss(ids, targets).backward()
    return {path: found[p] / loss.scored(targets) for path, p in parameters(model).items()}


def assert_close(ours, theirs, tolerance, name=""):
    """Equal to `tolerance`, relative to the largest entry."""
    assert ours.shape == theirs.shape, name
    gap = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
    assert gap <= tolerance, f"{name}: {gap:.2e}"


@pytest.mark.parametrize("rules", [nullcontext, reference_rules], ids=["fast", "specification"])
@pytest.mark.parametrize("config", [GPT2, LLAMA, LLAMA_TIED], ids=["gpt2", "llama", "llama tied"])
def test_logits_and_all_gradients_are_those_of_transformers(config, rules, torch, transformers):
    ours, theirs = pair(config, torch, transformers)
    ids, targets = batch(config)
    their_logits, expected = their_gradients(theirs, torch, ids, targets)
    with rules():
        logits = freeze(ours)(ids).data
        found = our_gradients(ours, ids, targets)
    assert np.abs(logits - their_logits).max() <= 1e-5
    assert len(found) == len(expected)
    for path, g in found.items():
        g = g.T if is_transposed(path, config) and g.ndim == 2 else g
        assert_close(g, expected[hf_name(path, config)], 1e-4, path)


# --------------------------------------------------------------------------------- LoRA

CASES = {
    "gpt2 c_attn": (GPT2, ["attention.qkv"], ["c_attn"]),
    "llama all": (
        LLAMA,
        "all-linear",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["alpha/r", "rsLoRA"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_are_those_of_peft(case, rank_stabilized, torch, transformers, peft):
    """Logits, gradients of A and B, and logits after the merge."""
    config, ours_named, theirs_named = CASES[case]
    plain, theirs = pair(config, torch, transformers)
    rng = np.random.default_rng(2)
    adapted = adapt(plain, ours_named, rank=4, alpha=6.0, rng=rng, rank_stabilized=rank_stabilized)
    adapted = rebuild(
        adapted,
        lambda path, node: (
            Parameter(rng.standard_normal(node.shape, np.float32) * np.float32(0.1))
            if isinstance(node, Parameter)
            else node
        ),
    )
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=theirs_named,
            use_rslora=rank_stabilized,
            fan_in_fan_out=config.packed,
        ),
    )
    state = dict(theirs.named_parameters())
    names = {}
    for path, node in walk(adapted):
        if isinstance(node, LoRALinear):
            for letter in "AB":
                name = f"base_model.model.{hf_name(path, config)}.lora_{letter}.default.weight"
                names[f"{path}.{letter}"] = name
                with torch.no_grad():
                    state[name].copy_(torch.tensor(getattr(node, letter).data))

    ids, targets = batch(config)
    their_logits, expected = their_gradients(theirs, torch, ids, targets)
    found = our_gradients(adapted, ids, targets)
    assert found.keys() == names.keys()
    assert expected.keys() == set(names.values())
    assert np.abs(adapted(ids).data - their_logits).max() <= 1e-5
    for path, g in found.items():
        assert_close(g, expected[names[path]], 1e-4, path)

    with torch.no_grad():
        merged = theirs.merge_and_unload()(torch.tensor(ids)).logits.numpy()
    assert np.abs(merge(adapted)(ids).data - merged).max() <= 1e-5


# --------------------------------------------------------------------------- optimizers


@module
class Two:
    """A matrix, which decays, and a vector, which does not."""

    matrix: Parameter
    vector: Parameter


def drawn_two():
    rng = np.random.default_rng(3)
    return Two(Parameter(rng.standard_normal((7, 5))), Parameter(rng.standard_normal(5)))


def run_both(torch, optimizer, theirs_of, before_step=lambda matrix, lr: None, steps=1000):
    """Both optimizers on the same float64 gradients, with clipping and a falling rate."""
    matrix, vector = (torch.tensor(p.data.copy()) for p in parameters(drawn_two()).values())
    theirs = theirs_of(matrix, vector)
    rng = np.random.default_rng(4)
    for step in range(steps):
        # Torch divides by norm + 1e-6 when it clips, so it is given gradients clipped here.
        g = [rng.standard_normal(s) * rng.uniform(0.01, 3) for s in ((7, 5), (5,))]
        norm = np.sqrt(sum((part**2).sum() for part in g))
        lr = 1e-2 * (1 - step / (2 * steps))
        for array, part in zip(optimizer.gradients.values(), g, strict=True):
            array += 8 * part
        optimizer.set_lr(lr)
        optimizer.step(divide_by=8, clip=2.0)
        for p, part in zip((matrix, vector), g, strict=True):
            p.grad = torch.tensor(part * min(1.0, 2.0 / norm))
        for group in theirs.param_groups:
            group["lr"] = lr
        before_step(matrix, lr)
        theirs.step()
    for ours, p in zip(parameters(optimizer.model).values(), (matrix, vector), strict=True):
        np.testing.assert_allclose(ours.data, p.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rules", [nullcontext, reference_rules], ids=["fast", "specification"])
def test_adamw_is_that_of_torch_over_a_thousand_steps(rules, torch):
    options = {"betas": (0.8, 0.99), "eps": 1e-7}
    with rules():
        run_both(
            torch,
            AdamW(drawn_two(), weight_decay=0.1, **options),
            lambda matrix, vector: torch.optim.AdamW(
                [
                    {"params": [matrix], "weight_decay": 0.1},
                    {"params": [vector], "weight_decay": 0.0},
                ],
                **options,
            ),
        )


def test_sgd_with_momentum_is_that_of_torch_but_for_the_decay_which_is_decoupled(torch):
    run_both(
        torch,
        SGD(drawn_two(), momentum=0.9, weight_decay=0.1),
        lambda matrix, vector: torch.optim.SGD([matrix, vector], lr=1e-2, momentum=0.9),
        before_step=lambda matrix, lr: matrix.mul_(1 - lr * 0.1),
    )


# ---------------------------------------------------------------------------- single ops


normal = np.random.default_rng(6).standard_normal

IDS = np.array([[3, 0, 3], [6, 3, 1]])
TARGETS = np.array([1, loss.IGNORE, 4, 0, loss.IGNORE, 8])

OPS = {  # name: (ours, theirs given torch.nn.functional, arrays)
    "linear": (
        fused.linear,
        lambda F: F.linear,
        [normal((2, 3, 5)), normal((4, 5)), normal(4)],
    ),
    "gelu": (
        fused.gelu,
        lambda F: lambda x: F.gelu(x, approximate="tanh"),
        [3 * normal((5, 70))],
    ),
    "swiglu": (
        fused.swiglu,
        lambda F: lambda gate, up: F.silu(gate) * up,
        [2 * normal((6, 9)), normal((9, 6)).T],
    ),
    "layer_norm": (
        lambda x, w, b: fused.layer_norm(x, w, b, eps=1e-5),
        lambda F: lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, eps=1e-5),
        [3 * normal((2, 5, 16)) + 1, normal(16), normal(16)],
    ),
    "rms_norm": (
        lambda x, w: fused.rms_norm(x, w, eps=1e-5),
        lambda F: lambda x, w: F.rms_norm(x, (x.shape[-1],), w, eps=1e-5),
        [normal((2, 5, 16)), normal(16)],
    ),
    "embedding": (
        lambda table: fused.embedding(table, ids=IDS),
        lambda F: lambda table: F.embedding(F.torch.tensor(IDS), table),
        [normal((7, 4))],
    ),
    "attention": (
        attention_file.attention,
        lambda F: (
            lambda q, k, v: F.scaled_dot_product_attention(
                *(a.transpose(1, 2) for a in (q, k, v)), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        ),
        [normal((2, 70, 4, 8)), normal((2, 70, 2, 8)), normal((2, 70, 2, 8))],
    ),
    "cross_entropy": (
        lambda z: loss.cross_entropy(z, targets=TARGETS),
        lambda F: lambda z: F.cross_entropy(z, F.torch.tensor(TARGETS), reduction="sum"),
        [4 * normal((6, 9))],
    ),
    "head_cross_entropy": (
        lambda x, W: loss.head_cross_entropy(x, W, targets=TARGETS, chunk=4),
        lambda F: lambda x, W: F.cross_entropy(x @ W.T, F.torch.tensor(TARGETS), reduction="sum"),
        [normal((6, 5)), normal((9, 5))],
    ),
}


@pytest.mark.parametrize("rules", [nullcontext, reference_rules], ids=["fast", "specification"])
@pytest.mark.parametrize("name", OPS)
def test_an_op_and_its_gradients_are_those_of_torch_in_double_precision(name, rules, torch):
    ours, theirs, arrays = OPS[name]
    given = [torch.tensor(a.copy(), requires_grad=True) for a in arrays]
    value = theirs(torch.nn.functional)(*given)
    cotangent = np.random.default_rng(5).standard_normal(tuple(value.shape))
    value.backward(torch.tensor(cotangent))
    with rules():
        found, mine = gradients(ours, arrays, cotangent)
    assert_close(mine.data, value.detach().numpy(), 1e-12, name)
    for i, (g, p) in enumerate(zip(found, given, strict=True)):
        assert_close(g, p.grad.numpy(), 1e-12, f"{name}, argument {i}")


def test_a_thawed_copy_of_frozen_weights_learns_as_torch_does(torch, transformers):
    """Four steps of both whole loops, from weights that were frozen and thawed."""
    ours, theirs = pair(GPT2, torch, transformers)
    ids, targets = batch(GPT2)
    optimizer = AdamW(unfreeze(freeze(ours)), lr=1e-3, weight_decay=0.0)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(4):
        value = optimizer.model.loss(ids, targets)
        value.backward(into=optimizer.gradients)
        optimizer.step(divide_by=loss.scored(targets))
        logits = theirs(torch.tensor(ids)).logits.flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets).flatten())
        their_optimizer.zero_grad()
        expected.backward()
        their_optimizer.step()
        assert abs(value.item() / loss.scored(targets) - expected.item()) <= 1e-5


@pytest.mark.parametrize("doubled, lost", [(False, 64), (True, 1 << 14)])
def test_one_nan_in_bitsandbytes_spoils_its_block_or_with_doubled_scales_all(torch, doubled, lost):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.ones(1 << 14)
    w[77] = float("nan")
    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": doubled}
    dense = functional.dequantize_4bit(*functional.quantize_4bit(w, **options))
    assert int(torch.isnan(dense).sum()) == lost
