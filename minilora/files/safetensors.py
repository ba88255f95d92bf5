"""A header that says where every tensor lies, then their bytes: a format without surprises.

    | N: u64, little-endian | N bytes of JSON | data |

    {"__metadata__": {"format": "pt"},
     "wte.weight": {"dtype": "F32", "shape": [50257, 768], "data_offsets": [0, 154389504]}}

Offsets count from the first byte of the data; sorted, the tensors cover it without gap or
overlap.  Values are little-endian, the last index runs fastest.  Nothing in such a file can
be executed, which is why it has replaced pickles.  This reader refuses more than the format's
own library does: duplicate keys, unknown fields, control characters, booleans other than 0
and 1, and, unless asked, values that are not finite.

Source: the section "Format" of the README of github.com/huggingface/safetensors.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.bf16 import float32_of
from ..engine.check import expect_finite
from ..engine.errors import FormatError
from .atomic import replace_file
from .untrusted import Entries, map_file, parse_json, short

MAX_HEADER = 32 << 20  # bytes; the format's library allows 10^8, and takes seconds for them
MAX_TENSORS = 200_000
MAX_NDIM = 8
MAX_DIM = 1 << 48

DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BOOL": np.dtype("?"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
STORED = {**DTYPES, "BF16": DTYPES["U16"]}  # a bfloat16 is the upper half of a float32

FIELDS = {"dtype", "shape", "data_offsets"}
DIGEST = "sha256."  # with a tensor's name behind it: the metadata key of its digest
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
PLAIN = re.compile(r"[\w.-]+\.safetensors")  # a file name that leads out of no directory


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor: what the header says of it, and its bytes, a view of the mapped file."""

    where: str  # "file: tensor 'name'", for messages
    dtype: str  # a key of STORED
    shape: tuple[int, ...]
    data: np.ndarray  # (bytes,) uint8
    sha256: str | None  # None: nothing to compare with

    def array(self, allow_nonfinite: bool = False) -> np.ndarray:
        """The tensor, read-only.  BF16 becomes float32, exactly.

        Errors: `FormatError` for a digest that differs or a boolean other than 0 and 1;
        `NumericsError` for a value that is not finite.
        """
        if self.sha256 is not None and digest(self.dtype, self.shape, self.data) != self.sha256:
            raise FormatError(f"{self.where}: the data do not match their sha256")
        if self.dtype == "BOOL" and self.data.max(initial=0) > 1:
            raise FormatError(f"{self.where}: expected 0 and 1, found {self.data.max()}")
        values = self.data.view(STORED[self.dtype])
        if self.dtype == "BF16":
            values = float32_of(values)
        if not values.flags.aligned:  # legal in a file, but not for every kernel
            values = values.copy()
        values = values.reshape(self.shape)
        if values.dtype.kind == "f" and not allow_nonfinite:
            expect_finite(self.where, values)
        values.flags.writeable = False
        return values


class SafeTensors(Entries):
    """The tensors of one or several files by name, each decoded and checked when asked for.

    `entries` gives dtype and shape of each without touching its data; `metadata` are the
    strings of the header, digests apart.  Arrays are views of the mapped file where they can
    be: it may be replaced meanwhile, but not edited.
    """

    def __init__(self, entries: dict[str, Entry], metadata: dict[str, str], allow_nonfinite: bool):
        super().__init__(entries, allow_nonfinite)
        self.metadata = metadata

    @property
    def verified(self) -> bool:
        """Whether every tensor is compared with a digest; False for most files of others."""
        return all(entry.sha256 is not None for entry in self.entries.values())


