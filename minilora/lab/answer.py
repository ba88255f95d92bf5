"""What a model answers, as it is being written; with adapters, each in a row of one batch."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..engine.backend import to_numpy
from ..engine.errors import MiniloraError
from ..files.peft import load_adapter
from ..files.pretrained import Pretrained, open_model
from ..files.tokenizer import Tokenizer
from ..lora.adapters import mix, take
from ..lora.lora import merge
from ..lora.variants import DoRALinear
from ..model.generate import each_token, for_decoding, generate
from ..model.module import walk

BASE = "base"  # where an adapter is named: none


def open_for_text(name: str) -> tuple[Pretrained, Tokenizer]:
    """A model and its tokenizer.  Errors: as `open_model`; `MiniloraError` without a tokenizer."""
    source = open_model(name)
    if source.tokenizer is None:
        raise MiniloraError(f"{name}: expected a model with a tokenizer, found none")
    return source, source.tokenizer


def prompt_ids(
    tokenizer: Tokenizer, text: str, chat: bool = False, system: str | None = None
) -> list[int]:
    """A prompt as ids: plain text, or what a user says in a conversation.

    Errors: `MiniloraError` for an empty plain text, or a system message without `chat`.
    """
    if chat:
        first = [] if system is None else [{"role": "system", "content": system}]
        return tokenizer.chat([*first, {"role": "user", "content": text}])
    ids = tokenizer.encode(text, special=False)
    if not ids or system is not None:
        raise MiniloraError(
            "prompt: expected some text" if not ids else "system: expected --chat beside it"
        )
    return ids


def with_adapters(model: Any, adapters: Sequence[str]) -> Any:
    """A plain model with each adapter merged in, one after the other, laid out for decoding.

    Errors: as `load_adapter`; `MiniloraError` for DoRA after another adapter: its lengths are
    those of a change to the base, and would undo the other's.
    """
    merged = [directory for directory in adapters if directory != BASE]
    for i, directory in enumerate(merged):
        adapted = load_adapter(directory, model)
        if i and any(isinstance(node, DoRALinear) for _, node in walk(adapted)):
            raise MiniloraError(f"{directory}: expected DoRA as the first adapter, found others")
        model = merge(adapted)
    return for_decoding(model)


def streamed(
    model: Any, tokenizer: Tokenizer, ids: list[int], new_tokens: int, **options: Any
) -> Iterator[str]:
    """The answer in pieces, each as soon as its characters are whole; `options` as `generate`."""
    stream = tokenizer.stream()
    for token in each_token(model, [ids], new_tokens, **options):
        (token,) = to_numpy(token).tolist()
        if token in tokenizer.stop:
            break
        if piece := stream.push(token):
            yield piece
    if piece := stream.end():
        yield piece


def answers(
    model: Any,
    tokenizer: Tokenizer,
    adapters: Sequence[str],
    ids: list[int],
    new_tokens: int,
    **options: Any,
) -> list[str]:
    """The same prompt to each adapter (`base`: to none), in one mixed batch."""
    rows = [None if name == BASE else take(load_adapter(name, model)) for name in adapters]
    mixed = model if all(row is None for row in rows) else mix(model, rows)
    found = generate(mixed, [ids] * len(rows), new_tokens, stop=tokenizer.stop, **options)
    return [tokenizer.decode(row) for row in found]
