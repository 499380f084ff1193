"""What every detector in the house promises, and how raw boxes become an answer: threshold, suppression, mapping back.

A detector differs from a classifier in what it is asked (`DetectorSpec`: pictures fitted whole, perhaps of several
sizes and then padded) and in what it answers (`Detections`). All else of the contract is the same: `forward(batch)`,
`loss(outputs, targets)`, `postprocess(outputs, frames)`. No second preprocessing happens here: transforms bring
pictures to size, `to_batch` pads them, and `Frame` alone maps boxes back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch, BoxTargets
from pipeline.config import Strict
from pipeline.errors import ConfigError, ModelError
from pipeline.models._contract import ModelConfig, Normalize
from pipeline.types import Detections, DetectorSpec, Frame, Task

MOST_CANDIDATES = 1000


class Selection(Strict):
    """Which of the boxes that a network proposes are its answer.

    Attributes:
        score_threshold: boxes of a lower score are dropped. For average precision it must be almost 0.
        iou_threshold: of two boxes of one class that overlap more, the one of the higher score stays.
        max_detections: of an image, the best.
        max_candidates: of an image, the best that suppression looks at, whose time grows with their square.
    """

    score_threshold: float = Field(default=0.001, ge=0, lt=1)
    iou_threshold: float = Field(default=0.5, gt=0, le=1)
    max_detections: int = Field(default=100, ge=1, le=MOST_CANDIDATES)
    max_candidates: int = Field(default=MOST_CANDIDATES, ge=1, le=MOST_CANDIDATES)


class DetectorConfig(ModelConfig):
    """Keys that every detector has.

    Attributes:
        select: what an answer is, unless the one who asks says otherwise.
    """

    task: ClassVar[Task] = "detection"

    num_classes: int = Field(default=20, ge=1)
    input: DetectorSpec = DetectorSpec()
    select: Selection = Selection()


class Candidates(NamedTuple):
    """The boxes that a network proposes for one image, before any is dropped.

    Attributes:
        boxes_xyxy: float32 [N, 4], or [N, num_classes, 4] where each class has its own; in pixels of the input.
        scores: float32 [N, num_classes], in [0, 1].
    """

    boxes_xyxy: Tensor
    scores: Tensor


class Detector(nn.Module, ABC):
    """A network that finds objects.

    Attributes:
        heads: paths of the layers whose size follows from the classes: what is new for other classes.
        backbone: the path of the part that a trained classifier's weights fit into, by their names there.
        spec: what it expects of an image.
        select: what its answer is made of.
        network: normalised float32 [B, C, H, W] -> whatever the model's `forward` makes outputs of.
    """

    heads: tuple[str, ...] = ()
    backbone: str = "network.backbone"

    def __init__(self, config: DetectorConfig, network: nn.Module) -> None:
        super().__init__()
        self.spec: DetectorSpec = config.input
        self.select = config.select
        self.normalize = Normalize(config.input)
        self.network = network

    def normalized(self, batch: Batch, multiple: int = 1) -> Tensor:
        """The pictures of a batch, normalised float32 [B, C, H, W], sides padded up to a multiple with the mean colour.

        Raises:
            ModelError: they have another number of channels than the specification names.
        """
        if batch.images.ndim != 4 or batch.images.shape[1] != self.spec.num_channels:
            raise ModelError(f"expected images [B, {self.spec.num_channels}, H, W], got {list(batch.images.shape)}")
        below, right = (-side % multiple for side in batch.images.shape[2:])
        return nn.functional.pad(self.normalize(batch.images), (0, right, 0, below))

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """What `loss` and `postprocess` take. Where the batch has targets, also what only the loss needs."""

    @abstractmethod
    def loss(self, outputs: Any, targets: BoxTargets) -> dict[str, Tensor]:
        """Named scalars that add up to the loss, each a mean over images or objects, as the model's paper has it."""

    @abstractmethod
    def candidates(self, outputs: Any) -> list[Candidates]:
        """What the network proposes for each image."""

    def postprocess(
        self, outputs: Any, frames: Sequence[Frame], select: Selection | Sequence[Selection] | None = None
    ) -> list[Detections]:
        """The objects of each image, best first, in pixels of the upright original.

        Args:
            outputs: of `forward`.
            frames: how each picture maps to its original.
            select: instead of the model's own, for all or for each.
        """
        each = [select or self.select] * len(frames) if isinstance(select, Selection | None) else select
        chosen = [choose(*one) for one in zip(self.candidates(outputs), each, strict=True)]
        return [_mapped_back(*found, frame) for found, frame in zip(chosen, frames, strict=True)]


def check_proposals(model: ModelConfig, given: str | None, address: str) -> None:
    """Make sure that a model which judges given regions is given some.

    Args:
        given: their name, or None.
        address: of the dataset.

    Raises:
        ConfigError: it is not.
    """
    if model.needs_proposals and given is None:
        raise ConfigError(
            f"proposals: {model.name} judges regions that it is given; make them with python -m jobs.propose "
            f"shards={address} name=..., and name them (in a recipe as loading.proposals)"
        )


def choose(found: Candidates, select: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [K, 4], labels [K] and scores [K] of one image that are left, best first."""
    from torchvision import ops  # noqa: PLC0415  (slow to import, and everything imports the contract)

    boxes, num_classes = found.boxes_xyxy.float(), found.scores.shape[1]
    # Nothing suppresses boxes without area: they would take the places of others.
    is_box = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    scores = torch.where(is_box if boxes.ndim == 3 else is_box[:, None], found.scores.float(), -1.0)
    above = (scores > select.score_threshold).flatten().nonzero()[:, 0]
    best, order = scores.flatten()[above].sort(descending=True, stable=True)
    best, places = best[: select.max_candidates], above[order[: select.max_candidates]]
    rows, labels = places // num_classes, places % num_classes
    boxes = boxes[rows] if boxes.ndim == 2 else boxes[rows, labels]
    kept = ops.batched_nms(boxes, best, labels, select.iou_threshold)[: select.max_detections]
    return boxes[kept], labels[kept], best[kept]


def _mapped_back(boxes: Tensor, labels: Tensor, scores: Tensor, frame: Frame) -> Detections:
    """In original pixels; what lies wholly in the padding around a picture is no detection."""
    original = frame.to_original(boxes.detach().cpu().numpy().astype(np.float32))
    visible = (original[:, 2:] > original[:, :2]).all(axis=1)
    return Detections(
        original[visible],
        labels.cpu().numpy().astype(np.int64)[visible],
        scores.detach().cpu().numpy().astype(np.float32)[visible].clip(0, 1),
    )
