"""Shards: Parquet files of encoded images, and the manifest that vouches for them. No Ray, no torch.

A dataset on disk is a folder with `manifest.json` (written last: without it nothing here is read as whole),
`<split>-<number>.parquet` and `rejects.parquet`. Rows lie uncompressed (JPEG does not compress again) in row groups of
about 128, the unit that loading reads at random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

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
        ("label", pa.int64()),
        ("height", pa.int32()),  # of the stored image, upright
        ("width", pa.int32()),
        ("original_height", pa.int32()),  # of the image before any resizing, upright
        ("original_width", pa.int32()),
        ("sha256", pa.string()),  # of the original bytes
    ]
)
REJECT_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("image_id", "uri", "split", "class_name", "reason", "message")]
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


class Manifest(Strict):
    """The index of a dataset on disk.

    Attributes:
        classes: class names; a label is an index into them.
        class_counts: images of each class, per split.
        num_rejects: images left out, each with its reason in `rejects.parquet`.
        digest: sha256 over every row's id, label and original bytes: two manifests with one digest were made from the
            same data, however it was cut into shards or resized for training.
        decoding: which images were accepted, and how they were read.
        config: the resolved configuration it was made with.
        tool_versions: the libraries that read and wrote the pixels.
    """

    schema_version: Literal[1] = 1
    dataset: str
    classes: tuple[str, ...]
    class_counts: dict[Split, tuple[int, ...]]
    num_rejects: int
    shards: tuple[Shard, ...]
    digest: str
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


def load(path: Path) -> Shards:
    """Read a dataset's manifest.

    Raises:
        DataError: there is none, or it is not one of this version.
    """
    try:
        return Shards(path, Manifest.model_validate_json((path / MANIFEST).read_bytes(), strict=True))
    except OSError:
        raise DataError(f"{path}: expected a dataset with {MANIFEST}, found none; run jobs.preprocess first") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path / MANIFEST}: not a manifest this version reads: {where}: {first['msg']}") from None


def check(shards: Shards, split: Split) -> None:
    """Compare the checksum of every shard of one split with the manifest.

    Raises:
        DataError: a file is missing or differs.
    """
    for shard in shards.manifest.of(split):
        path = shards.path / shard.name
        if not path.is_file():
            raise DataError(f"{path}: missing, though the manifest names it; copy it again or re-run jobs.preprocess")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise DataError(
                f"{path}: sha256 differs from the manifest (expected {shard.sha256[:12]}, got {found[:12]}); "
                "copy it again or re-run jobs.preprocess"
            )


def write(path: Path, split: Split, rows: Mapping[str, Sequence[Any]], row_group_size: int) -> Shard:
    """Write one shard; it appears under `path` whole or not at all."""
    table = pa.table(dict(rows), schema=SCHEMA)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, row_group_size=row_group_size, compression="none", use_dictionary=False)
    data = partial.read_bytes()
    partial.rename(path)
    return Shard(
        name=path.name,
        split=split,
        row_groups=tuple(min(row_group_size, len(table) - at) for at in range(0, len(table), row_group_size)),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def read(path: Path, row_groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
    """Read some row groups of a shard.

    Raises:
        DataError: the file is missing or not readable as a shard.
    """
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            return file.read_row_groups(list(row_groups), columns=columns)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as a shard: {reason}; check it with its manifest's sha256") from None
