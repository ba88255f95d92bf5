"""Small models, tokenizers and adapters for the tests of files: every family, nothing special."""

import copy
import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minilora import adapt, cli
from minilora.engine.attention import RopeScaling
from minilora.engine.backend import device_of, to_device
from minilora.engine.errors import MiniloraError
from minilora.engine.tensor import Parameter, Tensor
from minilora.files.chat import CHATML
from minilora.files.huggingface import save_huggingface
from minilora.files.tokenizer import Tokenizer, train_tokenizer
from minilora.files.trees import DATA
from minilora.lora.variants import dora
from minilora.model.module import freeze, rebuild
from minilora.model.transformer import TransformerConfig, init_transformer

SIZE = {"vocab": 320, "width": 32, "layers": 2, "heads": 4, "context": 64}
FAMILIES = {
    "gpt2": TransformerConfig.gpt2(**SIZE),
    "llama": TransformerConfig(**SIZE, key_heads=2, hidden=48, tied=False),
    "llama tied": TransformerConfig(**SIZE, key_heads=1, hidden=48, rope_theta=5e5),
    "llama scaled": TransformerConfig(
        **SIZE, hidden=48, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)
    ),
    "llama biased": TransformerConfig(**SIZE, hidden=48, bias=True),
    "qwen2": TransformerConfig(**SIZE, key_heads=2, hidden=48, qkv_bias=True),
}


def model_of(name="llama", seed=0):
    """A frozen model whose every weight, norms and biases too, is at no special value."""
    rng = np.random.default_rng(seed)

    def shaken(path, node):
        if not isinstance(node, Parameter):
            return node
        noise = rng.standard_normal(node.shape, dtype=np.float32)
        return Parameter(node.data + np.float32(0.1) * noise)

    return freeze(rebuild(init_transformer(FAMILIES[name], rng, std=0.1), shaken))


def adapted_of(model, seed=1, targets="all-linear", rank=3, alpha=5.0, **options):
    """An adapter with both factors away from zero."""
    rng = np.random.default_rng(seed)
    device = "cpu" if isinstance(model.norm.weight.data, np.ndarray) else "cuda"
    adapted = adapt(model, targets, rank=rank, alpha=alpha, rng=rng, **options)

    def filled(path, node):
        if path.endswith(".B") and isinstance(node, Tensor):
            factor = 0.1 * rng.standard_normal(node.shape, dtype=np.float32)
            return Parameter(to_device(factor, device))
        return node

    return rebuild(adapted, filled)


def dora_of(model, **options):
    """A DoRA model with nothing at its start."""
    adapted, rng = dora(adapted_of(model, **options)), np.random.default_rng(4)

    def shaken(path, node):
        if path.endswith(".magnitude"):
            change = rng.uniform(0.8, 1.2, node.shape).astype(np.float32)
            return Parameter(node.data * to_device(change, device_of(node.data)))
        return node

    return rebuild(adapted, shaken)


def logits(model, ids=None):
    """Logits of some fixed ids."""
    if ids is None:
        ids = np.random.default_rng(7).integers(0, model.config.vocab, (2, 12))
    return model(ids).numpy()


TEXT = (DATA / "persona.jsonl").read_text()


def tokenizer_of(size=320, split="smollm", chat=True):
    """A small vocabulary with the control tokens of ChatML."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made = train_tokenizer(TEXT, size, split, special)
    return Tokenizer(
        made.tokens, made.merges, split, made.special, made.control,
        stop=(made.special["<|im_end|>" if chat else "<|endoftext|>"],),
        nfc=split == "qwen2", whole_words=split == "llama3",
        chat_template=CHATML if chat else None,
    )  # fmt: skip


def mutated(rng: random.Random, content: bytes, end: int) -> bytes:
    """1, 2 or 4 edits, most of them before `end`, where a file says what it is."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 2, 4])):
        if len(content) < 12:
            break
        at = rng.randrange(min(end, len(content)))
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.randrange(256)
        elif kind == 2:
            del content[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            content[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            wide = rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 32, 2**64 - 1])
            content[at : at + 8] = wide.to_bytes(8, "little")
        elif kind == 5 and rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        elif kind == 6:
            content[at : at + 4] = rng.choice([0, 1, 7, 8, 9, 99]).to_bytes(4, "little")
    return bytes(content)


ODD = [
    None, True, False, 0, -1, 1, 2, 1 << 40, 10**400, 0.5, 1e308, "", "a", "0", [], [1], ["a"],
    [None], [[1]], [{}], {}, {"a": 1}, {"id": 0}, {"type": "Sequence"},
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterable[tuple]:
    """The paths of all that is inside a JSON value; of a long list, of its beginning."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:6])
    for key, item in inner:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def misshapen(rng: random.Random, value: dict) -> dict:
    """A JSON object with one or two values of another kind, gone, or where none is due."""
    value = json.loads(json.dumps(value))  # a copy, faster than copy.deepcopy
    for _ in range(rng.choice([1, 1, 2])):
        found = list(places(value))
        if not found:
            break
        *way, last = rng.choice(found)
        inner = value
        for key in way:
            inner = inner[key]
        kind = rng.randrange(3)
        if kind == 0 and isinstance(inner, dict):
            del inner[last]
        elif kind == 1 and isinstance(inner, dict):
            inner[rng.choice(["a", "type", "id", "special"])] = copy.deepcopy(rng.choice(ODD))
        else:
            inner[last] = copy.deepcopy(rng.choice(ODD))
    return value


@contextmanager
def refilled(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yields `fill(content)`, which makes that the whole content of the file.

    The file stays open: to empty one, a hundred thousand times, takes longer than what is tested.
    """
    with open(path, "wb", buffering=0) as file:

        def fill(content: bytes) -> None:
            os.pwrite(file.fileno(), content, 0)
            os.truncate(file.fileno(), len(content))

        yield fill


def only_our_errors(cases: Iterable[Any], read: Callable[[Any], Any], size: int) -> int:
    """`read` each case; how many it takes.

    The rest must raise MiniloraError.  None may take a second, nor memory beyond 64 MiB and
    four times `size`, which is what a case has in bytes.
    """
    accepted, slowest = 0, 0.0
    tracemalloc.start()
    try:
        for case in cases:
            began = time.process_time()
            try:
                read(case)
                accepted += 1
            except MiniloraError:
                pass
            slowest = max(slowest, time.process_time() - began)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert slowest < 1
    assert peak < (64 << 20) + 4 * size
    return accepted


def small_place(folder):
    """A small model with a tokenizer, and data that it can learn."""
    save_huggingface(folder / "model", model_of("llama"), tokenizer_of())
    words = ("red", "blue", "green")
    lines = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]}
        for w in words * 8
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "text.txt").write_text("one two three four five six seven. " * 40)
    return folder


def command(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = cli.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err
