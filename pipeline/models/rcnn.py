"""R-CNN: every proposed region is cut out, warped to a square and passed through a classifier's network, one by one.

Girshick, Donahue, Darrell, Malik, "Rich feature hierarchies for accurate object detection and semantic segmentation",
CVPR 2014. Regions come from outside (the paper: selective search, about 2000 an image), as `Batch.proposals`. It is
trained in two stages, and is a model of another `scorer` after each:

- `fit` (section 2.3, "domain-specific fine-tuning"): the network and a `softmax` over the classes and the background,
  on warped regions, by the training loop.
- `solve` (2.3, "object category classifiers", and appendix C): one linear `svm` for each class on the features of the
  last hidden layer, and a ridge regression for each class that corrects boxes, on the pooled map; `training.solve`.

Counted for 20 classes, the default with AlexNet has 57,089,877 parameters with `softmax`, and 57,823,140 with `svm`.

As in the paper: regions are warped to 227x227 whatever their aspect, with 16 pixels of context around them (appendix
A); what lies outside the picture is its mean colour; an overlap of 0.5 makes a region an object in fine-tuning, of
which a quarter of each batch is drawn (2.3); answers are suppressed at 0.3 (in its code). Corrections are those of
appendix C, not normalised.

What differs:

1. The hidden full layers are fresh; the paper begins with those of the classifier.
2. The backbone's windows are padded (`_backbones`) and its last map is pooled to 6x6 cells by the largest value in
   each, so that other backbones and sizes fit too. AlexNet has its pooling there anyway.
3. A step draws `rois_per_image` regions of each image of its batch, a quarter of them objects; the paper draws 32
   objects and 96 others from all images. Where an image has fewer objects, the background fills up.
4. Regions are cut from the picture as it is fitted, by default to the size that pictures of VOC have, not from the
   original file; where they are larger than the warped square, pixels are averaged.
5. A score is the logistic function of the support vector machine's margin, so that it lies in [0, 1]; the order is the
   same, so is average precision.
6. The loss of a model with `svm` is what its last layers were solved for: hinge and squared error.

The paper's mAP on VOC 2007 test (its own, not ours): AlexNet 54.2 without and 58.5 with box regression, VGG-16 62.2 and
66.0; 50.2 and 53.7 on VOC 2010 test with AlexNet. An image took 13 s on a GPU and 53 s on a CPU with AlexNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision import ops
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder

from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ModelError
from pipeline.models import _regions
from pipeline.models._contract import Stage
from pipeline.models._detector import Candidates, Detector, DetectorConfig, Selection
from pipeline.models._layers import full_layers
from pipeline.models._solvable import Examples, Layer
from pipeline.types import DetectorSpec, Fit

AT_ONCE = 128
"""Regions that pass the network at once where no gradient is kept: 79 MB of warped pixels at 227x227."""
CODER = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


class Config(DetectorConfig):
    """R-CNN.

    Attributes:
        backbone: a classifier's layers up to its last map of stride 16.
        scorer: what scores regions: of the stage that the model comes from, see the module.
        region_side: pixels a side that a region is warped to, its context included.
        context: of these, on each side, what lies around the region.
        pool_size: cells a side that the last map is pooled to.
        fc_features: width of the two hidden full layers.
        dropout: share of units dropped in fine-tuning, before each hidden full layer.
        rois_per_image: regions of an image that are drawn to learn from, at most.
        foreground_share: of these, objects at most.
        foreground_iou: from this overlap with an object on, a region has its class in fine-tuning.
        input: the picture that regions are cut from.
        select: as in the paper, suppression from an overlap of 0.3 on.
    """

    stages: ClassVar[tuple[Stage, ...]] = ("fit", "solve")
    needs_proposals: ClassVar[bool] = True

    name: Literal["rcnn"] = "rcnn"
    backbone: _regions.SingleMap = "alexnet"
    scorer: Literal["softmax", "svm"] = "softmax"
    region_side: int = Field(default=227, ge=32)
    context: int = Field(default=16, ge=0, le=64)
    pool_size: int = Field(default=6, ge=1)
    fc_features: int = Field(default=4096, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    rois_per_image: int = Field(default=64, ge=1)
    foreground_share: float = Field(default=0.25, gt=0, le=1)
    foreground_iou: float = Field(default=0.5, gt=0, le=1)
    input: DetectorSpec = DetectorSpec(fit=Fit(way="resize", short_side=375, long_side=500))
    select: Selection = Selection(iou_threshold=0.3)

    @model_validator(mode="after")
    def _context_leaves_a_region(self) -> Self:
        if 2 * self.context >= self.region_side:
            raise ValueError(f"context: expected less than half of region_side, {self.region_side}, got {self.context}")
        return self

    @property
    def is_solved(self) -> bool:
        """Whether its last layers are those of the stage `solve`."""
        return self.scorer == "svm"


class Answers(NamedTuple):
    """What the network says of R warped regions.

    Attributes:
        pooled: [R, P], the last map.
        features: [R, F], the last hidden layer.
        logits: [R, 1 + num_classes] of the softmax, 0 being the background, or [R, num_classes] margins.
        deltas: [R, num_classes, 4], how each class would correct the box; with a softmax [R, 0, 4].
    """

    pooled: Tensor
    features: Tensor
    logits: Tensor
    deltas: Tensor


class Lesson(NamedTuple):
    """R regions that were drawn to learn from.

    Attributes:
        answers: of the network.
        labels: int64 [R], 0 for the background.
        wanted: float32 [R, 4], the correction that would be right; of the background anything.
    """

    answers: Answers
    labels: Tensor
    wanted: Tensor


class Outputs(NamedTuple):
    """What R-CNN says of B images.

    Attributes:
        sizes_hw: of the pictures without padding.
        boxes_xyxy: the regions of each, float32 [r, 4], in pixels of the input.
        answers: about these regions, in the order of the images; None in training.
        lesson: what the loss is made of; None where the batch has no targets.
    """

    sizes_hw: list[tuple[int, int]]
    boxes_xyxy: tuple[Tensor, ...]
    answers: Answers | None
    lesson: Lesson | None


class Network(nn.Module):
    """Normalised warped regions, float32 [R, C, side, side] -> `Answers`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.backbone, channels = _regions.single_map(config.backbone, len(config.input.mean))
        self.pool = nn.AdaptiveMaxPool2d(config.pool_size)
        pooled = channels * config.pool_size**2
        self.full = full_layers(pooled, config.fc_features, config.dropout)
        self.classes = nn.Linear(config.fc_features, config.num_classes + (0 if config.is_solved else 1))
        self.boxes = nn.Linear(pooled, config.num_classes * 4) if config.is_solved else None
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.zeros_(self.classes.bias)

    def forward(self, regions: Tensor) -> Answers:
        """See the class."""
        pooled = self.pool(self.backbone(regions)[-1]).flatten(1)
        features = self.full(pooled)
        deltas = pooled[:, :0] if self.boxes is None else self.boxes(pooled)
        return Answers(pooled, features, self.classes(features).float(), deltas.float().unflatten(1, (-1, 4)))


