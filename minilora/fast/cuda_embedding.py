"""Rows by number, and their gradient without atomics: the same bits in every run."""

from ..engine.bf16 import empty
from ..engine.fused import embedding
from .cuda import Kernels, contiguous, row_block, storage

kernels = Kernels(
    "embedding.cu", "embedding_forward<float>", "embedding_forward<bf16>",
    "embedding_backward<float>",
)  # fmt: skip
ROWS = 32  # of the table, to a block on the way back; as in embedding.cu


@embedding.on("cupy", "cupy bf16")
def _(xp, table, *, ids, wants):
    """A number outside the table gives a row of NaN: to see it here would be to wait."""
    launch, S = kernels.on(xp), storage(table)
    if launch is None or S is None or table.ndim != 2 or (S == "bf16" and wants[0]):
        return NotImplemented
    if ids.dtype.kind not in "iu" or ids.size == 0:
        return NotImplemented  # the specification says what is wrong
    V, C = table.shape
    shape = (*ids.shape, C)
    ids = xp.ascontiguousarray(ids.reshape(-1).astype(xp.int64, copy=False))
    table = contiguous(xp, table)
    y = empty(xp, shape, table.dtype)
    launch(f"embedding_forward<{S}>", ids.size, row_block(C), y, table, ids, V, C)

    def pullback(g):
        g = xp.ascontiguousarray(g)
        dtable = xp.empty((V, C), g.dtype)
        launch("embedding_backward<float>", -(-V // ROWS), 256, dtable, g, ids, ids.size, V, C)
        return dtable

    return y, (pullback,)
