"""Processes in step: what each has worked out, they add up or put side by side in shared memory."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NoReturn

import numpy as np

from .forked import shared_zeros
from .rules import rule

Watch = Callable[[int], Callable[[], NoReturn] | None]
SPINS = 2000  # looks, some 0.1 ms of them, before a process that waits is put to sleep
SLOT = 1 << 20  # bytes that one process hands over at a time


class Team:
    """`size` processes that make the same calls in the same order.  `rank` says which this is.

    Made by the first of them, which calls `gather` and forks the others; each calls `begin`.
    Who waits looks again and again: to sleep and be woken costs either side some 5 us more, and
    a token has two meetings a layer.  Of a longer wait `watch(rank)` is asked every second
    whether that one can still come; if not, it gives a function that says why and raises.
    """

    def __init__(self, size: int, slot: int = SLOT):
        self.size, self.rank, self.turn = size, 0, 0
        # Two: an array written into one is read until all have met over the other.
        self.slots = [shared_zeros(np.zeros((size, -(-slot // 8)))) for _ in range(2)]
        self.come: list[Callable] = []  # tell each of the others that this one is here
        self.has_come: list[tuple[int, Callable]] = []  # ask whether one of them is
        self.watch: Watch = lambda rank: None

    def gather(self) -> None:
        """Before the others are forked: nobody has come yet."""
        from multiprocessing import get_context

        fork, ranks = get_context("fork"), range(self.size)
        self.first = os.getpid()
        self.doors = [[fork.Semaphore(0) for _ in ranks] for _ in ranks]  # [of whom][for whom]
        self.begin(0)

    def begin(self, rank: int) -> None:
        """From here on this process is the one of that rank."""
        self.rank, self.turn = rank, 0
        if rank:
            self.watch = self.first_lives
        others = [other for other in range(self.size) if other != rank]
        self.come = [self.doors[rank][other].release for other in others]
        self.has_come = [(other, self.doors[other][rank].acquire) for other in others]

    def first_lives(self, rank: int) -> Callable[[], NoReturn] | None:
        """A process that was forked ends with the one that forked it."""
        return None if os.getppid() == self.first else partial(sys.exit, 1)

    def meet(self) -> None:
        """Go on when all are here; what each wrote before, all can read."""
        for come in self.come:
            come()
        for rank, has_come in self.has_come:
            for _ in range(SPINS):
                if has_come(False):
                    break
            else:
                while not has_come(True, 1.0):
                    why = self.watch(rank)
                    if has_come(False):  # and left, before we asked
                        break
                    if why is not None:
                        why()

    def exchange(self, flat: np.ndarray) -> np.ndarray:
        """(size, at least n): the array (n,) of each, as it is until the exchange after next."""
        slots = self.slots[self.turn].view(flat.dtype)
        self.turn = 1 - self.turn
        slots[self.rank, : len(flat)] = flat
        self.meet()
        return slots

    def added(self, flat: np.ndarray) -> np.ndarray:
        """Σ of the array (n,) of each, in the order of their ranks."""
        n, shares = len(flat), self.exchange(flat)
        total = shares[0, :n].copy()
        for share in shares[1:]:
            total += share[:n]
        return total

    def cuts(self, count: int, bytes_of_one: int) -> list[slice]:
        """0..count in stretches that fit a slot."""
        most = self.slots[0][0].nbytes // bytes_of_one
        return [slice(start, min(start + most, count)) for start in range(0, count, most)]


@rule
def all_reduce(xp: Any, y: Any, *, team: Team) -> Any:
    """Σ over a team's processes of what each has as y, added in the order of their ranks."""
    flat, total = y.reshape(-1), np.empty(y.size, y.dtype)
    for cut in team.cuts(y.size, y.itemsize):
        total[cut] = team.added(flat[cut])
    return total.reshape(y.shape)


@rule
def all_gather(xp: Any, y: Any, *, team: Team, widths: Sequence[int]) -> Any:
    """(..., Σ widths): what each process of a team has as y (..., its width), side by side."""
    rows = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])  # a width may be 0
    whole = np.empty((len(rows), sum(widths)), y.dtype)
    columns = [slice(a, b) for a, b in pairwise(accumulate(widths, initial=0))]
    for cut in team.cuts(len(rows), max(widths) * y.itemsize):
        shares = team.exchange(rows[cut].reshape(-1))
        n = cut.stop - cut.start
        for share, width, column in zip(shares, widths, columns, strict=True):
            whole[cut, column] = share[: n * width].reshape(n, width)
    return whole.reshape(*y.shape[:-1], sum(widths))
