"""safetensors: every value comes back, every departure from the format is refused by name."""

import json
import os
import random
import re
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_files import only_our_errors, refilled

from minilora.engine.errors import (
    CheckpointError,
    FormatError,
    MiniloraError,
    MissingFileError,
    NumericsError,
)
from minilora.files import safetensors
from minilora.files.safetensors import DTYPES, encode, read, read_sharded, write


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file that every test may overwrite; one for the module, so that Hypothesis may use it."""
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def file_of(header, data=b"", length=None):
    """A hand-made file: `header` is a dict or the bytes themselves, `length` may lie."""
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def take(path, content, **options):
    """All tensors of a file with this content: header and data are both checked."""
    path.write_bytes(content)
    return dict(read(path, **options))


def one(text, data=b"\0" * 8):
    """A file whose only entry is written out, for what json.dumps would not write."""
    return file_of(b'{"a":' + text + b"}", data)


GOOD = entry()
EIGHT = b"\0" * 8

# row of the table in reference/reliability.md, section 2: what is wrong, the file, the message
REFUSED = [
    (1, "empty", b"", "header of 0 bytes in a file of 0"),
    (1, "7 bytes", b"\2\0\0\0\0\0\0", "in a file of 7"),
    (1, "N beyond the file", file_of({"a": GOOD}, EIGHT, length=1000), "header of 1000 bytes"),
    (1, "N = 2^63", file_of({"a": GOOD}, EIGHT, length=1 << 63), "header of 9223372036854775808"),
    (1, "N = 2^64 - 1", file_of({"a": GOOD}, EIGHT, length=(1 << 64) - 1), "header of 1844674407"),
    (1, "N > 10^8", file_of({"a": GOOD}, EIGHT, length=100_000_001), "header of 100000001"),
    (1, "N = 0", file_of(b""), "to begin with"),
    (2, "not UTF-8", file_of(b'{"\xff": 1}'), "utf-8"),
    (2, "overlong UTF-8", file_of(b'{"\xc0\x80": 1}'), "utf-8"),
    (2, "not JSON", file_of(b"{nothing}"), "line 1 column 2"),
    (2, "list", file_of(b"[]"), "begin with '{', found b'\\['"),
    (2, "BOM", file_of(b"\xef\xbb\xbf{}"), "to begin with"),
    (2, "NUL padding", file_of(b"{}\0\0\0\0\0\0"), "Extra data"),
    (2, "10^5 deep", file_of(b'{"a":' + b"[" * 100_000), "nested too deeply|Expecting"),
    (2, "10^5 deep, closed", one(b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    (2, "lone surrogate", file_of(b'{"\\ud800":' + json.dumps(GOOD).encode() + b"}", EIGHT), "su"),
    (3, "NaN", one(b"NaN"), "NaN is not JSON"),
    (3, "-Infinity", one(b'{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,8]}'), "Infinity"),
    (3, "1e400", one(b'{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}'), "whole numbers"),
    (3, "true", one(b'{"dtype":"U8","shape":[true],"data_offsets":[0,1]}', b"\0"), "whole numbers"),
    (3, "4.0", one(b'{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}'), "whole numbers"),
    (3, "-4", one(b'{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}'), "whole number below"),
    (3, "-0", one(b'{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}'), "whole number below"),
    (3, "2^70", one(b'{"dtype":"F32","shape":[1180591620717411303424],"data_offsets":[0,8]}'),
     "whole number below"),
    (3, "10^5 digits", one(b"9" * 100_000), "whole number below"),
    (4, "duplicate key", file_of(b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2), EIGHT),
     "duplicate key 'a'"),
    (4, "duplicate field", one(b'{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}'),
     "duplicate key 'dtype'"),
    (5, "unknown field", file_of({"a": entry(strides=[4])}, EIGHT), "expected dtype, shape, data"),
    (5, "missing field", one(b'{"dtype":"F32","shape":[2]}'), "expected dtype, shape, data"),
    (5, "entry is a list", one(b"[1]"), "expected dtype, shape, data"),
    (5, "metadata: a number", file_of({"__metadata__": {"step": 1}}), "__metadata__: expected str"),
    (5, "metadata: null", file_of(b'{"__metadata__":null}'), "__metadata__: expected str"),
    (6, "leading space", file_of(b"  " + json.dumps({"a": GOOD}).encode(), EIGHT), "to begin with"),
    (6, "leading newline", file_of(b"\n" + json.dumps({"a": GOOD}).encode(), EIGHT), "to begin"),
    (7, "overlap", file_of({"a": GOOD, "b": entry(begin=4, end=12)}, bytes(12)), "begin at 8"),
    (7, "alias", file_of({"a": GOOD, "b": GOOD}, EIGHT), "'b': expected to begin at 8, found 0"),
    (7, "hole", file_of({"a": GOOD, "b": entry(begin=12, end=20)}, bytes(20)), "begin at 8"),
    (7, "hole at the start", file_of({"a": entry(begin=4, end=12)}, bytes(12)), "begin at 0"),
    (7, "begin > end", file_of({"a": entry(begin=8, end=0)}, EIGHT), "expected 8 bytes"),
    (7, "truncated", file_of({"a": GOOD}, bytes(7)), "expected 8 bytes of data, found 7"),
    (7, "one byte more", file_of({"a": GOOD}, bytes(9)), "expected 8 bytes of data, found 9"),
    (7, "ZIP appended", file_of({"a": GOOD}, EIGHT + b"PK\5\6" + bytes(18)), "found 30"),
    (8, "shape too large", file_of({"a": entry(shape=[3])}, EIGHT), "expected 12 bytes"),
    (8, "shape too small", file_of({"a": entry(shape=[1])}, EIGHT), "expected 4 bytes"),
    (8, "product wraps to 0", file_of({"a": entry(shape=[2**33, 2**33], end=0)}), "too large"),
    (8, "2^40 floats", file_of({"a": entry(shape=[2**40])}, EIGHT), "expected 4398046511104 bytes"),
    (8, "three offsets", file_of({"a": {**GOOD, "data_offsets": [0, 8, 8]}}, EIGHT), "offsets"),
    (9, "[0, 2^63]", file_of({"a": entry(shape=[0, 2**63], end=0)}), "too large"),
    (9, "[0, 2^48]", file_of({"a": entry(shape=[0, 2**48], end=0)}), "too large"),
    (9, "[0, 2^47, 2^47]", file_of({"a": entry(shape=[0, 2**47, 2**47], end=0)}), "too large"),
    (9, "9 dims", file_of({"a": entry(shape=[1] * 8 + [2])}, EIGHT), "too many dimensions"),
    (9, "65 dims", file_of({"a": entry(shape=[1] * 64 + [2])}, EIGHT), "too many dimensions"),
    (10, "F8", file_of({"a": entry("F8_E4M3", [8])}, EIGHT), "unsupported dtype 'F8_E4M3'"),
    (10, "lower case", file_of({"a": entry("f32")}, EIGHT), "unsupported dtype 'f32'"),
    (10, "a number", file_of({"a": entry(32)}, EIGHT), "unsupported dtype 32"),
    (12, "boolean 2", file_of({"a": entry("BOOL", [3], 0, 3)}, b"\0\1\2"), "0 and 1, found 2"),
    (12, "NUL in a name", file_of({"../../x\0": GOOD}, EIGHT), "control characters"),
    (12, "newline in a name", file_of({"a\nb": GOOD}, EIGHT), "control characters"),
    (12, "C1 in a name", file_of({"a\x9b31m": GOOD}, EIGHT), "control characters"),
]  # fmt: skip


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(content, message, id=f"{row}: {what}")
        for row, what, content, message in REFUSED
    ],
)
def test_rows_1_to_12_are_refused(path, content, message):
    with pytest.raises(FormatError, match=message) as error:
        take(path, content)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < 600


def test_row_10_bfloat16_is_exact(path):
    bits = np.arange(65536, dtype="<u2")
    content = file_of({"a": entry("BF16", [256, 256], 0, 131072)}, bits.tobytes())
    got = take(path, content, allow_nonfinite=True)["a"]
    assert got.dtype == np.float32
    assert got.shape == (256, 256)
    assert np.array_equal(got.view(np.uint32).ravel(), bits.astype(np.uint32) << 16)
    # and by the definition of the format: sign, 8 bits of exponent, 7 bits of fraction
    sign, exponent, fraction = bits >> 15, (bits >> 7 & 255).astype(int), bits & 127
    value = np.where(exponent > 0, 1 + fraction / 128, fraction / 64)
    value = np.ldexp(np.where(sign, -value, value), exponent - 127)
    finite = exponent < 255
    assert np.array_equal(got.ravel()[finite], value[finite])
    assert not np.isfinite(got.ravel()[~finite]).any()


def test_row_10_a_single_bfloat16(path):
    got = take(path, file_of({"a": entry("BF16", [], 0, 2)}, b"\x80\x3f"))["a"]
    assert got.shape == ()
    assert got == 1.0


def test_row_11_unaligned_tensors_are_copied(path):
    values = np.array([1.5, -2.5], "<f4")
    header = {"a": entry("U8", [1], 0, 1), "b": entry(begin=1, end=9)}
    for spaces in range(9):  # a header whose length is no multiple of 8
        raw = json.dumps(header).encode() + b" " * spaces
        got = take(path, file_of(raw, b"\7" + values.tobytes()))
        assert np.array_equal(got["b"], values)
        assert got["b"].flags.aligned
        assert not got["b"].flags.writeable


def test_row_11_what_we_write_is_aligned(path):
    write(path, {name: np.ones(3, dtype) for name, dtype in DTYPES.items()})
    for name, entry in read(path).entries.items():
        assert entry.data.ctypes.data % DTYPES[name].itemsize == 0


def test_row_12_odd_names_are_only_names(path, tmp_path):
    for name in ("", ".", "../../x", "/etc/passwd", "ключ", "a" * 5000, "__metadata", "\u2028"):
        write(path, {name: np.zeros(2)})
        assert list(read(path)) == [name]
    assert not list(tmp_path.iterdir())


def test_row_13_too_many_tensors_are_refused_before_parsing(path, monkeypatch):
    monkeypatch.setattr(safetensors, "parse_json", lambda *_: pytest.fail("parsed"))
    entry = b',"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b'{"__metadata__":{}' + b"".join(entry % i for i in range(400_000)) + b"}"
    assert len(header) > 22_000_000
    with pytest.raises(FormatError, match="at most 200000 tensors, found 400000"):
        take(path, file_of(header))
    with pytest.raises(FormatError, match="header <= 33554432 bytes"):
        take(path, file_of(b"{}".ljust((32 << 20) + 1)))


def test_row_13_the_cap_can_be_lowered(path, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 2)
    write(path, {"a": np.ones(1), "b": np.ones(1)})
    with pytest.raises(FormatError, match="at most 2 tensors, found 3"):
        write(path, {"a": np.ones(1), "b": np.ones(1), "c": np.ones(1)})


def test_row_14_only_regular_files(tmp_path):
    with pytest.raises(FormatError, match="not a regular file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):  # and does not wait
        read(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        read("/dev/zero")
    with pytest.raises(MissingFileError, match="nowhere: no such file") as error:
        read(tmp_path / "nowhere")
    assert isinstance(error.value, FileNotFoundError)
    with pytest.raises(FormatError, match="null"):
        read(f"{tmp_path}/\0")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FormatError, match="cannot be read"):
        read(tmp_path / "loop")


def test_refusing_costs_no_memory(path):
    for _, _, content, _ in REFUSED:
        if len(content) <= 1024:
            path.write_bytes(content)
            tracemalloc.start()
            with pytest.raises(FormatError):
                dict(read(path))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 1 << 20


# Round trips


def bits_of(array):
    return array.tobytes(), array.shape, array.dtype


@st.composite
def arrays(draw):
    """Any dtype, 0 to 4 dimensions, sides from 0; the bits are arbitrary: NaN payloads too."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    return (data & 1 if dtype.kind == "b" else data).view(dtype).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)
