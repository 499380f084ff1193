"""What people write without this project: one plain script, in the shape of torchvision's reference for classification.

Files in class folders, `ImageFolder`, v2 transforms up to normalised floats, a DataLoader with a process or more, SGD,
DistributedDataParallel where there are several processes. Of the reference it leaves out what would slow it down:
no accuracy is computed and no loss fetched in a step. The network is the same as ours, without our checks around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from pipeline import models
from pipeline.benchmark.clock import Figures
from pipeline.benchmark.training_block import Task, in_processes
from pipeline.types import InputSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Pair = tuple[Tensor, Tensor]
"""Normalised float32 [B, C, H, W] and int64 [B]."""


def run(task: Task) -> Figures:
    """In this process, or in as many as there are workers."""
    return in_processes(train, task)


def train(task: Task, rank: int, device: torch.device, roots: list[int]) -> Figures:
    """Train on one rank; its process group is initialised, where there are several."""
    recipe, clock = task.recipe, task.clock(device, roots)
    torch.manual_seed(recipe.seed)
    model = models.build_classifier(recipe.model)
    batches = _synthetic(task, model.spec, device) if task.data == "synthetic" else _real(task, model.spec, rank)
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    net: nn.Module = model.network.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch knows both
    if recipe.compile:
        net.compile()
    if task.num_workers > 1:
        net = DistributedDataParallel(net)
    net.train()
    criterion, given = nn.CrossEntropyLoss(), recipe.optim
    optimizer = torch.optim.SGD(net.parameters(), lr=given.lr, momentum=given.momentum, weight_decay=given.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    for batch in clock.watch(batches):
        images, targets = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, DTYPES[recipe.precision], enabled=recipe.precision != "fp32"):
            loss = criterion(net(images), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return clock.figures(task.global_batch_size)


def _synthetic(task: Task, spec: InputSpec, device: torch.device) -> Iterator[Pair]:
    """One batch on the device, again and again."""
    size = task.recipe.loading.batch_size
    images = torch.randn(size, len(spec.mean), *spec.size_hw, device=device)
    return repeat((images, torch.randint(task.recipe.model.num_classes, (size,), device=device)))


def _real(task: Task, spec: InputSpec, rank: int) -> Iterator[Pair]:
    """Epoch after epoch of the photos in class folders."""
    from torchvision import datasets  # noqa: PLC0415  (seconds to import, and synthetic data needs none)
    from torchvision.transforms import v2  # noqa: PLC0415

    steps: list[Any] = [v2.RandomResizedCrop(spec.size_hw, antialias=True), v2.RandomHorizontalFlip()]
    steps += [v2.Grayscale()] if len(spec.mean) < spec.num_channels else []
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
    photos = datasets.ImageFolder(str(task.scratch / "folders" / "train"), v2.Compose(steps))
    several = task.num_workers > 1
    sampler: Any = DistributedSampler(photos, task.num_workers, rank) if several else RandomSampler(photos)
    loader = DataLoader(
        photos,
        batch_size=task.recipe.loading.batch_size,
        sampler=sampler,
        num_workers=task.recipe.loading.num_tasks,
        pin_memory=task.device == "cuda",
        drop_last=True,
    )

    def epoch(number: int) -> Iterator[Pair]:
        if several:
            sampler.set_epoch(number)
        return cast(Iterator[Pair], iter(loader))

    return chain.from_iterable(map(epoch, count()))
