"""Golden images: kept with a bundle, answered again; other weights are noticed, a little rounding is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import models
from pipeline.errors import BundleError, ImageError, ModelError
from pipeline.inference import bundle, golden
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import DetectorConfig
from pipeline.types import Classification, Detections
from tests.small_detection import CLASSES, photo, untaught


def classifier(path: Path, seed: int) -> bundle.Bundle:
    torch.manual_seed(seed)
    config = models.config_of("lenet5")(name="lenet5", num_classes=3)
    model = models.build(config)
    with torch.no_grad():
        list(model.parameters())[-1][seed] += 2  # so that it is sure of something
    return bundle.save(path, model, config, classes=("a", "b", "c"))


def replay(kept: bundle.Bundle, by: bundle.Bundle) -> None:
    """Let a bundle's golden images be answered by a bundle, perhaps another."""
    rows = list(golden.load(kept.path))
    for (_, expected), answer in zip(rows, Predictor(by).predict([image for image, _ in rows]), strict=True):
        assert not isinstance(answer, ImageError)
        golden.check(expected, answer)


IMAGES = [photo(seed, 40, 36) for seed in range(3)]


def test_kept_images_are_answered_alike_by_the_same_weights_and_not_by_others(tmp_path: Path) -> None:
    made, other = classifier(tmp_path / "made", 1), classifier(tmp_path / "other", 2)
    golden.keep(made, IMAGES)
    assert [image for image, _ in golden.load(made.path)] == IMAGES
    replay(made, by=made)
    with pytest.raises(ModelError, match=r"golden image 0\.image: class"):
        replay(made, by=other)


def test_a_bundle_with_golden_images_is_loaded_as_before(tmp_path: Path) -> None:
    made = classifier(tmp_path / "made", 1)
    golden.keep(made, IMAGES)
    assert bundle.load(made.path).card == made.card
    golden.keep(made, IMAGES[:1])  # again, as a resumed run does
    assert len(list(golden.load(made.path))) == 1


def test_a_bundle_without_golden_images_has_none(tmp_path: Path) -> None:
    assert list(golden.load(classifier(tmp_path / "made", 1).path)) == []


def test_an_image_that_is_none_is_not_kept(tmp_path: Path) -> None:
    made = classifier(tmp_path / "made", 1)
    with pytest.raises(ImageError):
        golden.keep(made, [IMAGES[0], b"no image"])
    assert list(golden.load(made.path)) == []


@pytest.mark.parametrize("damage", ["answers", "image"])
def test_damaged_golden_images_are_one_sentence(tmp_path: Path, damage: str) -> None:
    made = classifier(tmp_path / "made", 1)
    golden.keep(made, IMAGES)
    if damage == "image":
        (made.path / golden.FOLDER / "1.image").unlink()
    else:
        (made.path / golden.FOLDER / golden.ANSWERS).write_text(json.dumps([{"file": "0.image"}]))
    with pytest.raises(BundleError, match="golden images that cannot be read"):
        list(golden.load(made.path))


@pytest.mark.parametrize(
    ("labels", "scores", "fits"),
    [
        ([4, 2, 0], [0.6, 0.3, 0.1], True),
        ([4, 2, 0], [0.52, 0.38, 0.1], True),
        ([2, 4, 0], [0.46, 0.45, 0.09], False),  # two classes have changed places by more than rounding
        ([2, 0, 4], [0.6, 0.3, 0.1], False),
        ([4, 0, 1], [0.65, 0.3, 0.05], False),  # the second is not there any more
        ([4, 2, 0], [float("nan"), 0.3, 0.1], False),
        ([7, 4, 2], [0.4, 0.35, 0.25], False),  # another is best
    ],
)
def test_check_of_a_classification_by_hand(labels: list[int], scores: list[float], fits: bool) -> None:
    expected = golden.Golden(file="0.image", labels=(4, 2, 0), scores=(0.6, 0.3, 0.1))
    found = Classification(np.array(labels), np.array(scores, np.float32))
    if fits:
        golden.check(expected, found)
    else:
        with pytest.raises(ModelError, match=r"they may differ by 0\.1"):
            golden.check(expected, found)


BOX = (10.0, 10.0, 50.0, 50.0)
EXPECTED = golden.Golden(file="0.image", labels=(1, 2), scores=(0.9, 0.3), boxes=(BOX, (0.0, 0.0, 8.0, 8.0)))
FITTING = Detections(np.array([BOX], np.float32), np.array([1]), np.array([0.85], np.float32))


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),  # the one of 0.3 need not be found: it hardly clears the threshold
        ({"boxes_xyxy": np.array([[12, 10, 50, 52]], np.float32)}, True),
        ({"boxes_xyxy": np.array([[30, 10, 70, 50]], np.float32)}, False),
        ({"labels": np.array([2])}, False),
        ({"scores": np.array([0.7], np.float32)}, False),
    ],
)
def test_check_of_detections_by_hand(change: dict[str, np.ndarray], fits: bool) -> None:
    found = dataclasses.replace(FITTING, **change)
    if fits:
        golden.check(EXPECTED, found)
    else:
        with pytest.raises(ModelError, match="is in one of two answers only"):
            golden.check(EXPECTED, found)


def test_golden_detections_do_not_depend_on_the_models_own_selection(tmp_path: Path) -> None:
    made = untaught(tmp_path / "b", CLASSES)
    assert isinstance(made.card.model, DetectorConfig)
    select = made.card.model.select.model_copy(update={"max_detections": 1, "score_threshold": 0.9})
    few = made.card.model.model_copy(update={"select": select})
    other = bundle.save(tmp_path / "few", made.build(), few, classes=CLASSES)
    for each in (made, other):
        golden.keep(each, [photo(4, 90, 70)])
    ((_, one),), ((_, same),) = golden.load(made.path), golden.load(other.path)
    assert len(one.labels) > 1
    assert sorted(one.labels) == sorted(same.labels)


def test_check_of_detections_notices_one_too_many() -> None:
    more = Detections(
        np.array([BOX, (60.0, 60.0, 90.0, 90.0)], np.float32), np.array([1, 1]), np.array([0.9, 0.8], np.float32)
    )
    with pytest.raises(ModelError, match="is in one of two answers only"):
        golden.check(EXPECTED, more)


def test_a_detectors_golden_images_hold_boxes_that_it_finds_again(tmp_path: Path) -> None:
    made = untaught(tmp_path / "b", CLASSES)
    images = [photo(3, 80, 120, orientation=6), photo(4, 90, 70)]
    golden.keep(made, images)
    replay(made, by=made)
    assert all(expected.boxes is not None for _, expected in golden.load(made.path))
