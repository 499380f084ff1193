"""The nouns that travel between stages, in NumPy only: records, samples, frames, predictions.

They know nothing but their shapes. Tensors live in `pipeline.batch`; conversions to file formats and JSON live where
they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image before it is read: where its bytes are and what they mean.

    Attributes:
        image_id: unique within the dataset, stable between runs, with `/` as separator.
        uri: local path of the encoded image.
        split: the part of the dataset it belongs to.
        label: index into the dataset's class names.
    """

    image_id: str
    uri: str
    split: Split
    label: int


@dataclass(frozen=True, slots=True)
class Frame:
    """How a model's input maps to the original image (upright, after EXIF orientation).

    A point `(x, y)` of the original lies at `(x * scale_xy[0] + offset_xy[0], y * scale_xy[1] + offset_xy[1])` of the
    input; both in continuous pixels, x to the right, y down, the origin at the outer corner of the first pixel.
    """

    original_hw: tuple[int, int]
    input_hw: tuple[int, int]
    scale_xy: tuple[float, float] = (1.0, 1.0)
    offset_xy: tuple[float, float] = (0.0, 0.0)

    def to_original(self, boxes_xyxy: Float32Array) -> Float32Array:
        """Map boxes [N, 4] from input pixels to original pixels, clipped to the original image."""
        scale = np.array(self.scale_xy * 2, np.float32)
        offset = np.array(self.offset_xy * 2, np.float32)
        height, width = self.original_hw
        limit = np.array([width, height, width, height], np.float32)
        clipped: Float32Array = np.clip((boxes_xyxy - offset) / scale, 0, limit).astype(np.float32)
        return clipped


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded, transformed example.

    Attributes:
        image: uint8 [C, H, W], RGB.
        label: class index, or None where the truth is unknown.
        frame: how the image maps to the original.
        image_id: the record's id.
    """

    image: UInt8Array
    frame: Frame
    label: int | None = None
    image_id: str = ""


@dataclass(frozen=True, slots=True)
class Classification:
    """A ranked answer about one image: `labels` int64 [K] and `scores` float32 [K] in [0, 1], best first."""

    labels: Int64Array
    scores: Float32Array

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        if self.labels.ndim != 1 or self.labels.shape != self.scores.shape:
            raise ValueError(
                f"expected labels and scores of one shape [K], got {self.labels.shape}, {self.scores.shape}"
            )


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a model expects of an image, stored with its weights.

    Evaluation resizes the image so that its short side is `resize_short` (None: stretches it to `size_hw`), then takes
    the centre crop `size_hw`. The model itself normalises: `(pixel / 255 - mean) / std` per channel.

    Attributes:
        size_hw: height and width of the input, in pixels.
        resize_short: short side before the centre crop, in pixels; None stretches to `size_hw`, ignoring aspect.
        mean: one value per channel of the network, on the scale 0..1; one value only makes the network grey.
        std: as `mean`.
        num_channels: channels of the images handed to the model (3: RGB).
    """

    size_hw: tuple[int, int]
    resize_short: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    num_channels: int = 3

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse a specification that no image can meet."""
        if min(self.size_hw) < 1:
            raise ValueError(f"size_hw must be positive, got {self.size_hw}")
        if self.resize_short is not None and self.resize_short < max(self.size_hw):
            raise ValueError(f"resize_short {self.resize_short} is smaller than the crop {self.size_hw}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, self.num_channels) or min(self.std) <= 0:
            raise ValueError(
                f"mean {self.mean} and std {self.std} need 1 or {self.num_channels} values each, every std positive"
            )
