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
BoolArray = npt.NDArray[np.bool_]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Task = Literal["classification", "detection"]

Views = Literal["centre", "flip", "ten_crop"]
"""What a classifier is shown of one image, its scores averaged: the centre crop, that and its mirror image, or ten."""


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A binary mask as lengths of runs of 0 and 1 in turn, down the columns, 0 first (COCO's uncompressed RLE).

    Attributes:
        size_hw: height and width of the mask.
        counts: the lengths; they add up to height x width.
    """

    size_hw: tuple[int, int]
    counts: tuple[int, ...]


Polygons = tuple[tuple[float, ...], ...]
"""Outlines of one object, each `(x0, y0, x1, y1, ...)` in continuous pixels."""
Region = Polygons | RunLengths


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """The labelled boxes of one image, N of them.

    Attributes:
        boxes_xyxy: float32 [N, 4], half-open, in pixels of the upright original image, or of `frame_hw`.
        labels: int64 [N], indices into the dataset's class names.
        difficult: bool [N]: too hard to count for or against a detector (Pascal VOC).
        truncated: bool [N]: reaches beyond the image.
        crowd: bool [N]: a group of objects under one box (COCO).
        regions: the outline of each object, or nothing.
        frame_hw: height and width of the picture that the boxes were measured in, where that may not be the image:
            ingest scales them to the image. (1, 1) where they are shares of height and width.
    """

    boxes_xyxy: Float32Array
    labels: Int64Array
    difficult: BoolArray
    truncated: BoolArray
    crowd: BoolArray
    regions: tuple[Region, ...] = ()
    frame_hw: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        num = len(self.labels)
        flags = (self.difficult, self.truncated, self.crowd)
        if self.boxes_xyxy.shape != (num, 4) or any(flag.shape != (num,) for flag in flags):
            raise ValueError(f"expected boxes [N, 4] and N labels and flags, got {self.boxes_xyxy.shape} and {num}")
        if len(self.regions) not in (0, num):
            raise ValueError(f"expected a region for each of {num} objects or none, got {len(self.regions)}")

    def __eq__(self, other: object) -> bool:
        """Compare arrays by their values."""
        if not isinstance(other, Objects):
            return NotImplemented
        pairs = ((getattr(self, name), getattr(other, name)) for name in _OBJECT_ARRAYS)
        same = all(np.array_equal(mine, theirs) for mine, theirs in pairs)
        return same and (self.regions, self.frame_hw) == (other.regions, other.frame_hw)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.labels)


_OBJECT_ARRAYS = ("boxes_xyxy", "labels", "difficult", "truncated", "crowd")


def no_objects() -> Objects:
    """The objects of a picture without any."""
    none = np.zeros(0, np.bool_)
    return Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), none, none, none)


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image before it is read: where its bytes are and what they mean.

    Attributes:
        image_id: unique within the dataset, stable between runs, with `/` as separator.
        uri: where the encoded image lies: a local path or a URL (`pipeline.storage`).
        split: the part of the dataset it belongs to.
        label: index into the dataset's class names; None where the image as a whole has no class.
        byte_range: (offset, length) of the image in the file at `uri`, where that holds more (a tar).
        objects: what is in the image and where; None where that was not annotated.
        mask_uri: where its mask lies, a PNG of class indices: 0 is background, 1 + label a class, 255 not to be judged.
        size_bytes: of the encoded image as it was listed; 0 where the listing does not tell.
        mask_bytes: of the mask, likewise.
    """

    image_id: str
    uri: str
    split: Split
    label: int | None = None
    byte_range: tuple[int, int] | None = None
    objects: Objects | None = None
    mask_uri: str | None = None
    size_bytes: int = 0
    mask_bytes: int = 0


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

    def to_input(self, boxes_xyxy: Float32Array) -> Float32Array:
        """Map boxes [N, 4] from original pixels to input pixels; nothing is clipped."""
        scale, offset = np.array(self.scale_xy * 2, np.float32), np.array(self.offset_xy * 2, np.float32)
        moved: Float32Array = boxes_xyxy * scale + offset
        return moved

    def to_original(self, boxes_xyxy: Float32Array) -> Float32Array:
        """Map boxes [N, 4] from input pixels to original pixels, clipped to the original image."""
        scale = np.array(self.scale_xy * 2, np.float32)
        offset = np.array(self.offset_xy * 2, np.float32)
        height, width = self.original_hw
        limit = np.array([width, height, width, height], np.float32)
        clipped: Float32Array = np.clip((boxes_xyxy - offset) / scale, 0, limit).astype(np.float32)
        return clipped


@dataclass(frozen=True, slots=True)
class Fit:
    """How a whole picture is brought to the size a detector takes.

    Attributes:
        way: `letterbox`: as large as fits into `size_hw` in its own aspect, in the centre, grey around it; `resize`: in
            its own aspect, short side to `short_side` unless the long one would exceed `long_side`, without padding
            (Ren et al. 2015, "Faster R-CNN", section 3.3); `stretch`: to `size_hw`, ignoring its aspect (Redmon et al.
            2016, "You Only Look Once", section 2).
        size_hw: for `letterbox` and `stretch`, in pixels.
        short_side, long_side: for `resize`, in pixels.
    """

    way: Literal["letterbox", "resize", "stretch"] = "letterbox"
    size_hw: tuple[int, int] = (416, 416)
    short_side: int = 600
    long_side: int = 1000

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse what no picture can be brought to."""
        if min(*self.size_hw, self.short_side) < 1:
            raise ValueError(f"size_hw and short_side must be positive, got {self.size_hw} and {self.short_side}")
        if self.way not in ("letterbox", "resize", "stretch"):
            raise ValueError(f"expected a way of letterbox, resize or stretch, got '{self.way}'")
        if self.long_side < self.short_side:
            raise ValueError(f"long_side {self.long_side} is smaller than short_side {self.short_side}")

    @property
    def largest_hw(self) -> tuple[int, int]:
        """What a picture comes to at most, lying."""
        return (self.short_side, self.long_side) if self.way == "resize" else self.size_hw

    def frame(self, original_hw: tuple[int, int]) -> Frame:
        """How a picture of this size maps to the input: its scale per axis is exact, whole pixels to whole pixels."""
        height, width = original_hw
        if self.way == "stretch":
            return _centred(original_hw, self.size_hw, self.size_hw)
        if self.way == "resize":
            factor = min(self.short_side / min(original_hw), self.long_side / max(original_hw))
        else:
            factor = min(self.size_hw[0] / height, self.size_hw[1] / width)
        inner_hw = max(round(height * factor), 1), max(round(width * factor), 1)
        return _centred(original_hw, inner_hw, inner_hw if self.way == "resize" else self.size_hw)


def _centred(original_hw: tuple[int, int], inner_hw: tuple[int, int], input_hw: tuple[int, int]) -> Frame:
    """The frame of a picture that is scaled to `inner_hw` and laid into the centre of `input_hw`."""
    scale_xy = (inner_hw[1] / original_hw[1], inner_hw[0] / original_hw[0])
    offset_xy = (float((input_hw[1] - inner_hw[1]) // 2), float((input_hw[0] - inner_hw[0]) // 2))
    return Frame(original_hw, input_hw, scale_xy, offset_xy)


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded, transformed example.

    Attributes:
        image: uint8 [C, H, W], RGB.
        label: class index, or None where the truth is unknown.
        frame: how the image maps to the original.
        image_id: the record's id.
        objects: what is in the picture, in original pixels; None where that is not known.
        proposals: float32 [P, 4], regions that may hold an object, in pixels of `image`; None where none were made.
    """

    image: UInt8Array
    frame: Frame
    label: int | None = None
    image_id: str = ""
    objects: Objects | None = None
    proposals: Float32Array | None = None


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


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What a detector found in one image, best first.

    Attributes:
        boxes_xyxy: float32 [N, 4], half-open, in pixels of the upright original image.
        labels: int64 [N], indices into the model's class names.
        scores: float32 [N] in [0, 1].
    """

    boxes_xyxy: Float32Array
    labels: Int64Array
    scores: Float32Array

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        num = len(self.labels)
        if self.boxes_xyxy.shape != (num, 4) or self.scores.shape != (num,):
            raise ValueError(
                f"expected boxes [N, 4], labels [N] and scores [N], got {self.boxes_xyxy.shape}, {self.labels.shape}, "
                f"{self.scores.shape}"
            )

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.labels)

    def best(self, score_threshold: float, most: int | None = None) -> Detections:
        """Those of at least a score, and of them at most so many; none that is left depends on what goes."""
        kept = np.flatnonzero(self.scores >= score_threshold)[:most]
        return Detections(self.boxes_xyxy[kept], self.labels[kept], self.scores[kept])


Answer = Classification | Detections
"""What a model says of one image."""


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

    @property
    def largest_hw(self) -> tuple[int, int]:
        """What every picture comes to."""
        return self.size_hw

    def __post_init__(self) -> None:
        """Refuse a specification that no image can meet."""
        if min(self.size_hw) < 1:
            raise ValueError(f"size_hw must be positive, got {self.size_hw}")
        if self.resize_short is not None and self.resize_short < max(self.size_hw):
            raise ValueError(f"resize_short {self.resize_short} is smaller than the crop {self.size_hw}")
        _check_norm(self.mean, self.std, self.num_channels)


@dataclass(frozen=True, slots=True)
class DetectorSpec:
    """What a detector expects of an image, stored with its weights; the model itself normalises, as for `InputSpec`.

    Attributes:
        fit: how the picture is brought to size; the same in training, evaluation and service.
        mean: one value per channel, on the scale 0..1.
        std: as `mean`.
        num_channels: channels of the images handed to the model (3: RGB).
    """

    fit: Fit = Fit()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    num_channels: int = 3

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    @property
    def largest_hw(self) -> tuple[int, int]:
        """What a picture comes to at most, lying."""
        return self.fit.largest_hw

    def __post_init__(self) -> None:
        """Refuse what no image can be normalised by."""
        _check_norm(self.mean, self.std, self.num_channels)


Spec = InputSpec | DetectorSpec
"""What a model expects of an image, by what it is asked: the whole picture's class, or what is where in it."""


def _check_norm(mean: tuple[float, ...], std: tuple[float, ...], num_channels: int) -> None:
    if len(mean) != len(std) or len(mean) not in (1, num_channels) or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std} need 1 or {num_channels} values each, every std positive")
