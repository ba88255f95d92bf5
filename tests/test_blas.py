"""What NumPy's BLAS is asked, and what is said of it where nobody can ask."""

import sys
from types import SimpleNamespace

import pytest

from minilora.engine import blas
from minilora.model.generate import decoding_order


@pytest.fixture(autouse=True)
def asked_anew():
    for function in (blas.library, blas.small_kernels):
        function.cache_clear()
    yield
    for function in (blas.library, blas.small_kernels):
        function.cache_clear()


def test_its_threads_are_those_of_now():
    limits = pytest.importorskip("threadpoolctl").threadpool_limits
    for threads in (1, 2, 1):
        with limits(threads, user_api="blas"):
            found = blas.library().num_threads
            assert blas.on_one_thread() == (found == 1)
            assert threads > 1 or blas.on_one_thread()


def test_nothing_is_known_without_threadpoolctl(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert blas.library() is None
    assert not blas.small_kernels()
    assert not blas.on_one_thread()


@pytest.mark.parametrize("kernels, small", [("SkylakeX", True), ("Haswell", False), (None, False)])
def test_which_kernels_are_small_and_what_lies_how(kernels, small, monkeypatch):
    known = {} if kernels is None else {"architecture": kernels}
    monkeypatch.setattr(blas, "library", lambda: SimpleNamespace(num_threads=1, **known))
    assert blas.small_kernels() == small
    assert decoding_order(384, 1536) == "C"
    assert decoding_order(384, 128) == "F"
    assert decoding_order(1536, 384) == ("C" if small else "F")
