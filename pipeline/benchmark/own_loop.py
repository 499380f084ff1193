"""Ventral: `loop.fit`, as it is, on a loader under a clock; in plain processes, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch

from pipeline import imaging, models
from pipeline.batch import Batch
from pipeline.benchmark.clock import Clock, Figures
from pipeline.benchmark.training_block import Task, in_processes
from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.models._contract import Classifier
from pipeline.training.loop import fit
from pipeline.types import Split


class Timed(Loader):
    """A loader whose epoch has the steps of a block, under a clock.

    Args:
        task: of the block; with synthetic data, one batch comes again and again, on the device.
        model: whose batches they are; a manifest of as many classes goes with them.
        clock: through which training batches pass.
        rank: of this worker.
        device: that trains.
    """

    def __init__(self, task: Task, model: Classifier, clock: Clock, rank: int, device: torch.device) -> None:
        recipe, is_synthetic = task.recipe, task.data == "synthetic"
        num_classes = recipe.model.num_classes
        super().__init__(
            _with_classes(_synthetic(task) if is_synthetic else _stored(task), num_classes),
            model.spec,
            recipe.loading.model_copy(update={"num_tasks": 0}) if is_synthetic else recipe.loading,
            augment=recipe.augment,
            seed=recipe.seed,
            rank=rank,
            world_size=task.num_workers,
            device=device,
        )
        self._task, self._clock = task, clock
        self._batch = _batch(model, recipe.loading.batch_size, num_classes).to(device)

    @property
    def steps_per_epoch(self) -> int:
        """Those of the block."""
        return self._task.steps.total

    def train(self, epoch: int, offset: int = 0) -> Iterator[Batch]:
        """The batches of the one epoch."""
        batches = repeat(self._batch) if self._task.data == "synthetic" else super().train(epoch, offset)
        return self._clock.watch(batches)

    def evaluate(self, split: Split) -> Iterator[Batch]:
        """One batch, for the loop measures after each epoch; nobody times it."""
        return iter([self._batch])


def run(task: Task) -> Figures:
    """In this process, or in as many as there are workers."""
    return in_processes(train, task)


def train(task: Task, rank: int, device: torch.device, roots: list[int]) -> Figures:
    """Train on one rank; its process group is initialised, where there are several."""
    recipe = task.recipe.model_copy(update={"epochs": 1})
    torch.manual_seed(recipe.seed)
    model, clock = models.build_classifier(recipe.model), task.clock(device, roots)
    fit(model, Timed(task, model, clock, rank, device), recipe, device=device)
    return clock.figures(task.global_batch_size)


def _batch(model: Classifier, batch_size: int, num_classes: int) -> Batch:
    """Random pixels and labels, the same each time."""
    generator, spec = torch.Generator().manual_seed(0), model.spec
    shape = (batch_size, spec.num_channels, *spec.size_hw)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Batch(images, torch.randint(num_classes, (batch_size,), generator=generator))


def _stored(task: Task) -> shards.Shards:
    return shards.load(task.scratch / "shards")


def _synthetic(task: Task) -> shards.Shards:
    """A manifest of as many images as a block trains on, without files."""
    num_rows = task.steps.total * task.global_batch_size
    manifest = shards.Manifest(
        dataset="synthetic",
        classes=(),
        class_counts={},
        num_rejects=0,
        shards=(shards.Shard(name="none", split="train", row_groups=(num_rows,), size_bytes=0, sha256=""),),
        digest="0" * 64,
        decoding=imaging.DEFAULT,
        config={},
        tool_versions={},
    )
    return shards.Shards(Path("synthetic"), manifest)


def _with_classes(source: shards.Shards, num_classes: int) -> shards.Shards:
    """The same images, of as many classes as the model tells apart, however few of them occur."""
    counts = (*source.manifest.class_counts.get("train", ()), *[0] * num_classes)[:num_classes]
    names = tuple(f"{label:04d}" for label in range(num_classes))
    return replace(
        source, manifest=source.manifest.model_copy(update={"classes": names, "class_counts": {"train": counts}})
    )
