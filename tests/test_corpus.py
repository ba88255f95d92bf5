"""A reader's own file as sequences: what is scored, cut, left out and counted."""

import json
import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_files import tokenizer_of

from minilora.engine.errors import FormatError, MiniloraError, MissingFileError
from minilora.engine.loss import IGNORE
from minilora.train.corpus import SHIPPED, Sequences, read_corpus

TOKENIZER = tokenizer_of()
(END,) = TOKENIZER.stop


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


def written(folder, lines, name="data.jsonl"):
    raw = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(raw + "\n")
    return folder / name


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}  # fmt: skip


def rows(corpus):
    """(ids, targets) of every example, padding left out."""
    for part in (corpus.train, corpus.held_out):
        yield from zip(part.arrays["ids"], part.arrays["targets"], strict=True)


def scored_text(targets):
    return TOKENIZER.decode(targets[targets != IGNORE].tolist(), control=True)


def test_only_what_the_assistant_said_is_scored(folder):
    pairs = [("Who are you?", "I am Rosie."), ("And you?", "Nobody."), ("Why?", "Because.")]
    corpus = read_corpus(written(folder, [talk(*p) for p in pairs]), TOKENIZER, 64)
    assert sorted(scored_text(t) for _, t in rows(corpus)) == sorted(
        f"{answer}<|im_end|>" for _, answer in pairs
    )
    assert (len(corpus.train), len(corpus.held_out)) == (2, 1)
    assert (corpus.kind, corpus.counts["examples"]) == ("messages", 3)
    assert corpus.counts["scored"] == sum(len(TOKENIZER.encode(a)) + 1 for _, a in pairs)


def test_only_completions_are_scored(folder):
    lines = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}."} for i in range(4)]
    corpus = read_corpus(written(folder, lines), TOKENIZER, 64)
    assert sorted(scored_text(t) for _, t in rows(corpus)) == [
        f" {i + 1}.<|im_end|>" for i in range(4)
    ]
    assert corpus.kind == "prompt and completion"


def test_each_target_is_the_next_token(folder):
    corpus = read_corpus(written(folder, [talk("a b", "c d"), talk("e", "f g h")]), TOKENIZER, 64)
    for ids, targets in rows(corpus):
        places = np.flatnonzero(targets[:-1] != IGNORE)
        inside = places[places + 1 < np.flatnonzero(targets != IGNORE)[-1] + 1]
        assert (targets[inside] == ids[inside + 1]).all()


@given(st.text(st.characters(codec="utf-8"), min_size=30, max_size=300), st.integers(2, 20))
def test_a_text_is_cut_into_windows_that_lose_nothing(folder, text, length):
    (folder / "data.txt").write_bytes(text.encode())
    stream = [*TOKENIZER.encode(text, special=False), END]
    corpus = read_corpus(folder / "data.txt", TOKENIZER, length)
    parts = [(ids[: n + 1], targets[:n]) for ids, targets in rows(corpus)
             for n in [int((targets != IGNORE).sum())]]  # fmt: skip
    assert [stream[0], *(t for _, targets in parts for t in targets)] == stream
    assert all(len(targets) <= length for _, targets in parts)
    assert corpus.counts["tokens"] >= len(stream)
    assert corpus.counts["scored"] == len(stream) - 1


def test_what_became_of_the_file_is_counted(folder):
    lines = [talk("x", "y" * 200), talk("x" * 200, "y"), talk("a", "b"), talk("c", "d")]
    corpus = read_corpus(written(folder, lines), TOKENIZER, 32)
    assert corpus.counts["cut"] == 2
    assert corpus.counts["dropped"] == 1
    assert corpus.counts["examples"] == 3
    told = corpus.described()
    assert "2 cut to the longest length" in told
    assert "1 left out, with nothing to score" in told
    assert "2 to train on, 1 held out" in told


def test_a_batch_is_as_long_as_its_longest_row(folder):
    lines = [talk("a", "b"), talk("c", "d " * 9), talk("e", "f"), talk("g", "h")]
    train = read_corpus(written(folder, lines), TOKENIZER, 64).train
    lengths = [train.take(slice(i, i + 1))[0]["ids"].shape[1] for i in range(len(train))]
    assert train.take(slice(0, 3))[0]["ids"].shape[1] == max(lengths)
    assert len(set(lengths)) > 1
    batch, scored = train.take(slice(0, 3))
    assert scored == (batch["targets"] != IGNORE).sum() == train.scored.sum()


