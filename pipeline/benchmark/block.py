"""One block of the ingest benchmark: one contender, measured in a process of its own.

So no contender pays for what another imported or left running, and its memory is that of this process and its
children. Imports and the connection to Ray are over when the clock starts; datasets and workers are not.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.benchmark import photos, rounds
from pipeline.benchmark.contender import CONTENDERS, Contender, Epoch, Setting
from pipeline.benchmark.machine import OthersShare, peak_memory
from pipeline.config import Strict
from pipeline.errors import DataError


class Task(Strict):
    """What one block does.

    Attributes:
        name: of the contender.
        photos: folder that `prepare` reads; None to measure.
        epochs: that are timed; one more follows, in which memory is watched.
        skip_batches: at the beginning of each epoch, that do not count for the steady rate.
    """

    name: str
    setting: Setting
    photos: Path | None = None
    epochs: int = 2
    skip_batches: int = 4


class Figures(Strict):
    """What one block gave.

    Attributes:
        images_per_s: after the first batches of each epoch, all epochs together.
        epoch_images_per_s: whole epochs, from asking for the first batch to the last.
        first_batch_s: from asking for epoch 0 to its first batch.
        restart_s: from the last batch of an epoch to the first of the next.
        peak_bytes: memory of all its processes, shared memory counted once.
        spilled_bytes: from shared memory to disk.
        others_share: of the machine's CPU time, that went to other processes meanwhile.
        load: average over one minute, before and after.
    """

    images_per_s: float
    epoch_images_per_s: float
    first_batch_s: float
    restart_s: float
    peak_bytes: int
    spilled_bytes: int
    others_share: float
    load: tuple[float, float]


class Marks(Strict):
    """When the batches of one epoch came, in seconds, and how many images each held."""

    started: float
    at: tuple[float, ...]
    sizes: tuple[int, ...]


def measure(contender: Contender, epochs: int, skip_batches: int) -> Figures:
    """Run all epochs of a block and say what they gave."""
    load, others = os.getloadavg()[0], OthersShare(contender.other_processes)
    spilled = contender.spilled_bytes()
    timed = [_watch(contender.epoch(seed), contender.setting) for seed in range(epochs)]
    share = others.read()
    with peak_memory(contender.other_processes) as peak:
        _watch(contender.epoch(epochs), contender.setting)
    return summary(
        timed,
        skip_batches,
        peak_bytes=peak.num_bytes,
        spilled_bytes=contender.spilled_bytes() - spilled,
        others_share=share,
        load=(load, os.getloadavg()[0]),
    )


def summary(timed: Sequence[Marks], skip_batches: int, **others: object) -> Figures:
    """The rates and waiting times in what was timed.

    Raises:
        DataError: an epoch has no batch after those that are skipped.
    """
    fewest = min(len(marks.at) for marks in timed)
    if fewest <= skip_batches:
        raise DataError(f"an epoch has {fewest} batches, {skip_batches} of which are skipped; take more num_images")
    steady = sum(sum(marks.sizes[skip_batches:]) for marks in timed)
    steady_s = sum(marks.at[-1] - marks.at[skip_batches - 1] for marks in timed)
    restarts = [after.at[0] - before.at[-1] for before, after in itertools.pairwise(timed)]
    rates = {
        "images_per_s": steady / steady_s,
        "epoch_images_per_s": sum(sum(marks.sizes) for marks in timed)
        / sum(marks.at[-1] - marks.started for marks in timed),
        "first_batch_s": timed[0].at[0] - timed[0].started,
        "restart_s": sum(restarts) / len(restarts),
    }
    return Figures.model_validate(rates | others)


def run(task: Task, scratch: Path) -> Figures | None:
    """Do a task in a process of its own.

    Raises:
        DataError: it failed; the message holds its last words.
    """
    try:
        return rounds.in_process(main, task, Figures, scratch)
    except DataError as error:
        raise DataError(f"benchmark of {task.name}: {error}") from None


def main(asked: Path, answer: Path) -> None:
    """Do the task in this process."""
    task = Task.model_validate_json(asked.read_bytes())
    contender = CONTENDERS[task.name].build(task.setting)
    if task.photos is not None:
        contender.prepare(photos.read(task.photos))
    else:
        answer.write_text(measure(contender, task.epochs, task.skip_batches).model_dump_json())


def _watch(epoch: Epoch, setting: Setting) -> Marks:
    """Take batch after batch, as a training loop that does nothing would.

    Raises:
        DataError: a batch is not what was asked for.
    """
    started, at, sizes = time.perf_counter(), list[float](), list[int]()
    for images, labels in epoch:
        at.append(time.perf_counter())
        sizes.append(len(labels))
        if images.dtype != torch.uint8 or images.shape != (setting.batch_size, 3, setting.size, setting.size):
            raise DataError(f"expected uint8 batches of {setting.batch_size}, got {images.dtype} {tuple(images.shape)}")
    return Marks(started=started, at=tuple(at), sizes=tuple(sizes))
