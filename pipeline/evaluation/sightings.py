"""What a detector saw in every image of a split, beside what is there: the evidence behind a detection report.

A Parquet file of one row an image; and sheets of the best and the worst images, with right boxes in green, wrong ones
in red and missed objects in blue. No torch, no MLflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import boxes, imaging
from pipeline.data import lookup, shards
from pipeline.data.sheet import Tile, sheet
from pipeline.errors import ImageError
from pipeline.evaluation.detect import IGNORED, RIGHT, judge
from pipeline.types import BoolArray, Detections, Float32Array, Objects, Split

PER_SHEET = 12
_BOXES = pa.list_(pa.list_(pa.float32(), 4))
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("boxes", _BOXES),  # as x_min, y_min, x_max, y_max in pixels of the upright original; best first
        ("labels", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("true_boxes", _BOXES),
        ("true_labels", pa.list_(pa.int64())),
        ("true_difficult", pa.list_(pa.bool_())),
    ]
)
_GREEN, _RED, _BLUE = 7, 0, 1  # labels of these colours in a sheet
_DETAIL_PX = 480


@dataclass(frozen=True, eq=False)
class Sighting:
    """One image: what was found, and what is there."""

    image_id: str
    found: Detections
    objects: Objects

    def above(self, score: float) -> Sighting:
        """With the detections of at least this score only."""
        return Sighting(self.image_id, self.found.best(score), self.objects)


@dataclass(frozen=True, eq=False)
class Marked:
    """A sighting by VOC's rule: which detections are right or neither, and which objects were missed."""

    sighting: Sighting
    right: BoolArray
    ignored: BoolArray
    missed: BoolArray

    @classmethod
    def of(cls, sighting: Sighting, num_classes: int) -> Marked:
        """Match; the detections come best first."""
        found, objects = sighting.found, sighting.objects
        codes = judge(found, objects, sighting.image_id, num_classes).voc
        near = boxes.iou(found.boxes_xyxy, objects.boxes_xyxy)
        near = np.where(found.labels[:, None] == objects.labels[None, :], near, -1.0)
        missed = ~(objects.difficult | objects.crowd)
        right = codes == RIGHT
        missed[near.argmax(axis=1)[right] if len(objects) else []] = False
        return cls(sighting, right, codes == IGNORED, missed)

    @property
    def num_wrong(self) -> int:
        """Wrong detections and missed objects."""
        return int((~self.right & ~self.ignored).sum() + self.missed.sum())


def write(sightings: Sequence[Sighting], path: Path) -> None:
    """Write as Parquet, sorted by image id; equal sightings make equal files."""
    ordered = sorted(sightings, key=lambda one: one.image_id)
    columns = {
        "image_id": [one.image_id for one in ordered],
        "boxes": [one.found.boxes_xyxy.tolist() for one in ordered],
        "labels": [one.found.labels for one in ordered],
        "scores": [one.found.scores for one in ordered],
        "true_boxes": [one.objects.boxes_xyxy.tolist() for one in ordered],
        "true_labels": [one.objects.labels for one in ordered],
        "true_difficult": [one.objects.difficult for one in ordered],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def sheets(
    sightings: Sequence[Sighting], source: shards.Shards, split: Split, score: float, tile_px: int = 320
) -> dict[str, bytes]:
    """PNGs of the images with the most and the fewest mistakes, by name; only detections of at least `score` count.

    Of equal ones, those with more objects come first.

    Raises:
        DataError: a shard cannot be read.
    """
    classes = source.manifest.classes
    marked = [Marked.of(one.above(score), len(classes)) for one in sightings]
    ranked = sorted(marked, key=lambda one: (one.num_wrong, -len(one.sighting.objects), one.sighting.image_id))
    worst = sorted(ranked, key=lambda one: -one.num_wrong)
    chosen = {"best": ranked[:PER_SHEET], "worst": worst[:PER_SHEET]}
    found = lookup.images(source, split, {one.sighting.image_id for ones in chosen.values() for one in ones})
    return {
        name: sheet([_tile(one, found, source.manifest) for one in ones], columns=4, tile_px=tile_px)
        for name, ones in chosen.items()
    }


def _tile(marked: Marked, images: dict[str, bytes], manifest: shards.Manifest) -> Tile:
    sighting = marked.sighting
    caption = f"{int(marked.right.sum())} right, {marked.num_wrong} wrong or missed\n{sighting.image_id}"
    try:
        encoded = images[sighting.image_id]
        upright_hw = imaging.probe(encoded, manifest.decoding)
        image = imaging.decode(encoded, manifest.decoding, min_short=_DETAIL_PX)
    except (KeyError, ImageError) as error:
        return Tile(None, caption, message=f"{sighting.image_id}: {error}")
    shown, missed = ~marked.ignored, marked.missed
    places: Float32Array = np.concatenate(
        [sighting.found.boxes_xyxy[shown], sighting.objects.boxes_xyxy[missed]], axis=0
    )
    colours = [*np.where(marked.right[shown], _GREEN, _RED).tolist(), *[_BLUE] * int(missed.sum())]
    said = zip(sighting.found.labels[shown].tolist(), sighting.found.scores[shown].tolist(), strict=True)
    captions = (
        *(f"{manifest.classes[label]} {score:.2f}" for label, score in said),
        *(manifest.classes[label] for label in sighting.objects.labels[missed].tolist()),
    )
    scaled = boxes.scale(places, upright_hw, image.shape[:2])
    return Tile(lookup.visible(image), caption, scaled, np.array(colours, np.int64), captions)
