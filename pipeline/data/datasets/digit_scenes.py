"""Scikit-learn's handwritten digits on textured canvases: a detection dataset that needs no download.

Each scene holds some digits, of random size, aspect and place, brighter or darker than the canvas around them, and two
of them hardly overlap. A box is the smallest rectangle around the ink. What a scene looks like follows from the seed,
its split and its number alone; scenes for validation hold digits that no scene for training has (`digits`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline import boxes
from pipeline.data.datasets import ArraysConfig
from pipeline.data.datasets._arrays import DIGIT_LEVELS, load_digits, written
from pipeline.errors import ConfigError
from pipeline.types import SPLITS, Float32Array, Int64Array, Objects, Record, Split, UInt8Array

MAX_IOU = 0.05  # between two digits of a scene
_TRIES = 50  # to find room for one more
_INK = 0.25  # what is fainter does not count for the box
_CELL = 16  # pixels between the points that a canvas is made of

Float64Array = npt.NDArray[np.float64]


class Config(ArraysConfig):
    """The source is embedded: there is no `root`.

    Attributes:
        size_hw: of a scene, in pixels.
        num_scenes: of train and val.
        digits: fewest and most in a scene; fewer where there is no room.
        sides: smallest and largest side of a digit's 8 x 8 cells, in pixels, before its aspect is varied by a fifth.
        seed: of all scenes.
    """

    name: Literal["digit_scenes"] = "digit_scenes"
    png: Path = Path("digit_scenes")
    size_hw: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]] = (128, 128)
    num_scenes: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1000, 200)
    digits: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = (1, 6)
    sides: tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]] = (18, 48)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ranges_rise_and_fit(self) -> Self:
        for key in ("digits", "sides"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: expected the smaller number first, got {low} and {high}")
        if self.sides[1] * 1.2 > min(self.size_hw):
            raise ValueError(f"sides: a digit of {self.sides[1]} pixels does not fit a scene of {self.size_hw}")
        return self


def class_names(config: Config) -> tuple[str, ...]:
    """The ten digits."""
    return tuple(str(digit) for digit in range(10))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Draw the scenes of one split, write the PNG files that are missing, and name them."""
    if split == "test":
        raise ConfigError("dataset 'digit_scenes' has the splits train and val only; take 'test' out of dataset.splits")
    source, labels = load_digits(split)
    number, count = SPLITS.index(split), config.num_scenes[SPLITS.index(split)]
    drawn = [
        _scene(config, source / DIGIT_LEVELS, labels, np.random.default_rng([config.seed, number, at]))
        for at in range(count)
    ]
    files = written(config.png, split, np.stack([scene.image for scene in drawn]))
    for (name, path), scene in zip(files, drawn, strict=True):
        no = np.zeros(len(scene.labels), bool)
        yield Record(name, path, split, objects=Objects(scene.boxes_xyxy, scene.labels, no, no, no))


class _Scene(NamedTuple):
    image: UInt8Array
    boxes_xyxy: Float32Array
    labels: Int64Array


def _scene(config: Config, source: Float64Array, labels: Int64Array, rng: np.random.Generator) -> _Scene:
    """One scene, of digits [N, 8, 8] in 0..1."""
    canvas = _canvas(config.size_hw, rng)
    placed, chosen = np.zeros((0, 4), np.float32), list[int]()
    for index in rng.integers(len(source), size=rng.integers(config.digits[0], config.digits[1] + 1)).tolist():
        ink = _stretched(source[index], rng.uniform(*config.sides) * rng.uniform(5 / 6, 6 / 5, 2))
        rows, columns = (np.flatnonzero((ink > _INK).any(axis=axis)) for axis in (1, 0))
        within = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        for _ in range(_TRIES):
            top, left = (
                int(rng.integers(room - side + 1)) for room, side in zip(config.size_hw, ink.shape, strict=True)
            )
            box = (within + np.array([left, top, left, top]))[None].astype(np.float32)
            if boxes.iou(box, placed).max(initial=0) <= MAX_IOU:
                _draw(canvas[top : top + ink.shape[0], left : left + ink.shape[1]], ink, rng)
                placed, chosen = np.concatenate([placed, box]), [*chosen, index]
                break
    return _Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), placed, labels[chosen])


def _canvas(size_hw: tuple[int, int], rng: np.random.Generator) -> Float64Array:
    """Soft patches of colour, with grain: [H, W, 3] in 0..255."""
    coarse = rng.uniform(50, 205, 3) + rng.normal(0, 25, (*(side // _CELL + 2 for side in size_hw), 3))
    soft = np.stack([_stretched(coarse[..., channel], np.array(size_hw)) for channel in range(3)], axis=2)
    return soft + rng.normal(0, 8, (*size_hw, 1))


def _draw(under: Float64Array, ink: Float64Array, rng: np.random.Generator) -> None:
    """Lay ink [h, w] in 0..1 over a part of a canvas, in a colour that stands out from it."""
    is_dark = under.mean() < 128
    colour = under.mean(axis=(0, 1)) + (1 if is_dark else -1) * rng.uniform(70, 120, 3)
    under += ink[..., None] * (colour - under)


def _stretched(grid: Float64Array, size_hw: Float64Array) -> Float64Array:
    """Bring [h, w] to another size, linear between the centres of its cells."""
    down, across = (_weights(round(side), cells) for side, cells in zip(size_hw.tolist(), grid.shape, strict=True))
    return down @ grid @ across.T


def _weights(num: int, cells: int) -> Float64Array:
    """How much each of `cells` counts at each of `num` evenly spaced points: [num, cells], rows add up to 1."""
    at = np.clip((np.arange(num) + 0.5) * cells / num - 0.5, 0, cells - 1)
    weights: Float64Array = np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0)
    return weights
