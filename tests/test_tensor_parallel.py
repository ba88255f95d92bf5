"""A model in parts: the numbers of the whole, tokens included, and what ends it in good order."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from test_transformer import SHAPE, built, every_style, some_ids

from minilora.engine.errors import MiniloraError, NumericsError
from minilora.engine.forked import copies
from minilora.engine.rules import reference_rules
from minilora.engine.team import SLOT, Team
from minilora.engine.tensor import Parameter, Tensor
from minilora.engine.workers import spread, threads
from minilora.lora.lora import adapt
from minilora.model import tensor_parallel
from minilora.model.generate import each_token, generate
from minilora.model.layers import Linear
from minilora.model.module import freeze, parameters, rebuild, tensors
from minilora.model.tensor_parallel import TensorParallel, part_of
from minilora.model.transformer import TransformerConfig, init_transformer

pytestmark = pytest.mark.usefixtures("where_it_forks", "in_a_minute")
PROMPTS = [some_ids((1, n), seed=n)[0].tolist() for n in (3, 9, 5)]


def logits(model, ids):
    return model(ids).data


def whole(style):
    """A frozen model with biases that are not zero."""
    rng = np.random.default_rng(1)

    def shaken(path, node):
        if isinstance(node, Tensor) and path.endswith("bias"):
            return Tensor(rng.standard_normal(node.shape, np.float32))
        return node

    return rebuild(freeze(built(style)), shaken)


@every_style
@pytest.mark.parametrize("workers", [1, 2])
def test_the_parts_give_the_logits_and_the_tokens_of_the_whole(style, workers):
    model = whole(style)
    sampled = {"temperature": 0.9, "top_k": 7, "seeds": [4, 5, 6]}
    with TensorParallel(model, workers) as parallel:
        assert len(copies()) == 0  # before there is a call
        found = parallel.run(logits, some_ids())
        np.testing.assert_allclose(found, model(some_ids()).data, rtol=0, atol=2e-4)
        assert len(copies()) == workers - 1
        for options in ({}, sampled, {"stop": [2]}):
            assert parallel.run(generate, PROMPTS, 12, **options) == generate(
                model, PROMPTS, 12, **options
            )
        before = {process.pid for process in copies()}
        with reference_rules():
            assert parallel.run(generate, PROMPTS, 6) == generate(model, PROMPTS, 6)
            now = {process.pid for process in copies()}
        assert len(now) == workers - 1
        assert not now & before  # those there were run the fast rules
    assert not copies()


def test_heads_may_be_shared_out_unevenly():
    config = TransformerConfig(
        vocab=23, width=36, layers=2, heads=6, key_heads=3, hidden=29, context=40, qkv_bias=True
    )
    model = freeze(init_transformer(config, np.random.default_rng(0), 0.3))
    for workers in (2, 3):
        parts = []
        for rank in range(workers):
            team = Team(workers)
            team.rank = rank
            parts.append(part_of(model, team).blocks[0])
        heads = [block.attention.key_heads for block in parts]
        assert sum(heads) == 3
        assert min(heads) > 0
        assert sum(block.mlp.down.part.shape[1] for block in parts) == 29
        with TensorParallel(model, workers) as parallel:
            assert parallel.run(generate, PROMPTS, 8) == generate(model, PROMPTS, 8)


def test_a_part_has_its_share_of_the_weights():
    config = TransformerConfig.gpt2(**SHAPE)
    model = freeze(init_transformer(config, np.random.default_rng(0)))

    def size(tree):
        return sum(t.data.size for path, t in tensors(tree).items() if t.ndim == 2)

    linears = 12 * 2 * SHAPE["width"] ** 2 + SHAPE["vocab"] * SHAPE["width"]
    team = Team(2)
    one = size(part_of(model, team).blocks) + part_of(model, team).head.part.weight.data.size
    team.rank = 1
    two = size(part_of(model, team).blocks) + part_of(model, team).head.part.weight.data.size
    assert one + two == linears
    assert abs(one - two) <= SHAPE["width"]


def test_a_stream_may_be_left_and_another_begun():
    model = whole("llama")
    wanted = generate(model, PROMPTS, 12)
    with TensorParallel(model, 2) as parallel:
        for count in (2, 12):
            stream = parallel.stream(each_token, PROMPTS, 12)
            tokens = [next(stream).tolist() for _ in range(count)]
            assert [list(row) for row in zip(*tokens, strict=True)] == [r[:count] for r in wanted]
            if count == 2:
                with pytest.raises(MiniloraError, match="one that has not ended"):
                    parallel.run(generate, PROMPTS, 2)
                stream.close()
                assert not copies()
            else:
                assert list(stream) == []
                assert len(copies()) == 1
        assert parallel.run(generate, PROMPTS, 12) == wanted


def test_threads_of_blas_are_given_back():
    from threadpoolctl import threadpool_info, threadpool_limits

    def now():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        before = now()
        with TensorParallel(whole("gpt2"), 2) as parallel:
            assert now() == {1}
            assert parallel.run(lambda part: (part is not None, now())) == (True, {1})
        assert now() == before
        adapted = adapt(built("gpt2"), rank=2, rng=np.random.default_rng(0))
        with pytest.raises(MiniloraError, match=r"merge adapters.*found a LoRALinear"):
            TensorParallel(adapted, 2).__enter__()
        assert now() == before


def test_errors_are_those_of_one_process_and_leave_it_ready():
    model = whole("gpt2")
    with TensorParallel(model, 2) as parallel:
        for error, prompts in ((MiniloraError, [[]]), (NumericsError, [[99]])):
            with pytest.raises(error):
                parallel.run(generate, prompts, 2)
            assert not copies()
            assert parallel.run(generate, PROMPTS, 2) == generate(model, PROMPTS, 2)
    with pytest.raises(MiniloraError, match="found none entered"):
        parallel.run(generate, PROMPTS, 2)


def one_dies(part, parent):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(part, PROMPTS, 2)


def one_raises(part, parent):
    if os.getpid() != parent:
        raise KeyError("here alone")
    return generate(part, PROMPTS, 2)


@pytest.mark.parametrize("function, error, words", [
    (one_dies, MiniloraError, "ended with -9"), (one_raises, KeyError, "here alone"),
])  # fmt: skip
def test_a_copy_that_fails_alone_is_noticed(function, error, words):
    model = whole("gpt2")
    with TensorParallel(model, 2) as parallel:
        with pytest.raises(error, match=words):
            parallel.run(function, os.getpid())
        assert parallel.run(generate, PROMPTS, 2) == generate(model, PROMPTS, 2)


def never_comes(part, parent):
    if os.getpid() != parent:
        time.sleep(600)
    threading.Timer(0.3, os.kill, (parent, signal.SIGINT)).start()
    return generate(part, PROMPTS, 2)


def test_ctrl_c_ends_a_wait():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
    try:
        with TensorParallel(whole("gpt2"), 2) as parallel:
            parallel.run(generate, PROMPTS, 2)
            with pytest.raises(KeyboardInterrupt):
                parallel.run(never_comes, os.getpid())
            assert not copies()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_vocabulary_larger_than_what_is_handed_over_at_a_time():
    """Not a row of logits fits."""
    V = 2 * SLOT // 8 + 2
    config = TransformerConfig(vocab=V, width=4, layers=1, heads=2, hidden=4, context=8)
    model = freeze(init_transformer(config, np.random.default_rng(0), 0.3))
    model = rebuild(
        model, lambda _, n: Tensor(n.data.astype(np.float64)) if isinstance(n, Tensor) else n
    )
    ids = np.array([[V - 1, 0, 5]])
    with TensorParallel(model, 2) as parallel:
        np.testing.assert_allclose(parallel.run(logits, ids), model(ids).data, rtol=0, atol=1e-12)


def spread_out(part):
    return spread(lambda number: number + 1, range(4))


def test_threads_of_the_asker_are_not_waited_for():
    with TensorParallel(whole("gpt2"), 2) as parallel, threads(2):
        assert spread(lambda number: number, range(4)) == [0, 1, 2, 3]
        assert parallel.run(spread_out) == [1, 2, 3, 4]


def test_what_it_is_not_made_for_is_refused():
    model = whole("gpt2")
    with TensorParallel(model, 2) as parallel:
        with pytest.raises(MiniloraError, match="once at a time"):
            parallel.__enter__()
        with pytest.raises(MiniloraError, match="found an iterator: stream"):
            parallel.run(each_token, PROMPTS, 3)
        x = Parameter(np.ones((1, 2, SHAPE["width"]), np.float32))
        with pytest.raises(MiniloraError, match="wants no gradient"):
            parallel.part.blocks[0](x)
        stream = parallel.stream(each_token, PROMPTS, 5)
        next(stream)
    with pytest.raises(MiniloraError, match="the processes gone"):
        next(stream)
    assert not copies()


def test_weights_changed_before_it_is_entered_are_those_of_all_parts():
    model = built("gpt2")
    parallel = TensorParallel(model, 2)
    for parameter in parameters(model).values():
        parameter.data *= 1.5
    with parallel:
        found = parallel.run(logits, some_ids())
    np.testing.assert_allclose(found, model(some_ids()).data, rtol=0, atol=2e-4)


def test_what_cannot_be_cut_is_refused(monkeypatch):
    model = whole("llama")  # two key heads
    for workers, words in (
        (0, "workers: expected a whole number >= 1, found 0"), (1.5, "found 1.5"),
        (3, "found 3 for 2"),
    ):  # fmt: skip
        with pytest.raises(MiniloraError, match=words):
            TensorParallel(model, workers)
    with pytest.raises(MiniloraError, match="expected a Transformer, found Linear"):
        TensorParallel(Linear(Tensor(np.ones((2, 2), np.float32))), 1)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_parallel, "xp_of", lambda array: None)
        with pytest.raises(MiniloraError, match="found one on a card"):
            TensorParallel(model, 2)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_parallel, "can_fork", lambda: False)
        with pytest.raises(MiniloraError, match="expected Linux"):
            TensorParallel(model, 2)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with pytest.raises(MiniloraError, match=r"minilora\[fast\]"):
        TensorParallel(model, 2)
