"""Model FLOP/s utilisation: the arithmetic that a model needs, by the time it took, to what the card could do.

Only what the model needs counts (Chowdhery et al. 2022, "PaLM", appendix B): convolutions and matrix products, forward
and backward, a multiplication and an addition as two; not what compilation or recomputation add.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline import models
from pipeline.batch import Batch
from pipeline.models._contract import ModelConfig

NUM_IMAGES = 2  # batch normalisation refuses one
Format = Literal["fp32", "tf32", "bf16", "fp16"]
"""What convolutions and matrix products compute in; `tf32` is fp32 with 10 bits of mantissa on the tensor cores."""

_HOPPER: dict[Format, float] = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4}
_AMPERE: dict[Format, float] = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}
PEAKS: dict[str, dict[Format, float]] = {
    "NVIDIA H200": _HOPPER,
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA A100-SXM4-80GB": _AMPERE,
    "NVIDIA A100-SXM4-40GB": _AMPERE,
    "NVIDIA A100 80GB PCIe": _AMPERE,
}
"""TFLOP/s of a card by its name in torch, without sparsity: NVIDIA H100 Tensor Core GPU Architecture (2022), table 2,
for the SXM5 parts, whose arithmetic is the H200's too; NVIDIA A100 Tensor Core GPU datasheet (2021)."""


def per_image(config: ModelConfig) -> int:
    """FLOP of one training image, forward and backward; nothing is computed and no weights are made for it."""
    with torch.device("meta"):
        model = models.build_classifier(config)
        images = torch.zeros(NUM_IMAGES, model.spec.num_channels, *model.spec.size_hw, dtype=torch.uint8)
        batch = Batch(images, torch.zeros(NUM_IMAGES, dtype=torch.int64))
    counter = FlopCounterMode(display=False)
    with counter:
        losses = model.loss(model(batch), batch.labels)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
    return int(counter.get_total_flops()) // NUM_IMAGES


def peak(card: str, number_format: Format) -> float | None:
    """FLOP/s of a card; None where it is not stated."""
    stated = PEAKS.get(card)
    return None if stated is None else stated[number_format] * 1e12
