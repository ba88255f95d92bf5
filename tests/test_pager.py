"""The pager against a dictionary, on devices that do what they may as late as they may."""

import gc
import os

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minilora import AdamW, MiniloraError, Parameter, Tensor, module
from minilora.engine.errors import CheckpointError
from minilora.optim.flat import Group
from minilora.optim.page_devices import Copy, FileDevice, SimulatedDevice
from minilora.optim.paged import PagedAdamW
from minilora.optim.pager import Pager


@pytest.fixture(autouse=True)
def host_only(device):
    if device != "cpu":
        pytest.skip("pages of host arrays; those of a card are in test_paging.py")


SHAPE = (2, 3)


class PagerMachine(RuleBasedStateMachine):
    """Random uses, writes, spikes and flushes; the dictionary is always right."""

    make = staticmethod(lambda pages, file: (FileDevice if file else SimulatedDevice)(pages, SHAPE))
    there = here = staticmethod(np.asarray)  # to where the slots are, and back

    @initialize(
        pages=st.integers(1, 6), slots=st.integers(1, 7), ahead=st.integers(0, 3),
        policy=st.sampled_from(["next-use", "lru"]), file=st.booleans(),
    )  # fmt: skip
    def begin(self, pages, slots, ahead, policy, file):
        self.device = self.make(pages, file)
        self.pager = Pager(self.device, pages, slots, policy, ahead)
        self.limit = min(slots, pages)
        self.model = {page: np.zeros(SHAPE, np.float32) for page in range(pages)}
        self.rng = np.random.default_rng(0)

    @rule(page=st.integers(0, 5))
    def write(self, page):
        page %= len(self.model)
        values = self.rng.standard_normal(SHAPE).astype(np.float32)
        array = self.pager.use(page)
        assert np.array_equal(self.here(array), self.model[page])
        self.model[page] = values
        array[...] = self.there(values)
        self.pager.done(page)

    @rule(page=st.integers(0, 5))
    def read(self, page):
        page %= len(self.model)
        assert np.array_equal(self.here(self.pager.use(page, write=False)), self.model[page])
        self.pager.done(page)

    @rule(slots=st.integers(0, 6))
    def shrink(self, slots):
        before = self.pager.slots
        self.pager.shrink(slots)
        assert self.pager.slots == min(before, max(1, slots))

    @rule(slots=st.integers(1, 7))
    def grow(self, slots):
        before = self.pager.slots
        self.pager.grow(slots)
        assert self.pager.slots == max(before, min(slots, len(self.model)))
        self.limit = max(self.limit, min(slots, len(self.model)))

    @rule()
    def flush(self):
        self.pager.flush()
        for page, values in self.model.items():
            assert np.array_equal(self.device.read(page), values)

    @invariant()
    def stays_within_its_budget(self):
        if hasattr(self, "pager"):
            assert 1 <= len(self.device.slots) == self.pager.slots <= self.limit
            slots = [r.slot for r in self.pager.resident.values()]
            assert len(set(slots)) == len(slots)
            assert not set(slots) & set(self.pager.free)


PagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPager = PagerMachine.TestCase


def sweep(pager, times=1):
    for _ in range(times):
        for page in range(pager.pages):
            pager.use(page)[...] = 1
            pager.done(page)


def test_a_changed_page_is_written_once_before_its_slot_is_used_again():
    pager = Pager(SimulatedDevice(5, SHAPE), 5, 2, ahead=0)
    sweep(pager, 3)
    held: dict[int, int] = {}
    for move in pager.log:
        if move.kind == "in":
            assert move.slot not in held
            held[move.slot] = move.page
        elif move.kind == "out":
            assert held.pop(move.slot) == move.page


def test_next_use_moves_less_than_lru():
    """In a sweep the page used longest ago is the one that is needed next."""
    moves = {}
    for policy in ("next-use", "lru"):
        pager = Pager(SimulatedDevice(12, SHAPE), 12, 8, policy, ahead=0)
        sweep(pager, 5)
        moves[policy] = pager.count("in")
    assert moves["lru"] == 60  # every page, every time
    assert moves["next-use"] < 0.7 * moves["lru"]


