"""The same model in torch, in two builds: plain modules, and Hugging Face's; adapters by PEFT.

Imported in worker processes and peer tests only: it needs torch, transformers and peft.
"""

import warnings
from typing import Any

import numpy as np

from ..engine.bf16 import BFLOAT16
from ..engine.rules import wide
from ..files.names import hf_name, is_transposed
from ..model.module import tensors
from ..model.transformer import TransformerConfig

with warnings.catch_warnings():  # what these imports warn of is theirs
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers
    from torch import nn
    from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention by SDPA, packed or not, with a cache where one is given."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        C, D, b = config.width, config.head_width, config.bias
        self.sizes = [config.heads * D, config.kv * D, config.kv * D]
        self.D, self.packed, self.grouped = D, config.packed, config.kv != config.heads
        if config.packed:
            self.qkv = nn.Linear(C, sum(self.sizes), bias=b)
        else:
            self.query, self.key, self.value = (nn.Linear(C, n, bias=b) for n in self.sizes)
        self.output = nn.Linear(C, C, bias=b)
        self.turned = config.rope_theta is not None
        if self.turned:
            rate = config.rope_theta ** (torch.arange(D // 2, dtype=torch.float64) * (-2 / D))
            angle = torch.arange(config.context)[:, None] * rate
            angle = torch.cat([angle, angle], -1)
            self.register_buffer("cos", angle.cos().float(), persistent=False)  # (T, D)
            self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Any, cache: list | None = None) -> Any:
        N, T, C = x.shape
        if self.packed:
            parts = self.qkv(x).split(self.sizes, dim=-1)
        else:
            parts = self.query(x), self.key(x), self.value(x)
        q, k, v = (part.view(N, T, -1, self.D).transpose(1, 2) for part in parts)
        if self.turned:
            past = cache[0].shape[2] if cache else 0
            cos, sin = (turn[past : past + T] for turn in (self.cos, self.sin))
            q, k = (a * cos + half_turned(a) * sin for a in (q, k))
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = k, v
        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=self.grouped)
        return self.output(out.transpose(1, 2).reshape(N, T, C))


def half_turned(x: Any) -> Any:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], -1)


class MLP(nn.Module):
    """GELU or SwiGLU."""

    def __init__(self, config: TransformerConfig, gelu: str):
        super().__init__()
        C, inner, self.approximate = config.width, config.inner, gelu
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate = nn.Linear(C, inner, bias=config.bias)
        self.up = nn.Linear(C, inner, bias=config.bias)
        self.down = nn.Linear(inner, C, bias=config.bias)

    def forward(self, x: Any) -> Any:
        if self.gated:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def norm(config: TransformerConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.width, eps=config.eps)


class Block(nn.Module):
    """Norm, attention, norm, MLP, each added to the stream."""

    def __init__(self, config: TransformerConfig, gelu: str):
        super().__init__()
        self.attention_norm, self.attention = norm(config), Attention(config)
        self.mlp_norm, self.mlp = norm(config), MLP(config, gelu)

    def forward(self, x: Any, cache: list | None = None) -> Any:
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.mlp(self.mlp_norm(x))


class Plain(nn.Module):
    """ids (N, T) -> logits (N, T, V): modules named as in minilora's tree, SDPA, F.gelu."""

    def __init__(self, config: TransformerConfig, gelu: str = "tanh"):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.width)
        learned = config.rope_theta is None
        self.positions = nn.Embedding(config.context, config.width) if learned else None
        self.blocks = nn.ModuleList(Block(config, gelu) for _ in range(config.layers))
        self.norm = norm(config)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Any, caches: list | None = None) -> Any:
        x = self.embedding(ids)
        if self.positions is not None:
            past = caches[0][0].shape[2] if caches and caches[0] else 0
            x = x + self.positions.weight[past : past + ids.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        if caches is not None:
            x = x[:, -1:]  # the only logits that generation needs
        return self.head(self.norm(x))


# ----------------------------------------------------------------- Hugging Face's models


def hugging_face(config: TransformerConfig) -> nn.Module:
    """The transformers model of this shape, in evaluation mode (no dropout)."""
    if config.packed:
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab,
                n_positions=config.context,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                n_inner=config.inner,
                layer_norm_epsilon=config.eps,
                activation_function="gelu_new",
                use_cache=False,  # a step has no use for one; `generate` asks for it
                bos_token_id=None,
                eos_token_id=None,
            )
        ).eval()
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
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
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


