"""The photos of the benchmark: real JPEGs from class folders, repeated to the wanted number.

They are kept as they are and with their short side at 256. The different ones are stored once, and a photo that repeats
another shares its bytes, so that 20,000 of them cost the memory of 1,500.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import imaging, storage
from pipeline.data import datasets
from pipeline.data.datasets import DatasetConfig
from pipeline.data.transforms.resizing import shrink_short
from pipeline.errors import DataError

LISTING = "photos.json"


class Photo(NamedTuple):
    """One image of the benchmark; photos that repeat another share its bytes."""

    image_id: str
    data: bytes
    label: int


def collect(sources: Sequence[DatasetConfig]) -> Iterator[tuple[bytes, int]]:
    """Every different JPEG of the sources and its label; the classes of one source follow those of the one before.

    Raises:
        DataError: a folder is missing.
    """
    first = 0
    for source in sources:
        for split in source.splits:
            for record in datasets.records(source, split):
                data = storage.read(record.uri, record.byte_range)
                if data[:2] == b"\xff\xd8":
                    yield data, first + (record.label or 0)
        first += len(datasets.class_names(source))


def write(folder: Path, sources: Sequence[DatasetConfig], num_photos: int, short_side: int | None) -> None:
    """Store the photos, resized to `short_side` where they are larger.

    Without `short_side` they are the originals, of those only that a resize to 256 would make smaller.

    Raises:
        DataError: there is none.
    """
    folder.mkdir(parents=True)
    kept = [
        (_shrunk(data, short_side), label)
        for data, label in collect(sources)
        if short_side is not None or min(imaging.probe(data)) > 256
    ]
    if not kept:
        raise DataError(f"{', '.join(str(source.root) for source in sources)}: no JPEG to measure with; give others")
    for number, (data, _) in enumerate(kept):
        (folder / f"{number}.jpg").write_bytes(data)
    labels = [label for _, label in kept]
    (folder / LISTING).write_text(json.dumps({"num_photos": num_photos, "labels": labels}))


def read(folder: Path) -> list[Photo]:
    """All photos that were stored, repeated to the wanted number."""
    listing = json.loads((folder / LISTING).read_text())
    labels = listing["labels"]
    kept = [(folder / f"{number}.jpg").read_bytes() for number in range(len(labels))]
    repeated = itertools.islice(itertools.cycle(zip(kept, labels, strict=True)), listing["num_photos"])
    return [Photo(f"{number:07d}", data, label) for number, (data, label) in enumerate(repeated)]


def write_folders(photos: Sequence[Photo], folder: Path) -> None:
    """As files in class folders below `folder/train`."""
    for photo in photos:
        path = folder / "train" / f"{photo.label:03d}" / f"{photo.image_id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.data)


def _shrunk(data: bytes, short_side: int | None) -> bytes:
    if short_side is None or min(imaging.probe(data)) <= short_side:
        return data
    return imaging.encode_jpeg(shrink_short(imaging.decode(data), short_side), 90)
