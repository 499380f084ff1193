"""Memory for batches that comes back: pages that a process fills, another reads, and both use again.

Fresh memory costs a batch of photos a tenth of its decoding: the system clears every page of it, and each process that
looks at it maps it anew. So a loader asks for all of it once. A page is lent as a tensor and is free again when nothing
holds that tensor any more, wherever it was passed to; where none is free, its process has to find other memory.
"""

from __future__ import annotations

import math
import mmap
import weakref

import numpy as np
import torch

from pipeline.types import UInt8Array

FREE, TAKEN = 0, 1


class Pages:
    """Some pages for one process that fills them and one that lends them; made before the first is forked.

    Whose turn it is stands in one byte for each page, which only the filler sets and only the lender clears, so that no
    lock is needed: a lender clears it while memory is collected, which may be in the middle of anything.

    Args:
        num_pages: how many.
        shape: of each, uint8.
    """

    def __init__(self, num_pages: int, shape: tuple[int, ...]) -> None:
        size = num_pages * math.prod(shape)
        shared = np.frombuffer(mmap.mmap(-1, size + num_pages), np.uint8)  # inherited; zeros, which cost nothing yet
        self._pages, self._states = shared[:size].reshape(num_pages, *shape), shared[size:]

    def take(self) -> int | None:
        """In the filler: the number of a free page, or None."""
        free = np.flatnonzero(self._states == FREE)
        if not len(free):
            return None
        number = int(free[0])
        self._states[number] = TAKEN
        return number

    def page(self, number: int) -> UInt8Array:
        """The memory of one page."""
        memory: UInt8Array = self._pages[number]
        return memory

    def lend(self, number: int, num_images: int) -> torch.Tensor:
        """In the lender: the first images of a page that was filled; it is free when this tensor is gone."""
        memory = self.page(number)[:num_images]
        weakref.finalize(memory, _free, self._states, number).atexit = False
        return torch.from_numpy(memory)


def _free(states: UInt8Array, number: int) -> None:
    states[number] = FREE