def belady(uses, slots):
    """How many loads are needed at least, by the textbook: what is used last of all goes."""
    held, loads = set(), 0
    for now, page in enumerate(uses):
        if page not in held:
            loads += 1
            later = uses[now + 1 :]
            if len(held) == slots:
                held.remove(max(held, key=lambda p: later.index(p) if p in later else len(uses)))
            held.add(page)
    return loads


@pytest.mark.parametrize("pages", [1, 2, 5, 12])
def test_next_use_moves_as_little_as_can_be(pages):
    for slots in range(1, pages + 1):
        pager = Pager(SimulatedDevice(pages, SHAPE), pages, slots, "next-use", ahead=0)
        sweep(pager, 5)
        assert pager.count("in") == belady([*range(pages)] * 5, slots)


def test_lru_evicts_what_was_used_longest_ago():
    pager = Pager(SimulatedDevice(3, SHAPE), 3, 2, "lru", ahead=0)
    for page in (0, 1, 0, 2):
        pager.use(page)
        pager.done(page)
    assert list(pager.resident) == [0, 2]


@pytest.mark.parametrize("slots, ahead, there", [
    (4, 0, [3]), (4, 2, [3, 4, 0]), (4, 9, [3, 4, 0, 1]), (2, 9, [3, 4]), (1, 9, [3]),
])  # fmt: skip
def test_the_next_pages_are_on_their_way(slots, ahead, there):
    """As many as there are slots for: none pushes another out."""
    pager = Pager(SimulatedDevice(5, SHAPE), 5, slots, ahead=ahead)
    pager.use(3)
    assert list(pager.resident) == there
    assert pager.count("in") == len(there)


def test_the_log_tells_all_that_happened():
    """At which use, what, to which page, in which slot; what nobody wrote is dropped."""
    pager = Pager(SimulatedDevice(3, SHAPE), 3, 2, ahead=1)
    pager.use(0)
    pager.done(0)
    pager.use(1, write=False)
    pager.done(1)
    pager.shrink(1)
    pager.grow(2)
    assert pager.log == [
        (0, "fault", 0, None), (0, "in", 0, 1), (1, "in", 1, 0),
        (1, "hit", 1, 0), (2, "out", 0, 1), (2, "in", 2, 1),
        (2, "drop", 1, 0), (2, "shrink", None, 0), (2, "grow", None, 0),
    ]  # fmt: skip


def test_the_log_is_the_same_on_every_device():
    logs = []
    for make in (SimulatedDevice, FileDevice):
        pager = Pager(make(7, SHAPE), 7, 3, ahead=2)
        sweep(pager, 2)
        pager.shrink(1)
        sweep(pager)
        pager.grow(4)
        sweep(pager)
        logs.append(pager.log)
    assert logs[0] == logs[1]


def test_everything_that_fits_is_moved_once():
    pager = Pager(SimulatedDevice(4, SHAPE), 4, 4)
    sweep(pager, 5)
    assert (pager.count("in"), pager.count("out")) == (4, 0)


# ----------------------------------------------------------------------- planted mistakes


def test_a_missing_wait_shows():
    class Forgets(SimulatedDevice):
        def wait(self, event):
            pass

    pager = Pager(Forgets(2, SHAPE), 2, 1)
    assert np.isnan(pager.use(0)).all()


def test_a_missing_dependency_shows():
    """A slot that is overwritten before it was written back loses what was in it."""

    class Hasty(SimulatedDevice):
        def copy_in(self, page, slot, after):
            return super().copy_in(page, slot, [])

    device = Hasty(2, SHAPE)
    pager = Pager(device, 2, 1, ahead=0)
    pager.use(0)[...] = 5
    pager.done(0)
    pager.use(1)
    pager.done(1)
    pager.flush()
    assert not (device.read(0) == 5).all()


def test_no_copy_comes_before_the_computation_on_its_slot():
    """Neither the one that writes the page back nor the one that takes the slot of a clean page."""

    class Notes(SimulatedDevice):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.seen = []

        def computed(self):
            return Copy(None, [])  # an event that has come

        def copy_in(self, page, slot, after):
            self.seen.append(("in", page, after))
            return super().copy_in(page, slot, after)

        def copy_out(self, page, slot, after):
            self.seen.append(("out", page, after))
            return super().copy_out(page, slot, after)

    device = Notes(3, SHAPE)
    pager = Pager(device, 3, 1, ahead=0)
    releases = []
    for page in range(3):
        pager.use(page, write=page == 0)
        pager.done(page)
        releases.append(pager.resident[page].release)
    assert [seen[:2] for seen in device.seen] == [("in", 0), ("out", 0), ("in", 1), ("in", 2)]
    assert releases[0] in device.seen[1][2]
    assert releases[1] in device.seen[3][2]


