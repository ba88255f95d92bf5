"""An adapter as the directory that PEFT reads: a config and the factors, written as one thing.

    adapter_config.json            what was adapted, with which rank and alpha
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight   (r, d_in)
                                                            .lora_B.weight   (d_out, r)
                                   for an embedding .lora_embedding_A (r, V), _B (C, r)
                                   for DoRA also .lora_magnitude_vector (d_out,)

The two mean something only together, so they are swapped in together, and the weights carry
the config's digest: a pair that was torn apart by a copy is refused.  They also carry a
fingerprint of the base.  Nothing in an adapter is run: target patterns are names, not regular
expressions, and a pickle is not opened.

Source: the checkpoint format in the documentation of github.com/huggingface/peft.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import device_of, to_device, to_numpy
from ..engine.errors import (
    AdapterError,
    BaseMismatchWarning,
    FormatError,
    MiniloraError,
    MissingAdapterError,
)
from ..engine.tensor import Parameter, Tensor
from ..lora.adapters import Factors, put
from ..lora.lora import LoRAEmbedding, LoRALinear, is_adaptable, is_adapter, warn_of_rank
from ..lora.variants import DoRALinear, SplitLinear, with_lengths
from ..model.layers import Embedding
from ..model.module import parameters, walk
from ..model.transformer import Transformer
from . import safetensors
from .atomic import Content, replace_directory
from .names import family, hf_name
from .peft_config import CONFIG, checked, pattern_value, read_adapter_config
from .untrusted import parse_json, short

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
CONFIG_DIGEST, BASE_DIGEST = "minilora.config_sha256", "minilora.base_sha256"
LINEAR = {"A": ".lora_A.weight", "B": ".lora_B.weight", "m": ".lora_magnitude_vector"}
TABLE = {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
SUFFIXES = {suffix: letter for form in (LINEAR, TABLE) for letter, suffix in form.items()}


def base_fingerprint(model: Any) -> str:
    """sha256 of the embedding table, which no quantization changes: whose adapter is this?"""
    table = model.embedding
    weight = (table.base if isinstance(table, LoRAEmbedding) else table).weight
    array = np.ascontiguousarray(to_numpy(weight.data), np.float32)
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()


def adapter_nodes(model: Any) -> dict[str, LoRALinear | LoRAEmbedding]:
    """The adapters of a tree by path.  Errors: `AdapterError` if there are none."""
    nodes = {path: node for path, node in walk(model) if is_adapter(node)}
    if not nodes:
        raise AdapterError("adapter: expected a model with adapters, found none")
    return nodes


def save_adapter(
    directory: str | os.PathLike,
    adapted: Transformer,
    *,
    base: str | None = None,
    extra: Mapping[str, Content] | None = None,
) -> None:
    """Write the adapters of a tree, whole or not at all; `base` names what they belong on.

    `extra` are files beside them: a model card, the record of the run.
    Errors: `AdapterError` where there is no adapter, where other weights train too, where
    scales or dropout rates differ in kind or only some are DoRA, for adapters that began by
    splitting their weight (see `SplitLinear`), or for a rank or an alpha that `load_adapter`
    would refuse; `FormatError` for a model that no family of checkpoints has, and a `base`
    that is no text; `CheckpointError` if it cannot be written.
    """
    nodes, raw = savable(directory, adapted, base)
    arrays = {}
    for path, node in nodes.items():
        module = PREFIX + hf_name(path, adapted.config)
        for suffix, factor in stored_factors(node).items():
            arrays[module + suffix] = to_numpy(factor.data)
    notes = {
        "format": "pt",
        CONFIG_DIGEST: hashlib.sha256(raw).hexdigest(),
        BASE_DIGEST: base_fingerprint(adapted),
    }
    files: dict[str, Content] = {CONFIG: raw, WEIGHTS: safetensors.encode(arrays, notes)}
    replace_directory(directory, files | dict(extra or {}))


def savable(
    directory: str | os.PathLike, adapted: Transformer, base: str | None
) -> tuple[dict[str, LoRALinear | LoRAEmbedding], bytes]:
    """The adapters of a tree by path, and their config as it is written.

    Errors: `AdapterError`, `FormatError` as `save_adapter`, which asks this first.
    """
    nodes = adapter_nodes(adapted)
    split = [path for path, node in nodes.items() if isinstance(node, SplitLinear)]
    if split:
        raise AdapterError(
            f"save_adapter: {split[0]} began by splitting its weight, and its factors mean nothing "
            "on that weight: save put(model, learned(start, adapted)), or merge"
        )
    factors = {id(f) for node in nodes.values() for f in stored_factors(node).values()}
    others = [path for path, p in parameters(adapted).items() if id(p) not in factors]
    if others:
        raise AdapterError(
            f"save_adapter: weights train that are no adapter ({', '.join(others[:3])}); they "
            "would be lost: save the whole model"
        )
    config = adapter_config(adapted, nodes, base)
    raw = json.dumps(config, indent=1, sort_keys=True).encode() + b"\n"
    place = Path(directory, CONFIG)
    checked(place, parse_json(str(place), raw))  # a writer keeps its reader's rules
    return nodes, raw


def stored_factors(node: LoRALinear | LoRAEmbedding) -> dict[str, Tensor]:
    """What is stored of an adapter, by the ends of its tensors' names."""
    form = TABLE if isinstance(node, LoRAEmbedding) else LINEAR
    found = {form["A"]: node.A, form["B"]: node.B}
    return found | {form["m"]: node.magnitude} if isinstance(node, DoRALinear) else found


