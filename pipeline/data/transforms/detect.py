"""From encoded bytes to a model's input, for detection and segmentation, with boxes and masks moving along.

Training varies a decoded picture as a `Scene` (`transforms.scenes`); `Fit` then brings it to the size a model wants: a
`View`, whose `Frame` alone maps back. Evaluation is a fit and nothing else. Outlines of objects (`Objects.regions`) are
left behind: a mask moves along, they do not. Stacking views of several sizes is `to_batch`'s, normalising the model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from pipeline import imaging
from pipeline.config import Strict
from pipeline.data.transforms.resizing import resize, resize_mask
from pipeline.data.transforms.scenes import (
    GREY,
    NO_REGIONS,
    UNJUDGED,
    Scene,
    Window,
    check_marks,
    crop,
    flip,
    iou_crop,
    mosaic,
    move,
    move_regions,
    overlap,
    paste,
)
from pipeline.errors import ConfigError
from pipeline.types import Fit, Float32Array, Frame, Objects, UInt8Array, no_objects

_LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a model gets to see.

    Attributes:
        image: uint8 [C, h, w], contiguous.
        objects: their boxes in pixels of `image`, each inside it and of some area.
        mask: uint8 [h, w] of class indices, 255 where padded; None where there is none.
        frame: maps the input to the original; of a training view, which has none, the view itself.
        proposals: float32 [P, 4], regions in pixels of `image`, each inside the picture and of some area.
    """

    image: UInt8Array
    objects: Objects
    mask: UInt8Array | None
    frame: Frame
    proposals: Float32Array = field(default_factory=NO_REGIONS.copy)


class Augment(Strict):
    """How a training picture is varied; every draw comes from the given generator. Only the flip is on by default.

    Attributes:
        mosaic: probability that four pictures meet in one (Bochkovskiy et al. 2020, "YOLOv4", section 3.3).
        iou_crop: probability of a crop that keeps a drawn overlap with some object (Liu et al. 2016, "SSD", section
            2.2); one draw in seven of these keeps the whole picture.
        scale: strongest relative change of size, and `translate` strongest shift as a share of the picture's sides
            (Redmon et al. 2016, section 2.2: 0.2 each); what comes into view from outside is grey.
        flip: mirror left-right with probability 1/2.
        exposure: strongest factor, or its inverse, on the value in HSV space, and `saturation` on the saturation
            (ibid.: 1.5 each); 1 leaves the picture as it is.
        hue: strongest turn of the colour circle, as a share of it; 0.05 in SSD's photometric distortions.
        brightness: strongest shift as a share of the range (0.125 there), and `contrast` strongest relative change.
        min_visible: a box is dropped when an operation leaves less than this share of its area in view.
    """

    mosaic: float = Field(default=0.0, ge=0, le=1)
    iou_crop: float = Field(default=0.0, ge=0, le=1)
    scale: float = Field(default=0.0, ge=0, le=0.5)  # beyond, the grey around it would take the memory of the picture
    translate: float = Field(default=0.0, ge=0, le=0.5)  # beyond, the picture might leave its own view
    flip: bool = True
    exposure: float = Field(default=1.0, ge=1, le=10)
    saturation: float = Field(default=1.0, ge=1, le=10)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    brightness: float = Field(default=0.0, ge=0, le=1)
    contrast: float = Field(default=0.0, ge=0, le=1)
    min_visible: float = Field(default=0.1, ge=0, le=1)


def check(augment: Augment, num_channels: int) -> None:
    """Refuse an augmentation of colours for pictures that have none, before anything starts.

    Raises:
        ConfigError: naming the keys that need RGB.
    """
    plain = Augment()
    keys = ("exposure", "saturation", "hue", "brightness", "contrast")
    wrong = [key for key in keys if getattr(augment, key) != getattr(plain, key)]
    if num_channels != 3 and wrong:
        raise ConfigError(
            f"augment: {', '.join(wrong)} need{'s' if len(wrong) == 1 else ''} RGB images of 3 channels, "
            f"the model takes {num_channels}; leave them out"
        )


