"""Byte-level BPE: the same ids as the reference, every text back, every odd file refused."""

import itertools
import json
import random
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_files import (
    ODD,
    TEXT,
    misshapen,
    mutated,
    only_our_errors,
    refilled,
    tokenizer_of,
)

from minilora.engine.errors import FormatError, MiniloraError, MissingFileError
from minilora.files.bpe import ALPHABET, BYTE, learn_merges, merge_word, spell
from minilora.files.chat import CHATML, SYSTEMS, chatml, expect_known, render
from minilora.files.split import SPLITS
from minilora.files.tokenizer import Tokenizer, train_tokenizer
from minilora.files.tokenizer_files import read_tokenizer, tokenizer_from_gguf, tokenizer_json

GOLDEN = json.loads((Path(__file__).parent / "golden_tokens.json").read_text())
COUNTS = pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
MADE = {split: tokenizer_of(split=split) for split in SPLITS}


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads texts")


# ------------------------------------------------------------------ the rules


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_cut_where_the_reference_cuts_them(split):
    for text, words in zip(GOLDEN["texts"], GOLDEN["words"][split], strict=True):
        if split == "qwen2":
            text = unicodedata.normalize("NFC", text)
        assert [spell(word) for word in SPLITS[split](text)] == words


@given(st.text(max_size=60))
@pytest.mark.parametrize("split", SPLITS)
def test_a_split_loses_nothing(split, text):
    assert "".join(SPLITS[split](text)) == text