def adapter_config(
    model: Transformer, nodes: Mapping[str, LoRALinear | LoRAEmbedding], base: str | None
) -> dict[str, Any]:
    """What PEFT needs to know: the commonest rank and alpha, and patterns for the others."""
    names = {path: hf_name(path, model.config) for path in nodes}
    stabilized = one_of("rank_stabilized", [n.rank_stabilized for n in nodes.values()])
    rates = [n.dropout for n in nodes.values() if isinstance(n, LoRALinear)]
    rank = Counter(n.rank for n in nodes.values()).most_common(1)[0][0]
    alpha = Counter(n.alpha for n in nodes.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": rank, "lora_alpha": short_number(alpha), "use_rslora": stabilized,
        "use_dora": one_of("DoRA", [isinstance(n, DoRALinear) for n in nodes.values()]),
        "lora_dropout": one_of("dropout", rates or [0.0]),
        "target_modules": target_names(model, names),
        "rank_pattern": {names[p]: n.rank for p, n in nodes.items() if n.rank != rank},
        "alpha_pattern": {
            names[p]: short_number(n.alpha) for p, n in nodes.items() if n.alpha != alpha
        },
        "bias": "none", "modules_to_save": None, "inference_mode": True,
        "fan_in_fan_out": family(model.config) == "gpt2",
    }  # fmt: skip


def one_of(name: str, values: Iterable[Any]) -> Any:
    found = set(values)
    if len(found) > 1:
        raise AdapterError(f"{name}: expected one value for all adapters, found {sorted(found)}")
    return found.pop()


def short_number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def target_names(model: Transformer, names: Mapping[str, str]) -> list[str]:
    """Last names where they mean exactly the adapted modules, else the whole ones."""
    there = [hf_name(path, model.config) for path in adaptable_paths(model)]
    chosen = set(names.values())
    short_ones = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in there if name.rpartition(".")[2] in short_ones}
    return sorted(short_ones if meant == chosen else chosen)


def adaptable_paths(model: Transformer) -> list[str]:
    """Paths of what an adapter can sit on, or sits on."""
    found: list[str] = []
    for path, node in walk(model):
        below = any(path.startswith(f"{outer}.base") for outer in found)
        if (is_adapter(node) or is_adaptable(node)) and not below:
            found.append(path)
    return found


