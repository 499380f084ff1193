"""Whether two versions say the same of an image: how a challenger is compared with the version that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.schemas import Box, Refused, Told

MIN_IOU = 0.5


@dataclass(slots=True)
class Agreement:
    """How often a challenger says what one live version says.

    Attributes:
        compared: images that both were asked about.
        agreed: those of them that both said the same of.
    """

    compared: int = 0
    agreed: int = 0

    def note(self, one: Told | Refused, other: Told | Refused) -> None:
        """Count an image; what is no image to both tells nothing."""
        if isinstance(one, Told) or isinstance(other, Told):
            self.compared += 1
            self.agreed += agree(one, other)


def agree(one: Told | Refused, other: Told | Refused) -> bool:
    """Whether two answers about one image say the same.

    Of a classification the best class counts. Two detections agree where each object has a counterpart of its class
    that overlaps it by an IoU of at least 0.5, and there is no other object.
    """
    if isinstance(one, Refused) or isinstance(other, Refused):
        return False
    if one.boxes is None or other.boxes is None:
        return one.class_names[:1] == other.class_names[:1]
    left = list(zip(other.class_names, other.boxes, strict=True))
    for name, box in zip(one.class_names, one.boxes, strict=True):
        match = _closest(name, box, left)
        if match is None:
            return False
        left.remove(match)
    return not left


def _closest(name: str, box: Box, others: Sequence[tuple[str, Box]]) -> tuple[str, Box] | None:
    overlaps = [(iou(box, other[1]), other) for other in others if other[0] == name]
    overlap, closest = max(overlaps, key=lambda pair: pair[0], default=(0.0, None))
    return closest if overlap >= MIN_IOU else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes xyxy; 0 where neither has an area.

    There are a hundred at most (`gate.MOST_COMPARED`), and the ingress imports no array library for them.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0
