"""Regions that may hold an object, before anyone knows what: selective search, through OpenCV. No Ray, no torch.

Uijlings et al., "Selective Search for Object Recognition", IJCV 2013. A picture is cut into small segments, the two
most alike neighbours are merged until one is left, and the box of every segment on the way is a region (section 3.1).
That is done in several colour spaces, from segments of several sizes and by several likenesses (section 3.2). `fast`
and `quality` are the paper's sets, as R-CNN's code has them (Girshick et al., CVPR 2014), on a picture of width 500.

Three things differ from OpenCV's own `switchToSelectiveSearchFast`, whose boxes are the same in every run but not their
order: that comes from the C library's `rand()`, which `cv2.setRNGSeed` does not seed.

- Segments begin at 50 and 100 pixels, as in the paper, not at 100 with k of 150, 300 and 450: more and smaller regions.
- The order is drawn here, from a stream that begins anew with every picture. It is by place, counted from the largest,
  times a number from 0 to 1 (section 3.3), so that large regions come early and no kind comes all at once; OpenCV has
  small ones first. The place is by area among all regions, for OpenCV does not tell that in each hierarchy.
- Red and green of `quality` are shares of the three colours.

Left out: edge boxes, scores of any kind, and who is a positive example.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline import boxes
from pipeline.config import Strict
from pipeline.errors import ConfigError
from pipeline.types import Float32Array, UInt8Array

Mode = Literal["fast", "quality"]

SIGMA = 0.8  # of the blur before the first segmentation
SEGMENT_SIZES: dict[Mode, tuple[int, ...]] = {"fast": (50, 100), "quality": (50, 100, 150, 300)}
"""Of the first segments: the least pixels, and Felzenszwalb and Huttenlocher's k."""
LIKENESSES: dict[Mode, tuple[tuple[str, ...], ...]] = {
    "fast": (("Color", "Texture", "Size", "Fill"), ("Texture", "Size", "Fill")),
    "quality": (("Color", "Texture", "Size", "Fill"), ("Texture", "Size", "Fill"), ("Fill",), ("Size",)),
}
"""What makes segments alike, by the names of OpenCV's strategies; each tuple is a likeness of equal parts."""
TALLEST = 2
"""Times the width: a taller picture is scaled to that height instead, for a strip would become gigantic."""


class Config(Strict):
    """What is searched for.

    Attributes:
        mode: `fast` merges 8 times, `quality` 80 times: it takes 3.5 times as long and finds 4 times as many regions.
        width: that a picture is scaled to for the search, in pixels; its regions are as fine as that.
        max_proposals: of a picture, the first ones.
        min_side: regions that are narrower or lower are dropped, in pixels of the scaled picture.
    """

    mode: Mode = "fast"
    width: int = Field(default=500, ge=16, le=2000)
    max_proposals: int = Field(default=2000, ge=1, le=100_000)
    min_side: int = Field(default=20, ge=1)


