"""What a detector saw, image by image: marked by hand-computed cases, stored, drawn; and the report made of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data import shards
from pipeline.errors import DataError
from pipeline.evaluation import sightings
from pipeline.evaluation.detect import judge, merge
from pipeline.evaluation.detection_report import DetectionEvaluation, DetectionReport
from pipeline.evaluation.live import Found
from pipeline.evaluation.sightings import Marked, Sighting
from pipeline.types import Detections, Objects, no_objects


def found(*rows: tuple[list[float], int, float]) -> Detections:
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(scores, np.float32)
    )


def objects(*rows: tuple[list[float], int], difficult: tuple[bool, ...] = ()) -> Objects:
    no = np.zeros(len(rows), bool)
    return Objects(
        np.array([box for box, _ in rows], np.float32).reshape(-1, 4),
        np.array([label for _, label in rows], np.int64),
        np.array(difficult or no, bool),
        no,
        no,
    )


LEFT, RIGHT, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def test_marking_tells_right_wrong_ignored_and_missed_apart() -> None:
    truth = objects((LEFT, 0), (RIGHT, 1), (FAR, 0), difficult=(False, False, True))
    seen = found((LEFT, 0, 0.9), (FAR, 0, 0.8), (LEFT, 0, 0.7), (RIGHT, 0, 0.6))
    marked = Marked.of(Sighting("a", seen, truth), 2)
    assert marked.right.tolist() == [True, False, False, False]
    assert marked.ignored.tolist() == [False, True, False, False]
    assert marked.missed.tolist() == [False, True, False]
    assert marked.num_wrong == 3  # the second look at the left one, the right one's class, and the right one itself


def test_detections_below_a_score_do_not_count() -> None:
    sighting = Sighting("a", found((LEFT, 0, 0.9), (RIGHT, 0, 0.1)), objects((LEFT, 0)))
    assert Marked.of(sighting.above(0.5), 1).num_wrong == 0
    assert Marked.of(sighting, 1).num_wrong == 1


def test_an_image_without_objects_is_marked() -> None:
    assert Marked.of(Sighting("a", found(), no_objects()), 1).num_wrong == 0
    assert Marked.of(Sighting("a", found((LEFT, 0, 0.5)), no_objects()), 1).num_wrong == 1


def test_the_table_holds_what_was_found_and_what_is_there_sorted_by_id(tmp_path: Path) -> None:
    ones = [Sighting("b", found(), objects((LEFT, 1))), Sighting("a", found((RIGHT, 0, 0.5)), no_objects())]
    sightings.write(ones, tmp_path / "one.parquet")
    sightings.write(ones[::-1], tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    first, second = pq.read_table(tmp_path / "one.parquet").to_pylist()
    assert (first["image_id"], first["boxes"], first["labels"], first["scores"]) == ("a", [RIGHT], [0], [0.5])
    assert (second["boxes"], second["true_boxes"], second["true_labels"]) == ([], [LEFT], [1])


def exact(source: shards.Shards) -> list[Sighting]:
    """Of every validation scene its own objects, found with a score of 0.9, but nothing in the first one."""
    rows = [
        row
        for shard in source.manifest.of("val")
        for row in shards.read(source.path / shard.name, range(len(shard.row_groups))).to_pylist()
    ]
    ones = []
    for number, row in enumerate(rows):
        truth = objects(*zip(row["boxes"], row["box_labels"], strict=True))
        boxes = truth if number else no_objects()
        seen = Detections(boxes.boxes_xyxy, boxes.labels, np.full(len(boxes), 0.9, np.float32))
        ones.append(Sighting(row["image_id"], seen, truth))
    return ones


def test_sheets_show_the_worst_image_first_and_colours_by_outcome(small_scenes: shards.Shards) -> None:
    ones = exact(small_scenes)
    drawn = sightings.sheets(ones, small_scenes, "val", 0.5)
    assert set(drawn) == {"best", "worst"}
    best, worst = (np.asarray(Image.open(io.BytesIO(drawn[name])).convert("RGB")) for name in ("best", "worst"))
    green = (best == (45, 242, 36)).all(axis=2)
    blue = (worst == (36, 96, 242)).all(axis=2)
    assert green.any()
    assert blue[:340, :340].any()
    assert not (best == (242, 36, 36)).all(axis=2).any()


def evaluated(source: shards.Shards) -> DetectionEvaluation:
    ones = exact(source)
    judged = merge([judge(one.found, one.objects, one.image_id, 10) for one in ones])
    facts = {"weights_sha256": "0" * 64}
    report = DetectionReport.of_found(Found(judged, 26.0), "val", source.manifest.classes, facts)
    return DetectionEvaluation(**dict(report), judged=judged, seen=tuple(ones))


def test_a_report_names_every_rule_and_reads_back(small_scenes: shards.Shards, tmp_path: Path) -> None:
    report = evaluated(small_scenes)
    missed = len(report.seen[0].objects)
    total = sum(len(one.objects) for one in report.seen)
    assert report.metrics["loss"] == 2.0
    assert report.metrics["coco_mar100"] == pytest.approx(report.metrics["voc_map50"], abs=1e-6)
    assert {"coco_map", "coco_map50", "coco_map75", "voc_map50", "voc07_map50"} <= report.metrics.keys()
    assert report.metrics["voc_f1"] == pytest.approx(2 * (total - missed) / (2 * total - missed))
    assert report.metrics["voc_f1_score"] == pytest.approx(0.9)
    assert sum(one.num_objects for one in report.per_class) == total
    assert report.errors["correct"] == 1.0
    assert {"average-precision.png", "errors.png", "precision-recall.png"} == set(report.figures())
    report.write(tmp_path / "report.json")
    again = DetectionReport.model_validate_json((tmp_path / "report.json").read_bytes(), strict=True)
    assert again.metrics == report.metrics
    assert again.per_class == report.per_class


def test_a_split_without_any_object_has_no_report(small_scenes: shards.Shards) -> None:
    judged = judge(found(), no_objects(), "a", 10)
    with pytest.raises(DataError, match="expected at least one object to be found"):
        DetectionReport.of_found(Found(judged, 0.0), "val", small_scenes.manifest.classes, {})
