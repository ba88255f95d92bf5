"""One file for a model and all that is known of it: keys with typed values, then tensors.

    | "GGUF" | version u32 | tensors u64 | keys u64 | keys ... | tensors ... | pad | data |

    a key      name, type u32, value          (a name or text: length u64, UTF-8 bytes)
    an array   type u32, length u64, values
    a tensor   name, dimensions u32, each u64 (the fastest first), type u32, offset u64

Numbers are little-endian.  Offsets count from the first byte of the data; each tensor begins
at a multiple of `general.alignment` (32 if not said), right after the one before.  Lengths
come from the file, so each is compared with the bytes that are left before anything is made.

Source: docs/gguf.md of github.com/ggml-org/ggml; what is refused, as its gguf.cpp refuses it.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.check import expect_finite
from ..engine.errors import FormatError
from .atomic import replace_file
from .gguf_blocks import OTHERS, TYPES, BlockType, decode
from .untrusted import Entries, map_file, short

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = "general.alignment"
MAX_DIMS, MAX_NAME = 4, 64
LEAST_KEY, LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 4 + 8  # bytes of the shortest of each

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, TEXT, ARRAY = 4, 6, 7, 8, 9


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor: what the file says of it, and its bytes, a view of the mapped file."""

    where: str  # "file: tensor 'name'", for messages
    kind: BlockType
    shape: tuple[int, ...]  # NumPy's order: the fastest dimension last
    data: np.ndarray  # (bytes,) uint8

    def array(self, allow_nonfinite: bool = False) -> np.ndarray:
        """The tensor as float32, read-only.  Errors: `NumericsError` if it is not finite."""
        values = decode(self.data, self.kind, self.shape)
        if not allow_nonfinite:
            expect_finite(self.where, values)
        values.flags.writeable = False
        return values


class Gguf(Entries):
    """The tensors of a file by name, each decoded when asked for; `metadata` has its keys."""

    def __init__(self, metadata: dict[str, Any], entries: dict[str, Entry], allow_nonfinite: bool):
        super().__init__(entries, allow_nonfinite)
        self.metadata = metadata


class Cursor:
    """A place in the bytes of a file, which never moves past their end."""

    def __init__(self, where: str, data: np.ndarray):
        self.where, self.data, self.place = where, memoryview(data), 0

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.data) - self.place:
            raise FormatError(
                f"{self.where}: {what}: expected {size} more bytes at {self.place}, "
                f"found {len(self.data) - self.place}"
            )
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.where}: {what}: {error}") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == BOOL:
            return bool(self.booleans(1, what)[0])
        if kind == TEXT:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        raise FormatError(f"{self.where}: {what}: expected a type 0..12, found {kind}")

    def array(self, what: str) -> Any:
        """Numbers as a NumPy array, texts as a list.  Arrays of arrays are refused."""
        kind, length = self.number("I", what), self.number("Q", what)
        if kind in NUMBERS:
            dtype = np.dtype("<" + NUMBERS[kind].replace("q", "i8").replace("Q", "u8"))
            return np.frombuffer(self.take(length * dtype.itemsize, what), dtype).copy()
        if kind == BOOL:
            return self.booleans(length, what)
        if kind != TEXT:
            raise FormatError(
                f"{self.where}: {what}: expected an array of numbers or texts, found type {kind}"
            )
        if length * 8 > len(self.data) - self.place:
            raise FormatError(f"{self.where}: {what}: expected {length} texts, found fewer bytes")
        return [self.text(what) for _ in range(length)]

    def booleans(self, length: int, what: str) -> np.ndarray:
        raw = np.frombuffer(self.take(length, what), np.uint8)
        if raw.max(initial=0) > 1:
            raise FormatError(f"{self.where}: {what}: expected 0 or 1, found {raw.max()}")
        return raw.astype(bool)


