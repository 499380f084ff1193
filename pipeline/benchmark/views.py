"""How one encoded photo becomes one training view: this project's way, and torchvision's as its documentation shows it.

Both give uint8 [3, size, size] after RandomResizedCrop with its defaults and a flip with probability 1/2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.data.transforms import classify
from pipeline.types import InputSpec, UInt8Array

_AUGMENT = classify.Augment()


def same(data: bytes, spec: InputSpec, rng: np.random.Generator) -> UInt8Array:
    """The view that this project's loader makes, whoever calls."""
    return classify.training(data, spec, _AUGMENT, rng)


class Same:
    """The same for pipelines that map one photo to one tensor; each worker process draws from its own generator."""

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self._rng: np.random.Generator | None = None

    def __call__(self, data: bytes) -> torch.Tensor:
        """Decode, crop, flip."""
        if self._rng is None:
            self._rng = np.random.default_rng(torch.initial_seed())
        view = same(data, self.spec, self._rng)  # a flipped one may run backwards, which torch cannot
        return torch.from_numpy(np.ascontiguousarray(view))


def torchvision_view(size: int, *, from_pillow: bool) -> Any:
    """The v2 transforms of torchvision's ImageNet recipe, up to uint8; for tensors, or for Pillow images."""
    from torchvision.transforms import v2  # noqa: PLC0415  (seconds to import, and only some contenders need it)

    steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, v2.PILToTensor()] if from_pillow else steps)
