"""Regions in two-stage detectors: pooled from a map, drawn to learn from, then classified and corrected.

What Fast and Faster R-CNN share, around torchvision's `RoIHeads`, whose parts and names it keeps. Where regions come
from is each model's own. `GeneralizedRCNNTransform` is left out (transforms, `to_batch` and `Frame` do that), and so is
the end of `RoIHeads.forward`: thresholds and suppression are the same for every detector (`_detector.choose`).

Where a cell lies. Cell i of a map of stride s is centred `origin + s i` pixels from the picture's edge: in the padded
AlexNet and SqueezeNet (`_backbones`) on the centre of pixel s i, in VGG amid the square that it stands for. Neither
form of torchvision's RoIAlign knows that: `aligned=False` takes it for s i, half a pixel beside in the former and s / 2
in the latter, `aligned=True` for s / 2 + s i, right for VGG and at a stride of 16 7.5 pixels beside in the others.
`RegionPool` moves the regions by the difference, so both are exact. Maps of torchvision's pyramids are pooled by its
own `MultiScaleRoIAlign`, half a pixel beside: their weights were trained with it.

Inside, class 0 is the background and the objects' classes follow from 1; outside there is no background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision import ops
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads

from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ModelError
from pipeline.models import _backbones
from pipeline.models._detector import Candidates, Detector, DetectorConfig

SingleMap = Literal["alexnet", "vgg16", "squeezenet1_0", "squeezenet1_1"]
"""Backbones of which one map is used."""
Stride = Literal[8, 16]
Kind = Literal["align", "max"]

MIN_SIDE = 1.0
"""Pixels: an object that is narrower or lower in the input is not learnt from, it gives no finite target."""
WITHOUT_TARGETS = "expected outputs of a batch whose targets are boxes, got those of one without; give it targets"
IN_TRAINING = "expected outputs of a model in evaluation mode; call model.eval() before it answers"
MIN_ANSWER = 0.01
"""Pixels a side that an answer has at least, as in torchvision."""


class RegionConfig(DetectorConfig):
    """Keys of the second stage.

    Attributes:
        stride: of the map that regions are pooled from, in pixels: 16 as in the papers, the backbone's last; 8, the one
            before it, is for small objects.
        fc_features: width of the two hidden full layers.
        pool_size: cells a side that a region is pooled to.
        rois_per_image: regions of an image that are drawn to learn from, at most.
        foreground_share: of these, objects at most.
        foreground_iou: from this overlap with an object on, a region has its class.
    """

    stride: Stride = 16
    fc_features: int = Field(default=1024, ge=1)
    pool_size: int = Field(default=7, ge=1)
    rois_per_image: int = Field(default=128, ge=1)
    foreground_share: float = Field(default=0.25, gt=0, le=1)
    foreground_iou: float = Field(default=0.5, gt=0, le=1)


class Regions(NamedTuple):
    """What the head says of the R regions of a batch, in the order of its images.

    Attributes:
        boxes_xyxy: of each image float32 [r, 4], in pixels of the input.
        logits: float32 [R, 1 + num_classes].
        deltas: float32 [R, 1 + num_classes, 4], how each class would correct the box.
    """

    boxes_xyxy: tuple[Tensor, ...]
    logits: Tensor
    deltas: Tensor


class Lesson(NamedTuple):
    """R regions that were drawn to learn from.

    Attributes:
        regions: what the head says of them.
        labels: int64 [R], 0 for the background.
        wanted: float32 [R, 4], the correction that would be right; of the background anything.
    """

    regions: Regions
    labels: Tensor
    wanted: Tensor


class AnchorLesson(NamedTuple):
    """S anchors that were drawn to learn from, P of them objects.

    Attributes:
        objectness: float32 [S], logits.
        labels: float32 [S], 1 for objects.
        deltas: float32 [P, 4], how the boxes of the objects are corrected.
        wanted: float32 [P, 4], the correction that would be right.
    """

    objectness: Tensor
    labels: Tensor
    deltas: Tensor
    wanted: Tensor


class Outputs(NamedTuple):
    """What a two-stage detector says of B images.

    Attributes:
        sizes_hw: of the pictures without padding, B.
        regions: what may be answered; None in training.
        lesson: what the loss of the head is made of; None where the batch has no targets.
        anchors: the same of a proposal network, where there is one.
    """

    sizes_hw: list[tuple[int, int]]
    regions: Regions | None
    lesson: Lesson | None
    anchors: AnchorLesson | None = None


class RegionDetector(Detector):
    """A detector whose second stage judges regions.

    Attributes:
        BETA: the error at which the head's box loss turns from square to linear.
    """

    BETA: ClassVar[float]
    heads = ("network.roi_heads.box_predictor",)

    @property
    def roi_heads(self) -> Any:
        """Torchvision's `RoIHeads`; its own `forward` is not used."""
        return self.network.get_submodule("roi_heads")

    def judged(
        self,
        maps: dict[str, Tensor],
        padded_hw: tuple[int, int],
        proposals: Sequence[Tensor],
        objects: list[dict[str, Tensor]] | None,
        sizes_hw: list[tuple[int, int]],
    ) -> Outputs:
        """The second stage: of regions drawn to learn from where objects are given, of all but in training.

        Args:
            maps: float32 [B, channels, h, w] by name.
            padded_hw: of the pictures that they are maps of.
            proposals: of each image float32 [P, 4], in pixels of the input.
            objects: of `objects_of`.
            sizes_hw: of the pictures without padding.
        """
        lesson = regions = None
        if objects is not None:
            drawn, _, labels, wanted = self.roi_heads.select_training_samples([*proposals], objects)
            lesson = Lesson(self._read(maps, padded_hw, drawn), torch.cat(labels), torch.cat(wanted))
        if lesson is None or not self.training:
            regions = self._read(maps, padded_hw, proposals)
        return Outputs(sizes_hw, regions, lesson)

    def loss(self, outputs: Outputs, targets: BoxTargets) -> dict[str, Tensor]:
        """`classifier`: cross-entropy in nats; `box_reg`: smooth L1 of the objects' corrections.

        Both are means over all regions drawn, the background too (Girshick 2015, section 2.3).

        Raises:
            ModelError: there were no targets.
        """
        if outputs.lesson is None:
            raise ModelError(WITHOUT_TARGETS)
        (_, logits, deltas), labels, wanted = outputs.lesson
        found = labels.nonzero()[:, 0]
        box_reg = smooth_l1(deltas[found, labels[found]], wanted[found], len(labels), self.BETA)
        # Sums: the mean over no region at all is not a number.
        classifier = F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
        return {"classifier": classifier, "box_reg": box_reg}

    def candidates(self, outputs: Outputs) -> list[Candidates]:
        """Every region, corrected for each class and cut off at the picture's edge; scored 0 if nothing is left of it.

        Raises:
            ModelError: the model was in training.
        """
        if outputs.regions is None:
            raise ModelError(IN_TRAINING)
        boxes, logits, deltas = outputs.regions
        moved = self.roi_heads.box_coder.decode(deltas.flatten(1), [*boxes]).reshape(deltas.shape)[:, 1:]
        counts = [len(one) for one in boxes]
        scores = logits.softmax(dim=1)[:, 1:]
        images = zip(torch.split(moved, counts), torch.split(scores, counts), outputs.sizes_hw, strict=True)
        return [inside(*image) for image in images]

    def _read(self, maps: dict[str, Tensor], padded_hw: tuple[int, int], boxes: Sequence[Tensor]) -> Regions:
        heads = self.roi_heads
        # torchvision takes the maps' scales from the size it is given, which must be that of the padded pictures.
        pooled = heads.box_roi_pool(maps, [*boxes], [padded_hw])
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return Regions(tuple(boxes), logits.float(), deltas.float().reshape(*logits.shape, 4))


