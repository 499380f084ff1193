"""The 1,797 handwritten digits that scikit-learn carries: 8x8 pixels, 17 grey levels, ink bright on black.

Source: test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI machine learning repository,
1998; CC BY 4.0). Needs no download. UCI's file is in the order of its 13 writers' forms, so every fifth row of each
class goes to validation: 1,442 train, 355 val.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.datasets import ArraysConfig
from pipeline.data.datasets._arrays import DIGIT_LEVELS, load_digits, write_once
from pipeline.errors import ConfigError
from pipeline.types import Record, Split


class Config(ArraysConfig):
    """The source is embedded: there is no `root`."""

    name: Literal["digits"] = "digits"
    png: Path = Path("digits")


def class_names(config: Config) -> tuple[str, ...]:
    """The ten digits."""
    return tuple(str(digit) for digit in range(10))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Write the PNG files of one split where they are missing, and name them."""
    if split == "test":
        raise ConfigError("dataset 'digits' has the splits train and val only; take 'test' out of dataset.splits")
    images, labels = load_digits(split)
    return write_once(config.png, split, np.rint(images * (255 / DIGIT_LEVELS)).astype(np.uint8), labels)
