"""Stacking samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.batch import Batch, to_batch
from pipeline.types import Frame, Sample


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
