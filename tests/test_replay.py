"""Decoding from a recording: the tokens of the eager loop, one launch for each, at any position."""

import sys
import warnings

import numpy as np
import pytest
import standin
from cuda_cpu.checks import kernels, with_a_mistake  # noqa: F401
from test_capture import fake as fake
from test_capture import tape as tape

from minilora import TransformerConfig, adapt, generate, init_transformer
from minilora.engine.backend import to_numpy
from minilora.engine.errors import NumericsError
from minilora.engine.tensor import Tensor
from minilora.fast import capture
from minilora.fast.capture import WARM, Replayed, replayed
from minilora.model import generate as generating
from minilora.model.layers import Linear
from minilora.model.module import rebuild
from minilora.model.module import to_device as tree_to_device
from minilora.quant.bf16 import to_bf16
from minilora.quant.linear import quantize

pytestmark = pytest.mark.usefixtures("kernels")
RNG = np.random.default_rng
SHAPE = {"vocab": 29, "width": 32, "layers": 1, "heads": 4, "context": 160}
PROMPTS = [[1, 2, 3], [4] * 12, [5, 6, 7, 8]]


def model_of(style="llama", device="cuda"):
    gpt2 = style == "gpt2"
    config = TransformerConfig.gpt2(**SHAPE) if gpt2 else TransformerConfig(**SHAPE, key_heads=2)
    model = init_transformer(config, RNG(3), 0.4)
    if style in ("lora", "qlora", "qlora in bf16"):
        model = adapt(model if style == "lora" else quantize(model), rank=4, rng=RNG(0))
        fill = lambda path, node: (
            Tensor(RNG(1).normal(0, 0.1, node.shape).astype(np.float32))
            if path.endswith(".B") else node
        )  # fmt: skip
        model = rebuild(model, fill)
    return tree_to_device(to_bf16(model) if style.endswith("bf16") else model, device)


class Watched(list):
    """A `replay` that keeps what it made."""

    def __call__(self, xp, function):
        self.append(replayed(xp, function))
        return self[-1]


def both(model, prompts, new, **options):
    """Tokens without and with a recording, which must have been made."""
    watched = Watched()
    wanted = generate(model, prompts, new, **options)
    with warnings.catch_warnings(action="error"):
        found = generate(model, prompts, new, **options, replay=watched)
    assert watched[0].graph is not None
    return found, wanted


@pytest.mark.parametrize("style", ["llama", "gpt2", "lora", "qlora", "qlora in bf16"])
def test_the_tokens_are_those_of_the_eager_loop(style):
    found, wanted = both(model_of(style), PROMPTS, 10)
    assert found == wanted
    assert len({tuple(row) for row in found}) == 3


def test_one_recording_serves_positions_in_chunks_of_the_cache_it_had_not_seen():
    prompts = [RNG(5).integers(0, 29, n).tolist() for n in (120, 3)]
    found, wanted = both(model_of(), prompts, 20)  # a chunk has 128 keys
    assert found == wanted


def test_tokens_are_drawn_from_its_logits_and_stop():
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "seeds": 7}
    found, wanted = both(model_of(), PROMPTS, 9, **options)
    assert found == wanted
    stop = [wanted[0][6]]
    found, wanted = both(model_of(), PROMPTS[:1], 9, stop=stop, **options)
    assert found == wanted
    assert len(found[0]) <= 6


def test_a_token_is_one_launch_and_the_copy_that_is_handed_out(fake):
    tokens = generating.each_token(model_of(), PROMPTS, 12, replay=replayed)
    for _ in range(1 + WARM + 1):  # of the prompt, eagerly, the first from the recording
        next(tokens)
    with standin.no_sync():
        for _ in range(5):
            standin.reset()
            before = fake.launches
            next(tokens)
            stats = standin.stats
            assert fake.launches == before + 1
            assert (stats.launches, stats.allocations, stats.h2d, stats.d2h) == (2, 1, 0, 0)


def test_logits_that_are_not_finite_are_found():
    model = model_of()
    model.norm.weight.data[3] = np.nan
    with pytest.raises(NumericsError, match="expected finite logits"):
        generate(model, PROMPTS, 6, replay=replayed)


class Foreign(Linear):
    """A linear that multiplies by CuPy, which a capture refuses."""

    def __call__(self, x, rng=None):
        return Tensor(x.data @ self.weight.data.T)


def test_what_a_capture_refuses_stays_eager_with_a_warning():
    swap = lambda path, node: Foreign(node.weight, node.bias) if path.endswith("output") else node
    model = rebuild(model_of(), swap)
    wanted, watched = generate(model, PROMPTS, 8), Watched()
    with pytest.warns(UserWarning, match="was not captured and stays eager"):
        found = generate(model, PROMPTS, 8, replay=watched)
    assert found == wanted
    assert watched[0].graph is None
    assert watched[0].eager


def test_where_nothing_can_be_captured_a_function_stays_itself():
    function = lambda: 1
    assert replayed(np, function) is function
    model = model_of(device="cpu")
    assert generate(model, PROMPTS, 5, replay=replayed) == generate(model, PROMPTS, 5)


def test_a_recording_is_made_once_and_returns_what_its_function_returned():
    xp = sys.modules["cupy"]
    x, runs = xp.zeros(2, np.float32), []

    def function():
        runs.append(1)
        x[...] += 1
        return x * 2

    step = Replayed(xp, function)
    values = [to_numpy(step()).tolist() for _ in range(6)]
    assert values == [[2 * i, 2 * i] for i in range(1, 7)]
    assert len(runs) == WARM + 1


PLANTED = {
    "a token that is another array": ("            token[...] = logits.argmax(axis=-1)\n",
                                      "            nonlocal token\n"
                                      "            token = logits.argmax(axis=-1)\n"),
    "positions that are other arrays": ("        last[...] += 1\n",
                                        "        nonlocal last\n        last = last + 1\n"),
    "a cache seen in part": ("if advance is step else length", "if True else length"),
    "a token handed out itself": ("yield token.copy()", "yield token"),
}  # fmt: skip


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("old, new", PLANTED.values(), ids=PLANTED)
def test_planted_mistakes_are_caught(old, new):
    wrong = with_a_mistake(generating, old, new)
    prompts = RNG(5).integers(0, 29, (3, 126)).tolist()
    wanted = generate(model_of(), prompts, 12)
    assert wrong.generate(model_of(), prompts, 12, replay=capture.replayed) != wanted