def selective_search(image: UInt8Array, config: Config) -> Float32Array:
    """The regions of a picture, float32 [P, 4] xyxy, half-open, in its own pixels; each once, large ones rather early.

    P is at least 1: a picture in which nothing is found is one region. The same picture gives the same regions in the
    same order, in any process, with one version of OpenCV and NumPy.

    Args:
        image: uint8 [H, W, 3], RGB.
        config: what is searched for.

    Raises:
        ConfigError: OpenCV's extra modules are not installed.
        ValueError: the array is no picture.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"expected uint8 [H, W, 3] to search for regions, got {image.dtype} {image.shape}")
    cv2 = _opencv()
    original_hw, searched_hw = image.shape[:2], _searched_hw(image.shape[:2], config.width)
    shrinks = searched_hw[1] < original_hw[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    picture = cv2.resize(np.ascontiguousarray(image), searched_hw[::-1], interpolation=way)
    found = boxes.xywh_to_xyxy(_search(cv2, picture, config.mode).process())
    pixel = np.divide(searched_hw[::-1], original_hw[::-1])  # of the image itself: nothing is smaller
    found = found[(found[:, 2:] - found[:, :2] >= np.maximum(pixel, config.min_side)).all(axis=1)]
    if not len(found):
        found = np.array([[0, 0, *searched_hw[::-1]]], np.float32)
    first = _in_order(found)[: config.max_proposals]
    return boxes.clip(boxes.scale(first, searched_hw, original_hw), original_hw)


def best_overlaps(regions_xyxy: npt.ArrayLike, truth_xyxy: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """For each of N true boxes, the largest IoU with any region, float64 [N] (section 5's "best overlap")."""
    best: npt.NDArray[np.float64] = boxes.iou(truth_xyxy, regions_xyxy).max(axis=1, initial=0)
    return best


def opencv_version() -> str:
    """The version of OpenCV.

    Raises:
        ConfigError: its extra modules are not installed.
    """
    return str(_opencv().__version__)


def use_one_thread() -> None:
    """Let OpenCV stay on one core in this process, where as many processes as cores search at once."""
    _opencv().setNumThreads(1)


def _opencv() -> Any:
    try:
        import cv2  # noqa: PLC0415  (an extra, and half a second)
        from cv2 import ximgproc  # noqa: F401, PLC0415  (OpenCV without its contributed modules is no help)
    except ImportError as error:
        raise ConfigError(
            f"selective search needs OpenCV with its contributed modules, which cannot be imported here ({error}); run "
            "pip install 'ventral[proposals]'"
        ) from None
    return cv2


def _searched_hw(original_hw: tuple[int, int], width: int) -> tuple[int, int]:
    factor = min(width / original_hw[1], TALLEST * width / original_hw[0])
    height, width = (max(round(side * factor), 1) for side in original_hw)
    return height, width


def _search(cv2: Any, picture: UInt8Array, mode: Mode) -> Any:
    """What OpenCV is to do; each pair of a colour space and a size of segments is merged by each likeness."""
    kit = cv2.ximgproc.segmentation
    search = kit.createSelectiveSearchSegmentation()
    for colours in _colour_spaces(cv2, picture, mode):
        search.addImage(colours)
    for size in SEGMENT_SIZES[mode]:
        search.addGraphSegmentation(kit.createGraphSegmentation(SIGMA, size, size))
    # One of each, for it keeps its histograms of the segments for the next likeness.
    parts = {name: getattr(kit, f"createSelectiveSearchSegmentationStrategy{name}")() for name in LIKENESSES[mode][0]}
    for names in LIKENESSES[mode]:
        likeness = kit.createSelectiveSearchSegmentationStrategyMultiple()
        for name in names:
            likeness.addStrategy(parts[name], 1 / len(names))
        search.addStrategy(likeness)
    return search


def _colour_spaces(cv2: Any, picture: UInt8Array, mode: Mode) -> list[UInt8Array]:
    """HSV and Lab; for `quality` also red, green and intensity, hue, intensity."""
    hsv, lab = (cv2.cvtColor(picture, to) for to in (cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2Lab))
    if mode == "fast":
        return [hsv, lab]
    intensity = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    total = picture.sum(axis=2, dtype=np.float32, keepdims=True)
    shares = (255 * picture[:, :, :2] / np.maximum(total, 1)).round().astype(np.uint8)
    rgi = np.concatenate([shares, intensity[:, :, None]], axis=2)
    return [hsv, lab, rgi, np.ascontiguousarray(hsv[:, :, 0]), intensity]


def _in_order(found: Float32Array) -> Float32Array:
    """Section 3.3: sorted by place, counted from the largest, times chance."""
    found = np.unique(found, axis=0)  # sorted, so that nothing is left of the order that they came in
    found = found[np.argsort(-boxes.area(found), kind="stable")]
    places = np.arange(1, len(found) + 1) * np.random.default_rng(0).random(len(found))
    return found[np.argsort(places, kind="stable")]
