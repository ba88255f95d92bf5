"""What others wrote, read with suspicion: a mapped file, and JSON as the standard has it."""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any

import numpy as np

from ..engine.errors import FormatError, MissingFileError

_repr = Repr()
_repr.maxstring = 120
MAX_JSON = 64 << 20  # bytes of a file; the largest tokenizer.json known has 33 MB
short = _repr.repr  # for messages: a hostile file may hold names of megabytes


def map_file(path: str | os.PathLike) -> np.ndarray:
    """The bytes of a regular file, uint8, read-only: fetched by the system when touched.

    The file may be replaced or deleted meanwhile, but must not be shortened in place.
    Errors: `MissingFileError`; `FormatError` for a directory, a pipe or a device, and for what
    cannot be opened.
    """
    where = os.fspath(path)
    try:
        found = os.stat(where)
        if not stat.S_ISREG(found.st_mode):  # asked before opening: to open a pipe is to wait
            raise OSError("not a regular file")
        if found.st_size == 0:  # which cannot be mapped
            return np.empty(0, np.uint8)
        return np.memmap(where, np.uint8, "r").view(np.ndarray)
    except FileNotFoundError:
        raise MissingFileError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{where}: cannot be read: {error}") from error


class Entries(Mapping[str, np.ndarray]):
    """The tensors of a file by name, each decoded and checked when asked for."""

    def __init__(self, entries: dict[str, Any], allow_nonfinite: bool):
        self.entries, self.allow_nonfinite = entries, allow_nonfinite

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].array(self.allow_nonfinite)

    def __contains__(self, name: object) -> bool:  # what Mapping offers would decode the tensor
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def parse_json(where: str, raw: bytes, whole: Callable[[str], int] = int) -> Any:
    """The value of a JSON text, read as strictly as the standard says and Python does not.

    `where` begins the messages; `whole` turns the digits of an integer into a number.
    Errors: `FormatError` for text that is not UTF-8 or not JSON (with line and column), for
    duplicate keys, NaN and Infinity, lone surrogates, and nesting deeper than the stack.
    """
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=whole)
        if "\\u" in text:  # the only way to write a lone surrogate, and that is no text
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"duplicate key {short(key)}")
        value[key] = item
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of bounded size."""
    raw = map_file(path)
    if len(raw) > MAX_JSON:
        raise FormatError(f"{path}: expected at most {MAX_JSON} bytes, found {len(raw)}")
    content = parse_json(str(path), raw.tobytes())
    if type(content) is not dict:
        raise FormatError(f"{path}: expected an object, found {short(content)}")
    return content
