"""A captured step gives the eager step's numbers, from one launch, and says why where it cannot.

On the stand-in a capture records; with `--device cuda` the same tests capture on the card.
"""

import sys
import warnings

import numpy as np
import pytest
import standin
from cuda_cpu import fakeblas, fakegraph
from cuda_cpu.checks import kernels, with_a_mistake  # noqa: F401

from minilora import AdamW, Data, Parameter, TransformerConfig, adapt, fit, init_transformer
from minilora.engine.backend import to_device, to_numpy
from minilora.engine.errors import MiniloraError
from minilora.engine.fused import dropout
from minilora.engine.loss import cross_entropy
from minilora.fast import capture
from minilora.model.layers import Net, init_linear
from minilora.model.module import to_device as tree_to_device

RNG = np.random.default_rng


@pytest.fixture(scope="module", autouse=True)
def tape(request):
    """The state of the fake; None on a card."""
    if request.config.getoption("device") == "cuda":
        request.getfixturevalue("device")
        yield None
        return
    with fakeblas.installed() as library, fakegraph.installed(sys.modules["cupy"], library) as tape:
        yield tape


@pytest.fixture
def fake(tape):
    if tape is None:
        pytest.skip("for the fake")
    return tape


def squares(model, batch, rng):
    gap = model(batch["x"]) - batch["y"]
    return (gap * gap).sum()


def trainer(device="cuda"):
    rng = RNG(0)
    net = Net((init_linear(6, 16, rng, std=0.4, bias=True),
               init_linear(16, 3, rng, std=0.4, bias=True)))  # fmt: skip
    adapted = adapt(net, rank=2, rng=rng)
    optimizer = AdamW(tree_to_device(adapted, device), lr=0.05)
    optimizer.flat.data += to_device(RNG(1).normal(0, 0.1, optimizer.flat.data.shape)
                                     .astype(np.float32), device)  # fmt: skip
    return optimizer


def batches(count, rows=(70,), device="cuda"):
    rng = RNG(2)
    for i in range(count):
        n = rows[i % len(rows)]
        yield {
            "x": to_device(rng.standard_normal((n, 6), np.float32), device),
            "y": to_device(rng.standard_normal((n, 3), np.float32), device),
        }


def stepped(step, count=7, rows=(70,), divide=lambda i: 10.0 + i):
    """Losses and the last parameters; the learning rate and the divisor change on the way."""
    losses = []
    for i, batch in enumerate(batches(count, rows)):
        step.optimizer.set_lr(0.05 / (i + 1))
        losses.append(float(step.run(batch, divide(i))))
    return losses, to_numpy(step.optimizer.flat.data).tobytes()


def uncaptured(optimizer, loss, clip=None):
    step = capture.CapturedStep(optimizer, loss, clip)
    step.captures = False
    return step


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("rows", [(70,), (70, 80)])
def test_the_numbers_are_those_of_the_eager_step(rows, clip):
    step = capture.CapturedStep(trainer(), squares, clip)
    assert stepped(step, 9, rows) == stepped(uncaptured(trainer(), squares, clip), 9, rows)
    assert len(step.graphs) == len(rows)
    assert step.eager == {}


def test_they_are_close_to_those_of_a_step_that_divides_at_the_end():
    losses, _ = stepped(capture.CapturedStep(trainer(), squares, 0.05))
    optimizer, wanted = trainer("cpu"), []
    for i, batch in enumerate(batches(7, device="cpu")):
        optimizer.set_lr(0.05 / (i + 1))
        value = squares(optimizer.model, batch, None)
        value.backward(into=optimizer.gradients)
        optimizer.step(divide_by=10.0 + i, clip=0.05)
        wanted.append(float(value.data))
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)


def accumulated(step, count=7, parts=(30, 40), divide=lambda i: 10.0 + i):
    """As `stepped`, each step in parts; the losses of all parts."""
    losses = []
    for i, batch in enumerate(batches(count, (sum(parts),))):
        step.optimizer.set_lr(0.05 / (i + 1))
        start = 0
        for rows in parts:
            part = {name: a[start : start + rows] for name, a in batch.items()}
            start += rows
            losses.append(float(step.run(part, divide(i), last=start == sum(parts))))
    return losses, to_numpy(step.optimizer.flat.data).tobytes()