states = st.dictionaries(names.filter("__metadata__".__ne__), arrays(), max_size=5)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
notes = st.dictionaries(text.filter(lambda key: not key.startswith("sha256.")), text, max_size=3)


@given(states, notes)
def test_every_bit_comes_back(path, state, metadata):
    write(path, state, metadata)
    content = path.read_bytes()
    back = read(path, allow_nonfinite=True)
    assert {name: bits_of(a) for name, a in back.items()} == {
        name: bits_of(a) for name, a in state.items()
    }
    assert back.metadata == metadata
    assert back.verified
    assert int.from_bytes(content[:8], "little") % 8 == 0
    # saved again while it is mapped, in another order: the same bytes
    write(path, dict(reversed(list(back.items()))), back.metadata)
    assert path.read_bytes() == content


@given(arrays())
def test_layout_in_memory_does_not_matter(array):
    expected = b"".join(encode({"a": array}))
    padded = np.empty([2 * n for n in array.shape], array.dtype)
    strided = padded[(..., *(slice(None, None, -2) for _ in array.shape))]
    strided[...] = array
    swapped = array.astype(array.dtype.newbyteorder(">"))
    for other in (strided, swapped, np.array(array, order="F")):
        assert b"".join(encode({"a": other})) == expected


@pytest.mark.parametrize("width", [16, 32, 64])
def test_extreme_floats_come_back(path, width):
    fraction = {16: 10, 32: 23, 64: 52}[width]
    infinity = ((1 << (width - 1 - fraction)) - 1) << fraction
    bits = [0, 1, (1 << fraction) - 1, 1 << fraction, infinity - 1, infinity, infinity + 1,
            infinity | 1 << (fraction - 1), infinity | ((1 << fraction) - 1)]  # fmt: skip
    bits += [b | 1 << (width - 1) for b in bits]  # -0, negative subnormals, negative NaN
    values = np.array(bits, f"<u{width // 8}").view(f"<f{width // 8}")
    write(path, {"a": values})
    assert bits_of(read(path, allow_nonfinite=True)["a"]) == bits_of(values)


