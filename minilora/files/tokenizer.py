"""Text to the numbers that a model reads, and back: byte-level BPE as others have stored it.

    text -> special tokens cut out -> split into words -> bytes merged into tokens -> ids

Read from files by `tokenizer_files`, or learned from a text by `train_tokenizer`.
"""

import codecs
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..engine.errors import FormatError, MiniloraError
from .bpe import ALPHABET, BYTE, Pair, learn_merges, merge_word, spell
from .chat import Message, segments
from .split import SPLITS
from .untrusted import short

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
    late     ids of special tokens that are looked for last, in what the others leave of the
             text, in form NFC if `nfc`: "normalized" in a tokenizer.json
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
    late: frozenset[int] = frozenset()
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
    def cutters(self) -> tuple[re.Pattern, re.Pattern]:
        """What finds special tokens, those that are not late and those that are."""
        first = [text for text, i in self.special.items() if i not in self.late]
        return finder(first), finder(self.late_ids)

    @cached_property
    def late_ids(self) -> dict[str, int]:
        """Late token, in normal form -> its id."""
        return {self.normal(text): i for text, i in self.special.items() if i in self.late}

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
        if not special:
            return out + self.encode_plain(text)
        first, late = self.cutters
        for i, piece in enumerate(first.split(text)):
            if i % 2:
                out.append(self.special[piece])
                continue
            for j, rest in enumerate(late.split(self.normal(piece))):
                out += [self.late_ids[rest]] if j % 2 else self.encode_plain(rest)
        return out

    def normal(self, text: str) -> str:
        """The text in form NFC, if this tokenizer reads it so."""
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        out: list[int] = []
        for word in SPLITS[self.split](self.normal(text)):
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
        if text in self.special or not BYTE.keys() >= set(text):
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


def finder(texts: Iterable[str]) -> re.Pattern:
    """What finds any of some texts: the longest that begins at a place."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


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

    Errors: `MiniloraError` for a size that does not hold the bytes, or a split not known.
    """
    if split not in SPLITS:
        raise MiniloraError(f"split: expected one of {', '.join(SPLITS)}; found {split!r}")
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
