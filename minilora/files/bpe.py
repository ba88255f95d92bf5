"""Byte pair encoding: a text is bytes, and pairs that were frequent in training become one.

A byte is written as a printable character (33..126 and most of 161..255 as themselves, the
others from U+0100 on), so that tokens are strings and a vocabulary is readable JSON: a space
is Ġ, a line end Ċ.  (Sennrich et al. 2016; on bytes: Radford et al. 2019.)
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from ..engine.errors import MiniloraError

Pair = tuple[str, str]

_PLAIN = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
CHARACTER = {b: chr(b) for b in _PLAIN} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE = {character: byte for byte, character in CHARACTER.items()}
ALPHABET = [CHARACTER[byte] for byte in range(256)]


def spell(word: str) -> str:
    """The UTF-8 bytes of a word, a character each."""
    return "".join(map(CHARACTER.__getitem__, word.encode()))


def merge_word(word: str | Iterable[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Join neighbors, the pair of lowest rank first (of equals, the leftmost), until none is left.

    The heap holds every pair that could be joined; one whose parts have changed meanwhile has
    another rank, or none, and is passed over.  O(n log n) for a word of n characters.
    """
    parts: list[str | None] = list(word)
    n = len(parts)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [
        (ranks[pair], i) for i, pair in enumerate(pairwise(parts))
        if pair in ranks
    ]  # fmt: skip
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if parts[i] is None or j == n or ranks.get((parts[i], parts[j])) != rank:
            continue
        parts[i], parts[j] = parts[i] + parts[j], None
        after[i] = after[j]
        if after[j] < n:
            before[after[j]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < n and (parts[left], parts[right]) in ranks:
                heapq.heappush(heap, (ranks[parts[left], parts[right]], left))
    return [part for part in parts if part is not None]


def learn_merges(words: Mapping[str, int], merges: int) -> list[Pair]:
    """The `merges` pairs that are most frequent, each counted after those before it are joined.

    `words` are spelled words and how often each occurs.  Of equally frequent pairs the first
    in alphabetical order is taken, so that equal texts give equal vocabularies.  Ends early
    when no pair is left that occurs twice.
    """
    if merges < 0:
        raise MiniloraError(f"merges: expected a whole number >= 0, found {merges}")
    texts = [(list(word), count) for word, count in sorted(words.items())]
    counts: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = {}
    for i, (parts, count) in enumerate(texts):
        for pair in pairwise(parts):
            counts[pair] += count
            where.setdefault(pair, set()).add(i)
    learned: list[Pair] = []
    while len(learned) < merges and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        learned.append(best)
        for i in where.pop(best):
            parts, count = texts[i]
            for pair in pairwise(parts):
                counts[pair] -= count
            parts[:] = joined(parts, best)
            for pair in pairwise(parts):
                counts[pair] += count
                where.setdefault(pair, set()).add(i)
        counts = +counts  # without the pairs that are gone
    return learned


def joined(parts: list[str], pair: Pair) -> list[str]:
    """Every `pair` of neighbors as one, from the left."""
    out, i = [], 0
    while i < len(parts):
        both = (parts[i], parts[i + 1]) == pair if i + 1 < len(parts) else False
        out.append(parts[i] + parts[i + 1] if both else parts[i])
        i += 2 if both else 1
    return out
