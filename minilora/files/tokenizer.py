"""Text to the numbers that a model reads, and back: byte-level BPE as others have stored it.

    text -> special tokens cut out -> split into words -> bytes merged into tokens -> ids

Read from a `tokenizer.json`, from the metadata of a GGUF file, or learned from a text.  What
such a file asks for and is not done here is refused: another ids would be another text.
"""

import codecs
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..engine.errors import FormatError, MiniloraError
from .bpe import ALPHABET, BYTE, Pair, learn_merges, merge_word, spell
from .chat import Message, segments
from .split import GPT2, LLAMA3, QWEN2, SPLITS
from .untrusted import map_file, parse_json, short

MAX_FILE = 64 << 20  # bytes of a tokenizer.json; the largest known has 33 MB
MAX_CACHE = 1 << 16  # words whose tokens are remembered


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary, the merges in order of rank, and how text is split before them.

    tokens   by id: spelled bytes, or for a special token its text
    merges   pairs of tokens, the first joined first
    split    a key of `split.SPLITS`
    special  text -> id of tokens that are cut out of the text before all else
    control  ids that are not part of the text when it is decoded
    start    ids before every text
    stop     ids at which an answer ends
    nfc      whether the text is brought into Unicode's form NFC first
    whole_words   whether a word that is a token is taken without merging
    chat_template, if the model has one: its text, see `chat`
    """

    tokens: Sequence[str]
    merges: Sequence[Pair]
    split: str
    special: Mapping[str, int] = field(default_factory=dict)
    control: frozenset[int] = frozenset()
    start: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    nfc: bool = False
    whole_words: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise FormatError(f"tokenizer: expected a split in {', '.join(SPLITS)}; "
                              f"found {short(self.split)}")  # fmt: skip
        if len(self.ids) != len(self.tokens):
            raise FormatError("tokenizer: expected distinct tokens, found one twice")
        for a, b in self.merges:
            if not {a, b, a + b} <= self.ids.keys():
                raise FormatError(f"tokenizer: a merge of no tokens: {short(a)} {short(b)}")

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id."""
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def ranks(self) -> dict[Pair, int]:
        """Pair -> its place among the merges; of a pair given twice, the last."""
        return {(a, b): rank for rank, (a, b) in enumerate(self.merges)}

    @cached_property
    def words(self) -> dict[str, list[int]]:
        """Ids of words already seen."""
        return {}

    @cached_property
    def cutter(self) -> re.Pattern | None:
        """What finds special tokens: the longest that begins at a place."""
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, special: bool = True, start: bool = True) -> list[int]:
        """The ids of a text.

        `special=False` reads the text of a special token as text, which is how to treat what
        a stranger wrote; `start=False` leaves out what comes before every text.
        A byte for which the vocabulary has no token is left out, as in the reference.
        Errors: `MiniloraError` for a lone surrogate, which is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MiniloraError(f"text: expected Unicode, found {error}") from None
        out = list(self.start) if start else []
        pieces = self.cutter.split(text) if special and self.cutter else [text]
        for i, piece in enumerate(pieces):
            if i % 2:
                out.append(self.special[piece])
            else:
                out += self.encode_plain(piece)
        return out

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        out: list[int] = []
        for word in SPLITS[self.split](text):
            found = self.words.get(word)
            if found is None:
                spelled = spell(word)
                if self.whole_words and spelled in self.ids:
                    found = [self.ids[spelled]]
                else:
                    known = (character for character in spelled if character in self.ids)
                    found = [self.ids[token] for token in merge_word(known, self.ranks)]
                if len(self.words) < MAX_CACHE:
                    self.words[word] = found
            out += found
        return out

    def bytes_of(self, token: int, control: bool = False) -> bytes:
        """The bytes that an id stands for; none for a control token, unless asked."""
        if not 0 <= token < len(self.tokens):
            raise MiniloraError(f"id: expected 0..{len(self.tokens) - 1}, found {token}")
        if token in self.control and not control:
            return b""
        text = self.tokens[token]
        if text in self.special:
            return text.encode()
        return bytes(map(BYTE.__getitem__, text))

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.bytes_of(i, control) for i in ids).decode(errors="replace")

    def stream(self) -> "Stream":
        """Takes ids one at a time, and gives text as soon as its characters are complete."""
        return Stream(self)

    def chat(self, messages: Sequence[Message], reply: bool = True) -> list[int]:
        """The ids of a conversation; with `reply`, up to where the assistant begins.

        Errors: `FormatError` where the model has no template that is known.
        """
        return [i for ids, _ in self.chat_parts(messages, reply) for i in ids]

    def chat_parts(self, messages: Sequence[Message], reply: bool) -> list[tuple[list[int], bool]]:
        """Stretches of ids, and whether the assistant wrote them (its end of turn included)."""
        parts = []
        for who, text in segments(self.chat_template, messages, reply):
            is_control = who == "control" or who.endswith(" end")
            if is_control and text not in self.special:
                raise FormatError(f"chat: expected a special token {text}, found none")
            ids = [self.special[text]] if is_control else self.encode_plain(text)
            parts.append((ids, who.startswith("assistant")))
        return parts

    def to_json(self) -> bytes:
        """A `tokenizer.json` from which others read the same tokenizer."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        starts = [{"SpecialToken": {"id": self.tokens[i], "type_id": 0}} for i in self.start]
        added = [
            {
                "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": i in self.control,
            }
            for text, i in sorted(self.special.items(), key=lambda item: item[1])
        ]  # fmt: skip
        template = {
            "type": "TemplateProcessing",
            "single": [*starts, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*starts, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                self.tokens[i]: {"id": self.tokens[i], "ids": [i], "tokens": [self.tokens[i]]}
                for i in self.start
            },
        }  # fmt: skip
        content = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": PRE_TOKENIZERS[self.split],
            "post_processor": template if self.start else byte_level | {"use_regex": True},
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None,
                "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                "byte_fallback": False, "ignore_merges": self.whole_words,
                "vocab": self.ids, "merges": [list(pair) for pair in self.merges],
            },
        }  # fmt: skip
        return json.dumps(content, ensure_ascii=False).encode()


