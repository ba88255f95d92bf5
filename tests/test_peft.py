"""Adapters on disk: to the bit what was saved, or refused with the reason (rows 15-32)."""

import errno
import itertools
import json
import os
import random
import re
import shutil
import time
import warnings

import numpy as np
import pytest
from killed import killer
from real_files import (
    FAMILIES,
    adapted_of,
    logits,
    misshapen,
    model_of,
    only_our_errors,
    refilled,
)
from test_atomic import Killed, Watched, failing_at, killed_at, without_exchange

from minilora.engine.errors import (
    AdapterError,
    BaseMismatchWarning,
    CheckpointError,
    FormatError,
    MissingAdapterError,
    RankWarning,
)
from minilora.files import atomic, gguf, safetensors
from minilora.files.export import export_gguf, export_mlx
from minilora.files.names import gguf_name, hf_name, to_halves
from minilora.files.peft import WEIGHTS, load_adapter, save_adapter
from minilora.files.peft_config import CONFIG, read_adapter_config
from minilora.lora.adapters import take
from minilora.lora.lora import is_adapter, merge
from minilora.model.module import freeze, parameters, rebuild, tensors, unfreeze, walk
from minilora.quant.linear import quantize

families = pytest.mark.parametrize("name", FAMILIES)
BASE = model_of("llama")


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("reads files")


@pytest.fixture
def folder(tmp_path):
    """A saved adapter on the small Llama."""
    save_adapter(tmp_path / "adapter", adapted_of(BASE), base="some/base")
    return tmp_path / "adapter"


def same_adapter(a, b):
    ours = {path: t for path, t in tensors(a).items() if path.endswith((".A", ".B"))}
    theirs = {path: t for path, t in tensors(b).items() if path.endswith((".A", ".B"))}
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        assert theirs[path].data.tobytes() == tensor.data.tobytes(), path
    settings = lambda tree: [(n.scale, n.dropout) for _, n in walk(tree) if is_adapter(n)]
    assert settings(a) == settings(b)


# ------------------------------------------------------------------ there and back


@families
@pytest.mark.parametrize("stabilized", [False, True])
def test_an_adapter_comes_back_to_the_bit(tmp_path, name, stabilized):
    model = model_of(name)
    adapted = adapted_of(model, rank_stabilized=stabilized, dropout=0.25)
    save_adapter(tmp_path / "adapter", adapted)
    back = load_adapter(tmp_path / "adapter", model)
    same_adapter(freeze(adapted), back)
    assert not parameters(back)
    assert np.array_equal(logits(back), logits(freeze(adapted)))
    nodes = [node for _, node in walk(back) if hasattr(node, "A")]
    assert {(n.rank_stabilized, n.dropout, n.alpha) for n in nodes} == {(stabilized, 0.25, 5.0)}
    again = load_adapter(tmp_path / "adapter", model, trainable=True)
    assert parameters(again).keys() == parameters(adapted).keys()


def test_patterns_targets_and_an_embedding(tmp_path):
    adapted = adapted_of(
        BASE, targets=["query", "blocks.0.mlp.up", "embedding", "head"],
        rank_pattern={"query": 2}, alpha_pattern={"blocks.0.mlp.up": 7.5}, dropout=0.25,
    )  # fmt: skip
    save_adapter(tmp_path / "adapter", adapted)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["rank_pattern"] == {f"model.layers.{i}.self_attn.q_proj": 2 for i in range(2)}
    assert config["alpha_pattern"] == {"model.layers.0.mlp.up_proj": 7.5}
    assert "model.layers.0.mlp.up_proj" in config["target_modules"]
    back = load_adapter(tmp_path / "adapter", BASE)
    same_adapter(freeze(adapted), back)
    assert np.array_equal(logits(back), logits(freeze(adapted)))