def naive_merge(word, ranks):
    """The definition: again and again the pair of lowest rank, of equals the leftmost."""
    parts = list(word)
    while True:
        pairs = [(ranks[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(st.data())
def test_merging_with_a_heap_is_merging_by_definition(data):
    tokens, ranks = list("abc"), {}
    for rank in range(data.draw(st.integers(0, 12))):
        pair = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        if pair not in ranks:
            ranks[pair] = rank
            tokens.append("".join(pair))
    word = data.draw(st.text("abc", max_size=40))
    assert merge_word(word, ranks) == naive_merge(word, ranks)


def test_merging_a_long_word_takes_no_square_of_its_length():
    ranks = {("a", "a"): 0, ("aa", "aa"): 1}
    began = time.process_time()
    assert len(merge_word("a" * 200_000, ranks)) == 50_000
    assert time.process_time() - began < 5


@given(st.text(max_size=80))
@pytest.mark.parametrize("split", SPLITS)
def test_every_text_comes_back(split, text):
    tokenizer = MADE[split]
    back = tokenizer.decode(tokenizer.encode(text, special=False))
    assert back == (unicodedata.normalize("NFC", text) if tokenizer.nfc else text)


def test_the_alphabet_is_all_bytes_each_once():
    assert len(set(ALPHABET)) == 256
    assert [BYTE[c] for c in ALPHABET] == list(range(256))
    assert spell(" \n") == "ĠĊ"


def test_training_joins_what_is_frequent():
    merges = learn_merges({"abab": 3, "abc": 2, "zz": 1}, 3)
    assert merges == [("a", "b"), ("ab", "ab"), ("ab", "c")]  # 8, then 3, then 2 times; zz once
    assert learn_merges({"zz": 1}, 5) == []
    tokenizer = tokenizer_of()
    assert len(tokenizer) == 320
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    assert train_tokenizer(TEXT, 300).merges == train_tokenizer(TEXT, 300).merges


def test_a_split_that_is_not_known_is_told():
    with pytest.raises(MiniloraError, match=r"split: expected one of .*; found 'words'"):
        train_tokenizer(TEXT, 300, "words")


def test_special_tokens_are_cut_out_the_longest_first():
    made = train_tokenizer("", 260, special=("<a>", "<a><b>", "<|end|>"))
    assert made.encode("<a><b><a>") == [1, 0]
    assert made.encode("x<|end|>")[-1] == 2
    assert made.encode("<a>", special=False) != [0]
    assert made.decode([1, *made.encode("x"), 2]) == "x"
    assert made.decode([1, *made.encode("x"), 2], control=True) == "<a><b>x<|end|>"


def test_a_byte_without_a_token_is_left_out():
    made = train_tokenizer("", 257)
    tokens = [t for t in made.tokens if t != spell("x")]
    poor = Tokenizer(tokens, (), "gpt2", made.special)
    assert poor.decode(poor.encode("axb")) == "ab"


def test_a_token_that_spells_no_bytes_is_its_own_text():
    made = train_tokenizer("", 257)
    odd = Tokenizer([*made.tokens, "日a"], (), "gpt2", made.special)
    assert odd.decode([odd.ids["a"], 257]) == "a日a"  # as the reference's decoder has it


def test_a_stream_never_cuts_a_character():
    tokenizer = tokenizer_of()
    text = "naïve 日本 👩‍👧 end"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert stream.end() == ""
    stream.push(tokenizer.encode("日")[0])
    assert stream.end() == "�"


def test_bad_texts_ids_and_sizes():
    tokenizer = tokenizer_of()
    with pytest.raises(MiniloraError, match="expected Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(MiniloraError, match=r"expected 0\.\.319, found 320"):
        tokenizer.decode([320])
    with pytest.raises(MiniloraError, match="at least 257 tokens, found 256"):
        train_tokenizer("", 256)
    with pytest.raises(FormatError, match="a merge of no tokens"):
        Tokenizer(["a", "b"], [("a", "b")], "gpt2")
    with pytest.raises(FormatError, match="distinct tokens"):
        Tokenizer(["a", "a"], [], "gpt2")
    with pytest.raises(FormatError, match="expected a split"):
        Tokenizer(["a"], [], "words")


# ------------------------------------------------------------------ conversations

TALK = [{"role": "user", "content": "Hi <|im_end|> you"}, {"role": "assistant", "content": "Yes."}]


def test_a_conversation_is_the_text_of_its_template():
    text = render(CHATML, TALK, reply=False)
    assert text == (
        "<|im_start|>user\nHi <|im_end|> you<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    system = render(chatml("You are a helpful assistant."), TALK[:1])
    assert system.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert system.endswith("<|im_start|>assistant\n")


def test_what_a_user_writes_is_never_control():
    tokenizer = tokenizer_of()
    end = tokenizer.special["<|im_end|>"]
    ids = tokenizer.chat(TALK, reply=False)
    assert ids.count(end) == 2  # the ends of two turns, not the text in the first
    assert tokenizer.decode(ids, control=True) == render(CHATML, TALK, reply=False)


def test_the_assistant_is_scored_with_its_end_of_turn():
    tokenizer = tokenizer_of()
    said = [tokenizer.decode(ids, control=True)
            for ids, scored in tokenizer.chat_parts(TALK, reply=False) if scored]  # fmt: skip
    assert said == ["Yes.", "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "no chat template"),
        ("{{ messages }}", TALK, "not one of the known ones"),
        (CHATML, [], "at least one"),
        (CHATML, [{"role": "robot", "content": "x"}], "role: one of system, user, assistant"),
        (CHATML, [{"role": "user"}], "found .* at 0"),
        (CHATML, ["hello"], "at 0"),
    ],
)
def test_conversations_that_are_refused(template, messages, message):
    with pytest.raises(MiniloraError, match=message):
        render(template, messages)


@pytest.mark.peers
@pytest.mark.parametrize("system", list(SYSTEMS.values()))
def test_the_templates_are_what_jinja_makes_of_them(system):
    jinja2 = pytest.importorskip("jinja2")
    template = chatml(system)
    for messages in (TALK, TALK[:1], [{"role": "system", "content": "Be brief."}, *TALK]):
        for reply in (False, True):
            text = jinja2.Environment().from_string(template).render(
                messages=messages, add_generation_prompt=reply
            )  # fmt: skip
            assert render(template, messages, reply) == text


# ------------------------------------------------------------------ files


def written(folder, tokenizer, **changes):
    content = json.loads(tokenizer_json(tokenizer))
    for place, value in changes.items():
        *parents, last = place.split("__")
        inner = content
        for name in parents:
            inner = inner[name]
        inner[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("split", SPLITS)
def test_a_tokenizer_written_is_the_one_read(tmp_path, split):
    made = MADE[split]
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    back = read_tokenizer(written(tmp_path, made))
    for name in ("tokens", "merges", "split", "special", "control", "stop", "nfc", "whole_words",
                 "chat_template"):  # fmt: skip
        assert getattr(back, name) == getattr(made, name), name


START = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
               {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["x"]}},
}  # fmt: skip


def with_late_tokens(folder, split):
    """One added token that is looked for in the text as it is, and two in its normal form."""
    content = json.loads(tokenizer_json(MADE[split]))
    kept = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"] += [
        kept | {"id": 320 + i, "content": text, "normalized": i > 0}
        for i, text in enumerate(("bc", "abcd", "vi\u1ec7t"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return read_tokenizer(folder)


@pytest.mark.parametrize("split", ["gpt2", "qwen2"])
def test_normalized_tokens_are_looked_for_after_the_others(tmp_path, split):
    ours = with_late_tokens(tmp_path, split)
    plain = ours.encode_plain
    assert ours.encode("abcd") == [*plain("a"), 320, *plain("d")]
    assert ours.encode("vi\u1ec7t") == [322]
    apart = "vie\u0302\u0323t"  # the same word in other characters, one to Unicode's form NFC
    assert ours.encode(apart) == ([322] if ours.nfc else plain(apart))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(ours))
    assert read_tokenizer(tmp_path).late == {321, 322}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__type": "Unigram"}, "byte-level BPE"),
        ({"model__byte_fallback": True}, "byte-level BPE"),
        ({"model__vocab": []}, "vocab: expected dict"),
        ({"model__vocab": {"a": 0, "b": 2}}, "expected id 1"),
        ({"model__vocab": {"a": "0"}}, "whole numbers"),
        ({"model__merges": [["a"]]}, "two tokens"),
        ({"model__merges": [["a", "zzz"]]}, "a merge of no tokens"),
        ({"model__merges": "a b"}, "merges: expected list"),
        ({"model__unk_token": "<|endoftext|>", "model__vocab": {"a": 0}}, "unk_token"),
        ({"model__end_of_word_suffix": "</w>"}, "end_of_word_suffix is not done here"),
        ({"normalizer": {"type": "Lowercase"}}, "expected none or NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer: expected that of"),
        ({"post_processor": {"type": "BertProcessing"}}, "is not done here"),
        ({"post_processor": [1]}, "is not done here"),
        ({"added_tokens": [{"content": "a", "id": 0}]}, "two ids"),
        ({"added_tokens": [{"content": "a"}]}, "expected an id, found None"),
        ({"added_tokens": [{"content": "<x>", "id": [1]}]}, "expected an id"),
        ({"added_tokens": 5}, "added_tokens: expected list"),
        ({"added_tokens": [{"content": "", "id": 320}]}, "expected content and id"),
        ({"post_processor": {"type": "TemplateProcessing", "single": {"a": 1}}}, "not done here"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": 3}, {"Sequence": {}}],
                }
            },
            "not done here",
        ),
        (
            {"post_processor": START | {"special_tokens": {"<|im_start|>": {"ids": [5]}}}},
            "not done here",
        ),
        ({"post_processor": START | {"special_tokens": {}}}, "not done here"),
        ({"added_tokens": [1]}, "expected content and id"),
        ({"added_tokens": [{"content": "<x>", "id": 320, "lstrip": True}]}, "stripping"),
        ({"model": 3}, "model: expected dict"),
    ],
)
def test_what_a_tokenizer_file_may_not_ask_for(tmp_path, changes, message):
    with pytest.raises(FormatError, match=message):
        read_tokenizer(written(tmp_path, tokenizer_of(), **changes))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("odd", [-1, 320, [7, 10**40]])
