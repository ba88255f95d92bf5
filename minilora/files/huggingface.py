"""A model directory of Hugging Face: `config.json`, weights, tokenizer, and nothing that runs.

Families: GPT-2; Llama (SmolLM2 among them) and Qwen2, with tied or untied head and the rotary
scaling of Llama 3.  A setting that changes what is computed and is not done here is refused.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.attention import RopeScaling
from ..engine.errors import FormatError, MiniloraError, NumericsError
from ..engine.tensor import Tensor
from ..model.module import tensors
from ..model.transformer import Transformer, TransformerConfig, assemble
from . import safetensors
from .atomic import replace_directory
from .names import family, hf_name, is_transposed
from .tokenizer import Tokenizer
from .tokenizer_files import tokenizer_json
from .untrusted import load_json, short

# What must be so, or absent, for a config to mean what is computed here.
LLAMA_FIXED = {"hidden_act": "silu", "pretraining_tp": 1, "use_sliding_window": False}
GPT2_FIXED = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "add_cross_attention": False,
}  # fmt: skip
GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names for the tanh form
BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")  # no weights: constants


def read_config(path: str | os.PathLike) -> TransformerConfig:
    """The shape that a `config.json` describes.

    Errors: `MissingFileError`; `FormatError` for another kind of model, and for a setting that
    is missing, of another type, or not done here.
    """
    where = Path(path)
    content = load_json(where)
    kind = content.get("model_type")
    if kind not in ("gpt2", "llama", "qwen2"):
        raise FormatError(
            f"{where}: model_type: expected gpt2, llama or qwen2, found {short(kind)}"
        )
    fields = Fields(where, content)
    try:
        return gpt2_config(fields) if kind == "gpt2" else llama_config(fields, kind)
    except FormatError:
        raise
    except MiniloraError as error:  # a shape that no transformer has
        raise FormatError(f"{where}: {error}") from None


class Fields:
    """The settings of a config, each asked for by its name and type."""

    def __init__(self, where: Path, content: Mapping[str, Any]):
        self.where, self.content = where, content

    def whole(self, name: str, default: int | None = None, most: int = 1 << 24) -> int:
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= most:
            raise FormatError(
                f"{self.where}: {name}: expected a whole number in 1..{most}, found {short(value)}"
            )
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise FormatError(f"{self.where}: {name}: expected a number > 0, found {short(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise FormatError(f"{self.where}: {name}: expected true or false, found {short(value)}")
        return value

    def expect(self, **wanted: Any) -> None:
        for name, value in wanted.items():
            found = self.content.get(name)
            if found is not None and found != value:
                raise FormatError(
                    f"{self.where}: {name}: only {value!r} is done here, found {short(found)}"
                )

    def inside(self, name: str) -> "Fields | None":
        value = self.content.get(name)
        if value is None or value == {}:
            return None
        if type(value) is not dict:
            raise FormatError(f"{self.where}: {name}: expected an object, found {short(value)}")
        return Fields(self.where, value)


def llama_config(fields: Fields, kind: str) -> TransformerConfig:
    fields.expect(**LLAMA_FIXED)
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    fields.expect(head_dim=width // heads)
    # Of two objects transformers takes the older name, and what it leaves out from beside it.
    rope = fields.inside("rope_scaling") or fields.inside("rope_parameters")
    theta = fields.real("rope_theta", 10000.0)
    theta = theta if rope is None else rope.real("rope_theta", theta)
    scaling = rope_scaling(rope)
    bias, qkv_bias = False, True
    if kind == "llama":
        bias = qkv_bias = fields.flag("attention_bias", False)
        if fields.flag("mlp_bias", False) != bias:
            raise FormatError(
                f"{fields.where}: mlp_bias: only {bias}, as attention_bias, is done here"
            )
    return TransformerConfig(
        vocab=fields.whole("vocab_size"), width=width, layers=fields.whole("num_hidden_layers"),
        heads=heads, key_heads=fields.whole("num_key_value_heads", heads),
        hidden=fields.whole("intermediate_size"), eps=fields.real("rms_norm_eps", 1e-6),
        context=fields.whole("max_position_embeddings", 2048), rope_theta=theta,
        rope_scaling=scaling, tied=fields.flag("tie_word_embeddings", False),
        bias=bias, qkv_bias=None if qkv_bias == bias else qkv_bias,
    )  # fmt: skip


def rope_scaling(fields: Fields | None) -> RopeScaling | None:
    if fields is None:
        return None
    kind = fields.content.get("rope_type", fields.content.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise FormatError(
            f"{fields.where}: rope_scaling: only default and llama3 are done here, "
            f"found {short(kind)}"
        )
    low, high = fields.real("low_freq_factor"), fields.real("high_freq_factor")
    if low >= high:
        raise FormatError(f"{fields.where}: rope_scaling: expected low < high, found {low}, {high}")
    context = fields.whole("original_max_position_embeddings")
    return RopeScaling(fields.real("factor"), low, high, context)


def gpt2_config(fields: Fields) -> TransformerConfig:
    fields.expect(**GPT2_FIXED)
    if (gelu := fields.content.get("activation_function", "gelu_new")) not in GELUS:
        raise FormatError(
            f"{fields.where}: activation_function: only {' and '.join(GELUS)} are done here, "
            f"found {short(gelu)}"
        )
    width = fields.whole("n_embd")
    return TransformerConfig.gpt2(
        vocab=fields.whole("vocab_size"), width=width, layers=fields.whole("n_layer"),
        heads=fields.whole("n_head"), hidden=fields.whole("n_inner", 4 * width),
        context=fields.whole("n_positions"), eps=fields.real("layer_norm_epsilon", 1e-5),
        tied=fields.flag("tie_word_embeddings", True),
    )  # fmt: skip


def read_huggingface(directory: str | os.PathLike, *, allow_nonfinite: bool = False) -> Transformer:
    """The frozen float32 model of a directory.

    Errors: as `read_config` and `safetensors.read`; `FormatError` for tensors that are missing,
    left over or of another shape, and for weights that come only as pickles.
    """
    directory = Path(directory)
    config = read_config(directory / "config.json")
    if not any(directory.glob("model*.safetensors")) and any(directory.glob("*.bin")):
        raise FormatError(
            f"{directory}: expected model.safetensors, found pickles (.bin), which can run code "
            "and are not read"
        )
    stored = safetensors.read_sharded(directory, allow_nonfinite=allow_nonfinite)
    bare = config.packed and not any(name.startswith("transformer.") for name in stored)
    used: set[str] = set()

    def make(path: str, shape: tuple[int, ...]) -> Tensor:
        name = hf_name(path, config).removeprefix("transformer." if bare else "")
        used.add(name)
        turned = is_transposed(path, config)
        return Tensor(taken(directory, stored, name, shape[::-1] if turned else shape, turned))

    model = assemble(config, make)
    left = {name for name in stored if name not in used and not name.endswith(BUFFERS)}
    if config.tied and "lm_head.weight" in left:
        if not np.array_equal(stored["lm_head.weight"], model.embedding.weight.data):
            raise FormatError(
                f"{directory}: a tied head that differs from the embedding: lm_head.weight"
            )
        left.remove("lm_head.weight")
    if left:
        raise FormatError(f"{directory}: tensors that have no place: {short(sorted(left))}")
    return model


def taken(
    where: Any, stored: Mapping[str, np.ndarray], name: str, shape: tuple, turned: bool = False
) -> np.ndarray:
    """A tensor as float32, in the order of its rows here."""
    if name not in stored:
        raise FormatError(f"{where}: no tensor {name}")
    found = stored.entries[name].shape
    if found != tuple(shape):
        raise FormatError(f"{where}: tensor {name}: expected {tuple(shape)}, found {found}")
    array = stored[name]
    if array.dtype.kind != "f":
        raise FormatError(f"{where}: tensor {name}: expected floats, found {array.dtype}")
    array = array.T if turned else array
    if array.dtype == np.float64 and not stored.allow_nonfinite:
        array = narrowed(f"{where}: tensor {name}", array, np.float32)
    return np.ascontiguousarray(array, np.float32)


def narrowed(where: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array as `dtype`.  Errors: `NumericsError` for a finite number that would not be one."""
    try:
        with np.errstate(over="raise"):
            return array.astype(dtype)
    except FloatingPointError:
        raise NumericsError(
            f"{where}: expected numbers that {np.dtype(dtype)} can hold, found {abs(array).max()}"
        ) from None