class RegionPool(nn.Module):
    """Cells of one map, pooled for each region: RoIAlign, or the RoI pooling of Girshick 2015, 2.1.

    RoI pooling rounds to whole cells: from the one nearest to the region's first pixel to that of its last. Girshick's
    code takes cell i to lie on pixel s i in every network, which in VGG is half a cell beside.

    Args:
        kind: `align` (four samples for each pooled cell) or `max`.
        size: pooled cells a side.
        origin: where the first cell lies, see `origin`.
        stride: of the map.
    """

    def __init__(self, kind: Kind, size: int, origin: float, stride: int = 16) -> None:
        super().__init__()
        self.kind, self.size, self.origin, self.stride = kind, size, origin, stride

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes_hw: Any = None) -> Tensor:
        """Return float32 [R, channels, size, size] of the only map and boxes [r, 4] of each image."""
        (features,) = maps.values()
        pooled: Tensor
        if self.kind == "max":
            pixels = features.new_tensor([0.5, 0.5, -0.5, -0.5]) - self.origin
            pooled = ops.roi_pool(features, [box + pixels for box in boxes], self.size, 1 / self.stride)
        else:
            shift = self.stride / 2 - self.origin
            moved = [box + shift for box in boxes]
            pooled = ops.roi_align(features, moved, self.size, 1 / self.stride, 2, aligned=True)
        return pooled


