"""The command line, thin: parse, call one function, print."""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from . import __version__
from .cli_model import add_commands, folder, names, show_and_write, show_then
from .engine.errors import MiniloraError
from .engine.workers import threads
from .lab.machine import keep_large_blocks
from .lab.report import write_record

OVERVIEW = """\
minilora {version}: LoRA and QLoRA from scratch in NumPy.

  minilora compare           full fine-tuning against LoRA, rank by rank
  minilora compare --task T  {tasks}
  minilora forgetting        what is learned against what is forgotten, as paths
  minilora swap              four adapters on one frozen base
  minilora targets           which matrices to adapt, at an equal budget
  minilora variants          PiSSA, LoftQ and DoRA beside LoRA
  minilora memory            what a published model needs, on which card it fits
  minilora quantize          a code's levels, its error by block and by bits
  minilora paging            Adam's moments on pages, a spike they make room for
  minilora finetune          LoRA or QLoRA on a real model and a file of yours
  minilora generate          let a model write, with adapters or without
  minilora perplexity        how well it predicts a text, code by code
  minilora inspect DIR       what an adapter is; merge and convert: for others
  minilora bench             time and memory of a step against torch and PEFT
  minilora book              run the chapters again; --site DIR: all as a site
  minilora gpu-check         with CuPy and a card: is every op right, how fast?
  minilora pretrain dates    make a shipped base again

Each takes --help.  The README says what to read, and in which order.
"""
WIDTH, COLUMN = 80, 29  # of a terminal, and where the second column begins


