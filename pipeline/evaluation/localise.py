"""ILSVRC's error of single-object localisation as mergeable counts: is one of five guesses right in class and place.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015, section 4.2. Of an image, the error
is the smallest, over the five best guesses, of max(class is wrong, IoU with the true box is at most 0.5); where there
are several true boxes of the guessed class, any of them counts. The lower threshold that the challenge has for small
objects belongs to its detection task (section 4.3), not here. Beside it stands the classification error of the same
guesses (section 4.1), which boxes do not matter to: the difference is what was recognised but misplaced.

ILSVRC names one class for an image; where objects are of several classes, a right guess of any of them will do.
Crowds are no single objects: they are not judged, and neither are images without any other object. Difficult objects
count like all others. Boxes are in original pixels. For detectors of many objects see `detect`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import boxes
from pipeline.errors import DataError
from pipeline.types import Detections, Objects

GUESSES = 5
MOST_WRONG_IOU = 0.5


@dataclass(frozen=True)
class Counts:
    """What has been seen so far; counts only add up, so any number of workers comes to the same figures.

    Attributes:
        num_images: images with an object.
        misplaced: of these, images of which no guess has both class and place right.
        misnamed: of these, images of which no guess has the class right.
    """

    num_images: int = 0
    misplaced: int = 0
    misnamed: int = 0

    @classmethod
    def of(cls, found: Detections, objects: Objects) -> Counts:
        """Count one image; nothing where it has no object, or crowds only.

        Args:
            found: the guesses, best first; what comes after the fifth does not count.
            objects: the truth, in the same pixels.
        """
        single = ~objects.crowd
        if not single.any():
            return cls()
        named = found.labels[:GUESSES, None] == objects.labels[single]
        placed = boxes.iou(found.boxes_xyxy[:GUESSES], objects.boxes_xyxy[single]) > MOST_WRONG_IOU
        return cls(1, int(not (named & placed).any()), int(not named.any()))

    def __add__(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(
            self.num_images + other.num_images, self.misplaced + other.misplaced, self.misnamed + other.misnamed
        )

    def metrics(self) -> dict[str, float]:
        """The shares of images with objects that five guesses get wrong, in 0..1.

        `top5_localisation_error` asks for class and place, `top5_class_error` for the class alone.

        Raises:
            DataError: no image with an object has been counted.
        """
        if self.num_images == 0:
            raise DataError("expected at least one image with an object to be found, got none; check the split's boxes")
        return {
            f"top{GUESSES}_localisation_error": self.misplaced / self.num_images,
            f"top{GUESSES}_class_error": self.misnamed / self.num_images,
        }
