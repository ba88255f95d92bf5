"""GGUF: values to the bit, and every departure from the format refused before it costs anything."""

import json
import os
import random
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from real_files import mutated, only_our_errors, refilled

from minilora.engine.errors import FormatError, MissingFileError, NumericsError
from minilora.files import gguf
from minilora.files.gguf_blocks import TYPES, decode

GOLDEN = json.loads((Path(__file__).parent / "golden_gguf.json").read_text())["types"]


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def u32(name, value):
    return text(name) + struct.pack("<II", 4, value)


def tensor(name, dims=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(keys=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, counts=None, pad=32):
    """A file from its parts; `counts` may lie."""
    n, k = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n, k) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % pad) + data


def take(path, content, **options):
    path.write_bytes(content)
    stored = gguf.read(path, **options)
    return stored.metadata, {name: stored[name] for name in stored}


SIXTEEN = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize("name", GOLDEN)
def test_blocks_mean_what_the_gguf_package_says(name):
    golden = GOLDEN[name]
    raw = np.frombuffer(bytes.fromhex(golden["raw"]), np.uint8)
    kind = TYPES[golden["type"]]
    assert kind.name == name
    n = len(raw) // kind.bytes * kind.weights
    assert decode(raw, kind, (n,)).tobytes().hex() == golden["values"]


def test_written_and_read_again(path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5), dtype=np.float32),
        "b": rng.standard_normal(7, dtype=np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "number": np.float32(2.5).reshape(()),
    }
    metadata = {"general.type": "adapter", "alpha": 2.5, "count": 7, "yes": True, "text": "é\n"}
    gguf.write(path, metadata, tensors)
    stored = gguf.read(path)
    assert stored.metadata == metadata
    assert list(stored) == list(tensors)
    for name, array in tensors.items():
        assert stored[name].tobytes() == array.tobytes()
        assert stored[name].shape == array.shape
        assert not stored[name].flags.writeable


def test_all_kinds_of_values(path):
    array = text("numbers") + struct.pack("<IIQ3h", 9, 3, 3, -1, 0, 5)
    texts = text("texts") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("")
    flags = text("flags") + struct.pack("<IIQ2B", 9, 7, 2, 1, 0)
    wide = text("wide") + struct.pack("<IQ", 10, 2**63)
    small = text("small") + struct.pack("<Ib", 1, -3)
    metadata, _ = take(path, file_of([array, texts, flags, wide, small]))
    assert metadata["numbers"].tolist() == [-1, 0, 5]
    assert metadata["texts"] == ["a", ""]
    assert metadata["flags"].tolist() == [True, False]
    assert (metadata["wide"], metadata["small"]) == (2**63, -3)


def test_empty_shapes_and_an_alignment(path):
    keys = [u32("general.alignment", 64)]
    tensors = [tensor("none", (0,)), tensor("point", ()), tensor("four", (4,), 0, 64)]
    data = struct.pack("<f", 9) + bytes(60) + SIXTEEN
    _, arrays = take(path, file_of(keys, tensors, data, pad=64))
    assert arrays["none"].shape == (0,)
    assert arrays["point"] == 9
    assert arrays["four"].tolist() == [1, 2, 3, 4]


