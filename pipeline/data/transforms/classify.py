"""From encoded bytes to a model's input, for classification: the one way for evaluation, and the ways for training.

Everything that looks at a picture on behalf of a classifier (loading, evaluation, predictor, endpoint) goes through
`evaluation` here, so none of them can disagree about a pixel. Normalisation is the model's first layer, not ours.
Batch-level augmentation (mixup, cutmix, colour noise) runs on the device, in `transforms.mixing`. Everything drawn here
comes from the numpy generator that is given, never from a global one.

What a training view shows (`View`) is drawn apart from the pixels, from the size of the picture alone, so that
`pipeline.data.gpu_decoding` shows the same on another device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from pipeline import imaging
from pipeline.config import Strict
from pipeline.data.transforms.resizing import resize
from pipeline.errors import ConfigError
from pipeline.types import Frame, InputSpec, UInt8Array, Views


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ValueError("expected two positive numbers, the smaller one first")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class RandAugment(Strict):
    """Operations drawn at random, all of one strength (Cubuk et al. 2020, "RandAugment", section 3).

    Of 14 operations (`_OPERATIONS`) each draw is equally likely, with replacement; the sign of those that have one too.

    Attributes:
        num_ops: operations in a row, the paper's N.
        magnitude: their strength, the paper's M, on torchvision's scale from 0 to 30.
    """

    num_ops: int = Field(default=2, ge=1)
    magnitude: int = Field(default=9, ge=0, le=30)


class Erase(Strict):
    """Random erasing: a rectangle is painted over (Zhong et al. 2020, "Random Erasing Data Augmentation", section 3).

    Attributes:
        probability: that a picture loses a rectangle.
        area: its share of the input's area.
        aspect: its height / width, drawn evenly on a logarithmic scale, so that tall is as likely as wide.
        fill: `random`: noise, a value per pixel and channel, the paper's best; `mean`: the specification's mean colour.
    """

    probability: float = Field(default=0.5, ge=0, le=1)
    area: Range = (0.02, 0.4)
    aspect: Range = (0.3, 1 / 0.3)
    fill: Literal["random", "mean"] = "random"


class Augment(Strict):
    """How a training picture is varied. One draw per picture per epoch, a pure function of the given generator.

    Attributes:
        crop: `resized`: a window of random area and aspect, scaled to the input (Szegedy et al. 2015, section 6);
            `random`: short side to `resize_short`, then a window of the input's size (Krizhevsky et al. 2012, section
            4.1); `none`: as in evaluation.
        scale: share of the picture's area that `resized` keeps.
        ratio: aspect (width / height) of the window of `resized`.
        flip: mirror left-right with probability 1/2; not for digits.
        brightness, contrast, saturation: strongest relative change; 0 leaves the picture as it is. For RGB only.
        rand_augment: operations of random kind after crop and flip; None for none. For RGB only.
        erase: a rectangle painted over at the end; None for none.
    """

    crop: Literal["resized", "random", "none"] = "resized"
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: bool = True
    brightness: float = Field(default=0.0, ge=0, le=1)
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)
    rand_augment: RandAugment | None = None
    erase: Erase | None = None


class View(NamedTuple):
    """What of a decoded picture a batch shows: a window of it, scaled, cut to the input's size, perhaps mirrored.

    Attributes:
        window: top, left, height, width in the picture; None for the whole of it.
        scaled_hw: size that the window is scaled to.
        corner: top and left of the input in the scaled window.
        flipped: mirrored left-right.
    """

    window: tuple[int, int, int, int] | None
    scaled_hw: tuple[int, int]
    corner: tuple[int, int]
    flipped: bool


def check(augment: Augment, spec: InputSpec) -> None:
    """Refuse an augmentation of colours for pictures that have none, before anything starts.

    Raises:
        ConfigError: naming the keys that need RGB.
    """
    keys = ("brightness", "contrast", "saturation", "rand_augment")
    wrong = [key for key in keys if getattr(augment, key)]
    if spec.num_channels != 3 and wrong:
        raise ConfigError(
            f"augment: {', '.join(wrong)} need{'s' if len(wrong) == 1 else ''} RGB images of 3 channels, "
            f"the model takes {spec.num_channels}; leave them out"
        )


def evaluation(data: bytes, spec: InputSpec, decoding: imaging.Decoding = imaging.DEFAULT) -> tuple[UInt8Array, Frame]:
    """Decode, resize the short side, take the centre crop: uint8 [C, H, W] and its frame.

    Raises:
        ImageError: the bytes are not an image this project accepts.
    """
    decoding = _for_channels(decoding, spec)
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
    """Decode and vary one picture: uint8 [C, H, W], in any memory order: it is going to be copied into a batch.

    Raises:
        ImageError: the bytes are not an image this project accepts.
    """
    image = imaging.decode(data, _for_channels(decoding, spec), min_short=least_short(spec, augment))
    pixels = _show(image, draw(image.shape[:2], spec, augment, rng), spec)
    if augment.rand_augment is not None:
        pixels = _rand_augment(pixels, augment.rand_augment, rng)
    pixels = _jitter(pixels, augment, rng)
    return pixels if augment.erase is None else _erase(np.ascontiguousarray(pixels), augment.erase, spec, rng)


def draw(hw: tuple[int, ...], spec: InputSpec, augment: Augment, rng: np.random.Generator) -> View:
    """Draw the window of a training view, then whether it is mirrored.

    Args:
        hw: height and width of the picture, decoded with `least_short`.
    """
    window, corner = None, (0, 0)
    if augment.crop == "resized":
        window, scaled_hw = _window(hw, augment, rng), spec.size_hw
    else:
        scaled_hw = _short_hw(hw, spec)
        corner = _centred(scaled_hw, spec.size_hw)
        if augment.crop == "random":
            top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(scaled_hw, spec.size_hw, strict=True))
            corner = (top, left)
    return View(window, scaled_hw, corner, augment.flip and rng.random() < 0.5)


def least_short(spec: InputSpec, augment: Augment) -> int | None:
    """The `min_short` that training pictures are decoded with; None for all of their pixels."""
    return None if augment.crop == "resized" else _least_short(spec)


def shown(spec: InputSpec, views: Views) -> InputSpec:
    """What `evaluation` has to show of a picture so that `cut` finds all the views of it there."""
    if views != "ten_crop" or spec.resize_short is None:
        return spec
    return replace(spec, size_hw=(spec.resize_short, spec.resize_short))


def cut(pictures: Tensor, spec: InputSpec, views: Views) -> list[Tensor]:
    """The views of some pictures, each [B, C, H, W]: the windows, then the mirror images of these in the same order.

    The windows of `ten_crop` lie in the centre square of side `resize_short` (Krizhevsky et al. 2012, section 2): top
    left, top right, bottom left, bottom right, centre (section 4.1). Without `resize_short` the five are one and the
    same, and the result is that of `flip`.

    Args:
        pictures: uint8 [B, C, h, w] as `shown` asks for them.
        spec: what the model expects of an image.
    """
    if views == "centre":
        return [pictures]
    height, width = spec.size_hw
    bottom, right = pictures.shape[2] - height, pictures.shape[3] - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)] if views == "ten_crop" else []
    places = [*corners, _centred((pictures.shape[2], pictures.shape[3]), spec.size_hw)]
    windows = [pictures[:, :, top : top + height, left : left + width] for top, left in places]
    return [*windows, *(window.flip(3) for window in windows)]


def _for_channels(decoding: imaging.Decoding, spec: InputSpec) -> imaging.Decoding:
    """The same policy, for images of as many channels as the model takes."""
    if decoding.num_channels == spec.num_channels:
        return decoding
    return decoding.model_copy(update={"num_channels": spec.num_channels})


def _least_short(spec: InputSpec) -> int:
    """The short side that scaled decoding has to leave room for; stretching may need the longer side from it."""
    return spec.resize_short or max(spec.size_hw)


def _centre(image: UInt8Array, spec: InputSpec) -> tuple[UInt8Array, Frame]:
    """The evaluation view of a decoded picture [H, W, C], with the frame that maps it to that picture."""
    pixels = _resize_short(image, spec)
    height, width = pixels.shape[1:]
    top, left = _centred((height, width), spec.size_hw)
    scale_xy = (width / image.shape[1], height / image.shape[0])
    frame = Frame((image.shape[0], image.shape[1]), spec.size_hw, scale_xy, (float(-left), float(-top)))
    return np.ascontiguousarray(_cut_centre(pixels, spec.size_hw)), frame


def _centred(size_hw: tuple[int, int], crop_hw: tuple[int, int]) -> tuple[int, int]:
    """Top and left of the centre crop; half a pixel goes to the even side, as in torchvision."""
    return round((size_hw[0] - crop_hw[0]) / 2), round((size_hw[1] - crop_hw[1]) / 2)


def _cut_centre(pixels: UInt8Array, crop_hw: tuple[int, int]) -> UInt8Array:
    """The centre crop of [C, H, W], a view."""
    top, left = _centred((pixels.shape[1], pixels.shape[2]), crop_hw)
    return pixels[:, top : top + crop_hw[0], left : left + crop_hw[1]]


def _resize_short(image: UInt8Array, spec: InputSpec) -> UInt8Array:
    """Scale so that the short side is `resize_short`, or stretch to the input where there is none: [C, H', W']."""
    return resize(image, _short_hw(image.shape[:2], spec))


def _short_hw(hw: tuple[int, ...], spec: InputSpec) -> tuple[int, int]:
    if spec.resize_short is None:
        return spec.size_hw
    height, width = hw
    scale = spec.resize_short / min(height, width)
    # As torchvision: the long side is truncated, not rounded.
    return (
        max(int(height * scale + 1e-6), spec.resize_short),
        max(int(width * scale + 1e-6), spec.resize_short),
    )


def _window(hw: tuple[int, ...], augment: Augment, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width: ten draws of area and aspect, then the largest centred one of allowed aspect."""
    height, width = hw
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        aspect = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return top, left, h, w
    aspect = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def _show(image: UInt8Array, view: View, spec: InputSpec) -> UInt8Array:
    """The pixels of a view of [H, W, C]: [C, h, w], in any memory order."""
    if view.window is not None:
        top, left, height, width = view.window
        image = image[top : top + height, left : left + width]
    top, left = view.corner
    pixels = resize(image, view.scaled_hw)[:, top : top + spec.size_hw[0], left : left + spec.size_hw[1]]
    return pixels[:, :, ::-1] if view.flipped else pixels


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


