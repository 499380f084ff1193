"""The most confident errors as one sheet of pictures: a quick way to see wrong labels, odd images and a blind spot.

Every picture says what it is and what the model took it for, with both scores.
"""

from __future__ import annotations

import numpy as np

from pipeline import imaging
from pipeline.data import lookup, shards
from pipeline.data.sheet import Tile, sheet
from pipeline.errors import ImageError
from pipeline.tracking.predictions import Predictions
from pipeline.types import Int64Array

MAX_ERRORS = 48
_DETAIL_PX = 256


def most_confident(predictions: Predictions, limit: int = MAX_ERRORS) -> Int64Array:
    """The rows of the wrong answers, those of the highest scores first; of equal ones, by image id."""
    wrong = np.flatnonzero(~predictions.right())
    order = np.argsort(-predictions.confidence[wrong], kind="stable")
    return wrong[order][:limit]


def error_sheet(
    predictions: Predictions, source: shards.Shards, limit: int = MAX_ERRORS, tile_px: int = 144
) -> bytes | None:
    """A PNG of the most confident errors with their pictures; None where there is no error.

    Raises:
        DataError: a shard cannot be read.
    """
    rows = most_confident(predictions, limit).tolist()
    if not rows:
        return None
    found = lookup.images(source, predictions.origin.split, predictions.ids[rows])
    return sheet([_tile(predictions, row, found, source.manifest.decoding) for row in rows], tile_px=tile_px)


def _tile(predictions: Predictions, row: int, found: dict[str, bytes], decoding: imaging.Decoding) -> Tile:
    classes, image_id = predictions.origin.classes, predictions.ids[row]
    took = f"{classes[predictions.predicted[row]]} {predictions.confidence[row]:.2f}"
    caption = f"took for {took}\nis {classes[predictions.labels[row]]} {predictions.label_scores[row]:.2f}"
    try:
        image = imaging.decode(found[image_id], decoding, min_short=_DETAIL_PX)
    except (KeyError, ImageError) as error:
        return Tile(None, caption, message=f"{image_id}: {error}")
    return Tile(lookup.visible(image), caption)
