"""All that trains, in one array: one buffer to update, to page, to send, to save."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..engine.backend import device_of, to_device, to_numpy, xp_of
from ..engine.errors import (
    CheckpointError,
    MiniloraError,
    expect_number,
    expect_positive,
    is_number,
)
from ..engine.rules import rule
from ..engine.tensor import Parameter
from ..model.module import parameters, rebuild


class Group(NamedTuple):
    """How a Parameter is treated: factors on the learning rate and on the weight decay."""

    lr: float = 1.0
    decay: float = 1.0


Grouping = Callable[[str, Parameter], Group]


def by_shape(path: str, parameter: Parameter) -> Group:
    """The usual groups: weight decay on matrices, none on norms and biases."""
    return Group(decay=1.0 if parameter.ndim >= 2 else 0.0)


def lora_plus(ratio: float = 16.0) -> Grouping:
    """B learns `ratio` times as fast as A (LoRA+, Hayou et al. 2024); the rest `by_shape`."""

    def groups(path: str, parameter: Parameter) -> Group:
        group = by_shape(path, parameter)
        return group._replace(lr=ratio) if path.rpartition(".")[2] == "B" else group

    return groups


class Flat:
    """The Parameters of a tree copied into one array, and one gradient array beside it.

    `model` is the tree whose Parameters are views of `data`; `gradients` maps them to views
    of `grad`.  Parameters of one Group lie side by side: `parts` lists the stretches.
    Errors: `MiniloraError` if nothing trains, if dtypes or devices differ or are not float32 or
    float64, or if a group's factor is negative or not finite.
    """

    def __init__(self, model: Any, groups: Grouping = by_shape):
        named = parameters(model)
        if not any(p.size for p in named.values()):
            raise MiniloraError("optimizer: expected Parameters in the model, found none")
        kinds = {(xp_of(p.data).__name__, p.dtype.name) for p in named.values()}
        if len(kinds) > 1:
            raise MiniloraError(f"optimizer: expected one dtype and device, found {sorted(kinds)}")
        if (found := kinds.pop()[1]) not in ("float32", "float64"):  # others round updates away
            raise MiniloraError(
                f"optimizer: expected Parameters in float32 or float64, found {found}"
            )
        group = {path: Group(*groups(path, parameter)) for path, parameter in named.items()}
        for path, factors in group.items():
            if not all(0 <= factor < math.inf for factor in factors):
                raise MiniloraError(
                    f"groups: expected finite factors >= 0, found {factors} of {path}"
                )
        order = sorted(named, key=group.__getitem__, reverse=True)  # stable
        xp = xp_of(named[order[0]].data)
        self.data = xp.concatenate([named[path].data.ravel() for path in order])
        self.grad = xp.zeros(self.data.shape, self.data.dtype)  # not zeros_like: see AdamW
        self.spans: dict[str, slice] = {}
        self.shapes = {path: named[path].shape for path in order}
        self.parts: list[tuple[slice, Group]] = []
        stop = 0
        for path in order:
            self.spans[path] = slice(stop, stop := stop + named[path].size)
            if self.parts and self.parts[-1][1] == group[path]:
                self.parts[-1] = (slice(self.parts[-1][0].start, stop), group[path])
            else:
                self.parts.append((self.spans[path], group[path]))
        views = {path: Parameter(view) for path, view in self.cut(self.data).items()}
        new = {id(named[path]): view for path, view in views.items()}
        self.model = rebuild(model, lambda _, node: new.get(id(node), node))
        self.named = views
        self.gradients = self.gradients_in(self.grad)

    def cut(self, flat: Any) -> dict[str, Any]:
        """`{path: view}` of an array laid out like `data`."""
        return {path: flat[s].reshape(self.shapes[path]) for path, s in self.spans.items()}

    def gradients_in(self, flat: Any) -> dict[Parameter, Any]:
        """`{Parameter: view of flat}`: what `backward(into=...)` takes."""
        return {self.named[path]: view for path, view in self.cut(flat).items()}

    def name_at(self, index: int) -> str:
        """The path of the Parameter that holds entry `index` of the flat array."""
        return next(path for path, s in self.spans.items() if s.start <= index < s.stop)

    def add(self, gradients: dict[Parameter, Any]) -> None:
        """Add what `backward()` returned.

        Errors: `MiniloraError` for an unknown Parameter or another shape; nothing is added then.
        """
        for parameter, g in gradients.items():
            if parameter not in self.gradients:
                raise MiniloraError(
                    f"optimizer: a gradient for {parameter}, which is not in its model; "
                    "train optimizer.model, not the tree it was made from"
                )
            if g.shape != parameter.shape:
                raise MiniloraError(f"optimizer: a gradient of shape {g.shape} for {parameter}")
        for parameter, g in gradients.items():
            self.gradients[parameter] += g

    def restore(self, flat: Any, saved: dict[str, Any], what: str) -> None:
        """Copy saved arrays into `flat`, in place.  Errors: `CheckpointError` on any mismatch."""
        copy_in(self.cut(flat), saved, what)


def expect_alike(present: dict[str, Any], saved: dict[str, Any], what: str) -> None:
    """Errors: `CheckpointError` unless the names, shapes and dtypes are the same."""
    if saved.keys() != present.keys():
        odd = ", ".join(sorted(saved.keys() ^ present.keys()))
        raise CheckpointError(f"{what}: saved and present arrays differ: {odd}")
    for name, array in present.items():
        if saved[name].shape != array.shape or saved[name].dtype != array.dtype:
            raise CheckpointError(
                f"{what}: expected {array.dtype} {array.shape} for {name}, "
                f"found {saved[name].dtype} {saved[name].shape}"
            )


def copy_in(present: dict[str, Any], saved: dict[str, Any], what: str) -> None:
    """Write saved arrays over those of the same names.

    Errors: `CheckpointError` on any mismatch, before anything is written.
    """
    expect_alike(present, saved, what)
    for name, array in present.items():
        array[...] = to_device(saved[name], device_of(array))


# The few numbers that steer a step live beside the parameters, so that a step needs no
# word from the host: float64 entries of one small array.
CONTROL = 7
LR, STEP, CALLS, NORM, FACTOR, BAD_CALL, BAD_INDEX = range(CONTROL)


@rule
def measure(xp, grad, control, *, divide_by, clip):
    """Write the gradient's norm and the factor that divides and clips it into `control`.

        norm = ‖grad‖ / divide_by,    factor = min(1, clip / norm) / divide_by

    The squares are summed in double precision.  If the norm is not finite, the factor is NaN,
    and the first such call and the flat index of its first bad entry are recorded, for ever.
    """
    norm = xp.sqrt(xp.square(grad.astype(xp.float64)).sum()) / divide_by
    control[CALLS] += 1
    control[NORM] = norm
    ratio = 1.0 if clip is None else xp.minimum(1.0, clip / xp.maximum(norm, 1e-300))
    control[FACTOR] = xp.where(xp.isfinite(norm), ratio / divide_by, xp.nan)
    first = xp.logical_and(~xp.isfinite(norm), control[BAD_CALL] == 0)
    index = (~xp.isfinite(grad)).argmax()
    control[BAD_CALL] = xp.where(first, control[CALLS], control[BAD_CALL])
    control[BAD_INDEX] = xp.where(first, index.astype(xp.float64), control[BAD_INDEX])


def expect_betas(name: str, betas: Any) -> None:
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(is_number, betas))
    if not (pair and 0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise MiniloraError(f"betas: expected two numbers in [0, 1), found {betas}")


class Stepper:
    """What every optimizer shares: the flat buffers, the control numbers, the bad-step record.

    `settings` is what else its steps depend on, by name: a resumed run must have the same.
    """

    def __init__(self, model: Any, lr: float, groups: Grouping, **settings: Any):
        for name, value in {"lr": lr, **settings}.items():
            (expect_betas if name == "betas" else expect_number)(name, value)
        self.settings = settings
        self.flat = Flat(model, groups)
        self.control = xp_of(self.flat.data).zeros(CONTROL)
        self.control[LR] = lr

    @property
    def model(self) -> Any:
        """The tree to train: its Parameters are views of the flat buffer."""
        return self.flat.model

    @property
    def gradients(self) -> dict[Parameter, Any]:
        """`{Parameter: view of the flat gradient}`, for `backward(into=...)`."""
        return self.flat.gradients

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come.  Errors: `MiniloraError`, as for `lr`."""
        expect_number("lr", lr)
        self.control[LR] = lr

    def measure(self, divide_by: float, clip: float | None) -> None:
        """Errors: `MiniloraError` for a divisor or a norm that is not > 0; the step is not made."""
        expect_positive("divide_by", float(divide_by))
        if clip is not None:
            expect_positive("clip", clip)
            clip = float(clip)  # a NumPy number would not meet a card's arrays
        measure(self.flat.grad, self.control, divide_by=float(divide_by), clip=clip)

    def count_step(self) -> None:
        """t += 1, unless the step wrote nothing; and the gradient is cleared."""
        self.control[STEP] += xp_of(self.control).isfinite(self.control[NORM])
        self.flat.grad.fill(0)

    def arrays(self) -> dict[str, Any]:
        """What the optimizer goes on from, by name: moments by path ("m.blocks.0..."), control."""
        raise NotImplementedError

    def moments_by_path(self, **buffers: Any) -> dict[str, Any]:
        """`arrays` of one whose moments lie as the parameters do."""
        return {"control": self.control} | {
            f"{name}.{path}": view
            for name, flat in buffers.items()
            for path, view in self.flat.cut(flat).items()
        }

    def state(self) -> dict[str, Any]:
        """Host copies of `arrays`, to be saved."""
        return {name: to_numpy(array).copy() for name, array in self.arrays().items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Copy a saved state in, in place.

        Errors: `CheckpointError` on any mismatch, before anything is written.
        """
        copy_in(self.arrays(), state, "optimizer state")

    def forget_bad(self) -> None:
        """Count the calls of `step` from here on, for `first_bad`."""
        for entry in (CALLS, BAD_CALL, BAD_INDEX):
            self.control[entry] = 0

    def norm(self) -> float:
        """The gradient norm of the last step, before clipping (waits for the device)."""
        return float(self.control[NORM])

    def first_bad(self) -> tuple[int, str] | None:
        """(call of `step`, path) of the first gradient that was not finite, if there was one.

        Calls are counted from the start of a `fit`.  That step and any like it wrote nothing.
        Waits for the device.
        """
        call = int(self.control[BAD_CALL])
        return (call, self.flat.name_at(int(self.control[BAD_INDEX]))) if call else None
