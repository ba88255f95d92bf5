"""Processes in step: sums and rows of all of them, in one order, however they hurry."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from minilora.engine.errors import MiniloraError
from minilora.engine.forked import Forked
from minilora.engine.rules import reference_rules
from minilora.engine.team import Team, all_gather, all_reduce

pytestmark = pytest.mark.usefixtures("where_it_forks", "in_a_minute")


def in_step(size, function, slot=1 << 20):
    """[function(team)] of the processes of a team."""
    team = Team(size, slot)
    team.gather()
    with Forked(size - 1, lambda: function(team), lambda copy: team.begin(copy + 1)) as copies:
        for copy in range(size - 1):
            copies.ask(copy)
        team.watch = lambda rank: copies.left(rank - 1)
        return [function(team), *copies.results()]


def of(rank, shape, dtype):
    return np.random.default_rng(rank).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 40, 7), (0, 4)])
def test_a_sum_is_added_in_the_order_of_the_ranks(size, shape, dtype):
    """In one slot and over several; the same bytes everywhere, and nobody's array is changed."""

    def add(team):
        y = of(team.rank, shape, dtype)
        kept = y.copy()
        total = all_reduce(y, team=team)
        assert np.array_equal(y, kept)
        prepared = all_reduce.prepared["numpy"](y, team=team)
        if prepared is not NotImplemented:
            assert prepared(y).tobytes() == total.tobytes()
        with reference_rules():
            assert all_reduce(y, team=team).tobytes() == total.tobytes()
        return total

    wanted = of(0, shape, dtype)
    for rank in range(1, size):
        wanted = wanted + of(rank, shape, dtype)
    for found in in_step(size, add, slot=1024):
        assert (found.dtype, found.shape) == (dtype, shape)
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("widths", [(4,), (3, 2), (5, 0, 6)])
@pytest.mark.parametrize("shape", [(2, 1), (30, 11)])
def test_rows_are_put_side_by_side(widths, shape):
    def gather(team):
        return all_gather(
            of(team.rank, (*shape, widths[team.rank]), np.float32), team=team, widths=widths
        )

    wanted = np.concatenate([of(r, (*shape, w), np.float32) for r, w in enumerate(widths)], -1)
    for found in in_step(len(widths), gather, slot=256):
        np.testing.assert_array_equal(found, wanted)


def test_who_hurries_overwrites_nothing():
    """Each waits at other places; what was read is what was written for that turn."""

    def many(team):
        rng, seen = np.random.default_rng(team.rank), []
        for turn in range(300):
            if rng.random() < 0.1:
                time.sleep(rng.random() * 2e-3)
            shares = team.exchange(np.full(3, 1000 * team.rank + turn, np.float64))
            if rng.random() < 0.1:
                time.sleep(rng.random() * 2e-3)
            seen.append(shares[:, 0].tolist())
        return seen

    wanted = [[turn, 1000 + turn, 2000 + turn] for turn in range(300)]
    assert in_step(3, many) == [wanted] * 3


@pytest.mark.parametrize("way", ["dies", "raises", "returns"])
def test_nobody_waits_for_one_that_does_not_come(way):
    def leave(team):
        if team.rank == 1:
            if way == "dies":
                os._exit(3)
            if way == "raises":
                raise ZeroDivisionError("alone")
            return
        team.meet()

    error = ZeroDivisionError if way == "raises" else MiniloraError
    with pytest.raises(error, match={"dies": "ended with 3", "raises": "alone"}.get(way, "ended")):
        in_step(3, leave)


def test_who_came_and_left_has_come():
    """It may do both after the waiting has timed out, before anybody asks where it is."""
    team = Team(2)
    team.gather()

    def come_late():
        time.sleep(1.2)
        team.meet()

    with Forked(1, come_late, lambda copy: team.begin(1)) as copies:

        def asked_late(rank):
            time.sleep(0.7)
            return copies.left(rank - 1)

        team.watch = asked_late
        copies.ask(0)
        team.meet()
        assert copies.results() == [None]


def test_one_death_ends_the_wait_for_the_answer_of_another():
    """Rank 2 has come for rank 0, and dies before it does for rank 1."""

    def die_between(team):
        if team.rank == 2:
            team.come[0]()
            os._exit(5)
        team.meet()

    with pytest.raises(MiniloraError, match="ended with 5"):
        in_step(3, die_between)
    with pytest.raises(MiniloraError, match="ended with 5"):
        in_step(3, lambda team: [die_between(team), team.meet()])


def test_copies_that_wait_end_with_the_process_that_made_them():
    script = """if True:
        import time
        from minilora.engine.forked import Forked
        from minilora.engine.team import Team
        team = Team(3)
        team.gather()
        forked = Forked(2, team.meet, lambda copy: team.begin(copy + 1))
        forked.ask(0)
        forked.ask(1)
        print("asked", flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout.readline() == "asked\n"
        parent.kill()
        assert parent.stderr.read() == ""  # until the last copy has closed it