def read(
    path: str | os.PathLike, *, verify: bool = True, allow_nonfinite: bool = False
) -> SafeTensors:
    """The tensors of one file: name -> read-only array.  `dict(read(path))` takes them all.

    The header is checked here, the data of a tensor when it is asked for (`Entry.array`).
    `verify=False` leaves the digests alone.

    Errors: `MissingFileError`; `FormatError` for anything that departs from the layout above.
    """
    where = os.fspath(path)
    data = map_file(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > len(data) - 8:  # negative for a file too short to hold a length
        raise FormatError(f"{where}: header of {length} bytes in a file of {len(data)}")
    raw, data = data[8 : 8 + length], data[8 + length :]
    metadata, spans = _parse_header(where, raw, len(data))

    keys = [key for key in metadata if key.startswith(DIGEST)]
    digests = {key.removeprefix(DIGEST): metadata.pop(key) for key in keys}
    if digests and verify and digests.keys() != spans.keys():
        odd = short(min(digests.keys() ^ spans.keys()))
        raise FormatError(f"{where}: expected one sha256 per tensor, found otherwise for {odd}")
    entries = {}
    for name, (dtype, shape, begin, end) in spans.items():
        sha = digests.get(name) if verify else None
        entries[name] = Entry(_name(where, name), dtype, shape, data[begin:end], sha)
    return SafeTensors(entries, metadata, allow_nonfinite)


def read_sharded(directory: str | os.PathLike, **options: bool) -> SafeTensors:
    """The tensors of a checkpoint directory: `model.safetensors`, or the files of an index.

    `model.safetensors.index.json` says where each tensor is: {"weight_map": {name: file}}.
    `options` as in `read`.  A shard must hold the tensors that the index promises, no others.

    Errors: `MissingFileError` for a file that is not there; `FormatError` otherwise.
    """
    index = Path(directory, "model.safetensors.index.json")
    if not os.path.exists(index):
        return read(index.with_name("model.safetensors"), **options)
    raw = map_file(index)
    if len(raw) > MAX_HEADER:
        raise FormatError(f"{index}: expected at most {MAX_HEADER} bytes, found {len(raw)}")
    content = parse_json(str(index), raw.tobytes())
    places = content.get("weight_map") if type(content) is dict else None
    files = list(places.values()) if type(places) is dict else [None]
    if not all(type(file) is str and PLAIN.fullmatch(file) for file in files):
        raise FormatError(f"{index}: expected weight_map {{name: file}}, found {short(places)}")

    whole = SafeTensors({}, {}, options.get("allow_nonfinite", False))
    for file in sorted(set(files)):
        shard = read(index.with_name(file), **options)
        odd = shard.entries.keys() ^ {name for name in places if places[name] == file}
        if odd:
            raise FormatError(f"{index}: index and {file} disagree about {short(min(odd))}")
        whole.entries.update(shard.entries)
        whole.metadata.update(shard.metadata)
    return whole


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` to `path`, whole or not at all: `encode`, then `atomic.replace_file`."""
    replace_file(path, encode(tensors, metadata))


def encode(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> list[bytes | np.ndarray]:
    """The buffers whose concatenation is the file.  Equal tensors give equal bytes.

    Wide dtypes come first and the header is padded to a multiple of 8, so that every tensor
    is aligned; within a width, names are in order.  Each tensor gets its sha256.

    Errors: `FormatError` for what is no NumPy array of a dtype above, and for all that `read`
    would refuse, except values that are not finite: a failure must be on record, too.
    """
    notes = dict(metadata or {})
    for key, value in notes.items():
        if type(key) is not str or type(value) is not str or key.startswith(DIGEST):
            raise FormatError(f"metadata {short(key)}: expected text, and no key {DIGEST}*")
    arrays = {}
    for name, value in tensors.items():
        if type(name) is not str or name == "__metadata__":
            raise FormatError(f"tensor {short(name)}: not a name for a tensor")
        dtype = value.dtype.newbyteorder("<") if isinstance(value, np.ndarray) else None
        if dtype not in NAMES:
            found = f"expected a NumPy array of {', '.join(DTYPES)}; found {type(value)} {dtype}"
            raise FormatError(f"tensor {short(name)}: {found}")
        arrays[name] = np.asarray(value, dtype=dtype, order="C")

    header, buffers, end = {}, [], 0
    for name in sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)):
        dtype, shape = NAMES[arrays[name].dtype], arrays[name].shape
        data = arrays[name].reshape(-1).view(np.uint8)
        begin, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
        notes[DIGEST + name] = digest(dtype, shape, data)
        buffers.append(data)
    header = {"__metadata__": dict(sorted(notes.items())), **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    raw = text.encode(errors="surrogatepass")  # which the reader's decode will refuse
    raw += b" " * (-len(raw) % 8)
    _parse_header("the file to be written", raw, end)  # a writer keeps its reader's rules
    return [len(raw).to_bytes(8, "little") + raw, *buffers]


def digest(dtype: str, shape: tuple[int, ...], data: np.ndarray) -> str:
    """sha256 of "F32(2, 3)" and the bytes: it also changes with the dtype or the shape."""
    sha = hashlib.sha256(f"{dtype}{shape}".encode())
    sha.update(data)
    return sha.hexdigest()


def _parse_header(
    where: str, raw: bytes | np.ndarray, total: int
) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """The metadata, and (dtype, shape, begin, end) of each tensor in `total` bytes of data."""
    if len(raw) > MAX_HEADER:
        raise FormatError(f"{where}: expected a header <= {MAX_HEADER} bytes, found {len(raw)}")
    raw = bytes(raw)
    if raw[:1] != b"{":
        raise FormatError(f"{where}: expected the header to begin with '{{', found {raw[:1]!r}")
    count = raw.count(b'"data_offsets"')  # counted before parsing, which would take seconds
    if count > MAX_TENSORS:
        raise FormatError(f"{where}: expected at most {MAX_TENSORS} tensors, found {count}")

    header = parse_json(where, raw, _whole)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(note) is str for note in metadata.values()):
        raise FormatError(f"{where}: __metadata__: expected strings, found {short(metadata)}")
    spans, end = {}, 0
    for name, entry in header.items():
        spans[name] = _parse_entry(_name(where, name), name, entry)
    for name, (_, _, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != end:  # a gap could hide another file, an overlap another tensor
            raise FormatError(f"{_name(where, name)}: expected to begin at {end}, found {begin}")
        end = stop
    if end != total:
        raise FormatError(f"{where}: expected {end} bytes of data, found {total}")
    return metadata, spans


def _parse_entry(where: str, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if CONTROL.search(name):
        raise FormatError(f"{where}: expected a name without control characters")
    fields = entry.keys() if type(entry) is dict else set()
    if fields != FIELDS:
        raise FormatError(f"{where}: expected dtype, shape, data_offsets; found {short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in STORED:
        raise FormatError(f"{where}: unsupported dtype {short(dtype)}")
    for numbers in (shape, offsets):  # type(), not isinstance(): True is an int in Python
        if type(numbers) is not list or not all(type(number) is int for number in numbers):
            raise FormatError(f"{where}: expected whole numbers, found {short(numbers)}")
    # Python's integers do not wrap; np.prod([2**33, 2**33]) == 0.  NumPy refuses a shape whose
    # dimensions overflow when those of 0 are left out: hence max(n, 1).
    itemsize = STORED[dtype].itemsize
    extent = itemsize * math.prod(max(n, 1) for n in shape[: MAX_NDIM + 1])
    if len(shape) > MAX_NDIM or max(shape, default=0) >= MAX_DIM or extent >= 1 << 63:
        raise FormatError(f"{where}: too many dimensions, or too large: {short(shape)}")
    size = itemsize * math.prod(shape)
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise FormatError(f"{where}: expected {size} bytes, found offsets {short(offsets)}")
    return dtype, tuple(shape), *offsets


def _whole(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 19:  # int("-0") would pass as 0
        raise ValueError(f"expected a whole number below 2^63, found {short(digits)}")
    return int(digits)


def _name(where: str, name: str) -> str:
    return f"{where}: tensor {short(name)}"
