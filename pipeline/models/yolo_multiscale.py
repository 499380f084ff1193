"""A one-stage detector of YOLO's family as they are built today: three scales, no anchors, an IoU loss.

What it keeps of Redmon et al. 2016, "You Only Look Once": one network looks once at the whole picture, and each cell of
a grid answers for the objects around it. What came later, and from where:

- Maps of strides 8, 16 and 32 instead of one grid, coarse ones added to finer ones on the way down (Lin et al. 2017,
  "Feature Pyramid Networks", section 3); small objects get small cells.
- Each cell predicts one box by its distances to the four sides, and a score for each class that needs no separate
  confidence (Tian et al. 2019, "FCOS", sections 3.1 and 3.2; without its centre-ness).
- Which cells are to answer for an object follows from what they say already: of the cells inside it, those whose score
  and box are best together (Feng et al. 2021, "TOOD", section 3.2: t = s^alpha u^beta). A cell's score is trained
  towards the quality of its box, so that scores rank boxes as average precision does.
- The boxes' loss is complete IoU (Zheng et al. 2020, "Distance-IoU Loss", section 4).

The backbone is a classifier's and takes its weights. Differences from the papers: a pyramid of one direction; one
hidden layer in each head; binary cross-entropy without focusing; an object too small for any cell to lie inside it is
given the nearest cell of the finest map. The default has 12,630,664 parameters for 20 classes.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision import ops

from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ModelError
from pipeline.models import _backbones
from pipeline.models._backbones import normed
from pipeline.models._detector import Candidates, Detector, DetectorConfig
from pipeline.types import DetectorSpec, Fit

STRIDES = (8, 16, 32)
_PRIOR = 0.01  # score of an untrained cell, so that the many empty ones do not drown the rest (RetinaNet, section 4.1)
_REACH = 1.5  # an untrained cell's distance to the sides of its box, in strides, before softplus
_SMALL = 1e-9


class Config(DetectorConfig):
    """YOLO of several scales.

    Attributes:
        backbone: whose layers come first; `plain` is a small one for small pictures, without weights to begin with.
        channels: of the pyramid's maps and of the heads.
        box_weight: of the boxes' loss against that of the classes.
        num_cells: that answer for an object, at most.
        alpha, beta: how much a cell's score and the IoU of its box count when these are chosen.
        input: with sides that are multiples of 32, unless pictures keep their aspect (`resize`): those are padded.
    """

    name: Literal["yolo_multiscale"] = "yolo_multiscale"
    backbone: Literal[
        "plain", "squeezenet1_0", "squeezenet1_1", "resnet18", "resnet34", "resnet50", "mobilenet_v3_large"
    ] = "resnet18"
    channels: int = Field(default=128, ge=8)
    box_weight: float = Field(default=2.5, gt=0)
    num_cells: int = Field(default=13, ge=1)
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=6.0, ge=0)
    input: DetectorSpec = DetectorSpec(fit=Fit(way="letterbox", size_hw=(416, 416)))

    @model_validator(mode="after")
    def _sides_fit(self) -> Self:
        fit = self.input.fit
        if fit.way != "resize" and any(side % STRIDES[-1] for side in fit.size_hw):
            raise ValueError(f"input.fit.size_hw: expected multiples of {STRIDES[-1]}, got {fit.size_hw}")
        return self


class Outputs(NamedTuple):
    """What the network says about B pictures, by N cells.

    Attributes:
        boxes_xyxy: float32 [B, N, 4], in pixels of the input.
        logits: float32 [B, N, C].
        centres_xy: float32 [N, 2], of the cells.
        sizes_hw: of the pictures without padding, for each.
    """

    boxes_xyxy: Tensor
    logits: Tensor
    centres_xy: Tensor
    sizes_hw: list[tuple[int, int]]


class Network(nn.Module):
    """Normalised float32 [B, C, H, W], sides multiples of 32 -> [B, N, 4 + num_classes], for the cells of all maps.

    The first four are distances to the left, upper, right and lower side in strides, before softplus; then logits.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        taps = tuple(tap for tap in _backbones.TAPS[config.backbone] if tap.stride in STRIDES)
        width = config.channels
        self.backbone = _backbones.build(config.backbone, len(config.input.mean), taps)
        self.lateral = nn.ModuleList(normed(tap.channels, width, 1) for tap in taps)
        self.coarser = nn.ModuleList(normed(width, width, 3, 2) for _ in STRIDES[len(taps) :])
        self.smooth = nn.ModuleList(normed(width, width, 3) for _ in STRIDES)
        self.box = nn.ModuleList(nn.Sequential(normed(width, width, 3), nn.Conv2d(width, 4, 1)) for _ in STRIDES)
        self.score = nn.ModuleList(normed(width, width, 3) for _ in STRIDES)
        self.classes = nn.ModuleList(nn.Conv2d(width, config.num_classes, 1) for _ in STRIDES)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Answer for every cell, those of the finest map first, row by row."""
        maps = [layer(found) for layer, found in zip(self.lateral, self.backbone(x), strict=True)]
        for layer in self.coarser:
            maps.append(layer(maps[-1]))
        for finer in reversed(range(len(maps) - 1)):
            maps[finer] = maps[finer] + F.interpolate(maps[finer + 1], scale_factor=2.0)
        maps = [layer(found) for layer, found in zip(self.smooth, maps, strict=True)]
        heads = zip(maps, self.box, self.score, self.classes, strict=True)
        answers = [torch.cat([box(found), classes(score(found))], 1) for found, box, score, classes in heads]
        return torch.cat([answer.flatten(2) for answer in answers], 2).transpose(1, 2)

    def _initialise(self) -> None:
        for box, classes in zip(self.box, self.classes, strict=True):
            last = cast(nn.Conv2d, cast(nn.Sequential, box)[1])
            for layer, bias in ((last, _REACH), (cast(nn.Conv2d, classes), -math.log(1 / _PRIOR - 1))):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.constant_(cast(Tensor, layer.bias), bias)


class YoloMultiscale(Detector):
    """See the module."""

    heads = tuple(f"network.classes.{number}" for number in range(len(STRIDES)))

    def __init__(self, config: Config) -> None:
        super().__init__(config, Network(config))
        self.config = config

    def forward(self, batch: Batch) -> Outputs:
        """Boxes and logits of every cell.

        Raises:
            ModelError: images have other channels than specified, or in training are one cell of the coarsest map.
        """
        images = self.normalized(batch, STRIDES[-1])
        if self.training and len(images) == 1 and max(images.shape[2:]) == STRIDES[-1]:
            raise ModelError(
                f"expected more than one cell of {STRIDES[-1]}x{STRIDES[-1]} pixels to normalise over in training, got "
                f"a batch of one image of {batch.sizes_hw[0]}; take larger images or batches"
            )
        raw = self.network(images).float()
        centres, strides = _cells(images.shape[2], images.shape[3], images.device)
        reach = F.softplus(raw[..., :4]) * strides[:, None]
        boxes = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
        return Outputs(boxes, raw[..., 4:], centres, batch.sizes_hw)

    def loss(self, outputs: Outputs, targets: BoxTargets) -> dict[str, Tensor]:
        """Cross-entropy of the scores of all cells and IoU loss of those that answer for objects.

        Both are divided by the sum of the qualities that are asked for in the batch, which is about the number of
        objects times the cells of each; without any object, by 1.
        """
        with torch.no_grad():
            wanted, goals = self._assigned(outputs, targets)
        quality = wanted.sum(dim=-1)
        total = quality.sum().clamp(min=1)
        classes = F.binary_cross_entropy_with_logits(outputs.logits, wanted, reduction="sum")
        answers = quality > 0
        apart = ops.complete_box_iou_loss(outputs.boxes_xyxy[answers], goals[answers])
        boxes = (apart * quality[answers]).sum()
        return {"class": classes / total, "box": self.config.box_weight * boxes / total}

    def candidates(self, outputs: Outputs) -> list[Candidates]:
        """Every cell's box, cut to its picture, and its scores."""
        scores = outputs.logits.sigmoid()
        return [
            Candidates(ops.clip_boxes_to_image(boxes, size_hw), score)
            for boxes, score, size_hw in zip(outputs.boxes_xyxy, scores, outputs.sizes_hw, strict=True)
        ]

    def _assigned(self, outputs: Outputs, targets: BoxTargets) -> tuple[Tensor, Tensor]:
        """What each cell is to say: scores [B, N, C], zero but for cells that answer, and a box [B, N, 4].

        Source: Feng et al. 2021, section 3.2. Of an object's cells the best is asked for its own IoU as score, the
        others for less, in proportion to their metric.
        """
        boxes, labels, is_object = _padded(targets, outputs.boxes_xyxy.device)
        iou = _iou(outputs.boxes_xyxy, boxes)  # [B, N, M]
        of_class = labels[:, None, :].expand(-1, iou.shape[1], -1)
        score = outputs.logits.sigmoid().gather(2, of_class)
        may = _inside(outputs.centres_xy, boxes) & is_object[:, None, :]
        metric = torch.where(may, score.pow(self.config.alpha) * iou.pow(self.config.beta) + _SMALL, 0.0)
        least = metric.topk(min(self.config.num_cells, metric.shape[1]), dim=1).values[:, -1:, :]
        metric = torch.where(metric >= least, metric, 0.0)
        # Of several objects that want a cell, that which it fits best.
        best_iou, of_object = torch.where(metric > 0, iou, -1.0).max(dim=2)
        mine = F.one_hot(of_object, metric.shape[2]).bool() & (best_iou >= 0)[:, :, None]
        metric = torch.where(mine, metric, 0.0)
        highest = metric.amax(dim=1, keepdim=True).clamp(min=_SMALL)
        fits = torch.where(mine, iou, 0.0).amax(dim=1, keepdim=True)
        quality = (metric / highest * fits).sum(dim=2)  # [B, N]
        asked = F.one_hot(labels.gather(1, of_object), outputs.logits.shape[2]) * quality[..., None]
        return asked, boxes.gather(1, of_object[..., None].expand(-1, -1, 4))


