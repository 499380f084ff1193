"""One shard from its records, without Ray: what is stored, what is turned away, and that it is a pure function."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import imaging
from pipeline.config import parse
from pipeline.data import ingest, shards
from pipeline.errors import ConfigError
from pipeline.types import Record, Split


def picture(folder: Path, name: str, height: int, width: int) -> Path:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    (folder / name).write_bytes(imaging.encode_jpeg(pixels))
    return folder / name


def make(folder: Path, split: Split, config: ingest.Config, *paths: Path, name: str = "a") -> dict[str, Any]:
    records = tuple(Record(f"{split}/{path.name}", str(path), split, label) for label, path in enumerate(paths))
    return ingest.make_shard(ingest.Task(folder / f"{name}.parquet", split, records), config)


def stored(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = shards.read(folder / "a.parquet", [0]).to_pylist()
    return rows


def test_make_shard_twice_gives_the_same_bytes_and_the_same_answer(tmp_path: Path) -> None:
    paths = [picture(tmp_path, f"{side}.jpg", side, 90) for side in (70, 80)]
    config = ingest.Config(train_short_side=64)
    first, second = (make(tmp_path, "train", config, *paths, name=name) for name in "ab")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert first["shard"] | {"name": "b.parquet"} == second["shard"]
    assert (first["rows"], first["rejects"]) == (second["rows"], [])


def test_training_images_are_resized_and_both_sizes_recorded(tmp_path: Path) -> None:
    path = picture(tmp_path, "1.jpg", 80, 121)
    make(tmp_path, "train", ingest.Config(train_short_side=64), path)
    (row,) = stored(tmp_path)
    sizes = [row[name] for name in ("height", "width", "original_height", "original_width")]
    assert sizes == [64, 96, 80, 121]  # 121 * 64 / 80 = 96.8, truncated
    assert imaging.decode(row["image"]).shape == (64, 96, 3)
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("split", "short_side"), [("val", 64), ("test", 64), ("train", None), ("train", 80), ("train", 256)]
)
def test_what_need_not_be_resized_keeps_its_original_bytes(
    tmp_path: Path, split: Split, short_side: int | None
) -> None:
    path = picture(tmp_path, "1.jpg", 80, 121)
    made = make(tmp_path, split, ingest.Config(train_short_side=short_side), path)
    (row,) = stored(tmp_path)
    assert row["image"] == path.read_bytes()
    assert (row["height"], row["original_width"]) == (80, 121)
    assert made["rows"] == [(split, f"{split}/1.jpg", 0, row["sha256"])]


def test_bad_images_are_rejected_with_their_reasons_and_their_neighbours_stay(tmp_path: Path) -> None:
    good = picture(tmp_path, "good.jpg", 30, 30)
    torn, text = tmp_path / "torn.jpg", tmp_path / "text.jpg"
    torn.write_bytes(good.read_bytes()[:200])
    text.write_bytes(b"not an image")
    large = picture(tmp_path, "large.jpg", 64, 64)
    config = ingest.Config(decoding=imaging.Decoding(max_pixels=1000))
    made = make(tmp_path, "val", config, torn, good, text, tmp_path / "gone.jpg", large)
    assert [row["image_id"] for row in stored(tmp_path)] == ["val/good.jpg"]
    reasons = {Path(reject["uri"]).name: reject["reason"] for reject in made["rejects"]}
    expected = {"torn.jpg": "truncated", "text.jpg": "format", "gone.jpg": "unreadable", "large.jpg": "pixels"}
    assert reasons == expected
    assert all(reject["message"] and reject["split"] == "val" for reject in made["rejects"])


def test_a_shard_without_any_good_image_is_not_written(tmp_path: Path) -> None:
    made = make(tmp_path, "val", ingest.Config(), tmp_path / "gone.jpg")
    assert (made["shard"], made["rows"], len(made["rejects"])) == (None, [], 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["seed", "rows_per_shard", "rows_per_group", "max_reject_share", "train_short_side"])
def test_impossible_values_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: input should be greater than or equal to"):
        parse(ingest.Config, {key: -1}, "here")
