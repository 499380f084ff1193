"""Selective search and what is made of it: objects are covered, the same picture gives the same regions, no size breaks
it; recall by hand."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import imaging
from pipeline.data import proposals, regions, shards
from pipeline.data.proposals import Figures, Part, Proposals
from pipeline.errors import ConfigError, DataError
from pipeline.types import Float32Array, UInt8Array

ROOT = Path(__file__).parents[2]
SMALL = regions.Config(width=100, min_side=5)  # an eighth of a second
OBJECTS = np.array([[10, 8, 34, 30], [52, 10, 90, 28], [20, 44, 50, 70], [64, 40, 88, 72]], np.float32)


def picture(seed: int = 0) -> UInt8Array:
    """Four bright rectangles on a noisy dark ground, 80 x 100."""
    rng = np.random.default_rng(seed)
    canvas = rng.integers(20, 60, (80, 100, 3))
    for (left, top, right, bottom), colour in zip(
        OBJECTS.astype(int).tolist(), ((220, 40, 40), (40, 220, 40), (240, 240, 60), (60, 60, 250)), strict=True
    ):
        canvas[top:bottom, left:right] = np.array(colour) + rng.integers(-10, 6, (bottom - top, right - left, 3))
    return canvas.astype(np.uint8)


def digest(found: Float32Array) -> str:
    return hashlib.sha256(found.tobytes()).hexdigest()


@pytest.mark.parametrize("mode", ["fast", "quality"])
def test_search_covers_every_bright_rectangle(mode: regions.Mode) -> None:
    found = regions.selective_search(picture(), SMALL.model_copy(update={"mode": mode}))
    assert found.dtype == np.float32
    assert (regions.best_overlaps(found, OBJECTS) > 0.85).all()
    shifted = OBJECTS + 300
    assert not regions.best_overlaps(found, shifted).any()


def test_quality_finds_more_regions_than_fast() -> None:
    fast, quality = (
        regions.selective_search(picture(), SMALL.model_copy(update={"mode": mode})) for mode in ("fast", "quality")
    )
    assert len(quality) > 1.5 * len(fast)


def test_search_of_the_same_picture_gives_the_same_regions_whatever_came_between() -> None:
    first = regions.selective_search(picture(), SMALL)
    regions.selective_search(picture(1), SMALL)
    cv2.setRNGSeed(7)
    ctypes.CDLL(None).srand(7)  # what OpenCV draws its order from
    np.random.seed(7)
    assert np.array_equal(regions.selective_search(picture(), SMALL), first)
    assert not np.array_equal(regions.selective_search(picture(1), SMALL), first)


def test_search_in_another_process_gives_the_same_regions() -> None:
    code = (
        "from tests.unit.test_regions import *\n"
        "regions.selective_search(picture(2), SMALL)\n"
        "regions.use_one_thread()\n"
        "print(digest(regions.selective_search(picture(), SMALL)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(regions.selective_search(picture(), SMALL))


def test_search_of_a_picture_of_twice_the_size_gives_boxes_of_twice_the_size() -> None:
    once = picture()
    twice = once.repeat(2, axis=0).repeat(2, axis=1)  # shrinks to the same pixels
    assert np.array_equal(regions.selective_search(twice, SMALL), 2 * regions.selective_search(once, SMALL))


def test_search_of_an_enlarged_picture_covers_the_objects_where_they_are_in_it() -> None:
    found = regions.selective_search(picture(), SMALL.model_copy(update={"width": 137}))
    assert (regions.best_overlaps(found, OBJECTS) > 0.8).all()
    assert found[:, 2].max() == 100
    assert found[:, 3].max() == 80


def test_limits_keep_the_first_regions_and_drop_small_ones() -> None:
    found = regions.selective_search(picture(), SMALL)
    few = regions.selective_search(picture(), SMALL.model_copy(update={"max_proposals": 7}))
    assert np.array_equal(few, found[:7])
    sides = found[:, 2:] - found[:, :2]
    assert sides.min() >= SMALL.min_side
    large = regions.selective_search(picture(), SMALL.model_copy(update={"min_side": 30}))
    assert {*map(tuple, large.tolist())} == {*map(tuple, found[(sides >= 30).all(axis=1)].tolist())}


def test_large_regions_come_rather_early_but_not_in_order_of_size() -> None:
    found = regions.selective_search(picture(), SMALL)
    areas = (found[:, 2:] - found[:, :2]).prod(axis=1)
    fifth = len(areas) // 5
    assert areas[:fifth].mean() > 2 * areas[-fifth:].mean()
    assert (np.diff(areas) > 0).mean() > 0.2


@pytest.mark.parametrize(
    "size_hw", [(1, 1), (1, 2), (2, 1), (3, 7), (1, 60), (60, 1), (1, 10_000), (10_000, 1), (40, 900), (900, 40)]
)
@pytest.mark.parametrize("is_flat", [True, False])
def test_search_of_odd_sizes_gives_regions_inside(size_hw: tuple[int, int], is_flat: bool) -> None:
    low = 255 if is_flat else 0
    image = np.random.default_rng(0).integers(low, 256, (*size_hw, 3), np.uint8)
    found = regions.selective_search(image, SMALL)
    assert len(found) >= 1
    assert len(np.unique(found, axis=0)) == len(found)
    assert found.min() >= 0
    assert (found[:, 2:] <= size_hw[::-1]).all()
    assert (found[:, 2:] - found[:, :2] >= 0.999).all()  # at least a pixel
    if is_flat:
        assert found.tolist() == [[0, 0, size_hw[1], size_hw[0]]]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["grey", "four channels", "floating", "empty"],
)
def test_search_of_what_is_no_picture_says_what_came(image: UInt8Array) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\] to search for regions, got (uint8|float32) \("):
        regions.selective_search(image, SMALL)


@pytest.mark.parametrize("present", [None, types.ModuleType("cv2")], ids=["nothing", "without contributed modules"])
def test_search_without_opencv_names_what_to_install(
    present: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", present)
    monkeypatch.delitem(sys.modules, "cv2.ximgproc")
    for use in (lambda: regions.selective_search(picture(), SMALL), regions.opencv_version, regions.use_one_thread):
        with pytest.raises(ConfigError, match=r"needs OpenCV .* run pip install 'ventral\[proposals\]'$"):
            use()


def test_import_brings_neither_opencv_nor_ray_nor_torch() -> None:
    code = (
        "import sys, pipeline.data.regions, pipeline.data.proposals\n"
        "assert not {'cv2', 'ray', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_best_overlap_is_the_largest_iou_with_any_region() -> None:
    found = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]], np.float32)
    truth = np.array([[0, 0, 10, 10], [0, 0, 5, 5], [20, 20, 30, 27], [50, 50, 60, 60]], np.float32)
    assert regions.best_overlaps(found, truth).tolist() == [1.0, 0.5, 0.7, 0.0]
    assert regions.best_overlaps(found[:0], truth).tolist() == [0.0] * 4
    assert regions.best_overlaps(found, truth[:0]).tolist() == []


def test_figures_count_objects_at_either_limit() -> None:
    told = [
        {"best_overlaps": [0.5, 0.7, 0.1], "num_regions": 10, "seconds": 1.0},
        {"best_overlaps": None, "num_regions": 20, "seconds": 2.0},  # not annotated
        {"best_overlaps": [], "num_regions": 30, "seconds": 6.0},
        {"best_overlaps": [0.9, 0.0], "num_regions": 40, "seconds": 3.0},
    ]
    figures = Figures.of(pa.Table.from_pylist(told, schema=proposals.SCHEMA))
    assert (figures.num_images, figures.mean_regions, figures.seconds_per_image) == (4, 25.0, 3.0)
    assert (figures.num_objects, figures.recall_at_iou_0_5, figures.recall_at_iou_0_7) == (5, 3 / 5, 2 / 5)
    assert figures.mean_best_overlap == pytest.approx(2.2 / 5)


def test_figures_without_an_object_have_no_recall() -> None:
    none: list[float] = []
    told = [{"best_overlaps": found, "num_regions": 1, "seconds": 1.0} for found in (None, none)]
    figures = Figures.of(pa.Table.from_pylist(told, schema=proposals.SCHEMA))
    assert figures.num_objects == 0
    assert (figures.recall_at_iou_0_5, figures.recall_at_iou_0_7, figures.mean_best_overlap) == (None, None, None)


def alone(folder: Path, image: bytes, original_hw: tuple[int, int]) -> shards.Shards:
    """A dataset of one training picture that is not annotated."""
    with shards.Writer(folder / "train-00000.parquet", "train", 1) as writer:
        writer.add(
            {
                "image_id": "one",
                "image": image,
                **dict(zip(("original_height", "original_width"), original_hw, strict=True)),
            }
        )
    assert writer.shard
    manifest = shards.Manifest(
        dataset="image_folder",
        classes=("thing",),
        class_counts={"train": (1,)},
        num_rejects=0,
        shards=(writer.shard,),
        digest="1" * 64,
        decoding=imaging.Decoding(),
        config={},
        tool_versions={},
    )
    return shards.Shards(folder, manifest)


ONLY = Part("train-00000.parquet", 0, 1)


def test_part_of_a_picture_that_was_stored_smaller_is_in_original_pixels(tmp_path: Path) -> None:
    source = alone(tmp_path, imaging.encode_png(picture()), original_hw=(160, 300))
    proposals.make_part(source, ONLY, SMALL, tmp_path / "part.parquet")
    (row,) = pq.read_table(tmp_path / "part.parquet").to_pylist()
    found = np.array(row["boxes"], np.float32)
    assert found == pytest.approx(regions.selective_search(picture(), SMALL) * [3, 2, 3, 2])
    assert row["best_overlaps"] is None
    assert (row["image_id"], row["num_regions"]) == ("one", len(found))
    assert {path.name for path in tmp_path.iterdir()} == {"part.parquet", ONLY.shard}


def test_part_with_an_image_that_does_not_decode_names_it(tmp_path: Path) -> None:
    source = alone(tmp_path, b"nothing", original_hw=(1, 1))
    with pytest.raises(DataError, match=r"image 'one' does not decode: .* run jobs\.verify"):
        proposals.make_part(source, ONLY, SMALL, tmp_path / "part.parquet")
    assert [path.name for path in tmp_path.iterdir()] == [ONLY.shard]


def test_reader_of_an_image_without_proposals_says_which_splits_have_some(tmp_path: Path) -> None:
    made = proposals.Made(dataset="voc", digest="0", search=SMALL, splits={}, tool_versions={})
    empty = Proposals(tmp_path, made, (), {})
    with pytest.raises(DataError, match="has no proposals of image 'x', only of 0 images"):
        empty.of("x")
