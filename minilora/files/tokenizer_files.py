"""Tokenizers as files have them: `tokenizer.json`, and the metadata of a GGUF file.

What such a file asks for and is not done here is refused: other ids would be another text.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import FormatError
from .bpe import ALPHABET, Pair
from .split import LLAMA3, QWEN2
from .tokenizer import Tokenizer
from .untrusted import load_json, map_file, short

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def cut_then_bytes(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, BYTE_LEVEL | {"use_regex": False}]}


DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt2": BYTE_LEVEL | {"use_regex": True},
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL | {"use_regex": True}]},
    "llama3": cut_then_bytes(LLAMA3),
    "qwen2": cut_then_bytes(QWEN2),
}
GGUF_SPLITS = {"gpt-2": "gpt2", "smollm": "smollm", "llama-bpe": "llama3", "qwen2": "qwen2"}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of tokens in a GGUF file


def read_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: `tokenizer.json`, and its chat template.

    Errors: `MissingFileError`; `FormatError` for what is malformed, and for a kind of model,
    normalizer, split or added token that is not done here.
    """
    path = Path(directory, "tokenizer.json")
    content = load_json(path)
    model = expect(path, content, "model", dict)
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise FormatError(f"{path}: expected a byte-level BPE model, found {short(model)}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise FormatError(f"{path}: {name} is not done here")
    ids = dict(expect(path, model, "vocab", dict))
    added = content.get("added_tokens") or []
    if type(added) is not list:
        raise FormatError(f"{path}: added_tokens: expected list, found {short(added)}")
    special: dict[str, int] = {}
    control, late = set(), set()
    for token in added:
        if type(inside_of(token, "content")) is not str or not token["content"]:
            raise FormatError(
                f"{path}: added_tokens: expected content and id, found {short(token)}"
            )
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise FormatError(f"{path}: added token {short(token)}: stripping is not done here")
        text, i = token["content"], token.get("id")
        if type(i) is not int:
            raise FormatError(
                f"{path}: added token {short(text)}: expected an id, found {short(i)}"
            )
        if ids.setdefault(text, i) != i:
            raise FormatError(f"{path}: added token {short(text)}: two ids, {ids[text]} and {i}")
        special[text] = i
        if token.get("special"):
            control.add(i)
        if token.get("normalized"):
            late.add(i)
    if model.get("unk_token") and not ids.keys() >= set(ALPHABET):
        raise FormatError(f"{path}: unk_token: a token for bytes without one is not done here")
    tokens = in_order(path, ids)
    merges = [pair_of(path, merge) for merge in expect(path, model, "merges", list)]
    normalizer = content.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise FormatError(f"{path}: normalizer: expected none or NFC, found {short(normalizer)}")
    template, stops = chat_settings(Path(directory), special, len(tokens))
    return Tokenizer(
        tokens, merges, split_of(path, content.get("pre_tokenizer")), special, frozenset(control),
        start=start_of(path, content.get("post_processor"), ids), stop=stops,
        late=frozenset(late), nfc=normalizer is not None,
        whole_words=bool(model.get("ignore_merges")), chat_template=template,
    )  # fmt: skip


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file.  Errors: `FormatError`."""

    def get(name: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not kind and value is not default:
            raise FormatError(
                f"{where}: tokenizer.ggml.{name}: expected {kind.__name__}, found {short(value)}"
            )
        return value

    model, split = get("model", str), get("pre", str, "gpt-2")
    if model != "gpt2" or split not in GGUF_SPLITS:
        raise FormatError(
            f"{where}: expected a byte-level BPE tokenizer split as {', '.join(GGUF_SPLITS)}; "
            f"found {short(model)}, {short(split)}"
        )
    tokens, merges = get("tokens", list), get("merges", list)
    kinds = get("token_type", np.ndarray)
    if kinds is None:
        kinds = np.full(len(tokens or []), NORMAL)
    fits = tokens and kinds.shape == (len(tokens),) and kinds.dtype.kind in "iu"
    if not fits or merges is None:
        raise FormatError(f"{where}: expected tokens, their types and merges of a tokenizer")
    kinds = kinds.tolist()
    if get("add_space_prefix", bool, False):
        raise FormatError(f"{where}: tokenizer.ggml.add_space_prefix is not done here")
    special = {t: i for i, t in enumerate(tokens) if kinds[i] in (CONTROL, USER_DEFINED)}
    bos, eos = get("bos_token_id", int), get("eos_token_id", int)
    for i in (bos, eos):
        if i is not None and not 0 <= i < len(tokens):
            raise FormatError(f"{where}: expected ids below {len(tokens)}, found {i}")
    template = metadata.get("tokenizer.chat_template")
    if type(template) not in (str, type(None)):
        raise FormatError(f"{where}: chat_template: expected text, found {short(template)}")
    return Tokenizer(
        tokens, [pair_of(where, merge) for merge in merges], GGUF_SPLITS[split], special,
        frozenset(i for i, kind in enumerate(kinds) if kind == CONTROL),
        start=(bos,) if bos is not None and get("add_bos_token", bool, False) else (),
        stop=() if eos is None else (eos,),
        nfc=split == "qwen2", whole_words=split == "llama-bpe",
        chat_template=template,
    )  # fmt: skip


def expect(where: Any, content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if type(value) is not kind:
        raise FormatError(f"{where}: {name}: expected {kind.__name__}, found {short(value)}")
    return value


def in_order(where: Any, ids: Mapping[str, Any]) -> list[str]:
    """Tokens by id.  Errors: `FormatError` unless the ids are 0..n-1, each once."""
    if not all(type(i) is int for i in ids.values()):
        raise FormatError(f"{where}: vocab: expected whole numbers as ids")
    tokens = sorted(ids, key=ids.__getitem__)
    for i, token in enumerate(tokens):
        if ids[token] != i:
            raise FormatError(f"{where}: vocab: expected id {i}, found {ids[token]}")
    return tokens


def pair_of(where: Any, merge: Any) -> Pair:
    """("a", "b") from "a b" or ["a", "b"]"""
    parts = merge.split(" ") if type(merge) is str else merge
    if type(parts) is not list or len(parts) != 2 or not all(type(p) is str for p in parts):
        raise FormatError(f"{where}: merges: expected two tokens, found {short(merge)}")
    return parts[0], parts[1]


def split_of(where: Any, found: Any) -> str:
    """The name of the split that a file spells out."""

    def plain(value: Any) -> Any:  # offsets into the text are not kept here
        if isinstance(value, dict):
            value = {k: plain(v) for k, v in value.items() if k != "trim_offsets"}
            return {"use_regex": True} | value if value.get("type") == "ByteLevel" else value
        return [plain(v) for v in value] if isinstance(value, list) else value

    for name, known in PRE_TOKENIZERS.items():
        if plain(found) == plain(known):
            return name
    raise FormatError(
        f"{where}: pre_tokenizer: expected that of {', '.join(PRE_TOKENIZERS)}; "
        f"found {short(found)}"
    )


def start_of(where: Any, found: Any, ids: Mapping[str, int]) -> tuple[int, ...]:
    """The ids that a post-processor puts before a text."""
    inside = type(found) is dict and found.get("type") == "Sequence"
    steps = found.get("processors") if inside else [found]
    start: tuple[int, ...] = ()
    for step in steps if type(steps) is list else [steps]:
        kind = step.get("type") if type(step) is dict else step
        if kind in (None, "ByteLevel"):
            continue
        single = step.get("single") if kind == "TemplateProcessing" else None
        *before, last = single if type(single) is list and single else [None]
        names = [inside_of(inside_of(part, "SpecialToken"), "id") for part in before]
        given = inside_of(step, "special_tokens")  # a name there may stand for other ids
        known = all(
            type(name) is str and name in ids
            and inside_of(inside_of(given, name), "ids") == [ids[name]]
            for name in names
        )  # fmt: skip
        if inside_of(last, "Sequence") is None or not known:
            raise FormatError(f"{where}: post_processor: {short(step)} is not done here")
        start = tuple(ids[name] for name in names)
    return start


def inside_of(value: Any, name: str) -> Any:
    return value.get(name) if type(value) is dict else None


def chat_settings(
    directory: Path, special: Mapping[str, int], count: int
) -> tuple[str | None, tuple[int, ...]]:
    """The chat template and the end tokens (ids below `count`), from the files that hold them."""
    template, stops = None, set()
    path = directory / "tokenizer_config.json"
    if path.exists():
        content = load_json(path)
        template = content.get("chat_template")
        end = content.get("eos_token")
        end = end.get("content") if type(end) is dict else end
        if type(end) is str and end in special:
            stops.add(special[end])
    if (jinja := directory / "chat_template.jinja").exists():
        template = map_file(jinja).tobytes().decode(errors="replace")
    for name in ("config.json", "generation_config.json"):
        if (path := directory / name).exists():
            ends = load_json(path).get("eos_token_id")
            stops |= {i for i in (ends if type(ends) is list else [ends]) if type(i) is int}
    if template is not None and type(template) is not str:
        raise FormatError(f"{directory}: chat_template: expected text, found {short(template)}")
    if odd := [i for i in stops if not 0 <= i < count]:
        raise FormatError(f"{directory}: eos_token_id: expected ids below {count}, found {odd[0]}")
    return template, tuple(sorted(stops))


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """A `tokenizer.json` from which others read the same tokenizer."""
    starts = [{"SpecialToken": {"id": tokenizer.tokens[i], "type_id": 0}} for i in tokenizer.start]
    added = [
        {
            "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": i in tokenizer.late, "special": i in tokenizer.control,
        }
        for text, i in sorted(tokenizer.special.items(), key=lambda item: item[1])
    ]  # fmt: skip
    template = {
        "type": "TemplateProcessing",
        "single": [*starts, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*starts, {"Sequence": {"id": "A", "type_id": 0}},
                 {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [i], "tokens": [token]}
            for i, token in ((i, tokenizer.tokens[i]) for i in tokenizer.start)
        },
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": PRE_TOKENIZERS[tokenizer.split],
        "post_processor": template if tokenizer.start else BYTE_LEVEL | {"use_regex": True},
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": tokenizer.whole_words,
            "vocab": tokenizer.ids, "merges": [list(pair) for pair in tokenizer.merges],
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False).encode()
