"""minilora's side of the race, in the worker process: as it ships, and slowed down on purpose."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..engine.backend import is_array
from ..engine.errors import MiniloraError
from ..engine.forked import can_fork
from ..engine.rules import reference_rules
from ..engine.tensor import Tensor
from ..engine.workers import threads
from ..model.generate import for_decoding, generate
from ..model.module import parameters, rebuild
from ..model.tensor_parallel import TensorParallel
from ..optim.adamw import AdamW
from ..quant.blockwise import quantize_array
from ..quant.codes import code
from ..train.parallel import Shards
from . import bench_primitives
from .bench_shapes import BETAS, STD, WEIGHT_DECAY, Job, prompts, starting_tree, tokens

OURS = ("minilora", "blas", "reference", "primitives")


class Contender:
    """Built by `build` from what `__init__` drew; then `before`, `step` (timed), `value`, again
    and again.  `data` is drawn first, so that memory can be counted from after it."""

    working = 1  # threads, as `build` found them

    def __init__(self, job: Job):
        self.job = job
        self.start, self.data = starting_tree(job), tokens(job)
        self.losses: list[float] = []

    def build(self) -> None: ...

    def before(self) -> None:
        """Get ready for a step, untimed."""

    def step(self) -> None: ...

    def value(self) -> list[float]:
        """What the last step gave, for the gate: it must be what the others get."""
        return [self.losses[-1]]

    def taken(self) -> int | None:
        """Bytes of a card's memory that the process had at most; None on the host."""

    def close(self) -> None: ...

    def products(self) -> tuple[Callable[[], Any], int]:
        """A call that multiplies (1024, 512) by (512, 1024) on all threads, how many times."""
        k = self.job.threads
        a, b = np.ones((1024, 512), np.float32), np.ones((512, 1024), np.float32)
        outs = [np.empty((1024, 1024), np.float32) for _ in range(k)]
        pool = ThreadPoolExecutor(k)
        return lambda: list(pool.map(lambda out: np.matmul(a, b, out=out), outs)), k


