"""run(N) equals run(k) and a resumed rest, to the bit; a kill loses at most what was not saved."""

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import time

import numpy as np
import pytest
from killed import killer
from real_files import adapted_of, model_of
from test_atomic import Killed, Watched, failing_at, killed_at

from minilora import SGD, AdamW, Data, fit, schedule
from minilora.engine.errors import CheckpointError, MiniloraError
from minilora.files import atomic, safetensors
from minilora.model.module import to_device
from minilora.optim.adam8bit import AdamW8bit
from minilora.optim.flat import lora_plus
from minilora.quant.linear import quantize
from minilora.train.checkpoint import (
    KEEP,
    STATE,
    STATE_DIGEST,
    Checkpoints,
    State,
    digest_of_arrays,
)

STEPS = 7


def data(seed=0, n=22):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 320, (n, 6))
    return Data({"ids": ids, "targets": np.roll(ids, -1, axis=1)})


def loss(model, batch, rng):
    return model.loss(batch["ids"], batch["targets"], rng=rng)


KINDS = {"adamw": AdamW, "adamw8bit": AdamW8bit, "sgd": lambda m, lr: SGD(m, lr=lr, momentum=0.9)}


def optimizer(device, kind="adamw", rank=2, lr=5e-3):
    """Adapters with dropout, so that the random streams matter."""
    model = to_device(model_of("llama"), device)
    return KINDS[kind](adapted_of(model, rank=rank, dropout=0.2), lr=lr)


def run(device, folder=None, stop_after=None, resume=False, kind="adamw", **options):
    """A fit of STEPS steps; it stops as Ctrl-C stops it, after `stop_after` of them."""
    calls = [0]

    def counting(model, batch, rng):
        calls[0] += 1
        if calls[0] == stop_after:
            signal.raise_signal(signal.SIGINT)
        return loss(model, batch, rng)

    o = optimizer(device, kind)
    settings = {
        "steps": STEPS, "batch": 4, "seed": 3, "clip": 1.0, "every": 2,
        "schedule": schedule("linear", STEPS, 0.2),
    } | options  # fmt: skip
    checkpoints = None if folder is None else Checkpoints(folder)
    result = fit(o, counting, data(), checkpoints=checkpoints, resume=resume, **settings)
    return result, o


def same(a, b, host):
    (run_a, opt_a), (run_b, opt_b) = a, b
    assert host(opt_a.flat.data).tobytes() == host(opt_b.flat.data).tobytes()
    ours, theirs = opt_a.state(), opt_b.state()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert host(ours[name]).tobytes() == host(theirs[name]).tobytes(), name
    assert run_a.history == run_b.history
    assert (run_a.steps, run_a.best_step, run_a.stopped) == (
        run_b.steps, run_b.best_step, run_b.stopped,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(device):
    return run(device)


@pytest.mark.parametrize("k", range(1, STEPS))
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, device, host, whole, k):
    first, _ = run(device, tmp_path / "c", stop_after=k)
    assert (first.stopped, first.steps) == ("interrupted", k)
    second = run(device, tmp_path / "c", resume=True)
    assert second[0].steps == STEPS
    same(second, whole, host)


def test_ctrl_c_in_the_last_step_comes_too_late(tmp_path, device, host, whole):
    """Nothing is left to stop: the run has its last record, and so has one that is resumed."""
    found = run(device, tmp_path / "c", stop_after=STEPS)
    assert found[0].stopped == "finished"
    same(found, whole, host)
    same(run(device, tmp_path / "c", resume=True), whole, host)


@pytest.mark.parametrize("kind", ["adamw8bit", "sgd"])
def test_every_optimizer_is_resumed(tmp_path, device, host, kind):
    run(device, tmp_path / "c", stop_after=3, kind=kind)
    same(run(device, tmp_path / "c", resume=True, kind=kind), run(device, kind=kind), host)


def test_stopped_twice_with_validation_shards_and_accumulation(tmp_path, device, host):
    options = {"validation": data(seed=5), "accumulate": 2, "shards": 2, "every": 3}
    for k in (3, 4):
        run(device, tmp_path / "c", stop_after=k, resume=True, **options)
    found = run(device, tmp_path / "c", resume=True, **options)
    same(found, run(device, **options), host)