def test_large_ranks_and_empty_files(path):
    write(path, {})
    assert dict(read(path)) == {}
    write(path, {"a": np.arange(6.0).reshape(1, 1, 2, 1, 1, 1, 3, 1), "b": np.zeros((0, 2**40))})
    assert read(path)["a"].ndim == 8
    assert read(path)["b"].shape == (0, 2**40)
    assert take(path, file_of({"a": entry(shape=[0, 2**48 - 1], end=0)}))["a"].size == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite(path, dtype, bad):
    values = np.zeros((3, 4), dtype)
    values[1, 2] = bad
    write(path, {"good": np.ones(3), "bad": values})
    tensors = read(path)
    assert tensors["good"].sum() == 3
    with pytest.raises(NumericsError, match=rf"{path}: tensor 'bad': .* found {bad} at \(1, 2\)"):
        tensors["bad"]
    assert bits_of(read(path, allow_nonfinite=True)["bad"]) == bits_of(values)


def test_bfloat16_that_is_not_finite(path):
    with pytest.raises(NumericsError, match=r"found nan at \(1,\)"):
        take(path, file_of({"a": entry("BF16", [2], 0, 4)}, b"\0\0\xc0\x7f"))


def test_tensors_are_decoded_when_asked_for(path):
    write(path, {"a": np.full(2, np.nan), "b": np.ones((2, 3), np.float16)}, {"format": "pt"})
    tensors = read(path)
    assert "a" in tensors
    assert "c" not in tensors
    assert len(tensors) == 2
    assert tensors.metadata == {"format": "pt"}
    assert [(e.dtype, e.shape) for e in tensors.entries.values()] == [
        ("F64", (2,)),
        ("F16", (2, 3)),
    ]
    with pytest.raises(KeyError):
        tensors["c"]
    with pytest.raises(ValueError, match="read-only"):
        tensors["b"][0] = 1


