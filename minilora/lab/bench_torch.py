"""Torch's side of the race, in the worker process: eager, compiled, Hugging Face, bitsandbytes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from ..engine.errors import MiniloraError
from ..model.module import parameters
from .bench_ours import Contender, all_weights, drawn_gradients, moved, sums
from .bench_peers import build, parameter_name
from .bench_shapes import ALPHA, BETAS, WEIGHT_DECAY, Job, adapted_paths, prompts


class Theirs(Contender):
    """The model of the job in torch, with as many threads as the job says."""

    def __init__(self, job: Job):
        """bitsandbytes makes its own codes, of the same weights."""
        super().__init__(replace(job, mode="lora") if job.mode == "qlora" else job)

    def build(self) -> None:
        job = self.job
        torch.set_num_threads(job.threads)
        self.working = torch.get_num_threads()
        self.config, self.adapters = job.shape.model, adapted_paths(self.start)
        self.kind = job.contender if job.contender in ("hf", "bnb") else "plain"
        gelu = "none" if job.contender == "erf" else "tanh"
        self.model = build(self.config, self.start, self.kind, self.adapters, job.rank, ALPHA, gelu)
        if job.device == "cuda" and not torch.cuda.is_available():
            raise MiniloraError("torch finds no CUDA device")
        self.model.to(job.device)

    def optimizer(self) -> Any:
        """Fused AdamW; matrices decay, norms and biases do not."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.job.lr, betas=BETAS, fused=True)

    def before(self) -> None:
        """An import may have set the threads behind our back."""
        if torch.get_num_threads() != self.job.threads:
            raise MiniloraError(
                f"bench: expected torch at {self.job.threads} threads, "
                f"found {torch.get_num_threads()}"
            )

    def taken(self) -> int | None:
        return torch.cuda.max_memory_reserved() if self.job.device == "cuda" else None

    def products(self) -> tuple[Callable[[], Any], int]:
        a, b, out = torch.ones(1024, 512), torch.ones(512, 1024), torch.empty(1024, 1024)
        return lambda: torch.mm(a, b, out=out), 1


class TheirStep(Theirs):
    """Forward, backward and AdamW over the whole batch.

    In a bf16 job base and activations are in bfloat16, adapters and their AdamW in float32, as
    PEFT has it (see `build`); no autocast.  The loss is float32, from logits that are widened,
    as Hugging Face's own loss does.
    """

    def build(self) -> None:
        super().build()
        self.model.train(self.kind != "hf")  # Hugging Face's GPT-2 drops out in training
        arrays = self.data.arrays
        self.ids, self.targets = (
            torch.from_numpy(arrays[n]).to(self.job.device) for n in ("ids", "targets")
        )
        self.adamw = self.optimizer()
        self.loss = (
            torch.compile(self.mean_loss) if self.job.contender == "compile" else self.mean_loss
        )

    def mean_loss(self) -> Any:
        out = self.model(self.ids)
        logits = out.logits if self.kind == "hf" else out
        return F.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())

    def step(self) -> None:
        self.adamw.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.adamw.step()
        self.losses.append(loss.item())


class TheirOptimizer(Theirs):
    """Fused AdamW alone, on gradients that are drawn once."""

    def build(self) -> None:
        super().build()
        held = dict(self.model.named_parameters())
        ours = parameters(self.start)
        self.trained = []
        for path, g in drawn_gradients(ours).items():
            name, _ = parameter_name(path, self.config, "plain", bool(self.adapters))
            held[name].grad = torch.from_numpy(g)
            self.trained.append((held[name], held[name].detach().clone().numpy(), g))
        self.adamw = self.optimizer()

    def step(self) -> None:
        self.adamw.step()

    def value(self) -> list[float]:
        return [moved(first, p.detach().numpy(), g, self.job.lr) for p, first, g in self.trained]


class TheirGenerate(Theirs):
    """Greedy tokens: a hand-written loop over a cache, or Hugging Face's `generate`."""

    def build(self) -> None:
        super().build()
        self.model.eval()
        self.prompts = torch.from_numpy(prompts(self.job))

    @torch.inference_mode()
    def step(self) -> None:
        new = self.job.new_tokens
        if self.kind == "hf":
            made = self.model.generate(
                input_ids=self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                max_new_tokens=new,
                do_sample=False,
                use_cache=True,
            )
            self.made = made[:, self.prompts.shape[1] :]
            return
        caches = [[] for _ in range(self.config.layers)]
        ids, made = self.prompts, []
        for _ in range(new):
            ids = self.model(ids, caches)[:, -1].argmax(-1, keepdim=True)
            made.append(ids)
        self.made = torch.cat(made, 1)

    def value(self) -> list[float]:
        return self.made.flatten().double().tolist()


class TheirQuantize(Theirs):
    """The same weights by bitsandbytes."""

    def build(self) -> None:
        from bitsandbytes import functional

        torch.set_num_threads(self.job.threads)
        self.working = torch.get_num_threads()
        self.weights = torch.from_numpy(all_weights(self.job))
        self.quantize = functional.quantize_4bit

    def step(self) -> None:
        self.made, self.state = self.quantize(self.weights, blocksize=64, quant_type="nf4")

    def value(self) -> list[float]:
        return sums(self.made.numpy(), self.state.absmax.numpy())


def contender(job: Job) -> Contender:
    kinds = {
        "step": TheirStep,
        "optimizer": TheirOptimizer,
        "generate": TheirGenerate,
        "quantize": TheirQuantize,
    }
    return kinds[job.kind](job)
