"""A localiser: one AlexNet says which one object a picture shows and where it is, before there were detectors of many.

It is what ILSVRC calls single-object localisation: five guesses, each a class and a box (`evaluation.localise` judges
them). The network is AlexNet's convolutions, two hidden full layers, and on these two heads side by side: class logits
and boxes. Counted for 20 classes at the default configuration:

- `regression: per_class`: a box for each class, of which only the true one's learns: 57,413,540 parameters.
- `regression: single`: one box, whatever the class: 57,102,168 parameters.

Sources: Sermanet et al., "OverFeat: Integrated Recognition, Localization and Detection using Convolutional Networks",
ICLR 2014, section 4; Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, appendix A. Krizhevsky, Sutskever and Hinton ("SuperVision") won this task of ILSVRC 2012 with AlexNet, but
their paper (NIPS 2012) does not describe how. Appendix A finds boxes for each class better than a single one, OverFeat
the contrary; the default follows appendix A.

Outputs are the logits float32 [B, C] and the boxes float32 [B, C or 1, 4]: (x of the centre, y of the centre, width,
height) as shares of the input, as in appendix A (OverFeat: the edges); both linear. Boxes learn by their squared
Euclidean distance to the truth, as in both papers.

What differs:

1. Class and box share all layers but the last and learn together. OverFeat trains boxes on top of a finished
   classifier's maps; appendix A trains a second network for boxes, begun with the classifier's weights. `box_weight` is
   therefore ours: distances of shares are far below 1, and 10 brings them to the size of the cross-entropy. It is
   chosen, not tuned.
2. One look at the whole picture. Both papers apply the network densely at several scales and merge the boxes found.
3. The whole picture is stretched to the input, so that no object is cut; appendix A takes centre crops to compare with.
4. The convolutions are padded (see `_backbones`) and their maps, 14x14 at 224 pixels, averaged to 6x6 (AlexNet: maxima
   of 3x3). A trained classifier's convolutions fit into `network.backbone`; the full layers are fresh.
5. The boxes' layer begins with weights N(0, 0.01) and biases 0.5: the middle of the picture, half of each side.
6. Of a picture with several objects the largest is learnt, of equal ones the first; where the data are of ILSVRC, all
   boxes of a picture are of one class. A picture without any object teaches nothing.

The papers' figures are left out, for they are those of other networks and of boxes merged over scales.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ModelError
from pipeline.models import _backbones
from pipeline.models._detector import Candidates, Detector, DetectorConfig, Selection
from pipeline.models._layers import full_layers
from pipeline.types import DetectorSpec, Fit

POOLED = 6  # cells along each side that the full layers see


class Config(DetectorConfig):
    """The localiser.

    Attributes:
        regression: whether each class has a box of its own, or all share one; see the module.
        fc_features: width of the two hidden full layers.
        dropout: share of units dropped in training, before each hidden full layer.
        box_weight: of the boxes' squared distance, beside the cross-entropy.
        input: of one size. Default: stretched to 224x224, ImageNet's mean and deviation. Maps of other sizes are
            averaged to the 6x6 cells that the full layers expect.
        select: five guesses, as in ILSVRC, however improbable.
    """

    name: Literal["alexnet_localizer"] = "alexnet_localizer"
    regression: Literal["per_class", "single"] = "per_class"
    fc_features: int = Field(default=4096, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    box_weight: float = Field(default=10.0, ge=0)
    input: DetectorSpec = DetectorSpec(fit=Fit(way="stretch", size_hw=(224, 224)))
    select: Selection = Selection(score_threshold=0.0, max_detections=5)

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.input.fit.way == "resize":
            raise ValueError(
                "alexnet_localizer gives boxes as shares of pictures of one size: set input.fit.way to stretch or "
                "letterbox, got resize"
            )
        return self

    @property
    def num_boxes(self) -> int:
        """Boxes that the network gives for a picture."""
        return self.num_classes if self.regression == "per_class" else 1


class Outputs(NamedTuple):
    """What the network says of B pictures.

    Attributes:
        logits: [B, C].
        boxes: [B, C or 1, 4], centre and size as shares of the input.
    """

    logits: Tensor
    boxes: Tensor


class Largest(NamedTuple):
    """The object that each of K pictures is about; pictures without any are left out.

    Attributes:
        images: int64 [K], places in the batch, ascending.
        boxes: float32 [K, 4], as the network gives them.
        labels: int64 [K].
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor


