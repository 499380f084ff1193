"""R-CNN: what a warped region shows, which regions teach, both scorers' losses and answers, and its last layers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from pipeline import boxes as geometry
from pipeline import config as configuration
from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ConfigError, ModelError
from pipeline.inference import bundle
from pipeline.models import rcnn
from pipeline.models._solvable import Examples, Layer, Solvable
from pipeline.models.rcnn import RCNN, Answers, Config, Lesson, Outputs
from pipeline.types import DetectorSpec, Frame

SMALL: dict[str, Any] = {
    "backbone": "squeezenet1_1",
    "num_classes": 2,
    "region_side": 48,
    "context": 16,
    "pool_size": 2,
    "fc_features": 32,
    "dropout": 0.0,
}
RAW = DetectorSpec(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
"""Pixels reach the network as they are, and the mean colour is 0."""
Scorer = Literal["softmax", "svm"]
Box = list[float]
RED: Box = [6, 8, 42, 40]
BLUE: Box = [54, 14, 86, 58]
NEAR: list[Box] = [[24, 8, 60, 40], [54, 36, 86, 80], [6, 24, 42, 56]]  # overlaps of 1/3
SIZE_HW = (64, 96)
ONCE_AND_FAR: list[Box] = [RED, [10, 12, 40, 44], [70, 0, 90, 30], [0, 0, 96, 64], [2, 50, 30, 62]]


def build(seed: int = 0, **keys: Any) -> RCNN:
    torch.manual_seed(seed)
    return rcnn.build(Config(**(SMALL | keys)))


def boxes_of(rows: list[Box]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def targets_of(*images: tuple[list[Box], list[int]]) -> BoxTargets:
    """Of each image its boxes and labels."""
    counts = torch.tensor([len(labels) for _, labels in images])
    boxes = boxes_of([box for boxes, _ in images for box in boxes])
    labels = torch.tensor([label for _, labels in images for label in labels], dtype=torch.int64)
    return BoxTargets(boxes, labels, torch.arange(len(images)).repeat_interleave(counts), len(images))


def frame_of(height: int, width: int) -> Frame:
    return Frame((height, width), (height, width))


def noise(*shape: int) -> Tensor:
    """Pixels from 100 to 255."""
    return torch.randint(100, 256, shape, generator=torch.Generator().manual_seed(1)).float()


def ramps(height: int, width: int) -> Tensor:
    """A picture [1, 3, height, width] that holds x, y and 0, so that what is cut out of it tells from where."""
    x = (torch.arange(width) + 0.5).expand(height, width)
    y = (torch.arange(height) + 0.5)[:, None].expand(height, width)
    return torch.stack([x, y, torch.zeros(height, width)])[None]


def scene(proposals: list[Box]) -> Batch:
    """A red and a blue rectangle on grey."""
    image = torch.full((1, 3, *SIZE_HW), 90, dtype=torch.uint8)
    image[0, :, 8:40, 6:42] = torch.tensor([230, 40, 40], dtype=torch.uint8)[:, None, None]
    image[0, :, 14:58, 54:86] = torch.tensor([40, 60, 230], dtype=torch.uint8)[:, None, None]
    targets = targets_of(([RED, BLUE], [0, 1]))
    return Batch(image, targets, (frame_of(*SIZE_HW),), proposals=(boxes_of(proposals),))


def watched(model: RCNN, batch: Batch) -> tuple[Outputs, list[Tensor]]:
    """What the model says, and the warped regions that its network was given, call by call."""
    given: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(lambda _, regions: given.append(regions[0].detach()))
    try:
        return model(batch), given
    finally:
        hook.remove()


def warped(images: Tensor, *proposals: list[Box], sizes: tuple[tuple[int, int], ...] = (), **keys: Any) -> Tensor:
    """Proposals of each picture as the network sees them; `sizes` of the pictures without padding."""
    frames = tuple(frame_of(*size) for size in sizes)
    batch = Batch(images, frames=frames, proposals=tuple(map(boxes_of, proposals)))
    with torch.no_grad():
        return torch.cat(watched(build(**({"input": RAW} | keys)).eval(), batch)[1])


def drawn(model: RCNN, *images: tuple[list[Box], list[int], list[Box]]) -> list[tuple[Box, int, Box]]:
    """Place, class (0: background) and wanted correction of what is drawn of boxes, labels and proposals of images."""
    pictures = ramps(*SIZE_HW).repeat(len(images), 1, 1, 1)
    targets = targets_of(*((boxes, labels) for boxes, labels, _ in images))
    outputs, (regions,) = watched(
        model.train(), Batch(pictures, targets, proposals=tuple(boxes_of(last) for *_, last in images))
    )
    assert outputs.answers is None
    assert outputs.lesson is not None
    # The two pixels in the middle of 16 that the region itself fills.
    x, y = regions[:, 0, 24, 23:25], regions[:, 1, 23:25, 24]
    middles, halves = (torch.stack([x.mean(1), y.mean(1)], 1), 8 * torch.stack([x.diff()[:, 0], y.diff()[:, 0]], 1))
    places = (torch.cat([middles - halves, middles + halves], 1) * 100).round() / 100
    _, labels, wanted = outputs.lesson
    return list(zip(places.tolist(), labels.tolist(), wanted.tolist(), strict=True))


def classes_of(found: list[tuple[Box, int, Box]]) -> list[tuple[Box, int]]:
    return sorted((rounded(box), label) for box, label, _ in found)


def rounded(box: Box) -> Box:
    return [round(side, 2) for side in box]


def outputs_of(boxes: list[Box], logits: list[list[float]], deltas: list[list[Box]] | None = None) -> Outputs:
    """As if the network had said so of regions of one picture."""
    none = torch.zeros(len(boxes), 1)
    corrections = torch.zeros(len(boxes), 0, 4) if deltas is None else torch.tensor(deltas)
    return Outputs([SIZE_HW], (boxes_of(boxes),), Answers(none, none, torch.tensor(logits), corrections), None)


# What a warped region shows.


@pytest.mark.parametrize("region", [[40, 30, 56, 46], [30.5, 21.25, 33.5, 23.75], [40, 24, 72, 40], [40, 30, 60, 54]])
def test_region_fills_the_square_but_for_its_context_whatever_its_aspect(region: Box) -> None:
    (pixels,) = warped(ramps(80, 120), [region])
    cells = torch.arange(48) - 16 + 0.5  # from the edge of the region on, of which there are 16
    x1, y1, x2, y2 = region
    torch.testing.assert_close(pixels[0], (x1 + cells * (x2 - x1) / 16).expand(48, 48))
    torch.testing.assert_close(pixels[1], (y1 + cells * (y2 - y1) / 16)[:, None].expand(48, 48))


def test_region_without_context_fills_the_whole_square() -> None:
    (pixels,) = warped(ramps(80, 120), [[30, 20, 54, 32]], context=0)
    torch.testing.assert_close(pixels[0, 0], 30 + (torch.arange(48) + 0.5) / 2)
    torch.testing.assert_close(pixels[1, :, 0], 20 + (torch.arange(48) + 0.5) / 4)


def test_small_region_is_interpolated_as_by_grid_sample() -> None:
    images, region = noise(1, 3, 50, 70), [22.3, 19.9, 33.1, 27.2]
    steps = (torch.arange(48) - 15.5) / 16
    x, y = (region[at] + steps * (region[at + 2] - region[at]) for at in (0, 1))
    grid = torch.stack([(2 * x / 70 - 1).expand(48, 48), (2 * y / 50 - 1)[:, None].expand(48, 48)], dim=-1)
    expected = F.grid_sample(images, grid[None], align_corners=False)
    torch.testing.assert_close(warped(images, [region]), expected, rtol=1e-4, atol=0.02)


def test_large_region_is_averaged_pixel_by_pixel() -> None:
    images = noise(1, 3, 120, 170)
    expected = F.avg_pool2d(images[..., 12:108, 4:148], (2, 3))
    torch.testing.assert_close(warped(images, [[52, 44, 100, 76]]), expected)  # with its context three times as large


def test_what_lies_a_pixel_outside_the_picture_is_the_mean_colour() -> None:
    white, spec = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), DetectorSpec()
    (pixels,) = warped(white, [[0, 0, 64, 64]], input=spec)  # 4 pixels in each; 16 around the picture on each side
    value = (1 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    torch.testing.assert_close(pixels[:, 16:32, 16:32], value[:, None, None].expand(3, 16, 16))
    for outside in (slice(0, 15), slice(33, 48)):
        assert (pixels[:, outside] == 0).all()
        assert (pixels[:, :, outside] == 0).all()


@pytest.mark.parametrize("region", [[0, 5, 16, 15], [10, 0, 20, 16], [12, 4, 28, 12], [8, 8, 16, 24], [-8, -8, 8, 8]])
def test_region_at_the_edge_is_that_of_the_same_picture_amid_mean_colour(region: Box) -> None:
    images = noise(1, 3, 24, 28)
    amid = F.pad(images, (40, 40, 40, 40))
    expected = warped(amid, [[side + 40 for side in region]])
    torch.testing.assert_close(warped(images, [region]), expected, rtol=0, atol=0.01)


def test_padding_of_a_smaller_picture_counts_as_outside() -> None:
    small, sizes = noise(1, 3, 32, 32), ((32, 32), (64, 96))
    (pixels, *_) = warped(F.pad(small, (0, 64, 0, 32), value=255).repeat(2, 1, 1, 1), [[8, 8, 24, 24]], [], sizes=sizes)
    assert (pixels[:, 41:] == 0).all()  # a warped pixel is one of the picture, which begins at 8 and ends at 40
    assert (pixels[:, :, 41:] == 0).all()
    torch.testing.assert_close(pixels[:, 9:39, 9:39], small[0, :, 1:31, 1:31])


def test_region_of_a_picture_is_the_same_beside_a_larger_one() -> None:
    small, region = noise(1, 3, 32, 32), [8.0, 8.0, 24.0, 24.0]
    both = F.pad(small, (0, 64, 0, 32), value=255).repeat(2, 1, 1, 1)
    torch.testing.assert_close(warped(both, [region], [], sizes=((32, 32), (64, 96))), warped(small, [region]))


def test_regions_are_cut_from_their_own_picture_in_order() -> None:
    images = torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1, 1).expand(3, 3, 64, 96)
    pixels = warped(images, [RED, BLUE], [], [BLUE])
    assert pixels[:, 0, 24, 24].tolist() == [10, 10, 30]


def test_pictures_of_the_batch_are_left_as_they_are() -> None:
    images = noise(2, 3, 64, 96)
    before = images.clone()
    warped(images, [RED], [BLUE], sizes=((40, 50), (64, 96)))
    assert torch.equal(images, before)


# What is drawn to learn from.


def test_objects_alone_are_drawn_where_nothing_is_proposed() -> None:
    found = drawn(build(input=RAW), ([RED, BLUE], [0, 1], []))
    assert classes_of(found) == [(RED, 1), (BLUE, 2)]
    assert all(wanted == [0, 0, 0, 0] for *_, wanted in found)


@pytest.mark.parametrize(("overlap", "label"), [(0.49, 0), (0.5, 1), (0.51, 1), (0.05, 0)])
def test_overlap_decides_what_a_region_is(overlap: float, label: int) -> None:
    inner = [6, 8, 6 + 36 * overlap, 40]  # a part of the red rectangle
    found = drawn(build(input=RAW), ([RED], [0], [inner, BLUE]))
    assert classes_of(found) == sorted([(RED, 1), (rounded(inner), label), (BLUE, 0)])


def test_threshold_of_the_overlap_is_the_configured_one() -> None:
    found = drawn(build(input=RAW, foreground_iou=0.3), ([RED, BLUE], [1, 0], NEAR[:1]))
    assert classes_of(found) == sorted([(RED, 2), (BLUE, 1), (NEAR[0], 2)])


def test_region_has_the_class_of_the_object_that_it_overlaps_most() -> None:
    wide, region = [6.0, 8, 62, 40], [6.0, 8, 46, 40]  # overlaps of 40/56 with the one and 36/40 with the other
    for objects, labels, label in (([wide, RED], [0, 1], 2), ([RED, wide], [0, 1], 1)):
        assert (region, label) in classes_of(drawn(build(input=RAW), (objects, labels, [region])))


def test_a_quarter_of_what_is_drawn_are_objects_at_most() -> None:
    shifts = [delta / 10 for delta in range(30)]
    hits, misses = ([[left + by, 8, left + 36 + by, 40] for by in shifts] for left in (6, 24))
    labels = [label for _, label, _ in drawn(build(input=RAW, rois_per_image=20), ([RED, BLUE], [0, 1], hits + misses))]
    assert len(labels) == 20
    assert sum(label > 0 for label in labels) == 5


def test_background_fills_up_where_objects_are_few() -> None:
    misses = [[24 + by / 10, 8, 60 + by / 10, 40] for by in range(30)]
    found = drawn(build(input=RAW, rois_per_image=20), ([RED], [1], misses))
    assert len(found) == 20
    assert [(box, label) for box, label in classes_of(found) if label > 0] == [(RED, 2)]


def test_fewer_are_drawn_where_there_are_not_enough() -> None:
    hits = [[6 + by / 10, 8, 42 + by / 10, 40] for by in range(30)]
    labels = [label for _, label, _ in drawn(build(input=RAW, rois_per_image=20), ([RED], [0], [*hits, BLUE]))]
    assert sorted(labels) == [0, 1, 1, 1, 1, 1]


def test_everything_is_background_in_an_image_without_objects() -> None:
    found = drawn(build(input=RAW), ([], [], [[0, 0, 1, 1], [0, 0, 1, 2], [0, 0, 96, 64], RED]))
    assert [label for _, label, _ in found] == [0] * 4


def test_each_image_is_drawn_from_alone_and_in_order() -> None:
    found = drawn(
        build(input=RAW, rois_per_image=4), ([BLUE], [1], [RED] * 9), ([], [], []), ([RED], [0], [RED, *[BLUE] * 9])
    )
    assert [label for _, label, _ in found][:4] in ([2, 0, 0, 0], [0, 0, 0, 2])
    assert classes_of(found[:4]) == sorted([(BLUE, 2), *[(RED, 0)] * 3])
    assert classes_of(found[4:]) == sorted([(RED, 1), *[(BLUE, 0)] * 3])


def test_draws_follow_torchs_generator() -> None:
    model, hits = build(input=RAW, rois_per_image=4), [[6 + by / 4, 8, 42, 40] for by in range(60)]

    def boxes(seed: int) -> list[tuple[Box, int]]:
        torch.manual_seed(seed)
        return classes_of(drawn(model, ([RED], [0], hits)))

    assert boxes(1) == boxes(1)
    assert boxes(1) != boxes(2)


def test_wanted_corrections_are_shares_of_the_region_and_logarithms() -> None:
    """Appendix C; the region is 40 x 40 about (20, 28), the object 36 x 32 about (24, 24)."""
    ((_, _, wanted),) = [one for one in drawn(build(input=RAW), ([RED], [0], [[0, 8, 40, 48]])) if one[0] != RED]
    assert wanted == pytest.approx([0.1, -0.1, math.log(36 / 40), math.log(32 / 40)], abs=1e-6)


# Losses and answers of known outputs.


def lesson_of(logits: list[list[float]], labels: list[int], deltas: Tensor, wanted: Tensor) -> Outputs:
    none = torch.zeros(len(labels), 1)
    lesson = Lesson(Answers(none, none, torch.tensor(logits), deltas), torch.tensor(labels), wanted)
    return Outputs([SIZE_HW], (), None, lesson)


def test_loss_with_softmax_is_the_mean_cross_entropy() -> None:
    outputs = lesson_of([[0, 0, 0], [0, 0, math.log(2)]], [0, 2], torch.zeros(2, 0, 4), torch.full((2, 4), math.nan))
    found = build().loss(outputs, targets_of(([], [])))
    assert set(found) == {"classifier"}
    assert found["classifier"] == pytest.approx((math.log(3) + math.log(2)) / 2)


def test_loss_with_machines_is_hinge_and_half_the_squared_error() -> None:
    margins = [[0.5, -2.0], [3.0, -0.5], [-1.0, 0.25]]  # hinges 0.5 + 0, 4 + 0.5, 0 + 0.75
    deltas, wanted = torch.full((3, 2, 4), 7.0), torch.full((3, 4), math.nan)  # where neither counts
    deltas[0, 0], wanted[0] = torch.tensor([1.0, 0, -2, 0]), torch.tensor([0.0, 0, 0, 1])  # 1 + 4 + 1
    deltas[2, 1], wanted[2] = torch.tensor([0.5, 0, 0, 0]), torch.tensor([0.5, 2, 0, 0])  # 4
    found = build(scorer="svm").loss(lesson_of(margins, [1, 0, 2], deltas, wanted), targets_of(([], [])))
    assert set(found) == {"svm", "boxes"}
    assert found["svm"] == pytest.approx(5.75 / 3)
    assert found["boxes"] == pytest.approx((6 + 4) / 2 / 3)


def test_candidates_with_softmax_are_the_regions_without_the_background() -> None:
    regions: list[Box] = [RED, [80, 50, 200, 70], [100, 0, 120, 64]]
    logits: list[list[float]] = [[0, math.log(2), 0], [math.log(8), 0, 0], [0, 9, 9]]
    (found,) = build().candidates(outputs_of(regions, logits))
    torch.testing.assert_close(found.boxes_xyxy, boxes_of([RED, [80, 50, 96, 64], [96, 0, 96, 64]]))
    torch.testing.assert_close(found.scores, torch.tensor([[0.5, 0.25], [0.1, 0.1], [0, 0]]))  # the last is outside


def test_candidates_with_machines_are_corrected_for_each_class_and_cut_off() -> None:
    regions: list[Box] = [[10, 10, 30, 20], [60, 40, 90, 60]]
    deltas: list[list[Box]] = [
        [[0.5, 0, math.log(2), 0], [0, -1, 0, math.log(0.5)]],
        [[1, 1, 0, 0], [2, 0, 0, 0]],
    ]
    margins = [[0, math.log(3)], [-math.log(3), 5]]
    (found,) = build(scorer="svm").candidates(outputs_of(regions, margins, deltas))
    expected = boxes_of([[10, 10, 50, 20], [10, 2.5, 30, 7.5], [90, 60, 96, 64], [96, 40, 96, 60]])
    torch.testing.assert_close(found.boxes_xyxy, expected.view(2, 2, 4))
    torch.testing.assert_close(found.scores, torch.tensor([[0.5, 0.75], [0.25, 0]]))  # nothing is left of the last


def test_corrections_beyond_measure_leave_finite_boxes() -> None:
    outputs = outputs_of([RED], [[0, 0]], [[[0, 0, 1000, 1000], [1e6, 0, -1000, 0]]])
    ((boxes, scores),) = build(scorer="svm").candidates(outputs)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.0, 0, 96, 64]))
    assert scores.tolist() == [[0.5, 0]]


def test_candidates_of_training_and_loss_without_targets_are_refused() -> None:
    model, batch = build(), scene([RED])
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        model.candidates(model.train()(batch))
    with pytest.raises(ModelError, match="whose targets are boxes"):
        model.loss(model.eval()(replace(batch, targets=None)), batch.boxes)


# What there is to solve the last layers from.


def noisy_batch() -> Batch:
    """Three pictures: one with two objects of a class and one of another, one without any, one with one."""
    corner = torch.rand(3, 12, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([60.0, 30.0])
    regions = torch.cat([corner, corner + 8 + corner.flip(1) / 3], dim=2)
    targets = targets_of(([RED, BLUE, [10, 12, 40, 44]], [1, 0, 1]), ([], []), ([[4, 4, 50, 60]], [2]))
    return Batch(noise(3, 3, *SIZE_HW), targets, (frame_of(*SIZE_HW),) * 3, proposals=tuple(regions))


def examples_of(model: RCNN, batch: Batch) -> Examples:
    with torch.no_grad():
        return model.eval().examples(batch)


def with_objects(batch: Batch) -> list[Tensor]:
    """Of each picture its objects, then what is proposed."""
    found = batch.boxes.per_image()
    return [torch.cat([boxes, proposed]) for (boxes, _), proposed in zip(found, batch.proposals, strict=True)]


def test_examples_are_the_objects_of_each_image_and_then_its_proposals() -> None:
    found = examples_of(build(num_classes=3), noisy_batch())
    assert found.is_object.tolist() == [*[True] * 3, *[False] * 12, *[False] * 12, True, *[False] * 12]
    assert found.of_image.tolist() == [*[0] * 15, *[1] * 12, *[2] * 13]
    assert (found.labels[:3].tolist(), found.labels[27].item()) == ([1, 0, 1], 2)
    assert (found.labels[15:27] == -1).all()
    assert (found.overlaps[15:27] == 0).all()
    assert found.overlaps.dtype == found.wanted.dtype == torch.float32


def test_examples_are_compared_with_every_object_of_their_image() -> None:
    batch = noisy_batch()
    found, row = examples_of(build(num_classes=3), batch), 0
    for regions, (boxes, labels) in zip(with_objects(batch), batch.boxes.per_image(), strict=True):
        for region in regions:
            shared = [float(geometry.iou(region[None].numpy(), box[None].numpy())[0, 0]) for box in boxes]
            best = [
                max([s for s, of in zip(shared, labels, strict=True) if of == label], default=0) for label in (0, 1, 2)
            ]
            np.testing.assert_allclose(found.overlaps[row], best, atol=1e-6)
            most = int(np.argmax(shared)) if max(shared, default=0) > 0 else None
            assert found.labels[row] == (-1 if most is None else labels[most])
            if most is not None:
                assert found.wanted[row].tolist() == pytest.approx(
                    correction(region.tolist(), boxes[most].tolist()), abs=1e-5
                )
            row += 1
    assert row == len(found.labels)
    assert 10 < (found.labels >= 0).sum() < row


def correction(region: Box, wanted: Box) -> Box:
    """Girshick 2014, appendix C, equations 6 to 9."""
    moved, grown = [], []
    for low, high in ((0, 2), (1, 3)):
        side, other = region[high] - region[low], wanted[high] - wanted[low]
        moved.append((wanted[low] + wanted[high] - region[low] - region[high]) / 2 / side)
        grown.append(math.log(other / side))
    return moved + grown


def test_examples_hold_what_a_pass_says_of_the_same_regions() -> None:
    model, batch = build(num_classes=3), noisy_batch()
    found = examples_of(model, batch)
    with torch.no_grad():
        answers = model(replace(batch, targets=None, proposals=tuple(with_objects(batch)))).answers
    assert found.features.shape == (40, 32)
    assert found.pooled.shape == (40, 512 * 4)
    torch.testing.assert_close(found.features, answers.features)
    torch.testing.assert_close(found.pooled, answers.pooled)


def test_objects_beyond_the_edge_are_cut_off_and_slivers_are_no_examples() -> None:
    objects = [[80.0, 20, 120, 60], [10, 10, 10.5, 40]]
    batch = Batch(noise(1, 3, *SIZE_HW), targets_of((objects, [0, 1])), proposals=(boxes_of([[80, 20, 96, 60]]),))
    found = examples_of(build(), batch)
    assert found.is_object.tolist() == [True, False]
    assert found.overlaps.tolist() == [[1, 0], [1, 0]]
    torch.testing.assert_close(found.wanted, torch.zeros(2, 4))


def test_objects_of_one_place_are_examples_of_their_own_classes() -> None:
    batch = Batch(noise(1, 3, *SIZE_HW), targets_of(([RED, RED], [0, 1])), proposals=(boxes_of([BLUE]),))
    found = examples_of(build(), batch)
    assert found.overlaps.tolist() == [[1, 1], [1, 1], [0, 0]]
    assert found.labels[:2].tolist() == [0, 1]


def test_examples_of_images_without_any_region_are_none() -> None:
    batch = Batch(noise(2, 3, *SIZE_HW), targets_of(([], []), ([], [])), proposals=(boxes_of([]),) * 2)
    assert {len(column) for column in examples_of(build(), batch)} == {0}


def test_examples_without_annotations_are_refused() -> None:
    with pytest.raises(ModelError, match="whose targets are boxes"):
        build().eval().examples(replace(scene([RED]), targets=None))


def layers_for(inputs: int, outputs: int) -> Layer:
    generator = torch.Generator().manual_seed(outputs)
    return Layer(*(torch.randn(*shape, generator=generator) / 10 for shape in ((outputs, inputs), (outputs,))))


def test_solved_model_answers_with_the_layers_it_was_given(tmp_path: Path) -> None:
    fitted, batch = build().eval(), scene(ONCE_AND_FAR)
    assert isinstance(fitted, Solvable)
    classes, boxes = layers_for(32, 2), layers_for(2048, 8)
    config, made = fitted.solved(classes, boxes)
    assert (config.scorer, config.is_solved, made.training) == ("svm", True, False)
    assert config.model_copy(update={"scorer": "softmax"}) == fitted.config
    kept = bundle.save(tmp_path / "model", made, config, classes=("red", "blue"))
    loaded = bundle.load(kept.path)
    assert loaded.card.model == config
    with torch.no_grad():
        before, after, again = (model(batch).answers for model in (fitted, made, loaded.build()))
    margins = before.features @ classes.weight.T + classes.bias
    corrections = (before.pooled @ boxes.weight.T + boxes.bias).view(5, 2, 4)
    assert before.logits.shape == (5, 3)
    torch.testing.assert_close(after.logits, margins)
    torch.testing.assert_close(after.deltas, corrections)
    torch.testing.assert_close(tuple(again), tuple(after))


# How the regions pass.


@pytest.mark.parametrize("scorer", ["softmax", "svm"])
def test_regions_in_parts_are_answered_as_at_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(scorer=scorer).eval(), replace(noisy_batch(), targets=None)
    with torch.no_grad():
        whole, calls = watched(model, batch)
        monkeypatch.setattr(rcnn, "AT_ONCE", 5)
        parts, more = watched(model, batch)
    assert [len(one) for one in calls] == [36]
    assert [len(one) for one in more] == [*[5] * 7, 1]
    assert torch.equal(torch.cat(more), calls[0])
    torch.testing.assert_close(parts.answers, whole.answers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_missing_proposals_are_asked_for(training: bool) -> None:
    batch = Batch(torch.zeros(2, 3, *SIZE_HW, dtype=torch.uint8), targets_of(([], []), ([], [])))
    model = build().train(training)
    for asked in (model, model.examples):
        with pytest.raises(ModelError, match=r"rcnn judges regions .* 2 images, got those of 0; .*proposals job"):
            asked(batch)


@pytest.mark.parametrize("scorer", ["softmax", "svm"])
def test_one_image_of_two_without_proposals_leaves_the_other_alone(scorer: Scorer) -> None:
    model, one = build(scorer=scorer).eval(), replace(scene(ONCE_AND_FAR), targets=None)
    two = Batch(one.images.repeat(2, 1, 1, 1), proposals=(boxes_of([]), *one.proposals))
    with torch.no_grad():
        both, alone = model.candidates(model(two)), model.candidates(model(one))
    assert both[0].scores.shape == (0, 2)
    torch.testing.assert_close(both[1], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scorer", ["softmax", "svm"])
def test_images_without_any_region_are_trained_and_nothing_is_found_in_them(scorer: Scorer) -> None:
    model = build(scorer=scorer).train()
    batch = replace(scene([]), targets=targets_of(([], [])))
    losses = model.loss(model(batch), batch.boxes)
    assert all(value == 0 for value in losses.values())
    torch.autograd.backward([*losses.values()])
    assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in model.parameters())
    with torch.no_grad():
        (answer,) = model.eval().postprocess(model(batch), batch.frames)
    assert len(answer) == 0


@pytest.mark.parametrize("scorer", ["softmax", "svm"])
def test_regions_without_area_are_survived(scorer: Scorer) -> None:
    model = build(scorer=scorer).train()
    regions: list[Box] = [[10, 10, 10, 30], [0, 0, 0, 0], [30, 10, 30.5, 10.5], [-40, -40, -20, -20]]
    batch = scene(regions)
    torch.autograd.backward([*model.loss(model(batch), batch.boxes).values()])
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        (answer,) = model.eval().postprocess(model(batch), batch.frames)
    assert ((answer.boxes_xyxy[:, 2:] - answer.boxes_xyxy[:, :2]) > 0).all()


@pytest.mark.parametrize("scorer", ["softmax", "svm"])
def test_validation_loss_is_finite_and_leaves_answers_alone(scorer: Scorer) -> None:
    model, batch = build(scorer=scorer).eval(), scene([*NEAR, RED])
    with torch.inference_mode():
        outputs = model(batch)
        found = model.loss(outputs, batch.boxes)
        plain = model(replace(batch, targets=None))
    assert all(value.isfinite() and value > 0 for value in found.values())
    assert torch.equal(outputs.answers.logits, plain.answers.logits)


def test_two_rectangles_are_learnt_by_heart() -> None:
    near: list[Box] = [[x, y, x + 32, y + 40] for x, y in itertools.product(range(0, 64, 8), range(0, 40, 8))]
    batch = scene([*near, *NEAR, RED, BLUE])
    model = build(fc_features=64, rois_per_image=16, foreground_share=0.5).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in range(120):
        optimizer.zero_grad()
        torch.autograd.backward([*model.loss(model(batch), batch.boxes).values()])
        optimizer.step()
        if step % 10 == 9 and knows(model, batch):
            return
    pytest.fail("not found after 120 steps")


def knows(model: RCNN, batch: Batch) -> bool:
    """Whether the best box of each class is sure and lies on its rectangle."""
    with torch.no_grad():
        (answer,) = model.eval().postprocess(model(batch), batch.frames)
    model.train()
    places = [(answer.labels == label).nonzero()[0][:1] for label in (0, 1)]
    if not all(len(place) and answer.scores[place[0]] > 0.8 for place in places):
        return False
    best = torch.from_numpy(answer.boxes_xyxy[[place[0] for place in places]])
    return bool((box_iou(best, boxes_of([RED, BLUE])).diag() > 0.5).all())


@pytest.mark.parametrize("scorer", ["softmax", "svm"])
def test_exported_network_gives_equal_outputs_for_any_number_of_regions(scorer: Scorer) -> None:
    model = build(scorer=scorer).eval()
    pixels = torch.rand(3, 3, 48, 48, generator=torch.manual_seed(1))
    exported = torch.export.export(model.network, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("regions")},))
    for count in (1, 3):
        with torch.no_grad():
            given, expected = exported.module()(pixels[:count]), model.network(pixels[:count])
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one, other)


# Its configuration.


def test_context_that_leaves_nothing_for_the_region_is_refused() -> None:
    with pytest.raises(ConfigError, match="context"):
        configuration.parse(Config, {"region_side": 32, "context": 16}, "here")


def test_defaults_are_the_papers_and_read_back() -> None:
    config = configuration.parse(Config, {}, "here")
    assert (config.backbone, config.region_side, config.context, config.fc_features) == ("alexnet", 227, 16, 4096)
    assert (config.foreground_iou, config.foreground_share, config.select.iou_threshold) == (0.5, 0.25, 0.3)
    assert (config.stages, config.needs_proposals, config.is_solved) == (("fit", "solve"), True, False)
    assert configuration.parse(Config, config.model_dump(mode="json"), "again") == config


@pytest.mark.parametrize("scorer", ["softmax", "svm"])
def test_parameters_are_as_many_as_the_docstring_says(scorer: Scorer) -> None:
    with torch.device("meta"):
        model = rcnn.build(Config(scorer=scorer))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} " in " ".join(str(rcnn.__doc__).split())
