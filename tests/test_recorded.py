"""A recording makes the calls that the function would make, or says why there is none."""

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest

from minilora import TransformerConfig, adapt, generate, init_transformer
from minilora.engine.attention import split_heads
from minilora.engine.errors import NumericsError
from minilora.engine.fused import embedding, gelu, linear
from minilora.engine.ops import softmax
from minilora.engine.recorded import Recorded
from minilora.engine.rules import reference_rules, rule, written_down
from minilora.engine.tensor import Parameter, Tensor, add, matmul, mul, op
from minilora.lora.adapters import mix, take
from minilora.model import generate as module
from minilora.model.module import to_device
from minilora.quant.linear import quantize

RNG = np.random.default_rng


@rule
def doubled(xp, x):
    """A rule that is no op: 2 x, by an op."""
    return add(x, x).data


@rule
def moved(xp, x, *, by):
    return x + by


def drawn(dev, *shape, seed=0):
    return dev(RNG(seed).standard_normal(shape, dtype=np.float32))


def bits(host, array):
    return host(array).tobytes()


def test_a_recording_gives_what_the_function_gives(dev, host):
    x, W, b = drawn(dev, 4, 3), Tensor(drawn(dev, 3, 3, seed=1)), Tensor(drawn(dev, 3, seed=2))

    def function():
        h = Tensor(doubled(gelu(matmul(x[1:], W) + b).data))
        return moved(mul(h, 0.5).reshape(9).data, by=h[0, :1].data)

    recorded = Recorded(function)
    for i in range(6):
        x[...] = drawn(dev, 4, 3, seed=10 + i)
        assert bits(host, recorded()) == bits(host, function())
        assert (recorded.program is not None) == (i > 0)
    assert recorded.why_not is None
    names = [step.rule.__name__ for step in recorded.program.steps]  # not what `doubled` calls
    assert names == ["matmul", "add", "gelu", "doubled", "mul", "reshape", "getitem", "moved"]


def test_a_call_that_gives_several_values(dev, host):
    x, W = drawn(dev, 2, 3), Tensor(drawn(dev, 3, 3))

    def function():
        q, k = split_heads(linear(x[None], W), heads=(2, 1), width=1)
        return moved(mul(q, 0.5).data, by=k.data)

    recorded = Recorded(function)
    for i in range(4):
        x[...] = drawn(dev, 2, 3, seed=10 + i)
        assert bits(host, recorded()) == bits(host, function())
    assert recorded.why_not is None
    assert len(recorded.program.steps) == 4


def test_arrays_go_with_their_recording(dev):
    """Nothing waits for the collector of cycles: a cache may be most of the memory."""
    x, gone = drawn(dev, 2, 3), []
    held = Tensor(drawn(dev, 3, 3))
    gone.append(weakref.ref(held.data))
    recorded = Recorded(lambda held=held: linear(Tensor(x), held).data)
    gc.disable()
    try:
        for _ in range(3):
            recorded()
        assert recorded.program is not None
        del recorded, held
        assert gone[0]() is None
    finally:
        gc.enable()


def test_an_index_of_arrays_that_stay_is_the_same(dev, host):
    x, rows, columns = drawn(dev, 3, 4), dev(np.array([0, 2])), dev(np.array([1, 3]))
    recorded = Recorded(lambda: mul(Tensor(x)[rows, columns], 2.0).data)
    for i in range(4):
        x[...] = drawn(dev, 3, 4, seed=i)
        rows[...] = dev(np.array([i % 3, 1]))
        assert bits(host, recorded()) == bits(host, recorded.function())
    assert len(recorded.program.steps) == 2


def test_the_function_does_not_run_again(dev):
    x, runs = drawn(dev, 3), []

    def function():
        runs.append(1)
        return mul(Tensor(x), 2.0).data

    recorded = Recorded(function)
    for _ in range(5):
        recorded()
    assert len(runs) == 2


def another_rule(x, i):
    return (gelu if i % 2 else mul)(*(Tensor(x), 1.0)[: 2 - i % 2]).data


def one_rule_more(x, i):
    y = mul(Tensor(x), 2.0)
    return (y if i == 0 else y + 1.0).data


def another_number(x, i):
    return mul(Tensor(x), float(i)).data


def another_kind_of_number(x, i):
    return mul(Tensor(x), 1 if i else 1.0).data


def another_option(x, i):
    return Tensor(x).reshape((3, 2) if i else (2, 3)).data


def one_argument_more(x, i):
    return linear(
        *(Tensor(x), np.eye(3, dtype=np.float32), np.ones(3, np.float32))[: 2 + i % 2]
    ).data


def one_option_more(x, i):
    return softmax(Tensor(x), **({"axis": -1} if i else {})).data


def another_index(x, i):
    return Tensor(x)[np.array([i % 2]), np.array([0])].data


def another_part(x, i):
    return mul(Tensor(x[i % 2 :][:1]), 2.0).data


def made_by_no_rule(x, i):
    return mul(Tensor(x * 1), 2.0).data


def made_from_a_value_by_no_rule(x, i):
    return mul(Tensor(mul(Tensor(x), 2.0).data[:1]), 2.0).data


def the_values_swapped(x, i):
    a, b = mul(Tensor(x), 2.0), mul(Tensor(x), 3.0)
    return (a - b if i % 2 else b - a).data


def a_gradient_is_wanted(x, i):
    return mul(Tensor(x), W).data


def returned_from_no_rule(x, i):
    return mul(Tensor(x), 2.0).data * 1


W = Parameter(np.ones(3, np.float32))