def read(
    data: bytes,
    objects: Objects | None = None,
    mask: UInt8Array | None = None,
    decoding: imaging.Decoding = imaging.DEFAULT,
    proposals: Float32Array = NO_REGIONS,
) -> Scene:
    """Decode every pixel of a picture, for training. Boxes, mask and proposals are in pixels of the upright original.

    Raises:
        ImageError: the bytes are not an image this project accepts.
    """
    return Scene(imaging.decode(data, decoding), no_objects() if objects is None else objects, mask, proposals)


def evaluation(
    data: bytes,
    fit: Fit,
    objects: Objects | None = None,
    mask: UInt8Array | None = None,
    decoding: imaging.Decoding = imaging.DEFAULT,
    proposals: Float32Array = NO_REGIONS,
) -> View:
    """Decode and fit one picture: what evaluation, predictor and endpoint show a model.

    Only boxes and proposals without any area in the picture are dropped. They and the mask are in pixels of the upright
    original.

    Raises:
        ImageError: the bytes are not an image this project accepts.
    """
    objects = no_objects() if objects is None else objects
    upright_hw = imaging.probe(data, decoding)
    check_marks(objects, mask, upright_hw)
    frame = fit.frame(upright_hw)
    # libjpeg may decode at a fraction of the size, as long as neither side falls under twice what is needed.
    image = imaging.decode(data, decoding, min_short=math.ceil(min(upright_hw) * max(frame.scale_xy)))
    return _view(image, objects, mask, proposals, frame)


def fitted(scene: Scene, fit: Fit) -> View:
    """Fit a decoded picture as `evaluation` does its bytes."""
    return _view(scene.image, scene.objects, scene.mask, scene.proposals, fit.frame(scene.size_hw))


MOSAIC: Literal[4] = 4
"""Pictures that meet in one."""


def num_scenes(augment: Augment, rng: np.random.Generator) -> Literal[1, 4]:
    """How many pictures the next training view takes; the first of them is the one whose turn it is."""
    return MOSAIC if augment.mosaic > 0 and rng.random() < augment.mosaic else 1


def training(scenes: Sequence[Scene], fit: Fit, augment: Augment, rng: np.random.Generator) -> View:
    """Vary one picture, or four as a mosaic, and fit it.

    Objects and proposals come out in the order they went in; one of less than a pixel a side in the input is dropped.

    Args:
        scenes: as many as `num_scenes` asked for, drawn from the same generator.
        fit: the size of the result; of a mosaic, that of the first picture.
        augment: what may be done.
        rng: of this picture in this epoch.
    """
    if len(scenes) == 1:
        scene = scenes[0]
    else:
        scene = mosaic(scenes, fit.frame(scenes[0].size_hw).input_hw, rng, augment.min_visible)
    if augment.iou_crop > 0 and rng.random() < augment.iou_crop:
        scene = iou_crop(scene, rng, augment.min_visible)
    if augment.scale > 0 or augment.translate > 0:
        scene = crop(scene, _shifted_window(scene.size_hw, augment, rng), augment.min_visible)
    if augment.flip and rng.random() < 0.5:
        scene = flip(scene)
    frame = fit.frame(scene.size_hw)
    view = _view(scene.image, scene.objects, scene.mask, scene.proposals, frame, min_side=1.0)
    image = _recolour(view.image, augment, rng)
    return replace(view, image=image, frame=Frame(frame.input_hw, frame.input_hw))


def _view(
    image: UInt8Array,
    objects: Objects,
    mask: UInt8Array | None,
    proposals: Float32Array,
    frame: Frame,
    *,
    min_side: float = 0.0,
) -> View:
    """Scale and pad as `frame` says. The image may be a reduction of the original, which all the rest belongs to."""
    (height, width), (scale_x, scale_y) = frame.original_hw, frame.scale_xy
    inner_hw, left, top = (round(height * scale_y), round(width * scale_x)), *map(int, frame.offset_xy)
    pixels = _pad(resize(image, inner_hw), frame.input_hw, top, left, GREY)
    if mask is not None:
        mask = np.ascontiguousarray(_pad(resize_mask(mask, inner_hw), frame.input_hw, top, left, UNJUDGED))
    within = overlap((left, top), inner_hw, frame.input_hw)
    moved = move(objects, frame.scale_xy, frame.offset_xy, within, 0.0, min_side)
    regions = move_regions(proposals, frame.scale_xy, frame.offset_xy, within, min_side)
    return View(pixels, moved, mask, frame, regions)


