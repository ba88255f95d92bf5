"""Two hundred steps of training on the host and on a card: do the losses fall the same way?"""

from typing import Any

import numpy as np

from ..engine.backend import to_device, to_numpy
from ..engine.rules import reference_rules
from ..fast.capture import CapturedStep
from ..model.module import cast
from ..model.module import to_device as tree_to_device
from ..optim.adamw import AdamW
from .bench_ours import whole_loss
from .gpu_gaps import STYLES, model_for, poison, relative

# The largest |loss - float64's| / float64's of all steps.  Over 200 of them NumPy's own float32
# stays within 5e-7 of float64, and the kernels, run on a CPU, within 3e-7; in bfloat16 it is 6e-3
# and 2e-3.  A card sums in another order, and small differences grow as training goes on.  A
# gradient a tenth too small at every residual connection is off by more than 1e-4 after 12 steps.
CURVES = {"llama": 1e-4, "qlora": 1e-4, "bf16": 2e-2}
WIDTH, LAYERS, N, T = 64, 2, 4, 32
BATCHES, WORDS = 8, 64  # the batches come round; ids below WORDS


def curve_batches(seed: int) -> list[dict[str, np.ndarray]]:
    """ids and targets (N, T): walks along one drawn permutation, which is there to be learned."""
    rng = np.random.default_rng(seed)
    following = rng.permutation(WORDS)
    walk = [rng.integers(0, WORDS, (BATCHES, N))]
    for _ in range(T):
        walk.append(following[walk[-1]])
    ids = np.stack(walk, axis=-1)  # (BATCHES, N, T + 1)
    return [{"ids": row[:, :-1], "targets": row[:, 1:]} for row in ids]


def trained(model: Any, device: str, batches: list[dict], steps: int) -> tuple[list[float], Any]:
    """The mean loss before each step, and the last weights; captured where that can be."""
    optimizer = AdamW(tree_to_device(model, device), lr=3e-3)
    step = CapturedStep(optimizer, whole_loss, clip=1.0)
    there = [{k: to_device(a, device) for k, a in batch.items()} for batch in batches]
    losses = [float(step.run(there[i % BATCHES], N * T)) / (N * T) for i in range(steps)]
    return losses, to_numpy(optimizer.flat.data)


def loss_curve(style: str, steps: int, seed: int) -> dict[str, Any]:
    """The losses of `steps` AdamW steps: the specification in float64 on the host, the device.

    `gap` is the largest of all steps, relative; "repeats" says that a second run on the device
    gave the same losses and weights, to the bit.  Losses are kept to six digits.
    """
    model, batches = model_for(style, WIDTH, LAYERS, T), curve_batches(seed)
    with reference_rules():
        host, _ = trained(cast(model, np.float64), "cpu", batches, steps)
    poison()
    (device, weights), (again, same) = (trained(model, "cuda", batches, steps) for _ in range(2))
    return {
        "curve": STYLES[style],
        "host": [float(f"{loss:.6g}") for loss in host],
        "device": [float(f"{loss:.6g}") for loss in device],
        "gap": max(relative(np.array(a), np.array(b)) for a, b in zip(device, host, strict=True)),
        "limit": CURVES[style],
        "repeats": device == again and np.array_equal(weights, same),
    }
