"""The pictures behind a change of mind, small enough to lie within a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from pipeline import imaging
from pipeline.data import lookup, shards
from pipeline.data.transforms.resizing import resize_interleaved
from pipeline.errors import DataError, ImageError
from pipeline.tracking.comparison.evidence import Trial
from pipeline.types import UInt8Array

SIDE_PX = 112


def thumbnails(trial: Trial, ids: Sequence[str]) -> dict[str, str]:
    """Data URIs of pictures that a run was evaluated on, by image id; none where its shards cannot be reached.

    They may have been moved, or made anew from other images since: then ids must do.
    """
    try:
        source = shards.load(Path(trial.source))
        if not trial.source or source.manifest.digest != trial.digest:
            return {}
        found = lookup.images(source, trial.split, ids)
    except DataError:
        return {}
    drawn = {image_id: _thumbnail(data, source.manifest.decoding) for image_id, data in found.items()}
    return {image_id: uri for image_id, uri in drawn.items() if uri}


def _thumbnail(data: bytes, decoding: imaging.Decoding) -> str:
    try:
        image = imaging.decode(data, decoding, min_short=SIDE_PX)
    except ImageError:
        return ""
    shown, fitted = lookup.visible(image), _fitted(image)
    small = fitted == image.shape[:2]  # digits and icons: keep every pixel as it is
    encoded = imaging.encode_png(shown) if small else imaging.encode_jpeg(resize_interleaved(shown, fitted), quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(encoded).decode()}"


def _fitted(image: UInt8Array) -> tuple[int, int]:
    """Height and width within the thumbnail; small pictures keep theirs, and the page enlarges them."""
    height, width = image.shape[:2]
    shrink = min(1.0, SIDE_PX / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))