def load_adapter(
    directory: str | os.PathLike,
    model: Transformer,
    *,
    trainable: bool = False,
    strict_base: bool = False,
    allow_nonfinite: bool = False,
) -> Transformer:
    """A new tree: `model` frozen, with the adapter of a directory on it, to the bit.

    `model` may be quantized.  The factors are Tensors, or Parameters if `trainable`.
    Errors: `MissingAdapterError`; `AdapterError` for all that would make the adapter compute
    something else than where it was saved: a setting not done here, tensors missing, left over,
    of another shape or not finite, a digest that differs.  A base with another fingerprint is
    a `BaseMismatchWarning`, or with `strict_base` an error; a rank above what a weight can have
    is a `RankWarning`.
    """
    directory = Path(directory)
    if any(is_adapter(node) for _, node in walk(model)):
        raise AdapterError("load_adapter: expected a plain model, found one with adapters")
    config = read_adapter_config(directory)
    stored = read_weights(directory, config, allow_nonfinite)
    paths = {hf_name(path, model.config): path for path in adaptable_paths(model)}
    letters = letters_of(config)
    factors = sorted_factors(directory, stored, paths, model, letters)
    expect_targets(directory, config, paths, {paths[module] for module in factors})
    check_base(directory, stored, model, strict_base)

    adapter: dict[str, Factors] = {}
    lengths: dict[str, Tensor] = {}  # DoRA's
    nodes = dict(walk(model))
    kind = Parameter if trainable else Tensor
    for module, pair in factors.items():
        path = paths[module]
        node = nodes[path]
        table = isinstance(node, Embedding)
        d_out, d_in = node.weight.shape[::-1] if table else node.shape
        r = pattern_value(config["rank_pattern"], module, config["r"])
        if table and config["use_dora"]:
            raise AdapterError(f"{directory / CONFIG}: use_dora: not done here for {module}")
        for letter, shape in zip(letters, ((r, d_in), (d_out, r), (d_out,)), strict=False):
            found = stored.entries[pair[letter]].shape
            if found != shape:
                raise AdapterError(
                    f"{directory / WEIGHTS}: {pair[letter]}: expected {shape}, found {found}"
                )
        weight = node.weight.data if table else model.norm.weight.data
        A, B, *m = (
            kind(to_device(decoded(directory, stored, pair[letter]), device_of(weight)))
            for letter in letters
        )
        if m:
            lengths[path] = m[0]
        alpha = float(pattern_value(config["alpha_pattern"], module, config["lora_alpha"]))
        rate = 0.0 if table else config["lora_dropout"]
        adapter[path] = Factors(A, B, alpha, config["use_rslora"], rate)
    tree = with_lengths(put(model, adapter), lengths)
    warn_of_rank(tree)
    return tree


def read_weights(
    directory: Path, config: Mapping[str, Any], allow_nonfinite: bool
) -> safetensors.SafeTensors:
    path = directory / WEIGHTS
    if not path.exists():
        if (directory / "adapter_model.bin").exists():
            raise AdapterError(
                f"{directory}: adapter_model.bin is a pickle, which can run code; it is not "
                f"read: expected {WEIGHTS}"
            )
        raise MissingAdapterError(f"{directory}: no {WEIGHTS}")
    try:
        stored = safetensors.read(path, allow_nonfinite=allow_nonfinite)
    except FormatError as error:
        raise AdapterError(str(error)) from None
    digest = stored.metadata.get(CONFIG_DIGEST)
    if digest is not None:
        found = hashlib.sha256((directory / CONFIG).read_bytes()).hexdigest()
        if digest != found:
            raise AdapterError(
                f"{directory}: {CONFIG} and {WEIGHTS} were not saved together: the weights name "
                f"a config with sha256 {digest[:12]}, found {found[:12]}"
            )
    return stored


