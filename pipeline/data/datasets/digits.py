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
from pipeline.data.datasets._arrays import write_once
from pipeline.errors import ConfigError
from pipeline.types import Record, Split

LEVELS = 16  # the brightest value of the source


class Config(ArraysConfig):
    """The source is embedded: there is no `root`."""

    name: Literal["digits"] = "digits"
    png: Path = Path("digits")


def class_names(config: Config) -> tuple[str, ...]:
    """The ten digits."""
    return tuple(str(digit) for digit in range(10))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Write the PNG files of one split where they are missing, and name them."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (slow to import, needed only here)

    if split == "test":
        raise ConfigError("dataset 'digits' has the splits train and val only; take 'test' out of dataset.splits")
    source = load_digits()
    labels = source.target.astype(np.int64)
    rank_in_class = np.zeros(len(labels), np.int64)
    for digit in range(10):
        rank_in_class[labels == digit] = np.arange(np.count_nonzero(labels == digit))
    chosen = (rank_in_class % 5 == 4) == (split == "val")
    images = np.rint(source.images[chosen] * (255 / LEVELS)).astype(np.uint8)
    return write_once(config.png, split, images, labels[chosen])
