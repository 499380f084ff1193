"""Fast R-CNN: one pass of a backbone over the picture, then a small head over each of many given regions.

Girshick, "Fast R-CNN", ICCV 2015. Regions come from outside (the paper: selective search, about 2000 an image), as
`Batch.proposals`. Counted for 20 classes, the default with VGG16 has 41,563,049 parameters; with AlexNet 16,473,001,
with SqueezeNet 1.0 27,583,785 and 1.1 27,570,857.

As in the paper: RoI pooling (2.1), the two losses added up with smooth L1 of beta 1 (2.3), 64 regions of each image,
of which a quarter overlap an object by 0.5 or more and the others by 0.1 to 0.5 (2.3), objects themselves among the
regions (as in its code), corrections that are normalised, single scale of 600 and at most 1000 pixels (5.2),
suppression at 0.3.

What differs:

1. The full layers are fresh and 1024 wide; the paper begins with those of the classifier, 4096 wide with dropout 0.5
   (`fc_features: 4096` has the width). They are not compressed by SVD (3.1).
2. Regions are placed on the map by where its cells lie (`_regions`); the paper's code is half a cell beside in VGG.
   `region_pooling: align` is RoIAlign, which rounds nothing (He et al., "Mask R-CNN", ICCV 2017, section 3).
3. In an image without any object every region counts as background; VOC has no such images. Where there are objects,
   a region that overlaps them by less than 0.1 is never drawn, even if less than 64 are.
4. RGB normalised by ImageNet's mean and std (torchvision's weights); the paper: BGR, mean subtracted.
5. Left to the training configuration: the paper trains from conv3_1 of VGG on, for 30k steps of 2 images at a rate of
   0.001 and 10k at a tenth, biases at twice the rate.

The paper's mAP on VOC 2007 test (its own, not ours): 57.1 with CaffeNet (an AlexNet), 59.2 with VGG_CNN_M_1024, 66.9
with VGG16; the last 68.1 without difficult objects in training, and 70.0 of these trained on VOC 2007 and 2012. On VOC
2012 test VGG16 has 65.7, or 68.4 with VOC 2007 in training.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from pipeline.batch import Batch
from pipeline.models import _regions
from pipeline.models._detector import Selection
from pipeline.models._regions import Outputs, RegionConfig, RegionDetector
from pipeline.types import DetectorSpec, Fit


class Config(RegionConfig):
    """Fast R-CNN.

    Attributes:
        backbone: a classifier's layers up to its map of `stride`.
        region_pooling: `max`: RoI pooling, to whole cells; `align`: RoIAlign.
        background_iou: a region is background if its overlap with objects is from here up to `foreground_iou`.
        rois_per_image: regions of an image that are drawn to learn from, at most.
        input: the picture's short side 600 pixels, or its long side 1000 (section 5.2).
        select: as in the paper, suppression from an overlap of 0.3 on.
    """

    needs_proposals: ClassVar[bool] = True

    name: Literal["fast_rcnn"] = "fast_rcnn"
    backbone: _regions.SingleMap = "vgg16"
    region_pooling: _regions.Kind = "max"
    rois_per_image: int = Field(default=64, ge=1)
    background_iou: float = Field(default=0.1, ge=0, lt=1)
    input: DetectorSpec = DetectorSpec(fit=Fit(way="resize", short_side=600, long_side=1000))
    select: Selection = Selection(iou_threshold=0.3)

    @model_validator(mode="after")
    def _background_below_foreground(self) -> Self:
        if self.background_iou >= self.foreground_iou:
            raise ValueError(
                f"expected background_iou below foreground_iou, got {self.background_iou} and {self.foreground_iou}"
            )
        return self


class Network(nn.Module):
    """The parts under torchvision's names."""

    def __init__(self, backbone: nn.Module, roi_heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.roi_heads = roi_heads

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The map that regions are pooled from, [B, channels, H / stride, W / stride] of normalised [B, C, H, W]."""
        return _regions.maps_of(self.backbone(images))


class NearMisses(RoIHeads):  # type: ignore[misc]  # torchvision is untyped
    """Heads that learn the background from regions which overlap an object somewhat: the hardest ones."""

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The object of each region [P] and its class [P]: 0 for background, -1 where it must not be drawn."""
        matched, classes = super().assign_targets_to_proposals(proposals, boxes, labels)
        return matched, [_nearer(one) for one in classes]


class FastRCNN(RegionDetector):
    """Fast R-CNN."""

    BETA = 1.0

    def __init__(self, config: Config, network: Network) -> None:
        super().__init__(config, network)
        self.stride = config.stride

    def forward(self, batch: Batch) -> Outputs:
        """What the head says of the proposed regions, and of some that are drawn where the targets are boxes.

        Raises:
            ModelError: the batch brings no proposals, or images have other channels than specified.
        """
        _regions.check_proposals(batch, "fast_rcnn")
        images = self.normalized(batch, self.stride)
        maps = {name: one.float() for name, one in self.network(images).items()}
        padded_hw = images.shape[2], images.shape[3]
        return self.judged(maps, padded_hw, batch.proposals, _regions.objects_of(batch), batch.sizes_hw)


def build(config: Config) -> FastRCNN:
    """A freshly initialised Fast R-CNN."""
    backbone, channels = _regions.single_map(config.backbone, len(config.input.mean), config.stride)
    origin = _regions.origin(config.backbone, config.stride)
    pool = _regions.RegionPool(config.region_pooling, config.pool_size, origin, config.stride)
    heads = _regions.build_heads(config, channels, pool, config.background_iou, NearMisses)
    return FastRCNN(config, Network(backbone, heads))


def _nearer(classes: Tensor) -> Tensor:
    """Torchvision's classes with its 0 (below the lower overlap) and -1 (between the two) exchanged."""
    exchanged = torch.where(classes > 0, classes, -1 - classes)
    return exchanged if (exchanged >= 0).any() else torch.zeros_like(classes)