@pytest.mark.parametrize("tensor", ["embed_tokens.base_layer.weight", "embed_tokens.weight"])
def test_a_copy_of_the_table_beside_its_adapter_may_stay(tmp_path, tensor):
    """PEFT saves one; it has to be the very table that is here."""
    adapted = adapted_of(BASE, targets=["query", "embedding"])
    save_adapter(tmp_path, adapted)
    table = {f"base_model.model.model.{tensor}": BASE.embedding.weight.data.copy()}
    without_digests(tmp_path, lambda arrays: arrays | table)
    same_adapter(load_adapter(tmp_path, BASE), freeze(adapted))
    table[f"base_model.model.model.{tensor}"][3, 1] += 1
    without_digests(tmp_path, lambda arrays: arrays | table)
    with pytest.raises(AdapterError, match=r"no place in this model: .*embed_tokens"):
        load_adapter(tmp_path, BASE)


def test_on_a_quantized_base(tmp_path, folder):
    small = quantize(BASE)
    back = load_adapter(folder, small)
    assert np.abs(logits(back) - logits(load_adapter(folder, BASE))).max() > 0
    save_adapter(tmp_path / "again", back)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() != b""
    same_adapter(back, load_adapter(tmp_path / "again", small))


def test_the_same_bytes_each_time_and_extra_files(tmp_path, folder):
    save_adapter(tmp_path / "again", adapted_of(BASE), base="some/base", extra={"note": b"x"})
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "again" / "note").read_bytes() == b"x"


def test_what_is_not_an_adapter_alone_is_not_saved(tmp_path):
    with pytest.raises(AdapterError, match="found none"):
        save_adapter(tmp_path / "a", BASE)
    more = unfreeze(adapted_of(BASE), lambda path: path == "norm.weight")
    with pytest.raises(AdapterError, match=r"no adapter \(norm\.weight\)"):
        save_adapter(tmp_path / "a", more)
    mixed = rebuild(
        adapted_of(BASE),
        lambda path, n: (
            n if path != "blocks.0.mlp.up" else type(n)(n.base, n.A, n.B, n.alpha, True)
        ),
    )
    with pytest.raises(AdapterError, match="rank_stabilized: expected one value"):
        save_adapter(tmp_path / "a", mixed)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.txt, which would be lost"):
        save_adapter(tmp_path / "full", adapted_of(BASE))


# ------------------------------------------------------------------ the table of bad input


def config_with(folder, **changes):
    """The config changed, and the weights made to agree with its digest."""
    path = folder / CONFIG
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content.pop(name) if value is ... else content.update({name: value})
    path.write_text(json.dumps(content))
    without_digests(folder)


def without_digests(folder, change=lambda arrays: arrays):
    """The weights changed, and written as others write them."""
    stored = safetensors.read(folder / WEIGHTS, allow_nonfinite=True, verify=False)
    arrays = {name: np.array(stored[name]) for name in stored}
    safetensors.write(folder / WEIGHTS, change(arrays), {"format": "pt"})


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.999])
def test_15_truncated_weights(folder, share):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(AdapterError, match=WEIGHTS):
        load_adapter(folder, BASE)


def test_16_a_flipped_bit(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-100] ^= 4
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(AdapterError, match="do not match their sha256"):
        load_adapter(folder, BASE)


