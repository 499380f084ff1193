"""Pictures that hardly are any, without objects, or with more detections than anyone asked for, on the whole road."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import boxes as geometry
from pipeline import models
from pipeline.config import parse
from pipeline.data import rows, shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.errors import DataError, ImageError
from pipeline.evaluation.live import evaluate_detector
from pipeline.evaluation.run import check_truth
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import Candidates, Detector, Selection, choose
from pipeline.training.loop import Epoch, fit
from pipeline.training.recipe import Recipe
from pipeline.types import Detections, Record
from tests.small_detection import CLASSES, SMALL, Annotated, objects, photo, shards_of, untaught

FITS: dict[str, dict[str, Any]] = {
    "letterbox": {"way": "letterbox", "size_hw": [64, 64]},
    "stretch": {"way": "stretch", "size_hw": [64, 64]},
    "resize": {"way": "resize", "short_side": 48, "long_side": 96},
}
HERE = Loading(batch_size=4, num_tasks=0)
every_fit = pytest.mark.parametrize("way", FITS)
EVERYTHING = {"mosaic": 0.5, "iou_crop": 0.5, "scale": 0.3, "translate": 0.3, "exposure": 1.5, "saturation": 1.5}
EVERYTHING |= {"brightness": 0.1, "contrast": 0.1}  # hue takes seconds to import
TWO_STAGES: dict[str, Any] = {
    "name": "faster_rcnn",
    "backbone": "squeezenet1_1",
    "fc_features": 16,
    "anchor_sizes": [[16, 32]],
    "post_nms_train": 50,
    "post_nms_test": 20,
    "input": {"fit": FITS["letterbox"]},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def full(height: int, width: int) -> Annotated:
    """A picture that is one object."""
    return photo(height, height, width), objects(([0, 0, width, height], 1))


def empty(seed: int) -> Annotated:
    return photo(seed, 60, 80), objects()


def crowded(seed: int, count: int) -> Annotated:
    """A picture of 60 x 80 pixels full of objects."""
    corners = np.random.default_rng(seed).uniform(0, 40, (count, 2))
    boxes = np.concatenate([corners, corners + 15], axis=1)
    return photo(seed, 60, 80), objects(*((box.tolist(), at % 3) for at, box in enumerate(boxes)))


def trained(source: shards.Shards, model: dict[str, Any], **keys: Any) -> tuple[Detector, list[Epoch]]:
    """One epoch of batches of four."""
    raw = {"model": model | {"num_classes": 3}, "loading": {"batch_size": 4, "num_tasks": 0}, "epochs": 1}
    recipe = parse(Recipe, raw | {"optim": {"optimizer": "adamw", "lr": 1e-3, "clip_norm": 10.0}} | keys, "here")
    torch.manual_seed(0)
    made, told = models.build(recipe.model), list[Epoch]()
    assert isinstance(made, Detector)
    loader = Loader(source, made.spec, recipe.loading, augment=recipe.augment, seed=0)
    fit(made, loader, recipe, observe=told.append)
    return made, told


# Sizes


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [(1, 1, ""), (100, 10_000, ""), (10_000, 100, ""), (99, 10_000, "aspect"), (10_000, 1, "aspect")],
)
def test_picture_of_any_size_becomes_a_row_or_a_reject_with_its_reason(
    tmp_path: Path, height: int, width: int, reason: str
) -> None:
    data, marked = full(height, width)
    (tmp_path / "x.png").write_bytes(data)
    record = Record("train/x", str(tmp_path / "x.png"), "train", objects=marked)
    made = rows.make_shard(tmp_path / "a.parquet", "train", [record], rows.Config())
    assert [reject.reason for reject in made.rejects] == ([reason] if reason else [])
    if not reason:
        (row,) = shards.read(tmp_path / "a.parquet", [0]).to_pylist()
        assert (row["height"], row["width"]) == (height, width)
        assert row["boxes"] == [[0, 0, width, height]]
        assert row["image"] == data


@every_fit
def test_pictures_of_one_pixel_and_of_ten_thousand_across_are_learnt_from_and_measured(
    way: str, tmp_path: Path
) -> None:
    sizes = [(1, 1), (60, 1), (100, 10_000), (10_000, 100)]
    source = shards_of(tmp_path, {"train": [full(*hw) for hw in sizes] * 2, "val": [full(*hw) for hw in sizes]})
    model = SMALL | {"name": "yolo_multiscale", "input": {"fit": FITS[way]}}
    made, (epoch,) = trained(source, model, augment=EVERYTHING)
    assert all(math.isfinite(value) for value in epoch.metrics.values())
    loader = Loader(source, made.spec, HERE)
    found = evaluate_detector(made, loader.evaluate("val"), 3)
    assert len(found.judged.ids) == len(sizes)
    assert found.judged.num_voc.tolist() == [0, len(sizes), 0]  # no object is lost on the way to the model


@every_fit
def test_pictures_of_one_pixel_and_of_ten_thousand_across_are_answered_within_their_sides(
    way: str, tmp_path: Path
) -> None:
    sizes = [(1, 1), (100, 10_000), (10_000, 100)]
    predictor = Predictor(untaught(tmp_path / "b", CLASSES, input={"fit": FITS[way]}))
    answers = predictor.predict([photo(0, *hw) for hw in sizes] + [photo(0, 99, 10_000)])
    for answer, (height, width) in zip(answers, sizes, strict=False):
        assert isinstance(answer, Detections)
        assert len(answer) > 0
        assert (answer.boxes_xyxy >= 0).all()
        assert (answer.boxes_xyxy <= [width, height, width, height]).all()
        assert (answer.boxes_xyxy[:, 2:] > answer.boxes_xyxy[:, :2]).all()
    assert isinstance(answers[3], ImageError)
    assert answers[3].reason == "aspect"


# Objects


@pytest.mark.parametrize("model", [SMALL | {"name": "yolo_multiscale"}, TWO_STAGES], ids=["one stage", "two stages"])
def test_split_in_which_no_picture_has_an_object_is_trained_on(model: dict[str, Any], tmp_path: Path) -> None:
    source = shards_of(tmp_path, {"train": [empty(seed) for seed in range(8)], "val": [crowded(9, 2), empty(10)]})
    check_truth(source, "detection", ["train", "val"])
    made, (epoch,) = trained(source, model, augment=EVERYTHING)
    assert all(math.isfinite(value) for value in epoch.metrics.values())
    assert all(value.isfinite().all() for value in made.state_dict().values())


def test_picture_without_objects_counts_for_its_false_alarms_alone(tmp_path: Path) -> None:
    source = shards_of(
        tmp_path, {"train": [crowded(0, 1)] * 4, "val": [crowded(1, 3), empty(2), crowded(3, 60), empty(4)]}
    )
    made, (epoch,) = trained(source, SMALL | {"name": "yolo_multiscale"})
    loader = Loader(source, made.spec, HERE)
    judged = evaluate_detector(made, loader.evaluate("val"), 3).judged
    assert judged.ids.tolist() == ["val/0000", "val/0001", "val/0002", "val/0003"]
    assert judged.num_voc.tolist() == [21, 21, 21]
    of_empty = np.isin(judged.of_image, [1, 3])
    assert of_empty.any()
    assert not judged.voc[of_empty].any()  # each of them is wrong
    assert judged.metrics()["voc_map50"] == epoch.metrics["val/voc_map50"]


def test_split_without_any_object_cannot_be_measured_on_and_is_one_sentence(tmp_path: Path) -> None:
    source = shards_of(tmp_path, {"train": [crowded(0, 3)] * 4, "val": [empty(1), empty(2)]})
    with pytest.raises(DataError, match="'val' holds no object at all, so nothing can be measured on it"):
        check_truth(source, "detection", ["train", "val"])
    with pytest.raises(DataError, match="expected at least one object to be found, got none"):
        trained(source, SMALL | {"name": "yolo_multiscale"})


# Detections


@pytest.mark.parametrize(("given", "most", "left"), [(0, 100, 0), (1, 100, 1), (2000, 100, 100), (2000, 1000, 1000)])
def test_any_number_of_candidates_becomes_as_many_detections_as_were_asked_for(
    given: int, most: int, left: int
) -> None:
    at = torch.arange(given, dtype=torch.float32)[:, None] * 10
    scores = torch.linspace(0.1, 0.9, given)[:, None] if given else torch.zeros(0, 1)
    candidates = Candidates(torch.cat([at, at, at + 8, at + 8], dim=1), scores)
    boxes, labels, kept = choose(candidates, Selection(max_detections=most))
    assert (len(boxes), len(labels), len(kept)) == (left, left, left)
    torch.testing.assert_close(kept, scores[:, 0].flip(0)[:left])  # the best


def test_no_more_candidates_are_looked_at_than_the_model_says() -> None:
    at = torch.tensor([0.0, 1.0, 100.0])[:, None]  # the first suppresses the second, the third lies apart
    found = Candidates(torch.cat([at, at, at + 50, at + 50], dim=1), torch.tensor([[0.9], [0.8], [0.7]]))
    assert choose(found, Selection(max_candidates=2))[2].tolist() == pytest.approx([0.9])
    assert choose(found, Selection(max_candidates=3))[2].tolist() == pytest.approx([0.9, 0.7])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("spread", "most"), [(400.0, 100), (60.0, 100), (20.0, 100), (400.0, 1000), (400.0, 1)])
def test_what_is_left_is_what_suppression_of_all_candidates_leaves(seed: int, spread: float, most: int) -> None:
    """Also where nearly all lie on each other, so that the best do not suffice; against plain loops."""
    random = torch.manual_seed(seed)
    at = torch.rand(700, 2, generator=random) * spread
    boxes = torch.cat([at, at + 20 + torch.rand(700, 2, generator=random) * 20], dim=1)
    scores = torch.rand(700, 1, generator=random)
    left: list[int] = []
    for place in scores[:, 0].argsort(descending=True).tolist():
        others = geometry.iou(boxes[left].numpy(), boxes[place : place + 1].numpy()) if left else np.zeros(1)
        if others.max() <= 0.5:
            left.append(place)
    found = choose(Candidates(boxes, scores), Selection(score_threshold=0.0, iou_threshold=0.5, max_detections=most))
    torch.testing.assert_close(found[0], boxes[left[:most]])
    torch.testing.assert_close(found[2], scores[left[:most], 0])
