"""Box forms and geometry: hand-computed cases, and round trips between all forms for any box."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import boxes
from pipeline.types import Float32Array

SIZE_HW = (480, 640)

Form = tuple[Callable[[Float32Array], Float32Array], Callable[[Float32Array], Float32Array]]
FORMS: dict[str, Form] = {
    "voc": (boxes.xyxy_to_voc, boxes.voc_to_xyxy),
    "coco": (boxes.xyxy_to_xywh, boxes.xywh_to_xyxy),
    "yolo": (lambda each: boxes.xyxy_to_cxcywh(each, SIZE_HW), lambda each: boxes.cxcywh_to_xyxy(each, SIZE_HW)),
    "half": (lambda each: boxes.scale(each, SIZE_HW, (240, 320)), lambda each: boxes.scale(each, (240, 320), SIZE_HW)),
}


@st.composite
def any_boxes(draw: st.DrawFn) -> Float32Array:
    """Boxes [N, 4] within an image of 480 x 640, in sixteenths of a pixel, also of zero size."""
    sides = st.tuples(*(st.integers(0, 16 * side) for side in (640, 480, 640, 480)))
    drawn = np.array(draw(st.lists(sides, max_size=6)), np.float32).reshape(-1, 4) / 16
    return np.concatenate([np.minimum(drawn[:, :2], drawn[:, 2:]), np.maximum(drawn[:, :2], drawn[:, 2:])], axis=1)


@given(any_boxes(), st.permutations(sorted(FORMS)))
def test_boxes_through_every_form_in_any_order_come_back(original: Float32Array, names: list[str]) -> None:
    found = original
    for name in names:
        there, back = FORMS[name]
        written = there(found)
        assert written.shape == original.shape
        assert written.dtype == np.float32
        found = back(written)
    np.testing.assert_allclose(found, original, atol=2e-3)


@given(any_boxes())
def test_forms_that_only_add_or_subtract_sixteenths_are_exact(original: Float32Array) -> None:
    for name in ("voc", "coco", "half"):
        there, back = FORMS[name]
        assert np.array_equal(back(there(original)), original)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (boxes.voc_to_xyxy([[1.0, 1.0, 640.0, 480.0], [5.5, 7.0, 5.5, 7.0]]), [[0, 0, 640, 480], [4.5, 6, 5.5, 7]]),
        (boxes.xyxy_to_voc([[0, 0, 640, 480]]), [[1, 1, 640, 480]]),
        (boxes.xywh_to_xyxy([[10, 20, 30, 5]]), [[10, 20, 40, 25]]),
        (boxes.xyxy_to_xywh([[10, 20, 40, 25]]), [[10, 20, 30, 5]]),
        (boxes.cxcywh_to_xyxy([[0.5, 0.25, 0.5, 0.5]], (100, 200)), [[50, 0, 150, 50]]),
        (boxes.xyxy_to_cxcywh([[50, 0, 150, 50]], (100, 200)), [[0.5, 0.25, 0.5, 0.5]]),
        (boxes.clip([[-5, -1, 700, 3], [700, 500, 900, 600]], SIZE_HW), [[0, 0, 640, 3], [640, 480, 640, 480]]),
        (boxes.scale([[0.5, 0.5, 1, 1]], (1, 1), (10, 20)), [[10, 5, 20, 10]]),
        (boxes.scale([[2, 3, 4, 9]], (10, 20), (20, 10)), [[1, 6, 2, 18]]),
    ],
)
def test_conversion_of_a_known_box_gives_the_known_numbers(found: Float32Array, expected: list[list[float]]) -> None:
    assert found.dtype == np.float32
    assert found.tolist() == expected


def test_area_and_iou_of_known_boxes() -> None:
    first = np.array([[0, 0, 2, 2], [0, 0, 0, 5], [3, 3, 1, 1]], np.float32)  # the last two: of zero, of negative size
    second = np.array([[1, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 0, 5]], np.float32)
    assert boxes.area(first).tolist() == [4, 0, 0]
    np.testing.assert_allclose(boxes.iou(first, second)[0], [1 / 7, 1, 0, 0], rtol=1e-6)
    assert not boxes.iou(first, second)[1:].any()


@given(any_boxes(), any_boxes())
def test_iou_is_symmetric_between_0_and_1_and_1_only_of_equal_boxes(first: Float32Array, second: Float32Array) -> None:
    found = boxes.iou(first, second)
    assert found.shape == (len(first), len(second))
    assert np.array_equal(found, boxes.iou(second, first).T)
    assert ((found >= 0) & (found <= 1)).all()
    equal = (first[:, None] == second[None]).all(axis=2) & (boxes.area(first) > 0)[:, None]
    assert np.array_equal(found > 1 - 1e-7, equal)


def test_no_boxes_stay_no_boxes_and_other_shapes_are_refused() -> None:
    assert boxes.voc_to_xyxy([]).shape == (0, 4)
    assert boxes.iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    with pytest.raises(ValueError, match=r"expected boxes \[N, 4\], got an array of shape \(4,\)"):
        boxes.clip([0, 0, 1, 1], SIZE_HW)
    with pytest.raises(ValueError, match="positive height and width"):
        boxes.scale([[0, 0, 1, 1]], (0, 5), SIZE_HW)