def test_17_no_weights_and_28_only_a_pickle(tmp_path, folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(MissingAdapterError, match=f"no {WEIGHTS}"):
        load_adapter(folder, BASE)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04evil")
    with pytest.raises(AdapterError, match="is a pickle"):
        load_adapter(folder, BASE)
    with pytest.raises(MissingAdapterError, match="expected the directory of an adapter"):
        load_adapter(tmp_path / "none", BASE)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "line 1 column 1"),
        (b'{"r": 3, ', "line 1 column 10"),
        (b"[]", "expected an object"),
        (b'{"r": 3, "r": 4}', "duplicate key"),
        (b'{"r": NaN}', "NaN is not JSON"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_18_configs_that_are_none(folder, raw, message):
    (folder / CONFIG).write_bytes(raw)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(folder, BASE)
    assert CONFIG in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": ...}, 'peft_type: expected "LORA"'),  # 19
        ({"peft_type": "FOO"}, 'peft_type: expected "LORA", found .FOO'),
        ({"r": 0}, "r: expected a whole number in 1..65536, found 0"),  # 20
        ({"r": -1}, "found -1"),
        ({"r": "4"}, "found '4'"),
        ({"r": None}, "found None"),
        ({"r": 1.5}, "found 1.5"),
        ({"r": True}, "found True"),
        ({"r": 2}, r"expected \(2, \d+\), found \(3, \d+\)"),
        ({"r": 8}, r"expected \(8, \d+\), found \(3, \d+\)"),
        ({"r": 10**9}, "found 1000000000"),
        ({"lora_alpha": 0}, "lora_alpha: expected a finite number > 0"),  # 21
        ({"lora_alpha": -8}, "lora_alpha"),
        ({"lora_alpha": 1e308}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "NaN is not JSON"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": ...}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout: expected a number in"),
        ({"lora_dropout": -1}, "lora_dropout"),
        ({"use_rslora": 1}, "use_rslora: expected true or false"),
        ({"target_modules": ["q_proj"]}, "differ about"),  # 24
        ({"target_modules": ["q_proj", "nowhere"]}, "'nowhere' matches nothing"),
        ({"target_modules": []}, "target_modules: expected a list of names"),
        ({"target_modules": "((.+)+)+!"}, "a regular expression is not run"),  # 31
        ({"target_modules": "["}, "a regular expression is not run"),
        ({"rank_pattern": {"(.+)+": 2}}, "a regular expression is not run"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj"),  # 25: the config says so, the weights not
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"use_dora": True}, r"missing: \['model\.layers\.0\.mlp\.down_proj\.lora_magnitude_ve"),
        ({"use_dora": 1}, "use_dora: expected true or false"),
        ({"bias": "all"}, "bias: expected nothing"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected an initialization that"),
        ({"init_lora_weights": "lora_ga"}, "leaves the base alone"),
        ({"alpha_pattern": {r"\w_proj": 9}}, "a regular expression is not run"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"new_in_some_version": {"a": 1}}, "new_in_some_version"),
    ],
)
def test_19_to_31_configs_that_would_compute_something_else(folder, changes, message):
    config_with(folder, **changes)
    began = time.process_time()
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(folder, BASE)
    assert time.process_time() - began < 1
    assert folder.name in str(caught.value)


def test_what_may_be_absent_or_say_no(folder):
    config_with(folder, use_dora=False, modules_to_save=None, rank_pattern=..., alpha_pattern=...,
                use_rslora=..., lora_dropout=..., new_in_some_version=None)  # fmt: skip
    same_adapter(load_adapter(folder, BASE), freeze(adapted_of(BASE)))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_where_a_and_b_began_is_of_no_matter_if_the_base_stayed(folder, init):
    config_with(folder, init_lora_weights=init)
    same_adapter(load_adapter(folder, BASE), freeze(adapted_of(BASE)))


def dropped(suffix):
    return lambda arrays: {n: a for n, a in arrays.items() if not n.endswith(suffix)}


def first(arrays):
    return next(name for name in arrays if "q_proj.lora_A" in name)


def replaced(make):
    return lambda arrays: arrays | {first(arrays): make(arrays[first(arrays)])}


def poked(value):
    def change(array):
        array[1, 2] = value
        return array

    return replaced(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped("0.self_attn.q_proj.lora_A.weight"), r"missing: .*0\.self_attn\.q_proj\.lora_A"),
        (dropped("0.self_attn.q_proj.lora_B.weight"), r"missing: .*0\.self_attn\.q_proj\.lora_B"),
        (dropped("weight"), "missing: everything"),
        (lambda a: {n.replace("base_model.", "base."): v for n, v in a.items()}, "no place"),
        (lambda a: a | {"base_model.model.extra.lora_A.weight": np.zeros((3, 32), np.float32)},
         "no place"),
        (lambda a: a | {"extra": np.zeros(3, np.float32)}, "no place in this model: .*extra"),
        (replaced(lambda a: np.ascontiguousarray(a.T)), r"expected \(3, 32\), found \(32, 3\)"),
        (replaced(lambda a: a.ravel()), r"found \(96,\)"),
        (replaced(lambda a: a[:2]), r"found \(2, 32\)"),
        (replaced(lambda a: a.astype(np.int32)), "expected floats, found I32"),
        (replaced(lambda a: a > 0), "expected floats, found BOOL"),
        (poked(np.nan), "q_proj.*nan"),
        (poked(np.inf), "q_proj.*inf"),
        (lambda a: {n: v * np.float32(np.inf) if "0.mlp.up_proj.lora_B" in n else v
                    for n, v in a.items()}, "up_proj.lora_B.*(nan|inf)"),
    ],
)  # fmt: skip
def test_22_to_26_weights_that_do_not_fit(folder, change, message):
    without_digests(folder, change)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(folder, BASE)
    assert WEIGHTS in str(caught.value)