@pytest.mark.parametrize("parts", [(35, 35), (30, 40), (20, 25, 25)])
def test_a_step_in_parts_is_the_eager_step_and_close_to_the_whole_one(parts):
    step = capture.CapturedStep(trainer(), squares, 0.05)
    found = accumulated(step, parts=parts)
    assert found == accumulated(uncaptured(trainer(), squares, 0.05), parts=parts)
    assert len({graph.pool for graph in step.graphs.values()}) == 1
    whole = capture.CapturedStep(trainer(), squares, 0.05)
    stepped(whole)
    np.testing.assert_allclose(
        to_numpy(step.optimizer.flat.data), to_numpy(whole.optimizer.flat.data), rtol=1e-4,
        atol=1e-6,
    )  # fmt: skip


def test_a_step_in_parts_is_one_launch_a_part(fake):
    step = capture.CapturedStep(trainer(), squares)
    given = [{name: a[:35] for name, a in batch.items()} for batch in batches(5)]
    for batch in given[:3]:
        for last in (False, True):
            step.run(batch, 70, last=last)
    with standin.no_sync():
        standin.reset()
        before = fake.launches
        step.run(given[3], 70, last=False)
        step.run(given[4], 70)
        assert fake.launches == before + 2
        assert (standin.stats.h2d, standin.stats.d2h, standin.stats.allocations) == (0, 0, 0)
        assert standin.stats.launches == 8  # 1/divide_by, x, y, the graph, twice


def test_a_step_is_one_launch_and_what_fills_its_buffers(fake):
    step = capture.CapturedStep(trainer(), squares)
    given = list(batches(5))
    for batch in given[:3]:
        step.run(batch, 70)
    with standin.no_sync():
        standin.reset()
        before = fake.launches
        step.optimizer.set_lr(0.01)
        step.run(given[3], 70)
        assert fake.launches == before + 1
        assert (standin.stats.h2d, standin.stats.d2h, standin.stats.allocations) == (0, 0, 0)
        assert standin.stats.launches == 5  # lr, 1/divide_by, x, y, the graph


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_found():
    step = capture.CapturedStep(trainer(), squares)
    given = list(batches(5))
    for batch in given[:4]:
        step.run(batch, 70)
    before = to_numpy(step.optimizer.flat.data).copy()
    given[4]["y"].fill(np.inf)
    step.run(given[4], 70)
    np.testing.assert_array_equal(to_numpy(step.optimizer.flat.data), before)
    call, _ = step.optimizer.first_bad()
    assert call == 5


def with_dropout(model, batch, rng):
    return squares(model, batch | {"x": dropout(batch["x"], rate=0.5, rng=rng)}, rng)


def waiting(model, batch, rng):
    value = squares(model, batch, rng)
    float(value.data)
    return value


def by_cupy(model, batch, rng):
    return squares(model, batch, rng) + (batch["x"].T @ batch["x"]).sum() * 1e-3


def from_the_host(model, batch, rng):
    return squares(model, batch, rng) + to_device(np.ones((1, 1), np.float32), "cuda").sum()


def test_a_loss_with_dropout_stays_eager():
    step = capture.CapturedStep(trainer(), with_dropout)
    for i, batch in enumerate(batches(5)):
        step.run(batch, 70, RNG(i))
    assert step.graphs == {}
    assert list(step.eager.values()) == ["the loss draws random numbers"]


@pytest.mark.parametrize("loss", [waiting, by_cupy, from_the_host])
def test_what_a_capture_refuses_stays_eager_with_a_warning(loss):
    step = capture.CapturedStep(trainer(), loss)
    with pytest.warns(UserWarning, match="was not captured and stays eager"):
        found = stepped(step)
    assert step.graphs == {}
    assert len(step.eager) == 1
    assert found == stepped(uncaptured(trainer(), loss))


PLANTED = {
    "the batch is not copied": ("fixed[name][...] = array",
                                "fixed[name][...] = array if part.graph is None else fixed[name]"),
    "the divisor is part of the graph": ("value.backward(self.start.reshape(value.shape),",
                                         "value.backward(self.start * 0 + 1 / 11.0,"),
    "every part makes a step": ("        if last:\n", "        if True:\n"),
    "no part makes a step": ("        if last:\n", "        if False:\n"),
    "the last part has the graph of the others": ("key = (last, *(", "key = (0, *("),
    "another value is returned": ("self.value = function()",
                                                 "self.value = function().copy() * 0"),
    "the graph is not launched": ("        self.graph.launch()\n", "        pass\n"),
    "no end to the capture": ("self.graph = stream.end_capture()", "self.graph = None"),
}  # fmt: skip


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_caught(name, fake):
    wrong = with_a_mistake(capture, *PLANTED[name])
    wanted = (
        stepped(uncaptured(trainer(), squares, 0.05)),
        accumulated(uncaptured(trainer(), squares, 0.05), parts=(35, 35)),
    )
    try:
        found = stepped(wrong.CapturedStep(trainer(), squares, 0.05))
        in_parts = accumulated(wrong.CapturedStep(trainer(), squares, 0.05), parts=(35, 35))
    except (AttributeError, RuntimeError):
        found = in_parts = None
    fake.steps = None
    assert (found, in_parts) != wanted


