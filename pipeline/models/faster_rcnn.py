"""Faster R-CNN: a small network proposes regions from the same maps that the head then judges them by.

Ren, He, Girshick, Sun, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NIPS 2015;
sections are those of its third version, arXiv:1506.01497v3.

Made of torchvision's parts: the network's sub-modules are `backbone`, `rpn` and `roi_heads`, and the weights of
torchvision's detectors fit into the two with pyramids. Counted for 20 classes at the default configuration:

- `vgg16` (the paper's; the default): 43,945,942 parameters.
- `alexnet`: 17,074,646; `squeezenet1_0`: 29,966,678; `squeezenet1_1`: 29,953,750. The paper's small net is ZF.
- `resnet50_fpn`: 41,449,656; feature pyramid of five maps (Lin et al., CVPR 2017), as `fasterrcnn_resnet50_fpn`.
- `mobilenet_v3_320`: 19,052,004; as `fasterrcnn_mobilenet_v3_large_320_fpn`, for pictures of 320 pixels.

The first four have the paper's settings: short side 600, long side at most 1000, 9 anchors (3.1.1), 256 anchors drawn
of an image, half of them objects at most (3.1.3), 2000 regions in training and 300 in testing (3.3 and its code's
12000 and 6000 before suppression). The last two have torchvision's. Every key can be set for any of them.

What differs from the paper:

1. Trained jointly by one loss of four terms (3.2, "approximate joint training"; its tables are of alternating
   training). The terms are torchvision's: each a mean over what was drawn, smooth L1 of beta 1/9, lambda 1 in place of
   10 / 2400 anchors (3.1.2).
2. Anchors that reach over the picture's edge are used in training too; the paper leaves them out (3.3). Proposals of
   any size are kept; its code drops those under 16 pixels.
3. Regions are pooled by RoIAlign. Anchors are centred on the cells of the map and regions pooled from where they lie
   (`_regions`); with a pyramid both are torchvision's, half a pixel beside, which its weights are trained for.
4. The full layers are fresh, 1024 wide and without dropout, as torchvision's; the paper's are the classifier's own.
5. Answers are suppressed from an overlap of 0.5 on (torchvision); the paper's code: 0.3.
6. RGB normalised by ImageNet's mean and std; the paper: BGR, mean subtracted.

With pyramids and few images on a device, freeze the normalisations, as torchvision does (`start.freeze.names`):
`network.backbone.body.*bn*` and `*.downsample.1.*` for `resnet50_fpn`, `network.backbone.body.*.1.weight` and
`network.backbone.body.*.1.bias` for `mobilenet_v3_320`. Torchvision runs the COCO weights of ResNet-50 with an epsilon
of 0 in them; here it is 1e-5.

The paper's mAP on VOC 2007 test with VGG16, trained on VOC 2007 and 2012: 73.2 (its own, not ours). Torchvision's
weights have a box mAP of 37.0 and 22.8 % on COCO val2017 (`resnet50_fpn`, `mobilenet_v3_320`; theirs, not ours).
"""

from __future__ import annotations

from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from pipeline.batch import Batch, BoxTargets
from pipeline.models import _regions
from pipeline.models._layers import take_channels
from pipeline.models._regions import AnchorLesson, Outputs, RegionConfig, RegionDetector
from pipeline.types import DetectorSpec, Fit

Pyramid = Literal["resnet50_fpn", "mobilenet_v3_320"]

BETA, SAMPLES = 1 / 9, 2
PYRAMID_MULTIPLE = 32
NUM_MAPS: dict[str, int] = {"resnet50_fpn": 5, "mobilenet_v3_320": 3}
PYRAMID_DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet50_fpn": {
        "anchor_sizes": ((32,), (64,), (128,), (256,), (512,)),
        "pre_nms_test": 1000,
        "post_nms_test": 1000,
        "input": DetectorSpec(fit=Fit(way="resize", short_side=800, long_side=1333)),
    },
    "mobilenet_v3_320": {
        "anchor_sizes": ((32, 64, 128, 256, 512),) * 3,
        "pre_nms_test": 150,
        "post_nms_test": 150,
        "proposal_score": 0.05,
        "input": DetectorSpec(fit=Fit(way="resize", short_side=320, long_side=640)),
    },
}
"""Where torchvision's settings of its two detectors differ from the paper's, beside those that they share."""
SHARED_DEFAULTS = {"pre_nms_train": 2000, "rois_per_image": 512}


