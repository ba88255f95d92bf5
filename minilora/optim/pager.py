"""Optimizer state that does not fit: pages, a few slots for them, and a log of every move.

The `Pager` decides; a device copies (`page_devices.py`).  What it decides depends on the order
of uses alone, so that the log is the same on every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..engine.errors import CheckpointError, MiniloraError, expect_whole

POLICIES = ("next-use", "lru")


class Move(NamedTuple):
    """One line of the log: at which use, what happened, to which page, in which slot."""

    clock: int
    kind: str  # "hit", "fault", "in", "out", "drop", "shrink", "grow"
    page: int | None
    slot: int | None


class Device(Protocol):
    """What executes copies.  An event is what a later copy, or the computation, can wait for."""

    def open(self, slot: int) -> None:
        """Give a slot memory, with unspecified content."""
        ...

    def close(self, slot: int) -> None:
        """Give a slot's memory back; nothing is pending on it."""
        ...

    def array(self, slot: int) -> Any:
        """The slot's memory, for the computation."""
        ...

    def copy_in(self, page: int, slot: int, after: list) -> Any:
        """Start reading a page once the events `after` have come; the event of its arrival."""
        ...

    def copy_out(self, page: int, slot: int, after: list) -> Any:
        """Start writing a page back; the event of its being written."""
        ...

    def computed(self) -> Any:
        """The event of all computation issued so far."""
        ...

    def wait(self, event: Any) -> None:
        """Let the computation to come wait for an event."""
        ...


@dataclass
class Resident:
    """A page that has a slot."""

    slot: int
    arrival: Any  # event
    release: Any = None  # event of the last computation on it
    dirty: bool = False
    used: int = -1  # clock of its last use


class Pager:
    """`pages` pages in `slots` slots; `use` makes one resident and waits for it.

    The pages are used in sweeps 0, 1, ..., pages - 1, over and over: so the next use of each is
    known, and "next-use" evicts the page that is needed last (Belady 1966).  "lru" evicts the
    one used longest ago, which in a sweep is the very page that is needed next.  While a page
    is computed on, the `ahead` next ones are on their way, as far as slots go.
    Errors: `CheckpointError` from the copy that fails on, for ever: a page is lost.
    """

    def __init__(
        self, device: Device, pages: int, slots: int, policy: str = "next-use", ahead: int = 1
    ):
        if policy not in POLICIES:
            raise MiniloraError(f"policy: expected one of {', '.join(POLICIES)}; found {policy!r}")
        for name, value, least in (("pages", pages, 1), ("slots", slots, 1), ("ahead", ahead, 0)):
            expect_whole(f"pager: {name}", value, least)
        self.device, self.pages, self.policy, self.ahead = device, pages, policy, ahead
        self.resident: dict[int, Resident] = {}
        self.free: dict[int, Any] = {}  # slot: event after which it may be overwritten
        self.written: dict[int, Any] = {}  # page: event of its last write-back
        self.clock = self.now = 0
        self.log: list[Move] = []
        self.lost: str | None = None  # why the pages cannot be used, if they cannot
        for slot in range(min(slots, pages)):
            device.open(slot)
            self.free[slot] = None

    @property
    def slots(self) -> int:
        """How many there are now."""
        return len(self.free) + len(self.resident)

    def use(self, page: int, write: bool = True) -> Any:
        """The memory of `page`, arrived; the next ones are fetched behind it."""
        self.expect_all()
        self.now = page
        found = self.resident.get(page)
        self.note("hit" if found else "fault", page, found.slot if found else None)
        if found is None:
            found = self.fetch(page, keep={page})
        self.moved(self.device.wait, found.arrival)
        found.used, found.dirty = self.clock, found.dirty or write
        self.clock += 1
        keep = {page}
        for other in ((page + i) % self.pages for i in range(1, self.ahead + 1)):
            keep.add(other)
            if other not in self.resident and (self.free or self.resident.keys() - keep):
                self.fetch(other, keep)
        return self.device.array(found.slot)

    def done(self, page: int) -> None:
        """The computation on `page` has been issued."""
        self.resident[page].release = self.device.computed()

    def fetch(self, page: int, keep: set[int]) -> Resident:
        """Find a slot, evicting a page that is not in `keep`, and start the copy."""
        if not self.free:
            self.evict(self.victim(keep))
        slot, ready = self.free.popitem()
        after = [event for event in (ready, self.written.get(page)) if event is not None]
        self.note("in", page, slot)
        arrival = self.moved(self.device.copy_in, page, slot, after)
        self.resident[page] = Resident(slot, arrival)
        return self.resident[page]

    def victim(self, keep: set[int]) -> int:
        """The page to give up its slot: not one of `keep`."""
        candidates = [page for page in self.resident if page not in keep]
        if self.policy == "lru":
            return min(candidates, key=lambda page: self.resident[page].used)
        # Sweeps go round: the page after the one in use is next, the one in use comes last.
        return max(candidates, key=lambda page: (page - self.now - 1) % self.pages)

    def evict(self, page: int) -> None:
        """Free the slot of a page: written back if it was changed, dropped if not."""
        gone = self.resident.pop(page)
        waits = [event for event in (gone.arrival, gone.release) if event is not None]
        if gone.dirty:
            self.note("out", page, gone.slot)
            self.written[page] = self.moved(self.device.copy_out, page, gone.slot, waits)
            self.free[gone.slot] = self.written[page]
        else:
            self.note("drop", page, gone.slot)
            self.free[gone.slot] = gone.release or gone.arrival

    def shrink(self, slots: int) -> None:
        """Give memory back until `slots` are left, at least one: a spike needs it elsewhere."""
        self.expect_all()
        while self.slots > max(1, slots):
            if not self.free:
                self.evict(self.victim(set()))
            slot, ready = self.free.popitem()
            if ready is not None:
                self.moved(self.device.wait, ready)
            self.device.close(slot)
            self.note("shrink", None, slot)

    def grow(self, slots: int) -> None:
        """Take memory for as many as `slots` slots again."""
        taken = {r.slot for r in self.resident.values()} | set(self.free)
        for slot in range(self.pages):
            if self.slots >= min(slots, self.pages):
                return
            if slot not in taken:
                self.device.open(slot)
                self.free[slot] = None
                self.note("grow", None, slot)

    def flush(self) -> None:
        """Write every changed page back, and wait; all slots are free then."""
        self.expect_all()
        for page in sorted(self.resident):
            self.evict(page)
        for event in [*self.written.values(), *self.free.values()]:
            if event is not None:
                self.moved(self.device.wait, event)

    def moved(self, copy: Callable, *arguments: Any) -> Any:
        """What the device returns.  Where it fails, what was under way is lost, here and now."""
        try:
            return copy(*arguments)
        except (OSError, RuntimeError, CheckpointError) as error:  # CuPy's are RuntimeErrors
            self.lost = f"{type(error).__name__}: {error}"
            raise self.loss() from error

    def expect_all(self) -> None:
        if self.lost is not None:
            raise self.loss()

    def loss(self) -> CheckpointError:
        return CheckpointError(
            f"pager: a page could not be moved ({self.lost}); parameters and moments no longer "
            "belong together: restore both from a checkpoint"
        )

    def note(self, kind: str, page: int | None, slot: int | None) -> None:
        self.log.append(Move(self.clock, kind, page, slot))

    def count(self, kind: str) -> int:
        """How often something happened."""
        return sum(move.kind == kind for move in self.log)
