"""What people are told while a training runs: a line for each epoch, and one every ten seconds within a long one."""

from __future__ import annotations

import logging
import time

import psutil
import torch

from pipeline.evaluation.headline import headline
from pipeline.training.loop import Epoch, Progress

EVERY_S = 10.0


def of_epoch(epoch: Epoch) -> str:
    """What came out of an epoch."""
    values = epoch.metrics
    return (
        f"epoch {epoch.number}/{epoch.total}  loss {values['train/loss']:.4f}  val loss {values['val/loss']:.4f}  "
        f"val {headline(values, 'val/')}  lr {values['lr']:.2g}  {values['images_per_s']:.0f} images/s  "
        f"data wait {values['data_wait_share']:.0%}  {_memory()}  about {epoch.left_s:.0f} s left"
    )


def of_progress(progress: Progress) -> str:
    """How far an epoch is."""
    return (
        f"epoch {progress.number}/{progress.total}  image {progress.images}/{progress.num_images}  "
        f"loss {progress.loss:.4f}  {progress.images_per_s:.0f} images/s  data wait {progress.data_wait_share:.0%}  "
        f"{_memory()}  about {progress.left_s:.0f} s left"
    )


class Ticker:
    """Says how far an epoch is, if nothing of this kind was said for a while."""

    def __init__(self, log: logging.Logger, every_s: float = EVERY_S) -> None:
        self._log, self._every_s, self._said_at = log, every_s, time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Tell it, or not."""
        if time.monotonic() - self._said_at >= self._every_s:
            self._said_at = time.monotonic()
            self._log.info("%s", of_progress(progress))


def _memory() -> str:
    """Of the GPU the most that tensors took so far, without one what this process takes."""
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    size = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return f"memory {size / 2**30:.1f} GiB"
