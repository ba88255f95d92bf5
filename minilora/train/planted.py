"""Worlds whose true update has a rank that we planted, so that the knee is known beforehand."""

from itertools import pairwise
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..engine.tensor import Tensor
from ..model.layers import Linear, Net
from .data import Data
from .loop import evaluate
from .task import Settings, Splits, Task, squared_error


def planted_delta(
    rng: np.random.Generator, d_out: int, d_in: int, singular: np.ndarray
) -> np.ndarray:
    """A (d_out, d_in) matrix with these singular values and random directions, float64."""
    k = len(singular)
    left, _ = np.linalg.qr(rng.standard_normal((d_out, k)))
    right, _ = np.linalg.qr(rng.standard_normal((d_in, k)))
    return (left * singular) @ right.T


def relative_error(model: Any, data: Data, base_loss: float) -> float:
    """The squared error over that of the base: 1 before training, 0 when all is learned."""
    return evaluate(model, squared_error, data) / base_loss


def linear_task(rank: int = 4, d_out: int = 48, d_in: int = 64, decay: float = 1.0) -> Task:
    """y = (W0 + ΔW) x with rank(ΔW) = `rank` and singular values decay⁰, decay¹, ...

    The inputs are the unit vectors, so the loss is ‖W0 + ΔW - W‖² itself, and the best that
    rank r can do is the tail Σ_{i>r} σ_i² (Eckart and Young 1936).  In float64.
    """
    if not 1 <= rank <= min(d_out, d_in):
        raise MiniloraError(f"rank: expected 1..{min(d_out, d_in)} to plant, found {rank}")
    rng = np.random.default_rng(7)
    singular = decay ** np.arange(rank)
    W0 = rng.standard_normal((d_out, d_in)) / np.sqrt(d_in)
    delta = planted_delta(rng, d_out, d_in, singular)
    data = Data({"x": np.eye(d_in), "y": (W0 + delta).T.copy()})
    base_loss = float((delta**2).sum()) / d_in
    energy = singular**2 / (singular**2).sum()
    return Task(
        name="planted",
        about=f"a linear map whose update has rank {rank}: the knee stands exactly there",
        metric="relative squared error",
        lower_is_better=True,
        base=lambda: Linear(Tensor(W0)),
        splits=lambda seed: Splits(data, data, data),
        loss=squared_error,
        score=lambda model, data: relative_error(model, data, base_loss),
        settings=Settings(
            steps=400,
            batch=d_in,
            full_rates=(2e-3, 5e-3, 1e-2),
            lora_rates=(1e-2, 2e-2, 4e-2),
            alpha=None,
            targets="*",
            warmup=0.0,
            clip=None,
            betas=(0.9, 0.999),
            ranks=(1, 2, 3, 4, 8),
        ),
        facts={"rank": rank, "bound": lambda r: float(energy[r:].sum())},
    )


def net_task(rank: int = 4) -> Task:
    """A GELU network whose teacher differs by a rank-`rank` update in every linear."""
    widths = (32, 48, 48, 16)
    rng = np.random.default_rng(11)
    base, teacher = [], []
    for d_in, d_out in pairwise(widths):
        W = rng.standard_normal((d_out, d_in)) / np.sqrt(d_in)
        # Singular values of half the size of a random matrix's largest: a real change.
        delta = planted_delta(rng, d_out, d_in, np.full(rank, 1.0))
        base.append(Linear(Tensor(W.astype(np.float32))))
        teacher.append(Linear(Tensor((W + delta).astype(np.float32))))

    def draw(seed: int, part: int, n: int) -> Data:
        x = np.random.default_rng([seed, part]).standard_normal((n, widths[0]), np.float32)
        return Data({"x": x, "y": Net(tuple(teacher))(x).data})

    base_loss = evaluate(Net(tuple(base)), squared_error, draw(0, 2, 4096))
    return Task(
        name="planted-net",
        about=f"a network whose update has rank {rank} in every linear: the same knee, bent",
        metric="relative squared error",
        lower_is_better=True,
        base=lambda: Net(tuple(base)),
        splits=lambda seed: Splits(draw(seed, 0, 4096), draw(seed, 1, 1024), draw(0, 2, 4096)),
        loss=squared_error,
        score=lambda model, data: relative_error(model, data, base_loss),
        settings=Settings(
            steps=1000,
            batch=256,
            full_rates=(1e-3, 3e-3, 6e-3, 1.2e-2),
            lora_rates=(3e-3, 1e-2, 2e-2, 4e-2),
            alpha=None,
            betas=(0.9, 0.999),
            clip=None,
            ranks=(1, 2, 3, 4, 8),
        ),
        facts={"rank": rank},
    )