def build(config: Config) -> Detector:
    """A freshly initialised detector."""
    return YoloMultiscale(config)


def _cells(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres [N, 2] in pixels and strides [N] of the cells of all maps, as the network orders them."""
    centres, strides = [], []
    for stride in STRIDES:
        y, x = ((torch.arange(side // stride, device=device) + 0.5) * stride for side in (height, width))
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
        centres.append(grid)
        strides.append(torch.full((len(grid),), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)


def _padded(targets: BoxTargets, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [B, M, 4], labels [B, M] and which of them are objects [B, M]; at least one place for each image."""
    counts = targets.of_image.bincount(minlength=targets.num_images)
    places = torch.arange(len(targets.labels), device=device) - (counts.cumsum(0) - counts)[targets.of_image]
    shape = (targets.num_images, max(int(counts.max()), 1))
    boxes = torch.zeros(*shape, 4, device=device)
    labels = torch.zeros(shape, dtype=torch.int64, device=device)
    is_object = torch.zeros(shape, dtype=torch.bool, device=device)
    at = targets.of_image, places
    boxes[at], labels[at], is_object[at] = targets.boxes_xyxy, targets.labels, True
    return boxes, labels, is_object


def _iou(found: Tensor, boxes: Tensor) -> Tensor:
    """IoU [B, N, M] of boxes [B, N, 4] with boxes [B, M, 4]."""
    lower = torch.maximum(found[:, :, None, :2], boxes[:, None, :, :2])
    upper = torch.minimum(found[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (upper - lower).clamp(min=0).prod(dim=3)
    areas = [(one[..., 2:] - one[..., :2]).prod(dim=2) for one in (found, boxes)]
    return shared / (areas[0][:, :, None] + areas[1][:, None, :] - shared + _SMALL)


def _inside(centres: Tensor, boxes: Tensor) -> Tensor:
    """Which cells [B, N, M] may answer for which boxes [B, M, 4]: those inside, or else the nearest of the finest map.

    Where no cell is inside, its centre is at most half a diagonal of the finest cell away from one of them; among
    equally near cells all may.
    """
    reach = torch.cat([centres[:, None] - boxes[:, None, :, :2], boxes[:, None, :, 2:] - centres[:, None]], dim=3)
    inside = reach.amin(dim=3) > 0
    middle = (boxes[:, None, :, :2] + boxes[:, None, :, 2:]) / 2
    away = (centres[:, None] - middle).square().sum(dim=3)
    nearest = away <= away.amin(dim=1, keepdim=True)
    return inside | (nearest & ~inside.any(dim=1, keepdim=True))
