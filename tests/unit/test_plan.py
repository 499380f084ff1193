"""The plan of ingest: what is written down is read back, no id twice, one shuffle, and what was seen is known."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import imaging
from pipeline.data import plan, rows
from pipeline.data.plan import Part, Seen
from pipeline.errors import DataError
from pipeline.types import Objects, Record, RunLengths, Split

SQUARE = ((1.0, 2.0, 5.5, 2.0, 5.5, 7.25, 1.0, 7.25),)
NONE = np.zeros(0, np.bool_)
TWO_HOLES = ((0.0, 0.0, 3.0, 0.0, 3.0, 3.0), (4.0, 4.0, 6.0, 4.0, 6.0, 6.5))


def objects(frame_hw: tuple[int, int] | None = None, *, regions: bool = True) -> Objects:
    return Objects(
        boxes_xyxy=np.array([[0.1, 2, 5.5, 7.25], [1, 1, 3, 3], [0, 0, 9, 9]], np.float32),
        labels=np.array([1, 0, 2], np.int64),
        difficult=np.array([True, False, False]),
        truncated=np.array([False, True, False]),
        crowd=np.array([False, False, True]),
        regions=(SQUARE, TWO_HOLES, RunLengths((9, 9), (3, 70, 8))) if regions else (),
        frame_hw=frame_hw,
    )


RECORDS = {
    "a class alone": Record("val/a", "/photos/a.jpg", "val", 3, size_bytes=5),
    "no class": Record("val/b", "/photos/b.jpg", "val", size_bytes=5),
    "a part of a tar": Record("val/c", "/photos/all.tar", "val", 0, byte_range=(512, 77)),
    "boxes, regions and a frame": Record("val/d", "/d", "val", objects=objects((9, 9)), size_bytes=1),
    "boxes without regions": Record("val/e", "/e", "val", objects=objects(regions=False), size_bytes=1),
    "no object in it": Record(
        "val/f",
        "/f",
        "val",
        size_bytes=1,
        objects=Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), NONE, NONE, NONE),
    ),
    "a mask": Record("val/g", "/g", "val", mask_uri="/masks/g.png", size_bytes=1),
    "a bucket": Record("val/h", "s3://bucket/h.jpg", "val", 1),
    "a name of bytes that are not UTF-8": Record(
        "val/%FF", "/photos/" + os.fsdecode(b"\xff\xfe"), "val", 1, size_bytes=1
    ),
    "a name of two lines": Record("val/i%0Ai", "/photos/i\ni \u2028.jpg", "val", 1, size_bytes=1),
}


def written(
    folder: Path, records: Iterable[Record], rows_per_shard: int = 4, seed: int = 0, first: int = 0
) -> list[Part]:
    folder.mkdir(parents=True, exist_ok=True)
    listing = plan.write_listing(folder / "listing", records)
    return plan.write_parts(folder, {"val": listing}, rows_per_shard, seed, {"val": first})


def read(folder: Path, parts: Iterable[Part]) -> list[Record]:
    return [record for part in parts for record in plan.read_part(folder, part)]


def numbered(count: int, split: Split = "val") -> list[Record]:
    return [Record(f"{split}/{index}", f"s3://bucket/{index}", split, index % 3) for index in range(count)]


@pytest.mark.parametrize("name", RECORDS)
def test_part_gives_back_the_record_that_was_listed(tmp_path: Path, name: str) -> None:
    record = RECORDS[name]
    (found,) = read(tmp_path, written(tmp_path, [record]))
    assert found == (record if record.byte_range is None else replace(record, size_bytes=77))
    if record.objects is not None and found.objects is not None:
        found_types = [getattr(found.objects, name).dtype for name in ("boxes_xyxy", "labels", "crowd")]
        assert [np.dtype(kind) for kind in (np.float32, np.int64, np.bool_)] == found_types


def test_listing_notes_the_size_that_a_dataset_did_not_tell(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    names = ("a.jpg", "gone", "nul\0.jpg")
    listed = [Record(f"val/{index}", str(tmp_path / name), "val", 0) for index, name in enumerate(names)]
    found = {record.image_id: record.size_bytes for record in read(tmp_path, written(tmp_path, listed))}
    assert found == {"val/0": 5, "val/1": 0, "val/2": 0}


def test_listing_with_an_id_twice_is_refused_by_its_name(tmp_path: Path) -> None:
    twice = [*numbered(10), Record("val/7", "s3://bucket/other", "val", 0)]
    with pytest.raises(DataError, match="image id 'val/7' is there twice in split 'val'; rename one"):
        plan.write_listing(tmp_path / "listing", twice)


def test_id_in_two_splits_is_refused_by_its_name(tmp_path: Path) -> None:
    test, val = numbered(9, "test"), [*numbered(10), Record("test/7", "s3://bucket/other", "val", 0)]
    listings: dict[Split, plan.Listing] = {
        "val": plan.write_listing(tmp_path / "val", val),
        "test": plan.write_listing(tmp_path / "test", test),
    }
    with pytest.raises(DataError, match="image id 'test/7' is in the splits 'val' and 'test'; leave it in one of"):
        plan.check_strangers(listings)
    listings["val"] = plan.write_listing(tmp_path / "val", val[:-1])
    plan.check_strangers(listings)


def test_digest_of_a_listing_tells_what_files_mean_and_not_where_they_lie(tmp_path: Path) -> None:
    record = RECORDS["boxes, regions and a frame"]

    def digest(changed: Record) -> str:
        return plan.write_listing(tmp_path / "listing", [changed]).digest

    expected = digest(record)
    assert digest(replace(record, uri="/elsewhere/d")) == expected
    other_box = objects((9, 9)).boxes_xyxy + np.float32(0.5)
    changes = [
        replace(record, image_id="val/x"),
        replace(record, size_bytes=2),
        replace(record, label=0),
        replace(record, objects=objects((18, 18))),
        replace(record, objects=replace(objects((9, 9)), boxes_xyxy=other_box)),
        replace(record, objects=objects((9, 9), regions=False)),
    ]
    assert len({expected, *map(digest, changes)}) == 1 + len(changes)


def test_digest_of_a_listing_tells_the_size_of_a_mask_and_is_as_ever_without_one(tmp_path: Path) -> None:
    record, mask = RECORDS["a class alone"], tmp_path / "mask.png"

    def digest(changed: Record) -> str:
        return plan.write_listing(tmp_path / "listing", [changed]).digest

    assert digest(record) == hashlib.sha256(json.dumps(["val/a", "val", 3, 5]).encode()).hexdigest()
    found = []
    for content in (b"1", b"12"):
        mask.write_bytes(content)
        found.append(digest(replace(record, mask_uri=str(mask))))
    remote = replace(record, mask_uri="s3://bucket/mask.png")
    found += [digest(replace(remote, mask_bytes=size)) for size in (1, 3)]
    assert found[0] == found[2]
    assert len({*found, digest(record)}) == 4


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 60), rows_per_shard=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_parts_are_a_permutation_cut_into_equal_pieces(
    tmp_path_factory: pytest.TempPathFactory, count: int, rows_per_shard: int, seed: int
) -> None:
    folder, records = tmp_path_factory.mktemp("plan"), numbered(count)
    parts = written(folder, records, rows_per_shard, seed)
    assert [part.num_records for part in parts[:-1]] == [rows_per_shard] * (len(parts) - 1)
    assert len(parts) == -(-count // rows_per_shard)
    found = read(folder, parts)
    assert sorted(found, key=lambda record: record.image_id) == sorted(records, key=lambda record: record.image_id)


def test_order_is_a_function_of_the_seed_and_not_of_the_size_of_a_shard(tmp_path: Path) -> None:
    def order(name: str, rows_per_shard: int, seed: int) -> list[str]:
        parts = written(tmp_path / name, numbered(50), rows_per_shard, seed)
        return [record.image_id for record in read(tmp_path / name, parts)]

    first = order("a", 50, 0)
    assert first == order("b", 7, 0)
    assert first != order("c", 50, 1)
    assert first != [record.image_id for record in numbered(50)]


def test_parts_of_two_splits_have_orders_of_their_own(tmp_path: Path) -> None:
    splits: tuple[Split, ...] = ("train", "val")
    listings = {split: plan.write_listing(tmp_path / split, numbered(30, split)) for split in splits}
    parts = plan.write_parts(tmp_path, listings, 30, 0, {"train": 0, "val": 0})
    assert [(part.name, part.split) for part in parts] == [("train-00000", "train"), ("val-00000", "val")]
    orders = [[record.image_id.split("/")[1] for record in plan.read_part(tmp_path, part)] for part in parts]
    assert orders[0] != orders[1]


def test_parts_are_numbered_from_the_first(tmp_path: Path) -> None:
    parts = written(tmp_path, numbered(10), rows_per_shard=4, first=7)
    assert [part.name for part in parts] == ["val-00007", "val-00008", "val-00009"]
    assert [part.num_records for part in parts] == [4, 4, 2]


def stored(record: Record, **changes: Any) -> dict[str, Any]:
    """The row of an image of 40 x 60 pixels and 9 bytes."""
    row = {"image_id": record.image_id, "original_bytes": 9, "original_height": 40, "original_width": 60}
    return row | rows.annotation(record, (40, 60), rows.Config(), []) | changes


def seen(*records: Record) -> Seen:
    return Seen(map(stored, records), rows.Config())


def changes(record: Record, of: Record) -> str:
    """What is said of an image that is there and is listed as another record now."""
    found = seen(*numbered(2), of, *numbered(2, "train"))
    assert found.holds(record)
    with pytest.raises(DataError) as error:
        found.check()
    return str(error.value)


def test_only_leaves_records_out_that_count_in_the_digest(tmp_path: Path) -> None:
    records = numbered(6)
    listing = plan.write_listing(tmp_path / "listing", records)
    found = seen(*records[:4])
    new = plan.only(listing, lambda record: not found.holds(record))
    found.check()
    parts = plan.write_parts(tmp_path, {"val": new}, 10, 0, {"val": 0})
    assert sorted(record.image_id for record in read(tmp_path, parts)) == ["val/4", "val/5"]
    assert (len(new), new.digest) == (2, listing.digest)


def test_seen_record_that_is_the_same_is_held_wherever_it_lies(tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(imaging.encode_mask(np.ones((40, 60), np.uint8)))
    record = Record("val/a", "/a", "val", 1, objects=objects(regions=False), mask_uri=str(mask))
    found = seen(*numbered(3), record)
    mask.rename(tmp_path / "moved.png")
    assert found.holds(replace(record, uri="/elsewhere", size_bytes=9, mask_uri=str(tmp_path / "moved.png")))
    found.check()


def test_seen_record_that_has_changed_is_refused_with_what_it_was(tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(imaging.encode_mask(np.ones((40, 60), np.uint8)))
    boxed = Record("val/a", "/a", "val", objects=objects(regions=False))
    outlined = replace(boxed, objects=replace(objects(), regions=(SQUARE, TWO_HOLES, RunLengths((40, 60), (0, 2400)))))
    masked = Record("val/a", "/a", "val", 1, mask_uri=str(mask))
    assert "val/a: has 8 bytes, had 9. Images can be added, not changed: make a new dataset" in changes(
        replace(masked, size_bytes=8), masked
    )
    other_box = replace(boxed.objects or objects(), boxes_xyxy=objects().boxes_xyxy + np.float32(0.5))
    easy = replace(boxed.objects or objects(), difficult=np.zeros(3, np.bool_))
    pairs = [(replace(masked, label=2), masked), (replace(masked, mask_uri=None), masked), (outlined, boxed)]
    pairs += [(replace(boxed, objects=one), boxed) for one in (other_box, easy, None)]
    for now, before in pairs:
        assert "1 images have changed since the dataset was made: val/a: has another label, other boxes or another" in (
            changes(now, before)
        )
    found = seen(masked)
    mask.write_bytes(imaging.encode_mask(np.full((40, 60), 2, np.uint8)))  # as many bytes
    assert found.holds(masked)
    with pytest.raises(DataError, match="val/a: has another label, other boxes or another mask"):
        found.check()
    found = seen(masked)
    mask.unlink()
    assert found.holds(masked)
    with pytest.raises(DataError, match=r"val/a: .*mask\.png: cannot be read \(No such file or directory\)\."):
        found.check()


def test_seen_records_that_have_changed_are_named_up_to_three(tmp_path: Path) -> None:
    records = numbered(5)
    found = seen(*records)
    assert all(found.holds(replace(record, label=9)) for record in records)
    with pytest.raises(DataError, match=r"^5 images have changed .*val/0: .*; val/1: .*; val/2: .*; and 2 more\. "):
        found.check()


def test_seen_of_nothing_holds_nothing() -> None:
    assert not seen().holds(numbered(1)[0])
    assert not seen(numbered(2)[1]).holds(numbered(1)[0])


@pytest.mark.parametrize("labels", [[0, 3], [-1]])
def test_label_without_a_class_is_refused_with_the_image(labels: list[int]) -> None:
    of_images = [Record(f"val/{label}", "/a", "val", label) for label in labels]
    boxed = replace(objects(), labels=np.array([0, 0, labels[-1]], np.int64))
    for records in (of_images, [Record(f"val/{labels[-1]}", "/a", "val", objects=boxed)]):
        with pytest.raises(
            DataError, match=f"image 'val/{labels[-1]}': expected labels 0 to 2 for 3 classes, got {labels[-1]}"
        ):
            list(plan.with_known_labels(records, 3))


def test_labels_of_known_classes_pass() -> None:
    records = [*numbered(5), *RECORDS.values()]
    assert list(plan.with_known_labels(records, 4)) == records
