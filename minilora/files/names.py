"""One matrix, three names: what a weight is called here, by Hugging Face, and in a GGUF file.

    here                        Hugging Face (Llama)                      GGUF
    blocks.0.attention.query    model.layers.0.self_attn.q_proj           blk.0.attn_q
    blocks.0.attention.qkv      transformer.h.0.attn.c_attn (GPT-2)       blk.0.attn_qkv

The values differ in two places.  GPT-2's checkpoints store y = x W, so their matrices are
transposed.  And llama.cpp turns neighboring channels where Hugging Face's Llama turns channel i
with i + D/2, so the rows of queries and keys stand in another order in a GGUF file; read in the
wrong order a model does not crash, it only writes nonsense.
"""

from typing import Any

from ..engine.errors import FormatError
from ..model.transformer import TransformerConfig

# here: (Hugging Face, GGUF)
LLAMA = {
    "embedding": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
    "blocks": ("model.layers", "blk"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.query": ("self_attn.q_proj", "attn_q"),
    "attention.key": ("self_attn.k_proj", "attn_k"),
    "attention.value": ("self_attn.v_proj", "attn_v"),
    "attention.output": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "mlp.gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up": ("mlp.up_proj", "ffn_up"),
    "mlp.down": ("mlp.down_proj", "ffn_down"),
}
GPT2 = {
    "embedding": ("transformer.wte", "token_embd"),
    "positions": ("transformer.wpe", "position_embd"),
    "norm": ("transformer.ln_f", "output_norm"),
    "head": ("lm_head", "output"),
    "blocks": ("transformer.h", "blk"),
    "attention_norm": ("ln_1", "attn_norm"),
    "attention.qkv": ("attn.c_attn", "attn_qkv"),
    "attention.output": ("attn.c_proj", "attn_output"),
    "mlp_norm": ("ln_2", "ffn_norm"),
    "mlp.up": ("mlp.c_fc", "ffn_up"),
    "mlp.down": ("mlp.c_proj", "ffn_down"),
}


def family(config: TransformerConfig) -> str:
    """ "gpt2", "llama" or "qwen2": whose checkpoints have this form.

    Errors: `FormatError` for a config that none of them has.
    """
    form = (config.norm, config.mlp, config.packed, config.rope_theta is None)
    biases = (config.biased("query") or config.biased("qkv"), config.biased("output"))
    if (
        form == ("layer", "gelu", True, True)
        and biases == (True, True)
        and config.key_heads is None
    ):
        return "gpt2"
    if form == ("rms", "swiglu", False, False) and biases != (False, True):
        return "qwen2" if biases == (True, False) else "llama"
    raise FormatError(
        "config: expected the form of GPT-2 (layer norm, gelu, packed qkv, biases, learned "
        "positions), or of Llama and Qwen2 (rms norm, swiglu, rotary positions); found "
        f"{config.norm} norm, {config.mlp}, packed={config.packed}, biases={biases}"
    )


def renamed(path: str, config: TransformerConfig, column: int) -> str:
    """The path of a module, or of its weight or bias, in column 0 (Hugging Face) or 1 (GGUF)."""
    names = GPT2 if family(config) == "gpt2" else LLAMA
    parts = path.split(".")
    if parts[0] == "blocks":
        tail = ".".join(parts[2:])
        ours = next((name for name in names if tail == name or tail.startswith(f"{name}.")), None)
        if ours is not None:
            theirs = tail.replace(ours, names[ours][column], 1)
            return f"{names['blocks'][column]}.{parts[1]}.{theirs}"
    elif parts[0] in names:
        return ".".join([names[parts[0]][column], *parts[1:]])
    raise FormatError(f"{path}: has no name in a checkpoint of the {family(config)} family")


def hf_name(path: str, config: TransformerConfig) -> str:
    """What Hugging Face calls it."""
    return renamed(path, config, 0)


def gguf_name(path: str, config: TransformerConfig) -> str:
    """What a GGUF file calls it."""
    return renamed(path, config, 1)


def is_transposed(path: str, config: TransformerConfig) -> bool:
    """Does the checkpoint hold the transpose?  The linears of GPT-2's blocks alone."""
    owner = path.removesuffix(".weight").rpartition(".")[2]
    return config.packed and owner in ("qkv", "output", "up", "down") and not path.endswith("bias")


def rotated_heads(path: str, config: TransformerConfig) -> int:
    """Heads whose rows stand in another order in a GGUF file: 0 but for queries and keys."""
    owner = path.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if family(config) != "llama":  # llama.cpp turns halves for the others
        return 0
    return {"query": config.heads, "key": config.kv}.get(owner, 0)


def to_halves(w: Any, heads: int) -> Any:
    """Rows (heads · D, ...) from neighbors (0 1)(2 3)... to halves: row i beside i + D/2."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def to_neighbors(w: Any, heads: int) -> Any:
    """The inverse of `to_halves`."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
