"""Regions to masks: hand-computed cases, agreement with faster-coco-eval, and regions that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from faster_coco_eval.core import mask as coco_mask
from hypothesis import given
from hypothesis import strategies as st

from pipeline import masks
from pipeline.errors import DataError
from pipeline.types import Objects, Region, RunLengths, UInt8Array


def square(left: float, top: float, side: float) -> tuple[float, ...]:
    return (left, top, left + side, top, left + side, top + side, left, top + side)


def objects(regions: list[Region], labels: list[int], crowd: list[bool] | None = None) -> Objects:
    none = np.zeros(len(labels), np.bool_)
    flags = none if crowd is None else np.array(crowd)
    return Objects(np.zeros((len(labels), 4), np.float32), np.array(labels), none, none, flags, tuple(regions))


@st.composite
def any_masks(draw: st.DrawFn) -> UInt8Array:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits, np.uint8).reshape(height, width)


def test_run_lengths_go_down_the_columns_and_begin_with_background() -> None:
    pixels = np.array([[1, 0, 0], [1, 1, 0]], np.uint8)
    lengths = RunLengths((2, 3), (0, 2, 1, 1, 2))
    assert masks.run_lengths(pixels) == lengths
    found = masks.mask(lengths, (2, 3))
    assert found.tolist() == pixels.tolist()
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous


@given(any_masks())
def test_masks_through_run_lengths_plain_and_compressed_come_back(pixels: UInt8Array) -> None:
    lengths = masks.run_lengths(pixels)
    assert np.array_equal(masks.mask(lengths, lengths.size_hw), pixels)
    packed: dict[str, Any] = coco_mask.encode(np.asfortranarray(pixels))
    for text in (packed["counts"], packed["counts"].decode()):
        assert masks.decompress(text, lengths.size_hw) == lengths


def test_compressed_run_lengths_of_many_and_large_numbers_are_read() -> None:
    pixels = np.zeros((300, 4000), np.uint8)
    pixels[:, 7::3] = 1
    pixels[5, 2000:] = 1
    packed = coco_mask.encode(np.asfortranarray(pixels))
    assert masks.decompress(packed["counts"], (300, 4000)) == masks.run_lengths(pixels)


def test_polygon_of_a_square_fills_its_pixels() -> None:
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = 1
    assert np.array_equal(masks.mask((square(2, 1, 3),), (6, 8)), expected)
    expected[0, 7] = 1
    assert np.array_equal(masks.mask((square(2, 1, 3), square(7, 0, 1)), (6, 8)), expected)
    assert not masks.mask((), (6, 8)).any()


def test_polygons_agree_with_the_reference_also_beyond_the_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        polygons = [tuple(rng.uniform(-5, 35, 2 * int(rng.integers(3, 9))).tolist()) for _ in range(2)]
        reference: npt.NDArray[np.uint8] = coco_mask.decode(
            coco_mask.merge(coco_mask.frPyObjects([list(polygon) for polygon in polygons], 20, 30))
        )
        assert np.array_equal(masks.mask(tuple(polygons), (20, 30)), reference)


@pytest.mark.parametrize(
    ("region", "sentence"),
    [
        (((1.0, 1.0, 5.0, 1.0, 5.0),), "at least 3 points .* got 5 numbers"),
        (((1.0, 1.0, 5.0, 1.0),), "at least 3 points .* got 4 numbers"),
        (((1.0, 1.0, 5.0, 1.0, 5.0, float("nan")),), r"image of \(6, 8\) .* got nan"),
        (((1.0, 1.0, 5.0, 1.0, 1e9, 5.0),), "got 1000000000.0"),
        (RunLengths((6, 8), (40, 7)), "add up to 6 x 8 = 48 pixels, got 2 that add up to 47"),
        (RunLengths((6, 8), (50, -2)), "at least 0, got -2"),
        (RunLengths((6, 8), ()), "got 0 that add up to 0"),
        (RunLengths((8, 6), (48,)), r"for an image of \(6, 8\) .* got them for \(8, 6\)"),
    ],
)
def test_region_that_is_malformed_says_what_came(region: Region, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        masks.mask(region, (6, 8))
    with pytest.raises(DataError, match=sentence):
        masks.semantic(objects([region], [0]), (6, 8))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 1", "got ' ' in them"),
        ("1é", "in them"),
        ("o" * 30, "characters '0' to 'o'"),  # a number that never ends
        ("`", "end within a number"),
        ("9", "add up to 3 x 4 = 12 pixels, got 1 that add up to 9"),
        ("O", "at least 0, got -1"),
    ],
)
def test_compressed_run_lengths_that_are_damaged_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        masks.decompress(text, (3, 4))


def test_semantic_mask_shows_small_objects_over_large_ones_and_crowds_below() -> None:
    size_hw = (4, 6)
    large, small, crowd = (square(0, 0, 4),), masks.run_lengths(np.eye(4, 6, dtype=np.uint8)), (square(0, 0, 6),)
    expected = np.full(size_hw, 255)
    expected[:, :4] = 3
    expected[np.arange(4), np.arange(4)] = 1
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        regions: list[Region] = [large, small, crowd]
        given_ = objects([regions[i] for i in order], [[2, 0, 5][i] for i in order], [i == 2 for i in order])
        found = masks.semantic(given_, size_hw)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)


def test_semantic_mask_without_regions_is_background() -> None:
    assert not masks.semantic(objects([], [3, 4]), (4, 6)).any()
    assert not masks.semantic(objects([(), ()], [3, 4]), (4, 6)).any()


def test_semantic_mask_takes_label_253_and_no_more() -> None:
    assert masks.semantic(objects([(square(0, 0, 2),)], [253]), (2, 2)).tolist() == [[254, 254], [254, 254]]
    with pytest.raises(DataError, match=r"labels 0 to 253 .* got 254"):
        masks.semantic(objects([(square(0, 0, 2),)], [254]), (2, 2))