class Network(nn.Module):
    """The network proper: normalised float32 [B, C, H, W] -> `Outputs`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.fc_features
        self.backbone = _backbones.build("alexnet", len(config.input.mean))
        self.pool = nn.AdaptiveAvgPool2d(POOLED)
        self.full = full_layers(self.backbone.taps[-1].channels * POOLED**2, width, config.dropout)
        self.classes = nn.Linear(width, config.num_classes)
        self.boxes = nn.Linear(width, config.num_boxes * 4)
        nn.init.normal_(self.boxes.weight, std=0.01)
        nn.init.constant_(self.boxes.bias, 0.5)

    def forward(self, images: Tensor) -> Outputs:
        """Return logits and boxes."""
        features = self.full(self.pool(self.backbone(images)[-1]).flatten(1))
        return Outputs(self.classes(features), self.boxes(features).unflatten(1, (-1, 4)))


class AlexNetLocalizer(Detector):
    """The localiser: a classifier that also says where."""

    def __init__(self, config: Config, network: Network) -> None:
        super().__init__(config, network)
        self.box_weight = config.box_weight
        self.per_class = config.regression == "per_class"
        self.heads = ("network.classes", "network.boxes") if self.per_class else ("network.classes",)

    def forward(self, batch: Batch) -> Outputs:
        """Return logits [B, C] and boxes [B, C or 1, 4], see the module.

        Raises:
            ModelError: the images are not of the size and channels that the specification names.
        """
        expected = (self.spec.num_channels, *self.spec.fit.size_hw)
        if tuple(batch.images.shape[1:]) != expected:
            raise ModelError(f"expected images [B, {', '.join(map(str, expected))}], got {list(batch.images.shape)}")
        return cast(Outputs, self.network(self.normalized(batch)))

    def loss(self, outputs: Outputs, targets: BoxTargets) -> dict[str, Tensor]:
        """Mean over the pictures that have an object, 0 where none has; of several objects the largest is meant.

        `class` is the cross-entropy in nats; `box` the squared Euclidean distance (OverFeat 4.2, appendix A.1) of the
        true class's box in shares of the input, times `box_weight`.
        """
        truth = self._largest(targets)
        columns = truth.labels if self.per_class else torch.zeros_like(truth.labels)
        logits, mine = outputs.logits.float()[truth.images], outputs.boxes.float()[truth.images, columns]
        sums = {
            "class": F.cross_entropy(logits, truth.labels, reduction="sum"),
            "box": self.box_weight * (mine - truth.boxes).square().sum(),
        }
        return {name: value / max(len(truth.images), 1) for name, value in sums.items()}

    def candidates(self, outputs: Outputs) -> list[Candidates]:
        """One guess for each class: boxes [1, C, 4], clipped to the input, and the classes' probabilities [1, C].

        A box keeps at least a pixel within the input, whatever the network says: a guess that is nowhere would be no
        guess, and its class may still be right.
        """
        scores = outputs.logits.float().softmax(dim=1)
        centres, sides = outputs.boxes.float().expand(-1, scores.shape[1], -1).tensor_split(2, dim=-1)
        size = centres.new_tensor(self._size_wh())
        lower, upper = (centres + sign * sides.clamp(min=0) / 2 for sign in (-1, 1))
        lower = torch.minimum((lower * size).clamp(min=0), size - 1)
        upper = torch.maximum(torch.minimum(upper * size, size), lower + 1)
        boxes = torch.cat([lower, upper], dim=-1)
        return [Candidates(*pair) for pair in zip(boxes[:, None], scores[:, None], strict=True)]

    def _largest(self, targets: BoxTargets) -> Largest:
        lower, upper = targets.boxes_xyxy.float().tensor_split(2, dim=1)
        sides = (upper - lower).clamp(min=0)
        order = sides.prod(dim=1).argsort(descending=True, stable=True)
        order = order[targets.of_image[order].argsort(stable=True)]
        images = targets.of_image[order]
        first = torch.ones_like(images, dtype=torch.bool)
        first[1:] = images[1:] != images[:-1]
        size = sides.new_tensor(self._size_wh())
        boxes = torch.cat([(lower + upper) / 2 / size, sides / size], dim=1)
        chosen = order[first]
        return Largest(images[first], boxes[chosen], targets.labels[chosen])

    def _size_wh(self) -> tuple[int, int]:
        height, width = self.spec.fit.size_hw
        return width, height


def build(config: Config) -> AlexNetLocalizer:
    """A freshly initialised localiser."""
    return AlexNetLocalizer(config, Network(config))
