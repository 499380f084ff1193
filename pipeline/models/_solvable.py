"""What a model promises whose last layers are not trained but solved for: linear ones, each with one best solution.

`training.solve` asks such a model for examples, in which nothing is drawn, finds the layers, and gives them back.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor

from pipeline.batch import Batch
from pipeline.models._contract import ModelConfig


class Examples(NamedTuple):
    """R regions of a batch's images: the annotated objects, then those that were proposed, image by image.

    Attributes:
        features: [R, F], what scores are linear in.
        pooled: [R, P], what corrections of boxes are linear in.
        overlaps: float32 [R, num_classes], the largest IoU with an object of each class.
        labels: int64 [R], the class of the object that it overlaps most; -1 where there is none.
        is_object: bool [R], whether it is an annotated object itself.
        wanted: float32 [R, 4], the correction that brings it to that object; anything where there is none.
        of_image: int64 [R], the place of its image in the batch; ascending.
    """

    features: Tensor
    pooled: Tensor
    overlaps: Tensor
    labels: Tensor
    is_object: Tensor
    wanted: Tensor
    of_image: Tensor


class Layer(NamedTuple):
    """A linear layer: `x @ weight.T + bias`, float32 [outputs, inputs] and [outputs]."""

    weight: Tensor
    bias: Tensor


@runtime_checkable
class Solvable(Protocol):
    """A fitted model that is to be solved."""

    def examples(self, batch: Batch) -> Examples:
        """What there is to learn from in annotated images; the model is in evaluation mode."""
        ...

    def solved(self, classes: Layer, boxes: Layer) -> tuple[ModelConfig, Self]:
        """The finished model, with its configuration.

        Args:
            classes: features -> a margin for each class, an object's being 1 or more.
            boxes: pooled -> a correction for each class.
        """
        ...
