"""The commands about real models and adapters: generate, finetune, merge, inspect, ..."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .engine.errors import MiniloraError
from .engine.progress import on_terminal
from .lab.report import write_record

MODEL = "smollm2 (default), a .gguf file, or a Hugging Face directory"


def folder(text: str) -> Path:
    """A directory that is there, or can be made: asked before the work, not after it."""
    path = Path(text)
    try:
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:  # a name that is too long; no directory to start from
        raise argparse.ArgumentTypeError(f"expected a folder to write to: {error}") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a folder to write to, found {nearest}")
    return path


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def show_and_write(
    args: argparse.Namespace, record: dict, report: Callable, path: Path, draw: Callable
) -> None:
    """Print a record as its table, or as it is, and write it with its figure."""
    say = partial(print, file=sys.stderr if args.json else None)
    text = json.dumps(record, indent=1) if args.json else report(record)
    show_then(text, partial(write_record, record, path, draw, say))


def show_then(text: str, write: Callable[[], Any]) -> None:
    """Print, and write even where that fails, by `| head` or a full disk: the work took long."""
    try:
        print(text)
    finally:
        write()


def expect_apart(out: str, model: str) -> None:
    """What is made of a model does not take its place: the base would be lost."""
    from .files.pretrained import SMOLLM2

    if model != SMOLLM2 and os.path.exists(out) and os.path.samefile(out, model):
        raise MiniloraError(f"out: expected another place than that of the model, found {out}")


def add_commands(commands: Any) -> None:
    """The parsers of this file, with what each runs."""

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        c = commands.add_parser(name, help=text)
        c.add_argument("--model", default="smollm2", help=MODEL)
        c.set_defaults(run=run)
        return c

    g = command("generate", run_generate, "continue a prompt, or answer it")
    g.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="an adapter; several: each answers, in one batch (`base`: none)",
    )
    g.add_argument("--prompt", required=True, help="the text; - reads it from the standard input")
    g.add_argument("--chat", action="store_true", help="as a conversation, by the model's template")
    g.add_argument("--system", help="what the conversation begins with")
    g.add_argument("--tokens", type=int, default=200, help="at most (default: 200)")
    g.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest")
    g.add_argument("--top-k", type=int)
    g.add_argument("--top-p", type=float)
    g.add_argument("--seed", type=int, default=0)

    f = command("finetune", run_finetune, "LoRA or QLoRA on a file of yours")
    f.add_argument(
        "--data",
        default="persona",
        help=".jsonl or .txt, or what ships: persona (default), genesis, plays",
    )
    f.add_argument("--out", required=True, help="directory for the adapter")
    f.add_argument("--method", default="lora", choices=("lora", "qlora"))
    f.add_argument("--rank", type=int, default=8)
    f.add_argument("--alpha", type=float, default=16.0)
    f.add_argument("--rslora", dest="rank_stabilized", action="store_true")
    f.add_argument("--dora", action="store_true", help="train the lengths of rows too (DoRA)")
    f.add_argument("--targets", type=names, default=("all-linear",), help="comma-separated")
    f.add_argument("--dropout", type=float, default=0.0)
    f.add_argument("--lr", type=float, help="default: 1.5e-3 for conversations, 1e-3 for text")
    f.add_argument("--epochs", type=float, help="default: 3 for conversations, 1 for text")
    f.add_argument("--batch", type=int, default=4, help="examples at a time (default: 4)")
    f.add_argument("--grad-accum", type=int, default=1, help="batches in a step (default: 1)")
    f.add_argument(
        "--shards",
        type=int,
        default=1,
        help="parts of a batch worked on at the same time, a processor each (default: 1)",
    )
    f.add_argument("--max-len", type=int, default=128, help="tokens of an example (default: 128)")
    f.add_argument("--held-out", type=float, default=0.1, help="share (default: 0.1)")
    f.add_argument("--code", default="nf4", help="of the base under qlora (default: nf4)")
    f.add_argument("--seed", type=int, default=0)
    f.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        help="asked before and after; may be given again",
    )
    f.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    f.add_argument("--json", action="store_true", help="print the record instead of the report")

    m = command("merge", run_merge, "a model with adapters merged in, as a directory")
    m.add_argument("--adapter", action="append", default=[], metavar="DIR", help="may be repeated")
    m.add_argument("--out", required=True, help="directory that transformers loads")
    m.add_argument("--dtype", default="float32", choices=("float32", "float16"))

    i = commands.add_parser("inspect", help="ranks, norms and spectra of an adapter")
    i.add_argument("adapter", metavar="DIR")
    i.add_argument("--json", action="store_true", help="print the record instead of the table")
    i.set_defaults(run=run_inspect)

    c = command("convert", run_convert, "an adapter as PEFT, llama.cpp or mlx-lm read it")
    c.add_argument("--adapter", required=True, metavar="DIR")
    c.add_argument("--to", required=True, choices=("peft", "gguf", "mlx"))
    c.add_argument("--out", required=True, help="directory, or for gguf a file")

    p = command("perplexity", run_perplexity, "how well a model predicts a text, by code")
    p.add_argument("--data", default="genesis", help=".txt or .jsonl, or genesis (default), plays")
    p.add_argument(
        "--codes",
        type=names,
        default=("float32",),
        help="comma-separated: float32,nf4,nf4+dq,fp4,int4,... (+dq: double)",
    )
    p.add_argument("--adapter", metavar="DIR")
    p.add_argument("--windows", type=int, default=32, help="how many of the text (default: 32)")
    p.add_argument("--max-len", type=int, default=256, help="tokens of a window (default: 256)")
    p.add_argument("--block", type=int, default=64)
    p.add_argument("--json", action="store_true", help="print the record instead of the table")
    p.add_argument("--out", type=folder, default=Path("figures"), help="folder for what it writes")


def run_generate(args: argparse.Namespace) -> int:
    from .lab import answer

    if args.prompt == "-" and sys.stdin is None:
        raise MiniloraError("prompt: expected a text on the standard input, found it closed")
    try:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as error:
        raise MiniloraError(f"prompt: expected text ({error})") from None
    source, tokenizer = answer.open_for_text(args.model)
    ids = answer.prompt_ids(tokenizer, text, args.chat, args.system)
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    options["seeds"] = [args.seed] * max(1, len(args.adapter))
    if len(args.adapter) > 1:
        found = answer.answers(source.model, tokenizer, args.adapter, ids, args.tokens, **options)
        for name, said in zip(args.adapter, found, strict=True):
            print(f"[{name}] {said.strip()}")
        return 0
    model = answer.with_adapters(source.model, args.adapter)
    began = time.monotonic()
    for piece in answer.streamed(model, tokenizer, ids, args.tokens, **options):
        print(piece, end="", flush=True)
    print()
    if on_terminal():
        print(f"({time.monotonic() - began:.1f} s)", file=sys.stderr)
    return 0


def run_finetune(args: argparse.Namespace) -> int:
    from .lab.finetune import FinetuneConfig, finetune
    from .lab.finetune_report import finetune_report

    fields = FinetuneConfig.__dataclass_fields__
    options = {name: value for name, value in vars(args).items() if name in fields}
    options["prompts"] = tuple(args.prompts)
    record = finetune(FinetuneConfig(**options), resume=args.resume)
    print(json.dumps(record, indent=1) if args.json else finetune_report(record))
    if record["stopped"] == "interrupted":
        return 130
    print(f"\nadapter  {args.out}", file=sys.stderr if args.json else sys.stdout)
    return 0


def run_merge(args: argparse.Namespace) -> int:
    from .files.huggingface import save_huggingface
    from .files.pretrained import open_model
    from .lab.answer import with_adapters

    source = open_model(args.model)
    expect_apart(args.out, args.model)
    model = with_adapters(source.model, args.adapter)
    save_huggingface(args.out, model, source.tokenizer, args.dtype)
    print(f"wrote {args.out}: {source.name}, {len(args.adapter)} adapters merged, {args.dtype}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    from .lab.inspect_adapter import inspect_adapter, inspect_report

    record = inspect_adapter(args.adapter)
    print(json.dumps(record, indent=1) if args.json else inspect_report(record))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from .files.export import export_gguf, export_mlx
    from .files.peft import load_adapter, save_adapter
    from .files.pretrained import open_model

    source = open_model(args.model)
    expect_apart(args.out, args.model)
    adapted = load_adapter(args.adapter, source.model)
    if args.to == "peft":
        save_adapter(args.out, adapted, base=source.name)
    else:
        {"gguf": export_gguf, "mlx": export_mlx}[args.to](args.out, adapted)
    print(f"wrote {args.out}")
    return 0


def run_perplexity(args: argparse.Namespace) -> int:
    from .lab import perplexity as lab

    if args.windows < 2:
        raise MiniloraError(f"windows: expected at least 2, found {args.windows}")
    options = {
        name: value for name, value in vars(args).items()
        if name in lab.PerplexityConfig.__dataclass_fields__
    }  # fmt: skip
    record = lab.perplexity(lab.PerplexityConfig(**options))
    path = args.out / "perplexity.json"
    show_and_write(args, record, lab.perplexity_report, path, lab.perplexity_figure)
    return 0
