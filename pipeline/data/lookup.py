"""Stored pictures by image id: what a sheet of errors or a comparison wants to show. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from pipeline.data import shards
from pipeline.types import Split, UInt8Array


def images(source: shards.Shards, split: Split, ids: Iterable[str]) -> dict[str, bytes]:
    """The encoded images with these ids; those that the split does not hold are left out.

    Ids are read of all rows, pictures only of the row groups that hold a wanted one, one group in memory at a time.

    Raises:
        DataError: there is no such split, or a shard cannot be read.
    """
    wanted = set(ids)
    found: dict[str, bytes] = {}
    for shard in source.manifest.of(split) if wanted else ():
        path = source.path / shard.name
        here = shards.read(path, range(len(shard.row_groups)), ["image_id"]).column("image_id").to_pylist()
        rows = [row for row, image_id in enumerate(here) if image_id in wanted]
        starts = np.cumsum([0, *shard.row_groups])
        for group in np.unique(np.searchsorted(starts, rows, side="right") - 1).tolist():
            table = shards.read(path, [group], ["image_id", "image"])
            for row in (row for row in rows if starts[group] <= row < starts[group + 1]):
                found[here[row]] = table.column("image")[row - int(starts[group])].as_py()
    return found


def in_order(source: shards.Shards, split: Split) -> Iterator[tuple[str, bytes]]:
    """Id and encoded image of every row of a split as they lie there, one row group in memory at a time.

    Raises:
        DataError: there is no such split, or a shard cannot be read.
    """
    for shard in source.manifest.of(split):
        for group in range(len(shard.row_groups)):
            table = shards.read(source.path / shard.name, [group], ["image_id", "image"])
            yield from zip(table.column("image_id").to_pylist(), table.column("image").to_pylist(), strict=True)


def visible(image: UInt8Array) -> UInt8Array:
    """Any number of bands as RGB [H, W, 3]: the first three as colours, fewer as grey."""
    if image.shape[2] >= 3:
        return np.ascontiguousarray(image[:, :, :3])
    return image[:, :, :1].repeat(3, axis=2)