def test_an_end_that_is_no_token(tmp_path, name, odd):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": odd}))
    with pytest.raises(FormatError, match="eos_token_id: expected ids below 320, found"):
        read_tokenizer(written(tmp_path, tokenizer_of()))


def test_no_tokenizer_and_no_json(tmp_path):
    with pytest.raises(MissingFileError):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(FormatError, match="expected an object"):
        read_tokenizer(tmp_path)


@COUNTS
def test_damaged_tokenizers_raise_only_our_errors(tmp_path, count):
    tokenizer = train_tokenizer("ab ab ab", 258)
    content = tokenizer_json(tokenizer)
    path, rng = tmp_path / "tokenizer.json", random.Random(count)
    with refilled(path) as fill:
        cases = (fill(mutated(rng, content, len(content))) for _ in range(count))
        accepted = only_our_errors(cases, lambda _: read_tokenizer(tmp_path), len(content))
    assert 0 < accepted < count


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_misshapen_tokenizers_raise_only_our_errors(tmp_path, count):
    """Valid JSON with values of other kinds, in both files, used once where it is taken."""
    content = json.loads(tokenizer_json(train_tokenizer("ab ab ab", 258)))
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [{"type": "ByteLevel"}, {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}],
        }],
    }  # fmt: skip
    vocab = content["model"].pop("vocab")  # most damage is to be done elsewhere
    settings = {"chat_template": CHATML, "eos_token": {"content": "<|endoftext|>"}}
    names, rng = ("tokenizer.json", "tokenizer_config.json"), random.Random(count)

    def cases(*fills):
        for _ in range(count):
            damaged = misshapen(rng, {names[0]: content, names[1]: settings})
            main = damaged.get(names[0])
            if isinstance(main, dict) and isinstance(main.get("model"), dict):
                main["model"].setdefault("vocab", vocab)
            for name, fill in zip(names, fills, strict=True):
                fill(json.dumps(damaged.get(name)).encode())
            yield

    def use(_):
        tokenizer = read_tokenizer(tmp_path)
        tokenizer.encode("ab é")
        tokenizer.decode(range(len(tokenizer)), control=True)

    with refilled(tmp_path / names[0]) as main, refilled(tmp_path / names[1]) as other:
        accepted = only_our_errors(cases(main, other), use, 20_000)
    assert 0 < accepted < count


