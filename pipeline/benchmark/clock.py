"""The clock of a training: it stands between loop and loader, and is the same for every loop that takes batches.

A step lasts from asking for its batch to asking for the next one, so nothing of a loop is left out, and a loop needs to
know nothing of being timed. On a GPU the same moments are marked on the device, which works behind the loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from statistics import mean, median
from typing import TypeVar

import torch
from pydantic import Field

from pipeline.benchmark.machine import OthersShare, Peak, peak_memory
from pipeline.config import Strict

BatchT = TypeVar("BatchT")


class Steps(Strict):
    """How many steps a block trains.

    Attributes:
        warm_up: that count for nothing.
        timed: that count.
        watched: at the end, in which memory is watched, which takes time itself.
    """

    warm_up: int = Field(default=5, ge=1)
    timed: int = Field(default=20, ge=2)
    watched: int = Field(default=3, ge=1)

    @property
    def total(self) -> int:
        """All of them."""
        return self.warm_up + self.timed + self.watched


class Figures(Strict):
    """What one block gave, as its first worker saw it.

    Attributes:
        step_ms: median; `mean_step_ms` the mean.
        images_per_s: of all workers, by the mean.
        wait_share: of the time, that the loop waited for its next batch.
        start_s: from starting the block's process to asking for the first batch: imports, workers, process group.
        peak_bytes: memory of all its processes in the last steps, shared memory counted once.
        gpu_bytes: the most that tensors took on this worker's GPU.
        others_share: of the machine's CPU time, that went to other processes during the timed steps.
        num_threads: of torch in this worker.
    """

    step_ms: float
    mean_step_ms: float
    images_per_s: float
    wait_share: float
    start_s: float
    peak_bytes: int
    gpu_bytes: int | None = None
    others_share: float
    num_threads: int


class Clock:
    """Of one worker.

    Args:
        steps: of the block.
        device: that trains.
        began: when the block's process was started, in seconds since 1970.
        roots: processes that belong to the block, with all their children.
    """

    def __init__(self, steps: Steps, device: torch.device, began: float, roots: Sequence[int]) -> None:
        self._steps, self._device, self._began, self._roots = steps, device, began, list(roots)
        self._marks: list[float | torch.cuda.Event] = []
        self._waited_s = self._start_s = self._others_share = 0.0
        self._peak = Peak()

    def watch(self, batches: Iterator[BatchT]) -> Iterator[BatchT]:
        """The same batches; they must suffice for all steps."""
        self._start_s = time.time() - self._began
        yield from islice(batches, self._steps.warm_up - 1)
        others = OthersShare(lambda: self._roots)  # takes a moment, hence before the last step that counts for nothing
        yield from islice(batches, 1)
        for _ in range(self._steps.timed):
            self._marks.append(self._mark())
            asked = time.perf_counter()
            batch = next(batches)
            self._waited_s += time.perf_counter() - asked
            yield batch
        self._marks.append(self._mark())
        self._others_share = others.read()
        with peak_memory(lambda: self._roots) as self._peak:
            yield from islice(batches, self._steps.watched)

    def figures(self, global_batch_size: int) -> Figures:
        """What it saw, after the last step."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._device)
        seconds = [_between(*pair) for pair in pairwise(self._marks)]
        return Figures(
            step_ms=median(seconds) * 1e3,
            mean_step_ms=mean(seconds) * 1e3,
            images_per_s=global_batch_size / mean(seconds),
            wait_share=self._waited_s / sum(seconds),
            start_s=self._start_s,
            peak_bytes=self._peak.num_bytes,
            gpu_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            others_share=self._others_share,
            num_threads=torch.get_num_threads(),
        )

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    """Seconds between two marks of one kind."""
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
    return float(first.elapsed_time(second)) / 1e3