class OurStep(Contender):
    """Forward, backward and AdamW over the batch, in one shard a thread."""

    def build(self) -> None:
        job = self.job
        shards = 1 if job.contender == "blas" else job.threads
        model = own_arrays(self.start)
        self.optimizer = AdamW(model, lr=job.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.loss = bench_primitives.loss if job.contender == "primitives" else whole_loss
        self.rows = np.arange(len(self.data))
        self.resources = ExitStack()
        self.resources.enter_context(rules_of(job))
        self.shards = self.resources.enter_context(Shards(self.optimizer.flat, shards))
        self.pieces = 1 if job.micro is None else -(-job.shape.batch // (shards * job.micro))
        at_once = self.shards.workers if self.shards.pool is not None else 1  # at most the cores
        self.working = expect_threads(job.threads, at_once)

    def step(self) -> None:
        total, scored = self.shards.add(self.loss, self.data, self.rows, (0,), self.pieces)
        self.optimizer.step(divide_by=scored)
        self.losses.append(float(total) / scored)

    def close(self) -> None:
        self.resources.close()


class OurOptimizer(Contender):
    """AdamW alone, on gradients that are drawn once."""

    def build(self) -> None:
        self.optimizer = AdamW(
            own_arrays(self.start), lr=self.job.lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        flat = self.optimizer.flat
        self.drawn = drawn_gradients(flat.named)
        self.first = {path: view.copy() for path, view in flat.cut(flat.data).items()}
        self.resources = ExitStack()
        self.resources.enter_context(rules_of(self.job))
        self.resources.enter_context(threads(self.job.threads))
        self.working = expect_threads(self.job.threads, self.job.threads)

    def before(self) -> None:
        for path, view in self.optimizer.flat.cut(self.optimizer.flat.grad).items():
            view[...] = self.drawn[path]

    def step(self) -> None:
        self.optimizer.step()

    def value(self) -> list[float]:
        now = self.optimizer.flat.cut(self.optimizer.flat.data)
        return [moved(self.first[p], now[p], g, self.job.lr) for p, g in self.drawn.items()]

    def close(self) -> None:
        self.resources.close()


class OurGenerate(Contender):
    """Greedy tokens with a key-value cache, by as many processes as threads were asked for."""

    def build(self) -> None:
        threads, self.prompts = self.job.threads, prompts(self.job).tolist()
        self.resources = ExitStack()
        self.resources.enter_context(rules_of(self.job))
        if in_processes(self.job):
            parallel = self.resources.enter_context(TensorParallel(self.start, threads))
            self.generate = partial(parallel.run, generate)
        else:
            self.generate = partial(generate, for_decoding(self.start))
        self.working = expect_threads(threads, threads if in_processes(self.job) else 1)

    def step(self) -> None:
        self.made = self.generate(self.prompts, self.job.new_tokens)

    def value(self) -> list[float]:
        return [float(token) for row in self.made for token in row]

    def close(self) -> None:
        self.resources.close()


def in_processes(job: Job) -> bool:
    """Are tokens written by several processes, rather than by BLAS on several threads?"""
    enough = 1 < job.threads <= job.shape.model.kv
    return enough and can_fork() and job.contender == "minilora"


def all_weights(job: Job) -> np.ndarray:
    """As many float32 weights as the linears of the model hold, from N(0, std²)."""
    model = starting_tree(replace(job, mode="full"))
    n = sum(math.prod(t.shape) for path, t in parameters(model).items() if t.ndim == 2)
    return np.random.default_rng(3).standard_normal(n, np.float32) * np.float32(STD)


class OurQuantize(Contender):
    """NF4 with blocks of 64, of all weights at once."""

    def build(self) -> None:
        self.weights, self.code = all_weights(self.job), code("nf4")
        self.resources = ExitStack()
        self.resources.enter_context(rules_of(self.job))
        self.resources.enter_context(threads(self.job.threads))
        self.working = expect_threads(self.job.threads, self.job.threads)

    def step(self) -> None:
        self.made = quantize_array(self.weights, self.code, 64)

    def value(self) -> list[float]:
        return sums(self.made.packed, self.made.scales)

    def close(self) -> None:
        self.resources.close()


def contender(job: Job) -> Contender:
    kinds = {
        "step": OurStep,
        "optimizer": OurOptimizer,
        "generate": OurGenerate,
        "quantize": OurQuantize,
    }
    return kinds[job.kind](job)


def own_arrays(tree: Any) -> Any:
    """The tree with copies of its arrays and codes, as one that was loaded would have."""

    def own(_: str, node: Any) -> Any:
        if isinstance(node, Tensor):
            return type(node)(node.data.copy())
        return node.copy() if is_array(node) else node

    return rebuild(tree, own)


def whole_loss(model: Any, batch: dict[str, Any], rng: Any = None) -> Tensor:
    return model.loss(batch["ids"], batch["targets"])


def drawn_gradients(named: dict[str, Any]) -> dict[str, np.ndarray]:
    """{path: gradient} from seed 2, in the order of the paths."""
    rng = np.random.default_rng(2)
    return {path: rng.standard_normal(named[path].shape, np.float32) for path in sorted(named)}


def moved(before: np.ndarray, now: np.ndarray, g: np.ndarray, lr: float) -> float:
    """How far the entries went against their gradients on average, in learning rates: an AdamW
    step is about 1."""
    return float(np.mean((before.astype(np.float64) - now) * np.sign(g))) / lr


def sums(codes: np.ndarray, scales: np.ndarray, parts: int = 64) -> list[float]:
    """Of all codes and all block scales, in `parts` stretches each."""
    return [
        float(part.astype(np.float64).sum())
        for array in (codes, scales)
        for part in np.array_split(array.ravel(), parts)
    ]


def rules_of(job: Job) -> AbstractContextManager:
    return reference_rules() if job.contender == "reference" else nullcontext()


def expect_threads(threads: int, workers: int) -> int:
    """The number of threads, once it is known to be at work.  Errors: `MiniloraError` if not.

    `workers` Python threads with BLAS at one each, or one with BLAS at `threads`.
    """
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        if threads == 1:
            return 1
        raise MiniloraError(
            'bench on several threads needs threadpoolctl: pip install "minilora[fast]"'
        ) from None
    blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    wanted = 1 if workers == threads else threads
    if workers not in (1, threads) or blas != {wanted}:
        raise MiniloraError(
            f"bench: expected {threads} threads in all, "
            f"found {workers} with BLAS at {sorted(blas) or 'no known number'}"
        )
    return threads
