"""A real model fine-tuned on a file: LoRA or QLoRA, from the base to an adapter on disk."""

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import MiniloraError
from ..files.atomic import expect_former_save
from ..files.peft import WEIGHTS, savable, save_adapter
from ..files.peft_config import CONFIG
from ..files.tokenizer import Tokenizer
from ..lora.lora import adapt, warn_of_rank
from ..lora.variants import dora
from ..model.generate import generate
from ..model.module import count, freeze
from ..optim.adamw import AdamW
from ..optim.schedule import schedule
from ..quant.linear import quantize
from ..train.checkpoint import Checkpoints, Fit
from ..train.corpus import Corpus, read_corpus
from ..train.loop import eager, evaluate, fit
from ..train.task import token_loss
from .answer import open_for_text, prompt_ids
from .finetune_report import CARD, FIGURE, RECORD, extra_files
from .ledger import held_bytes
from .machine import Peak, held_at_most, machine, memory

METHODS = ("lora", "qlora")
SAMPLE_TOKENS = 32
MOST_STEPS = 1e9  # the names of checkpoints have nine digits
CLIP, WARMUP, RECORDS = 1.0, 0.05, 5  # of the norm; of the steps; evaluations in a run


@dataclass(frozen=True)
class FinetuneConfig:
    """What is trained on what, and where it is written.

    A step sees `batch * grad_accum` examples, `batch` at a time, cut into `shards` that are
    worked on at the same time, a processor each (one: its products on all processors).  Where
    `lr` or `epochs` are None, a conversation gets 1.5e-3 and 3 epochs, a text 1e-3 and one.
    """

    out: str
    model: str = "smollm2"
    data: str = "persona"
    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    dora: bool = False  # does each adapter train the lengths of its rows too?
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0
    lr: float | None = None
    epochs: float | None = None
    batch: int = 4
    grad_accum: int = 1
    shards: int = 1
    max_len: int = 128
    held_out: float = 0.1
    code: str = "nf4"
    seed: int = 0
    prompts: tuple[str, ...] = ()  # asked before and after; without any, two from the data

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MiniloraError(f"method: expected {' or '.join(METHODS)}, found {self.method!r}")
        for name in ("rank", "batch", "grad_accum", "shards"):
            if getattr(self, name) < 1:
                raise MiniloraError(f"{name}: expected >= 1, found {getattr(self, name)}")
        if self.seed < 0:
            raise MiniloraError(f"seed: expected >= 0, found {self.seed}")
        for name in ("lr", "epochs", "alpha"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise MiniloraError(f"{name}: expected a number > 0, found {value}")

    def for_corpus(self, corpus: Corpus) -> "FinetuneConfig":
        """With the rate and the epochs that were left open."""
        text = corpus.kind == "text"
        return replace(
            self,
            lr=self.lr or (1e-3 if text else 1.5e-3),
            epochs=self.epochs or (1.0 if text else 3.0),
        )

    @property
    def checkpoints(self) -> Path:
        out = Path(os.path.abspath(self.out))
        return out.parent / f"{out.name}-checkpoints"


def finetune(config: FinetuneConfig, resume: bool = False) -> dict[str, Any]:
    """Train an adapter and write its directory; the record of the run.

    `OUT` gets the two files of PEFT, a model card, the record and a figure; the training state
    lies in `OUT-checkpoints` until then.  A run that was interrupted writes no adapter, and its
    record says so ("stopped").
    Errors: `MiniloraError` for a model without a tokenizer, or an option out of range; else as
    `open_model`, `read_corpus`, `adapt`, `fit` and `save_adapter`.
    """
    began = time.monotonic()
    names = (CONFIG, WEIGHTS, CARD, FIGURE, RECORD)
    expect_former_save(Path(os.path.abspath(config.out)), names)
    if not resume:  # said now, and not after the base has been asked and weighed
        Checkpoints(config.checkpoints).expect_none()
    source, tokenizer = open_for_text(config.model)
    length = min(config.max_len, source.model.config.context)
    corpus = read_corpus(config.data, tokenizer, length, config.held_out, config.seed)
    config = config.for_corpus(corpus)

    base = source.model
    losses = {"base": evaluate(base, token_loss, corpus.held_out, config.batch)}
    if config.method == "qlora":
        source = source._replace(model=None)  # only the codes stay, once `base` is them
        base = quantize(base, config.targets, code=config.code)
        losses["quantized base"] = evaluate(base, token_loss, corpus.held_out, config.batch)
    questions = questions_of(config, corpus, tokenizer, base.config.context)
    samples = [{"prompt": q, "before": a} for q, a in asked(base, tokenizer, questions)]

    adapted = adapt(
        base, config.targets, rank=config.rank, alpha=config.alpha, dropout=config.dropout,
        rank_stabilized=config.rank_stabilized, rng=np.random.default_rng([config.seed, 17]),
    )  # fmt: skip
    if config.dora:
        adapted = dora(adapted)
    warn_of_rank(adapted)
    savable(config.out, adapted, source.name)  # refused now, and not when all is learned
    loaded, _ = memory("VmHWM"), Peak()  # which begins to watch anew
    started = time.monotonic()
    run, steps, here, training_peak = train(adapted, corpus, config, resume)
    seconds = time.monotonic() - started
    losses["adapted"] = min((entry["val"] for entry in run.history), default=losses["base"])
    record = {
        "kind": "finetune",
        "config": {**asdict(config), "checkpoints": str(config.checkpoints)},
        "model": {"name": source.name, "weights": source.about},
        "data": {"name": corpus.name, "kind": corpus.kind, **corpus.counts,
                 "train": len(corpus.train), "held_out": len(corpus.held_out),
                 "described": corpus.described()},
        "trainable": count(run.model, trainable=True),
        "base_bytes": held_bytes(base),
        "steps": {"planned": steps, "taken": run.steps, "here": here, "best": run.best_step},
        "stopped": run.stopped,
        "losses": losses,
        "history": run.history,
        "samples": samples,
        "seconds": {"training": round(seconds, 1)},
        "tokens_per_second": tokens_seen(corpus, config, here) / max(seconds, 1e-9),
        "peak_bytes": {"training": training_peak, "all": max(training_peak, loaded)},
        "machine": machine(),
    }  # fmt: skip
    if run.stopped == "interrupted":
        return record
    for sample, (_, answer) in zip(
        samples, asked(freeze(run.model), tokenizer, questions), strict=True
    ):
        sample["after"] = answer
    record["seconds"]["all"] = round(time.monotonic() - began, 1)
    save_adapter(config.out, run.model, base=source.name, extra=extra_files(record))
    Checkpoints(config.checkpoints).clear()
    return record


def train(
    adapted: Any, corpus: Corpus, config: FinetuneConfig, resume: bool
) -> tuple[Fit, int, int, int]:
    """The run, how many steps it was to take and how many were taken here, since the last
    interruption; bytes at the peak."""
    examples = config.batch * config.grad_accum
    wanted = config.epochs * len(corpus.train) / examples
    if not wanted < MOST_STEPS:
        raise MiniloraError(f"epochs: expected fewer than {MOST_STEPS:.0e} steps, found {wanted}")
    steps = max(1, math.ceil(wanted))
    about = {k: v for k, v in asdict(config).items() if k not in ("out", "prompts")}
    peaks: list[int] = []

    def weighed(*step: Any) -> Any:
        """A step, and what it took while the forked copies are there."""
        done = eager(*step)
        peaks.append(held_at_most())
        return done

    result = fit(
        AdamW(adapted, lr=config.lr, weight_decay=0.0),
        token_loss,
        corpus.train,
        steps=steps,
        batch=examples,
        accumulate=config.grad_accum,
        shards=config.shards,
        seed=config.seed,
        schedule=schedule("linear", steps, WARMUP),
        clip=CLIP,
        validation=corpus.held_out,
        every=math.ceil(steps / RECORDS),
        eval_batch=config.batch,
        checkpoints=Checkpoints(config.checkpoints, about | {"targets": list(config.targets)}),
        resume=resume,
        label=config.method,
        advance=weighed,
    )
    return result, steps, len(peaks), max([*peaks, held_at_most()])


def tokens_seen(corpus: Corpus, config: FinetuneConfig, steps: int) -> float:
    """Tokens of the training examples that were shown, padding left out."""
    shown = steps * config.batch * config.grad_accum
    share = len(corpus.train) / (len(corpus.train) + len(corpus.held_out))
    return corpus.counts["tokens"] * share * shown / len(corpus.train)


def questions_of(
    config: FinetuneConfig, corpus: Corpus, tokenizer: Tokenizer, context: int
) -> list[tuple[str, list[int]]]:
    """What the model is asked before and after: (text, ids); of a long one the end."""
    if config.prompts:
        chat = corpus.kind == "messages"
        return [(text, prompt_ids(tokenizer, text, chat)) for text in config.prompts]
    found, room = [], max(1, context - SAMPLE_TOKENS)  # an answer has to fit behind a question
    for part in (corpus.train, corpus.held_out):
        ids, targets = part.arrays["ids"][0], part.arrays["targets"][0]
        first = int(np.flatnonzero(targets >= 0)[0]) + 1  # up to the first token that is scored
        start = ids[: first if corpus.kind != "text" else 24][-room:].tolist()
        found.append((tokenizer.decode(start, control=True), start))
    return found


def asked(
    model: Any, tokenizer: Tokenizer, questions: list[tuple[str, list[int]]]
) -> list[tuple[str, str]]:
    """Each question with the likeliest answer."""
    ids = [ids for _, ids in questions]
    answers = generate(model, ids, SAMPLE_TOKENS, stop=tokenizer.stop)
    texts = [tokenizer.decode(answer) for answer in answers]
    return [(question, text) for (question, _), text in zip(questions, texts, strict=True)]
