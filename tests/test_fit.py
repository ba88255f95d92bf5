"""One loop: the same sums however a batch is cut, and every way in which a run can end."""

import os
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import (
    SGD,
    AdamW,
    Data,
    MiniloraError,
    TransformerConfig,
    adapt,
    evaluate,
    fit,
    freeze,
    get_task,
    init_transformer,
    schedule,
    to_device,
)
from minilora.engine.errors import NumericsError
from minilora.engine.loss import IGNORE
from minilora.engine.tensor import op
from minilora.model.module import cast
from minilora.train.data import Order
from minilora.train.task import squared_error

CONFIG = TransformerConfig(vocab=11, width=16, layers=1, heads=2, context=16)


def data(n=24, seed=0):
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(0, 11, (2, n, 8))
    targets[rng.random((n, 8)) < 0.3] = IGNORE
    return Data({"ids": ids, "targets": targets})


def loss(model, batch, rng):
    return model.loss(batch["ids"], batch["targets"], rng=rng)


def optimizer(device, make=AdamW, dropout=0.0, **options):
    rng = np.random.default_rng(3)
    base = cast(freeze(init_transformer(CONFIG, rng, 0.2)), np.float64)
    options = {"lr": 1e-2} | options
    return make(to_device(adapt(base, rank=2, rng=rng, dropout=dropout), device), **options)


def trained(device, host, **options):
    o = optimizer(device)
    result = fit(o, loss, data(), **({"steps": 6, "batch": 12, "clip": 1.0} | options))
    return host(o.flat.data).copy(), result


# ----------------------------------------------------------- however the batch is cut


@pytest.mark.parametrize(
    "cut", [{"accumulate": 3}, {"accumulate": 5}, {"shards": 2}, {"shards": 4}]
)
def test_any_cut_equals_the_big_batch(cut, device, host):
    """Ignored tokens included: the division is by all scored tokens, once."""
    whole, a = trained(device, host)
    parts, b = trained(device, host, **cut)
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(a.history[-1]["loss"], b.history[-1]["loss"], rtol=1e-12)


@pytest.mark.parametrize("cut", [{}, {"accumulate": 3}, {"shards": 2}])
def test_a_step_is_divided_by_the_scored_tokens(cut, device, dev, host):
    """p - lr (Σ gradient) / (scored tokens), with the tokens that are ignored in neither sum."""
    few, o = data(12), optimizer(device, make=SGD, lr=0.5)
    batch = {name: dev(array) for name, array in few.arrays.items()}
    before, g = host(o.flat.data).copy(), loss(o.model, batch, None).backward()
    o.flat.add(g)
    wanted = before - 0.5 * host(o.flat.grad) / (few.arrays["targets"] != IGNORE).sum()
    o.flat.grad.fill(0)
    result = fit(o, loss, few, steps=1, batch=12, **cut)
    np.testing.assert_allclose(host(o.flat.data), wanted, rtol=1e-10, atol=1e-13)
    norm = np.linalg.norm(before - wanted) / 0.5
    np.testing.assert_allclose(result.history[-1]["norm"], norm, rtol=1e-10)


def test_shards_do_not_depend_on_threads(device, host, monkeypatch):
    import minilora.train.parallel as parallel

    with_pool, _ = trained(device, host, shards=3)
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 1)
    without, _ = trained(device, host, shards=3)
    assert with_pool.tobytes() == without.tobytes()


def test_shards_draw_their_own_dropout_and_repeat(device, host):
    def run(**options):
        o = optimizer(device, dropout=0.5)
        fit(o, loss, data(), steps=3, batch=8, **options)
        return host(o.flat.data).tobytes()

    assert run(shards=2) == run(shards=2)
    assert run(shards=2) != run(shards=1)
    assert run(seed=1) != run(seed=2)


def test_an_error_in_a_shard_comes_out(device):
    def broken(model, batch, rng):
        raise MiniloraError("broken on purpose")

    with pytest.raises(MiniloraError, match="broken on purpose"):
        fit(optimizer(device), broken, data(), steps=1, batch=8, shards=2)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=30)
def test_order_is_a_function_of_seed_and_step(n, batch, seed):
    order = Order(n, batch, seed)
    steps = [order.rows(step).tolist() for step in range(6)]
    assert all(len(rows) == batch for rows in steps)
    flat = [row for rows in steps for row in rows]
    for start in range(0, len(flat) - n + 1, n):
        assert sorted(flat[start : start + n]) == list(range(n))  # an epoch sees each once
    for step in (5, 0, 3):
        assert Order(n, batch, seed).rows(step).tolist() == steps[step]


