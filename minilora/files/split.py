"""Where a text may be cut before bytes are merged: the published patterns, on Unicode's classes.

    gpt2     ...|'t|'re|...| ?letters| ?numbers| ?others|whitespace
    smollm   every number character for itself, and gpt2 on what is between
    llama3   up to three number characters; line ends go with what is before them
    qwen2    llama3 with single number characters, on text in form NFC

Python's `re` has no class for "any letter", so it is spelled out from `unicodedata`; its \\s also
takes the four separators U+001C..1F, which Unicode does not call white space.

Source: the pre-tokenizers of the tokenizer.json files of these models.
"""

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import groupby

SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


@lru_cache
def letters_and_numbers() -> dict[str, str]:
    """The insides of two character classes: {"L": "A-Za-z...", "N": "0-9..."}."""
    ranges: dict[str, list[str]] = {"L": [], "N": []}
    points = range(sys.maxunicode + 1)
    start = 0
    for kind, run in groupby(points, lambda point: unicodedata.category(chr(point))[0]):
        stop = start + sum(1 for _ in run)
        if kind in ranges:
            ranges[kind].append(f"{chr(start)}-{chr(stop - 1)}")
        start = stop
    return {kind: "".join(parts) for kind, parts in ranges.items()}


@lru_cache
def compiled(pattern: str) -> re.Pattern:
    """A pattern with \\p{L}, \\p{N}, \\s and \\S as Unicode has them."""
    classes = letters_and_numbers()
    # Inside brackets a class is its ranges; outside, it needs brackets of its own.
    inside = re.compile(r"\[[^\]]*\]")

    def expand(part: str, left: str, right: str) -> str:
        for name in ("L", "N"):
            part = part.replace(rf"\p{{{name}}}", left + classes[name] + right)
        return part.replace(r"\s", left + SPACE + right).replace(r"\S", f"[^{SPACE}]")

    pieces, end = [], 0
    for match in inside.finditer(pattern):
        pieces += [expand(pattern[end : match.start()], "[", "]"), expand(match[0], "", "")]
        end = match.end()
    return re.compile("".join(pieces) + expand(pattern[end:], "[", "]"))


def by_pattern(pattern: str) -> Callable[[str], list[str]]:
    return lambda text: compiled(pattern).findall(text)


def smollm(text: str) -> list[str]:
    """A number character is a piece; what is between two of them ends there, spaces included."""
    words, pieces = compiled(GPT2), compiled(r"\p{N}|[^\p{N}]+").findall(text)
    return [word for piece in pieces for word in words.findall(piece)]


SPLITS: dict[str, Callable[[str], list[str]]] = {
    "gpt2": by_pattern(GPT2),
    "smollm": smollm,
    "llama3": by_pattern(LLAMA3),
    "qwen2": by_pattern(QWEN2),
}
