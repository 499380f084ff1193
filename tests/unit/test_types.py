"""The nouns: frames that map back, and arrays that do not belong together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.types import Classification, Frame, InputSpec


def test_frame_maps_boxes_back_and_clips_to_the_original() -> None:
    frame = Frame(original_hw=(100, 200), input_hw=(50, 50), scale_xy=(0.5, 0.25), offset_xy=(-10.0, 5.0))
    boxes = np.array([[0, 10, 40, 25], [-50, 0, 500, 500]], np.float32)
    # x = (x' + 10) / 0.5 and y = (y' - 5) / 0.25
    assert frame.to_original(boxes).tolist() == [[20, 20, 100, 80], [0, 0, 200, 100]]
    assert frame.to_original(boxes).dtype == np.float32
    assert frame.to_original(np.empty((0, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize(("labels", "scores"), [((2,), (3,)), ((2, 1), (2, 1)), ((), ())])
def test_classification_of_other_shapes_is_refused(labels: tuple[int, ...], scores: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \[K\]"):
        Classification(np.zeros(labels, np.int64), np.zeros(scores, np.float32))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size_hw": (0, 8)}, "size_hw must be positive"),
        ({"size_hw": (8, 9), "resize_short": 8}, "resize_short 8 is smaller than the crop"),
        ({"size_hw": (8, 8), "mean": (0.5, 0.5), "std": (1.0, 1.0)}, "need 1 or 3 values"),
        ({"size_hw": (8, 8), "mean": (0.5,)}, "need 1 or 3 values"),
        ({"size_hw": (8, 8), "mean": (0.5,), "std": (0.0,)}, "every std positive"),
    ],
)
def test_input_spec_that_no_image_can_meet_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputSpec(**keys)
