"""What a fine-tune leaves beside the adapter: a card to read, a record, and its losses drawn."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..engine.errors import MiniloraError
from .figures import BLUE, RED, canvas, save
from .report import size

CARD, RECORD, FIGURE = "README.md", "finetune.json", "loss.png"


def extra_files(record: dict[str, Any]) -> dict[str, bytes]:
    """Card, record and, where matplotlib is installed, the figure: name -> bytes."""
    files = {
        CARD: model_card(record).encode(),
        RECORD: json.dumps(record, indent=1).encode() + b"\n",
    }
    try:
        with TemporaryDirectory() as folder:
            files[FIGURE] = loss_figure(record, Path(folder) / FIGURE).read_bytes()
    except MiniloraError:
        pass
    return files


def finetune_report(record: dict[str, Any]) -> str:
    """The run in a few lines: losses, samples, speed and memory."""
    config, steps, losses = record["config"], record["steps"], record["losses"]
    since = "" if steps["here"] == steps["taken"] else f", {steps['here']} of them after a stop"
    lines = [
        record["data"]["described"],
        f"{config['method']}{' (DoRA)' * config['dora']} rank {config['rank']}, "
        f"alpha {config['alpha']:g}, rate {config['lr']:g}: {record['trainable']:,} numbers train "
        f"beside a base of {size(record['base_bytes'])}",
        f"{steps['taken']} of {steps['planned']} steps{since}, in "
        f"{record['seconds']['training']:.0f} s, "
        f"{record['tokens_per_second']:.0f} tokens/s (evaluations included); peak memory of the "
        f"process {size(record['peak_bytes']['training'])} while training, "
        f"{size(record['peak_bytes']['all'])} in all",
    ]
    if record["stopped"] == "interrupted":
        return "\n".join(
            [*lines, f"interrupted; the state is in {config['checkpoints']}: go on with --resume"]
        )
    told = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    lines.append(f"held-out loss, nats per token: {told} (best after step {steps['best']})")
    if losses["adapted"] >= losses["base"]:
        lines.append("the held-out loss did not fall: try another rate, more data, fewer steps")
    for sample in record["samples"]:
        lines += [
            "", f"  {last_line(sample['prompt'])!r}",
            f"    before  {sample['before'].strip()!r}",
            f"    after   {sample['after'].strip()!r}",
        ]  # fmt: skip
    return "\n".join(lines)


def last_line(prompt: str) -> str:
    """What the user said last, without the marks of the conversation."""
    text = prompt.removesuffix("<|im_start|>assistant\n").strip().removesuffix("<|im_end|>")
    return text.rpartition("<|im_start|>user\n")[2]


def model_card(record: dict[str, Any]) -> str:
    """A short card, with the front matter that the tools of Hugging Face read."""
    config, losses, data = record["config"], record["losses"], record["data"]
    base = record["model"]["name"]
    targets = ", ".join(config["targets"])
    samples = "\n".join(
        f"| {cell(last_line(s['prompt']))} | {cell(s['before'])} | {cell(s['after'])} |"
        for s in record["samples"]
    )
    told = "\n".join(f"| {name} | {value:.4f} |" for name, value in losses.items())
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, minilora]
---

# A {"DoRA" if config["dora"] else "LoRA"} adapter for {base}

Rank {config["rank"]}, alpha {config["alpha"]:g}{" (rank-stabilized)" * config["rank_stabilized"]} \
on {targets}: {record["trainable"]:,} numbers. Trained by minilora {record["machine"]["minilora"]} \
({config["method"]}{" over " + config["code"] if config["method"] == "qlora" else ""}) on \
{data["name"]}, {data["train"]:,} examples, {record["steps"]["taken"]} steps of \
{config["batch"] * config["grad_accum"]}, rate {config["lr"]:g}, seed {config["seed"]}. The base's \
weights were {record["model"]["weights"]}.

| held-out loss, nats per token | {data["held_out"]:,} examples |
|---|---|
{told}

| asked | before | after |
|---|---|---|
{samples}

Load it with `PeftModel.from_pretrained(base, DIR)` or
`minilora generate --model BASE --adapter DIR --prompt ...`. Everything the run was is in
`{RECORD}`. The base has a license of its own.
"""


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def loss_figure(record: dict[str, Any], path: str | Path) -> Path:
    """Training and held-out loss over the steps, and the base's as a line."""
    history, losses = record["history"], record["losses"]
    figure, (ax,) = canvas(6.4, 3.8)
    steps = [entry["step"] for entry in history]
    ax.plot(steps, [e["loss"] for e in history], "o-", color=BLUE, label="training")
    held = [losses["base"], *(e["val"] for e in history)]
    ax.plot([0, *steps], held, "s-", color=RED, label="held out")
    if "quantized base" in losses:
        ax.plot(0, losses["quantized base"], "D", color=RED, mfc="white", label="quantized base")
    ax.axvline(record["steps"]["best"], color="0.6", lw=1, ls=":")
    ax.annotate("kept", (record["steps"]["best"], 1), xycoords=("data", "axes fraction"),
                ha="right", va="top", color="0.4", fontsize=9, xytext=(-4, 0),
                textcoords="offset points")  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xlabel("steps")
    ax.set_ylabel("nats per scored token")
    ax.legend(frameon=False)
    return save(figure, path)
