"""Joins what waits into batches: whatever has come when the engine is free, up to a size.

Ray's own `serve.batch` closes a batch after its wait and then lets it queue for the engine, so that under steady
arrivals nearly every batch holds one image. Here the next batch gathers while one is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """A queue in front of an engine that computes one batch at a time; for one event loop.

    Args:
        compute: the results of a batch, in its order.
        max_size: of a batch.
        wait_s: how long the first that comes to a free engine waits for others that are on their way.
        coming: whether there are any.
    """

    def __init__(
        self, compute: Callable[[list[T]], Awaitable[list[R]]], max_size: int, wait_s: float, coming: Callable[[], bool]
    ) -> None:
        self._compute = compute
        self._max_size = max_size
        self._wait_s = wait_s
        self._coming = coming
        self._queue: asyncio.Queue[tuple[T, asyncio.Future[R]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        """The result of one; one whose caller goes away before its batch begins is not computed."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        future: asyncio.Future[R] = loop.create_future()
        self._queue.put_nowait((item, future))
        return await future

    async def _run(self) -> None:
        while True:
            taken = await self._gather()
            batch = [(item, future) for item, future in taken if not future.cancelled()]
            if not batch:
                continue
            try:
                results = await self._compute([item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    async def _gather(self) -> list[tuple[T, asyncio.Future[R]]]:
        taken = [await self._queue.get()]
        ends_s = asyncio.get_running_loop().time() + self._wait_s
        while len(taken) < self._max_size:
            try:
                taken.append(self._queue.get_nowait())
            except asyncio.QueueEmpty:
                left_s = ends_s - asyncio.get_running_loop().time()
                if left_s <= 0 or not self._coming():
                    break
                try:
                    taken.append(await asyncio.wait_for(self._queue.get(), left_s))
                except TimeoutError:
                    break
        return taken