# ------------------------------------------------------------------------ how runs end


def test_the_history_and_the_learning_rate(device):
    o = optimizer(device, lr=0.1)
    result = fit(
        o, loss, data(), steps=7, batch=8, every=3, schedule=schedule("linear", 7),
        validation=data(seed=1),
    )  # fmt: skip
    assert [entry["step"] for entry in result.history] == [3, 6, 7]
    assert [set(entry) for entry in result.history] == [{"step", "loss", "lr", "norm", "val"}] * 3
    np.testing.assert_allclose([e["lr"] for e in result.history], [0.1 * 5 / 7, 0.2 / 7, 0.1 / 7])
    assert result.stopped == "finished"
    assert o.control[0] == 0.1  # the optimizer's own rate is back
    assert fit(optimizer(device), loss, data(), steps=0, batch=8).steps == 0


@pytest.mark.parametrize("cut", [{}, {"accumulate": 3}])
def test_a_record_holds_the_mean_loss_since_the_last(cut, device):
    """At a rate of 0 every step has the same, and each epoch is all examples once."""
    o = optimizer(device, make=SGD, lr=0.0)
    result = fit(o, loss, data(), steps=10, batch=12, every=4, **cut)
    losses = [entry["loss"] for entry in result.history]
    np.testing.assert_allclose(losses, [evaluate(o.model, loss, data())] * 3, rtol=1e-12)


def test_one_scored_item_is_a_mean_of_its_own(device):
    o = optimizer(device, make=SGD, lr=0.0)
    one = data().first(1)
    one.arrays["targets"][0, 1:] = IGNORE
    one.arrays["targets"][0, 0] = 3
    one = Data(one.arrays)
    result = fit(o, loss, one, steps=1, batch=1)
    np.testing.assert_allclose(result.history[0]["loss"], evaluate(o.model, loss, one), rtol=1e-12)


def test_the_bar_goes_as_far_as_the_steps(device, monkeypatch):
    seen = []

    class Bar:
        def __init__(self, **options):
            seen.append(options)

        update = set_postfix_str = lambda self, what: seen.append(what)
        close = lambda self: seen.append("closed")

    monkeypatch.setattr("minilora.train.loop.progress", Bar)
    result = fit(optimizer(device), loss, data(), steps=3, batch=4, every=2, label="a run")
    shown = [f"loss {entry['loss']:.4f}" for entry in result.history]
    assert seen == [{"total": 3, "label": "a run"}, 0, 1, 1, shown[0], 1, shown[1], "closed"]


def test_the_best_by_validation_is_what_one_gets(device, host):
    """Eight examples learned by heart: the validation loss falls, and then rises."""
    few, held_out = data(8), data(seed=1)
    result = fit(
        optimizer(device, lr=0.05), loss, few, steps=60, batch=8, every=4, validation=held_out
    )
    vals = [entry["val"] for entry in result.history]
    assert min(vals) < vals[-1]
    assert result.best_step == 4 * (1 + int(np.argmin(vals)))
    assert evaluate(result.model, loss, held_out, batch=64) == min(vals)


def test_patience_ends_a_run(device):
    o = optimizer(device, make=SGD, lr=30.0)
    result = fit(o, loss, data(), steps=50, batch=8, every=1, validation=data(seed=1), patience=2)
    assert result.stopped == "early"
    assert result.steps == result.best_step + 2


def test_ctrl_c_keeps_what_was_learned(device, host):
    calls = []

    def pressing(model, batch, rng):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, batch, rng)

    o = optimizer(device)
    handler = signal.getsignal(signal.SIGINT)
    result = fit(o, pressing, data(), steps=50, batch=8)
    assert (result.stopped, result.steps) == ("interrupted", 3)
    assert result.history[-1]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is handler
    straight = optimizer(device)
    fit(straight, loss, data(), steps=3, batch=8)
    assert host(o.flat.data).tobytes() == host(straight.flat.data).tobytes()