# -------------------------------------------------------------- weights and adapters in


def fill(model: nn.Module, tree: Any, name: Any) -> None:
    """Copy the weights of a plain or adapted minilora tree into `model`.

    `name(path)` is the parameter's name there, and whether its matrix is transposed.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for path, t in tensors(tree).items():
            key, turned = name(path)
            array = t.data.T if turned and t.ndim == 2 else t.data
            held[key].copy_(host_tensor(array))


def host_tensor(array: Any) -> Any:
    """A NumPy array or a BF16 in torch; the latter's numbers in float32, which lose nothing when
    they are stored in bfloat16 again."""
    return torch.from_numpy(np.ascontiguousarray(wide(array)))


def dtype_of(tree: Any) -> Any:
    """What torch is to hold frozen weights in: as the tree does."""
    half = any(t.dtype == BFLOAT16 for t in tensors(tree).values())
    return torch.bfloat16 if half else torch.float32


def parameter_name(path: str, config: TransformerConfig, build: str, adapted: bool) -> Any:
    """(name in torch, transposed?) of the array at `path`, for `fill`; build "plain" or "hf"."""
    parts = path.split(".")
    inside = parts[-1] in "AB"
    module = ".".join(parts[:-1] if inside else (p for p in parts if p != "base"))
    found = module if build == "plain" else hf_name(module, config)
    turned = build == "hf" and not inside and is_transposed(module, config)
    if not adapted:
        return found, turned
    if inside:
        return f"base_model.model.{found}.lora_{parts[-1]}.default.weight", False
    if "base" in parts:
        head, _, last = found.rpartition(".")
        found = f"{head}.base_layer.{last}"
    return f"base_model.model.{found}", turned


def lora(
    model: nn.Module, names: list[str], rank: int, alpha: float, *, conv1d: bool, **options: Any
) -> nn.Module:
    """PEFT's adapters on the modules named, without dropout."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, fan_in_fan_out=conv1d, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def fill_plain(model: nn.Module, tree: Any) -> None:
    """Copy all weights but the adapters' into a plain model."""
    held = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for path, t in tensors(tree).items():
            if path[-2:] not in (".A", ".B"):
                held[path.replace(".base.", ".")].copy_(host_tensor(t.data))


def fill_adapters(model: nn.Module, tree: Any, config: TransformerConfig) -> None:
    """Copy A and B into a model that PEFT has wrapped."""
    held = dict(model.named_parameters())
    with torch.no_grad():
        for path, t in tensors(tree).items():
            if path[-2:] in (".A", ".B"):
                name, _ = parameter_name(path, config, "plain", True)
                held[name].copy_(host_tensor(t.data))


def four_bit(linear: nn.Linear) -> nn.Module:
    """The same linear in NF4 with double quantization, by bitsandbytes."""
    import bitsandbytes as bnb

    node = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    node.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
    )
    if linear.bias is not None:
        node.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return node.to("cpu")  # which quantizes


def build(
    config: TransformerConfig,
    tree: Any,
    kind: str,
    adapters: list[str],
    rank: int,
    alpha: float,
    gelu: str = "tanh",
    **options: Any,
) -> nn.Module:
    """`tree` in torch: kind "plain", "hf" or "bnb" (plain, with bitsandbytes' NF4 linears under
    the adapters); PEFT adapters at the paths `adapters`.

    Where the tree is in bfloat16, so is the whole model, norms and buffers included, and hence
    its activations; the adapters, which PEFT adds afterwards, it keeps in float32
    (`autocast_adapter_dtype`): it widens their input, and rounds base plus update once.
    """
    model = (hugging_face(config) if kind == "hf" else Plain(config, gelu)).to(dtype_of(tree))
    if kind == "bnb":
        fill_plain(model, tree)
        for path in adapters:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, four_bit(model.get_submodule(path)))
        model = lora(model, adapters, rank, alpha, conv1d=False, **options)
        fill_adapters(model, tree, config)
        return model
    if adapters:
        names = [hf_name(p, config) if kind == "hf" else p for p in adapters]
        conv1d = kind == "hf" and config.packed
        model = lora(model, names, rank, alpha, conv1d=conv1d, **options)
    fill(model, tree, lambda path: parameter_name(path, config, kind, bool(adapters)))
    return model
