"""NumPy's BLAS: what it is, on how many threads it works, and how it multiplies few rows."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")  # as OpenBLAS names its kernels


@cache
def library() -> Any:
    """threadpoolctl's view of it; None without threadpoolctl, or where it finds none."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    found = [one for one in ThreadpoolController().lib_controllers if one.user_api == "blas"]
    found.sort(key=lambda one: "numpy" not in one.filepath)  # SciPy may have brought its own
    return found[0] if found else None


@cache
def small_kernels() -> bool:
    """Has it kernels that read small matrices where they lie?

    Before OpenBLAS multiplies, it packs its arguments into buffers, which takes as long as a
    product with eight rows.  Where it has AVX-512 it leaves that out for up to 10^6 terms; if
    both arguments are read along the axis that is summed over, only for up to 1200 results
    (kernel/x86_64/sgemm_small_kernel_permit_skylakex.c).
    """
    return getattr(library(), "architecture", None) in AVX512


def on_one_thread() -> bool:
    """Is it known to work on a single thread now?"""
    return library() is not None and library().num_threads == 1


def one_blas_thread() -> AbstractContextManager:
    """A context in which it has one thread, where threadpoolctl is installed."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    return threadpool_limits(1, user_api="blas")
