"""The figures of an evaluation, the sheet of errors, and what a run is given of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from pipeline import imaging, models
from pipeline.data import lookup, shards
from pipeline.evaluation import figures
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.curves import all_precision_recall, reliability
from pipeline.evaluation.mistakes import error_sheet, most_confident
from pipeline.evaluation.report import ClassificationReport, Evaluation, evidence_metrics
from pipeline.tracking.predictions import Origin, Predictions, merge, read


def origin_of(num_classes: int) -> Origin:
    classes = tuple(f"class {label}" for label in range(num_classes))
    return Origin(split="val", dataset="made up", dataset_digest="d", weights_sha256="w" * 64, classes=classes)


def made_up(num_images: int, num_classes: int) -> Predictions:
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(num_classes), num_images).astype(np.float32)
    ids = [f"{number:05d}" for number in range(num_images)]
    return Predictions.of(origin_of(num_classes), ids, rng.integers(0, num_classes, num_images), scores)


def evaluation_of(predictions: Predictions) -> Evaluation:
    confusion = np.zeros((len(predictions.origin.classes),) * 2, np.int64)
    np.add.at(confusion, (predictions.labels, predictions.predicted), 1)
    counts = Counts(confusion, int(predictions.right(5).sum()), 1.0)
    report = ClassificationReport.of(counts, "val", predictions.origin.classes, {})
    return Evaluation(
        **dict(report.model_copy(update={"metrics": report.metrics | evidence_metrics(predictions)})),
        predictions=predictions,
        filters=Figure(),
        errors=b"png",
    )


class FakeRun:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def log_file(self, file: Path, folder: str | None = None) -> None:
        self.given[f"{folder}/{file.name}" if folder else file.name] = file.read_bytes()

    def log_figure(self, path: str, figure: Figure) -> None:
        self.given[path] = figure

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.given |= values

    def set_tags(self, tags: dict[str, str]) -> None:
        self.given |= tags


def test_record_gives_the_run_report_predictions_figures_and_the_tag(tmp_path: Path) -> None:
    found, run = evaluation_of(merge([made_up(60, 4)])), FakeRun()
    found.record(run, tmp_path / "report.json")  # type: ignore[arg-type]
    names = ("confusion", "recall", "f1", "precision-recall", "calibration", "filters")
    drawn = {f"figures/val-{name}.png" for name in names}
    metrics = {f"final/val/{name}" for name in ("top1", "top5", "mean_recall", "macro_f1", "loss", "ece", "mean_ap")}
    files = {"report.json", "predictions-val.parquet", "figures/errors-val.png"}
    assert run.given.keys() == drawn | metrics | files | {"evaluated.val", "views.val"}
    assert (run.given["evaluated.val"], run.given["views.val"]) == ("w" * 64, "centre")
    assert read(tmp_path / "predictions-val.parquet").table().equals(found.predictions.table())
    plain = ClassificationReport.model_validate_json((tmp_path / "report.json").read_text(), strict=True)
    assert plain.metrics == found.metrics


def test_precision_recall_of_many_classes_names_the_extremes_only() -> None:
    curves = all_precision_recall(made_up(3000, 15))
    axes = figures.precision_recall(curves, [f"class {label}" for label in range(15)], "val").axes[0]
    assert len(axes.lines) == 15
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    ranked = sorted((curve.average_precision for curve in curves.values()), reverse=True)
    assert [str(line.get_label()).split()[0] for line in named] == [
        f"{value:.3f}" for value in ranked[:3] + ranked[-3:]
    ]


def test_calibration_draws_one_bar_for_each_bin_that_holds_images() -> None:
    found = reliability(np.array([0.5, 0.95], np.float32), np.array([True, True]))
    axes, below = figures.calibration(found, "val").axes
    bars = [bar for bar in axes.patches[:2] if isinstance(bar, Rectangle)]
    assert [bar.get_height() for bar in bars] == [1.0, 1.0]
    assert len(below.patches) == 15


@pytest.mark.parametrize("name", models.names())
def test_first_filters_of_every_model_with_convolutions_are_drawn(name: str) -> None:
    network = models.build(models.config_of(name).model_validate({"name": name})).network
    figure = figures.first_filters(network, name)
    first = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    assert (figure is None) == (first is None)
    if figure is not None and first is not None:
        assert sum(len(axes.images) for axes in figure.axes) == first.out_channels


def test_filter_pictures_show_zero_as_middle_grey_and_keep_colours() -> None:
    weights = np.zeros((2, 3, 1, 2), np.float32)
    weights[0, 0, 0, 0] = 2.0
    weights[0, 2, 0, 1] = -1.0
    pictures = figures.filter_pictures(weights)
    assert pictures.shape == (2, 1, 2, 3)
    assert pictures[0].tolist() == [[[1.0, 0.5, 0.5], [0.5, 0.5, 0.25]]]
    assert (pictures[1] == 0.5).all()
    assert figures.filter_pictures(np.ones((4, 1, 5, 5), np.float32)).shape == (4, 5, 5, 3)
    assert figures.first_filters(nn.Linear(2, 2), "flat") is None


@pytest.fixture
def answers(stripes: shards.Shards) -> Predictions:
    """Predictions of the 13 validation pictures, of which three are wrong."""
    ids = shards.read(stripes.path / stripes.manifest.of("val")[0].name, [0, 1], ["image_id", "label"])
    labels = ids.column("label").to_numpy()
    logits = np.where(np.eye(2)[labels] > 0, 2.0, 0.0)
    logits[[2, 5, 7]] = logits[[2, 5, 7]][:, ::-1] * [[1.0], [2.0], [0.5]]
    scores = torch.softmax(torch.from_numpy(logits), dim=1).float().numpy()
    origin = Origin(
        split="val", dataset="stripes", dataset_digest="0" * 64, weights_sha256="w", classes=stripes.manifest.classes
    )
    return Predictions.of(origin, ids.column("image_id").to_pylist(), labels, scores)


def test_most_confident_errors_come_first(answers: Predictions) -> None:
    assert most_confident(answers).tolist() == [5, 2, 7]
    assert most_confident(answers, limit=1).tolist() == [5]


def test_error_sheet_shows_the_pictures_and_none_without_errors(answers: Predictions, stripes: shards.Shards) -> None:
    png = error_sheet(answers, stripes, tile_px=64)
    assert png
    pixels = imaging.decode(png)
    assert pixels.shape[1] == 3 * 70 + 6  # three tiles in a row
    right = Predictions.of(
        answers.origin, list(answers.ids), answers.labels, np.eye(2, dtype=np.float32)[answers.labels]
    )
    assert error_sheet(right, stripes) is None


def test_lookup_finds_pictures_of_several_row_groups_and_leaves_out_others(stripes: shards.Shards) -> None:
    rows = [
        row
        for shard in stripes.manifest.of("train")
        for row in shards.read(stripes.path / shard.name, range(len(shard.row_groups))).to_pylist()
    ]
    wanted = [rows[place] for place in (0, 7, 8, 23, 24, 39)]
    found = lookup.images(stripes, "train", [*(row["image_id"] for row in wanted), "nowhere"])
    assert found == {row["image_id"]: row["image"] for row in wanted}
    assert lookup.images(stripes, "train", []) == {}
