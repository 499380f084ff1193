"""Pictures with their boxes and masks, and what can be done to all three at once: flip, crop, IoU crop, mosaic.

Regions that were proposed move as the boxes of objects do, but none is lost because little of it is in view.

The operations make scenes of scenes, always in the pixels of the picture at hand; which of them happen, and how the
last scene becomes a model's input, is `transforms.detect`'s. Outlines of objects (`Objects.regions`) are left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pipeline import boxes
from pipeline.data.transforms.resizing import resize, resize_mask
from pipeline.types import BoolArray, Float32Array, Objects, UInt8Array

GREY = 114  # around a picture, as YOLO and its successors pad
UNJUDGED = 255  # the mask's class of pixels that were never in a picture
Window = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, half-open; may reach beyond the picture."""
NO_REGIONS = np.zeros((0, 4), np.float32)

# SSD (Liu et al. 2016, section 2.2): the least overlap with an object; None keeps the whole picture.
_LEAST_IOU = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
_IOU_TRIALS = 40
_IOU_SIDES = (0.3, 1.0)  # of the window, as shares of the picture's: the SSD authors' program, their text has 0.1
_MOSAIC_CENTRE = (0.25, 0.75)
_MOSAIC_SCALE = (0.5, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A decoded picture and what is marked in it.

    Attributes:
        image: uint8 [H, W, C].
        objects: their boxes in pixels of `image`.
        mask: uint8 [H, W] of class indices, 255 not to be judged; None where there is none.
        proposals: float32 [P, 4], regions that may hold an object, in pixels of `image`.
    """

    image: UInt8Array
    objects: Objects
    mask: UInt8Array | None = None
    proposals: Float32Array = field(default_factory=NO_REGIONS.copy)

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        check_marks(self.objects, self.mask, self.size_hw)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]


def check_marks(objects: Objects, mask: UInt8Array | None, size_hw: tuple[int, int]) -> None:
    """Refuse boxes and masks that are not in the pixels of a picture of `size_hw`."""
    if objects.frame_hw not in (None, size_hw):
        raise ValueError(f"expected boxes in pixels of an image of {size_hw}, got them in {objects.frame_hw}")
    if mask is not None and mask.shape != size_hw:
        raise ValueError(f"expected a mask of the image's size {size_hw}, got {mask.shape}")


def flip(scene: Scene) -> Scene:
    """Mirror left-right."""
    mirrored, proposals = (_mirrored(old, scene.size_hw[1]) for old in (scene.objects.boxes_xyxy, scene.proposals))
    mask = None if scene.mask is None else scene.mask[:, ::-1]
    objects = replace(scene.objects, boxes_xyxy=mirrored, regions=(), frame_hw=None)
    return Scene(scene.image[:, ::-1], objects, mask, proposals)


def crop(scene: Scene, window: Window, min_visible: float = 0.0) -> Scene:
    """Cut a window out; where it reaches beyond the picture it is grey, and not to be judged.

    Boxes are clipped to it and count as truncated then; those with less than `min_visible` of their area left go.
    """
    left, top, right, bottom = window
    within = overlap((-left, -top), scene.size_hw, (bottom - top, right - left))
    objects = move(scene.objects, (1.0, 1.0), (-left, -top), within, min_visible)
    proposals = move_regions(scene.proposals, (1.0, 1.0), (-left, -top), within)
    mask = None if scene.mask is None else _cut(scene.mask, window, UNJUDGED)
    return Scene(_cut(scene.image, window, GREY), objects, mask, proposals)


def iou_crop(scene: Scene, rng: np.random.Generator, min_visible: float = 0.0) -> Scene:
    """Cut a window that overlaps some object by a drawn least IoU (Liu et al. 2016, "SSD", section 2.2).

    Objects stay whose centre lies in the window. The picture itself comes back where it has no objects, where keeping
    it whole is drawn (one in seven), and where none of 40 windows will do.
    """
    least = _LEAST_IOU[int(rng.integers(len(_LEAST_IOU)))]
    if least is None or len(scene.objects) == 0:
        return scene
    (height, width), old = scene.size_hw, scene.objects.boxes_xyxy
    sides = np.maximum((rng.uniform(*_IOU_SIDES, (_IOU_TRIALS, 2)) * (width, height)).astype(np.int64), 1)
    starts = (rng.random((_IOU_TRIALS, 2)) * (np.array([width, height]) - sides + 1)).astype(np.int64)
    windows = np.concatenate([starts, starts + sides], axis=1)
    centres = (old[:, :2] + old[:, 2:]) / 2
    inside: BoolArray = np.all((windows[:, None, :2] < centres) & (centres < windows[:, None, 2:]), axis=2)
    aspect_ok = (sides[:, 0] <= 2 * sides[:, 1]) & (sides[:, 1] <= 2 * sides[:, 0])
    overlaps = np.where(inside, boxes.iou(windows, old), -1).max(axis=1)
    good = np.flatnonzero(aspect_ok & (overlaps >= least))
    if len(good) == 0:
        return scene
    left, top, right, bottom = (int(edge) for edge in windows[good[0]])
    kept = replace(scene, objects=_select(scene.objects, inside[good[0]]))
    return crop(kept, (left, top, right, bottom), min_visible)


def mosaic(
    scenes: Sequence[Scene], size_hw: tuple[int, int], rng: np.random.Generator, min_visible: float = 0.0
) -> Scene:
    """Four pictures around a random point of one (Bochkovskiy et al. 2020, "YOLOv4", section 3.3).

    Each is scaled, in its own aspect, to between half of `size_hw` and the whole, and laid with its inner corner at the
    point: top left, top right, bottom left, bottom right; what reaches beyond is cut, what stays free is grey. The
    result has a mask if all four have one. Proposals are not joined: scenes that have some are refused.
    """
    if len(scenes) != 4:
        raise ValueError(f"expected 4 scenes for a mosaic, got {len(scenes)}")
    if any(len(scene.proposals) for scene in scenes):
        raise ValueError("expected scenes without proposals for a mosaic, got some with")
    height, width = size_hw
    y, x = round(height * rng.uniform(*_MOSAIC_CENTRE)), round(width * rng.uniform(*_MOSAIC_CENTRE))
    image = np.full((scenes[0].image.shape[2], height, width), GREY, np.uint8)
    mask = np.full(size_hw, UNJUDGED, np.uint8) if all(scene.mask is not None for scene in scenes) else None
    found = []
    for number, scene in enumerate(scenes):
        (old_h, old_w), size = scene.size_hw, rng.uniform(*_MOSAIC_SCALE)
        factor = min(height / old_h, width / old_w) * size
        h, w = max(round(old_h * factor), 1), max(round(old_w * factor), 1)
        top, left = y - h * (number < 2), x - w * (number % 2 == 0)
        paste(image, resize(scene.image, (h, w)), top, left)
        if mask is not None and scene.mask is not None:
            paste(mask, resize_mask(scene.mask, (h, w)), top, left)
        within = overlap((left, top), (h, w), size_hw)
        found.append(move(scene.objects, (w / old_w, h / old_h), (left, top), within, min_visible))
    return Scene(image.transpose(1, 2, 0), _join(found), mask)


def paste(canvas: UInt8Array, pixels: UInt8Array, top: int, left: int) -> None:
    """Lay [..., h, w] over [..., H, W], in place; what reaches beyond is cut."""
    x0, y0, x1, y1 = overlap((left, top), pixels.shape[-2:], canvas.shape[-2:])
    canvas[..., y0:y1, x0:x1] = pixels[..., y0 - top : y1 - top, x0 - left : x1 - left]


def overlap(at_xy: tuple[int, int], size_hw: tuple[int, ...], canvas_hw: tuple[int, ...]) -> Window:
    """The part of a canvas that a picture laid at `at_xy` covers; it has no area where they do not meet."""
    (left, top), (height, width) = at_xy, size_hw
    x0, y0 = max(left, 0), max(top, 0)
    return x0, y0, max(min(left + width, canvas_hw[1]), x0), max(min(top + height, canvas_hw[0]), y0)


def move(
    objects: Objects,
    scale_xy: tuple[float, float],
    offset_xy: tuple[float, float],
    within: tuple[float, float, float, float],
    min_visible: float,
    min_side: float = 0.0,
) -> Objects:
    """Scale, then shift boxes; clip them to what is visible (left, top, right, bottom) and drop those that are lost.

    Those that lose half a pixel or more (not to rounding, then) count as truncated.
    """
    moved, clipped = _moved(objects.boxes_xyxy, scale_xy, offset_xy, within)
    keep = _has_sides(clipped, min_side) & (boxes.area(clipped) >= min_visible * boxes.area(moved))
    truncated = objects.truncated | (np.abs(clipped - moved) >= 0.5).any(axis=1)
    return _select(replace(objects, boxes_xyxy=clipped, truncated=truncated), keep)


def move_regions(
    regions_xyxy: Float32Array,
    scale_xy: tuple[float, float],
    offset_xy: tuple[float, float],
    within: tuple[float, float, float, float],
    min_side: float = 0.0,
) -> Float32Array:
    """The same of proposed regions [P, 4]; dropped are those of no area in view, or of less than `min_side` a side."""
    _, clipped = _moved(regions_xyxy, scale_xy, offset_xy, within)
    return clipped[_has_sides(clipped, min_side)]


def _moved(
    boxes_xyxy: Float32Array,
    scale_xy: tuple[float, float],
    offset_xy: tuple[float, float],
    within: tuple[float, float, float, float],
) -> tuple[npt.NDArray[np.float64], Float32Array]:
    """Boxes after scale and shift, and what is visible of them."""
    moved = boxes_xyxy.astype(np.float64) * (*scale_xy, *scale_xy) + (*offset_xy, *offset_xy)
    return moved, np.clip(moved, [within[0], within[1]] * 2, [within[2], within[3]] * 2).astype(np.float32)


def _has_sides(boxes_xyxy: Float32Array, min_side: float) -> BoolArray:
    shorter = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).min(axis=1)
    enough: BoolArray = (shorter > 0) & (shorter >= min_side)
    return enough


def _mirrored(boxes_xyxy: Float32Array, width: int) -> Float32Array:
    left, top, right, bottom = boxes_xyxy.T
    return np.stack([np.float32(width) - right, top, np.float32(width) - left, bottom], axis=1)


def _cut(pixels: UInt8Array, window: Window, fill: int) -> UInt8Array:
    """The window of [H, W] or [H, W, C]; a view where nothing is missing."""
    left, top, right, bottom = window
    height, width = pixels.shape[:2]
    if min(left, top) >= 0 and bottom <= height and right <= width:
        return pixels[top:bottom, left:right]
    canvas = np.full((bottom - top, right - left, *pixels.shape[2:]), fill, np.uint8)
    paste(canvas.T, pixels.T, -left, -top)  # transposed, the axes to cut are the last ones, x before y
    return canvas


def _select(objects: Objects, keep: BoolArray) -> Objects:
    """Some of the objects, without their outlines."""
    flags = objects.difficult[keep], objects.truncated[keep], objects.crowd[keep]
    return Objects(objects.boxes_xyxy[keep], objects.labels[keep], *flags)


def _join(parts: Sequence[Objects]) -> Objects:
    """All objects of several pictures, in order."""
    return Objects(
        np.concatenate([part.boxes_xyxy for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.difficult for part in parts]),
        np.concatenate([part.truncated for part in parts]),
        np.concatenate([part.crowd for part in parts]),
    )