class Parser(argparse.ArgumentParser):
    """Argparse whose complaint is one line, and whose exit code is 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, found {text!r}") from None


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="minilora", description="LoRA and QLoRA from scratch in NumPy.")
    top.add_argument("--version", action="version", version=__version__)
    top.set_defaults(run=run_overview)
    commands = top.add_subparsers(dest="command", parser_class=Parser)

    c = commands.add_parser("compare", help="full fine-tuning against LoRA, rank by rank")
    one = c.add_mutually_exclusive_group()
    one.add_argument("--task", default="dates", help="which task (default: dates)")
    one.add_argument("--data", type=Path, help="a text file of your own, instead of a task")
    c.add_argument("--methods", type=names, help="comma-separated: full,lora,qlora,qlora-fp4,...")
    c.add_argument("--ranks", type=whole_numbers, help="comma-separated, e.g. 1,2,4,8")
    c.add_argument("--seeds", type=int, default=3, help="how many seeds are reported (default: 3)")
    c.add_argument("--quick", action="store_true", help="one seed, three ranks, fewer steps")
    c.add_argument("--out", type=folder, default=Path("figures"), help="folder for what it writes")
    c.add_argument("--json", action="store_true", help="print the record instead of the table")
    c.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    c.set_defaults(run=run_compare)

    for name, text in (
        ("forgetting", "what is learned against what is forgotten, as paths"),
        ("swap", "four adapters on one frozen base, each asked for every task"),
        ("targets", "which matrices to adapt, at the same number of trained numbers"),
        ("variants", "PiSSA, LoftQ and DoRA beside LoRA, each at its own best rate"),
        ("paging", "a long sequence among short ones, with paged and unpaged Adam"),
    ):
        e = commands.add_parser(name, help=text)
        if name != "paging":
            e.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
            e.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
        e.add_argument(
            "--out", type=folder, default=Path("figures"), help="folder for what it writes"
        )
        e.add_argument("--json", action="store_true", help="print the record, not the table")
        e.set_defaults(run=run_experiment)

    b = commands.add_parser("bench", help="time and memory against torch, behind a gate")
    b.add_argument("--suite", default="step", help="step (default), memory, micro, generate, "
                   "optimizer, quantize, scaling or threads")  # fmt: skip
    b.add_argument("--shapes", type=names, help="comma-separated: tiny,S0,S1,S2,S3,smollm2")
    b.add_argument("--modes", type=names, help="comma-separated: lora,full,qlora")
    b.add_argument("--baselines", type=names, help="comma-separated, e.g. torch,hf,primitives")
    b.add_argument("--threads", type=int, default=2, help="on both sides (default: 2)")
    b.add_argument("--rounds", type=int, default=7, help="clean rounds wanted (default: 7)")
    b.add_argument("--out", type=folder, default=Path("figures"), help="folder for what it writes")
    b.add_argument("--json", action="store_true", help="print the record instead of the table")
    b.set_defaults(run=run_bench)

    m = commands.add_parser("memory", help="what a published model needs, method by method")
    m.add_argument("--model", default="llama-65b", help="e.g. gpt2, smollm2-135m, llama-7b")
    m.add_argument("--method", default="qlora", choices=("full", "lora", "qlora"))
    m.add_argument("--rank", type=int, default=64)
    m.add_argument("--batch", type=int, default=1)
    m.add_argument("--length", type=int, default=512, help="tokens of a sequence (default: 512)")
    m.add_argument("--dtype", default="bf16", choices=("bf16", "float32"))
    m.add_argument("--optimizer", default="adamw", help="adamw (default), adamw8bit or sgd")
    m.add_argument("--recompute", action="store_true", help="keep only the inputs of blocks")
    m.add_argument("--code", default="nf4")
    m.add_argument("--block", type=int, default=64)
    m.add_argument("--no-double", dest="double", action="store_false")
    m.add_argument("--json", action="store_true", help="print the record instead of the table")
    m.add_argument("--out", type=folder, default=Path("figures"), help="folder for what it writes")
    m.set_defaults(run=run_memory)

    q = commands.add_parser("quantize", help="what a code costs and what it loses")
    q.add_argument("--code", default="nf4", help="nf4 (default), fp4, e2m1, int4, int4_max, int8")
    q.add_argument("--block", type=int, default=64)
    q.add_argument("--no-double", dest="double", action="store_false")
    q.add_argument("--tensor", help="FILE.safetensors:NAME (default: a weight of a shipped base)")
    q.add_argument("--json", action="store_true", help="print the record instead of the tables")
    q.add_argument("--out", type=folder, default=Path("figures"), help="folder for what it writes")
    q.set_defaults(run=run_quantize)

    k = commands.add_parser("book", help="execute chapters and write them back, the same each time")
    k.add_argument("chapters", nargs="*", type=Path, help="notebooks (default: all of chapters/)")
    k.add_argument("--from", dest="draft", type=Path, help="make the one notebook from a draft")
    k.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    k.add_argument("--fast", action="store_true", help="every cell, with shorter runs")
    k.add_argument("--site", type=Path, help="build the book into this folder; runs no chapter")
    k.set_defaults(run=run_book)

    g = commands.add_parser("gpu-check", help="every op on a GPU against float64 NumPy")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--out", type=folder, default=Path("figures/gpu"), help="folder for the record")
    g.set_defaults(run=run_gpu_check)

    add_commands(commands)

    p = commands.add_parser("pretrain", help="make a shipped base again")
    p.add_argument("base", help="which base: dates, digits, facts, letters or text")
    p.add_argument("--steps", type=int, help="shorter or longer than the recipe")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="file to write (default: where the base ships)")
    p.set_defaults(run=run_pretrain)
    return top


def run_overview(args: argparse.Namespace) -> int:
    from .train.tasks import TASKS

    told = f"{', '.join(TASKS)}; --data FILE: a text of yours"
    tasks = textwrap.wrap(told, WIDTH - COLUMN, break_on_hyphens=False)
    print(OVERVIEW.format(version=__version__, tasks=("\n" + " " * COLUMN).join(tasks)), end="")
    return 0


def run_memory(args: argparse.Namespace) -> int:
    from .lab import memory_report as lab
    from .lab.memory import Setting

    names = (
        "method",
        "rank",
        "batch",
        "length",
        "dtype",
        "optimizer",
        "recompute",
        "code",
        "block",
    )
    options = {name: getattr(args, name) for name in (*names, "double")}
    setting = Setting(lab.config_of(args.model), **options)
    record = lab.memory_record(args.model, setting)
    print(json.dumps(record, indent=1) if args.json else lab.memory_table(record))
    say = partial(print, file=sys.stderr if args.json else sys.stdout)
    models = ("llama-7b", "llama-65b") if args.model == "llama-65b" else (args.model,)
    records = [lab.memory_record(m, replace(setting, config=lab.config_of(m))) for m in models]
    whole = {"kind": "memory", "records": records}
    write_record(whole, args.out / "memory_by_model.json", lab.memory_by_model, say)
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    from .lab import quantize as lab

    config = lab.QuantizeConfig(args.code, args.block, args.double, args.tensor)
    record = lab.quantize_lab(config)
    print(json.dumps(record, indent=1) if args.json else lab.quantize_report(record))
    say = partial(print, file=sys.stderr if args.json else sys.stdout)
    write_record(record, args.out / f"{args.code}_levels.json", lab.levels_figure, say)
    write_record(record, args.out / "codes_by_block.json", lab.codes_figure, say)
    return 0


def run_book(args: argparse.Namespace) -> int:
    from .book.write import write_chapters

    chapters = args.chapters or sorted(Path("chapters").glob("*.ipynb"))
    if args.site:
        from .book.site import build_site

        if args.draft:
            raise MiniloraError("book: expected --from or --site, found both")
        print(f"wrote {build_site(args.site, chapters) / 'index.html'}")
        return 0
    if not chapters or (args.draft and len(chapters) != 1):
        wanted = "one notebook to make" if args.draft else "notebooks, or a folder chapters/"
        raise MiniloraError(f"book: expected {wanted}, found {len(chapters)}")
    for path in write_chapters(chapters, args.draft, args.device, args.fast):
        print(f"wrote {path}")
    return 0


def run_gpu_check(args: argparse.Namespace) -> int:
    from .files.atomic import replace_file
    from .lab.gpu_check import GpuCheckConfig, gpu_check
    from .lab.gpu_figures import gpu_figures
    from .lab.gpu_report import gpu_report

    record = gpu_check(GpuCheckConfig(seed=args.seed))
    if "skipped" in record:
        print(gpu_report(record))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu_check.json"
    raw = json.dumps(record, indent=1).encode() + b"\n"
    show_then(gpu_report(record), partial(replace_file, path, raw))
    print(f"record   {path}")
    try:
        for figure in gpu_figures(record, args.out):
            print(f"figure   {figure}")
    except MiniloraError as error:  # no matplotlib
        print(error)
    return 0 if record["passed"] else 1


def run_experiment(args: argparse.Namespace) -> int:
    """An experiment without further options: run, print, write the record, draw."""
    from .lab import forgetting, paging, swap, targets, task_figures, variants

    run, config, report, draw = {
        "forgetting": (
            forgetting.forgetting, forgetting.ForgettingConfig,
            forgetting.forgetting_report, task_figures.forgetting_figure,
        ),
        "swap": (swap.swap, swap.SwapConfig, swap.swap_report, task_figures.swap_figure),
        "targets": (
            targets.targets, targets.TargetsConfig, targets.targets_report, targets.targets_figure,
        ),
        "variants": (
            variants.variants, variants.VariantsConfig,
            variants.variants_report, variants.variants_figure,
        ),
        "paging": (
            paging.paging, paging.PagingConfig, paging.paging_report, paging.paging_figure,
        ),
    }[args.command]  # fmt: skip
    options = {k: v for k, v in vars(args).items() if k in ("seeds", "jobs")}
    if min(options.values(), default=1) < 1:
        raise MiniloraError(f"expected seeds and jobs >= 1, found {options}")
    record = run(config(**options))
    show_and_write(args, record, report, args.out / f"{args.command}.json", draw)
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from .lab.bench import BenchConfig, bench
    from .lab.bench_report import bench_figure, bench_report

    config = BenchConfig(
        suite=args.suite,
        shapes=args.shapes,
        modes=args.modes,
        baselines=args.baselines,
        threads=args.threads,
        rounds=args.rounds,
    )
    record = bench(config)
    path = args.out / f"bench_{config.suite}.json"
    show_and_write(args, record, bench_report, path, bench_figure)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from .files.atomic import replace_file
    from .lab import compare, figures
    from .lab.report import report

    name = args.task if args.data is None else f"data:{args.data}"
    config = compare.CompareConfig(
        task=name,
        methods=args.methods,
        ranks=args.ranks,
        seeds=args.seeds,
        jobs=args.jobs,
    )
    task = compare.get_task(config.task)
    if args.quick:
        config = compare.quick(config, task)
    record = compare.compare(config)
    say = partial(print, file=sys.stderr if args.json else sys.stdout)
    name = args.task if args.data is None else f"data-{args.data.stem}"  # a task's stay its own
    quick = "_quick" if args.quick else ""
    suffix = quick if name == "dates" else f"_{name}{quick}"
    path = args.out / f"compare_{name}{quick}.json"
    text = json.dumps(record, indent=1)
    args.out.mkdir(parents=True, exist_ok=True)
    write = partial(replace_file, path, text.encode() + b"\n")
    show_then(text if args.json else report(record), write)
    say(f"\nrecord   {path}")
    try:
        for draw in (figures.rank_vs_quality, figures.memory):
            say(f"figure   {draw(record, args.out / f'{draw.__name__}{suffix}.png')}")
    except MiniloraError as error:
        say(error)
    return 0


def run_pretrain(args: argparse.Namespace) -> int:
    import numpy as np

    from .files.trees import DATA, save_tree
    from .train.pretrain import pretrain

    path = args.out or DATA / f"{args.base}.safetensors"
    if path.is_dir() or not path.absolute().parent.is_dir():  # asked before the work
        raise MiniloraError(f"out: expected a file in a folder that is there, found {path}")
    result, score = pretrain(args.base, steps=args.steps, seed=args.seed)
    save_tree(path, result.model, np.float16)
    print(f"{args.base}: score {score:.3f} on test data after {result.steps} steps; wrote {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    0 when it did what it says, 2 for bad input, 130 after Ctrl-C, 141 where nobody reads on.
    """
    args = parser().parse_args(arguments)
    name = " ".join(filter(None, ("minilora", args.command)))
    if arguments is None:  # a process of our own
        keep_large_blocks()
        if sys.stdout is not None:  # a sign that the terminal cannot show is no reason to stop
            sys.stdout.reconfigure(errors="replace")
    try:
        with threads(os.cpu_count() or 1):
            code = args.run(args)
        print(end="", flush=True)  # or Python would find out later, and say so in its own way
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MiniloraError, OSError, MemoryError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
