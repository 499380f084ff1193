"""From draws to the columns of batches: rows are read, decoded, varied. The same code wherever it runs; no Ray.

The pixels are those of `transforms.classify` or `transforms.detect`, or on a GPU of `gpu_decoding`. Who calls this, in
which process, is the business of `pipeline.data.readers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline import imaging
from pipeline.batch import stacked
from pipeline.data import gpu_decoding, shards
from pipeline.data.proposals import Proposals
from pipeline.data.streams import Streams
from pipeline.data.transforms import classify, detect
from pipeline.data.transforms.scenes import NO_REGIONS
from pipeline.errors import DataError, ImageError
from pipeline.types import (
    DetectorSpec,
    Float32Array,
    Frame,
    InputSpec,
    Int64Array,
    Objects,
    Spec,
    Split,
    UInt8Array,
    no_objects,
)

Columns = dict[str, Any]
"""One batch: image uint8 [B, C, H, W], label int64 [B], frame float64 [B, 8], id text [B]; where boxes are read, also
`objects`, a list of B; where proposals are, `proposals`, a list of B float32 [P, 4] in pixels of the input."""
Empty = Callable[[tuple[int, ...]], UInt8Array]
"""Gives memory for pictures of a shape, uninitialised."""


@dataclass(frozen=True)
class Reading:
    """All that `read_batches` needs beside the draws; travels to the tasks."""

    source: shards.Shards
    split: Split
    spec: Spec
    batches_per_read: int
    augment: classify.Augment | detect.Augment | None = None
    seed: int = 0
    epoch: int = 0
    decoder: gpu_decoding.Decoder | None = None  # None decodes on the CPU
    proposals: Proposals | None = None

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Of one picture in a batch: channels, height, width; None where each batch has its own."""
        if isinstance(self.spec, InputSpec):
            return (self.spec.num_channels, *self.spec.size_hw)
        return None if self.spec.fit.way == "resize" else (self.spec.num_channels, *self.spec.fit.size_hw)


class Encoded(NamedTuple):
    """What a batch needs of one row; `objects` where boxes are read, `proposals` (original pixels) where they are."""

    image_id: str
    image: bytes
    label: int
    objects: Objects
    proposals: Float32Array


_MARKS = ("box_labels", "difficult", "truncated", "crowd")
_COLUMNS: dict[type, list[str]] = {
    InputSpec: ["image_id", "image", "label"],
    DetectorSpec: ["image_id", "image", "label", "boxes", *_MARKS],
}
_NONE = no_objects()


def _in_memory(shape: tuple[int, ...]) -> UInt8Array:
    return np.empty(shape, np.uint8)


def read_batches(reading: Reading, batches: list[Int64Array], empty: Empty = _in_memory) -> Iterator[Columns]:
    """Read, decode and transform draws, in their order, as the columns of batches.

    Args:
        reading: what to read and how.
        batches: draws of each.
        empty: makes the memory that the pictures of a batch are written to.

    Raises:
        DataError: a shard cannot be read, or holds an image that does not decode.
    """
    num_rows, streams = reading.source.manifest.num_rows(reading.split), Streams(reading.seed, reading.epoch)
    for at in range(0, len(batches), reading.batches_per_read):
        together = batches[at : at + reading.batches_per_read]
        encoded = _read_rows(reading, np.unique(np.concatenate(together) % num_rows))
        for batch in together:
            yield _columns(reading, batch, [encoded[row] for row in (batch % num_rows).tolist()], streams, empty)


def _read_rows(reading: Reading, rows: Int64Array) -> dict[int, Encoded]:
    """What is stored of sorted rows."""
    files = reading.source.manifest.of(reading.split)
    file_starts = np.cumsum([0, *(shard.num_rows for shard in files)])
    encoded: dict[int, Encoded] = {}
    for shard, (start, stop) in zip(files, pairwise(file_starts.tolist()), strict=True):
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
        if not len(inside):
            continue
        group_starts = np.cumsum([0, *shard.row_groups])
        groups = np.unique(np.searchsorted(group_starts, inside, side="right") - 1)
        table = shards.read(reading.source.path / shard.name, groups.tolist(), _COLUMNS[type(reading.spec)])
        held = np.concatenate([np.arange(*group_starts[group : group + 2]) for group in groups])
        places = np.searchsorted(held, inside).tolist()
        images = itertools.chain.from_iterable(map(_slices, table.column("image").chunks))
        wanted = set(places)
        found = [bytes(view) for at, view in enumerate(images) if at in wanted]
        marks = table.drop_columns(["image"]).take(places).to_pylist()
        encoded |= {
            row: Encoded(mark["image_id"], image, mark["label"], _objects(reading, mark), _proposals(reading, mark))
            for row, mark, image in zip((inside + start).tolist(), marks, found, strict=True)
        }
    return encoded


def _objects(reading: Reading, row: dict[str, Any]) -> Objects:
    """What is in an image, where boxes are read."""
    if isinstance(reading.spec, InputSpec):
        return _NONE
    if row["boxes"] is None:
        raise DataError(
            f"{reading.source.path}: image '{row['image_id']}' has no annotation of objects, and a detector would "
            "learn that there are none; make shards of annotated images only"
        )
    difficult, truncated, crowd = (np.array(row[flag], bool) for flag in _MARKS[1:])
    boxes_xyxy, labels = np.array(row["boxes"], np.float32), np.array(row["box_labels"], np.int64)
    return Objects(boxes_xyxy.reshape(-1, 4), labels, difficult, truncated, crowd)


