"""What every model in the house promises, and the first layer they all share.

A model answers about a `Batch`: `forward(batch)` gives its outputs, `loss(outputs, targets)` a dict of named scalars,
`postprocess(outputs, frames)` predictions. Every parameter is used inside `forward`; `loss` has none, so that
DistributedDataParallel can wrap the module. `model.network` is the tensor-to-tensor part for export and engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.errors import ModelError
from pipeline.types import Classification, Frame, InputSpec, Spec, Task

Stage = Literal["fit", "solve"]
"""Of a training: `fit` is the training loop, `solve` finds last layers that have a best solution (`training.solve`)."""
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion to "L" and JPEG's Y


class ModelConfig(Strict):
    """Keys that every model has; each model's `Config` narrows `name` to its file's name and adds its own.

    `num_classes` is filled in from the shards when it is left out.

    Attributes:
        task: what the model is asked.
        stages: of its training, in this order.
        needs_proposals: whether it judges regions that a batch brings, `Batch.proposals`.
    """

    task: ClassVar[Task]
    stages: ClassVar[tuple[Stage, ...]] = ("fit",)
    needs_proposals: ClassVar[bool] = False

    name: str
    num_classes: int = Field(default=1000, ge=1)
    input: Spec = InputSpec(size_hw=(224, 224), resize_short=256)

    @property
    def is_solved(self) -> bool:
        """Whether it is a model's after the stage `solve`."""
        return False

    def fill(self, **defaults: object) -> None:
        """Give each field that was left out, or is None, a default that another field decides.

        For validators that run `after` the others, and for them only: to everybody else a configuration is frozen.
        """
        for key, value in defaults.items():
            if key not in self.model_fields_set or getattr(self, key) is None:
                object.__setattr__(self, key, value)


class ClassifierConfig(ModelConfig):
    """Keys that every classifier has."""

    task: ClassVar[Task] = "classification"

    num_classes: int = Field(default=1000, ge=2)
    input: InputSpec = InputSpec(size_hw=(224, 224), resize_short=256)


class Normalize(nn.Module):
    """Pixels 0..255, uint8 or floating [B, C, H, W], to normalised fp32; grey where the specification has one mean.

    The constants are no part of the state dict: they come with the specification stored in the bundle.
    """

    mean: Tensor
    std: Tensor
    luma: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.grey = len(spec.mean) == 1 and spec.num_channels == 3
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("luma", torch.tensor(LUMA).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 [B, C or 1, H, W]."""
        pixels = images.float()
        if self.grey:
            pixels = (pixels * self.luma).sum(dim=1, keepdim=True)
        return (pixels - self.mean) / self.std


class Classifier(nn.Module):
    """A network that gives one logit per class.

    Attributes:
        spec: what it expects of an image.
        network: normalised float32 [B, C, H, W] -> logits [B, num_classes].
    """

    def __init__(self, spec: InputSpec, network: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.normalize = Normalize(spec)
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """Return logits [B, num_classes].

        Raises:
            ModelError: if the images are not of the size and channels that the specification names.
        """
        expected = (self.spec.num_channels, *self.spec.size_hw)
        if tuple(batch.images.shape[1:]) != expected:
            raise ModelError(f"expected images [B, {', '.join(map(str, expected))}], got {list(batch.images.shape)}")
        return cast(Tensor, self.network(self.normalize(batch.images)))

    def loss(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy in nats, mean over the batch; targets int64 [B] or soft float32 [B, num_classes]."""
        return {"cross_entropy": F.cross_entropy(outputs.float(), targets)}

    def scores(self, outputs: Tensor) -> Tensor:
        """Return probabilities float32 [B, num_classes]."""
        return outputs.float().softmax(dim=1)

    def postprocess(self, outputs: Tensor, frames: Sequence[Frame]) -> list[Classification]:
        """Rank all classes of each image, best first; `frames` are not needed for whole-image labels."""
        scores, labels = self.scores(outputs.detach()).sort(dim=1, descending=True, stable=True)
        return [Classification(*row) for row in zip(labels.cpu().numpy(), scores.cpu().numpy(), strict=True)]
