"""Stacking samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.batch import Batch, BoxTargets, of_equal_size, to_batch
from pipeline.types import Frame, Objects, Sample


def sample(value: int, label: int | None, side: int = 4) -> Sample:
    return Sample(np.full((3, side, side), value, np.uint8), Frame((side, side), (side, side)), label, f"id-{value}")


def test_to_batch_keeps_order_pixels_labels_and_ids() -> None:
    batch = to_batch([sample(7, 1), sample(9, 0)])
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, 0, 0, 0].tolist() == [7, 9]
    assert (batch.labels.dtype, batch.labels.tolist()) == (torch.int64, [1, 0])
    assert batch.ids == ("id-7", "id-9")
    assert (len(batch), len(batch.frames)) == (2, 2)


def test_to_batch_with_one_unknown_label_has_no_targets() -> None:
    assert to_batch([sample(7, 1), sample(9, None)]).targets is None


def test_to_moves_images_and_targets_and_keeps_the_rest() -> None:
    batch = to_batch([sample(7, 1)])
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert (moved.ids, moved.frames) == (batch.ids, batch.frames)
    assert Batch(batch.images).to("meta").targets is None
    with pytest.raises(ValueError, match="a class for each image"):
        assert Batch(batch.images).labels


def test_parts_of_equal_size_hold_each_picture_without_padding_and_all_that_belongs_to_it() -> None:
    def sample(number: int, height: int, width: int, num_objects: int) -> Sample:
        boxes = np.arange(4 * num_objects, dtype=np.float32).reshape(-1, 4) + number
        no = np.zeros(num_objects, bool)
        truth = Objects(boxes, np.full(num_objects, number), no, no, no)
        image = np.full((3, height, width), number, np.uint8)
        frame = Frame((height, width), (height, width))
        regions = np.full((1, 4), number, np.float32)
        return Sample(image, frame, image_id=str(number), objects=truth, proposals=regions)

    batch = to_batch([sample(1, 4, 6, 2), sample(2, 6, 4, 0), sample(3, 4, 6, 1), sample(4, 6, 4, 3)])
    (lying, first), (upright, second) = of_equal_size(batch)
    assert (lying, upright) == ([0, 2], [1, 3])
    assert first.images.shape == (2, 3, 4, 6)
    assert second.images.shape == (2, 3, 6, 4)
    assert [int(image.unique()) for image in (*first.images, *second.images)] == [1, 3, 2, 4]
    assert first.ids == ("1", "3")
    assert [len(one) for one in second.objects] == [0, 3]
    assert [float(one[0, 0]) for one in second.proposals] == [2, 4]
    assert isinstance(first.targets, BoxTargets)
    assert isinstance(second.targets, BoxTargets)
    assert first.targets.of_image.tolist() == [0, 0, 1]
    assert second.targets.of_image.tolist() == [1, 1, 1]
    assert second.targets.labels.tolist() == [4, 4, 4]
    assert torch.equal(second.targets.boxes_xyxy[0], torch.tensor([4.0, 5.0, 6.0, 7.0]))


def test_parts_of_a_batch_of_one_size_are_the_batch_itself() -> None:
    batch = Batch(torch.zeros(3, 3, 8, 8))
    ((places, part),) = of_equal_size(batch)
    assert places == [0, 1, 2]
    assert part is batch
