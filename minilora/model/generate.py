"""Text from a model, one token at a time: the likeliest, or one drawn."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..engine.backend import device_of, to_device, to_numpy, xp_of
from ..engine.blas import on_one_thread, small_kernels
from ..engine.errors import MiniloraError, NumericsError, is_whole
from ..engine.recorded import Recorded
from ..engine.rules import wide
from ..engine.tensor import Tensor
from .cache import KVCache
from .layers import Linear
from .module import freeze, rebuild


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    seeds: int | Sequence[int] = 0,
    replay: Callable | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `new_tokens` tokens; prompts may differ in length.

    Temperature 0 takes the likeliest token (ties go to the lower id); above, one is drawn
    by `draw`.  A row ends before its first `stop` token, which is not returned.  Each row
    has a random stream of its own, from its entry in `seeds` (or from (seeds, row)), so
    that who else is in the batch makes no difference to what is drawn.

    The model is frozen first, so no graph is built; the cache lives as long as this call.
    `replay` may make a step fast, as `fast.capture.replayed` does on a card: given the array
    library and a function that works in place, it gives one that does the same.
    Errors: `MiniloraError` for a prompt that is empty or no list of whole numbers, or an option
    out of range; `NumericsError` for an id outside the vocabulary or logits that are not finite.
    """
    tokens = each_token(
        model,
        prompts,
        new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        replay=replay,
    )
    stop = whole_numbers("stop", stop).tolist()
    made: list[Any] = []
    running = np.ones(len(prompts), bool)
    for token in tokens:
        made.append(token)
        if stop:
            running &= ~np.isin(to_numpy(token), stop)
            if not running.any():
                break
    if not made:
        return [[] for _ in prompts]
    table = to_numpy(xp_of(made[0]).stack(made, axis=1)).tolist()
    return [until(row, stop) for row in table]


