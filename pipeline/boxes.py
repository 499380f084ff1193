"""Boxes as arrays: from the forms that file formats use to the house form and back, and their geometry. NumPy only.

The house form is float32 [N, 4], (x_min, y_min, x_max, y_max), in continuous absolute pixels: the origin is the outer
corner of the first pixel, x runs right, y down, and x_max, y_max are just outside (half-open), so that a width is
x_max - x_min. Functions compute in float64 and take anything that is an array of [N, 4] numbers, also an empty list.
Boxes of zero or negative size pass through unchanged; who stores them judges them. Left out: non-maximum suppression
and everything on tensors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.types import BoolArray, Float32Array

_Float64Array = npt.NDArray[np.float64]
_VOC_ORIGIN = np.array([1, 1, 0, 0])


def voc_to_xyxy(boxes: npt.ArrayLike) -> Float32Array:
    """From Pascal VOC: pixel numbers from 1, the last pixel included; so only the lower corner moves, by one.

    Source: VOC2007 development kit, section 4.1 ("the top-left pixel in the image has coordinates (1, 1)").
    """
    return _house(_numbers(boxes) - _VOC_ORIGIN)


def xyxy_to_voc(boxes_xyxy: npt.ArrayLike) -> Float32Array:
    """To Pascal VOC, the inverse of `voc_to_xyxy`; nothing is rounded."""
    return _house(_numbers(boxes_xyxy) + _VOC_ORIGIN)


def xywh_to_xyxy(boxes: npt.ArrayLike) -> Float32Array:
    """From COCO: (x_min, y_min, width, height), in continuous pixels from 0."""
    numbers = _numbers(boxes)
    return _house(np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], axis=1))


def xyxy_to_xywh(boxes_xyxy: npt.ArrayLike) -> Float32Array:
    """To COCO, the inverse of `xywh_to_xyxy`."""
    numbers = _numbers(boxes_xyxy)
    return _house(np.concatenate([numbers[:, :2], numbers[:, 2:] - numbers[:, :2]], axis=1))


def cxcywh_to_xyxy(boxes: npt.ArrayLike, size_hw: tuple[int, int]) -> Float32Array:
    """From YOLO: (x of the centre, y of the centre, width, height), each as a share of the image's size."""
    numbers = _numbers(boxes) * _sides(size_hw)
    centre, half = numbers[:, :2], numbers[:, 2:] / 2
    return _house(np.concatenate([centre - half, centre + half], axis=1))


def xyxy_to_cxcywh(boxes_xyxy: npt.ArrayLike, size_hw: tuple[int, int]) -> Float32Array:
    """To YOLO, the inverse of `cxcywh_to_xyxy`."""
    numbers = _numbers(boxes_xyxy) / _sides(size_hw)
    lower, upper = numbers[:, :2], numbers[:, 2:]
    return _house(np.concatenate([(lower + upper) / 2, upper - lower], axis=1))


def clip(boxes_xyxy: npt.ArrayLike, size_hw: tuple[int, int]) -> Float32Array:
    """Cut off what lies outside an image of `size_hw`; a box that is wholly outside keeps no area."""
    return _house(np.clip(_numbers(boxes_xyxy), 0, _sides(size_hw)))


def scale(boxes_xyxy: npt.ArrayLike, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> Float32Array:
    """Move boxes from one size of a picture to another; `from_hw` of (1, 1) takes shares to pixels."""
    return _house(_numbers(boxes_xyxy) * (_sides(to_hw) / _sides(from_hw)))


def area(boxes_xyxy: npt.ArrayLike) -> Float32Array:
    """Areas [N] in square pixels; 0 where a side is zero or negative."""
    return _house(_area(_numbers(boxes_xyxy)))


def iou(first_xyxy: npt.ArrayLike, second_xyxy: npt.ArrayLike, crowd: BoolArray | None = None) -> _Float64Array:
    """Intersection over union [N, M] of every box of the first with every one of the second; 0 where neither has area.

    Source: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2, without its
    one pixel more per side, which the house form does not need.

    Args:
        crowd: bool [M]: of these boxes of the second, what is divided by is the area of the first alone (COCO's rule
            for groups of objects under one box).
    """
    first, second = _numbers(first_xyxy), _numbers(second_xyxy)
    lower = np.maximum(first[:, None, :2], second[None, :, :2])
    upper = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(upper - lower, 0, None).prod(axis=2)
    joined = _area(first)[:, None] + _area(second)[None, :] - shared
    if crowd is not None:
        joined = np.where(crowd[None, :], _area(first)[:, None], joined)
    found: _Float64Array = np.divide(shared, joined, out=np.zeros_like(shared), where=joined > 0)
    return found


def _area(numbers: _Float64Array) -> _Float64Array:
    areas: _Float64Array = np.clip(numbers[:, 2:] - numbers[:, :2], 0, None).prod(axis=1)
    return areas


def _numbers(boxes: npt.ArrayLike) -> _Float64Array:
    numbers = np.asarray(boxes, np.float64)
    if numbers.shape == (0,):  # an empty list says nothing about its second axis
        return numbers.reshape(0, 4)
    if numbers.ndim != 2 or numbers.shape[1] != 4:
        raise ValueError(f"expected boxes [N, 4], got an array of shape {numbers.shape}")
    return numbers


def _sides(size_hw: tuple[int, int]) -> _Float64Array:
    height, width = size_hw
    if min(size_hw) <= 0:
        raise ValueError(f"expected a positive height and width, got {size_hw}")
    return np.array([width, height, width, height], np.float64)


def _house(numbers: _Float64Array) -> Float32Array:
    return numbers.astype(np.float32)
