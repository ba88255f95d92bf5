"""One loop for every method: it gets an optimizer and returns a history."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from ..engine.backend import device_of, xp_of
from ..engine.errors import (
    MiniloraError,
    NumericsError,
    expect_positive,
    expect_whole,
)
from ..engine.progress import progress
from ..model.module import freeze, tensors
from ..optim.flat import LR
from .checkpoint import (
    Checkpoints,
    Fit,
    Tally,
    digest_of,
    digest_of_frozen,
    plain,
    reinstate,
    snapshot,
)
from .data import Data, Order
from .parallel import Loss, Shards


def eager(
    optimizer: Any, workers: Shards, loss: Loss, train: Data, rows: np.ndarray,
    key: tuple[int, ...], clip: float | None, accumulate: int,
) -> tuple[Any, int]:  # fmt: skip
    """One step over `rows`, in so many micro-batches; Σ loss, and how many items count."""
    value, scored = workers.add(loss, train, rows, key, accumulate)
    optimizer.step(divide_by=max(1, scored), clip=clip)
    return value, scored


def fit(
    optimizer: Any,
    loss: Loss,
    train: Data,
    *,
    steps: int,
    batch: int,
    seed: int = 0,
    schedule: Callable[[int], float] = lambda step: 1.0,
    clip: float | None = None,
    accumulate: int = 1,
    shards: int = 1,
    validation: Data | None = None,
    every: int = 50,
    eval_batch: int = 64,
    patience: int | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    label: str = "",
    advance: Callable = eager,
) -> Fit:
    """Train `optimizer.model` for `steps` steps of `batch` examples.

    `loss(model, batch, rng)` is a sum over the scored items; the gradient is divided once
    by how many there are in the whole step, so that `accumulate` micro-batches, or any
    number of `shards`, equal the one big batch.  Shards are worked on at the same time, on Linux
    by copies of this process (see `Shards`), which share the evaluations too.

    `schedule(step)` scales the optimizer's learning rate.  Every `every` steps, and at the end,
    the history gets a record; with `validation` it holds the mean loss there, the best model is
    the one returned, and `patience` records without a better one end the run.

    With `checkpoints`, the state is saved every `every` steps and on Ctrl-C; with `resume` the run
    goes on from the newest one, if there is one, and ends as if it had never stopped.

    `advance` makes a step: eagerly, or as a `fast.capture.CapturedStep`, on any device.

    Ctrl-C ends the run after the step it is in, with what was learned; a second one at once.
    A gradient that an earlier run left, having been ended within a step, is not used.
    Errors: `MiniloraError` for an option out of range; `CheckpointError` for checkpoints of
    another run (options, the optimizer's settings and groups, data, frozen weights), for any
    without `resume`, or for a place that cannot hold them;
    `NumericsError` when a loss or gradient was not finite, naming the step and the
    Parameter; steps after it have changed nothing by it.
    """
    for name, value, least in (
        ("steps", steps, 0), ("every", every, 1), ("accumulate", accumulate, 1),
        ("shards", shards, 1), ("patience", 1 if patience is None else patience, 1),
        ("eval_batch", eval_batch, 1),
    ):  # fmt: skip
        expect_whole(f"fit: {name}", value, least)
    if patience is not None and validation is None:
        raise MiniloraError("fit: patience: expected validation data to wait by, found none")
    if resume and checkpoints is None:
        raise MiniloraError("fit: resume: expected checkpoints to go on from, found none")
    if clip is not None:
        expect_positive("fit: clip", clip)
    order = Order(len(train), batch, seed)
    model, base_lr = optimizer.model, float(optimizer.control[LR])
    xp = xp_of(optimizer.control)
    result = Fit(model)
    tally = Tally(xp.zeros(()))
    losses: list[tuple[int, Any]] = []  # (step, Σ loss) since the last record, on the device
    run = {
        "optimizer": type(optimizer).__name__, "lr": base_lr, "steps": steps, "batch": batch,
        "seed": seed, "clip": clip, "accumulate": accumulate, "shards": shards, "every": every,
        "patience": patience,
    }  # fmt: skip
    if checkpoints is not None:
        checkpoints.make_place()  # or the first save would say that there is none
        run = plain(run | {
            "settings": optimizer.settings,
            "groups": [group for _, group in optimizer.flat.parts],
            "about": checkpoints.about, "train": digest_of(train),
            "validation": None if validation is None else digest_of(validation),
            "frozen": digest_of_frozen(model),
        })  # fmt: skip

    def record(step: int, lr: float) -> dict[str, float]:
        bad = optimizer.first_bad()
        mean = float(tally.total) / max(1, tally.items)
        if bad is not None:
            raise NumericsError(f"step {bad[0]}: the gradient of {bad[1]} is not finite")
        if not math.isfinite(mean):
            when, value = next(
                ((s, v) for s, v in losses if not math.isfinite(float(v))), (step, mean)
            )
            raise NumericsError(f"step {when}: the loss is {value}, expected a finite number")
        entry = {"step": step, "loss": mean, "lr": float(lr), "norm": optimizer.norm()}
        if validation is not None:
            entry["val"] = value = evaluate(model, loss, validation, eval_batch, workers)
            if not math.isfinite(value):
                raise NumericsError(
                    f"step {step}: the validation loss is {value}, expected a finite number"
                )
        return entry

    def save() -> None:
        if checkpoints is not None:
            checkpoints.save(snapshot(optimizer, tally, result, run))

    optimizer.forget_bad()  # an earlier run's has been reported
    if checkpoints is not None and not resume:
        checkpoints.expect_none()
    elif checkpoints is not None and (state := checkpoints.latest()) is not None:
        reinstate(state, optimizer, tally, result, run, checkpoints.directory)

    if patience is not None and tally.waited >= patience:  # it had stopped early
        steps, result.stopped = result.steps, "early"
    optimizer.flat.grad.fill(0)
    bar = progress(total=steps, label=label)
    bar.update(result.steps)
    with (
        ExitStack() as end,
        Shards(optimizer.flat, shards) as workers,
        interruptible() as interrupted,
    ):
        end.callback(optimizer.set_lr, base_lr)  # its own again, whatever ends the run
        end.callback(bar.close)
        for step in range(result.steps, steps):
            lr = base_lr * schedule(step)
            optimizer.set_lr(lr)
            rows = order.rows(step)
            value, scored = advance(
                optimizer, workers, loss, train, rows, (seed, step), clip, accumulate
            )
            tally.total = tally.total + value
            losses.append((step + 1, value))
            tally.items += scored
            result.steps = step + 1
            bar.update(1)
            stop = bool(interrupted) and result.steps < steps  # else there is nothing to stop
            if stop and result.steps % every:
                save()  # before a record that an unbroken run would not have
            if result.steps % every == 0 or result.steps == steps or stop:
                entry = record(result.steps, lr)
                result.history.append(entry)
                bar.set_postfix_str(f"loss {entry.get('val', entry['loss']):.4f}")
                tally.total, tally.items = xp.zeros(()), 0
                losses.clear()
                if validation is not None:
                    if entry["val"] < tally.best_loss:
                        tally.best_loss, tally.waited = entry["val"], 0
                        tally.best, result.best_step = optimizer.flat.data.copy(), result.steps
                    else:
                        tally.waited += 1
                if result.steps % every == 0:
                    save()
                if patience is not None and tally.waited >= patience:
                    result.stopped = "early"
                    break
            if stop:
                result.stopped = "interrupted"
                break
    if tally.best is not None:
        optimizer.flat.data[...] = tally.best
    return result


def evaluate(
    model: Any, loss: Loss, data: Data, batch: int = 256, workers: Shards | None = None
) -> float:
    """The mean loss per scored item, on a frozen model: no graph is built.

    Those `workers` that train the model share the batches; the sum is the same.
    Errors: `MiniloraError` if they train another.
    """
    cuts = [rows for rows in data.in_order(batch) if data.scored[rows].any()]
    if workers is not None:
        if model is not workers.flat.model:
            raise MiniloraError("evaluate: expected the model that the workers train")
        values = workers.losses(loss, data, cuts)
    else:
        model = freeze(model)
        device = device_of(next(iter(tensors(model).values())).data)
        values = (loss(model, data.take(rows, device)[0], None).data for rows in cuts)
    total = 0.0
    for value in values:
        total = total + value
    return float(total) / int(data.scored.sum())


@contextmanager
def interruptible() -> Iterator[list]:
    """Inside, the first Ctrl-C fills the list given and does no more; the second raises.

    Outside the main thread signals cannot be caught, and nothing changes.
    """
    pressed: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(time.monotonic())

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