def origin(name: SingleMap, stride: int) -> float:
    """Pixels from the picture's edge to the centre of the first cell."""
    return stride / 2 if name == "vgg16" else 0.5


def single_map(name: SingleMap, channels: int, stride: Stride = 16) -> tuple[nn.Module, int]:
    """A backbone up to its map of a stride, and that map's channels; it takes normalised pictures of `channels`."""
    (tap,) = (tap for tap in _backbones.TAPS[name] if tap.stride == stride)
    return _backbones.build(name, channels, (tap,)), tap.channels


def build_heads(
    config: RegionConfig, channels: int, pool: nn.Module, background_iou: float, kind: type[RoIHeads] = RoIHeads
) -> nn.Module:
    """Torchvision's second stage.

    The last layers begin as in Girshick 2015, section 2.3: with the standard deviations 0.01 for classes and 0.001 for
    boxes; corrections are divided by (0.1, 0.1, 0.2, 0.2), the standard deviations that they have in its code.

    Args:
        config: its sizes and shares.
        channels: of the map.
        pool: what is called as `MultiScaleRoIAlign`.
        background_iou: torchvision's `bg_iou_thresh`.
        kind: `RoIHeads` or one of its own.
    """
    head = TwoMLPHead(channels * config.pool_size**2, config.fc_features)
    predictor = FastRCNNPredictor(config.fc_features, 1 + config.num_classes)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    thresholds = config.foreground_iou, background_iou, config.rois_per_image, config.foreground_share
    select = config.select
    made: nn.Module = kind(
        *(pool, head, predictor, *thresholds, None),
        *(select.score_threshold, select.iou_threshold, select.max_detections),
    )
    return made


def maps_of(found: list[Tensor] | dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's maps by name, as torchvision's parts take them."""
    return found if isinstance(found, dict) else {str(number): one for number, one in enumerate(found)}


def objects_of(batch: Batch) -> list[dict[str, Tensor]] | None:
    """The boxes and labels (from 1) of each image as torchvision takes them; None where they are not known.

    Cut off at the picture's edge; what is then under `MIN_SIDE` is left out.
    """
    if not isinstance(batch.targets, BoxTargets):
        return None
    images = zip(batch.targets.per_image(), batch.sizes_hw, strict=True)
    return [_visible(*image, size_hw) for image, size_hw in images]


def check_proposals(batch: Batch, name: str) -> None:
    """Make sure that a batch brings regions for each image, to a model of this name.

    Raises:
        ModelError: it does not.
    """
    if len(batch.proposals) != len(batch):
        raise ModelError(
            f"{name} judges regions that it is given: expected proposals for {len(batch)} images, got those of "
            f"{len(batch.proposals)}; make them with the proposals job, or take faster_rcnn, which proposes itself"
        )


def inside(boxes: Tensor, scores: Tensor, size_hw: tuple[int, int]) -> Candidates:
    """Boxes [N, 4] or [N, C, 4] cut off at the picture's edge; scores [N, C] are 0 where nothing is left of the box."""
    boxes = ops.clip_boxes_to_image(boxes, size_hw)
    # Nothing suppresses boxes without area: they would take the places of others among the best.
    gone = (boxes[..., 2:] - boxes[..., :2] < MIN_ANSWER).any(dim=-1)
    return Candidates(boxes, scores.masked_fill(gone if gone.ndim == 2 else gone[:, None], 0))


def smooth_l1(given: Tensor, wanted: Tensor, count: int, beta: float) -> Tensor:
    """The sum over boxes [P, 4], divided by `count` things of which they are some; 0 where there is none."""
    return F.smooth_l1_loss(given, wanted, reduction="sum", beta=beta) / max(count, 1)


def _visible(boxes: Tensor, labels: Tensor, size_hw: tuple[int, int]) -> dict[str, Tensor]:
    boxes = ops.clip_boxes_to_image(boxes, size_hw)
    kept = ops.remove_small_boxes(boxes, MIN_SIDE)
    return {"boxes": boxes[kept], "labels": labels[kept] + 1}