def each_token(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: int | Sequence[int] = 0,
    replay: Callable | None = None,
) -> Iterator[Any]:
    """The tokens of `generate` one step at a time: (N,) on the model's device, stops included.

    Nothing is computed before it is asked for: who stops asking has stopped the model.
    """
    expect_options(new_tokens, temperature, top_k, top_p)
    model = freeze(model)
    xp = xp_of(model.norm.weight.data)
    device = device_of(model.norm.weight.data)
    prompts = [whole_numbers("prompts", prompt) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise MiniloraError("generate: expected prompts of at least one token each")
    streams = streams_of(seeds, len(lengths))
    ids = np.zeros((len(lengths), max(lengths)), np.int64)  # padded on the right
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    expect_ids("generate", ids, model.config.vocab)

    length = max(lengths) + new_tokens
    cache = KVCache(model, len(lengths), length)
    cache.reach(max(lengths))
    # A row's padding sits at positions that its own tokens overwrite before they are seen.
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    last = to_device(np.asarray(lengths) - 1, device)  # position of each row's newest token
    rows = xp.arange(len(lengths))
    prompt, where = to_device(ids, device), to_device(positions, device)
    x = model.hidden(prompt, positions=where, cache=cache, at=last)[:, 0]  # (N, C)
    token, sound = xp.zeros(len(lengths), np.int64), xp.ones(len(lengths), bool)

    @Recorded  # every token takes the same calls
    def newest() -> Any:
        """Logits (N, V) after the newest token of each row."""
        x = model.hidden(token[:, None], positions=last[:, None], cache=cache)
        return wide(model.head(x[:, 0]).data)

    def choose(logits: Any) -> Any:
        """At temperature 0 the likeliest is written into `token`."""
        if temperature == 0:
            token[...] = logits.argmax(axis=-1)
            sound[...] = sound & xp.isfinite(logits[rows, token])
        return logits

    def step() -> Any:
        """One token more in each row.  All that changes from step to step is written in place."""
        last[...] += 1
        return choose(newest())

    advance = step if replay is None else replay(xp, step)
    for made in range(new_tokens):
        if made == 0:
            logits = choose(wide(model.head(x).data))
        else:  # what was recorded has one shape for all positions: it sees the cache whole
            cache.reach(max(lengths) + made if advance is step else length)
            logits = advance()
        if temperature > 0:
            drawn = [
                draw(z, stream.random(), temperature, top_k, top_p)
                for z, stream in zip(to_numpy(logits), streams, strict=True)
            ]
            token[...] = to_device(np.asarray(drawn), device)
        elif xp is np:  # on a device one look, after the last token
            expect_sound(sound)
        yield token.copy()
    expect_sound(to_numpy(sound))


def for_decoding(model: Any) -> Any:
    """The frozen model with each Linear's weight in its `decoding_order`, as own arrays.

    The same numbers in the order in which a product with few rows reads them: memory is read
    fastest in long stretches.  Column by column, y = x Wᵀ sums columns of W scaled by x; row by
    row, each y is a product of two vectors.  OpenBLAS has slow kernels for 8 or 16 rows against
    short rows of W: along its longer side it took a half to a quarter of the time there.  One
    row against the wide weight at the end of an MLP took 0.6 to 1.0 of the time row by row.  It
    costs a copy of the weights; a weight in codes stays as it is (`dequantize` first, where
    memory allows), and so does a tree on a GPU.
    """

    def convert(path: str, node: Any) -> Any:
        if isinstance(node, Linear) and xp_of(node.weight.data) is np:
            W = wide(node.weight.data)
            return Linear(Tensor(np.array(W, order=decoding_order(*W.shape))), node.bias)
        return node

    return rebuild(freeze(model), convert)


def decoding_order(d_out: int, d_in: int) -> str:
    """ "F", column by column, for a weight with more rows than columns, else "C".

    A large one stays row by row, too, where a few rows meet it in stacks of its rows (on the one
    thread of a BLAS with `small_kernels`): each then lies in one piece.
    """
    # Up to 2^17 entries, a product with eight rows needs no stacks.
    stacks = d_out * d_in > 1 << 17 and small_kernels() and on_one_thread()
    return "F" if d_out >= d_in and not stacks else "C"


def draw(
    logits: np.ndarray, u: float, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """The token at quantile `u` in [0, 1) of softmax(logits / temperature), cut down to a few.

    `top_k` keeps the k likeliest; `top_p` then keeps the fewest of the likeliest whose
    share reaches p (Holtzman et al. 2020).  Ties go to the lower id.  logits (V,), host.
    """
    z = logits.astype(np.float64)
    if not np.isfinite(z.max()):
        raise NumericsError(f"generate: expected finite logits, found a maximum of {z.max()}")
    with np.errstate(over="ignore"):  # where it is cold, the others are infinitely less likely
        p = np.exp((z - z.max()) / temperature)
    if top_k is not None or top_p is not None:
        order = np.argsort(-p, kind="stable")
        keep = len(p) if top_k is None else min(top_k, len(p))
        if top_p is not None and top_p < 1:  # 1 keeps all, the least likely too
            share = np.cumsum(p[order[:keep]])
            keep = 1 + int(np.searchsorted(share, top_p * share[-1]))
        p[order[keep:]] = 0
    share = np.cumsum(p)
    return int(np.searchsorted(share, u * share[-1], side="right"))


def streams_of(seeds: int | Sequence[int], rows: int) -> list[np.random.Generator]:
    """One Generator a row: from (seeds, row), or from the row's own entry."""
    for seed in seeds if np.ndim(seeds) else [seeds]:
        if not is_whole(seed) or seed < 0:
            raise MiniloraError(f"seeds: expected whole numbers >= 0, found {seed!r}")
    if is_whole(seeds):
        return [np.random.default_rng([int(seeds), row]) for row in range(rows)]
    if len(seeds) != rows:
        raise MiniloraError(f"seeds: expected one for each of {rows} prompts, found {len(seeds)}")
    return [np.random.default_rng(seed) for seed in seeds]


def whole_numbers(name: str, ids: Any) -> np.ndarray:
    """Token ids (n,) as an array, of any collection; 1.5 and True are none."""
    try:
        found = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    except (TypeError, ValueError):  # a single number; rows of several lengths
        found = np.empty((), object)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise MiniloraError(f"{name}: expected lists of whole numbers, found {ids!r}")
    return found.astype(np.int64)


def until(row: list[int], stop: Sequence[int]) -> list[int]:
    """The tokens before the first that is in `stop`."""
    return row[: next((i for i, token in enumerate(row) if token in stop), len(row))]


def expect_options(
    new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    for name, fits, wanted, value in (
        ("new_tokens", is_whole(new_tokens) and new_tokens >= 0, "a whole number >= 0", new_tokens),
        ("temperature", 0 <= temperature < np.inf, "a finite number >= 0", temperature),
        ("top_k", top_k is None or (is_whole(top_k) and top_k >= 1), "a whole number >= 1", top_k),
        ("top_p", top_p is None or 0 < top_p <= 1, "a number in (0, 1]", top_p),
    ):
        if not fits:
            raise MiniloraError(f"{name}: expected {wanted}, found {value}")


def expect_sound(rows: np.ndarray) -> None:
    """Errors: `NumericsError` naming the first row whose likeliest logit was not finite."""
    if not rows.all():
        row = int(rows.argmin())
        raise NumericsError(f"generate: expected finite logits, found others in row {row}")


def expect_ids(name: str, ids: np.ndarray, vocab: int) -> None:
    """Refuse host ids outside 0..vocab-1.  Errors: `NumericsError` naming the id."""
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise NumericsError(
            f"{name}: expected ids in 0..{vocab - 1}, found {ids[place]} at {place}"
        )