def _pad(pixels: UInt8Array, size_hw: tuple[int, int], top: int, left: int, fill: int) -> UInt8Array:
    """Lay [..., h, w] into a plain [..., *size_hw]."""
    if pixels.shape[-2:] == tuple(size_hw):
        return pixels
    canvas = np.full((*pixels.shape[:-2], *size_hw), fill, np.uint8)
    paste(canvas, pixels, top, left)
    return canvas


def _shifted_window(size_hw: tuple[int, int], augment: Augment, rng: np.random.Generator) -> Window:
    """What is in view after scaling about the centre, then shifting (Redmon et al. 2016, section 2.2)."""
    height, width = size_hw
    factor = rng.uniform(1 - augment.scale, 1 + augment.scale)
    x, y = (side * (0.5 - rng.uniform(-augment.translate, augment.translate) / factor) for side in (width, height))
    w, h = max(round(width / factor), 1), max(round(height / factor), 1)
    left, top = round(x - w / 2), round(y - h / 2)
    return left, top, left + w, top + h


def _recolour(pixels: UInt8Array, augment: Augment, rng: np.random.Generator) -> UInt8Array:
    """Brightness, contrast, exposure, saturation and hue of [3, H, W], in this order; the input where all are off."""
    if augment.brightness or augment.contrast or augment.exposure > 1 or augment.saturation > 1:
        values = pixels + np.float32(255 * augment.brightness * rng.uniform(-1, 1))
        if augment.contrast:
            luma = float(np.tensordot(_LUMA, values, axes=1).mean())
            values = luma + (values - luma) * np.float32(1 + augment.contrast * rng.uniform(-1, 1))
        values = np.clip(values, 0, 255)
        values = _expose(values, _factor(augment.exposure, rng))
        values = _saturate(values, _factor(augment.saturation, rng))
        pixels = (values + np.float32(0.5)).astype(np.uint8)
    return _turn_hue(pixels, augment.hue * rng.uniform(-1, 1)) if augment.hue else pixels


def _factor(strongest: float, rng: np.random.Generator) -> float:
    """Between 1 and `strongest`, or the inverse of that, with equal chance."""
    factor = float(rng.uniform(1, strongest))
    return factor if rng.random() < 0.5 else 1 / factor


def _expose(values: Float32Array, factor: float) -> Float32Array:
    """Scale the value of HSV, up to its end. Hue and saturation stay when all three channels are scaled alike."""
    if factor == 1:
        return values
    scaled: Float32Array = values * np.minimum(np.float32(factor), 255 / np.maximum(values.max(axis=0), 1))
    return scaled


def _saturate(values: Float32Array, factor: float) -> Float32Array:
    """Scale the saturation of HSV, up to its end. Hue and value stay when the distances to the maximum are scaled."""
    if factor == 1:
        return values
    value = values.max(axis=0)
    span = value - values.min(axis=0)  # the saturation is span / value
    limit = np.divide(value, span, out=np.ones_like(span), where=span > 0)
    scaled: Float32Array = value - (value - values) * np.minimum(np.float32(factor), limit)
    return scaled


def _turn_hue(pixels: UInt8Array, share: float) -> UInt8Array:
    """Turn the colour circle by a share of it."""
    # Only here: it takes seconds to import, which no one should wait for who does not use it.
    from torchvision.transforms.v2 import functional as tv  # noqa: PLC0415

    turned: UInt8Array = tv.adjust_hue(torch.from_numpy(pixels), share).numpy()
    return turned
