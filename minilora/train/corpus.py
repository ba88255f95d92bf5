"""A file of the reader's own as token sequences with targets: conversations, pairs, or text.

    {"messages": [{"role": "user", "content": ...}, ...]}     what the assistant said is scored
    {"prompt": ..., "completion": ...}                        the completion is scored
    {"text": ...}, or a .txt file                             all of it is scored

A line of .jsonl is an example of its own, padded on the right, and cut after `length` tokens.
Text is one stream, documents one after the other with the end token between them, cut into
windows of `length` tokens that do not overlap: every token is the target of the one before.
"""

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import to_device
from ..engine.errors import (
    FormatError,
    MiniloraError,
    MissingFileError,
    expect_whole,
    is_number,
    is_whole,
)
from ..engine.loss import IGNORE
from ..files.tokenizer import Tokenizer
from ..files.trees import DATA
from ..files.untrusted import map_file, parse_json, short
from .data import Batch, Data

SHIPPED = {"persona": "persona.jsonl", "genesis": "genesis.txt.xz", "plays": "shakespeare.txt.xz"}
FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})


class Sequences(Data):
    """Padded rows of `ids` and `targets`; a batch is as long as its longest row."""

    def take(self, rows: np.ndarray | slice, device: str = "cpu") -> tuple[Batch, int]:
        used = np.flatnonzero((self.arrays["targets"][rows] != IGNORE).any(axis=0))
        length = int(used[-1]) + 1 if len(used) else 1
        batch = {n: to_device(a[rows, :length], device) for n, a in self.arrays.items()}
        return batch, int(self.scored[rows].sum())

    def spread(self, n: int) -> "Sequences":
        """`n` rows that lie evenly over these, or all of them if there are fewer."""
        places = np.linspace(0, len(self) - 1, min(n, len(self))).astype(int)
        return Sequences({name: array[places] for name, array in self.arrays.items()})


@dataclass(frozen=True)
class Corpus:
    """Training and held-out sequences, and what became of the file."""

    train: Sequences
    held_out: Sequences
    counts: dict[str, int]  # examples, tokens, scored, cut, dropped, lossy
    kind: str  # "messages", "prompt and completion" or "text"
    name: str

    def described(self) -> str:
        c = self.counts
        parts = [
            f"{self.name}: {c['examples']:,} {self.kind} examples, {c['tokens']:,} tokens, "
            f"{c['scored']:,} of them scored; {len(self.train)} to train on, "
            f"{len(self.held_out)} held out"
        ]
        for name, text in (
            ("cut", "cut to the longest length"),
            ("dropped", "left out, with nothing to score"),
            ("lossy", "with characters that the vocabulary has no token for"),
        ):
            if c[name]:
                parts.append(f"{c[name]:,} {text}")
        return "; ".join(parts)


def read_corpus(
    source: str | Path, tokenizer: Tokenizer, length: int, held_out: float = 0.1, seed: int = 0
) -> Corpus:
    """Read a .jsonl or .txt file, or a text that ships (`persona`, `genesis`, `plays`).

    `held_out` is the share kept for validation, at least one example but not all: the end of
    a text, or lines drawn by `seed`.
    Errors: `MissingFileError`; `FormatError` naming the line; `MiniloraError` for a length,
    share or seed out of range, or a file with fewer than two examples.
    """
    is_share = is_number(held_out) and 0 < held_out < 1
    if not is_whole(length) or length < 2 or not is_share:
        raise MiniloraError(
            f"corpus: expected a length >= 2 and a share in (0, 1), found {length}, {held_out}"
        )
    expect_whole("corpus: seed", seed, 0)
    path = DATA / SHIPPED[str(source)] if str(source) in SHIPPED else Path(source)
    if not path.exists():
        raise MissingFileError(
            f"{path}: expected a .jsonl or .txt file, or one of {', '.join(SHIPPED)}; found nothing"
        )
    if path.suffix.lower() in (".json", ".csv"):  # whose marks would be learned as text
        raise FormatError(f"{path}: expected a .jsonl or .txt file, found {path.suffix}")
    if path.suffix.lower() == ".jsonl":
        documents, kind = list(read_jsonl(path)), None
    else:
        documents, kind = [{"text": read_text(path)}], "text"
    kind = kind or kind_of(path, documents)
    counts = dict.fromkeys(("examples", "tokens", "scored", "cut", "dropped", "lossy"), 0)
    if kind == "text":
        rows = windows(documents, tokenizer, length, counts)
        order = np.arange(len(rows))
    else:
        rows = examples(documents, tokenizer, length, counts)
        order = np.random.default_rng(seed).permutation(len(rows))
    counts["examples"] = len(rows)
    if len(rows) < 2:
        raise MiniloraError(f"{path}: expected at least two examples, found {len(rows)}")
    counts["tokens"] = sum(len(ids) for ids, _ in rows)
    counts["scored"] = sum(sum(scored[1:]) for _, scored in rows)
    kept = min(max(1, round(held_out * len(rows))), len(rows) - 1)
    train, last = order[: len(rows) - kept], order[len(rows) - kept :]
    return Corpus(
        padded([rows[i] for i in sorted(train)]), padded([rows[i] for i in sorted(last)]),
        counts, kind, str(source) if str(source) in SHIPPED else path.name,
    )  # fmt: skip


