"""What the layouts with boxes share: where a split's parts lie, what lies there, and small texts read whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline import storage
from pipeline.data.datasets import DatasetConfig
from pipeline.data.datasets.image_folder import walk
from pipeline.errors import ConfigError, DataError
from pipeline.types import BoolArray, Float32Array, Int64Array, Objects, Region, Split

PerSplit = str | dict[Split, str]
"""A configuration field that differs between splits: one text in which `{split}` is replaced, or a text for each."""

MAX_PIXELS = 1e7  # beyond any image: a coordinate that is larger was not meant
MAX_TEXT_BYTES = 64 * 2**20  # of a list of images, an annotation of one image: thousands of times what they need


def of_split(config: DatasetConfig, field: str, split: Split) -> str:
    """The value of a `PerSplit` field for one split.

    Raises:
        ConfigError: it names other splits only.
    """
    value: PerSplit = getattr(config, field)
    if isinstance(value, str):
        return value.replace("{split}", split)
    if split not in value:
        raise ConfigError(f"dataset.{field}: expected a value for each split, got none for '{split}'; add it")
    return value[split]


def listing(folder: str) -> dict[str, storage.File]:
    """Every visible file below a folder by its name there, the parts separated by `/`, in a stable order.

    Raises:
        DataError: the folder cannot be listed.
    """
    return {file.name: file for file in walk(folder)}


def read_small(uri: str) -> bytes:
    """A whole file that should be small.

    Raises:
        DataError: it cannot be read, or is far too large to be what it should be.
    """
    try:
        with storage.open_input(uri) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise DataError(f"{uri}: cannot be read: {storage.reason(error)}") from None
    if len(data) > MAX_TEXT_BYTES:
        raise DataError(f"{uri}: expected at most {MAX_TEXT_BYTES >> 20} MiB for such a file, got more")
    return data


def lines(uri: str) -> list[str]:
    """The lines of a text without blanks around them; empty ones stay, so that an index is a line number."""
    text = read_small(uri).decode("utf-8-sig", "surrogateescape")  # a name of a local file can have any bytes
    return [line.strip() for line in text.split("\n")]


def objects(
    boxes_xyxy: Float32Array,
    labels: Sequence[int] | Int64Array,
    *,
    difficult: Sequence[bool] | BoolArray | None = None,
    truncated: Sequence[bool] | BoolArray | None = None,
    crowd: Sequence[bool] | BoolArray | None = None,
    regions: tuple[Region, ...] = (),
    frame_hw: tuple[int, int] | None = None,
) -> Objects:
    """Labelled boxes whose format does not know every flag: those not given are False."""
    none = np.zeros(len(labels), np.bool_)
    return Objects(
        boxes_xyxy,
        np.asarray(labels, np.int64),
        difficult=none if difficult is None else np.asarray(difficult, np.bool_),
        truncated=none if truncated is None else np.asarray(truncated, np.bool_),
        crowd=none if crowd is None else np.asarray(crowd, np.bool_),
        regions=regions,
        frame_hw=frame_hw,
    )
