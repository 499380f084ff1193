"""The limit: processes that only decode, crop and flip, with this project's decoder; no framework, no order.

The encoded photos lie in memory. Each process writes its batches over each other in shared memory and says so through a
pipe: nobody waits for anybody, and the batch that is handed out may be overwritten. Nothing that reads, orders and
delivers can be faster with the same decoder.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np
import torch

from pipeline.benchmark import photos, views
from pipeline.benchmark.contender import Contender, Epoch, Setting
from pipeline.benchmark.photos import Photo

FORK = multiprocessing.get_context("fork")  # the photos are shared


class Contestant(Contender):
    """Needs no files of its own: reads the common ones into memory."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._photos: list[Photo] = []

    def prepare(self, photos: Sequence[Photo]) -> None:
        """Nothing to write."""

    def epoch(self, seed: int) -> Epoch:
        """Each process decodes its share; the batches come as they are ready."""
        self._photos = self._photos or photos.read(self.setting.folder.parent / "photos")
        count, setting = self.setting.num_processes, self.setting
        order = np.random.default_rng(seed).permutation(len(self._photos))
        pages = torch.empty((count, setting.batch_size, 3, setting.size, setting.size), dtype=torch.uint8)
        pages.share_memory_()  # type: ignore[no-untyped-call]
        started = [self._start(pages[part], order[part::count], seed + part) for part in range(count)]
        yield from _batches(pages, [receiver for receiver, _ in started])
        for _, process in started:
            process.join()

    def _start(self, page: torch.Tensor, order: Any, seed: int) -> tuple[Connection, Any]:
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_decode, args=(self._photos, order, seed, page, sender, self.setting))
        process.start()
        sender.close()  # so that the end of the process is the end of the pipe
        return receiver, process


def _batches(pages: torch.Tensor, receivers: list[Connection]) -> Epoch:
    open_receivers = list(receivers)
    while open_receivers:
        for receiver in cast(list[Connection], wait(open_receivers)):
            try:
                labels = receiver.recv()
            except EOFError:
                open_receivers.remove(receiver)
            else:
                yield pages[receivers.index(receiver)], torch.tensor(labels)


def _decode(
    photos: list[Photo], order: Any, seed: int, page: torch.Tensor, sender: Connection, setting: Setting
) -> None:
    torch.set_num_threads(1)
    rng, pixels, size, spec = np.random.default_rng(seed), page.numpy(), setting.batch_size, setting.spec
    for at in range(0, len(order) - size + 1, size):
        chosen = [photos[index] for index in order[at : at + size].tolist()]
        for place, photo in enumerate(chosen):
            pixels[place] = views.same(photo.data, spec, rng)
        sender.send([photo.label for photo in chosen])
    sender.close()