def test_26_complex_weights(folder):
    without_digests(folder)
    raw = (folder / WEIGHTS).read_bytes()
    name = b'lora_A.weight":{"dtype":"F32"'
    assert name in raw
    (folder / WEIGHTS).write_bytes(raw.replace(name, name.replace(b"F32", b"C64"), 1))
    with pytest.raises(AdapterError, match="unsupported dtype 'C64'"):
        load_adapter(folder, BASE)


def test_23_nonfinite_only_when_asked_for(folder):
    without_digests(folder, poked(np.nan))
    back = load_adapter(folder, BASE, allow_nonfinite=True)
    assert np.isnan(back.blocks[0].attention.query.A.data[1, 2])


@pytest.mark.parametrize("layers", [1, 3])
def test_22_24_a_base_with_other_layers(folder, layers):
    from dataclasses import replace

    from minilora.model.transformer import init_transformer

    config = replace(FAMILIES["llama"], layers=layers)
    other = freeze(init_transformer(config, np.random.default_rng(0)))
    with pytest.raises(AdapterError, match="no place" if layers == 1 else "differ about"):
        load_adapter(folder, other)


def test_27_another_base_is_told(folder):
    with pytest.warns(BaseMismatchWarning, match="trained on another base"):
        load_adapter(folder, model_of("llama", seed=5))
    with pytest.raises(AdapterError, match="trained on another base"):
        load_adapter(folder, model_of("llama", seed=5), strict_base=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(folder, quantize(BASE), strict_base=True)  # its table is the same


def test_32_a_rank_that_no_weight_can_have(tmp_path):
    adapted = adapted_of(BASE, rank=40, targets=["up"])
    save_adapter(tmp_path / "a", adapted)
    with pytest.warns(RankWarning, match=r"in 2 modules, .*mlp\.up: 40 > min\(48, 32\)"):
        back = load_adapter(tmp_path / "a", BASE)
    same_adapter(back, freeze(adapted))


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("up_proj", "up_proj"),
        ("up.proj", "up_proj"),  # a dot is any character, as in PEFT
        ("mlp.up_proj$", "up_proj"),
        (r"mlp\.up_proj", "up_proj"),
        (r"mlp\.up\.proj", None),
        ("._proj", "_proj"),
        ("proj", None),
        ("^up_proj", None),
        (r"^model\.layers\.0\.mlp\.up_proj$", "0.mlp.up_proj"),
    ],
)
def test_a_pattern_means_what_peft_takes_it_for(folder, pattern, meant):
    config_with(folder, alpha_pattern={pattern: 9.0})
    for path, factors in take(load_adapter(folder, BASE)).items():
        module = hf_name(path, BASE.config)
        peft_does = re.match(rf"(.*\.)?({pattern})$", module) is not None
        assert factors.alpha == (9.0 if peft_does else 5.0), module
        if meant is None or len(meant) > 5:
            assert peft_does == (meant is not None and module.endswith(meant))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 0.0}, "lora_alpha"), ({"alpha": -8.0}, "lora_alpha")],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, options, message):
    with pytest.raises(AdapterError, match=f"{message}.*expected"):
        save_adapter(tmp_path / "a", adapted_of(BASE, targets=["blocks.0.mlp.up"], **options))
    assert not (tmp_path / "a").exists()
    with pytest.raises(FormatError, match=f"{CONFIG}.*surrogates not allowed"):
        save_adapter(tmp_path / "a", adapted_of(BASE), base="m\udcff")
    assert not (tmp_path / "a").exists()


