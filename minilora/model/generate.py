"""Text from a model, one token at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.backend import to_device, to_numpy, xp_of
from ..engine.errors import MiniloraError, NumericsError
from .cache import KVCache
from .module import freeze


def generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue each prompt greedily by `new_tokens` tokens; prompts may differ in length.

    Returns the new tokens of each row.  The model is frozen first, so no graph is built;
    the cache lives only as long as this call.  Ties go to the lower id.
    """
    model = freeze(model)
    weight = model.embedding.weight.data
    xp = xp_of(weight)
    device = "cpu" if xp is np else "cuda"
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise MiniloraError("generate: expected prompts of at least one token each")
    ids = np.zeros((len(lengths), max(lengths)), np.int64)  # padded on the right
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    expect_ids("generate", ids, model.config.vocab)

    cache = KVCache(model, len(lengths), max(lengths) + new_tokens)
    # A row's padding sits at positions that its own tokens overwrite before they are seen.
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    last = to_device(np.asarray(lengths) - 1, device)
    rows = xp.arange(len(lengths))
    made = []
    x = model.hidden(to_device(ids, device), positions=to_device(positions, device), cache=cache)
    x = x[rows, last]  # (N, C)
    for step in range(new_tokens):
        logits = model.head(x)
        token = logits.data.argmax(axis=-1)  # (N,)
        made.append(token)
        if step + 1 < new_tokens:
            last = last + 1
            x = model.hidden(token[:, None], positions=last[:, None], cache=cache)[:, 0]
    return to_numpy(xp.stack(made, axis=1)).tolist() if made else [[] for _ in lengths]


def expect_ids(name: str, ids: np.ndarray, vocab: int) -> None:
    """Refuse host ids outside 0..vocab-1.  Errors: `NumericsError` naming the id."""
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise NumericsError(
            f"{name}: expected ids in 0..{vocab - 1}, found {ids[place]} at {place}"
        )
