"""A run that survives a kill: all that the next step depends on, saved whole, the last two kept.

What a batch holds and which random numbers it draws are functions of (seed, step), so a state is
the parameters, the optimizer's buffers, the best parameters so far, the history, and a step.
run(N) equals run(k) and a resumed run of the rest, to the bit.
"""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import device_of, is_array, to_device, to_numpy
from ..engine.errors import CheckpointError, MiniloraError
from ..engine.tensor import Tensor
from ..files import safetensors
from ..files.atomic import clear_stale
from ..model.module import walk
from ..optim.flat import expect_alike
from .data import Data

KEEP = 2
FORM = re.compile(r"step-(\d{9})\.safetensors")
STATE, STATE_DIGEST = "minilora.state", "minilora.state_sha256"


@dataclass(frozen=True)
class State:
    """A step, the arrays, and what else is known (JSON)."""

    step: int
    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


class Checkpoints:
    """A directory of `step-000000120.safetensors`, each a State that is there whole or not at all.

    `save` keeps the last two; `latest` takes the newest that is intact.  `about` (JSON) is what
    else makes a run this one: a state saved under another `about` is not resumed.
    """

    def __init__(self, directory: str | os.PathLike, about: Mapping[str, Any] | None = None):
        self.directory, self.about = Path(directory), dict(about or {})

    def make_place(self) -> None:
        """Errors: `CheckpointError` where the directory cannot be made."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be made ({error})") from error

    def expect_none(self) -> None:
        """Errors: `CheckpointError` where a run has left its states."""
        if self.paths():
            raise CheckpointError(
                f"{self.directory}: holds checkpoints of a run; resume it, or remove them"
            )

    def paths(self) -> list[Path]:
        """What is there, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(p for p in self.directory.iterdir() if FORM.fullmatch(p.name))

    def save(self, state: State) -> Path:
        """Write a state and remove all but the last two.  Errors: `CheckpointError`."""
        text = json.dumps(state.notes, sort_keys=True)
        notes = {STATE: text, STATE_DIGEST: hashlib.sha256(text.encode()).hexdigest()}
        path = self.directory / f"step-{state.step:09d}.safetensors"
        self.make_place()
        safetensors.write(path, state.arrays, notes)
        clear_stale(self.directory, FORM)  # of steps at which this run saves no more
        for old in self.paths()[:-KEEP]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> State | None:
        """The newest intact state; None if there is no checkpoint.

        One that is damaged is passed over with a warning.  Errors: `CheckpointError` if all are.
        """
        reasons = []
        for path in reversed(self.paths()):
            try:
                return self.read(path)
            except MiniloraError as error:
                reasons.append(str(error))
                warnings.warn(f"{error}; trying an older checkpoint", stacklevel=2)
        if reasons:
            raise CheckpointError(f"{self.directory}: no intact checkpoint: {'; '.join(reasons)}")
        return None

    def read(self, path: Path) -> State:
        """One state.  Errors: `FormatError`, or `CheckpointError` for notes that are damaged."""
        stored = safetensors.read(path, allow_nonfinite=True)
        text = stored.metadata.get(STATE, "")
        if stored.metadata.get(STATE_DIGEST) != hashlib.sha256(text.encode()).hexdigest():
            raise CheckpointError(f"{path}: its notes do not match their sha256")
        if not stored.verified:
            raise CheckpointError(f"{path}: tensors without a sha256")
        arrays = {name: np.array(array) for name, array in stored.items()}
        return State(int(FORM.fullmatch(path.name)[1]), arrays, json.loads(text))

    def clear(self) -> None:
        """Remove the checkpoints, and the directory if nothing else is in it."""
        if not self.directory.is_dir():
            return
        clear_stale(self.directory, FORM)
        for path in self.paths():
            path.unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()


@dataclass
class Fit:
    """What `fit` returns: the trained tree, and how it went."""

    model: Any
    history: list[dict[str, float]] = field(default_factory=list)  # step, loss, lr, norm, val
    steps: int = 0  # taken
    best_step: int | None = None  # with validation: the model is the one after this many steps
    stopped: str = "finished"  # or "early", or "interrupted"


@dataclass
class Tally:
    """What a run carries from step to step beside the optimizer and its result."""

    total: Any  # Σ loss since the last record, on the device
    items: int = 0  # scored items in it
    best: Any = None  # the parameters of the best record
    best_loss: float = math.inf
    waited: int = 0  # records since


def snapshot(optimizer: Any, tally: Tally, result: Fit, run: dict[str, Any]) -> State:
    """All that the next step depends on."""
    parameters = optimizer.flat.cut(optimizer.flat.data)
    arrays = {f"model.{path}": to_numpy(view) for path, view in parameters.items()}
    arrays |= {f"optimizer.{name}": array for name, array in optimizer.state().items()}
    arrays["total"] = to_numpy(tally.total)
    if tally.best is not None:
        arrays["best"] = to_numpy(tally.best)
    notes = {
        "run": run, "history": result.history, "best_step": result.best_step,
        "items": tally.items, "waited": tally.waited,
        "best_loss": None if tally.best is None else tally.best_loss,
    }  # fmt: skip
    return State(result.steps, arrays, notes)


def reinstate(
    state: State, optimizer: Any, tally: Tally, result: Fit, run: dict[str, Any], where: Any
) -> None:
    """The inverse of `snapshot`, in place.  Errors: `CheckpointError` for another run's state."""
    expect_same_run(run, state.notes.get("run", {}), where)
    device = device_of(optimizer.flat.data)
    arrays = {name: to_device(array, device) for name, array in state.arrays.items()}

    def under(prefix: str) -> dict[str, Any]:
        return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

    what = f"{where}: parameters"  # of both kinds all has to fit before any is written
    expect_alike(optimizer.flat.cut(optimizer.flat.data), under("model."), what)
    optimizer.restore(under("optimizer."))
    optimizer.flat.restore(optimizer.flat.data, under("model."), what)
    tally.total, tally.items = arrays["total"], state.notes["items"]
    tally.waited, tally.best = state.notes["waited"], arrays.get("best")
    if tally.best is not None:
        tally.best_loss = state.notes["best_loss"]
    result.history, result.best_step = state.notes["history"], state.notes["best_step"]
    result.steps = state.step


def plain(value: Any) -> Any:
    """What JSON gives back of it: NumPy's numbers as Python's, tuples as lists.

    Errors: `CheckpointError` for what JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(value, default=lambda number: number.item()))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoints: expected JSON, found another value ({error})"
        ) from error


def expect_same_run(run: Mapping[str, Any], saved: Mapping[str, Any], where: Any) -> None:
    """Errors: `CheckpointError` naming what differs between this run and the saved one."""
    odd = [
        f"{name}: saved {saved.get(name)!r}, now {run.get(name)!r}"
        for name in sorted({*run, *saved})
        if run.get(name) != saved.get(name)
    ]
    if odd:
        raise CheckpointError(f"{where}: belongs to another run ({'; '.join(odd)})")


def digest_of(data: Data) -> str:
    """sha256 of a Data's arrays, names and shapes included."""
    return digest_of_arrays(sorted(data.arrays.items()))


def digest_of_frozen(model: Any) -> str:
    """sha256 of all arrays of a tree that do not train, codes and scales included."""
    return digest_of_arrays(
        (path, to_numpy(node.data if type(node) is Tensor else node))
        for path, node in walk(model)
        if type(node) is Tensor or is_array(node)
    )


def digest_of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    sha = hashlib.sha256()
    for name, array in arrays:
        sha.update(f"{name}{array.dtype}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()