# --------------------------------------------------------------------------------- fit


def examples():
    rng = RNG(4)
    return Data({"x": rng.standard_normal((160, 6), np.float32),
                 "y": rng.standard_normal((160, 3), np.float32)})  # fmt: skip


def fitted(step=None, optimizer=None, **options):
    optimizer = step.optimizer if step is not None else optimizer
    options |= {} if step is None else {"advance": step}
    options = {"steps": 8, "batch": 70, "every": 4, "clip": 0.5} | options
    result = fit(optimizer, squares, examples(), schedule=lambda s: 1 / (1 + s), **options)
    return [entry["loss"] for entry in result.history]


def test_fit_takes_it_as_an_argument():
    step = capture.CapturedStep(trainer(), squares, 0.5)
    captured = fitted(step)
    assert len(step.graphs) == 1
    assert captured == fitted(uncaptured(trainer(), squares, 0.5))
    np.testing.assert_allclose(captured, fitted(optimizer=trainer()), rtol=1e-4)


def test_on_the_host_it_stays_eager_and_right():
    step = capture.CapturedStep(trainer("cpu"), squares, 0.5)
    np.testing.assert_allclose(fitted(step), fitted(optimizer=trainer("cpu")), rtol=1e-4)
    assert list(step.eager.values()) == ["numpy captures nothing"]


@pytest.mark.parametrize("batch, accumulate, graphs", [(70, 2, 2), (72, 3, 2), (70, 3, 3)])
def test_fit_in_micro_batches(batch, accumulate, graphs):
    """70 = 24 + 23 + 23: three graphs, of which one makes the step."""
    options = {"batch": batch, "accumulate": accumulate}
    step = capture.CapturedStep(trainer(), squares, 0.5)
    captured = fitted(step, **options)
    assert len(step.graphs) == graphs
    assert sum(last for last, *_ in step.graphs) == 1
    eager = uncaptured(trainer(), squares, 0.5)
    assert captured == fitted(eager, **options)
    assert to_numpy(step.optimizer.flat.data).tobytes() == to_numpy(
        eager.optimizer.flat.data).tobytes()  # fmt: skip
    np.testing.assert_allclose(captured, fitted(optimizer=trainer(), **options), rtol=1e-4)


def test_fit_with_another_loss_or_more_shards_is_refused():
    step = capture.CapturedStep(trainer(), squares, 0.5)
    with pytest.raises(MiniloraError, match="optimizer, loss and clip"):
        fitted(step, clip=1.0)
    with pytest.raises(MiniloraError, match="shards = 1"):
        fitted(step, shards=2)


# -------------------------------------------------------------------------- a transformer


def whole(model, batch, rng):
    return cross_entropy(model(batch["ids"]), targets=batch["targets"])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_a_transformer_is_captured_with_its_kernels(style):
    shape = {"vocab": 50, "width": 32, "layers": 1, "heads": 4, "context": 40}
    config = TransformerConfig.gpt2(**shape) if style == "gpt2" else TransformerConfig(**shape)

    def run(captures):
        model = adapt(init_transformer(config, RNG(3), 0.1), rank=4, rng=RNG(0))
        optimizer = AdamW(tree_to_device(model, "cuda"), lr=1e-2)
        step = capture.CapturedStep(optimizer, whole, 1.0)
        step.captures &= captures
        losses = []
        for i in range(5):
            ids, targets = RNG(i).integers(0, 50, (2, 2, 33))
            batch = {"ids": to_device(ids, "cuda"), "targets": to_device(targets, "cuda")}
            with warnings.catch_warnings(action="error"):
                losses.append(float(step.run(batch, 66)))
        assert len(step.graphs) == captures
        assert isinstance(next(iter(optimizer.gradients)), Parameter)
        return losses, to_numpy(optimizer.flat.data).tobytes()

    assert run(True) == run(False)
