"""Shards: Parquet files of encoded images, and the manifest that vouches for them. No Ray, no torch.

A dataset on disk is a folder with `manifest.json` (written last: without it nothing here is read as whole),
`<split>-<number>.parquet` and `rejects.parquet`. Rows lie uncompressed (JPEG does not compress again) in row groups of
about 128, the unit that loading reads at random. Images that were added later lie in further shards under a further
manifest: `manifest.json` is the newest, `manifest-<version>.json` every one, and `<folder>@<version>` names one.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from pipeline.config import Strict
from pipeline.errors import DataError
from pipeline.imaging import Decoding
from pipeline.types import Split

MANIFEST = "manifest.json"
REJECTS = "rejects.parquet"

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.binary()),  # encoded, as decode takes it
        ("label", pa.int64()),  # null where the image as a whole has no class
        ("height", pa.int32()),  # of the stored image, upright
        ("width", pa.int32()),
        ("original_height", pa.int32()),  # of the image before any resizing, upright
        ("original_width", pa.int32()),
        ("original_bytes", pa.int64()),
        ("sha256", pa.string()),  # of the original bytes
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy, half-open, original pixels; null: not annotated
        ("box_labels", pa.list_(pa.int64())),
        ("difficult", pa.list_(pa.bool_())),
        ("truncated", pa.list_(pa.bool_())),
        ("crowd", pa.list_(pa.bool_())),
        ("mask", pa.binary()),  # grey PNG of the original size: 0 background, 1 + label, 255 not to be judged
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("image_id", "uri", "split", "class_name", "reason", "message")),
        ("byte_range", pa.list_(pa.int64())),  # (offset, length) of the image in its file; null: all of it
    ]
)


class Shard(Strict):
    """What the manifest says of one file.

    Attributes:
        row_groups: rows in each row group, in order.
        sha256: of the file.
    """

    name: str
    split: Split
    row_groups: tuple[int, ...]
    size_bytes: int
    sha256: str

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return sum(self.row_groups)


class Pixels(Strict):
    """What the pixels of a split add up to, exactly, so that parts can be added; levels 0..255.

    Every fourth pixel across and down is counted, of the images as they are stored.

    Attributes:
        num: pixels counted.
        sums: of the levels of each channel.
        products: of the levels of each two channels.
    """

    num: int
    sums: tuple[int, ...]
    products: tuple[tuple[int, ...], ...]

    def __add__(self, other: Pixels) -> Pixels:
        """Return what both add up to."""
        return Pixels(
            num=self.num + other.num,
            sums=_added(self.sums, other.sums),
            products=tuple(_added(mine, theirs) for mine, theirs in zip(self.products, other.products, strict=True)),
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, on the scale 0..1."""
        return tuple(total / self.num / 255 for total in self.sums)

    @property
    def covariance(self) -> tuple[tuple[float, ...], ...]:
        """Covariance of the channels, on the scale 0..1: what the colour noise of AlexNet is drawn from."""
        mean = self.mean
        return tuple(
            tuple(product / self.num / 255**2 - mean[row] * mean[column] for column, product in enumerate(products))
            for row, products in enumerate(self.products)
        )

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, on the scale 0..1."""
        return tuple(max(row[channel], 0.0) ** 0.5 for channel, row in enumerate(self.covariance))


class Sizes(Strict):
    """Heights and widths of the original images of a split."""

    num: int
    smallest_hw: tuple[int, int]
    largest_hw: tuple[int, int]
    sum_hw: tuple[int, int]

    def __add__(self, other: Sizes) -> Sizes:
        """Return the sizes of both."""
        pairs = (self.smallest_hw, other.smallest_hw), (self.largest_hw, other.largest_hw)
        return Sizes(
            num=self.num + other.num,
            smallest_hw=(min(side[0] for side in pairs[0]), min(side[1] for side in pairs[0])),
            largest_hw=(max(side[0] for side in pairs[1]), max(side[1] for side in pairs[1])),
            sum_hw=(self.sum_hw[0] + other.sum_hw[0], self.sum_hw[1] + other.sum_hw[1]),
        )

    @property
    def mean_hw(self) -> tuple[float, float]:
        """Mean height and width."""
        return self.sum_hw[0] / self.num, self.sum_hw[1] / self.num


class Manifest(Strict):
    """The index of a dataset on disk.

    Attributes:
        version: counts from 1; images that are added make the next one.
        classes: class names; a label is an index into them.
        class_counts: images of each class, per split.
        object_counts: boxes of each class, per split.
        num_rejects: images and boxes left out, each with its reason in one of the files `rejects`. A version has one
            file of all of them; earlier releases left those of the versions before it in theirs.
        digest: over every row's id, labels, boxes, mask and original bytes: two manifests with one digest were made
            from the same data, however it was cut into shards or resized for training.
        pixels: what the channels add up to, per split: mean, standard deviation, covariance.
        sizes: of the original images, per split.
        decoding: which images were accepted, and how they were read.
        config: the resolved configuration it was made with.
        tool_versions: the libraries that read and wrote the pixels.
    """

    schema_version: Literal[2] = 2
    version: int = 1
    dataset: str
    classes: tuple[str, ...]
    class_counts: dict[Split, tuple[int, ...]]
    object_counts: dict[Split, tuple[int, ...]] = Field(default_factory=dict)
    num_rejects: int
    rejects: tuple[str, ...] = (REJECTS,)
    shards: tuple[Shard, ...]
    digest: str
    pixels: dict[Split, Pixels] = Field(default_factory=dict)
    sizes: dict[Split, Sizes] = Field(default_factory=dict)
    decoding: Decoding
    config: dict[str, Any]
    tool_versions: dict[str, str]

    def of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split.

        Raises:
            DataError: there are none.
        """
        found = tuple(shard for shard in self.shards if shard.split == split)
        if not found:
            known = ", ".join(sorted({shard.split for shard in self.shards}))
            raise DataError(f"dataset '{self.dataset}' has no split '{split}'; it has: {known}")
        return found

    def num_rows(self, split: Split) -> int:
        """Images in one split."""
        return sum(shard.num_rows for shard in self.of(split))