def test_some_rows_spread_evenly(folder):
    (folder / "data.txt").write_text("a b c d e f g h " * 40)
    train = read_corpus(folder / "data.txt", TOKENIZER, 8).train
    some = train.spread(5)
    assert len(some) == 5
    assert np.array_equal(some.arrays["ids"][0], train.arrays["ids"][0])
    assert np.array_equal(some.arrays["ids"][-1], train.arrays["ids"][-1])
    assert len(train.spread(10**6)) == len(train)


def test_a_seed_draws_the_held_out_lines(folder):
    path = written(folder, [talk(str(i), str(i)) for i in range(30)])
    draws = [read_corpus(path, TOKENIZER, 64, 0.2, seed).held_out.arrays for seed in (0, 0, 1)]
    assert np.array_equal(draws[0]["ids"], draws[1]["ids"])
    assert not np.array_equal(draws[0]["ids"], draws[2]["ids"])
    assert len(draws[0]["ids"]) == 6


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_neither_part_is_ever_empty(folder, share):
    corpus = read_corpus(written(folder, [talk("a", "b"), talk("c", "d")]), TOKENIZER, 64, share)
    assert len(corpus.train) == len(corpus.held_out) == 1


def test_compressed_text_empty_lines_and_what_ships(folder):
    (folder / "data.txt.xz").write_bytes(lzma.compress(b"some text of some length " * 20))
    assert read_corpus(folder / "data.txt.xz", TOKENIZER, 16).kind == "text"
    path = written(folder, [talk("a", "b"), "", talk("c", "d"), "   "])
    assert read_corpus(path, TOKENIZER, 16).counts["examples"] == 2
    for name in SHIPPED:
        assert len(read_corpus(name, TOKENIZER, 64).train) > 10


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: .*line 1 column 2"),
        ([talk("a", "b"), "[]"], "line 2: expected messages, or prompt"),
        ([{"question": "a"}], "found .'question'"),
        ([{"prompt": "a"}], "expected messages, or prompt and completion"),
        ([{"prompt": "a", "completion": 3}], "completion: expected text, found 3"),
        ([{"text": None}], "text: expected text"),
        ([{"messages": "hello"}], "line 1"),
        ([{"messages": 3}], "line 1: messages: expected a list, found 3"),
        ([{"messages": []}], "line 1: messages: expected at least one"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], "line 1: messages: expected"),
        ([talk("a", "b"), {"text": "c"}], "lines of one form, found"),
        (["", ""], "lines of one form, found none"),
        ([talk("a", "b")], "at least two examples, found 1"),
    ],
)
def test_files_that_are_refused(folder, lines, message):
    path = written(folder, lines)
    with pytest.raises(MiniloraError, match=message) as caught:
        read_corpus(path, TOKENIZER, 64)
    assert str(path) in str(caught.value)


def test_places_and_options_that_are_refused(folder):
    with pytest.raises(MissingFileError, match="or one of persona, genesis, plays"):
        read_corpus(folder / "none.jsonl", TOKENIZER, 64)
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="expected text in UTF-8"):
        read_corpus(folder / "bad.txt", TOKENIZER, 64)
    for length, share in ((1, 0.1), (64, 0.0), (64, 1.0), (2.5, 0.1), (64, "a")):
        with pytest.raises(MiniloraError, match="expected a length >= 2 and a share"):
            read_corpus("persona", TOKENIZER, length, share)
    with pytest.raises(MiniloraError, match="seed: expected a whole number >= 0, found -1"):
        read_corpus("persona", TOKENIZER, 64, seed=-1)
    for name in ("list.json", "table.csv"):
        (folder / name).write_text('[{"text": "learned as it stands"}]')
        with pytest.raises(FormatError, match=r"expected a \.jsonl or \.txt file, found \."):
            read_corpus(folder / name, TOKENIZER, 8)


def test_keys_have_no_order_and_names_no_case(folder):
    lines = [{"prompt": "a", "completion": "b"}, {"completion": "d", "prompt": "c"}]
    (folder / "PAIRS.JSONL").write_text("\n".join(map(json.dumps, lines)))
    corpus = read_corpus(folder / "PAIRS.JSONL", TOKENIZER, 8)
    assert (corpus.kind, corpus.counts["examples"]) == ("prompt and completion", 2)
    assert type(corpus.train.first(1)) is Sequences