BAD = {  # rows 45 to 51 of reliability.md
    "magic": (file_of(magic=b"GGUX"), "begins with GGUF"),
    "version 0": (file_of(version=0), "version 3, found 0"),
    "version 1": (file_of(version=1), "version 3, found 1"),
    "version 4": (file_of(version=4), "version 3, found 4"),
    "type 99": (file_of((), [tensor("a", kind=99)], SIXTEEN), "found 99"),
    "type 999": (file_of((), [tensor("a", kind=999)], SIXTEEN), "found 999"),
    "Q5_0": (file_of((), [tensor("a", (32,), 6)], bytes(22)), "found Q5_0"),
    "key twice": (file_of([u32("a", 1), u32("a", 2)]), "distinct names of keys, found 'a'"),
    "tensor twice": (
        file_of((), [tensor("a"), tensor("a", offset=32)], bytes(48)), "'a' twice",
    ),
    "alignment 0": (file_of([u32("general.alignment", 0)]), "power of two"),
    "alignment 13": (file_of([u32("general.alignment", 13)]), "power of two"),
    "alignment i32": (
        file_of([text("general.alignment") + struct.pack("<Ii", 5, 32)]), "expected type 4",
    ),
    "rows of 8": (file_of((), [tensor("a", (8,), 2)], bytes(18)), "multiple of 32 for Q4_0"),
    "2^63 tensors": (file_of(counts=(1 << 63, 0)), "9223372036854775808 tensors"),
    "2^64 - 1 keys": (file_of(counts=(0, (1 << 64) - 1)), "18446744073709551615 keys"),
    "key length": (file_of([struct.pack("<Q", 1 << 40) + bytes(30)]), "name of a key"),
    "2^32 - 1 dimensions": (
        file_of((), [text("a") + struct.pack("<I", (1 << 32) - 1) + bytes(40)]), "dimensions",
    ),
    "text length": (
        file_of([text("a") + struct.pack("<IQ", 8, 1 << 40) + bytes(60)]), "more bytes",
    ),
    "array of 10^7": (
        file_of([text("a") + struct.pack("<IIQ", 9, 8, 10**7) + bytes(60)]), "texts",
    ),
    "array of 2^40": (
        file_of([text("a") + struct.pack("<IIQ", 9, 0, 1 << 40) + bytes(60)]), "more bytes",
    ),
    "array of arrays": (
        file_of([text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 2000]),
        "array of numbers or texts",
    ),
    "offset 2^64 - 32": (file_of((), [tensor("a", offset=(1 << 64) - 32)], SIXTEEN), "begin at 0"),
    "offset 7": (file_of((), [tensor("a", offset=7)], bytes(64)), "begin at 0, found 7"),
    "overlap": (file_of((), [tensor("a"), tensor("b")], bytes(64)), "begin at 32, found 0"),
    "hole": (file_of((), [tensor("a"), tensor("b", offset=64)], bytes(99)), "begin at 32"),
    "bytes after": (file_of((), [tensor("a")], SIXTEEN + bytes(60)), "bytes in all"),
    "bytes missing": (file_of((), [tensor("a")], SIXTEEN[:-1]), "bytes in all"),
    "five dimensions": (file_of((), [tensor("a", (1,) * 5)], SIXTEEN), "dimensions"),
    "empty key": (file_of([u32("", 1)]), "found ''"),
    "long name": (file_of((), [tensor("n" * 100_000)], SIXTEEN), "name"),
    "bool 7": (file_of([text("a") + struct.pack("<IB", 7, 7)]), "0 or 1, found 7"),
    "bool 2 in an array": (
        file_of([text("a") + struct.pack("<IIQ2B", 9, 7, 2, 0, 2)]), "0 or 1, found 2",
    ),
    "type 13": (file_of([text("a") + struct.pack("<IQ", 13, 0)]), "type 0..12, found 13"),
    "not UTF-8": (file_of([text("a") + struct.pack("<I", 8) + text(b"\xff")]), "utf-8"),
    "2^58 weights": (
        file_of((), [tensor("a", (1 << 33, 1 << 33))], SIXTEEN), "too large",
    ),
    "nothing": (b"", "magic"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_at_once(path, case):
    content, message = BAD[case]
    began = time.process_time()
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        take(path, content)
    assert time.process_time() - began < 0.1
    assert str(path) in str(caught.value)


def test_no_file_a_directory_and_a_pipe(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        gguf.read(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="not a regular file"):
        gguf.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        gguf.read(tmp_path / "pipe")


def test_a_value_that_is_not_finite(path):
    content = file_of((), [tensor("a")], struct.pack("<4f", 1, 2, float("nan"), 4))
    with pytest.raises(NumericsError, match=r"'a'.*nan"):
        take(path, content)
    assert np.isnan(take(path, content, allow_nonfinite=True)[1]["a"][2])


def test_what_cannot_be_written(path):
    with pytest.raises(FormatError, match="at most 4 dimensions, found float64"):
        gguf.write(path, {}, {"a": np.zeros(3)})
    with pytest.raises(FormatError, match="1 to 63 bytes"):
        gguf.write(path, {}, {"n" * 64: np.zeros(3, np.float32)})
    with pytest.raises(FormatError, match="expected text"):
        gguf.write(path, {}, {"\ud800": np.zeros(3, np.float32)})
    with pytest.raises(FormatError, match=r"at most 4 dimensions, found float32 \(1, 1, 1, 1, 1\)"):
        gguf.write(path, {}, {"a": np.zeros((1,) * 5, np.float32)})
    with pytest.raises(FormatError, match="expected text, bool, int or float"):
        gguf.write(path, {"a": [1]}, {})
    for key, value, message in (
        ("a", -1, "key 'a': -1: "), ("a", 1 << 32, "key 'a': 4294967296"), ("a", 1e39, "1e"),
        ("general.alignment", 64, "expected 32, found 64"),
        ("general.alignment", 32.0, "expected 32, found 32.0"), ("", 1, "names of keys, found ''"),
        ("a", "\ud800", "expected text"), ("\ud800", 1, "expected text"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=message):
            gguf.write(path, {key: value}, {"a": np.zeros(3, np.float32)})
    assert not path.exists()


def whole_file():
    """A file with every kind of value and of block, which damage is done to."""
    keys = [
        u32("general.alignment", 32),
        text("texts") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        text("flag") + struct.pack("<IB", 7, 1),
        text("name") + struct.pack("<I", 8) + text("some text"),
    ]
    tensors, data = [tensor("f", (2, 2))], bytes(16) + bytes(16)
    for name in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "BF16"):
        kind = TYPES[GOLDEN[name]["type"]]
        tensors.append(tensor(name, (kind.weights,), GOLDEN[name]["type"], len(data)))
        raw = bytes.fromhex(GOLDEN[name]["raw"])[: kind.bytes]
        data += raw + bytes(-len(raw) % 32)
    return file_of(keys, tensors, data)


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_files_raise_only_our_errors(path, count):
    content = whole_file()
    assert len(take(path, content)[1]) == 7
    head, rng = len(content) - 900, random.Random(count)

    def damaged():
        with refilled(path) as fill:
            for _ in range(count):
                fill(mutated(rng, content, head))
                yield

    accepted = only_our_errors(damaged(), lambda _: dict(gguf.read(path)), len(content))
    assert 0 < accepted < count


def test_truncated_anywhere(path):
    content = whole_file()
    for length in range(len(content) - 32):
        with pytest.raises(FormatError):
            take(path, content[:length])


# ------------------------------------------------------------------ against the gguf package


@pytest.mark.peers
@pytest.mark.parametrize("name", GOLDEN)
def test_a_thousand_blocks_are_those_of_the_gguf_package(name):
    package = pytest.importorskip("gguf")
    kind = TYPES[GOLDEN[name]["type"]]
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, 1000 * kind.bytes, np.uint8)
    with np.errstate(all="ignore"):
        theirs = package.quants.dequantize(raw, package.GGMLQuantizationType[name])
        ours = decode(raw, kind, (1000 * kind.weights,))
    theirs = theirs.astype(np.float32)
    both = np.isnan(ours) & np.isnan(theirs)
    assert (ours.view(np.uint32) == theirs.view(np.uint32))[~both].all()
    assert (np.isnan(ours) == np.isnan(theirs)).all()


@pytest.mark.peers
def test_the_gguf_package_reads_what_we_write(path):
    package = pytest.importorskip("gguf")
    array = np.random.default_rng(0).standard_normal((3, 5), dtype=np.float32)
    gguf.write(
        path, {"general.architecture": "llama", "alpha": 2.0}, {"a": array, "b": array.T.copy()}
    )
    reader = package.GGUFReader(path)
    assert [t.name for t in reader.tensors] == ["a", "b"]
    assert np.array_equal(reader.tensors[0].data.reshape(3, 5), array)
    assert reader.get_field("alpha").contents() == 2.0