def metadata(**changes):
    tokens = ["<end>", "a", "b", "ab"]
    base = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["a b"],
            "token_type": np.array([3, 1, 1, 1]), "eos_token_id": 0, "bos_token_id": 0}  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in (base | changes).items() if v is not None}


def test_a_tokenizer_in_a_gguf_file():
    tokenizer = tokenizer_from_gguf(metadata(), "file")
    assert tokenizer.encode("ab<end>ba") == [3, 0, 2, 1]
    assert (tokenizer.stop, tokenizer.start, tokenizer.control) == ((0,), (), frozenset({0}))
    assert tokenizer_from_gguf(metadata(add_bos_token=True), "file").encode("a") == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "byte-level BPE"),
        ({"pre": "falcon"}, "split as"),
        ({"tokens": None}, "tokens, their types and merges"),
        ({"merges": None}, "tokens, their types and merges"),
        ({"token_type": np.array([1])}, "tokens, their types and merges"),
        ({"token_type": np.array([3, 1, 1, 1.5])}, "tokens, their types and merges"),
        ({"token_type": ["a", "b", "c", "d"]}, "token_type: expected ndarray"),
        ({"token_type": 3}, "token_type: expected ndarray"),
        ({"eos_token_id": 4}, "ids below 4, found 4"),
        ({"eos_token_id": "0"}, "eos_token_id: expected int"),
        ({"add_space_prefix": True}, "add_space_prefix"),
        ({"merges": ["ab"]}, "two tokens"),
    ],
)
def test_what_gguf_metadata_may_not_ask_for(changes, message):
    with pytest.raises(FormatError, match=message):
        tokenizer_from_gguf(metadata(**changes), "file")


@COUNTS
def test_misshapen_metadata_raises_only_our_errors(count):
    rng = random.Random(count)
    odd = [value for value in ODD if not isinstance(value, dict | None)] + [
        ["a b"], np.array([3, 1, 1, 1]), np.array([3, 1, np.nan, 1]), np.array([True] * 4),
    ]  # fmt: skip
    whole = metadata(add_bos_token=True, add_space_prefix=False)
    whole["tokenizer.chat_template"] = CHATML

    def cases():
        for _ in range(count):
            changed = {rng.choice(list(whole)): rng.choice(odd) for _ in range(rng.choice([1, 2]))}
            yield whole | changed

    def use(values):
        tokenizer = tokenizer_from_gguf(values, "file")
        tokenizer.encode("ab<end>ba")
        expect_known(tokenizer.chat_template)

    assert 0 < only_our_errors(cases(), use, 1_000) < count


# ------------------------------------------------------------------ against the tokenizers package


def unicode_texts():
    """Every code point that Python names, in lines between letters, spaces and digits."""
    points = [chr(p) for p in range(sys.maxunicode + 1) if unicodedata.category(chr(p)) != "Cs"]
    known = [c for c in points if unicodedata.category(c) != "Cn"]
    for start in range(0, len(known), 400):
        part = known[start : start + 400]
        yield "".join(part)
        yield " ".join(part)
        yield "".join(f"a{c}1 {c}{c}\n" for c in part)


@pytest.mark.peers
@pytest.mark.parametrize("split", SPLITS)
def test_ids_are_those_of_the_tokenizers_package_on_every_character(split):
    package = pytest.importorskip("tokenizers")
    ours = MADE[split]
    theirs = package.Tokenizer.from_str(tokenizer_json(ours).decode())
    passed_over = 0
    for text in [*unicode_texts(), *GOLDEN["texts"], TEXT]:
        if split == "qwen2":  # whose normal form depends on the Unicode version of the library
            text = unicodedata.normalize("NFC", text)
            if theirs.normalizer.normalize_str(text) != text:
                passed_over += 1
                continue
        assert ours.encode(text) == theirs.encode(text).ids
    assert passed_over <= 3


@pytest.mark.peers
@pytest.mark.parametrize("split", SPLITS)
def test_ids_around_added_tokens_are_those_of_the_tokenizers_package(tmp_path, split):
    package = pytest.importorskip("tokenizers")
    ours = with_late_tokens(tmp_path, split)
    theirs = package.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    parts = ["a", "b", "bc", "bcd", "abcd", "vi\u1ec7t", "vie\u0302\u0323t", "\u0301", "e", " "]
    for text in map("".join, itertools.product(parts, repeat=4)):
        assert ours.encode(text) == theirs.encode(text).ids, text