def test_a_second_ctrl_c_ends_it_at_once(device):
    def pressing(model, batch, rng):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss(model, batch, rng)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(optimizer(device), pressing, data(), steps=5, batch=8)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_that_broke_leaves_no_gradient_to_the_next(shards, device, host):
    """Of three micro-batches the first was done."""

    def breaking(model, batch, rng):
        if step_and_part(rng) == (2, (0, 1)):
            raise KeyboardInterrupt
        return loss(model, batch, rng)

    settings = {"batch": 12, "accumulate": 3, "shards": shards}
    broken, whole = optimizer(device, SGD), optimizer(device, SGD)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, breaking, data(), steps=2, **settings)
    fit(whole, loss, data(), steps=1, **settings)
    for o in (broken, whole):
        fit(o, loss, data(), steps=2, seed=1, **settings)
    assert host(broken.flat.data).tobytes() == host(whole.flat.data).tobytes()


def test_a_run_that_broke_gives_the_learning_rate_back(device):
    def breaking(model, batch, rng):
        if step_and_part(rng)[0] == 3:
            raise KeyboardInterrupt
        return loss(model, batch, rng)

    o = optimizer(device, lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        fit(o, breaking, data(), steps=4, batch=8, schedule=schedule("linear", 4))
    assert o.control[0] == 0.1


def test_a_bad_gradient_is_that_of_its_own_run(device):
    """Steps are those of the run, and the next one begins without it."""

    def spoiled(model, batch, rng):
        value = loss(model, batch, rng)
        bad = rng is not None and step_and_part(rng)[0] == 2
        return value + poison(model.blocks[0].mlp.up.B).sum() * 0.0 if bad else value

    o = optimizer(device)
    fit(o, loss, data(), steps=3, batch=8)
    with pytest.raises(NumericsError, match="step 2: the gradient of"):
        fit(o, spoiled, data(), steps=3, batch=8)
    assert fit(o, loss, data(), steps=3, batch=8).steps == 3


def test_a_bad_validation_loss_names_its_step(device):
    bad = lambda model, batch, rng: loss(model, batch, rng) * (float("nan") if rng is None else 1.0)
    with pytest.raises(NumericsError, match="step 2: the validation loss is nan"):
        fit(optimizer(device), bad, data(), steps=4, batch=8, every=2, validation=data(seed=1))


@op
def poison(xp, x):
    return x * 1.0, (lambda g: g * float("nan"),)


def step_and_part(rng):
    """Of the Generator that a loss is given: the step, from 1, and (shard, micro-batch)."""
    _, step, shard, micro = rng.bit_generator.seed_seq.entropy
    return step + 1, (shard, micro)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_bad_gradient_names_its_step_and_parameter(shards, device):
    """NaN in one pullback at step 4, noticed at the record after it."""

    def spoiled(model, batch, rng):
        value = loss(model, batch, rng)
        if step_and_part(rng) == (4, (shards - 1, 0)):
            value = value + poison(model.blocks[0].mlp.up.B).sum() * 0.0
        return value

    with pytest.raises(NumericsError, match=r"step 4: .* blocks\.0\.mlp\.up\.B is not finite"):
        fit(optimizer(device), spoiled, data(), steps=10, batch=8, every=5, shards=shards)


@pytest.mark.parametrize("cut", [{}, {"accumulate": 2}, {"shards": 2}])
def test_a_bad_loss_names_its_step(cut, device):
    """Infinite at step 3 alone, where every gradient is finite; noticed at the record."""
    last = (cut.get("shards", 1) - 1, cut.get("accumulate", 1) - 1)

    def bad(model, batch, rng):
        spoiled = step_and_part(rng) == (3, last)
        return loss(model, batch, rng) + (float("inf") if spoiled else 0.0)

    with pytest.raises(NumericsError, match="step 3: the loss is inf"):
        fit(optimizer(device), bad, data(), steps=5, batch=8, every=5, **cut)


@pytest.mark.parametrize("option", ["steps", "every", "accumulate", "shards", "batch"])
def test_options_of_no_meaning_are_refused(option, device):
    options = {"steps": 1, "batch": 4} | {option: -1 if option == "steps" else 0}
    with pytest.raises(MiniloraError, match="expected"):
        fit(optimizer(device), loss, data(), **options)


@pytest.mark.parametrize("option", [
    {"clip": -1.0}, {"clip": 0.0}, {"clip": float("nan")}, {"clip": "1"}, {"patience": 0},
    {"eval_batch": -1}, {"eval_batch": 0}, {"seed": -1}, {"batch": 2.0},
])  # fmt: skip
def test_options_that_would_train_otherwise_are_refused(option, device):
    (name,), called = option, []
    with pytest.raises(MiniloraError, match=f"{name}: expected a"):
        fit(optimizer(device), lambda *a: called.append(a) or loss(*a), data(), steps=2,
            validation=data(seed=1), **({"batch": 4} | option))  # fmt: skip
    assert not called
    with pytest.raises(MiniloraError, match="resume: expected checkpoints"):
        fit(optimizer(device), loss, data(), steps=2, batch=4, resume=True)
    with pytest.raises(MiniloraError, match="patience: expected validation data"):
        fit(optimizer(device), loss, data(), steps=2, batch=4, patience=1)


def test_evaluate_is_the_mean_over_scored_items_and_builds_no_graph(device, dev, monkeypatch):
    model, d = optimizer(device).model, data()
    whole = loss(freeze(model), {k: dev(v) for k, v in d.arrays.items()}, None).item()
    np.testing.assert_allclose(evaluate(model, loss, d, batch=7), whole / d.scored.sum())
    nodes = []
    watch = lambda m, b, rng: nodes.append(loss(m, b, rng)) or nodes[-1]
    evaluate(model, watch, d)
    assert all(value.node is None for value in nodes)


def test_data_counts_what_is_scored(device):
    d = Data(
        {"ids": np.zeros((3, 2), int), "targets": np.array([[1, IGNORE], [IGNORE] * 2, [0, 0]])}
    )
    assert d.scored.tolist() == [1, 0, 2]
    assert d.take(np.array([2, 1]), device)[1] == 2
    assert len(d.first(2)) == 2
    assert Data({"x": np.zeros((4, 2))}).scored.tolist() == [1] * 4
    classes = Data({"x": np.zeros((3, 2)), "targets": np.array([1, IGNORE, 0])})
    assert classes.scored.tolist() == [1, 0, 1]
    for bad in ({"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.zeros(0)}):
        with pytest.raises(MiniloraError, match="Data: expected arrays of one length"):
            Data(bad)
    for bad in ({"a": np.zeros(())}, {"targets": [1, 2]}):
        with pytest.raises(MiniloraError, match="Data: expected a NumPy array of examples"):
            Data(bad)
    with pytest.raises(MiniloraError, match="scored target"):
        Data({"ids": np.zeros((1, 2), int), "targets": np.full((1, 2), IGNORE)})


# ------------------------------------------------------------------------ planted ranks


def planted_run(task, rank, device, steps=None, lr=0.02):
    s, d = task.settings, task.splits(0)
    steps = steps or s.steps
    model = adapt(task.base(), "*", rank=rank, alpha=rank, rng=np.random.default_rng(0))
    o = AdamW(to_device(model, device), lr=lr, weight_decay=0)
    result = fit(
        o, task.loss, d.train, steps=steps, batch=s.batch, schedule=schedule("linear", steps)
    )
    return task.score(result.model, d.test)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_planted_knee_stands_on_the_eckart_young_bound(rank, device):
    """What rank r must leave of a flat spectrum of four: 1 - r/4, to 1e-12."""
    task = get_task("planted")
    bound = task.facts["bound"](rank)
    assert abs(bound - (1 - rank / 4)) <= 1e-15
    assert abs(planted_run(task, rank, device) - bound) <= 1e-12


def test_no_rank_beats_the_bound_even_with_a_falling_spectrum(device):
    from minilora.train.planted import linear_task

    task = linear_task(rank=6, decay=0.7)
    for rank in (2, 4):
        left = planted_run(task, rank, device, steps=600)
        bound = task.facts["bound"](rank)
        assert bound - 1e-12 <= left <= bound * 1.05


@pytest.mark.slow
def test_the_knee_of_a_network_stands_at_its_planted_rank(device):
    task = get_task("planted-net")
    left = {rank: planted_run(task, rank, device, lr=1e-2) for rank in (3, 4)}
    assert left[3] > 0.05
    assert left[4] < 1e-6


def test_the_loss_of_the_planted_tasks(dev, host):
    task = get_task("planted")
    d = task.splits(0).train
    batch, n = d.take(slice(None))
    value = squared_error(task.base(), batch, None).item() / n
    assert abs(task.score(task.base(), d) - 1) <= 1e-12
    assert value > 0