Row = tuple[list[int], list[bool]]  # ids, and which of them are scored


def read_text(path: Path) -> str:
    """A text file in UTF-8, compressed or not."""
    raw = map_file(path).tobytes()
    try:
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise FormatError(f"{path}: expected text in UTF-8 ({error})") from None


def read_jsonl(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a file, one a line; empty lines are passed over."""
    for number, line in enumerate(map_file(path).tobytes().split(b"\n"), 1):
        if line.strip():
            value = parse_json(f"{path}, line {number}", line)
            if type(value) is not dict or set(value) not in FORMS:
                raise FormatError(
                    f"{path}, line {number}: expected messages, or prompt and completion, or "
                    f"text; found {short(sorted(value) if type(value) is dict else value)}"
                )
            yield {**value, "line": f"{path}, line {number}"}


def kind_of(path: Path, documents: list[dict[str, Any]]) -> str:
    """What all lines of a file are.  Errors: `FormatError` for none, or a mixture."""
    names = ("messages", "prompt", "completion", "text")  # JSON has no order of its own
    kinds = {" and ".join(k for k in names if k in document) for document in documents}
    if len(kinds) != 1:
        raise FormatError(f"{path}: expected lines of one form, found {sorted(kinds) or 'none'}")
    return kinds.pop()


def windows(
    documents: list[dict[str, Any]], tokenizer: Tokenizer, length: int, counts: dict[str, int]
) -> list[Row]:
    """The stream of all documents in windows of length + 1; neighbors share one token."""
    stream: list[int] = []
    for document in documents:
        text = expect_text(document, "text")
        ids = tokenizer.encode(text, special=False)
        counts["lossy"] += tokenizer.decode(ids) != text
        stream += ids + list(tokenizer.stop[:1])
    return [
        (part, [True] * len(part))
        for start in range(0, len(stream) - 1, length)
        if len(part := stream[start : start + length + 1]) > 1
    ]


def examples(
    documents: list[dict[str, Any]], tokenizer: Tokenizer, length: int, counts: dict[str, int]
) -> list[Row]:
    """A row for each conversation or pair, cut after length + 1 tokens."""
    rows = []
    for document in documents:
        if "messages" in document:
            try:
                parts = tokenizer.chat_parts(document["messages"], reply=False)
            except MiniloraError as error:
                raise FormatError(f"{document['line']}: {error}") from None
        else:
            prompt, answer = (expect_text(document, n) for n in ("prompt", "completion"))
            end = list(tokenizer.stop[:1])
            parts = [
                (tokenizer.encode(prompt, special=False), False),
                (tokenizer.encode(answer, special=False, start=False) + end, True),
            ]
            back = tokenizer.decode(i for ids, _ in parts for i in ids)
            counts["lossy"] += back != prompt + answer
        ids = [i for part, _ in parts for i in part]
        scored = [flag for part, flag in parts for _ in part]
        counts["cut"] += len(ids) > length + 1
        ids, scored = ids[: length + 1], scored[: length + 1]
        if any(scored[1:]):
            rows.append((ids, scored))
        else:
            counts["dropped"] += 1
    return rows


def expect_text(document: dict[str, Any], name: str) -> str:
    if type(document[name]) is not str:
        where = document.get("line", name)
        raise FormatError(f"{where}: {name}: expected text, found {short(document[name])}")
    return document[name]


def padded(rows: list[Row]) -> Sequences:
    """ids and targets (n, T): the target of a place is the next token, if that is scored."""
    longest = max(len(ids) for ids, _ in rows) - 1
    table = np.zeros((len(rows), longest), np.int64)
    targets = np.full((len(rows), longest), IGNORE, np.int64)
    for row, goal, (ids, scored) in zip(table, targets, rows, strict=True):
        row[: len(ids) - 1] = ids[:-1]
        goal[: len(ids) - 1] = np.where(scored[1:], ids[1:], IGNORE)
    return Sequences({"ids": table, "targets": targets})