class RCNN(Detector):
    """R-CNN; `heads` are what its last stage made."""

    def __init__(self, config: Config, network: Network) -> None:
        super().__init__(config, network)
        self.config = config
        self.heads = ("network.classes",) if network.boxes is None else ("network.classes", "network.boxes")
        self.sampler = BalancedPositiveNegativeSampler(config.rois_per_image, config.foreground_share)

    def forward(self, batch: Batch) -> Outputs:
        """What the network says of the proposed regions, and of some that are drawn where the targets are boxes.

        Raises:
            ModelError: the batch brings no proposals, or images have other channels than specified.
        """
        _regions.check_proposals(batch, "rcnn")
        images = self._visible(batch)
        objects = _regions.objects_of(batch)
        lesson = None if objects is None else self._lesson(images, batch.proposals, objects)
        answers = None
        if lesson is None or not self.training:
            answers = self._read(images, batch.proposals)
        return Outputs(batch.sizes_hw, batch.proposals, answers, lesson)

    def examples(self, batch: Batch) -> Examples:
        """All that is proposed, and the objects themselves, with what the network says of them.

        Raises:
            ModelError: the batch brings no proposals, or its targets are no boxes.
        """
        _regions.check_proposals(batch, "rcnn")
        objects = _regions.objects_of(batch)
        if objects is None:
            raise ModelError(_regions.WITHOUT_TARGETS)
        regions = [torch.cat([true["boxes"], one]) for true, one in zip(objects, batch.proposals, strict=True)]
        answers = self._read(self._visible(batch), regions)
        compared = [_compared(*one, self.config.num_classes) for one in zip(regions, objects, strict=True)]
        overlaps, labels, is_object, wanted = (torch.cat(column) for column in zip(*compared, strict=True))
        counts = torch.tensor([len(one) for one in regions])
        of_image = torch.arange(len(regions)).repeat_interleave(counts)
        return Examples(answers.features, answers.pooled, overlaps, labels, is_object, wanted, of_image)

    def solved(self, classes: Layer, boxes: Layer) -> tuple[Config, RCNN]:
        """The same network with support vector machines and corrections of boxes."""
        config = self.config.model_copy(update={"scorer": "svm"})
        made = build(config)
        state = self.state_dict() | {
            f"network.{name}.{part}": value
            for name, layer in (("classes", classes), ("boxes", boxes))
            for part, value in layer._asdict().items()
        }
        made.load_state_dict(state)
        return config, made.eval()

    def loss(self, outputs: Outputs, targets: BoxTargets) -> dict[str, Tensor]:
        """`classifier`: cross-entropy in nats, mean over the regions drawn.

        With support vector machines instead: `svm`, the hinge loss of all of them, summed over the classes, mean over
        the regions drawn; `boxes`, half the squared error of the objects' corrections, mean over the regions too.

        Raises:
            ModelError: there were no targets.
        """
        if outputs.lesson is None:
            raise ModelError(_regions.WITHOUT_TARGETS)
        answers, labels, wanted = outputs.lesson
        count = max(len(labels), 1)  # sums are divided by it: the mean over no region at all is not a number
        if not self.config.is_solved:
            return {"classifier": F.cross_entropy(answers.logits, labels, reduction="sum") / count}
        signs = 2 * F.one_hot(labels, 1 + answers.logits.shape[1])[:, 1:] - 1
        found = labels.nonzero()[:, 0]
        errors = answers.deltas[found, labels[found] - 1] - wanted[found]
        return {
            "svm": (1 - signs * answers.logits).clamp(min=0).sum() / count,
            "boxes": errors.square().sum() / 2 / count,
        }

    def candidates(self, outputs: Outputs) -> list[Candidates]:
        """Every region, corrected for each class where there is a regression, and cut off at the picture's edge.

        Raises:
            ModelError: the model was in training.
        """
        if outputs.answers is None:
            raise ModelError(_regions.IN_TRAINING)
        counts = [len(one) for one in outputs.boxes_xyxy]
        boxes, logits = torch.cat([*outputs.boxes_xyxy]), outputs.answers.logits
        if not self.config.is_solved:
            scores = logits.softmax(dim=1)[:, 1:]
        else:
            scores, deltas = logits.sigmoid(), outputs.answers.deltas
            boxes = CODER.decode_single(deltas.flatten(1), boxes).unflatten(1, (-1, 4))
        images = zip(torch.split(boxes, counts), torch.split(scores, counts), outputs.sizes_hw, strict=True)
        return [_regions.inside(*image) for image in images]

    def _read(self, images: Tensor, boxes_xyxy: Sequence[Tensor]) -> Answers:
        """What the network says of regions of normalised pictures [B, C, H, W], as many at once as memory likes."""
        of_image = torch.arange(len(images), device=images.device).repeat_interleave(
            torch.tensor([len(one) for one in boxes_xyxy], device=images.device)
        )
        rois = torch.cat([of_image[:, None].to(images.dtype), torch.cat([*boxes_xyxy])], dim=1)
        if torch.is_grad_enabled():
            return cast(Answers, self.network(self._warped(images, rois)))
        parts = [self.network(self._warped(images, some)) for some in torch.split(rois, AT_ONCE)]
        return Answers(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _visible(self, batch: Batch) -> Tensor:
        """Normalised pictures, their padding in the mean colour."""
        images = self.normalized(batch)
        for image, (height, width) in zip(images, batch.sizes_hw, strict=True):
            image[:, height:], image[:, :, width:] = 0, 0
        return images

    def _warped(self, images: Tensor, rois: Tensor) -> Tensor:
        """Regions [R, 5] (place of the image, xyxy) with their context: [R, C, side, side]."""
        side = self.config.region_side
        grown = side / (side - 2 * self.config.context)
        middles, halves = (rois[:, 1:3] + rois[:, 3:]) / 2, (rois[:, 3:] - rois[:, 1:3]) / 2 * grown
        # Behind its edge roi_align repeats a pixel first; it is to repeat the mean colour.
        around = torch.cat([rois[:, :1], middles - halves + 1, middles + halves + 1], dim=1)
        return cast(Tensor, ops.roi_align(F.pad(images, (1, 1, 1, 1)), around, side, 1.0, 0, aligned=True))

    def _lesson(self, images: Tensor, proposals: tuple[Tensor, ...], objects: list[dict[str, Tensor]]) -> Lesson:
        """Draw regions of each image, its objects themselves among them."""
        drawn, labels, wanted = zip(*map(self._drawn, proposals, objects), strict=True)
        return Lesson(self._read(images, drawn), torch.cat(labels), torch.cat(wanted))

    def _drawn(self, proposals: Tensor, objects: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Some regions [r, 4] of an image, their labels [r] and corrections [r, 4]."""
        true, classes = objects["boxes"], objects["labels"]
        regions = torch.cat([true, proposals])
        if not len(true):  # then everything is background, wherever this one lies
            true, classes = regions.new_tensor([[0, 0, 1, 1]]), classes.new_zeros(1)
        overlaps, nearest = ops.box_iou(regions, true).max(dim=1)
        labels = torch.where(overlaps >= self.config.foreground_iou, classes[nearest], 0)
        (of_objects,), (of_others,) = self.sampler([labels])
        kept = (of_objects | of_others).nonzero()[:, 0]
        return regions[kept], labels[kept], CODER.encode_single(true[nearest][kept], regions[kept])


def build(config: Config) -> RCNN:
    """A freshly initialised R-CNN."""
    return RCNN(config, Network(config))


def _compared(regions: Tensor, objects: dict[str, Tensor], num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of regions [r, 4] of an image, the first being its objects: the columns of `Examples` that compare them."""
    true, classes = objects["boxes"], objects["labels"] - 1
    is_object = torch.arange(len(regions), device=regions.device) < len(true)
    if not len(true):
        nowhere = torch.full((len(regions),), -1, dtype=torch.int64, device=regions.device)
        return regions.new_zeros(len(regions), num_classes), nowhere, is_object, torch.zeros_like(regions)
    overlaps = ops.box_iou(regions, true)
    nearest = overlaps.argmax(dim=1)
    columns = classes.expand(len(regions), -1)
    of_class = regions.new_zeros(len(regions), num_classes).scatter_reduce(1, columns, overlaps, "amax")
    labels = torch.where(overlaps.amax(dim=1) > 0, classes[nearest], -1)
    labels[: len(true)] = classes  # also of two objects at one place
    return of_class, labels, is_object, CODER.encode_single(true[nearest], regions)
