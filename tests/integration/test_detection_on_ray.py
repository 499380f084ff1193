"""A detector's bundle on Ray: evaluation on any number of tasks, and batch prediction that agrees with it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline import imaging, models
from pipeline.config import parse
from pipeline.data import shards
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.detection_report import DetectionEvaluation
from pipeline.evaluation.run import check_truth, evaluate, evaluate_detector
from pipeline.inference import bulk, bundle, results
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import Detector
from pipeline.types import Detections
from tests.small_detection import CLASSES, objects, photo, shards_of, untaught

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def model(small_scenes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return untaught(tmp_path_factory.mktemp("model") / "b", small_scenes.manifest.classes)


def test_evaluation_is_the_same_on_one_and_on_four_tasks(small_scenes: shards.Shards, model: Bundle) -> None:
    one, four = (evaluate_detector(model, small_scenes, "val", batch_size=1, num_tasks=tasks) for tasks in (1, 4))
    assert one.num_images == 13
    assert one.metrics == pytest.approx(four.metrics, abs=1e-12)
    for mine, other in zip(one.seen, four.seen, strict=True):
        assert mine.image_id == other.image_id
        np.testing.assert_array_equal(mine.found.boxes_xyxy, other.found.boxes_xyxy)
    assert one.sheets.keys() == {"best", "worst"}


def test_several_views_and_other_truth_are_refused(
    small_scenes: shards.Shards, stripes: shards.Shards, model: Bundle
) -> None:
    with pytest.raises(ConfigError, match="views: a detector is shown whole pictures only, got 'ten_crop'"):
        evaluate(model, small_scenes, "val", views="ten_crop")
    with pytest.raises(DataError, match="classes that are not the 2"):
        evaluate(model, stripes, "val")
    with pytest.raises(DataError, match="expected boxes for each image of 'val', but 13 of 13 have none"):
        check_truth(stripes, "detection", ["val"])


def localiser(folder: Path) -> Bundle:
    """It looks at nothing and guesses each class once, in the middle of the picture, of half its sides."""
    torch.manual_seed(0)
    keys = {"fc_features": 16, "num_classes": 3, "input": {"fit": {"way": "stretch", "size_hw": [64, 64]}}}
    config = parse(models.config_of("alexnet_localizer"), keys, "here")
    made = models.build(config)
    assert isinstance(made, Detector)
    for path in made.heads:
        torch.nn.init.zeros_(made.get_parameter(f"{path}.weight"))
    made.get_parameter("network.classes.bias").data.copy_(torch.tensor([2.0, 1.0, 0.0]))
    return bundle.save(folder, made, config, classes=CLASSES)


def test_localisation_error_is_told_where_no_picture_has_two_objects(tmp_path: Path) -> None:
    middle, corner = [20, 15, 60, 45], [0, 0, 20, 15]  # of 80 x 60
    marked = [objects((box, label)) for box, label in ((middle, 0), (middle, 2), (corner, 1), (corner, 0))]
    pictures = [(photo(seed, 60, 80), one) for seed, one in enumerate([*marked, objects()])]
    made = localiser(tmp_path / "b")
    report = evaluate(made, shards_of(tmp_path / "single", {"val": pictures}), "val")
    assert isinstance(report, DetectionEvaluation)
    np.testing.assert_allclose(report.seen[0].found.boxes_xyxy, [middle] * 3, atol=1e-3)
    assert report.metrics["top5_localisation_error"] == 2 / 4  # the picture without an object does not count
    assert report.metrics["top5_class_error"] == 0
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["top5_localisation_error"] == 0.5

    two = [(photo(9, 60, 80), objects((middle, 0), (corner, 1)))]
    several = evaluate(made, shards_of(tmp_path / "several", {"val": [*pictures, *two]}), "val")
    assert "voc_map50" in several.metrics
    assert not [name for name in several.metrics if name.startswith("top5")]


def test_split_without_any_object_is_one_sentence(model: Bundle, tmp_path: Path) -> None:
    source = shards_of(tmp_path, {"val": [(photo(0, 60, 80), objects())] * 2}, model.card.classes)
    with pytest.raises(DataError, match="expected at least one object to be found, got none"):
        evaluate(model, source, "val")


def rotated(folder: Path) -> Path:
    """A scene of 90 x 60 pixels stored on its side, with the orientation that says so."""
    coarse = np.random.default_rng(5).integers(0, 256, (6, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC).save(encoded, "PNG", exif=exif)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "turned.png").write_bytes(encoded.getvalue())
    (folder / "notes.txt").write_text("no image")
    return folder


def test_batch_prediction_agrees_with_the_predictor_also_for_a_turned_photo(model: Bundle, tmp_path: Path) -> None:
    folder = rotated(tmp_path / "photos")
    kept = bulk.Kept(score_threshold=0.05, pictures=True)
    output = bulk.predict(model, bulk.from_folder(folder), tmp_path / "out", kept=kept)
    broken, turned = pq.read_table(bulk.parts_of(output)[0]).to_pylist()
    assert broken["error"]
    assert broken["boxes"] is None
    data = (folder / "turned.png").read_bytes()
    expected = Predictor(model).predict([data])[0]
    assert isinstance(expected, Detections)
    expected = expected.best(0.05)
    assert len(expected) > 0
    assert (turned["height"], turned["width"]) == (90, 60)  # upright
    found = np.array(turned["boxes"])
    assert len(found) == len(expected)
    # The order of boxes whose scores are all but equal is that of their last bits.
    apart = np.abs(found[:, None] - expected.boxes_xyxy[None]).max(axis=2)
    assert apart.min(axis=0).max() < 1e-3
    assert apart.min(axis=1).max() < 1e-3
    np.testing.assert_allclose(turned["scores"], expected.scores, atol=1e-5)
    (picture,) = (output / "pictures").iterdir()
    assert imaging.probe(picture.read_bytes()) == (90, 60)
    (lines,) = results.write(bulk.parts_of(output), model.card.classes, output, ["jsonl"])
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert "error" in told[0]
    assert len(told[1]["detections"]) == len(expected)


def test_batch_prediction_of_shards_is_what_evaluation_saw(
    small_scenes: shards.Shards, model: Bundle, tmp_path: Path
) -> None:
    output = bulk.predict(
        model, bulk.from_shards(small_scenes, "val"), tmp_path / "out", kept=bulk.Kept(score_threshold=0.0)
    )
    rows = {row["image_id"]: row for part in bulk.parts_of(output) for row in pq.read_table(part).to_pylist()}
    report = evaluate_detector(model, small_scenes, "val")
    for one in report.seen:
        best = one.found.best(0.02)
        row = rows[one.image_id]
        kept = [place for place, score in enumerate(row["scores"]) if score >= 0.02]
        assert len(best) == len(kept)
        np.testing.assert_allclose([row["scores"][place] for place in kept], best.scores, atol=1e-4)


def test_pictures_of_a_classifier_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = parse(models.config_of("lenet5"), {"num_classes": 2}, "here")
    made = bundle.save(tmp_path / "b", models.build(config), config, classes=("a", "b"))
    with pytest.raises(DataError, match="is a classifier, which has no boxes to draw"):
        bulk.predict(made, bulk.from_folder(rotated(tmp_path / "p")), tmp_path / "out", kept=bulk.Kept(pictures=True))