def test_a_mapped_file_may_be_replaced(path):
    write(path, {"a": np.arange(1000)})
    old = read(path)["a"]
    write(path, {"a": np.zeros(1)})
    assert np.array_equal(old, np.arange(1000))
    assert np.array_equal(read(path)["a"], [0])


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"a": np.zeros(2, complex)}, None, "'a': expected a NumPy array of .* complex128"),
        ({"a": np.array([{}])}, None, "object"),
        ({"a": np.zeros(2, "U3")}, None, "<U3"),
        ({"a": np.zeros(2, "i4,f4")}, None, "found"),
        ({"a": np.zeros(2, "M8[s]")}, None, "datetime64"),
        ({"a": [1.0]}, None, "list"),
        ({"a": 1.0}, None, "float"),
        ({"a": np.float32(1)}, None, "numpy.float32"),
        ({1: np.zeros(2)}, None, "tensor 1: not a name"),
        ({"__metadata__": np.zeros(2)}, None, "not a name"),
        ({"a\0": np.zeros(2)}, None, "control characters"),
        ({"\ud800": np.zeros(2)}, None, "utf-8"),
        ({"a": np.zeros((1,) * 9)}, None, "too many dimensions"),
        ({}, {"step": 1}, "metadata 'step': expected text"),
        ({}, {1: "step"}, "metadata 1: expected text"),
        ({}, {"sha256.a": "0"}, r"no key sha256\.\*"),
        ({}, {"note": "\udfff"}, "utf-8"),
    ],
)
def test_the_writer_refuses_what_the_reader_would(path, tensors, metadata, message):
    write(path, {"before": np.ones(1)})
    with pytest.raises(FormatError, match=message):
        write(path, tensors, metadata)
    assert list(read(path)) == ["before"]