@pytest.mark.parametrize(
    "options", [{"pages": 0}, {"slots": 0}, {"ahead": -1}, {"policy": "random"}]
)
def test_pagers_of_no_meaning(options):
    options = {"pages": 2, "slots": 1, "ahead": 1, "policy": "lru"} | options
    with pytest.raises(MiniloraError, match="expected"):
        Pager(SimulatedDevice(2, SHAPE), **options)


# ------------------------------------------------------------------------ the optimizer


@module
class Three:
    a: Tensor
    b: Tensor
    c: Tensor


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: Parameter(rng.standard_normal(shape, np.float32))
    return Three(draw(13, 7), draw(5), draw(11, 3))


def train(optimizer, steps=4, bad=None, seed=1):
    rng = np.random.default_rng(seed)
    for step in range(steps):
        g = rng.standard_normal(optimizer.flat.data.size, np.float32)
        if step == bad:
            g[3] = np.nan
        optimizer.flat.grad += g
        optimizer.step(divide_by=3, clip=1.0)
    return optimizer.flat.data.tobytes()


@pytest.mark.parametrize("pages", ["simulated", "file"])
@pytest.mark.parametrize("page", [1, 7, 64, 129, 1000])
@pytest.mark.parametrize("budget", [1, 2, None])
@pytest.mark.parametrize("policy", ["next-use", "lru"])
def test_the_numbers_are_those_of_adamw_to_the_bit(pages, page, budget, policy):
    options = {
        "lr": 0.1,
        "weight_decay": 0.1,
        "groups": lambda p, t: Group(2.0 if p == "c" else 1.0),
    }
    plain = AdamW(drawn(), **options)
    n = plain.flat.data.size
    bytes_ = None if budget is None else budget * 2 * min(page, n) * 4
    paged = PagedAdamW(drawn(), page=page, budget=bytes_, pages=pages, policy=policy, **options)
    assert train(plain, bad=2) == train(paged, bad=2)
    a, b = plain.state(), paged.state()
    assert a.keys() == b.keys()
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    assert paged.first_bad() == plain.first_bad()
    if bytes_ is not None:
        assert paged.resident_bytes <= bytes_


def test_a_state_moves_between_the_two():
    plain, paged = AdamW(drawn(), lr=0.1), PagedAdamW(drawn(), lr=0.1, page=16, budget=256)
    train(plain)
    paged.flat.data[...] = plain.flat.data
    paged.restore(plain.state())
    assert train(plain, seed=5) == train(paged, seed=5)
    back = AdamW(drawn(), lr=0.1)
    back.restore(paged.state())
    assert back.m.tobytes() == plain.m.tobytes()


def test_a_spike_is_survived_to_the_bit():
    plain, paged = AdamW(drawn(), lr=0.1), PagedAdamW(drawn(), lr=0.1, page=16)
    train(plain)
    train(paged)
    slots = paged.pager.slots
    paged.pager.shrink(1)
    assert paged.resident_bytes == 2 * 16 * 4
    assert train(plain, seed=2) == train(paged, seed=2)
    paged.pager.grow(slots)
    assert train(plain, seed=3) == train(paged, seed=3)
    paged.pager.shrink(3)
    paged.restore(paged.state())
    assert len(paged.device.slots) == paged.pager.slots == 3  # none is left open by the old pager
    assert train(plain, seed=4) == train(paged, seed=4)