def test_a_pair_that_was_torn_apart(tmp_path, folder):
    save_adapter(tmp_path / "other", adapted_of(BASE, alpha=9.0))
    shutil.copy(tmp_path / "other" / CONFIG, folder / CONFIG)
    with pytest.raises(AdapterError, match="were not saved together"):
        load_adapter(folder, BASE)


def test_a_model_with_adapters_takes_no_other(folder):
    with pytest.raises(AdapterError, match="found one with adapters"):
        load_adapter(folder, adapted_of(BASE))


@pytest.mark.parametrize("count", [600, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_adapters_raise_only_our_errors(tmp_path, count):
    """The config by text edits, the weights by bytes; the parser of the weights has its own."""
    model = model_of("llama tied")
    save_adapter(tmp_path / "a", adapted_of(model, targets=["blocks.0.attention.query"], rank=1))
    without_digests(tmp_path / "a")
    raw, rng = (tmp_path / "a" / CONFIG).read_bytes(), random.Random(count)

    def damaged(fill):
        for _ in range(count):
            content = bytearray(raw)
            for _ in range(rng.choice([1, 2, 4])):
                at, kind = rng.randrange(len(content)), rng.randrange(4)
                if kind == 0:
                    content[at] = rng.choice(b'{}[]:,"0123456789-.eE \\untrfals')
                elif kind == 1:
                    del content[at : at + rng.randrange(1, 6)]
                elif kind == 2:
                    content[at:at] = bytes(
                        rng.choices(b'0123456789-.,"[]{}', k=rng.randrange(1, 4))
                    )
                else:
                    content[at] ^= 1 << rng.randrange(8)
            fill(content)
            yield

    load = lambda _: load_adapter(tmp_path / "a", model)
    with refilled(tmp_path / "a" / CONFIG) as fill:
        accepted = only_our_errors(damaged(fill), load, len(raw))
    assert 0 < accepted < count


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_misshapen_configs_raise_only_our_errors(folder, count):
    whole, rng = json.loads((folder / CONFIG).read_text()), random.Random(count)
    whole |= {
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q_proj": 5.0},
        "layers_pattern": None,
    }

    with refilled(folder / CONFIG) as fill:
        cases = (fill(json.dumps(misshapen(rng, whole)).encode()) for _ in range(count))
        accepted = only_our_errors(cases, lambda _: read_adapter_config(folder), 1_000)
    assert 0 < accepted < count


# ------------------------------------------------------------------ kills and full disks


def saved_over(place, monkeypatch, before, swaps):
    """Save one adapter over another on a disk that does what `before` says; error and disk."""
    old, new = (
        adapted_of(BASE, seed=s, rank=r, alpha=r, targets=["query"]) for s, r in ((1, 3), (2, 4))
    )
    save_adapter(place, old)
    disk = Watched(before if swaps else without_exchange(before))
    raised = None
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "disk", disk)
        try:
            save_adapter(place, new, extra={"README.md": b"card"})
        except (CheckpointError, Killed) as error:
            raised = error
    if place.exists():
        found = take(load_adapter(place, BASE))["blocks.0.attention.query"]
        wanted = (old, new)[len(found.A.data) - 3].blocks[0].attention.query
        assert np.array_equal(found.A.data, wanted.A.data)
        assert np.array_equal(found.B.data, wanted.B.data)
        assert found.alpha == wanted.alpha
    else:  # the gap between two renames, which the next save closes
        assert not swaps
    save_adapter(place, old, extra={"README.md": b"card"})
    assert os.listdir(place.parent) == [place.name]
    return raised, disk


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_a_kill_at_every_call_of_a_save(tmp_path, monkeypatch, partial, swaps):
    for k in itertools.count():
        (tmp_path / str(k)).mkdir()
        raised, _ = saved_over(tmp_path / f"{k}/a", monkeypatch, killed_at(k, partial), swaps)
        if raised is None:
            break
    assert k > 10


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_every_call_of_a_save(tmp_path, monkeypatch, code):
    for k in itertools.count():
        (tmp_path / str(k)).mkdir()
        raised, disk = saved_over(tmp_path / f"{k}/a", monkeypatch, failing_at(k, code), True)
        assert raised is None or str(tmp_path) in str(raised)
        if k >= len(disk.log):
            break
    assert raised is None
    assert k > 10


LOOP = """
import itertools, sys
from killed import forked
from real_files import adapted_of, model_of
from minilora.files.peft import save_adapter
base = model_of("llama")
both = [adapted_of(base, seed=s, rank=r, alpha=r) for s, r in ((1, 3), (2, 4))]
forked()
for i in itertools.count():
    save_adapter(sys.argv[1], both[i % 2])
"""


@pytest.mark.parametrize("trials", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, trials):
    path, rng = tmp_path / "adapter", random.Random(trials)
    both = [freeze(adapted_of(BASE, seed=s, rank=r, alpha=r)) for s, r in ((1, 3), (2, 4))]
    known = [logits(a) for a in both]
    interrupted = 0
    with killer(LOOP, path) as kill:
        for trial in range(20 * trials):  # on a slow machine a few may all fall beside a save
            if trial >= trials and interrupted:
                break
            assert kill(rng.uniform(0.001, 0.03))
            interrupted += len(os.listdir(tmp_path)) > path.exists()
            if path.exists():
                found = logits(load_adapter(path, BASE))
                assert any(np.array_equal(found, k) for k in known)
    assert interrupted  # else this test has shown nothing
    save_adapter(path, both[0])
    assert os.listdir(tmp_path) == ["adapter"]


# ------------------------------------------------------------------ other programs


def test_a_gguf_adapter_is_the_same_adapter(tmp_path):
    for name in ("llama", "qwen2"):
        model = model_of(name)
        adapted = adapted_of(
            model, targets=["all-linear", "embedding"], rank_stabilized=True,
            rank_pattern={"query": 2}, alpha_pattern={"up": 7.5},
        )  # fmt: skip
        export_gguf(tmp_path / f"{name}.gguf", adapted)
        stored = gguf.read(tmp_path / f"{name}.gguf")
        alpha = stored.metadata["adapter.lora.alpha"]
        assert stored.metadata["general.type"] == "adapter"
        assert stored.metadata["general.architecture"] == name
        for path, node in walk(adapted):
            if not hasattr(node, "A"):
                continue
            key = f"{gguf_name(path, model.config)}.weight"
            a, b = stored[f"{key}.lora_a"], stored[f"{key}.lora_b"]
            r = node.rank
            if path == "embedding":  # (V, r) and (C, r): llama.cpp looks rows of a up
                delta = a @ b.T * (alpha / r)
                assert a.shape == (320, r)
                wanted = (node.B.data @ node.A.data).T * node.scale
            else:
                heads = (
                    {"query": 4, "key": 2}.get(path.rpartition(".")[2]) if name == "llama" else 0
                )
                delta = (to_halves(b, heads) if heads else b) @ a * (alpha / r)
                wanted = node.delta()
            assert np.abs(delta - wanted).max() < 1e-6 * np.abs(wanted).max() + 1e-7, path


def test_a_scale_of_zero_is_exported_as_one(tmp_path):
    """llama.cpp adds B A unscaled where alpha is 0 (get_scale of llama-adapter.h)."""
    for alpha in (0.0, 5.0):
        adapted = adapted_of(BASE, alpha=0.0, alpha_pattern={"up": alpha})
        export_gguf(tmp_path / "a.gguf", adapted)
        export_mlx(tmp_path / "mlx", adapted)
        stored = gguf.read(tmp_path / "a.gguf")
        scale = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
        told = stored.metadata["adapter.lora.alpha"], scale["lora_parameters"]["scale"]
        assert told == ((5.0, 5 / 3) if alpha else (1.0, 1.0))
        assert not stored["blk.0.attn_v.weight.lora_b"].any()
        assert stored["blk.0.ffn_up.weight.lora_b"].any() == (alpha > 0)


def test_a_gguf_adapter_is_for_what_llama_cpp_can_adapt(tmp_path):
    """It looks for a tensor of that name, which a tied head has not, of a linear's shape."""
    for name, place in (("llama tied", "head"), ("gpt2", "positions")):
        with pytest.raises(AdapterError, match=f"llama.cpp loads, found an adapter on {place}"):
            export_gguf(tmp_path / "a.gguf", adapted_of(model_of(name), targets=[place]))
    assert not os.listdir(tmp_path)
    export_gguf(tmp_path / "a.gguf", adapted_of(BASE, targets=["head"]))


def test_an_mlx_adapter_is_the_same_adapter(tmp_path):
    adapted = adapted_of(BASE, rank_stabilized=True, alpha_pattern={"up": 7.5})
    export_mlx(tmp_path / "mlx", adapted)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    stored = safetensors.read(tmp_path / "mlx" / "adapters.safetensors")
    parameters = config["lora_parameters"]
    assert (config["num_layers"], parameters["rank"], parameters["dropout"]) == (2, 3, 0)
    assert "self_attn.q_proj" in parameters["keys"]
    for path, node in walk(adapted):
        if hasattr(node, "A"):
            name = hf_name(path, BASE.config)
            a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
            assert (a.shape, b.shape) == (node.A.shape[::-1], node.B.shape[::-1])
            delta = (a @ b).T * parameters["scale"]
            assert np.abs(delta - node.delta()).max() < 1e-6
    for odd, message in (
        (adapted_of(BASE, targets=["embedding"]), "on the linears of blocks"),
        (adapted_of(BASE, targets=["blocks.0.mlp.up"]), "same modules in every block"),
        (adapted_of(BASE, rank_pattern={"up": 1}), "one rank"),
        (adapted_of(model_of("gpt2")), "GPT-2's form"),
    ):
        with pytest.raises(AdapterError, match=message):
            export_mlx(tmp_path / "odd", odd)


# ------------------------------------------------------------------ against PEFT


@pytest.fixture
def peft():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


CASES = {
    "plain": {},
    "rank-stabilized": {"rank_stabilized": True},
    "patterns": {"rank_pattern": {"down": 2}, "alpha_pattern": {"output": 9.0}},
    "some": {"targets": ["output", "down"]},
    "embedding": {"targets": ["all-linear", "embedding"]},
    "head": {"targets": ["all-linear", "head"]},
}


def theirs_on_disk(tmp_path, model):
    import transformers

    from minilora.files.huggingface import save_huggingface

    save_huggingface(tmp_path / "model", model)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@families
def test_peft_gives_the_logits_of_our_merged_model(tmp_path, peft, name, case):
    import torch

    model = model_of(name)
    adapted = adapted_of(model, **CASES[case])
    save_adapter(tmp_path / "adapter", adapted)
    theirs = peft.PeftModel.from_pretrained(theirs_on_disk(tmp_path, model), tmp_path / "adapter")
    ids = np.random.default_rng(7).integers(0, 320, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = logits(merge(adapted), ids)
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    theirs.save_pretrained(tmp_path / "back")
    same_adapter(load_adapter(tmp_path / "back", model), freeze(adapted))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@families
def test_an_adapter_that_peft_wrote_gives_its_logits(tmp_path, peft, name):
    import torch

    model = model_of(name)
    torch.manual_seed(0)
    linears = ["c_attn", "c_fc", "c_proj"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=linears, init_lora_weights=False,
                             use_rslora=True, rank_pattern={linears[0]: 2})  # fmt: skip
    theirs = peft.get_peft_model(theirs_on_disk(tmp_path, model), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ids = np.random.default_rng(7).integers(0, 320, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = logits(merge(load_adapter(tmp_path / "adapter", model)), ids)
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.peers
def test_the_gguf_package_reads_an_adapter(tmp_path):
    package = pytest.importorskip("gguf")
    export_gguf(tmp_path / "adapter.gguf", adapted_of(BASE))
    reader = package.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    assert reader.get_field("adapter.lora.alpha").contents() == 5.0
    ours = gguf.read(tmp_path / "adapter.gguf")
    theirs = {t.name: t.data.reshape(t.shape[::-1]) for t in reader.tensors}
    assert theirs.keys() == set(ours)
    assert len(theirs) == 2 * 2 * 7
    for name, array in theirs.items():
        assert np.array_equal(array, ours[name]), name