_OUTSIDE = 128  # the grey that moves in where an operation moves the picture away

# RandAugment's operations, each by the name of its kernel: how strong it is at its strongest, and whether its sign is
# drawn too. Cubuk et al. 2020, section 3, with the ranges and the 31 steps of torchvision's RandAugment.
_OPERATIONS: tuple[tuple[str, float, bool], ...] = (
    ("identity", 0, False),
    ("shear_x", 0.3, True),
    ("shear_y", 0.3, True),
    ("translate_x", 150 / 331, True),  # of the width
    ("translate_y", 150 / 331, True),
    ("rotate", 30, True),  # degrees
    ("brightness", 0.9, True),
    ("saturation", 0.9, True),
    ("contrast", 0.9, True),
    ("sharpness", 0.9, True),
    ("posterize", 4, False),  # bits taken away
    ("solarize", 1, False),  # of the range of values, from the top, that is inverted
    ("autocontrast", 0, False),
    ("equalize", 0, False),
)


def _rand_augment(pixels: UInt8Array, config: RandAugment, rng: np.random.Generator) -> UInt8Array:
    """Draw and apply operations to [3, H, W]."""
    image = torch.from_numpy(np.ascontiguousarray(pixels))
    for _ in range(config.num_ops):
        name, strongest, signed = _OPERATIONS[int(rng.integers(len(_OPERATIONS)))]
        strength = strongest * config.magnitude / 30
        if signed and rng.random() < 0.5:
            strength = -strength
        image = _operate(image, name, strength)
    varied: UInt8Array = image.numpy()
    return varied


