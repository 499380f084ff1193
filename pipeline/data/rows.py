"""From records to the rows of one shard: read, check, resize, count; a pure function of the files, without Ray.

Every image is decoded here, so that nothing undecodable reaches training: what fails is turned away with its reason.
Training images that only carry a class may be stored with their short side resized; all others keep their original
bytes, so that offline and served answers can be equal and boxes stay where they are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipeline import boxes, imaging, masks, storage
from pipeline.config import Strict
from pipeline.data import shards
from pipeline.errors import DataError, ImageError
from pipeline.types import Objects, Record, Split, UInt8Array

PIXEL_STEP = 4  # every fourth pixel across and down is counted: 16 times less work for the same mean
DIGEST_MODULUS = 1 << 256
_ANY_SIZE = imaging.Decoding(max_pixels=89_000_000, max_side=65_535)
ANNOTATION = ("label", "boxes", "box_labels", "difficult", "truncated", "crowd", "mask")  # what an image means
MAX_STRETCH = 0.05  # rounding the sides of a small copy changes its aspect by so much at most


class Config(Strict):
    """How images become rows.

    Attributes:
        train_short_side: training images whose short side is longer are resized to it and stored as `train_format`;
            None keeps the original bytes. Images with boxes or a mask always keep them.
        train_format: `jpeg`; or `decoded`, which stores all training images without boxes or a mask as plain pixels
            (NPY), resized or not: ten times the bytes, and nothing to decode, for disks faster than the decoder. Then
            take `rows_per_group: 8`, for whole row groups are read, and a batch comes from 16 of them.
        jpeg_quality: of the resized training images.
        rows_per_group: images in a Parquet row group, the unit of random access.
        max_bytes: of a file, or of its part where it is a tar, that is taken for an image or a mask: a larger one, such
            as a backup that lies among the photos, is turned away before it fills the memory.
    """

    train_short_side: int | None = Field(default=256, ge=8)
    train_format: Literal["jpeg", "decoded"] = "jpeg"
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    rows_per_group: int = Field(default=128, ge=1)
    max_bytes: int = Field(default=1 << 29, ge=1, lt=1 << 31)  # what a row can hold
    decoding: imaging.Decoding = imaging.Decoding()

    @property
    def stores_npy(self) -> bool:
        """Whether pictures that are not kept as they are become NPY: JPEG has no bands."""
        return self.train_format == "decoded" or self.decoding.num_channels != 3


class Reject(Strict):
    """An image, or one box of it, that was left out, and why; `class_name` is its index as text until it is named."""

    image_id: str
    uri: str
    split: Split
    class_name: str
    reason: str
    message: str
    byte_range: tuple[int, int] | None = None


class Made(Strict):
    """What became of the records of one shard.

    Attributes:
        shard: what was written; None where no image could be used.
        num_records: images that were looked at.
        class_counts: images of each label.
        object_counts: boxes of each label.
        digest: sum over the rows, modulo 2**256, of the sha256 of what each means; parts can be added in any order.
    """

    shard: shards.Shard | None
    num_records: int
    class_counts: dict[int, int]
    object_counts: dict[int, int]
    digest: str
    pixels: shards.Pixels | None
    sizes: shards.Sizes | None
    rejects: tuple[Reject, ...]


class _Counts:
    """What is counted while the rows of a shard go by."""

    def __init__(self) -> None:
        self.classes: Counter[int] = Counter()
        self.objects: Counter[int] = Counter()
        self.digest = 0
        self.num_pixels = 0
        self.sums: Any = 0
        self.products: Any = 0
        self.sizes_hw: list[tuple[int, int]] = []

    def add(self, row: dict[str, Any], image: UInt8Array) -> None:
        if row["label"] is not None:
            self.classes[row["label"]] += 1
        self.objects.update(row["box_labels"] or ())
        meaning = [row[name] for name in ("image_id", "label", "boxes", "box_labels", "sha256")]
        if row["mask"] is not None:
            meaning.append(_digest_of_mask(row["mask"]))
        self.digest += int.from_bytes(hashlib.sha256(json.dumps(meaning).encode()).digest(), "big")
        self.sizes_hw.append((row["original_height"], row["original_width"]))
        # Exact: sums of products of bytes stay below 2**53 for any image that is accepted.
        levels = image[::PIXEL_STEP, ::PIXEL_STEP].transpose(2, 0, 1).astype(np.float64, order="C")
        levels = levels.reshape(len(levels), -1)  # [C, N]
        self.num_pixels += levels.shape[1]
        self.sums = self.sums + levels.sum(axis=1).astype(np.int64)
        self.products = self.products + (levels @ levels.T).astype(np.int64)

    @property
    def pixels(self) -> shards.Pixels | None:
        if not self.sizes_hw:
            return None
        sums, products = self.sums.tolist(), map(tuple, self.products.tolist())
        return shards.Pixels(num=self.num_pixels, sums=tuple(sums), products=tuple(products))

    @property
    def sizes(self) -> shards.Sizes | None:
        if not self.sizes_hw:
            return None
        sides = list(zip(*self.sizes_hw, strict=True))
        smallest, largest, total = ((f(sides[0]), f(sides[1])) for f in (min, max, sum))
        return shards.Sizes(num=len(self.sizes_hw), smallest_hw=smallest, largest_hw=largest, sum_hw=total)


def make_shard(
    path: Path, split: Split, records: Iterable[Record], config: Config, scratch: Path | None = None
) -> Made:
    """Read, check and store the images of one shard.

    Args:
        path: of the shard, which appears whole or not at all.
        split: of the records.
        records: in the order of the rows.
        config: how images become rows.
        scratch: folder for the unfinished file; the shard's own by default.

    Raises:
        DataError: the shard cannot be written.
    """
    counts, rejects, num_records = _Counts(), list[Reject](), 0
    try:
        with shards.Writer(path, split, config.rows_per_group, scratch) as writer:
            for record in records:
                num_records += 1
                try:
                    row, image = _row(record, config, rejects)
                except ImageError as error:
                    rejects.append(_reject(record, record.label, error.reason, str(error)))
                else:
                    writer.add(row)
                    counts.add(row, image)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else storage.reason(error)  # Arrow says which call failed
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        what = "free some space and run again, finished shards are kept" if full else "mend that and run again"
        raise DataError(f"{path}: cannot be written: {why}; {what}") from None
    return Made(
        shard=writer.shard,
        num_records=num_records,
        class_counts=dict(counts.classes),
        object_counts=dict(counts.objects),
        digest=f"{counts.digest % DIGEST_MODULUS:064x}",
        pixels=counts.pixels,
        sizes=counts.sizes,
        rejects=tuple(rejects),
    )


def is_usable(record: Record, config: Config) -> bool:
    """Whether an image would not be turned away."""
    try:
        _row(record, config, [])
    except ImageError:
        return False
    return True


def annotation(record: Record, original_hw: tuple[int, int], config: Config, rejects: list[Reject]) -> dict[str, Any]:
    """The columns `ANNOTATION` of a row.

    Raises:
        ImageError: the objects or the mask do not fit an image of this size, or the mask cannot be read.
    """
    objects, mask = _annotation(record, original_hw, config.max_bytes, rejects)
    fields = ("boxes_xyxy", "labels", "difficult", "truncated", "crowd")
    values = [None if objects is None else getattr(objects, name).tolist() for name in fields]
    return dict(zip(ANNOTATION, (record.label, *values, mask), strict=True))


def meaning(row: Mapping[str, Any]) -> str:
    """The columns `ANNOTATION` of a row as text, one for each meaning."""
    *values, mask = (row[name] for name in ANNOTATION)
    return json.dumps([*values, None if mask is None else _digest_of_mask(mask)])


def _row(record: Record, config: Config, rejects: list[Reject]) -> tuple[dict[str, Any], UInt8Array]:
    """One row, and the picture that it stores."""
    data = _read(record.uri, config.max_bytes, record.byte_range)
    original_hw = imaging.probe(data, config.decoding)
    stored, image = _stored(record, data, original_hw, config)
    row = {
        "image_id": record.image_id,
        "image": stored,
        "height": image.shape[0],
        "width": image.shape[1],
        "original_height": original_hw[0],
        "original_width": original_hw[1],
        "original_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return row | annotation(record, original_hw, config, rejects), image


def _stored(record: Record, data: bytes, original_hw: tuple[int, int], config: Config) -> tuple[bytes, UInt8Array]:
    """The bytes to keep of an image, and their pixels."""
    if record.split != "train" or record.objects is not None or record.mask_uri is not None:
        return data, imaging.decode(data, config.decoding)
    short = config.train_short_side
    shrinks = short is not None and min(original_hw) > short
    image = imaging.decode(data, config.decoding, min_short=short if shrinks else None)
    if short is not None and shrinks:
        image = _shrunk(image, short)
    if config.stores_npy and (shrinks or config.train_format == "decoded"):
        return imaging.encode_npy(image), image
    return imaging.encode_jpeg(image, config.jpeg_quality) if shrinks else data, image


def _shrunk(image: UInt8Array, short: int) -> UInt8Array:
    # Only where something shrinks: torch takes seconds to import. Its kernel saves 1 ms a photo against Pillow's.
    from pipeline.data.transforms.resizing import shrink_short  # noqa: PLC0415

    return shrink_short(image, short)


def _annotation(
    record: Record, original_hw: tuple[int, int], max_bytes: int, rejects: list[Reject]
) -> tuple[Objects | None, bytes | None]:
    """Boxes in original pixels, without those that have no area there, and the mask."""
    objects = record.objects
    mask = None if record.mask_uri is None else _mask(record.mask_uri, original_hw, max_bytes)
    if objects is None:
        return None, mask
    frame_hw = objects.frame_hw or original_hw
    _check_frame(frame_hw, original_hw)
    if mask is None and objects.regions:
        mask = _painted(objects, frame_hw, original_hw)
    found = boxes.scale(objects.boxes_xyxy, frame_hw, original_hw)
    clipped = boxes.clip(found, original_hw)
    kept = (boxes.area(clipped) > 0) & np.isfinite(found).all(axis=1)
    for index in np.flatnonzero(~kept):
        message = f"The box {found[index].tolist()} has no area within the image of {original_hw} (height, width)."
        rejects.append(_reject(record, int(objects.labels[index]), "box", message))
    flags = (getattr(objects, name)[kept] for name in ("labels", "difficult", "truncated", "crowd"))
    return Objects(clipped[kept], *flags), mask


def _check_frame(frame_hw: tuple[int, int], original_hw: tuple[int, int]) -> None:
    """Boxes may have been measured in a smaller copy of the picture, but not in a turned or stretched one."""
    aspects = [width / height for height, width in (frame_hw, original_hw)]
    if frame_hw != (1, 1) and abs(aspects[0] / aspects[1] - 1) > MAX_STRETCH:
        raise ImageError(
            "frame",
            f"Its boxes were measured in a picture of {frame_hw} (height, width), but it has {original_hw}: another "
            "shape; correct the annotation.",
        )


def _painted(objects: Objects, frame_hw: tuple[int, int], original_hw: tuple[int, int]) -> bytes:
    """The mask that the regions make, in the size of the image."""
    if frame_hw == (1, 1):
        raise ImageError("mask", "Its regions are shares of the image, which make no mask.")
    try:
        mask = masks.semantic(objects, frame_hw)
    except DataError as error:
        raise ImageError("mask", f"Its regions make no mask: {error}.") from None
    if frame_hw != original_hw:  # the nearest pixel
        down, across = (
            (np.arange(to) * of // to).clip(0, of - 1) for of, to in zip(frame_hw, original_hw, strict=True)
        )
        mask = mask[np.ix_(down, across)]
    return imaging.encode_mask(mask)


def _mask(uri: str, original_hw: tuple[int, int], max_bytes: int) -> bytes:
    mask = imaging.decode_mask(_read(uri, max_bytes))
    if mask.shape != original_hw:
        raise ImageError(
            "mask",
            f"{storage.printable(uri)}: the mask has {mask.shape} pixels, its image {original_hw} (height, width).",
        )
    return imaging.encode_mask(mask)


def _digest_of_mask(mask: bytes) -> str:
    """Of its pixels, since its bytes depend on the library that wrote them."""
    pixels = imaging.decode_mask(mask, _ANY_SIZE)
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def _read(uri: str, max_bytes: int, byte_range: tuple[int, int] | None = None) -> bytes:
    try:
        if byte_range is not None:
            _check_size(uri, byte_range[1], max_bytes)
            return storage.read(uri, byte_range)
        with storage.open_input(uri) as file:
            if file.seekable():
                _check_size(uri, file.seek(0, os.SEEK_END), max_bytes)
                file.seek(0)
            return file.read()
    except OSError as error:
        raise ImageError("unreadable", f"{storage.printable(uri)}: cannot be read ({storage.reason(error)})") from None


def _check_size(uri: str, found: int, max_bytes: int) -> None:
    if found > max_bytes:
        raise ImageError(
            "bytes",
            f"{storage.printable(uri)}: has {found} bytes, more than max_bytes {max_bytes} allows; remove it or allow "
            "more.",
        )


def _reject(record: Record, label: int | None, reason: str, message: str) -> Reject:
    return Reject(
        image_id=record.image_id,
        uri=storage.printable(record.uri),
        split=record.split,
        class_name="" if label is None else str(label),
        reason=reason,
        message=message,
        byte_range=record.byte_range,
    )
