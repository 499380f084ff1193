"""What the loss is asked to match: class weights, for datasets whose classes are not equally frequent.

A weight multiplies the soft target of its class. As every model's loss is linear in soft targets, that is the weighted
loss, whatever the model: no loss has to know of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ConfigError

ClassWeights = Literal["none", "balanced"] | tuple[float, ...]


def class_weights(config: ClassWeights, counts: Sequence[int]) -> Tensor | None:
    """The weight of each class float32 [num_classes], 1 on average over the images; None where all are equal.

    Args:
        config: `balanced`: in inverse proportion to the class's images, N / (C n_c); or a number for each class, which
            is only scaled.
        counts: training images of each class.

    Raises:
        ConfigError: another number of weights than classes, or one that is not positive.
    """
    if config == "none":
        return None
    images = torch.tensor(counts, dtype=torch.float64)
    if config == "balanced":
        weights = torch.where(images > 0, 1 / images.clamp(min=1), 0.0)
    else:
        if len(config) != len(counts) or min(config) <= 0:
            raise ConfigError(f"class_weights: expected {len(counts)} positive numbers, one a class, got {[*config]}")
        weights = torch.tensor(config, dtype=torch.float64)
    return (weights * images.sum() / (weights * images).sum()).float()


def weigh(targets: Tensor, weights: Tensor | None) -> Tensor:
    """Targets, int64 [B] or soft [B, num_classes], as soft ones times the weight of each class; without weights as is.

    The mean of the loss is then over images, not over weights: a batch of rare classes counts for more.
    """
    if weights is None:
        return targets
    soft = F.one_hot(targets, len(weights)) if targets.ndim == 1 else targets
    return soft * weights.to(targets.device)