def _operate(image: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    """Apply one of `_OPERATIONS` to uint8 [3, H, W] at a strength on that operation's scale."""
    # Only here: it takes seconds to import, which no one should wait for who does not use it.
    from torchvision.transforms.v2 import functional as tv  # noqa: PLC0415

    height, width = image.shape[1:]
    outside = [float(_OUTSIDE)] * 3
    lean = math.degrees(math.atan(strength))  # the shear is by the strength, torchvision takes its angle
    operations: dict[str, Callable[[], torch.Tensor]] = {
        "identity": lambda: image,
        "shear_x": lambda: tv.affine(image, 0.0, [0, 0], 1.0, [lean, 0.0], fill=outside, center=[0, 0]),
        "shear_y": lambda: tv.affine(image, 0.0, [0, 0], 1.0, [0.0, lean], fill=outside, center=[0, 0]),
        "translate_x": lambda: tv.affine(image, 0.0, [int(strength * width), 0], 1.0, [0.0, 0.0], fill=outside),
        "translate_y": lambda: tv.affine(image, 0.0, [0, int(strength * height)], 1.0, [0.0, 0.0], fill=outside),
        "rotate": lambda: tv.rotate(image, strength, fill=outside),
        "brightness": lambda: tv.adjust_brightness(image, 1 + strength),
        "saturation": lambda: tv.adjust_saturation(image, 1 + strength),
        "contrast": lambda: tv.adjust_contrast(image, 1 + strength),
        "sharpness": lambda: tv.adjust_sharpness(image, 1 + strength),
        "posterize": lambda: tv.posterize(image, 8 - round(strength)),
        "solarize": lambda: tv.solarize(image, 255 * (1 - strength)),
        "autocontrast": lambda: tv.autocontrast(image),
        "equalize": lambda: tv.equalize(image),
    }
    return operations[name]()


def _erase(pixels: UInt8Array, erase: Erase, spec: InputSpec, rng: np.random.Generator) -> UInt8Array:
    """Paint a rectangle of [C, H, W] over, in place: ten draws of area and aspect, none that fits leaves it whole."""
    channels, height, width = pixels.shape
    if rng.random() >= erase.probability:
        return pixels
    for _ in range(10):
        area = height * width * rng.uniform(*erase.area)
        aspect = math.exp(rng.uniform(math.log(erase.aspect[0]), math.log(erase.aspect[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            pixels[:, top : top + h, left : left + w] = (
                rng.integers(256, size=(channels, h, w), dtype=np.uint8)
                if erase.fill == "random"
                else np.round(np.array(spec.mean) * 255).astype(np.uint8)[:, None, None]
            )
            break
    return pixels
