"""From encoded bytes to a model's input, for classification: the one way for evaluation, and the ways for training.

Everything that looks at a picture on behalf of a classifier (loading, evaluation, predictor, endpoint) goes through
`evaluation` here, so none of them can disagree about a pixel. Normalisation is the model's first layer, not ours.
Batch-level augmentation (mixup, label smoothing) runs on the device, in `pipeline.training`.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from pipeline import imaging
from pipeline.config import Strict
from pipeline.types import Frame, InputSpec, UInt8Array

Range = tuple[float, float]


class Augment(Strict):
    """How a training picture is varied. One draw per picture per epoch, a pure function of the given generator.

    Attributes:
        crop: `resized`: a window of random area and aspect, scaled to the input (Szegedy et al. 2015, section 6);
            `random`: short side to `resize_short`, then a window of the input's size (Krizhevsky et al. 2012, section
            4.1); `none`: as in evaluation.
        scale: share of the picture's area that `resized` keeps.
        ratio: aspect (width / height) of the window of `resized`.
        flip: mirror left-right with probability 1/2; not for digits.
        brightness, contrast, saturation: strongest relative change; 0 leaves the picture as it is.
    """

    crop: Literal["resized", "random", "none"] = "resized"
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: bool = True
    brightness: float = Field(default=0.0, ge=0, le=1)
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, bounds: Range) -> Range:
        if not 0 < bounds[0] <= bounds[1] < math.inf:
            raise ValueError("expected two positive numbers, the smaller one first")
        return bounds


def evaluation(data: bytes, spec: InputSpec, decoding: imaging.Decoding = imaging.DEFAULT) -> tuple[UInt8Array, Frame]:
    """Decode, resize the short side, take the centre crop: uint8 [C, H, W] and its frame.

    Raises:
        ImageError: the bytes are not an image this project accepts.
    """
    image = imaging.decode(data, decoding, min_short=_least_short(spec))
    upright_hw = imaging.probe(data, decoding)
    pixels, frame = _centre(image, spec)
    # libjpeg may have decoded at a fraction of the size: the frame maps to the whole picture.
    shrink = (image.shape[1] / upright_hw[1], image.shape[0] / upright_hw[0])
    scale_xy = (frame.scale_xy[0] * shrink[0], frame.scale_xy[1] * shrink[1])
    return pixels, Frame(upright_hw, spec.size_hw, scale_xy, frame.offset_xy)


def training(
    data: bytes,
    spec: InputSpec,
    augment: Augment,
    rng: np.random.Generator,
    decoding: imaging.Decoding = imaging.DEFAULT,
) -> UInt8Array:
    """Decode and vary one picture: uint8 [C, H, W].

    Raises:
        ImageError: the bytes are not an image this project accepts.
    """
    if augment.crop == "resized":
        image = imaging.decode(data, decoding)
        pixels = _resize(_window(image, augment, rng), spec.size_hw)
    elif augment.crop == "random":
        image = imaging.decode(data, decoding, min_short=_least_short(spec))
        pixels = _random_crop(_resize_short(image, spec), spec.size_hw, rng)
    else:
        pixels, _ = _centre(imaging.decode(data, decoding, min_short=_least_short(spec)), spec)
    if augment.flip and rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(_jitter(pixels, augment, rng))


def _least_short(spec: InputSpec) -> int:
    """The short side that scaled decoding has to leave room for; stretching may need the longer side from it."""
    return spec.resize_short or max(spec.size_hw)


def _centre(image: UInt8Array, spec: InputSpec) -> tuple[UInt8Array, Frame]:
    """The evaluation view of a decoded picture [H, W, C], with the frame that maps it to that picture."""
    pixels = _resize_short(image, spec)
    (height, width), (crop_h, crop_w) = pixels.shape[1:], spec.size_hw
    top, left = round((height - crop_h) / 2), round((width - crop_w) / 2)  # as torchvision: half to even
    scale_xy = (width / image.shape[1], height / image.shape[0])
    frame = Frame((image.shape[0], image.shape[1]), spec.size_hw, scale_xy, (float(-left), float(-top)))
    return np.ascontiguousarray(pixels[:, top : top + crop_h, left : left + crop_w]), frame


def _resize_short(image: UInt8Array, spec: InputSpec) -> UInt8Array:
    """Scale so that the short side is `resize_short`, or stretch to the input where there is none: [C, H', W']."""
    if spec.resize_short is None:
        return _resize(image, spec.size_hw)
    height, width = image.shape[:2]
    scale = spec.resize_short / min(height, width)
    # As torchvision: the long side is truncated, not rounded.
    return _resize(
        image, (max(int(height * scale + 1e-6), spec.resize_short), max(int(width * scale + 1e-6), spec.resize_short))
    )


def _resize(image: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Antialiased bilinear resize of [H, W, C] to [C, h, w].

    The HWC array goes in as a channels-last view, for which torch has a vectorised uint8 kernel: 1.5 times faster than
    the same call on planes, and equal to it.
    """
    if image.shape[:2] == tuple(size_hw):
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    view = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(view, size_hw, mode="bilinear", antialias=True, align_corners=False)
    pixels: UInt8Array = resized[0].contiguous().numpy()
    return pixels


def _window(image: UInt8Array, augment: Augment, rng: np.random.Generator) -> UInt8Array:
    """A random window of [H, W, C]: ten draws of area and aspect, then the largest centred one of allowed aspect."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        aspect = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return image[top : top + h, left : left + w]
    aspect = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    top, left = (height - h) // 2, (width - w) // 2
    return image[top : top + h, left : left + w]


def _random_crop(pixels: UInt8Array, size_hw: tuple[int, int], rng: np.random.Generator) -> UInt8Array:
    """A window of `size_hw` anywhere in [C, H, W]."""
    top = int(rng.integers(pixels.shape[1] - size_hw[0] + 1))
    left = int(rng.integers(pixels.shape[2] - size_hw[1] + 1))
    return pixels[:, top : top + size_hw[0], left : left + size_hw[1]]


def _jitter(pixels: UInt8Array, augment: Augment, rng: np.random.Generator) -> UInt8Array:
    """Brightness, contrast and saturation of [3, H, W], in this order; the input itself where all are 0."""
    if not (augment.brightness or augment.contrast or augment.saturation):
        return pixels
    values = pixels.astype(np.float32)
    values *= 1 + augment.brightness * rng.uniform(-1, 1)
    luma = np.tensordot(np.array((0.299, 0.587, 0.114), np.float32), values, axes=1)
    values = luma.mean() + (values - luma.mean()) * (1 + augment.contrast * rng.uniform(-1, 1))
    luma = np.tensordot(np.array((0.299, 0.587, 0.114), np.float32), values, axes=1)
    values = luma + (values - luma) * (1 + augment.saturation * rng.uniform(-1, 1))
    jittered: UInt8Array = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    return jittered