def read(path: str | os.PathLike, *, allow_nonfinite: bool = False) -> Gguf:
    """The metadata and the tensors of one file.

    Everything but the values of the tensors is checked here; those, when they are asked for.
    Errors: `MissingFileError`; `FormatError` for anything that departs from the layout above
    and for a tensor type that is not decoded, by its name.
    """
    where = os.fspath(path)
    data = map_file(path)
    cursor = Cursor(where, data)
    if bytes(cursor.take(4, "magic")) != MAGIC:
        raise FormatError(f"{where}: expected a file that begins with GGUF")
    version = cursor.number("I", "version")
    if version != VERSION:
        raise FormatError(f"{where}: expected GGUF version {VERSION}, found {version}")
    tensors, keys = cursor.number("Q", "count of tensors"), cursor.number("Q", "count of keys")
    if keys * LEAST_KEY + tensors * LEAST_TENSOR > len(data) - cursor.place:
        raise FormatError(
            f"{where}: expected {keys} keys and {tensors} tensors, found a file of "
            f"{len(data)} bytes"
        )
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text("name of a key")
        if not name or name in metadata:
            raise FormatError(f"{where}: expected distinct names of keys, found {short(name)}")
        kind = cursor.number("I", f"key {short(name)}")
        if name == ALIGNMENT and kind != U32:
            raise FormatError(f"{where}: {ALIGNMENT}: expected type {U32}, found {kind}")
        metadata[name] = cursor.value(kind, f"key {short(name)}")
    alignment = metadata.get(ALIGNMENT, 32)
    if alignment < 8 or alignment & (alignment - 1):
        raise FormatError(f"{where}: {ALIGNMENT}: expected a power of two >= 8, found {alignment}")

    spans: dict[str, tuple[str, BlockType, tuple[int, ...], int]] = {}
    end = 0  # of the data so far, padding included
    for _ in range(tensors):
        name, kind, shape, offset = tensor_header(cursor)
        if name in spans:
            raise FormatError(f"{where}: expected distinct tensors, found {short(name)} twice")
        tensor = f"{where}: tensor {short(name)}"
        if offset != end:
            raise FormatError(f"{tensor}: expected to begin at {end}, found {offset}")
        spans[name] = (tensor, kind, shape, offset)
        last = offset + math.prod(shape) // kind.weights * kind.bytes
        end = padded(last, alignment)
    start = padded(cursor.place, alignment)
    if spans and not start + last <= len(data) <= start + end:
        raise FormatError(f"{where}: expected {start + end} bytes in all, found {len(data)}")
    entries = {
        name: Entry(
            tensor, kind, shape,
            data[start + offset :][: math.prod(shape) // kind.weights * kind.bytes],
        )
        for name, (tensor, kind, shape, offset) in spans.items()
    }  # fmt: skip
    return Gguf(metadata, entries, allow_nonfinite)


def tensor_header(cursor: Cursor) -> tuple[str, BlockType, tuple[int, ...], int]:
    """Name, type, shape in NumPy's order, and offset."""
    name = cursor.text("name of a tensor")
    where = f"{cursor.where}: tensor {short(name)}"
    if not name or len(name.encode()) >= MAX_NAME:
        raise FormatError(f"{where}: expected a name of 1 to {MAX_NAME - 1} bytes")
    dims = cursor.number("I", where)
    if dims > MAX_DIMS:
        raise FormatError(f"{where}: expected at most {MAX_DIMS} dimensions, found {dims}")
    shape = tuple(cursor.number("Q", where) for _ in range(dims))[::-1]
    number = cursor.number("I", where)
    if number not in TYPES:
        raise FormatError(
            f"{where}: expected a type among {', '.join(t.name for t in TYPES.values())}; "
            f"found {OTHERS.get(number, number)}"
        )
    kind = TYPES[number]
    if math.prod(max(n, 1) for n in shape) >= 1 << 58:
        raise FormatError(f"{where}: too large: {shape}")
    if (shape and shape[-1] % kind.weights) or (not shape and kind.weights > 1):
        raise FormatError(
            f"{where}: expected rows of a multiple of {kind.weights} for {kind.name}, found {shape}"
        )
    return name, kind, shape, cursor.number("Q", where)


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def write(path: str | os.PathLike, metadata: Mapping[str, Any], tensors: Mapping) -> None:
    """Write a file of float32 tensors, whole or not at all: `encode`, then `replace_file`."""
    replace_file(path, encode(metadata, tensors))


def encode(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> list[bytes]:
    """The parts whose concatenation is the file.  Texts, booleans, u32 and f32 as metadata.

    Errors: `FormatError` for another kind of value, a number that is no u32 or f32, an alignment
    other than 32, a tensor that is not float32, or a name that `read` would refuse.
    """
    alignment = metadata.get(ALIGNMENT, 32)
    if type(alignment) is not int or alignment != 32:  # `read` wants a u32
        raise FormatError(f"{ALIGNMENT}: expected 32, found {short(alignment)}")
    if "" in metadata:
        raise FormatError("expected names of keys, found ''")
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for name, value in metadata.items():
        head += [text(name), typed(name, value)]
    offset, data = 0, []
    for name, array in tensors.items():
        if array.dtype != np.float32 or array.ndim > MAX_DIMS:
            raise FormatError(
                f"tensor {short(name)}: expected float32 of at most {MAX_DIMS} dimensions, "
                f"found {array.dtype} {array.shape}"
            )
        told = text(name)
        if not 8 < len(told) < 8 + MAX_NAME:
            raise FormatError(f"tensor {short(name)}: expected a name of 1 to {MAX_NAME - 1} bytes")
        dims = array.shape[::-1]
        head += [told, struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)]
        raw = np.ascontiguousarray(array).tobytes()
        data.append(raw + bytes(padded(len(raw), 32) - len(raw)))
        offset += len(data[-1])
    size = sum(map(len, head))
    return [*head, bytes(padded(size, 32) - size), *data]


def text(value: str) -> bytes:
    try:
        raw = value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair is no text
        raise FormatError(f"{short(value)}: expected text ({error})") from None
    return struct.pack("<Q", len(raw)) + raw


def typed(name: str, value: Any) -> bytes:
    if type(value) is str:
        return struct.pack("<I", TEXT) + text(value)
    for kind, code, python in ((BOOL, "?", bool), (U32, "I", int), (F32, "f", float)):
        if type(value) is python:
            try:
                return struct.pack("<I" + code, kind, value)
            except (struct.error, OverflowError) as error:
                raise FormatError(f"key {short(name)}: {short(value)}: {error}") from None
    raise FormatError(f"key {short(name)}: expected text, bool, int or float, found {type(value)}")