def test_a_failed_write_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        write(tmp_path / "nowhere" / "a.safetensors", {"a": np.ones(1)})


# Digests


def own_file():
    rng = np.random.default_rng(0)
    return {
        "lora_A": rng.standard_normal((2, 4)).astype(np.float32),
        "step": np.array(7),
        "none": np.zeros((0, 3), np.float32),
    }


def test_a_flipped_bit_never_changes_a_tensor_unnoticed(path):
    state = own_file()
    write(path, state, {"format": "pt"})
    content = path.read_bytes()
    expected = {name: bits_of(a) for name, a in state.items()}
    start = 8 + int.from_bytes(content[:8], "little")
    noticed = 0
    with open(path, "r+b", buffering=0) as file:
        for at, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                try:
                    got = {name: bits_of(a) for name, a in read(path).items()}
                except MiniloraError:
                    noticed += 1
                else:
                    assert at < start, "every flip in the data is noticed"
                    assert got == expected, "what is accepted is what was written"
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert noticed > 0.9 * 8 * len(content)


@pytest.mark.parametrize("old, new", [(b'"F32"', b'"I32"'), (b"[2,4]", b"[4,2]")])
def test_a_digest_covers_dtype_and_shape(path, old, new):
    content = b"".join(encode({"a": np.ones((2, 4), np.float32)}))
    with pytest.raises(FormatError, match="do not match their sha256"):
        take(path, content.replace(old, new))


def test_digests_can_be_left_alone(path):
    content = bytearray(b"".join(encode({"a": np.ones(3)})))
    content[-1] ^= 1
    with pytest.raises(FormatError, match=r"'a': the data do not match their sha256"):
        take(path, bytes(content))
    path.write_bytes(content)
    assert read(path, verify=False)["a"].shape == (3,)
    assert not read(path, verify=False).verified