@pytest.mark.parametrize("what", ["pwrite", "preadv"])
@pytest.mark.parametrize("budget", [128, 256, 640])
def test_a_disk_that_fails_makes_it_unusable_until_restored(what, budget, monkeypatch):
    from minilora.optim import page_devices

    paged = PagedAdamW(drawn(), lr=0.1, page=16, budget=budget, pages="file")
    train(paged)
    saved, weights = paged.state(), paged.flat.data.copy()
    with monkeypatch.context() as patch:

        def fail(*arguments):
            raise OSError(28, "No space left on device")

        patch.setattr(page_devices.os, what, fail)
        with pytest.raises(CheckpointError, match=r"No space left.*restore both"):
            train(paged)
    with pytest.raises(CheckpointError, match="restore both"):
        train(paged)
    with pytest.raises(CheckpointError, match="restore both"):
        paged.state()
    paged.flat.data[...] = weights
    paged.flat.grad.fill(0)
    paged.restore(saved)
    assert paged.resident_bytes == budget  # no slot is lost with the page that it held
    other = PagedAdamW(drawn(), lr=0.1, page=16, budget=256)
    other.flat.data[...] = weights
    other.restore(saved)
    assert train(paged, seed=9) == train(other, seed=9)


@pytest.mark.parametrize("what, act", [
    ("pwrite", lambda paged, saved: paged.pager.shrink(1)),  # between steps, where a spike is due
    ("pwrite", lambda paged, saved: paged.state()),
    ("preadv", lambda paged, saved: paged.state()),
    ("pwrite", lambda paged, saved: paged.restore(saved)),
])  # fmt: skip
def test_a_disk_that_fails_outside_a_step(what, act, monkeypatch):
    """A page that is lost in a shrink would otherwise come back from the disk as it once was."""
    from minilora.optim import page_devices

    paged = PagedAdamW(drawn(), lr=0.1, page=16, budget=384, pages="file")
    train(paged)
    saved, weights = paged.state(), paged.flat.data.copy()
    train(paged)

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(page_devices.os, what, fail)
        with pytest.raises(CheckpointError, match=r"Input/output error.*restore both"):
            act(paged, saved)
    before = paged.flat.data.tobytes(), paged.control.tobytes()
    for use in (
        train, PagedAdamW.state, lambda p: p.pager.use(0), lambda p: p.pager.shrink(1),
        lambda p: p.pager.flush(),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="restore both"):
            use(paged)
    assert (
        paged.flat.data.tobytes(),
        paged.control.tobytes(),
    ) == before  # refused before anything is written
    paged.flat.data[...] = weights
    paged.flat.grad.fill(0)
    paged.restore(saved)
    assert paged.resident_bytes == 384
    other = AdamW(drawn(), lr=0.1)
    other.flat.data[...] = weights
    other.restore(saved)
    assert train(paged, seed=9) == train(other, seed=9)


def test_pages_lie_in_the_folder_that_was_asked_for(tmp_path):
    paged = PagedAdamW(drawn(), page=16, budget=256, pages="file", folder=tmp_path)
    assert os.fstat(paged.device.file).st_dev == tmp_path.stat().st_dev
    where = os.readlink(f"/proc/self/fd/{paged.device.file}")
    assert where.startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())  # no name is left there, whatever ends the process
    file = paged.device.file
    del paged
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    with pytest.raises(MiniloraError, match="folder: expected one to write to, found"):
        PagedAdamW(drawn(), page=16, pages="file", folder=tmp_path / "none")


def test_a_short_read_is_no_page(monkeypatch):
    from minilora.optim import page_devices

    paged = PagedAdamW(drawn(), page=16, budget=256, pages="file")
    monkeypatch.setattr(page_devices.os, "preadv", lambda *a: 3)
    with pytest.raises(CheckpointError, match="expected 128 bytes read, found 3"):
        train(paged)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"page": 0}, "page: expected"),
        ({"page": 2.5}, "page: expected a whole number >= 1, found 2.5"),
        ({"budget": 1e9}, "budget: expected a whole number >= 0, found 1000000000.0"),
        ({"ahead": 1.5}, "ahead: expected a whole number >= 0, found 1.5"),
        ({"page": 16, "budget": 100}, "at least one page of 128 bytes, found 100"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), found \(0.9, 1.0\)"),
        ({"pages": "tape"}, "simulated, file, cuda; found 'tape'"),
        ({"folder": "."}, "expected pages=\"file\" beside it, found 'simulated'"),
    ],
)
def test_what_a_paged_optimizer_refuses(options, message):
    with pytest.raises(MiniloraError, match=message):
        PagedAdamW(drawn(), **options)


def test_state_larger_than_its_memory_lives_in_a_file():
    paged = PagedAdamW(drawn(), page=8, budget=64, pages="file")
    assert paged.resident_bytes == 64
    assert paged.pager.pages * paged.page_bytes > 10 * paged.resident_bytes
