"""YOLO of several scales: who answers and what for, by hand and by loops, and a picture learnt by heart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import boxes as geometry
from pipeline.batch import Batch, BoxTargets
from pipeline.config import parse
from pipeline.errors import ConfigError, ModelError
from pipeline.models import yolo_multiscale
from pipeline.models.yolo_multiscale import Config, Outputs, YoloMultiscale
from pipeline.types import Frame
from tests.small_detection import targets

Box = list[float]


def build(**keys: Any) -> YoloMultiscale:
    torch.manual_seed(0)
    fit = {"way": "letterbox", "size_hw": [64, 96]}
    given = {"backbone": "plain", "channels": 16, "num_classes": 3, "input": {"fit": fit}, **keys}
    model = yolo_multiscale.build(parse(Config, given, "here"))
    assert isinstance(model, YoloMultiscale)
    return model


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def said(centres: list[tuple[float, float]], *images: list[tuple[Box, list[float]]]) -> Outputs:
    """What cells with these centres say of each image: a box and a score for each class."""
    boxes = torch.tensor([[box for box, _ in image] for image in images])
    logits = torch.tensor([[[logit(score) for score in scores] for _, scores in image] for image in images])
    return Outputs(boxes, logits, torch.tensor(centres), [(64, 64)] * len(images))


def entropy(score: float, wanted: float) -> float:
    return -wanted * math.log(score) - (1 - wanted) * math.log(1 - score)


def apart(found: Box, truth: Box) -> float:
    """Complete IoU loss of two boxes (Zheng et al. 2020, equations 8 to 11)."""
    sides = [(box[2] - box[0], box[3] - box[1]) for box in (found, truth)]
    shared, hull, away = 1.0, 0.0, 0.0
    for axis in (0, 1):
        shared *= max(min(found[axis + 2], truth[axis + 2]) - max(found[axis], truth[axis]), 0.0)
        hull += (max(found[axis + 2], truth[axis + 2]) - min(found[axis], truth[axis])) ** 2
        away += ((found[axis] + found[axis + 2] - truth[axis] - truth[axis + 2]) / 2) ** 2
    iou = shared / (sum(width * height for width, height in sides) - shared)
    shape = 4 / math.pi**2 * (math.atan(sides[1][0] / sides[1][1]) - math.atan(sides[0][0] / sides[0][1])) ** 2
    return 1 - iou + away / hull + shape * shape / (1 - iou + shape + 1e-12)


SQUARE: Box = [0.0, 0.0, 16.0, 16.0]
CENTRES = [(4.0, 4.0), (12.0, 4.0), (4.0, 12.0), (40.0, 40.0)]


def test_loss_of_one_object_is_the_sum_done_by_hand() -> None:
    # IoU with the square: 1/2, 1, 1/4 and, outside it, 1. With alpha = beta = 1 the metrics of the first three are
    # 0.8/2, 0.2 and 0.4/4, of which the two best answer. The first has the highest metric and is asked for the best
    # IoU among them, 1; the second for half of that.
    image = [
        ([0.0, 0.0, 16.0, 8.0], [0.1, 0.8]),
        (SQUARE, [0.3, 0.2]),
        ([0.0, 0.0, 8.0, 8.0], [0.6, 0.4]),
        (SQUARE, [0.05, 0.9]),
    ]
    wanted = [[0.0, 1.0], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]]
    classes = sum(
        entropy(score, goal)
        for (_, scores), goals in zip(image, wanted, strict=True)
        for score, goal in zip(scores, goals, strict=True)
    )
    shape = 4 / math.pi**2 * (math.atan(1.0) - math.atan(2.0)) ** 2
    box = 0.5 + 16 / 512 + shape**2 / (0.5 + shape)  # the second's is 0
    model = build(num_cells=2, alpha=1.0, beta=1.0, box_weight=3.0, num_classes=2)
    found = model.loss(said(CENTRES, image), targets([(SQUARE, 1)]))
    assert {name: one.item() for name, one in found.items()} == pytest.approx(
        {"class": classes / 1.5, "box": 3 * box / 1.5}, rel=1e-5
    )
    assert box == pytest.approx(apart([0.0, 0.0, 16.0, 8.0], SQUARE))


def test_score_and_overlap_weigh_by_their_powers() -> None:
    image = [(SQUARE, [0.2]), ([0.0, 0.0, 16.0, 8.0], [0.9])]

    def box_loss(**keys: Any) -> float:
        model = build(num_cells=1, box_weight=1.0, num_classes=1, **keys)
        return model.loss(said(CENTRES[:2], image), targets([(SQUARE, 0)]))["box"].item()

    assert box_loss(alpha=1.0, beta=6.0) == pytest.approx(0, abs=1e-6)  # 0.2 beats 0.9 / 64
    # 0.9 / 2 beats 0.2; the cell is asked for its IoU, 1/2, and the sum of what is asked for is taken for 1 at least.
    assert box_loss(alpha=1.0, beta=1.0) == pytest.approx(apart([0.0, 0.0, 16.0, 8.0], SQUARE) / 2, rel=1e-5)


def test_cell_that_two_objects_want_answers_for_the_one_it_fits_best() -> None:
    lower: Box = [0.0, 0.0, 16.0, 12.0]
    image = [(SQUARE, [0.5, 0.5]), ([0.0, 0.0, 16.0, 4.0], [0.5, 0.5])]
    model = build(num_cells=1, alpha=0.0, beta=1.0, box_weight=1.0, num_classes=2)
    # Both objects want the first cell most; it has IoU 1 with the square and 3/4 with the other, which goes without.
    found = model.loss(said(CENTRES[:2], image), targets([(lower, 0), (SQUARE, 1)]))
    assert found["box"].item() == pytest.approx(0, abs=1e-6)
    assert found["class"].item() == pytest.approx(4 * math.log(2), rel=1e-5)


def test_object_between_cells_is_answered_by_the_nearest() -> None:
    small: Box = [5.0, 5.0, 7.0, 7.0]
    image = [([4.0, 4.0, 8.0, 8.0], [0.5])] * 4
    found = build(num_classes=1, box_weight=1.0).loss(said(CENTRES, image), targets([(small, 0)]))
    # (4, 4) is nearest; it is asked for its IoU, 4 / 16, and the sum of what is asked for is taken for 1 at least.
    assert found["box"].item() == pytest.approx(apart([4.0, 4.0, 8.0, 8.0], small) / 4, rel=1e-5)


def test_loss_without_any_object_is_that_of_the_scores_alone() -> None:
    image = [(SQUARE, [0.1, 0.2])] * 2
    found = build(num_classes=2).loss(said(CENTRES[:2], image, image), targets([], []))
    assert found["box"].item() == 0
    assert found["class"].item() == pytest.approx(4 * (entropy(0.1, 0) + entropy(0.2, 0)), rel=1e-5)


def loops(model: YoloMultiscale, outputs: Outputs, truth: BoxTargets) -> dict[str, float]:
    """The loss object by object and cell by cell in float64."""
    config, centres = model.config, outputs.centres_xy.double().tolist()
    classes = boxes = total = 0.0
    for place, (objects, labels) in enumerate(truth.per_image()):
        said_boxes = outputs.boxes_xyxy[place].double().tolist()
        scores = outputs.logits[place].double().sigmoid().tolist()
        owners: dict[int, tuple[float, int, float]] = {}  # cell -> IoU, object, metric
        for number, (box, label) in enumerate(zip(objects.double().tolist(), labels.tolist(), strict=True)):
            cells = [at for at, (x, y) in enumerate(centres) if box[0] < x < box[2] and box[1] < y < box[3]]
            if not cells:
                middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                gaps = [math.dist(centre, middle) for centre in centres]
                cells = [at for at, gap in enumerate(gaps) if gap <= min(gaps) + 1e-9]
            overlaps = geometry.iou(np.array(said_boxes), np.array([box]))[:, 0]
            metric = {at: scores[at][label] ** config.alpha * overlaps[at] ** config.beta + 1e-9 for at in cells}
            for at in sorted(cells, key=lambda cell: -metric[cell])[: config.num_cells]:
                if at not in owners or overlaps[at] > owners[at][0]:
                    owners[at] = (overlaps[at], number, metric[at])
        wanted = [[0.0] * config.num_classes for _ in centres]
        for at, (_, number, metric_here) in owners.items():
            mine = [owner for owner in owners.values() if owner[1] == number]
            quality = metric_here / max(owner[2] for owner in mine) * max(owner[0] for owner in mine)
            wanted[at][int(labels[number])] = quality
            boxes += quality * apart(said_boxes[at], objects[number].double().tolist()) if quality else 0.0
            total += quality
        classes += F.binary_cross_entropy(
            torch.tensor(scores, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64), reduction="sum"
        ).item()
    return {"class": classes / max(total, 1), "box": config.box_weight * boxes / max(total, 1)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_cells", [1, 4, 13])
def test_loss_equals_loops_on_random_answers_and_objects(seed: int, num_cells: int) -> None:
    random = torch.manual_seed(seed)
    model = build(num_cells=num_cells)
    centres = torch.rand(60, 2, generator=random) * 64
    middles = centres + torch.randn(3, 60, 2, generator=random) * 4
    sides = 4 + torch.rand(3, 60, 2, generator=random) * 30
    outputs = Outputs(
        torch.cat([middles - sides / 2, middles + sides / 2], -1),
        torch.randn(3, 60, 3, generator=random),
        centres,
        [(64, 64)] * 3,
    )
    middle = torch.rand(16, 2, generator=random) * 64
    side = 1 + torch.rand(16, 2, generator=random) * 40
    truth = BoxTargets(
        torch.cat([middle - side / 2, middle + side / 2], -1),
        torch.randint(0, 3, (16,), generator=random),
        torch.tensor([0] * 7 + [2] * 9),  # none in the second picture
        3,
    )
    found = {name: one.item() for name, one in model.loss(outputs, truth).items()}
    assert found == pytest.approx(loops(model, outputs, truth), rel=1e-4)


def test_cells_lie_amid_their_squares_finest_first_row_by_row() -> None:
    model = build().eval()
    with torch.no_grad():
        outputs = model(Batch(torch.zeros(2, 3, 64, 96, dtype=torch.uint8)))
    assert outputs.boxes_xyxy.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 4)
    assert outputs.logits.shape == (2, 126, 3)
    places = outputs.centres_xy.tolist()
    assert places[:2] + places[11:13] == [[4, 4], [12, 4], [92, 4], [4, 12]]
    assert places[96] == [8, 8]
    assert places[120:] == [[x, y] for y in (16, 48) for x in (16, 48, 80)]


def test_untrained_cells_give_small_boxes_around_themselves_and_hardly_a_score() -> None:
    with torch.no_grad():
        outputs = build().eval()(Batch(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)))
    centred = (outputs.boxes_xyxy[0, :, :2] + outputs.boxes_xyxy[0, :, 2:]) / 2 - outputs.centres_xy
    strides = torch.tensor([8.0] * 96 + [16.0] * 24 + [32.0] * 6)
    assert (centred.abs() < strides[:, None] / 2).all()
    assert (outputs.boxes_xyxy[0, :, 2] - outputs.boxes_xyxy[0, :, 0]) / strides == pytest.approx(3.4, abs=1)
    assert outputs.logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.005)


def test_pictures_that_keep_their_aspect_are_padded_and_answered_within() -> None:
    model = build(input={"fit": {"way": "resize", "short_side": 40, "long_side": 90}}).eval()
    with torch.no_grad():
        outputs = model(Batch(torch.zeros(1, 3, 40, 90, dtype=torch.uint8)))
        (found,) = model.candidates(outputs)
    assert outputs.boxes_xyxy.shape[1] == 126  # of 64x96
    assert found.boxes_xyxy.max() <= 90
    assert found.boxes_xyxy[:, 1::2].max() <= 40


DRAWN = {(3.0, 5.0, 23.0, 25.0): 0, (50.0, 4.0, 90.0, 30.0): 1, (28.0, 38.0, 48.0, 54.0): 2}


def test_a_picture_of_three_rectangles_is_learnt_by_heart() -> None:
    model, picture = build(), torch.full((2, 3, 64, 96), 100, dtype=torch.uint8)
    for (x1, y1, x2, y2), label in DRAWN.items():
        picture[0, label, int(y1) : int(y2), int(x1) : int(x2)] = 250
    batch, truth = Batch(picture), targets([([*box], label) for box, label in DRAWN.items()], [])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimiser.zero_grad()
        torch.autograd.backward([*model.loss(model(batch), truth).values()])
        optimiser.step()
    model.eval()
    with torch.no_grad():
        found, empty = model.postprocess(model(batch), [Frame((128, 96), (64, 96), (1.0, 0.5))] * 2)
    expected = np.array([[x1, y1 * 2, x2, y2 * 2] for x1, y1, x2, y2 in DRAWN])
    best = geometry.iou(found.boxes_xyxy[:3], expected)
    assert sorted(best.argmax(axis=1)) == [0, 1, 2]
    assert (best.max(axis=1) > 0.7).all()
    assert found.labels[:3].tolist() == [[*DRAWN.values()][place] for place in best.argmax(axis=1)]
    assert found.scores[2] > 0.5
    assert (empty.scores < 0.2).all()


@pytest.mark.parametrize("side", [1, 32])
def test_one_cell_is_too_little_to_train_on_but_not_to_answer_for(side: int) -> None:
    model = build(input={"fit": {"way": "resize", "short_side": side, "long_side": 64}})
    one = Batch(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    with pytest.raises(ModelError, match=rf"a batch of one image of \({side}, {side}\); take larger images or batches"):
        model(one)
    assert model(Batch(torch.zeros(2, 3, side, side, dtype=torch.uint8))).logits.isfinite().all()
    assert model.eval()(one).logits.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input": {"fit": {"way": "stretch", "size_hw": [64, 100]}}}, r"multiples of 32, got \(64, 100\)"),
        ({"backbone": "vgg16"}, "backbone"),
        ({"channels": 4}, "channels"),
        ({"num_cells": 0}, "num_cells"),
        ({"box_weight": 0}, "box_weight"),
    ],
)
def test_impossible_values_are_refused_with_their_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Config, keys, "here")