def config_json(config: TransformerConfig, stop: tuple[int, ...] = ()) -> dict[str, Any]:
    """The `config.json` of a model of this shape.  Errors: `FormatError` if no family has it."""
    kind = family(config)
    common = {
        "model_type": kind, "vocab_size": config.vocab, "tie_word_embeddings": config.tied,
        "torch_dtype": "float32", "eos_token_id": list(stop) or None, "bos_token_id": None,
    }  # fmt: skip
    if kind == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"], "n_embd": config.width,
            "n_layer": config.layers, "n_head": config.heads, "n_inner": config.inner,
            "n_positions": config.context, "layer_norm_epsilon": config.eps,
            "activation_function": "gelu_new",
        }  # fmt: skip
    scaling = config.rope_scaling
    extra = {"use_sliding_window": False} if kind == "qwen2" else {
        "attention_bias": config.bias, "mlp_bias": config.bias,
    }  # fmt: skip
    return common | extra | {
        "architectures": ["Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"],
        "hidden_size": config.width, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv,
        "intermediate_size": config.inner, "rms_norm_eps": config.eps,
        "max_position_embeddings": config.context, "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.context,
        },
    }  # fmt: skip


def save_huggingface(
    directory: str | os.PathLike,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    dtype: Any = np.float32,
) -> None:
    """Write a plain model as a directory that `transformers` loads, whole or not at all.

    A head that a merge has parted from its table (`merge`) is written as an untied one.
    Errors: `FormatError` for a tree with adapters or codes (merge or dequantize it first), or
    a shape that no family has; `NumericsError` for a weight too large for `dtype`;
    `CheckpointError` if it cannot be written.
    """
    config = model.config
    if config.tied and "head.weight" in tensors(model):
        config = replace(config, tied=False)
    kind = family(config)
    plain: dict[str, tuple[int, ...]] = {}

    def note(path: str, shape: tuple[int, ...]) -> Tensor:
        plain[path] = shape
        return Tensor(np.empty(0))

    assemble(config, note)
    found = {path: tensor.shape for path, tensor in tensors(model).items()}
    if found != plain:
        odd = sorted(plain.items() ^ found.items())
        raise FormatError(
            f"{odd[0][0]}: expected a plain model; merge adapters, dequantize codes first"
        )
    arrays = {}
    for path, tensor in tensors(model).items():
        array = narrowed(path, tensor.numpy(), dtype)
        turned = is_transposed(path, config)
        arrays[hf_name(path, config)] = np.ascontiguousarray(array.T if turned else array)
    content = config_json(config, () if tokenizer is None else tokenizer.stop)
    content["torch_dtype"] = np.dtype(dtype).name
    files = {
        "config.json": json.dumps(content, indent=1).encode() + b"\n",
        "model.safetensors": safetensors.encode(arrays, {"format": "pt"}),
    }
    if tokenizer is not None:
        settings = {
            "tokenizer_class": {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}.get(
                kind, "PreTrainedTokenizerFast"
            ),
            "chat_template": tokenizer.chat_template,
            "eos_token": tokenizer.tokens[tokenizer.stop[0]] if tokenizer.stop else None,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        files["tokenizer.json"] = tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = json.dumps(settings, indent=1).encode() + b"\n"
    replace_directory(directory, files)
