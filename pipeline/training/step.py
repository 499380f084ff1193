"""One optimiser step on one batch: backward, in parts where the batch does not fit at once, then clip and update.

A batch that is trained in parts gives the gradients of the whole batch: each part's mean loss counts by its share of
the images, so parts need not be equal. Only what mixes the images differs: batch normalisation sees the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch import Batch


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """The images of a batch in at most so many parts of nearly equal size, in order; views, no pixel is copied."""
    places = np.array_split(np.arange(len(batch)), num_parts)
    return [batch.part(int(part[0]), int(part[-1]) + 1) for part in places if len(part)]


def backward(
    net: nn.Module, parts: Sequence[Batch], loss_of: Callable[[Batch], Tensor], scaler: torch.amp.GradScaler
) -> Tensor:
    """Add the gradients of the mean loss over the images of all parts to `.grad`; returns that loss, detached.

    Args:
        net: what `loss_of` calls; DistributedDataParallel averages gradients over ranks once, in the last part.
        parts: at least one.
        loss_of: the mean loss of a part, with its graph; the place for autocast.
        scaler: of `precision.grad_scaler`; it does nothing but for fp16.
    """
    num_images = sum(map(len, parts))
    total = torch.zeros((), device=parts[0].images.device)
    for number, part in enumerate(parts, start=1):
        waits = isinstance(net, DistributedDataParallel) and number < len(parts)
        with cast(DistributedDataParallel, net).no_sync() if waits else nullcontext():
            loss = loss_of(part) * (len(part) / num_images)
            torch.autograd.backward(scaler.scale(loss))
        total += loss.detach()
    return total


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    scaler: torch.amp.GradScaler,
    clip_norm: float | None,
) -> None:
    """Clip the gradients that are there, take the step and clear them; in fp16 a step that overflowed is left out."""
    scaler.unscale_(optimizer)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