def test_an_early_stop_is_not_trained_past(tmp_path, device):
    options = {"validation": data(seed=5), "every": 1, "patience": 1, "steps": 40}
    first, _ = run(device, tmp_path / "c", **options)
    again, _ = run(device, tmp_path / "c", resume=True, **options)
    assert first.stopped == again.stopped == "early"
    assert again.steps == first.steps


def test_resume_without_a_checkpoint_begins(tmp_path, device, host, whole):
    same(run(device, tmp_path / "none", resume=True), whole, host)


# ------------------------------------------------------------------ what is kept


def test_the_last_two_are_kept(tmp_path, device):
    run(device, tmp_path / "c")
    names = sorted(os.listdir(tmp_path / "c"))
    assert names == ["step-000000004.safetensors", "step-000000006.safetensors"]
    assert len(names) == KEEP
    Checkpoints(tmp_path / "c").clear()
    assert not (tmp_path / "c").exists()
    Checkpoints(tmp_path / "c").clear()  # there is nothing to be done


def test_clearing_leaves_what_is_not_ours(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(State(1, {"a": np.zeros(2)}, {"x": 1}))
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.clear()
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_damaged_newest_is_passed_over(tmp_path, device, host, whole):
    run(device, tmp_path / "c")
    newest = Checkpoints(tmp_path / "c").paths()[-1]
    raw = bytearray(newest.read_bytes())
    raw[-3] ^= 1
    newest.write_bytes(raw)
    with pytest.warns(UserWarning, match="sha256; trying an older"):
        found = run(device, tmp_path / "c", resume=True)
    same(found, whole, host)
    for path in Checkpoints(tmp_path / "c").paths():
        path.write_bytes(path.read_bytes()[:-1])
    with (
        pytest.warns(UserWarning, match="trying an older"),
        pytest.raises(CheckpointError, match="no intact checkpoint"),
    ):
        run(device, tmp_path / "c", resume=True)


def test_notes_and_tensors_need_their_digests(tmp_path):
    path = Checkpoints(tmp_path).save(State(3, {"a": np.arange(3.0)}, {"x": [1, None]}))
    back = Checkpoints(tmp_path).latest()
    assert (back.step, back.notes, back.arrays["a"].tolist()) == (3, {"x": [1, None]}, [0, 1, 2])
    stored = safetensors.read(path)
    notes = dict(stored.metadata)
    notes["minilora.state"] = json.dumps({"x": 2})
    safetensors.write(path, dict(stored), notes)
    with pytest.raises(CheckpointError, match="notes do not match"):
        Checkpoints(tmp_path).read(path)
    text = json.dumps({"x": 2})
    notes = {STATE: text, STATE_DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    a = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": notes, "a": a}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.ones(1).tobytes())
    assert dict(safetensors.read(path))["a"] == 1  # sound, as far as anyone can tell
    with pytest.raises(CheckpointError, match="tensors without a sha256"):
        Checkpoints(tmp_path).read(path)


# ------------------------------------------------------------------ whose they are


@pytest.mark.parametrize("changes", [
    {"batch": 5}, {"seed": 4}, {"steps": 9}, {"clip": None}, {"shards": 2}, {"every": 3},
    {"accumulate": 2},
])  # fmt: skip
def test_another_run_is_refused(tmp_path, device, changes):
    run(device, tmp_path / "c", stop_after=3)
    (name,) = changes
    with pytest.raises(CheckpointError, match=f"belongs to another run .*{name}: saved"):
        run(device, tmp_path / "c", resume=True, **changes)


def test_other_data_another_model_and_another_purpose(tmp_path, device):
    settings = {"steps": STEPS, "batch": 4, "every": 2, "resume": True}
    fit(optimizer(device), loss, data(), checkpoints=Checkpoints(tmp_path), **settings)
    for o, d, about, message in (
        (optimizer(device), data(seed=1), {}, "train: saved"),
        (optimizer(device, rank=3), data(), {}, "expected"),
        (optimizer(device, lr=6e-3), data(), {}, "lr: saved 0.005, now 0.006"),
        (optimizer(device, "sgd"), data(), {}, "optimizer: saved"),
        (optimizer(device), data(), {"model": "other"}, "about: saved"),
    ):
        with pytest.raises(MiniloraError, match=message):
            fit(o, loss, d, checkpoints=Checkpoints(tmp_path, about), **settings)


def test_a_digest_is_of_names_types_shapes_and_bytes():
    a = np.arange(6, dtype=np.int32)
    others = [("b", a), ("a", a.view(np.float32)), ("a", a.reshape(2, 3)), ("a", a[::-1])]
    digests = [digest_of_arrays([pair]) for pair in [("a", a), *others]]
    assert len(set(digests)) == 5
    assert digest_of_arrays([("a", a[::-1].copy())]) == digests[-1]
    assert digest_of_arrays([("a", a), ("b", a)]) not in digests


@pytest.mark.parametrize("form", ["plain", "codes"])
def test_other_frozen_weights_and_other_held_out_data(tmp_path, device, form):
    """The best so far was the best on those; adapters learned beside these are of no use there."""

    def resumed(seed=0, held_out=5):
        model = to_device(model_of("llama", seed), device)
        o = AdamW(adapted_of(quantize(model) if form == "codes" else model), lr=5e-3)
        checkpoints = Checkpoints(tmp_path)
        return fit(o, loss, data(), validation=data(held_out), checkpoints=checkpoints, steps=2,
                   batch=4, every=1, resume=True)  # fmt: skip

    first = resumed()
    assert resumed().history == first.history
    for changed, name in (({"seed": 1}, "frozen"), ({"held_out": 6}, "validation")):
        with pytest.raises(CheckpointError, match=f"another run .{name}: saved [^;]*$"):
            resumed(**changed)


def test_other_settings_of_the_optimizer_are_another_run(tmp_path, device):
    def resumed(**changes):
        model = adapted_of(to_device(model_of("llama"), device))
        return fit(AdamW(model, **changes), loss, data(), steps=2, batch=4, every=1,
                   checkpoints=Checkpoints(tmp_path), resume=True)  # fmt: skip

    first = resumed()
    assert resumed().history == first.history
    for changes, name in (
        ({"betas": (0.9, 0.99)}, "settings"), ({"weight_decay": 0.5}, "settings"),
        ({"groups": lora_plus(4.0)}, "groups"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"another run .{name}: saved"):
            resumed(**changes)


def test_numbers_of_numpy_and_tuples_are_resumed(tmp_path, device):
    """JSON holds neither: a save failed at the first, and a resumed run was another's."""

    def once(resume):
        return fit(optimizer(device), loss, data(), steps=np.int64(4), batch=np.int32(4), every=2,
                   clip=np.float32(0.5), schedule=lambda step: np.float32(0.5), resume=resume,
                   checkpoints=Checkpoints(tmp_path, {"targets": ("up", "down")}))  # fmt: skip

    assert once(False).history == once(True).history
    with pytest.raises(CheckpointError, match="expected JSON, found another value"):
        fit(optimizer(device), loss, data(), steps=2, batch=4,
            checkpoints=Checkpoints(tmp_path / "c", {"a": object()}))  # fmt: skip


def test_half_a_state_changes_nothing(tmp_path, device, host):
    run(device, tmp_path, stop_after=4)
    place = Checkpoints(tmp_path)
    whole = place.latest()
    kept = {n: a for n, a in whole.arrays.items() if not n.startswith("optimizer.m.")}
    place.save(State(whole.step, kept, whole.notes))
    o = optimizer(device)
    before = host(o.flat.data).copy()
    settings = {k: v for k, v in whole.notes["run"].items() if k in (
        "steps", "batch", "seed", "clip", "every")}  # fmt: skip
    with pytest.raises(CheckpointError, match="optimizer state: saved and present"):
        fit(o, loss, data(), checkpoints=place, resume=True, **settings)
    assert host(o.flat.data).tobytes() == before.tobytes()
    place.save(State(whole.step, whole.arrays, {}))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        fit(o, loss, data(), checkpoints=place, resume=True, **settings)


def test_an_old_run_is_not_overwritten_unasked(tmp_path, device):
    run(device, tmp_path / "c", stop_after=3)
    with pytest.raises(CheckpointError, match="holds checkpoints of a run; resume it, or remove"):
        run(device, tmp_path / "c")


def test_a_place_that_cannot_be_written(tmp_path, device):
    """It is said before the first step."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "c", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="cannot be made"):
            fit(optimizer(device), lambda *a: pytest.fail("a step was made"), data(), steps=1,
                batch=4, checkpoints=Checkpoints(place))  # fmt: skip


# ------------------------------------------------------------------ kills


def three(step):
    """A small state, different at each step."""
    return State(step, {"a": np.full((40, 50), step), "b": np.arange(float(step))}, {"step": step})


@pytest.mark.parametrize("partial", [False, True])
def test_a_kill_at_every_call_of_a_save(tmp_path, monkeypatch, partial):
    for k in itertools.count():
        place = Checkpoints(tmp_path / str(k))
        for step in (1, 2):
            place.save(three(step))
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "disk", Watched(killed_at(k, partial)))
            try:
                place.save(three(3))
                break
            except Killed:
                pass
        found = place.latest()  # warns, and so fails, if the newest is not intact
        wanted = three(found.step)
        assert found.step in (2, 3)
        assert found.notes == wanted.notes
        assert all(np.array_equal(found.arrays[n], a) for n, a in wanted.arrays.items())
        place.save(three(4))  # another name: what the kill left has to go all the same
        kept = [f"step-{step:09d}.safetensors" for step in (found.step, 4)]
        assert sorted(os.listdir(place.directory)) == kept
    assert k > 4


def test_clearing_takes_what_a_kill_left(tmp_path, monkeypatch):
    place = Checkpoints(tmp_path / "c")
    monkeypatch.setattr(atomic, "disk", Watched(killed_at(2, partial=True)))
    with pytest.raises(Killed):
        place.save(three(1))
    monkeypatch.undo()
    assert [name[:6] for name in os.listdir(tmp_path / "c")] == [".step-"]
    place.clear()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_older_states(tmp_path, monkeypatch, code):
    for k in itertools.count():
        place = Checkpoints(tmp_path / str(k))
        for step in (1, 2):
            place.save(three(step))
        before = {path.name: path.read_bytes() for path in place.paths()}
        disk = Watched(failing_at(k, code))
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "disk", disk)
            try:
                place.save(three(3))
                failed = False
            except CheckpointError:
                failed = True
        assert (place.latest().step == 3) or failed
        if failed:
            assert before.items() <= {p.name: p.read_bytes() for p in place.paths()}.items()
        assert all(name.startswith("step-") for name in os.listdir(place.directory))
        if k >= len(disk.log):
            break
    assert k > 4


LOOP = """
import sys
from pathlib import Path
from killed import forked
from test_checkpoint import run
forked()
run("cpu", Path(sys.argv[1]), resume=True, steps=int(sys.argv[2]), every=1)
"""


@pytest.mark.parametrize("trials", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_training(tmp_path, device, host, trials):
    """However often it is killed, the run that is resumed in the end is the run never killed."""
    if device != "cpu":
        pytest.skip("starts processes of its own")
    rng, steps = random.Random(trials), 30
    known = run(device, steps=steps, every=1)
    place, alive, interrupted = tmp_path / "c", 0, 0
    began = time.monotonic()
    same(run(device, place, resume=True, steps=steps, every=1), known, host)
    whole = time.monotonic() - began  # seconds, which kills are spread over
    with killer(LOOP, place, steps) as kill:
        for trial in range(trials):
            if trial % 10 == 0:  # begin anew, so that kills fall on every step
                same(run(device, place, resume=True, steps=steps, every=1), known, host)
                Checkpoints(place).clear()
            alive += kill(rng.uniform(0.0, whole / 3))
            names = os.listdir(place) if place.exists() else []
            interrupted += any(name.startswith(".step-") for name in names)
    assert alive
    assert interrupted or trials < 50  # of 200 some fall into a save, else nothing was shown
    same(run(device, place, resume=True, steps=steps, every=1), known, host)
    assert all(name.startswith("step-") for name in os.listdir(place))
