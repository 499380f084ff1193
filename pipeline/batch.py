"""Stacked samples as tensors: what a model is asked about. The first place on the road where torch appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.types import Frame, Sample


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model answers about.

    Attributes:
        images: uint8 or floating [B, C, H, W], values 0..255, RGB.
        targets: int64 [B] class indices, or float32 [B, num_classes] soft targets; None where the truth is unknown.
        frames: B frames, how each image maps to its original.
        ids: B image ids.
    """

    images: torch.Tensor
    targets: torch.Tensor | None = None
    frames: tuple[Frame, ...] = ()
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; the copy overlaps with compute where the source is pinned."""
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets)


def to_batch(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size; targets are present only if every sample has a label."""
    labels = [sample.label for sample in samples]
    known = [label for label in labels if label is not None]
    return Batch(
        images=torch.from_numpy(np.stack([sample.image for sample in samples])),
        targets=torch.tensor(known, dtype=torch.int64) if len(known) == len(labels) else None,
        frames=tuple(sample.frame for sample in samples),
        ids=tuple(sample.image_id for sample in samples),
    )