@pytest.mark.parametrize(
    "function, why",
    [
        (another_rule, "different rules"),
        (one_rule_more, "different rules"),
        (another_number, "mul: an argument"),
        (another_kind_of_number, "mul: an argument"),
        (another_option, "reshape: an argument"),
        (one_argument_more, "linear: "),
        (one_option_more, "softmax: other arguments"),
        (another_index, "getitem: an argument"),
        (another_part, "mul: an argument"),
        (made_by_no_rule, "mul: an argument"),
        (made_from_a_value_by_no_rule, "mul: an argument"),
        (the_values_swapped, "sub: an argument"),
        (a_gradient_is_wanted, "mul: a gradient"),
        (returned_from_no_rule, "no rule made"),
    ],
)
def test_what_is_not_recorded_runs_as_it_is(function, why, device):
    if device != "cpu":
        pytest.skip("arrays of one library do")
    x, i = drawn(np.asarray, 2, 3), [0]
    recorded = Recorded(lambda: function(x, i[0]))
    for i[0] in range(5):
        x[...] = RNG(i[0]).standard_normal((2, 3))
        assert recorded().tobytes() == function(x, i[0]).tobytes()
    assert recorded.program is None
    assert why in recorded.why_not


@pytest.mark.parametrize("recorded_on", ["fast", "reference"])
def test_a_recording_is_not_played_under_other_rules(recorded_on, dev, host):
    """It asks the function that it found once, which the other kind of rules would not ask."""
    x, asked = drawn(dev, 2, 3), []

    @op
    def halved(xp, x):
        asked.append("specification")
        return 0.5 * x, (lambda g: 0.5 * g,)

    @halved.on("numpy", "cupy")
    def _(xp, x):
        asked.append("fast")
        return 0.5 * x, (lambda g: 0.5 * g,)

    recorded = Recorded(lambda: halved(Tensor(x)).data)
    with reference_rules() if recorded_on == "reference" else nullcontext():
        for _ in range(3):
            recorded()
    assert recorded.program is not None
    asked.clear()
    recorded()
    with reference_rules():
        recorded()
    assert asked == ["fast", "specification"]


def test_what_the_fast_rule_declines_the_specification_answers(dev, host):
    """The answer may be another from run to run: a rule looks at numbers too."""
    x = drawn(dev, 2, 3)

    @op
    def halved(xp, x, *, wants=()):
        return 0.5 * x, None

    @halved.on("numpy", "cupy")
    def _(xp, x, *, wants):
        assert wants == (False,)
        return NotImplemented if host(x)[0, 0] < 0 else (x / 2 + 1, None)

    recorded = Recorded(lambda: halved(Tensor(x)).data)
    for sign in (1, 1, 1, -1, 1):
        x[...] = sign * abs(x)
        assert bits(host, recorded()) == bits(host, halved(Tensor(x)).data)
        assert bits(host, recorded()) == bits(host, 0.5 * x + (sign > 0))
    assert recorded.why_not is None


def test_errors_of_rules_are_raised_from_a_recording(device):
    if device != "cpu":
        pytest.skip("on a card an id out of range is not looked at")
    table, ids = Tensor(np.ones((4, 2), np.float32)), np.zeros((1, 1), int)
    recorded = Recorded(lambda: embedding(table, ids=ids).data)
    for _ in range(3):
        recorded()
    ids[...] = 4
    with pytest.raises(NumericsError, match=r"ids in 0\.\.3, found 4"):
        recorded()


def test_an_error_leaves_no_half_of_a_recording(dev, host):
    x, fail = drawn(dev, 3), [True]

    def function():
        y = mul(Tensor(x), 2.0)
        if fail[0]:
            raise RuntimeError("for once")
        return gelu(y).data

    recorded = Recorded(function)
    with pytest.raises(RuntimeError, match="for once"):
        recorded()
    fail[0] = False
    for _ in range(3):
        assert bits(host, recorded()) == bits(host, function())
    assert len(recorded.program.steps) == 2


def test_what_is_written_down_is_the_outermost_call(dev):
    with written_down() as calls:
        doubled(drawn(dev, 2))
        with written_down() as inner:
            doubled(drawn(dev, 2))
    assert [call.rule for call in calls] == [doubled]
    assert [call.rule for call in inner] == [doubled]


@pytest.mark.parametrize("style", ["gpt2", "llama", "adapted", "quantized", "mixed"])
def test_a_model_writes_the_same_tokens(style, device, monkeypatch):
    made = []

    class Kept(Recorded):
        def __init__(self, function):
            super().__init__(function)
            made.append(self)

    shape = {"vocab": 31, "width": 16, "layers": 2, "heads": 2, "context": 40}
    config = TransformerConfig.gpt2(**shape) if style == "gpt2" else TransformerConfig(**shape)
    model = init_transformer(config, RNG(0), 0.3)
    if style == "quantized":
        model = quantize(model, block=32)
    base = to_device(model, device)
    model = base if style in ("gpt2", "llama") else adapt(base, rank=2, rng=RNG(1))
    if style == "mixed":
        model = mix(base, [take(model), None])
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    monkeypatch.setattr(module, "Recorded", lambda function: function)
    wanted = generate(model, prompts, 20)
    monkeypatch.setattr(module, "Recorded", Kept)
    assert generate(model, prompts, 20) == wanted
    if style == "mixed":  # rows without an adapter get zeros, which no rule makes
        assert "concat" in made[0].why_not
    else:
        assert made[0].why_not is None
        assert len(made[0].program.steps) > 20
