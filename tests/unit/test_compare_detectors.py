"""The table of detectors: what is measured of two small ones in processes of their own, and how it is told."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch

from pipeline import models
from pipeline.benchmark import detector_table, detectors
from pipeline.benchmark.detector_table import Row
from pipeline.benchmark.detectors import Config, Speed
from pipeline.config import parse
from pipeline.data import shards
from pipeline.errors import DataError
from pipeline.inference import bundle

SMALL = {"num_classes": 10, "input": {"fit": {"way": "letterbox", "size_hw": [64, 64]}}}


def made(name: str, folder: Path, classes: tuple[str, ...], **keys: object) -> bundle.Bundle:
    torch.manual_seed(0)
    config = parse(models.config_of(name), {**SMALL, **keys}, "here")
    return bundle.save(folder / name, models.build(config), config, classes=classes)


def test_every_part_of_an_answer_is_timed_and_told(small_scenes: shards.Shards, tmp_path: Path) -> None:
    classes = small_scenes.manifest.classes
    found = {
        "yolo": made("yolo_multiscale", tmp_path, classes, backbone="plain", channels=16),
        "faster": made(
            "faster_rcnn", tmp_path, classes, backbone="squeezenet1_1", fc_features=16, anchor_sizes=[[16, 32]]
        ),
    }
    config, said = Config(batches=(1, 2), num_images=3, num_rounds=1, threads=1), list[str]()
    speeds, others = detectors.measure(found, small_scenes, "val", config, tmp_path / "scratch", said.append)
    assert said == ["round 1/1: yolo", "round 1/1: faster"]
    assert 0 <= others <= 1
    for name, speed in speeds.items():
        assert speed.parameters == sum(value.numel() for value in found[name].build().parameters())
        assert speed.proposals_ms == 0
        assert speed.network_ms > 0
        assert speed.post_ms > 0
        assert set(speed.images_per_s) == {1, 2}
        assert speed.images_per_s[1] == pytest.approx(1000 / (speed.network_ms + speed.post_ms))
        whole = speed.decoding_ms + speed.network_ms + speed.post_ms
        assert speed.decoding_ms > 0
        assert speed.bare_ratio == pytest.approx(whole / speed.network_ms)
    assert not [*(tmp_path / "scratch").iterdir()]


def test_a_classifier_is_refused_in_one_sentence(stripes: shards.Shards, tmp_path: Path) -> None:
    config = parse(models.config_of("lenet5"), {"num_classes": 2}, "here")
    lenet = bundle.save(tmp_path / "b", models.build(config), config, classes=("across", "down"))
    with pytest.raises(DataError, match="is no detector; leave it out"):
        detectors.measure({"lenet": lenet}, stripes, "val", Config(num_rounds=1), tmp_path / "scratch", print)


def row(name: str, map50: float, images_per_s: dict[int, float], proposals_ms: float = 0.0) -> Row:
    speed = Speed(
        parameters=1234567,
        decoding_ms=7.5,
        proposals_ms=proposals_ms,
        network_ms=80.0,
        post_ms=4.0,
        images_per_s=images_per_s,
        bare_ratio=1.05,
        peak_bytes=2**30,
        num_detections=37.4,
    )
    metrics = {"coco_map50": map50, "coco_map": 0.5, "voc07_map50": 0.75}
    return Row(name=name, model="yolo", metrics=metrics, speed=speed, train_s=61.4)


ROWS = [row("slow", 0.9, {1: 0.3, 4: 0.4}, proposals_ms=2500.0), row("quick", 0.8, {1: 12.0, 4: 11.0})]


def test_the_table_shows_each_detector_at_its_best_batch_and_the_papers_figures_as_theirs() -> None:
    text = detector_table.table(ROWS)
    slow, quick = (line.split() for line in text.splitlines()[1:3])
    assert slow[:6] == ["slow", "0.900", "0.500", "0.750", "0.30", "0.40"]
    assert slow[6:] == ["(4)", "7.5", "2500.0", "80.0", "4.0", "1.050", "37", "1,234,567", "1024", "61"]
    assert quick[4:7] == ["12.00", "12.00", "(1)"]
    assert "as published (VOC 2007 test)" in text
    assert "Fast YOLO (07+12): Redmon et al. 2016, Table 1; Titan X" in text


def test_the_csv_and_the_metrics_hold_what_was_measured_here() -> None:
    first, second = csv.DictReader(io.StringIO(detector_table.as_csv(ROWS)))
    assert (first["detector"], float(first["images_per_s_4"]), float(first["proposals_ms"])) == ("slow", 0.4, 2500)
    assert float(second["coco_map50"]) == 0.8
    told = detector_table.metrics(ROWS)
    assert told["slow/images_per_s"] == 0.4
    assert told["quick/coco_map50"] == 0.8


def test_the_plot_has_a_point_for_each_detector() -> None:
    (axes,) = detector_table.plot(ROWS, "here").axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]  # type: ignore[index]
    assert points == [(0.4, 0.9), (12.0, 0.8)]
    assert [text.get_text() for text in axes.texts] == ["slow, batch 4", "quick, batch 1"]
