"""Shards and their manifest: what is written is read, and what is damaged is said so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import shards
from pipeline.errors import DataError
from pipeline.types import Split

NUMBERS = ("label", "height", "width", "original_height", "original_width")


def row(index: int) -> dict[str, Any]:
    texts = {name: f"{name}-{index}" for name in ("image_id", "sha256")}
    return {**texts, **dict.fromkeys(NUMBERS, index), "image": bytes([index]) * 100}


def write(path: Path, split: Split, rows: Iterable[dict[str, Any]], row_group_size: int) -> shards.Shard | None:
    with shards.Writer(path, split, row_group_size) as writer:
        for one in rows:
            writer.add(one)
    return writer.shard


@pytest.fixture
def copied(stripes: shards.Shards, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stripes.path, tmp_path / "copied"))


def test_write_and_read_give_the_rows_back_by_row_group(tmp_path: Path) -> None:
    shard = write(tmp_path / "train-00000.parquet", "train", map(row, range(10)), 4)
    assert shard
    assert (shard.name, shard.split, shard.row_groups, shard.num_rows) == (
        "train-00000.parquet",
        "train",
        (4, 4, 2),
        10,
    )
    assert shard.size_bytes == (tmp_path / shard.name).stat().st_size
    table = shards.read(tmp_path / shard.name, [2, 0], ["image_id", "label"])
    assert table.column("label").to_pylist() == [8, 9, 0, 1, 2, 3]
    assert table.column_names == ["image_id", "label"]
    assert [path.name for path in tmp_path.iterdir()] == [shard.name]  # nothing half-written beside it


def test_write_stores_images_uncompressed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", "val", map(row, range(200)), 128)
    assert (tmp_path / "a.parquet").stat().st_size > 200 * 100


def test_write_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    bad = row(5) | {"label": "x"}
    with pytest.raises((TypeError, ValueError)):
        write(tmp_path / "a.parquet", "val", [*map(row, range(5)), bad], 2)
    assert list(tmp_path.iterdir()) == []


def test_write_of_nothing_makes_no_file(tmp_path: Path) -> None:
    assert write(tmp_path / "a.parquet", "val", [], 2) is None
    assert list(tmp_path.iterdir()) == []


def test_write_leaves_the_columns_that_a_row_lacks_empty(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", "val", [row(1), row(2) | {"boxes": [[0.0, 1.0, 2.0, 3.0]]}], 2)
    table = shards.read(tmp_path / "a.parquet", [0])
    assert table.schema == shards.SCHEMA
    assert table.column("boxes").to_pylist() == [None, [[0.0, 1.0, 2.0, 3.0]]]


def test_check_of_whole_shards_passes(stripes: shards.Shards) -> None:
    for split in ("train", "val"):
        shards.check(stripes, split)


@pytest.mark.parametrize("at", [4, 5000, -1])
def test_check_finds_a_flipped_byte_and_names_the_file(copied: Path, at: int) -> None:
    source = shards.load(copied)
    path = copied / source.manifest.of("val")[0].name
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: sha256 differs from the manifest .* re-run jobs.preprocess"):
        shards.check(source, "val")
    shards.check(source, "train")


def test_check_names_a_shard_that_is_gone(copied: Path) -> None:
    source = shards.load(copied)
    name = source.manifest.of("train")[1].name
    (copied / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing, though the manifest names it"):
        shards.check(source, "train")
    with pytest.raises(DataError, match=f"{name}: cannot be read as a shard"):
        shards.read(copied / name, [0])


def test_read_of_a_torn_shard_says_so(copied: Path) -> None:
    path = next(copied.glob("train-*.parquet"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=f"{path.name}: cannot be read as a shard: "):
        shards.read(path, [0])


def test_load_without_manifest_says_what_to_run(copied: Path) -> None:
    (copied / shards.MANIFEST).unlink()  # shards without it are not a dataset
    with pytest.raises(DataError, match=r"expected a dataset with manifest\.json, found none; run jobs\.preprocess"):
        shards.load(copied)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema_version": 1}, "schema_version: "),
        ({"classes": None}, "classes: "),
        ({"colour": 1}, "colour: "),
        ({"num_rejects": "0"}, "num_rejects: "),
    ],
)
def test_load_of_another_version_names_the_first_difference(
    copied: Path, changes: dict[str, Any], sentence: str
) -> None:
    path = copied / shards.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=f"not a manifest this version reads: {sentence}"):
        shards.load(copied)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00"])
def test_load_of_bytes_that_are_no_json_is_a_data_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / shards.MANIFEST).write_bytes(data)
    with pytest.raises(DataError, match="not a manifest this version reads"):
        shards.load(tmp_path)


def test_images_without_a_class_are_no_data_for_a_classifier(stripes: shards.Shards) -> None:
    shards.check_labels(stripes, ("train", "val"))
    partly = stripes.manifest.model_copy(update={"class_counts": {"train": (20, 20), "val": (7, 5)}})
    shards.check_labels(shards.Shards(stripes.path, partly), ["train"])
    with pytest.raises(DataError, match="expected a class for each image of 'val', but 1 of 13 have none"):
        shards.check_labels(shards.Shards(stripes.path, partly), ("train", "val"))
    with pytest.raises(DataError, match="has no split 'test'"):
        shards.check_labels(stripes, ["test"])


@pytest.mark.parametrize(("split", "count", "files"), [("train", 40, 2), ("val", 13, 1)])
def test_manifest_counts_the_rows_of_a_split(stripes: shards.Shards, split: Split, count: int, files: int) -> None:
    assert stripes.manifest.num_rows(split) == count
    assert len(stripes.manifest.of(split)) == files


def test_manifest_without_the_split_names_those_it_has(stripes: shards.Shards) -> None:
    with pytest.raises(DataError, match="has no split 'test'; it has: train, val"):
        stripes.manifest.of("test")
