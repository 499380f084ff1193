"""From draws to the columns of batches: rows are read, decoded, varied. The same code wherever it runs; no Ray.

The pixels are `transforms.classify`'s, or on a GPU `gpu_decoding`'s. Who calls this, in which process, is the business
of `pipeline.data.readers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pipeline import imaging
from pipeline.data import gpu_decoding, shards
from pipeline.data.streams import Streams
from pipeline.data.transforms import classify
from pipeline.errors import DataError, ImageError
from pipeline.types import Frame, InputSpec, Int64Array, Split, UInt8Array

Columns = dict[str, Any]
"""The columns of one batch: image uint8 [B, C, H, W], label int64 [B], frame float64 [B, 6], id text [B]."""
Encoded = tuple[str, bytes, int]
"""Id, encoded image and label of one row."""
Empty = Callable[[tuple[int, ...]], UInt8Array]
"""Gives memory for pictures of a shape, uninitialised."""


@dataclass(frozen=True)
class Reading:
    """All that `read_batches` needs beside the draws; travels to the tasks."""

    source: shards.Shards
    split: Split
    spec: InputSpec
    batches_per_read: int
    augment: classify.Augment | None = None
    seed: int = 0
    epoch: int = 0
    decoder: gpu_decoding.Decoder | None = None  # None decodes on the CPU

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one picture in a batch: channels, height, width."""
        return (self.spec.num_channels, *self.spec.size_hw)


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
        table = shards.read(reading.source.path / shard.name, groups.tolist(), ["image_id", "image", "label"])
        held = np.concatenate([np.arange(*group_starts[group : group + 2]) for group in groups])
        places = np.searchsorted(held, inside).tolist()
        images = itertools.chain.from_iterable(map(_slices, table.column("image").chunks))
        wanted = set(places)
        found = [bytes(view) for at, view in enumerate(images) if at in wanted]
        ids, labels = table.column("image_id").to_pylist(), table.column("label").to_pylist()
        encoded |= {
            row: (ids[at], image, labels[at])
            for row, at, image in zip((inside + start).tolist(), places, found, strict=True)
        }
    return encoded


def _slices(images: Any) -> Iterator[memoryview]:
    """The bytes of an Arrow array of binaries, without a copy; a scalar of each would take longer than copying it."""
    _, offsets, data = images.buffers()
    bounds = np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1].tolist()
    return (memoryview(data)[start:stop] for start, stop in pairwise(bounds))


def _columns(reading: Reading, draws: Int64Array, encoded: list[Encoded], streams: Streams, empty: Empty) -> Columns:
    """One batch."""
    views = _views if reading.decoder is None else _views_on_device
    pixels, frames = views(reading, draws.tolist(), encoded, streams, empty)
    return {
        "image": pixels,
        "label": np.array([label for _, _, label in encoded], np.int64),
        "frame": np.array([(*frame.original_hw, *frame.scale_xy, *frame.offset_xy) for frame in frames], np.float64),
        "id": np.array([image_id for image_id, _, _ in encoded]),
    }


def _views(
    reading: Reading, draws: list[int], encoded: list[Encoded], streams: Streams, empty: Empty
) -> tuple[UInt8Array, list[Frame]]:
    """Pixels and frames of one batch; each picture is written to its place once."""
    pixels, frames = empty((len(draws), *reading.image_shape)), []
    for place, (draw, (image_id, data, _)) in enumerate(zip(draws, encoded, strict=True)):
        with _naming(reading, image_id):
            pixels[place], frame = _view(reading, streams, draw, data)
        frames.append(frame)
    return pixels, frames


def _view(reading: Reading, streams: Streams, draw: int, data: bytes) -> tuple[UInt8Array, Frame]:
    decoding = reading.source.manifest.decoding
    if reading.augment is None:
        return classify.evaluation(data, reading.spec, decoding)
    pixels = classify.training(data, reading.spec, reading.augment, streams.of(draw), decoding)
    return pixels, Frame(reading.spec.size_hw, reading.spec.size_hw)


def _views_on_device(
    reading: Reading, draws: list[int], encoded: list[Encoded], streams: Streams, _: Empty
) -> tuple[torch.Tensor, list[Frame]]:
    """The same of a training batch, on the device."""
    decoder = reading.decoder
    assert decoder is not None

    def on_cpu(place: int) -> UInt8Array:
        image_id, data, _ = encoded[place]
        with _naming(reading, image_id):
            return imaging.decode(data, reading.source.manifest.decoding, min_short=decoder.min_short)

    pixels = decoder.batch([data for _, data, _ in encoded], map(streams.of, draws), on_cpu)
    return pixels, [Frame(reading.spec.size_hw, reading.spec.size_hw)] * len(draws)


@contextmanager
def _naming(reading: Reading, image_id: str) -> Iterator[None]:
    """Say which image it is that does not decode."""
    try:
        yield
    except ImageError as error:
        raise DataError(
            f"{reading.source.path}: image '{image_id}' does not decode: {error}; run jobs.verify"
        ) from None
