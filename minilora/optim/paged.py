"""AdamW whose moments leave the room: the same numbers to the bit, in as little as one page."""

from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import xp_of
from ..engine.errors import MiniloraError, expect_whole
from .adamw import adamw_update
from .flat import Grouping, Stepper, by_shape, copy_in
from .page_devices import page_device
from .pager import Pager


class PagedAdamW(Stepper):
    """AdamW with its moments on pages of `page` numbers, `budget` bytes of them resident.

    A page holds both moments of one range of the flat buffer.  bitsandbytes pages only the
    states of tensors with 100,000 entries or more, and leaves eviction to the driver; here all
    are paged, and the pager knows the sweep.  `pages` names the device: "simulated", "file"
    (state larger than memory, in a temporary file in `folder`), "cuda".
    Errors: `MiniloraError` for a budget below one page; `CheckpointError` from a step after a
    copy has failed: the state is lost until `restore`.
    """

    def __init__(
        self,
        model: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        groups: Grouping = by_shape,
        *,
        page: int = 1 << 18,
        budget: int | None = None,
        pages: str | None = None,
        folder: str | Path | None = None,
        policy: str = "next-use",
        ahead: int = 1,
    ):
        super().__init__(model, lr, groups, betas=betas, eps=eps, weight_decay=weight_decay)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        data = self.flat.data
        expect_whole("page", page, 1)
        if budget is not None:
            expect_whole("budget", budget, 0)
        self.page = min(page, data.size)
        count = -(-data.size // self.page)
        self.page_bytes = 2 * self.page * data.dtype.itemsize
        slots = count if budget is None else budget // self.page_bytes
        if slots < 1:
            raise MiniloraError(
                f"budget: expected at least one page of {self.page_bytes} bytes, found {budget}"
            )
        default = "simulated" if xp_of(data) is np else "cuda"
        where = {} if folder is None else {"folder": folder}
        self.device = page_device(pages or default, count, (2, self.page), data.dtype, **where)
        self.pager = Pager(self.device, count, slots, policy, ahead)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the slots there are."""
        return self.pager.slots * self.page_bytes

    def step(self, divide_by: float = 1, clip: float | None = None) -> None:
        """Apply the gradient gathered so far, and clear it; see `AdamW.step`."""
        self.pager.expect_all()
        self.measure(divide_by, clip)
        f = self.flat
        for number in range(self.pager.pages):
            start = number * self.page
            m, v = self.pager.use(number)
            for part, group in f.parts:
                low, high = max(start, part.start), min(start + self.page, part.stop)
                if low < high:
                    span, inside = slice(low, high), slice(low - start, high - start)
                    adamw_update(
                        f.data[span], f.grad[span], m[inside], v[inside], self.control,
                        betas=self.betas, eps=self.eps,
                        decay=self.weight_decay * group.decay, lr_factor=group.lr,
                    )  # fmt: skip
            self.pager.done(number)
        self.count_step()

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Both moments on the host, in the order of the flat buffer."""
        self.pager.flush()
        read = self.device.read
        table = np.stack([self.pager.moved(read, number) for number in range(self.pager.pages)])
        n = self.flat.data.size
        return table[:, 0].reshape(-1)[:n], table[:, 1].reshape(-1)[:n]

    def arrays(self) -> dict[str, Any]:
        """As those of `AdamW`, whose state this one restores, and the reverse."""
        m, v = self.moments()
        return self.moments_by_path(m=m, v=v)

    def restore(self, state: dict[str, Any]) -> None:
        """Copy a saved state in; what was lost is found again.

        Errors: `CheckpointError` on any mismatch, before anything is written.
        """
        m, v = np.zeros((2, self.pager.pages * self.page), self.flat.data.dtype)
        copy_in(self.moments_by_path(m=m, v=v), state, "optimizer state")
        table = np.stack([m, v], axis=1).reshape(self.pager.pages, self.page, 2).swapaxes(1, 2)
        old = self.pager
        for number, values in enumerate(table):
            old.moved(self.device.write, number, values)
        slots = list(self.device.slots)  # the pager has lost sight of one whose copy failed
        for slot in slots:
            self.device.close(slot)
        self.pager = Pager(self.device, old.pages, len(slots), old.policy, old.ahead)
        self.pager.log = old.log
