"""One shard from its records, without Ray: what is stored and counted, what is turned away, and nothing by chance."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import imaging
from pipeline.data import shards
from pipeline.data.rows import DIGEST_MODULUS, PIXEL_STEP, Config, Made, make_shard
from pipeline.data.transforms.resizing import shrink_short
from pipeline.errors import DataError
from pipeline.types import Objects, Polygons, Record, Region, RunLengths, Split, UInt8Array

NOBODY = 65534


@contextmanager
def as_someone_else() -> Iterator[None]:
    """Root reads every file, so it becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def pixels(height: int, width: int) -> UInt8Array:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def picture(folder: Path, name: str, height: int, width: int) -> Path:
    (folder / name).write_bytes(imaging.encode_jpeg(pixels(height, width)))
    return folder / name


def make(folder: Path, split: Split, config: Config, *paths: Path, name: str = "a") -> Made:
    records = [Record(f"{split}/{path.name}", str(path), split, label) for label, path in enumerate(paths)]
    return make_shard(folder / f"{name}.parquet", split, records, config)


def stored(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = shards.read(folder / "a.parquet", [0]).to_pylist()
    return rows


def boxed(
    boxes: Sequence[Sequence[float]],
    frame_hw: tuple[int, int] | None = None,
    regions: tuple[Region, ...] = (),
    crowd: int = -1,
) -> Objects:
    """Boxes of class 0, 1, 2, ...; the first is difficult, the last truncated."""
    num = len(boxes)
    index = np.arange(num)
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return Objects(array, index, index == 0, index == num - 1, index == crowd, regions, frame_hw)


def annotated(folder: Path, found: Objects | None, mask: Path | None = None) -> tuple[Made, list[dict[str, Any]]]:
    """What becomes of one picture of 40 x 60 pixels with these objects."""
    path = picture(folder, "x.jpg", 40, 60)
    record = Record("train/x", str(path), "train", objects=found, mask_uri=None if mask is None else str(mask))
    made = make_shard(folder / "a.parquet", "train", [record], Config(train_short_side=16))
    return made, stored(folder) if made.shard else []


def test_make_shard_twice_gives_the_same_bytes_and_the_same_answer(tmp_path: Path) -> None:
    paths = [picture(tmp_path, f"{side}.jpg", side, 90) for side in (70, 80)]
    config = Config(train_short_side=64)
    first, second = (make(tmp_path, "train", config, *paths, name=name) for name in "ab")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert first.shard
    renamed = first.shard.model_copy(update={"name": "b.parquet"})
    assert first.model_copy(update={"shard": renamed}) == second
    assert (first.num_records, first.class_counts, first.rejects) == (2, {0: 1, 1: 1}, ())


def test_training_images_are_resized_and_both_sizes_recorded(tmp_path: Path) -> None:
    path = picture(tmp_path, "1.jpg", 80, 121)
    make(tmp_path, "train", Config(train_short_side=64), path)
    (row,) = stored(tmp_path)
    sizes = [row[name] for name in ("height", "width", "original_height", "original_width")]
    assert sizes == [64, 96, 80, 121]  # 121 * 64 / 80 = 96.8, truncated
    assert imaging.decode(row["image"]).shape == (64, 96, 3)
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert row["original_bytes"] == path.stat().st_size


@pytest.mark.parametrize(
    ("split", "short_side"), [("val", 64), ("test", 64), ("train", None), ("train", 80), ("train", 256)]
)
def test_what_need_not_be_resized_keeps_its_original_bytes(
    tmp_path: Path, split: Split, short_side: int | None
) -> None:
    path = picture(tmp_path, "1.jpg", 80, 121)
    make(tmp_path, split, Config(train_short_side=short_side), path)
    (row,) = stored(tmp_path)
    assert row["image"] == path.read_bytes()
    assert (row["height"], row["original_width"]) == (80, 121)


@pytest.mark.parametrize("side", [80, 48])  # larger than the short side, and not
def test_decoded_training_images_are_the_same_pixels_without_a_codec(tmp_path: Path, side: int) -> None:
    path = picture(tmp_path, "1.jpg", side, 121)
    config = Config(train_short_side=64, train_format="decoded")
    make(tmp_path, "train", config, path)
    (row,) = stored(tmp_path)
    expected = shrink_short(imaging.decode(path.read_bytes()), 64)
    assert imaging.sniff(row["image"]) == "NPY"
    decoded = imaging.decode(row["image"], imaging.Decoding(formats=("NPY",)))
    np.testing.assert_array_equal(decoded, expected)
    assert decoded.flags.writeable
    assert (row["height"], row["width"]) == expected.shape[:2]
    make(tmp_path, "val", config, path)
    assert stored(tmp_path)[0]["image"] == path.read_bytes()


@pytest.mark.parametrize("what", ["boxes", "mask"])
def test_training_images_with_boxes_or_a_mask_keep_their_original_bytes(tmp_path: Path, what: str) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(imaging.encode_mask(np.zeros((40, 60), np.uint8)))
    _, (row,) = annotated(
        tmp_path, boxed([[0, 0, 9, 9]]) if what == "boxes" else None, mask if what == "mask" else None
    )
    assert row["image"] == (tmp_path / "x.jpg").read_bytes()
    assert (row["height"], row["width"]) == (40, 60)


def test_boxes_are_clipped_to_the_image_with_their_labels_and_flags(tmp_path: Path) -> None:
    made, (row,) = annotated(tmp_path, boxed([[-5, 3, 20, 30.5], [50, 10, 99, 99], [1, 2, 3, 4]]))
    assert row["boxes"] == [[0, 3, 20, 30.5], [50, 10, 60, 40], [1, 2, 3, 4]]
    assert row["box_labels"] == [0, 1, 2]
    assert (row["difficult"], row["truncated"]) == ([True, False, False], [False, False, True])
    assert (made.object_counts, made.class_counts, row["label"]) == ({0: 1, 1: 1, 2: 1}, {}, None)


def test_boxes_of_another_frame_are_scaled_to_the_image(tmp_path: Path) -> None:
    _, (row,) = annotated(tmp_path, boxed([[1, 2, 3, 4], [0, 0, 30, 20]], frame_hw=(20, 30)))
    assert row["boxes"] == [[2, 4, 6, 8], [0, 0, 60, 40]]


def test_boxes_in_shares_are_scaled_to_the_image(tmp_path: Path) -> None:
    _, (row,) = annotated(tmp_path, boxed([[0.25, 0.5, 0.75, 1]], frame_hw=(1, 1)))
    assert row["boxes"] == [[15, 20, 45, 40]]


def test_boxes_of_a_turned_frame_are_no_boxes_of_this_image(tmp_path: Path) -> None:
    made, rows = annotated(tmp_path, boxed([[1, 2, 3, 4]], frame_hw=(60, 40)))
    (reject,) = made.rejects
    assert (reject.reason, reject.image_id, rows) == ("frame", "train/x", [])
    assert "(60, 40)" in reject.message
    assert "(40, 60)" in reject.message


@pytest.mark.parametrize(
    "odd",
    [[5, 5, 5, 9], [5, 9, 8, 5], [60, 0, 70, 10], [-9, -9, 0, 0], [float("nan"), 0, 5, 5], [0, 0, float("inf"), 5]],
    ids=["no width", "upside down", "right of the image", "left of the image", "no number", "infinite"],
)
def test_box_without_an_area_is_a_reject_and_its_image_stays(tmp_path: Path, odd: list[float]) -> None:
    made, (row,) = annotated(tmp_path, boxed([[1, 1, 9, 9], odd, [2, 2, 4, 4]]))
    assert row["boxes"] == [[1, 1, 9, 9], [2, 2, 4, 4]]
    assert (row["box_labels"], row["difficult"], row["truncated"]) == ([0, 2], [True, False], [False, True])
    (reject,) = made.rejects
    assert (reject.reason, reject.class_name, reject.image_id) == ("box", "1", "train/x")
    assert (made.num_records, made.object_counts) == (1, {0: 1, 2: 1})


def test_image_without_a_box_and_image_not_annotated_are_told_apart(tmp_path: Path) -> None:
    _, (empty,) = annotated(tmp_path, boxed([]))
    assert (empty["boxes"], empty["box_labels"]) == ([], [])
    _, (unknown,) = annotated(tmp_path, None)
    assert (unknown["boxes"], unknown["box_labels"], unknown["mask"]) == (None, None, None)


def test_regions_become_a_mask_of_the_image(tmp_path: Path) -> None:
    square: Polygons = ((10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0),)
    columns = RunLengths((40, 60), (30 * 40, 40, 29 * 40))  # the whole column 30
    _, (row,) = annotated(tmp_path, boxed([[10, 5, 20, 15], [30, 0, 31, 40]], regions=(square, columns)))
    expected = np.zeros((40, 60), np.uint8)
    expected[5:15, 10:20] = 1
    expected[:, 30] = 2
    np.testing.assert_array_equal(imaging.decode_mask(row["mask"]), expected)


def test_regions_of_another_frame_are_scaled_as_their_boxes(tmp_path: Path) -> None:
    left = RunLengths((20, 30), (0, 20 * 15, 20 * 15))  # the left half
    _, (row,) = annotated(tmp_path, boxed([[0, 0, 15, 20]], frame_hw=(20, 30), regions=(left,)))
    mask = imaging.decode_mask(row["mask"])
    assert mask.shape == (40, 60)
    assert mask[:, :30].min() == 1
    assert mask[:, 30:].max() == 0
    assert row["boxes"] == [[0, 0, 30, 40]]


def test_crowds_are_not_to_be_judged(tmp_path: Path) -> None:
    everywhere = RunLengths((40, 60), (0, 2400))
    _, (row,) = annotated(tmp_path, boxed([[0, 0, 60, 40]], regions=(everywhere,), crowd=0))
    assert set(imaging.decode_mask(row["mask"]).flat) == {255}
    assert row["crowd"] == [True]


def test_regions_that_do_not_fit_are_a_reject_of_the_image(tmp_path: Path) -> None:
    made, rows = annotated(tmp_path, boxed([[0, 0, 5, 5]], regions=(RunLengths((40, 60), (1, 2)),)))
    assert ([reject.reason for reject in made.rejects], rows) == (["mask"], [])
    assert "add up to" in made.rejects[0].message


def test_mask_file_is_kept_without_loss(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)
    (tmp_path / "mask.png").write_bytes(imaging.encode_mask(mask))
    _, (row,) = annotated(tmp_path, None, tmp_path / "mask.png")
    np.testing.assert_array_equal(imaging.decode_mask(row["mask"]), mask)


@pytest.mark.parametrize("what", ["another size", "a photo", "gone"])
def test_mask_file_that_is_no_mask_of_the_image_is_a_reject(tmp_path: Path, what: str) -> None:
    path = tmp_path / "mask.png"
    if what == "another size":
        path.write_bytes(imaging.encode_mask(np.zeros((60, 40), np.uint8)))
    elif what == "a photo":
        path.write_bytes(imaging.encode_jpeg(pixels(40, 60)))
    made, rows = annotated(tmp_path, None, path)
    (reject,) = made.rejects
    assert (reject.reason, rows) == ("unreadable" if what == "gone" else "mask", [])
    if what == "another size":
        assert "the mask has (60, 40) pixels, its image (40, 60)" in reject.message


def test_bad_images_are_rejected_with_their_reasons_and_their_neighbours_stay(tmp_path: Path) -> None:
    good = picture(tmp_path, "good.jpg", 30, 30)
    paths = {name: tmp_path / f"{name}.jpg" for name in ("torn", "text", "empty", "gone", "folder", "through a file")}
    paths["torn"].write_bytes(good.read_bytes()[:200])
    paths["text"].write_bytes(b"not an image")
    paths["empty"].touch()
    paths["folder"].mkdir()
    paths["through a file"] = good / "x.jpg"
    large = picture(tmp_path, "large.jpg", 64, 64)
    strip = picture(tmp_path, "strip.jpg", 1, 900)
    config = Config(decoding=imaging.Decoding(max_pixels=1000))
    made = make(tmp_path, "val", config, *paths.values(), good, large, strip)
    assert [row["image_id"] for row in stored(tmp_path)] == ["val/good.jpg"]
    reasons = {reject.uri: reject.reason for reject in made.rejects}
    expected = {"torn": "truncated", "text": "format", "empty": "empty"}
    expected |= dict.fromkeys(("gone", "folder", "through a file"), "unreadable")
    odd = {str(large): "pixels", str(strip): "aspect"}
    assert reasons == {str(paths[name]): reason for name, reason in expected.items()} | odd
    assert all(reject.message and reject.split == "val" for reject in made.rejects)
    assert (made.num_records, made.class_counts) == (9, {6: 1})


@pytest.mark.parametrize("what", ["image", "part", "mask"])
def test_file_of_too_many_bytes_is_a_reject(tmp_path: Path, what: str) -> None:
    good, mask = picture(tmp_path, "good.jpg", 30, 30), tmp_path / "mask.png"
    size = good.stat().st_size
    mask.write_bytes(imaging.encode_mask(np.zeros((30, 30), np.uint8)) + bytes(size))
    records = {
        "image": Record("val/x", str(good), "val", 0),
        "part": Record("val/x", str(good), "val", 0, byte_range=(0, size)),
        "mask": Record("val/x", str(good), "val", 0, mask_uri=str(mask)),
    }
    limit = size if what == "mask" else size - 1
    made = make_shard(tmp_path / "a.parquet", "val", [records[what]], Config(max_bytes=limit))
    ((reason, message),) = [(reject.reason, reject.message) for reject in made.rejects]
    assert reason == "bytes"
    assert message.endswith(f"bytes, more than max_bytes {limit} allows; remove it or allow more.")
    assert ("mask.png" in message) == (what == "mask")
    assert make_shard(tmp_path / "a.parquet", "val", [records["image"]], Config(max_bytes=size)).rejects == ()


def test_huge_file_is_turned_away_unread_by_default(tmp_path: Path) -> None:
    with (tmp_path / "backup.tar").open("wb") as file:
        file.truncate(50 << 30)  # a hole: it takes no room on the disk, and would not fit into memory
    (reject,) = make(tmp_path, "val", Config(), tmp_path / "backup.tar").rejects
    assert reject.reason == "bytes"


def test_file_without_permission_is_a_reject(tmp_path: Path) -> None:
    path = picture(tmp_path, "x.jpg", 30, 30)
    make(tmp_path, "val", Config(), path)
    path.chmod(0)
    with as_someone_else(), tempfile.TemporaryDirectory() as folder:
        record = Record("val/x", str(path), "val", 0)
        (reject,) = make_shard(Path(folder) / "a.parquet", "val", [record], Config()).rejects
    assert (reject.reason, "Permission denied" in reject.message) == ("unreadable", True)


@pytest.mark.parametrize(
    "name", [b"a b.jpg", b"a\nb.jpg", b"\xff\xfe.jpg", "ü 图.jpg".encode(), b"-rf *.jpg", b"%s{}.jpg"]
)
@pytest.mark.parametrize("good", [True, False])
def test_file_of_any_name_is_read_or_turned_away_in_printable_words(tmp_path: Path, name: bytes, good: bool) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(imaging.encode_jpeg(pixels(20, 20)) if good else b"no image")
    made = make_shard(tmp_path / "a.parquet", "val", [Record("val/x", str(path), "val", 0)], Config())
    if good:
        assert (made.num_records, made.rejects) == (1, ())
        assert stored(tmp_path)[0]["image"] == path.read_bytes()
        return
    (reject,) = made.rejects
    assert reject.reason == "format"
    reject.model_dump_json().encode()  # no lone half of a character
    assert reject.uri.isprintable()


def test_mask_of_any_name_is_turned_away_in_printable_words(tmp_path: Path) -> None:
    mask = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    mask.write_bytes(imaging.encode_mask(np.zeros((9, 9), np.uint8)))
    (reject,) = annotated(tmp_path, None, mask)[0].rejects
    assert "%FF.png: the mask has (9, 9) pixels" in reject.message


def test_a_part_of_a_file_is_an_image_and_a_part_beyond_its_end_is_not(tmp_path: Path) -> None:
    first, second = (imaging.encode_jpeg(pixels(side, 30)) for side in (20, 25))
    (tmp_path / "all.tar").write_bytes(first + second)
    ranges = [(0, len(first)), (len(first), len(second)), (len(first), len(second) + 1)]
    records = [
        Record(f"val/{index}", str(tmp_path / "all.tar"), "val", 0, byte_range=found)
        for index, found in enumerate(ranges)
    ]
    made = make_shard(tmp_path / "a.parquet", "val", records, Config())
    assert [row["image"] for row in stored(tmp_path)] == [first, second]
    (reject,) = made.rejects
    assert (reject.image_id, reject.reason, reject.byte_range) == ("val/2", "unreadable", ranges[2])
    assert Made.model_validate_json(made.model_dump_json(), strict=True) == made


def test_a_shard_without_any_good_image_is_not_written(tmp_path: Path) -> None:
    made = make(tmp_path, "val", Config(), tmp_path / "gone.jpg")
    assert (made.shard, made.class_counts, len(made.rejects)) == (None, {}, 1)
    assert (made.pixels, made.sizes, int(made.digest, 16)) == (None, None, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    path = picture(tmp_path, "x.jpg", 30, 30)
    record = Record("val/x", str(path), "val", 0)
    with pytest.raises(DataError, match=r"gone/a\.parquet: cannot be written: No such file or directory"):
        make_shard(tmp_path / "gone" / "a.parquet", "val", [record], Config())
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_are_those_of_the_stored_pixels(tmp_path: Path) -> None:
    shapes = [(41, 30), (12, 50), (33, 33)]
    paths = [picture(tmp_path, f"{height}.jpg", height, width) for height, width in shapes]
    made = make(tmp_path, "val", Config(), *paths)
    seen = [imaging.decode(path.read_bytes())[::PIXEL_STEP, ::PIXEL_STEP].reshape(-1, 3) for path in paths]
    levels = np.concatenate(seen).astype(np.float64) / 255
    found = made.pixels
    assert found
    assert found.num == len(levels)
    np.testing.assert_allclose(found.mean, levels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(levels.T, bias=True), rtol=1e-9)
    np.testing.assert_allclose(found.std, levels.std(axis=0), rtol=1e-9)
    assert made.sizes
    assert (made.sizes.smallest_hw, made.sizes.largest_hw) == ((12, 30), (41, 50))
    assert made.sizes.mean_hw == pytest.approx((86 / 3, 113 / 3))


def test_statistics_of_resized_images_are_those_before_they_are_encoded(tmp_path: Path) -> None:
    path = picture(tmp_path, "x.jpg", 64, 64)
    made = make(tmp_path, "train", Config(train_short_side=16), path)
    small = shrink_short(imaging.decode(path.read_bytes(), min_short=16), 16)
    assert made.pixels
    assert made.pixels.num == 16
    np.testing.assert_allclose(made.pixels.mean, small[::4, ::4].mean(axis=(0, 1)) / 255, rtol=1e-12)
    assert made.sizes
    assert made.sizes.largest_hw == (64, 64)


def test_statistics_of_parts_add_up_to_those_of_the_whole(tmp_path: Path) -> None:
    paths = [picture(tmp_path, f"{height}.jpg", height, 20 + height % 7) for height in range(10, 22)]
    records = [Record(f"val/{path.name}", str(path), "val", index % 3) for index, path in enumerate(paths)]
    whole = make_shard(tmp_path / "whole.parquet", "val", records, Config(rows_per_group=5))
    cuts = [records[:1], records[1:7], records[7:]]
    parts = [
        make_shard(tmp_path / f"{index}.parquet", "val", cut[::-1], Config(rows_per_group=2))
        for index, cut in enumerate(cuts)
    ]
    assert reduce(add, [part.pixels for part in parts if part.pixels]) == whole.pixels
    assert reduce(add, [part.sizes for part in parts if part.sizes]) == whole.sizes
    assert sum(int(part.digest, 16) for part in parts) % DIGEST_MODULUS == int(whole.digest, 16)
    assert whole.class_counts == {0: 4, 1: 4, 2: 4}


def test_digest_does_not_depend_on_resizing_and_does_on_label_and_bytes(tmp_path: Path) -> None:
    path, other = picture(tmp_path, "a.jpg", 40, 40), picture(tmp_path, "b.jpg", 41, 40)

    def digest(label: int = 0, image_id: str = "train/x", source: Path = path, short: int | None = None) -> str:
        record = Record(image_id, str(source), "train", label)
        return make_shard(tmp_path / "d.parquet", "train", [record], Config(train_short_side=short)).digest

    expected = digest()
    assert digest(short=16) == expected
    assert len({expected, digest(label=1), digest(image_id="train/y"), digest(source=other)}) == 4


def test_digest_depends_on_boxes(tmp_path: Path) -> None:
    found = [annotated(tmp_path, boxed(boxes))[0].digest for boxes in ([[0, 0, 5, 5]], [[0, 0, 5, 6]], [])]
    assert len({*found, annotated(tmp_path, None)[0].digest}) == 4


def test_digest_depends_on_the_pixels_of_a_mask_and_not_on_how_it_was_written(tmp_path: Path) -> None:
    path, pixels_of = tmp_path / "mask.png", np.random.default_rng(0).integers(0, 3, (40, 60), np.uint8)

    def digest(mask: UInt8Array, compress_level: int) -> str:
        Image.fromarray(mask).save(path, compress_level=compress_level)
        return annotated(tmp_path, None, path)[0].digest

    expected = digest(pixels_of, 1)
    assert digest(pixels_of, 9) == expected
    assert len({expected, digest(pixels_of + 1, 1), annotated(tmp_path, None)[0].digest}) == 3


def test_digest_of_an_image_without_a_mask_is_that_of_earlier_versions(tmp_path: Path) -> None:
    made, (row,) = annotated(tmp_path, boxed([[0, 0, 5, 5]]))
    meaning = json.dumps(["train/x", None, [[0.0, 0.0, 5.0, 5.0]], [0], row["sha256"]])
    assert made.digest == hashlib.sha256(meaning.encode()).hexdigest()


def test_bands_are_counted_channel_by_channel(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (20, 24, 5), np.uint8)
    (tmp_path / "x.npy").write_bytes(imaging.encode_npy(bands))
    config = Config(decoding=imaging.Decoding(formats=("NPY",), num_channels=5))
    made = make(tmp_path, "val", config, tmp_path / "x.npy")
    assert made.pixels
    np.testing.assert_allclose(made.pixels.mean, bands[::4, ::4].mean(axis=(0, 1)) / 255, rtol=1e-12)


@pytest.mark.parametrize(("hw", "stored_hw"), [((40, 60), (20, 30)), ((20, 24), (20, 24))])
def test_bands_of_training_images_are_shrunk_to_npy_and_small_ones_stay(
    tmp_path: Path, hw: tuple[int, int], stored_hw: tuple[int, int]
) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (*hw, 5), np.uint8)
    (tmp_path / "x.npy").write_bytes(original := imaging.encode_npy(bands))
    decoding = imaging.Decoding(formats=("NPY",), num_channels=5)
    make(tmp_path, "train", Config(train_short_side=20, decoding=decoding), tmp_path / "x.npy")
    (row,) = stored(tmp_path)
    assert (row["height"], row["width"], row["original_height"], row["original_width"]) == (*stored_hw, *hw)
    assert (row["image"] == original) == (hw == stored_hw)
    np.testing.assert_array_equal(imaging.decode(row["image"], decoding), shrink_short(bands, 20))


def test_what_was_made_travels_as_json(tmp_path: Path) -> None:
    made = make(tmp_path, "val", Config(), picture(tmp_path, "x.jpg", 30, 30), tmp_path / "gone.jpg")
    assert Made.model_validate_json(made.model_dump_json(), strict=True) == made