@dataclass(frozen=True, slots=True)
class Shards:
    """A dataset on disk: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def address(self) -> str:
        """`<folder>@<version>`: what `load` takes for this version, whatever is appended later."""
        return f"{self.path}@{self.manifest.version}"


def load(path: Path) -> Shards:
    """Read a dataset's newest manifest, or that of `<folder>@<version>`.

    Raises:
        DataError: there is none, or it is not one of this version.
    """
    folder, at, version = path.name.rpartition("@")
    manifest = path / MANIFEST
    if at and version.isdecimal() and not path.exists():
        path = path.with_name(folder)
        manifest = path / version_name(int(version))
    try:
        return Shards(path, Manifest.model_validate_json(manifest.read_bytes(), strict=True))
    except OSError:
        known = sorted(found.stem.rpartition("-")[2].lstrip("0") for found in path.glob("manifest-*.json"))
        hint = f"its versions are {', '.join(known)}" if known else "run jobs.preprocess first"
        raise DataError(f"{path}: expected a dataset with {manifest.name}, found none; {hint}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{manifest}: not a manifest this version reads: {where}: {first['msg']}") from None


def version_name(version: int) -> str:
    """The file that keeps the manifest of one version."""
    return f"manifest-{version:05d}.json"


def check(shards: Shards, split: Split) -> None:
    """Compare the checksum of every shard of one split with the manifest.

    Raises:
        DataError: a file is missing or differs.
    """
    for shard in shards.manifest.of(split):
        path = shards.path / shard.name
        if not path.is_file():
            raise DataError(f"{path}: missing, though the manifest names it; copy it again or re-run jobs.preprocess")
        found = sha256(path)
        if found != shard.sha256:
            raise DataError(
                f"{path}: sha256 differs from the manifest (expected {shard.sha256[:12]}, got {found[:12]}); "
                "copy it again or re-run jobs.preprocess"
            )


def check_labels(shards: Shards, splits: Iterable[Split]) -> None:
    """Make sure that every image of some splits has a class, as classifiers need it.

    Raises:
        DataError: there is no such split, or it has images without a class.
    """
    for split in splits:
        total = shards.manifest.num_rows(split)
        missing = total - sum(shards.manifest.class_counts.get(split, ()))
        if missing > 0:
            raise DataError(
                f"{shards.path}: expected a class for each image of '{split}', but {missing} of {total} have none, as "
                "in a dataset for detection; a classifier needs shards of a dataset whose images have classes"
            )


def check_objects(shards: Shards, splits: Iterable[Split]) -> None:
    """Make sure that every image of some splits was annotated with boxes, perhaps none, as detectors need it.

    Raises:
        DataError: there is no such split, or it has images that were not, or a shard cannot be read.
    """
    for split in splits:
        files = shards.manifest.of(split)
        columns = (read(shards.path / file.name, range(len(file.row_groups)), ["boxes"]).column(0) for file in files)
        missing = sum(column.null_count for column in columns)
        if missing > 0:
            raise DataError(
                f"{shards.path}: expected boxes for each image of '{split}', but {missing} of "
                f"{shards.manifest.num_rows(split)} have none, as in a dataset for classification; a detector needs "
                "shards of a dataset whose images are annotated with boxes"
            )


def rejects(shards: Shards) -> list[dict[str, Any]]:
    """What a dataset has turned away, rows of `REJECT_SCHEMA`.

    Raises:
        DataError: a list of rejects cannot be read.
    """
    return [row for name in shards.manifest.rejects for row in _rejects(shards.path / name)]


def sha256(path: Path) -> str:
    """The checksum of a file, as manifests have it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Writer:
    """Writes one shard row by row, holding one row group; the file appears under its name whole or not at all.

    Use as a context manager: leaving it without an error commits, and `shard` says what was written; it stays None
    where there was no row.

    Args:
        path: of the shard.
        split: that it belongs to.
        row_group_size: rows in a row group.
        scratch: folder for the unfinished file, on the same file system; the shard's own by default.
    """

    def __init__(self, path: Path, split: Split, row_group_size: int, scratch: Path | None = None) -> None:
        self.shard: Shard | None = None
        self._path, self._split, self._size = path, split, row_group_size
        self._partial = (scratch or path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"
        self._rows: list[Mapping[str, Any]] = []
        self._groups: list[int] = []
        self._file: Any = None

    def __enter__(self) -> Writer:
        """Begin; nothing is written before the first row group is full."""
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one row of `SCHEMA`; a column that it lacks is null."""
        self._rows.append(row)
        if len(self._rows) == self._size:
            self._flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Commit, or leave nothing behind."""
        try:
            if kind is None:
                self._flush()
            if self._file is not None:
                self._file.close()
            if kind is None and self._groups:
                self._commit()
        finally:
            self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            self._file = pq.ParquetWriter(self._partial, SCHEMA, compression="none", use_dictionary=False)
        self._file.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), row_group_size=self._size)
        self._groups.append(len(self._rows))
        self._rows = []

    def _commit(self) -> None:
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        self.shard = Shard(
            name=self._path.name,
            split=self._split,
            row_groups=tuple(self._groups),
            size_bytes=self._partial.stat().st_size,
            sha256=checksum,
        )
        self._partial.rename(self._path)


def read(path: Path, row_groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
    """Read some row groups of a shard.

    Raises:
        DataError: the file is missing or not readable as a shard.
    """
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            return file.read_row_groups(list(row_groups), columns=columns)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:  # a damaged footer can be anything
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as a shard: {reason}; check it with its manifest's sha256") from None


def _added(mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, ...]:
    return tuple(left + right for left, right in zip(mine, theirs, strict=True))


def _rejects(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = pq.read_table(path, schema=REJECT_SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}; run jobs.preprocess") from None
    return found
