"""Faster rules for the same ops: importing this folder registers them, for CPUs and for cards."""

from . import (  # noqa: F401
    cpu,
    cpu_attention,
    cpu_optim,
    cpu_quant,
    cpu_recorded,
    cuda_attention,
    cuda_coded,
    cuda_embedding,
    cuda_linear,
    cuda_loss,
    cuda_norms,
    cuda_optim,
    cuda_pointwise,
    cuda_quant,
)
