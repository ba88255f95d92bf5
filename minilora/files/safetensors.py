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
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from ..engine.errors import FormatError, MissingFileError, NumericsError
from .atomic import replace_file

MAX_HEADER = 32 << 20  # bytes; the format's library allows 10^8, and takes seconds for them
MAX_TENSORS = 200_000
MAX_NDIM = 8
MAX_DIM = 1 << 48

DTYPES = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
STORED = {**DTYPES, "BF16": DTYPES["U16"]}  # a bfloat16 is the upper half of a float32

FIELDS = {"dtype", "shape", "data_offsets"}
DIGEST = "sha256."  # metadata key of a tensor's digest, before its name
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
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
        values = self.data.view(STORED[self.dtype])
        if self.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "BOOL" and self.data.max(initial=0) > 1:
            raise FormatError(f"{self.where}: expected 0 and 1, found {self.data.max()}")
        if not values.flags.aligned:  # legal in a file, but not in every kernel
            values = values.copy()
        if values.dtype.kind == "f" and not allow_nonfinite:
            at = first_nonfinite(values)
            if at is not None:
                raise NumericsError(
                    f"{self.where}: expected finite values, found {values[at]} at flat index {at}"
                )
        values.flags.writeable = False
        return values.reshape(self.shape)


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of one or several files by name, each decoded and checked when asked for.

    `entries` has dtype and shape of each without touching its data, `metadata` the strings of
    the header.  `verified`: every tensor has a digest and is compared with it.
    Arrays are views of the mapped file where they can be: replace that file, never edit it.
    """

    def __init__(
        self, entries: dict[str, Entry], metadata: dict[str, str], allow_nonfinite: bool
    ):
        self.entries, self.metadata, self.allow_nonfinite = entries, metadata, allow_nonfinite

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].array(self.allow_nonfinite)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would decode the tensor
        return name in self.entries

    @property
    def verified(self) -> bool:
        return all(entry.sha256 is not None for entry in self.entries.values())


def read(
    path: str | os.PathLike,
    *,
    strict: bool = True,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> SafeTensors:
    """The tensors of one file: name -> read-only array; `dict(read(path))` takes them all.

    `strict=False` also takes unknown fields and spaces before the header, `verify=False`
    leaves digests alone.  The header is checked here, the data of a tensor when it is asked
    for (`Entry.array`).

    Errors: `MissingFileError`; `FormatError` for anything that departs from the layout above.
    """
    where = os.fspath(path)
    data = _map(where)
    if len(data) < 8:
        raise FormatError(f"{where}: expected 8 bytes of header length, found {len(data)}")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise FormatError(
            f"{where}: expected a header of at most {MAX_HEADER} bytes within a file of "
            f"{len(data)}, found a length of {length}"
        )
    raw, data = data[8 : 8 + length].tobytes(), data[8 + length :]
    metadata, spans = _parse_header(where, raw, len(data), strict)

    keys = [key for key in metadata if key.startswith(DIGEST)]
    digests = {key.removeprefix(DIGEST): metadata.pop(key) for key in keys}
    if not verify:
        digests = {}
    elif digests and digests.keys() != spans.keys():
        name = min(digests.keys() ^ spans.keys())
        raise FormatError(f"{where}: expected one sha256 per tensor, found otherwise for {name!r}")
    entries = {
        name: Entry(f"{where}: tensor {name!r}", dtype, shape, data[begin:end], digests.get(name))
        for name, (dtype, shape, begin, end) in spans.items()
    }
    return SafeTensors(entries, metadata, allow_nonfinite)


def read_sharded(directory: str | os.PathLike, **options: bool) -> SafeTensors:
    """The tensors of a checkpoint directory: `model.safetensors`, or the files of an index.

    `model.safetensors.index.json` maps each name to its file: {"weight_map": {name: file}}.
    `options` as in `read`.  Shards name and hold the same tensors, no more and no fewer.

    Errors: `MissingFileError` for a missing index or shard; `FormatError` otherwise.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return read(directory / "model.safetensors", **options)
    where = os.fspath(index)
    data = _map(where)
    if len(data) > MAX_HEADER:
        raise FormatError(f"{where}: expected at most {MAX_HEADER} bytes, found {len(data)}")
    content = parse_json(where, data.tobytes())
    places = content.get("weight_map") if type(content) is dict else None
    if type(places) is not dict or not all(type(file) is str for file in places.values()):
        raise FormatError(f'{where}: expected {{"weight_map": {{name: file}}}}')

    merged = SafeTensors({}, {}, options.get("allow_nonfinite", False))
    for file in sorted(set(places.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):  # never a way out of the directory
            raise FormatError(f"{where}: expected plain file names, found {short(file)}")
        shard = read(directory / file, **options)
        odd = shard.entries.keys() ^ {name for name in places if places[name] == file}
        if odd:
            raise FormatError(f"{where}: index and {file} disagree about {short(min(odd))}")
        merged.entries.update(shard.entries)
        merged.metadata.update(shard.metadata)
    return merged


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` to `path`, whole or not at all.  Layout and errors as in `encode`."""
    replace_file(path, encode(tensors, metadata))


def encode(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> list[bytes | np.ndarray]:
    """The buffers whose concatenation is the file.  Equal input gives equal bytes.

    Wide dtypes come first and the header is padded to a multiple of 8, so that every tensor
    is aligned; within a width, names are in order.  Each tensor gets its sha256.

    Errors: `FormatError` for what is no NumPy array of a dtype above, and for all that `read`
    would refuse, except values that are not finite: a record of a failure must be possible.
    """
    arrays = {}
    for name, value in tensors.items():
        if not isinstance(value, np.ndarray) or value.dtype.newbyteorder("<") not in NAMES:
            found = getattr(value, "dtype", type(value).__name__)
            raise FormatError(f"tensor {name!r}: expected a NumPy array that fits, found {found}")
        arrays[name] = np.asarray(value, dtype=value.dtype.newbyteorder("<"), order="C")
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, str(name)))
    notes, header, buffers, end = dict(metadata or {}), {}, [], 0
    for key in notes:
        if str(key).startswith(DIGEST):
            raise FormatError(f"metadata {key!r}: keys that begin with {DIGEST!r} are our own")
    for name in names:
        array, begin = arrays[name], end
        end += array.nbytes
        dtype, flat = NAMES[array.dtype], array.reshape(-1).view(np.uint8)
        entry = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
        header[name] = entry
        buffers.append(flat)
        notes[f"{DIGEST}{name}"] = digest(dtype, array.shape, flat)
    ...