class Stream:
    """Ids in, text out, without a character cut in two."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.tokenizer.bytes_of(token))

    def end(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self.decoder.decode(b"", final=True)


def train_tokenizer(
    text: str, size: int, split: str = "gpt2", special: Sequence[str] = ("<|endoftext|>",)
) -> Tokenizer:
    """A vocabulary of at most `size` tokens: the special ones, 256 bytes, and learned merges.

    Errors: `MiniloraError` for a size that does not hold the bytes.
    """
    if size < 256 + len(special):
        raise MiniloraError(f"size: expected at least {256 + len(special)} tokens, found {size}")
    counts: dict[str, int] = {}
    for word in SPLITS[split](text):
        counts[word] = counts.get(word, 0) + 1
    words = {spell(word): count for word, count in counts.items()}
    merges = learn_merges(words, size - 256 - len(special))
    tokens = [*special, *ALPHABET, *dict.fromkeys(a + b for a, b in merges)]
    ids = {token: i for i, token in enumerate(special)}
    return Tokenizer(tokens, merges, split, ids, frozenset(ids.values()), stop=tuple(ids.values()))


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
    special: dict[str, int] = {}
    control = set()
    for token in added:
        if type(token) is not dict or type(token.get("content")) is not str:
            raise FormatError(
                f"{path}: added_tokens: expected content and id, found {short(token)}"
            )
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise FormatError(f"{path}: added token {short(token)}: stripping is not done here")
        text, i = token["content"], token.get("id")
        if ids.setdefault(text, i) != i:
            raise FormatError(f"{path}: added token {short(text)}: two ids, {ids[text]} and {i}")
        special[text] = i
        if token.get("special"):
            control.add(i)
    tokens = in_order(path, ids)
    merges = [pair_of(path, merge) for merge in expect(path, model, "merges", list)]
    normalizer = content.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise FormatError(f"{path}: normalizer: expected none or NFC, found {short(normalizer)}")
    template, stops = chat_settings(Path(directory), special)
    return Tokenizer(
        tokens, merges, split_of(path, content.get("pre_tokenizer")), special, frozenset(control),
        start=start_of(path, content.get("post_processor"), ids), stop=stops,
        nfc=normalizer is not None, whole_words=bool(model.get("ignore_merges")),
        chat_template=template,
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
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = [NORMAL] * len(tokens or []) if kinds is None else [int(kind) for kind in kinds]
    if not tokens or merges is None or len(kinds) != len(tokens):
        raise FormatError(f"{where}: expected tokens, their types and merges of a tokenizer")
    if get("add_space_prefix", bool, False):
        raise FormatError(f"{where}: tokenizer.ggml.add_space_prefix is not done here")
    special = {t: i for i, t in enumerate(tokens) if kinds[i] in (CONTROL, USER_DEFINED)}
    bos, eos = get("bos_token_id", int), get("eos_token_id", int)
    for i in (bos, eos):
        if i is not None and not 0 <= i < len(tokens):
            raise FormatError(f"{where}: expected ids below {len(tokens)}, found {i}")
    return Tokenizer(
        tokens, [pair_of(where, merge) for merge in merges], GGUF_SPLITS[split], special,
        frozenset(i for i, kind in enumerate(kinds) if kind == CONTROL),
        start=(bos,) if bos is not None and get("add_bos_token", bool, False) else (),
        stop=() if eos is None else (eos,),
        nfc=split == "qwen2", whole_words=split == "llama-bpe",
        chat_template=metadata.get("tokenizer.chat_template"),
    )  # fmt: skip


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of bounded size."""
    raw = map_file(path)
    if len(raw) > MAX_FILE:
        raise FormatError(f"{path}: expected at most {MAX_FILE} bytes, found {len(raw)}")
    content = parse_json(str(path), raw.tobytes())
    if type(content) is not dict:
        raise FormatError(f"{path}: expected an object, found {short(content)}")
    return content


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
    steps = [found] if found is None or type(found) is not dict else [found]
    if type(found) is dict and found.get("type") == "Sequence":
        steps = found.get("processors")
    start: tuple[int, ...] = ()
    for step in steps if type(steps) is list else [steps]:
        kind = step.get("type") if type(step) is dict else step
        if kind in (None, "ByteLevel"):
            continue
        single = step.get("single") if kind == "TemplateProcessing" else None
        names = [
            part.get("SpecialToken", {}).get("id") if type(part) is dict else None
            for part in (single or [None])[:-1]
        ]
        last = single[-1] if single else None
        if type(last) is not dict or "Sequence" not in last or not set(names) <= ids.keys():
            raise FormatError(f"{where}: post_processor: {short(step)} is not done here")
        start = tuple(ids[name] for name in names)
    return start


def chat_settings(
    directory: Path, special: Mapping[str, int]
) -> tuple[str | None, tuple[int, ...]]:
    """The chat template and the end tokens, from the files that may hold them."""
    template, stops = None, set()
    path = directory / "tokenizer_config.json"
    if path.exists():
        content = load_json(path)
        template = content.get("chat_template")
        end = content.get("eos_token")
        end = end.get("content") if type(end) is dict else end
        if end in special:
            stops.add(special[end])
    if (jinja := directory / "chat_template.jinja").exists():
        template = map_file(jinja).tobytes().decode(errors="replace")
    for name in ("config.json", "generation_config.json"):
        if (path := directory / name).exists():
            ends = load_json(path).get("eos_token_id")
            stops |= {i for i in (ends if type(ends) is list else [ends]) if type(i) is int}
    if template is not None and type(template) is not str:
        raise FormatError(f"{directory}: chat_template: expected text, found {short(template)}")
    return template, tuple(sorted(stops))
