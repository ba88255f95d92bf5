"""The config of an adapter, each setting checked before anything is made from it.

Source: `LoraConfig` of github.com/huggingface/peft, as version 0.21 writes it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import AdapterError, FormatError, MissingAdapterError, MissingFileError
from ..lora.lora import MAX_RANK
from .untrusted import load_json, short

CONFIG = "adapter_config.json"
PLAIN_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+\$?")

# Settings that are read, or that change nothing about what a saved adapter computes ...
READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora", "base_model_name_or_path",
}  # fmt: skip
IGNORED = {
    "task_type", "inference_mode", "peft_version", "revision", "auto_mapping", "fan_in_fan_out",
    "exclude_modules", "layers_pattern", "megatron_core", "qalora_group_size", "loftq_config",
    "ensure_weight_tying", "eva_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
# Initializations that leave the base as it was; the others move a part of W0 into A and B.
INITS = (True, False, "gaussian", "eva", "orthogonal", None)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The settings of an adapter, checked one by one before anything is made from them."""
    path = directory / CONFIG
    try:
        content = load_json(path)
    except MissingFileError as error:
        raise MissingAdapterError(f"{error}; expected the directory of an adapter") from None
    except FormatError as error:
        raise AdapterError(str(error)) from None
    return checked(path, content)


def checked(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a config, with what it leaves out.  Errors: `AdapterError` naming `path`."""
    config = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
              "lora_dropout": 0.0, "lora_alpha": None} | content  # fmt: skip

    def refuse(name: str, wanted: str) -> None:
        raise AdapterError(f"{path}: {name}: expected {wanted}, found {short(config.get(name))}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", '"LORA"')
    for name, value in content.items():
        known = name in READ or name in IGNORED
        if name == "bias" and value in ("none", None):
            continue
        if name == "init_lora_weights":
            if value not in INITS:
                refuse(name, "an initialization that leaves the base alone")
        elif not known and value not in (None, False, [], {}):  # what is not known must say no
            refuse(name, "nothing: this is not done here")
    if type(config.get("r")) is not int or not 1 <= config["r"] <= MAX_RANK:
        refuse("r", f"a whole number in 1..{MAX_RANK}")
    if not is_alpha(config["lora_alpha"]):
        refuse("lora_alpha", "a finite number > 0")
    if not is_number(config["lora_dropout"]) or not 0 <= config["lora_dropout"] < 1:
        refuse("lora_dropout", "a number in [0, 1)")
    for name in ("use_rslora", "use_dora"):
        if type(config[name]) is not bool:
            refuse(name, "true or false")
    targets = config.get("target_modules")
    if type(targets) is str and targets != "all-linear":
        refuse("target_modules", 'names or "all-linear" (a regular expression is not run)')
    if type(targets) is not str and not is_names(targets):
        refuse("target_modules", "a list of names")
    for name, fits in (
        ("rank_pattern", lambda r: type(r) is int and 1 <= r <= MAX_RANK),
        ("alpha_pattern", is_alpha),
    ):
        patterns = config[name] = config[name] or {}
        if type(patterns) is not dict or not all(map(fits, patterns.values())):
            refuse(name, "a module and its value each")
        if not all(PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
            refuse(name, "names of modules (a regular expression is not run)")
    return config


def is_number(value: Any) -> bool:
    # an int of hundreds of digits is finite, but no float: compared, not converted
    return type(value) in (int, float) and -math.inf < value < math.inf


def is_alpha(value: Any) -> bool:
    return is_number(value) and 0 < value < 1e30


def is_names(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(name) is str for name in value)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or an end of it at a dot."""
    return next((value for name, value in patterns.items() if means(name, module)), default)


def means(pattern: str, module: str) -> bool:
    """PEFT's `(.*\\.)?(pattern)$`, of which little is left where a pattern is plain.

    In it a dot is any character, unless a backslash stands before it.
    """
    dot = "\n"  # a dot that means itself; no name has a line end
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", dot)
    before, end = module[: -len(name)], module[-len(name) :]
    return (
        len(end) == len(name)
        and (not before or (before.endswith(".") and not pattern.startswith("^")))
        and all(a in (".", b) or (a, b) == (dot, ".") for a, b in zip(name, end, strict=True))
    )