def decoded(directory: Path, stored: safetensors.SafeTensors, name: str) -> np.ndarray:
    """A factor as float32 (float64 stays), checked."""
    kind = stored.entries[name].dtype
    if kind not in ("F16", "BF16", "F32", "F64"):
        raise AdapterError(f"{directory / WEIGHTS}: {name}: expected floats, found {kind}")
    try:
        array = stored[name]
    except MiniloraError as error:  # a digest that differs, a value that is not finite
        raise AdapterError(str(error)) from None
    return array if kind == "F64" else np.ascontiguousarray(array, np.float32)


def sorted_factors(
    directory: Path,
    stored: safetensors.SafeTensors,
    paths: Mapping[str, str],
    model: Transformer,
    letters: str,
) -> dict[str, dict[str, str]]:
    """`{module: {letter: tensor name}}`, with nothing missing and nothing over."""
    factors: dict[str, dict[str, str]] = {}
    odd = []
    for name in stored:
        module, letter, suffix = parsed(name)
        if letter is None and is_copy(stored, name, model):
            continue
        table = suffix is not None and "embedding" in suffix
        is_table = module in paths and paths[module] in ("embedding", "positions")
        known = letter is not None and letter in letters and module in paths
        if not known or (table != is_table and letter != "m"):
            odd.append(name)
        else:
            factors.setdefault(module, {})[letter] = name
    if odd:
        raise AdapterError(
            f"{directory / WEIGHTS}: tensors that have no place in this model: {short(sorted(odd))}"
        )
    missing = [f"{m}{LINEAR[x]}" for m, pair in factors.items() for x in letters if x not in pair]
    if missing or not factors:
        raise AdapterError(
            f"{directory / WEIGHTS}: missing: {short(sorted(missing)) if factors else 'everything'}"
        )
    return factors


def letters_of(config: Mapping[str, Any]) -> str:
    """What each adapted module has; "m" is DoRA's magnitude."""
    return "ABm" if config["use_dora"] else "AB"


def parsed(name: str) -> tuple[str, str | None, str | None]:
    """(module, letter, suffix) of a tensor's name; no letter if it is no factor."""
    for suffix, letter in SUFFIXES.items():
        if name.startswith(PREFIX) and name.endswith(suffix):
            return name[len(PREFIX) : -len(suffix)], letter, suffix
    return name, None, None


def is_copy(stored: safetensors.SafeTensors, name: str, model: Transformer) -> bool:
    """PEFT saves table and head beside an adapter on one: they may stay if they are the model's."""
    for path, node in (("embedding", model.embedding), ("head", model.head)):
        module = PREFIX + hf_name(path, model.config)
        if name in (f"{module}.base_layer.weight", f"{module}.weight"):
            weight = node.weight.data if isinstance(node, Embedding) else node.dense()
            return np.array_equal(stored[name], to_numpy(weight))
    return False


def expect_targets(
    directory: Path, config: Mapping[str, Any], paths: Mapping[str, str], adapted: set[str]
) -> None:
    """Config and weights must mean the same modules, in this model."""
    targets = config["target_modules"]
    names = list(paths)
    if targets == "all-linear":
        meant = {n for n in names if paths[n] not in ("head", "embedding", "positions")}
    else:
        meant = set()
        for target in targets:
            hit = {name for name in names if name == target or name.endswith(f".{target}")}
            if not hit:
                raise AdapterError(
                    f"{directory / CONFIG}: target_modules: {short(target)} matches nothing in "
                    "this model"
                )
            meant |= hit
    odd = {name for name in names if (name in meant) != (paths[name] in adapted)}
    if odd:
        raise AdapterError(
            f"{directory}: the config's target_modules and the weights differ about "
            f"{short(sorted(odd))}"
        )


def check_base(
    directory: Path, stored: safetensors.SafeTensors, model: Transformer, strict: bool
) -> None:
    wanted = stored.metadata.get(BASE_DIGEST)
    if wanted is None or wanted == base_fingerprint(model):
        return
    message = (
        f"{directory}: trained on another base (its embedding table has sha256 {wanted[:12]}, "
        f"this one {base_fingerprint(model)[:12]})"
    )
    if strict:
        raise AdapterError(message)
    warnings.warn(message, BaseMismatchWarning, stacklevel=3)
