"""Pages on a card (here, on the stand-in), and the spike that paging survives."""

import json

import numpy as np
import pytest
import test_pager as shared
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from minilora import AdamW, MiniloraError, to_device
from minilora.cli import main
from minilora.engine.errors import CheckpointError
from minilora.lab import paging as lab
from minilora.optim.page_devices import CupyDevice, SimulatedDevice
from minilora.optim.paged import PagedAdamW
from minilora.optim.pager import Pager

SHAPE = shared.SHAPE


@pytest.fixture
def card(device):
    if device != "cuda":
        pytest.skip("needs a device or its stand-in")


@pytest.fixture
def host_only(device):
    if device != "cpu":
        pytest.skip("runs on the host")


# ------------------------------------------------------------------------------ on a card


def test_the_machine_of_random_uses_on_a_card(card, dev, host):
    """Pinned memory and two streams; on the stand-in a copy runs as late as is legal."""

    class Machine(shared.PagerMachine):
        make = staticmethod(lambda pages, file: CupyDevice(pages, SHAPE))
        there, here = staticmethod(dev), staticmethod(host)

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )


def train(optimizer, dev, steps=4, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        optimizer.flat.grad[...] = dev(rng.standard_normal(optimizer.flat.data.size, np.float32))
        optimizer.step(divide_by=3, clip=1.0)
    return optimizer.flat.data


@pytest.mark.parametrize("page", [1, 7, 64, 1000])
@pytest.mark.parametrize("budget", [1, 2, None])
def test_the_numbers_on_a_card_are_those_of_adamw_to_the_bit(card, device, dev, host, page, budget):
    tree = to_device(shared.drawn(), device)
    plain = AdamW(tree, lr=0.1, weight_decay=0.1)
    bytes_ = None if budget is None else budget * 8 * min(page, plain.flat.data.size)
    paged = PagedAdamW(tree, lr=0.1, weight_decay=0.1, page=page, budget=bytes_)
    assert isinstance(paged.device, CupyDevice)
    assert host(train(plain, dev)).tobytes() == host(train(paged, dev)).tobytes()
    a, b = plain.state(), paged.state()
    assert a.keys() == b.keys()
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    other = PagedAdamW(tree, lr=0.1, weight_decay=0.1, page=page, budget=bytes_)
    other.flat.data[...] = paged.flat.data
    train(other, dev)  # its pages are dirty when the state comes
    other.flat.data[...] = paged.flat.data
    other.restore(b)
    assert host(train(other, dev, seed=2)).tobytes() == host(train(plain, dev, seed=2)).tobytes()


def test_the_log_on_a_card_is_that_of_the_simulated_device(card):
    logs = []
    for make in (SimulatedDevice, CupyDevice):
        pager = Pager(make(7, SHAPE), 7, 3, ahead=2)
        shared.sweep(pager, 2)
        pager.shrink(1)
        shared.sweep(pager)
        pager.grow(4)
        shared.sweep(pager)
        logs.append(pager.log)
    assert logs[0] == logs[1]


def test_a_step_on_a_card_never_waits_for_it(card, device, dev, xp):
    if "standin" not in xp.__version__:
        pytest.skip("counted on the stand-in alone")
    from standin import no_sync

    paged = PagedAdamW(to_device(shared.drawn(), device), lr=0.1, page=16, budget=256)
    with no_sync():
        train(paged, dev)
    assert paged.pager.count("out") > 0
    used = [r for r in paged.pager.resident.values() if r.used >= 0]
    assert used
    assert all(r.release is not None for r in used)  # what a copy to come waits for


def test_a_missing_wait_shows_on_a_card(card, host):
    class Forgets(CupyDevice):
        def wait(self, event):
            pass

    assert np.isnan(host(Pager(Forgets(2, SHAPE), 2, 1).use(0))).all()


def test_a_missing_dependency_shows_on_a_card(card):
    class Hasty(CupyDevice):
        def order(self, stream, after):
            pass

    device = Hasty(2, SHAPE)
    pager = Pager(device, 2, 1, ahead=0)
    pager.use(0)[...] = 5
    pager.done(0)
    pager.use(1)
    pager.done(1)
    pager.flush()
    assert not (device.read(0) == 5).all()


def test_a_card_that_fails_loses_the_state(card, device, dev, monkeypatch):
    paged = PagedAdamW(to_device(shared.drawn(), device), lr=0.1, page=16, budget=256)
    train(paged, dev)

    def fail(*arguments, **options):
        raise RuntimeError("cudaErrorIllegalAddress")  # CuPy's errors are RuntimeErrors

    monkeypatch.setattr(paged.device, "copy_in", fail)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"IllegalAddress.*restore both"):
            train(paged, dev)


# ----------------------------------------------------------------------------- the spike


def test_a_long_sequence_bursts_the_budget_unpaged_and_not_paged(host_only, tmp_path):
    config = lab.PagingConfig(steps=4, spike=2)
    record = json.loads(json.dumps(lab.paging(config)))
    assert record["unpaged_fails_at"] == 2
    over = [s["step"] for s in record["steps"] if s["unpaged"] > record["budget"]]
    assert over == [2]
    assert all(s["paged"] <= record["budget"] for s in record["steps"])
    assert record["equal"] is True
    kinds = [move[1] for move in record["log"]]
    assert kinds.count("shrink") == kinds.count("grow") > 0
    assert kinds.count("out") > 0
    assert all(a[0] <= b[0] for a, b in zip(record["log"], record["log"][1:], strict=False))
    text = lab.paging_report(record)
    assert "Unpaged, step 2 does not fit" in text
    assert "equal to the bit" in text
    path = lab.paging_figure(record, tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_its_record(host_only, tmp_path, capsys):
    assert main(["paging", "--json", "--out", str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    record = json.loads(out)
    assert record["equal"]
    assert record == json.loads((tmp_path / "paging.json").read_text())
    assert "paging.png" in error


def test_no_page_fits_a_spike_of_no_measure(host_only):
    with pytest.raises(MiniloraError, match="expected room for one page"):
        lab.paging(lab.PagingConfig(width=32, steps=2, spike=1, long=600, page=4096))


def test_the_rank_from_which_bitsandbytes_pages_a_factor():
    """1e5 entries: r = 24 at width 4096 has 98,304, r = 25 has 102,400."""
    assert {width: lab.least_rank(width) for width in (4096, 11008)} == {4096: 25, 11008: 10}
    for width in (768, 4096, 8192, 11008):
        r = lab.least_rank(width)
        assert (r - 1) * width < 100_000 <= r * width