def test_a_file_without_digests_is_taken_and_says_so(path):
    assert take(path, file_of({"a": GOOD}, EIGHT))["a"].tolist() == [0, 0]
    assert not read(path).verified


def test_digests_for_some_tensors_only_are_refused(path):
    header = {"__metadata__": {"sha256.a": "0" * 64}, "a": GOOD, "b": entry(begin=8, end=16)}
    with pytest.raises(FormatError, match="one sha256 per tensor, found otherwise for 'b'"):
        take(path, file_of(header, bytes(16)))


# Damage at random


def small_files():
    """Two tensors by hand, as in section 6, and a file of our own with digests."""
    header = {"a": entry(), "b": entry("U8", [3], 8, 11)}
    return file_of(header, bytes(11)), b"".join(encode(own_file(), {"format": "pt"}))


LENGTHS = [0, 1, 255, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]


def mutate(rng, content):
    """1, 2 or 4 edits that know where the header is."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 2, 4])):
        length = int.from_bytes(content[:8], "little")
        end = min(len(content), 8 + length)
        if end <= 8:
            break
        size, at, kind = len(content), rng.randrange(8, end), rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.randrange(256)
        elif kind == 2:
            del content[at : at + rng.randrange(1, 5)]
        elif kind == 3:
            content[at:at] = bytes(rng.choices(b'{}[]:,"0123456789-.eE \\u', k=rng.randrange(1, 4)))
        elif kind == 4 and rng.random() < 0.3:
            content[:8] = struct.pack("<Q", rng.choice(LENGTHS))
        elif kind == 5 and rng.random() < 0.3:
            del content[rng.randrange(size) :]
        if kind in (2, 3) and rng.random() < 0.8:  # most often, the length stays right
            content[:8] = struct.pack("<Q", (length + len(content) - size) % (1 << 64))
    return bytes(content)


def mutants(path, count, seed):
    """`count` damaged files, each in turn under `path`."""
    rng, files = random.Random(seed), small_files()
    with refilled(path) as fill:
        for i in range(count):
            content = mutate(rng, files[i % len(files)])
            fill(content)
            yield content


COUNTS = pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])


@COUNTS
def test_damaged_files_raise_only_our_errors(path, count):
    size = max(map(len, small_files()))
    cases = mutants(path, count, seed=count)
    accepted = only_our_errors(cases, lambda _: dict(read(path)), size)
    assert 0 < accepted < count / 2


def test_truncated_anywhere(path):
    for content in small_files():
        for length in range(len(content)):
            with pytest.raises(FormatError):
                take(path, content[:length])


# Checkpoints of several files


def shards(directory, weight_map=None, index=None):
    """Three tensors in two files, and their index, or another one."""
    write(directory / "model-1.safetensors", {"a": np.ones(2), "b": np.zeros(1)}, {"format": "pt"})
    write(directory / "model-2.safetensors", {"c": np.full(3, np.nan)}, {"format": "pt"})
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    index = index or json.dumps(
        {"metadata": {"total_size": 48.0}, "weight_map": {**places, **(weight_map or {})}}
    )
    (directory / "model.safetensors.index.json").write_text(index)


def test_shards_read_as_one(tmp_path):
    shards(tmp_path)
    tensors = read_sharded(tmp_path)
    assert sorted(tensors) == ["a", "b", "c"]
    assert tensors.verified
    assert tensors.metadata == {"format": "pt"}
    assert tensors["a"].tolist() == [1, 1]
    with pytest.raises(NumericsError, match=r"model-2\.safetensors: tensor 'c'"):
        tensors["c"]
    assert np.isnan(read_sharded(tmp_path, allow_nonfinite=True)["c"]).all()
    assert not read_sharded(str(tmp_path), verify=False).verified


def test_a_directory_without_an_index_has_one_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"model\.safetensors: no such file"):
        read_sharded(tmp_path)
    write(tmp_path / "model.safetensors", {"a": np.ones(2)})
    assert list(read_sharded(tmp_path)) == ["a"]


def test_a_large_index_is_not_parsed(tmp_path, monkeypatch):
    shards(tmp_path)
    monkeypatch.setattr(safetensors, "MAX_HEADER", 100)
    with pytest.raises(FormatError, match="expected at most 100 bytes"):
        read_sharded(tmp_path)


@pytest.mark.parametrize(
    "weight_map, index, message",
    [
        ({"d": "model-2.safetensors"}, None, "index and model-2.safetensors disagree about 'd'"),
        ({"b": "model-2.safetensors"}, None, "index and model-1.safetensors disagree about 'b'"),
        ({"d": "model-3.safetensors"}, None, "model-3.safetensors: no such file"),
        ({"d": "../model.safetensors"}, None, "expected weight_map {name: file}"),
        ({"d": "/etc/model.safetensors"}, None, "expected weight_map"),
        ({"d": "model.bin"}, None, "expected weight_map"),
        ({"d": ["model-1.safetensors"]}, None, "expected weight_map"),
        ({"d": 1}, None, "expected weight_map"),
        (None, "[]", "expected weight_map"),
        (None, "{}", "expected weight_map"),
        (None, '{"weight_map": []}', "expected weight_map"),
        (None, '{"weight_map": {}, "weight_map": {}}', "duplicate key 'weight_map'"),
        (None, '{"weight_map": NaN}', "NaN is not JSON"),
        (None, "nothing", "line 1 column 1"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, weight_map, index, message):
    shards(tmp_path, weight_map, index)
    with pytest.raises(FormatError, match=re.escape(message)):
        read_sharded(tmp_path)


# The reference implementation


STRICTER = (  # the only grounds on which we refuse what the library takes
    "duplicate key", "expected dtype, shape, data_offsets", "begin with", "too many dimensions",
    "control characters", "found 2", "sha256", "found nan", "found inf", "expected 0 and 1",
    "__metadata__: expected", "unsupported dtype", "surrogate", "nested too deeply",
)  # fmt: skip


def theirs(content):
    """name -> (dtype, shape, bytes) as the library sees it, or None where it refuses."""
    library = pytest.importorskip("safetensors")
    try:
        found = library.deserialize(content)
    except library.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def ours(path):
    """The same for us, or the message with which we refuse."""
    try:
        tensors = read(path)
        dict(tensors)
    except MiniloraError as error:
        return str(error)
    return {name: (e.dtype, e.shape, e.data.tobytes()) for name, e in tensors.entries.items()}


def compare(path, content):
    us, them = ours(path), theirs(content)
    if isinstance(us, dict):
        assert us == them, "what we accept, the library accepts, and reads alike"
    elif them is not None:
        assert any(reason in us for reason in STRICTER), us


@pytest.mark.peers
@COUNTS
def test_peers_damaged_files(path, count):
    for content in mutants(path, count, seed=count + 1):
        compare(path, content)


@pytest.mark.peers
def test_peers_the_table(path):
    for _, _, content, _ in REFUSED:
        path.write_bytes(content)
        compare(path, content)


@pytest.mark.peers
@given(states)
def test_peers_read_what_we_write(path, state):
    content = b"".join(encode(state))
    found = theirs(content)
    assert found is not None
    assert {name: (DTYPES[dtype], shape, data) for name, (dtype, shape, data) in found.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in state.items()
    }


@pytest.mark.peers
@given(states)
def test_peers_we_read_what_they_write(path, state):
    library = pytest.importorskip("safetensors.numpy")
    library.save_file(state, path, {"format": "np"})
    tensors = read(path, allow_nonfinite=True)
    assert {n: bits_of(a) for n, a in tensors.items()} == {n: bits_of(a) for n, a in state.items()}
    assert tensors.metadata == {"format": "np"}


@pytest.mark.peers
def test_peers_torch_bfloat16(path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    tensor = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    library.save_file({"a": tensor.reshape(2, -1)}, path)
    got = read(path, allow_nonfinite=True)["a"]
    expected = tensor.reshape(2, -1).float().numpy()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