class Config(RegionConfig):
    """Faster R-CNN. Defaults are the paper's; in parentheses torchvision's, which the two pyramids have.

    Attributes:
        backbone: a classifier's layers up to its map of `stride`, or a pyramid of maps.
        anchor_sizes: for each map, square roots of the anchors' areas in pixels (32 to 512, see `PYRAMID_DEFAULTS`).
        anchor_ratios: height by width.
        anchors_per_image: drawn to learn from, half of them objects at most.
        pre_nms_train, post_nms_train: proposals of each map before suppression and of an image after it, in training:
            12000 and 2000 (2000 and 2000).
        pre_nms_test, post_nms_test: otherwise: 6000 and 300 (1000 and 1000; `mobilenet_v3_320`: 150 and 150).
        proposal_iou: of two proposals that overlap more, the one of the higher objectness stays.
        proposal_score: proposals of a lower objectness are dropped (`mobilenet_v3_320`: 0.05).
        rois_per_image: 128 as in the paper's code (512).
        input: short side 600, long side at most 1000 (800 and 1333; `mobilenet_v3_320`: 320 and 640).
    """

    name: Literal["faster_rcnn"] = "faster_rcnn"
    backbone: _regions.SingleMap | Pyramid = "vgg16"
    anchor_sizes: tuple[tuple[PositiveInt, ...], ...] = ((128, 256, 512),)
    anchor_ratios: tuple[PositiveFloat, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    anchors_per_image: int = Field(default=256, ge=2)
    pre_nms_train: int = Field(default=12000, ge=1)
    post_nms_train: int = Field(default=2000, ge=1)
    pre_nms_test: int = Field(default=6000, ge=1)
    post_nms_test: int = Field(default=300, ge=1)
    proposal_iou: float = Field(default=0.7, gt=0, le=1)
    proposal_score: float = Field(default=0.0, ge=0, lt=1)
    input: DetectorSpec = DetectorSpec(fit=Fit(way="resize", short_side=600, long_side=1000))

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        if self.backbone in PYRAMID_DEFAULTS:
            self.fill(**SHARED_DEFAULTS, **PYRAMID_DEFAULTS[self.backbone])
            if self.stride != 16:
                raise ValueError(f"stride: backbone '{self.backbone}' has maps of several; leave it out")
        num_maps, counts = NUM_MAPS.get(self.backbone, 1), [len(sizes) for sizes in self.anchor_sizes]
        if len(counts) != num_maps or min(counts) < 1 or len({*counts}) > 1:
            raise ValueError(
                f"backbone '{self.backbone}' has {num_maps} maps and needs as many lists of anchor_sizes, all of one "
                f"length, got {[list(sizes) for sizes in self.anchor_sizes]}"
            )
        return self


class Network(nn.Module):
    """The parts under torchvision's names."""

    def __init__(self, backbone: nn.Module, rpn: Any, roi_heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        """Of normalised [B, C, H, W] the maps, and of each objectness [B, A, h, w] and corrections [B, 4 A, h, w]."""
        maps = _regions.maps_of(self.backbone(images))
        return maps, *self.rpn.head([*maps.values()])


class FasterRCNN(RegionDetector):
    """Faster R-CNN."""

    BETA = BETA
    network: Network

    def __init__(self, config: Config, network: Network) -> None:
        super().__init__(config, network)
        pyramid = config.backbone in NUM_MAPS
        self.multiple = PYRAMID_MULTIPLE if pyramid else config.stride
        self.origin = 0.0 if pyramid else _regions.origin(cast(_regions.SingleMap, config.backbone), config.stride)
        if pyramid:
            self.backbone = "network.backbone.body"

    def forward(self, batch: Batch) -> Outputs:
        """What the head says of the proposed regions, and of some that are drawn where the targets are boxes.

        Raises:
            ModelError: images have other channels than specified.
        """
        images = ImageList(self.normalized(batch, self.multiple), batch.sizes_hw)
        maps, scores, deltas = self.network(images.tensors)
        # From here on it is geometry, for which 16 bits do not do: torchvision would make anchors in the maps' type.
        maps = {name: one.float() for name, one in maps.items()}
        scores, deltas = [one.float() for one in scores], [one.float() for one in deltas]
        anchors = [one + self.origin for one in self.network.rpn.anchor_generator(images, [*maps.values()])]
        objectness, moves = concat_box_prediction_layers(scores, deltas)
        proposals = self._proposals(anchors, objectness, moves, images, [one[0].numel() for one in scores])
        objects = _regions.objects_of(batch)
        lesson = None if objects is None else self._drawn(anchors, objectness, moves, objects)
        padded_hw = images.tensors.shape[2], images.tensors.shape[3]
        return self.judged(maps, padded_hw, proposals, objects, batch.sizes_hw)._replace(anchors=lesson)

    def loss(self, outputs: Outputs, targets: BoxTargets) -> dict[str, Tensor]:
        """`objectness` and `rpn_box` of the anchors drawn, `classifier` and `box_reg` of the regions drawn.

        Each is a mean over all that were drawn of its kind, the background too.

        Raises:
            ModelError: there were no targets.
        """
        second = super().loss(outputs, targets)
        assert outputs.anchors is not None
        objectness, labels, deltas, wanted = outputs.anchors
        return {
            "objectness": F.binary_cross_entropy_with_logits(objectness, labels),
            "rpn_box": _regions.smooth_l1(deltas, wanted, len(labels), BETA),
            **second,
        }

    def _proposals(
        self, anchors: list[Tensor], objectness: Tensor, moves: Tensor, images: ImageList, per_map: list[int]
    ) -> list[Tensor]:
        """Of each image the best regions [P, 4]; no gradient flows through them."""
        rpn = self.network.rpn
        moved = rpn.box_coder.decode(moves.detach(), anchors).view(len(anchors), -1, 4)
        boxes, _ = rpn.filter_proposals(moved, objectness, images.image_sizes, per_map)
        return cast(list[Tensor], boxes)

    def _drawn(
        self, anchors: list[Tensor], objectness: Tensor, moves: Tensor, objects: list[dict[str, Tensor]]
    ) -> AnchorLesson:
        rpn = self.network.rpn
        labels, matched = rpn.assign_targets_to_anchors(anchors, objects)
        positive, negative = (torch.cat(drawn).bool() for drawn in rpn.fg_bg_sampler(labels))
        either = positive | negative
        wanted = torch.cat(rpn.box_coder.encode(matched, anchors))
        return AnchorLesson(objectness.flatten()[either], torch.cat(labels)[either], moves[positive], wanted[positive])


def build(config: Config) -> FasterRCNN:
    """A freshly initialised Faster R-CNN."""
    backbone, channels, pool = _first_stage(config)
    heads = _regions.build_heads(config, channels, pool, config.foreground_iou)
    return FasterRCNN(config, Network(backbone, _proposal_network(config, channels), heads))


def _first_stage(config: Config) -> tuple[nn.Module, int, nn.Module]:
    """The backbone, the channels of its maps, and what pools regions from them."""
    colours = len(config.input.mean)
    if config.backbone in NUM_MAPS:
        pyramid = _pyramid(cast(Pyramid, config.backbone), colours)
        return pyramid, pyramid.out_channels, MultiScaleRoIAlign(["0", "1", "2", "3"], config.pool_size, SAMPLES)
    name = cast(_regions.SingleMap, config.backbone)
    backbone, channels = _regions.single_map(name, colours, config.stride)
    origin = _regions.origin(name, config.stride)
    return backbone, channels, _regions.RegionPool("align", config.pool_size, origin, config.stride)


def _pyramid(name: Pyramid, colours: int) -> Any:
    """Torchvision's pyramid with nothing frozen."""
    if name == "resnet50_fpn":
        made = resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        take_channels(made.body, "conv1", colours)
    else:
        made = mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=nn.BatchNorm2d, trainable_layers=6
        )
        take_channels(made.body, "0.0", colours)
    return made


def _proposal_network(config: Config, channels: int) -> nn.Module:
    generator = AnchorGenerator(config.anchor_sizes, (config.anchor_ratios,) * len(config.anchor_sizes))
    return cast(
        nn.Module,
        RegionProposalNetwork(
            generator,
            RPNHead(channels, generator.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=config.anchors_per_image,
            positive_fraction=0.5,
            pre_nms_top_n={"training": config.pre_nms_train, "testing": config.pre_nms_test},
            post_nms_top_n={"training": config.post_nms_train, "testing": config.post_nms_test},
            nms_thresh=config.proposal_iou,
            score_thresh=config.proposal_score,
        ),
    )