def _proposals(reading: Reading, row: dict[str, Any]) -> Float32Array:
    """Where an image may hold objects, if that is read."""
    return NO_REGIONS if reading.proposals is None else reading.proposals.of(row["image_id"])


def _slices(images: Any) -> Iterator[memoryview]:
    """The bytes of an Arrow array of binaries, without a copy; a scalar of each would take longer than copying it."""
    _, offsets, data = images.buffers()
    bounds = np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1].tolist()
    return (memoryview(data)[start:stop] for start, stop in pairwise(bounds))


def _columns(reading: Reading, draws: Int64Array, encoded: list[Encoded], streams: Streams, empty: Empty) -> Columns:
    """One batch."""
    pixels: UInt8Array | torch.Tensor
    if isinstance(reading.spec, DetectorSpec):
        pixels, frames, more = _scenes(reading, reading.spec, draws.tolist(), encoded, streams, empty)
    else:
        views = _views if reading.decoder is None else _views_on_device
        pixels, frames = views(reading, draws.tolist(), encoded, streams, empty)
        more = {"label": np.array([row.label for row in encoded], np.int64)}
    numbers = [(*frame.original_hw, *frame.input_hw, *frame.scale_xy, *frame.offset_xy) for frame in frames]
    return {
        "image": pixels,
        "frame": np.array(numbers, np.float64),
        "id": np.array([row.image_id for row in encoded]),
        **more,
    }


def _scenes(
    reading: Reading, spec: DetectorSpec, draws: list[int], encoded: list[Encoded], streams: Streams, empty: Empty
) -> tuple[UInt8Array, list[Frame], Columns]:
    """Pixels, frames and marks of one batch for a detector; objects are in the pixels that the frames map from."""
    views, objects, decoding = [], [], reading.source.manifest.decoding
    for place, (draw, row) in enumerate(zip(draws, encoded, strict=True)):
        if reading.augment is None:
            with _naming(reading, row.image_id):
                view = detect.evaluation(row.image, spec.fit, row.objects, None, decoding, row.proposals)
            objects.append(row.objects)
        else:
            view = _varied(reading, spec, encoded, place, streams.of(draw))
            objects.append(view.objects)
        views.append(view)
    more: Columns = {"objects": objects}
    if reading.proposals is not None:
        more["proposals"] = [view.proposals for view in views]
    return stacked([view.image for view in views], empty), [view.frame for view in views], more


def _varied(
    reading: Reading, spec: DetectorSpec, encoded: list[Encoded], place: int, rng: np.random.Generator
) -> detect.View:
    """The training view of one row of a batch; the other pictures of a mosaic are others of the batch."""
    augment, scenes = reading.augment, []
    assert isinstance(augment, detect.Augment)
    others = np.delete(np.arange(len(encoded)), place)
    chosen = rng.choice(others, detect.num_scenes(augment, rng) - 1, replace=False).tolist()
    for row in (encoded[at] for at in (place, *chosen)):
        with _naming(reading, row.image_id):
            scenes.append(detect.read(row.image, row.objects, None, reading.source.manifest.decoding, row.proposals))
    return detect.training(scenes, spec.fit, augment, rng)


def _views(
    reading: Reading, draws: list[int], encoded: list[Encoded], streams: Streams, empty: Empty
) -> tuple[UInt8Array, list[Frame]]:
    """Pixels and frames of one batch; each picture is written to its place once."""
    assert reading.image_shape is not None
    pixels, frames = empty((len(draws), *reading.image_shape)), []
    for place, (draw, row) in enumerate(zip(draws, encoded, strict=True)):
        with _naming(reading, row.image_id):
            pixels[place], frame = _view(reading, streams, draw, row.image)
        frames.append(frame)
    return pixels, frames


def _view(reading: Reading, streams: Streams, draw: int, data: bytes) -> tuple[UInt8Array, Frame]:
    spec, augment, decoding = reading.spec, reading.augment, reading.source.manifest.decoding
    assert isinstance(spec, InputSpec)
    if augment is None:
        return classify.evaluation(data, spec, decoding)
    assert isinstance(augment, classify.Augment)
    pixels = classify.training(data, spec, augment, streams.of(draw), decoding)
    return pixels, Frame(spec.size_hw, spec.size_hw)


def _views_on_device(
    reading: Reading, draws: list[int], encoded: list[Encoded], streams: Streams, _: Empty
) -> tuple[torch.Tensor, list[Frame]]:
    """The same of a training batch, on the device."""
    decoder, spec = reading.decoder, reading.spec
    assert decoder is not None
    assert isinstance(spec, InputSpec)

    def on_cpu(place: int) -> UInt8Array:
        row = encoded[place]
        with _naming(reading, row.image_id):
            return imaging.decode(row.image, reading.source.manifest.decoding, min_short=decoder.min_short)

    pixels = decoder.batch([row.image for row in encoded], map(streams.of, draws), on_cpu)
    return pixels, [Frame(spec.size_hw, spec.size_hw)] * len(draws)


@contextmanager
def _naming(reading: Reading, image_id: str) -> Iterator[None]:
    """Say which image it is that does not decode."""
    try:
        yield
    except ImageError as error:
        raise DataError(
            f"{reading.source.path}: image '{image_id}' does not decode: {error}; run jobs.verify"
        ) from None
