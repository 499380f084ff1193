"""The report of a small confusion matrix worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.classify import Counts
from pipeline.evaluation.report import ClassificationReport

CONFUSION = np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0]])


@pytest.fixture
def report() -> ClassificationReport:
    return ClassificationReport.of(
        Counts(CONFUSION, top_k=8, loss=4.0), "val", ("ant", "bee", "cat"), {"commit": "abc"}
    )


def test_per_class_gives_recall_precision_and_f1_and_0_where_nothing_was(report: ClassificationReport) -> None:
    found = [(entry.class_name, entry.num_images, entry.recall, entry.precision) for entry in report.per_class()]
    assert found == [("ant", 4, 0.75, 0.6), ("bee", 4, 0.5, pytest.approx(2 / 3)), ("cat", 0, 0.0, 0.0)]
    assert [entry.f1 for entry in report.per_class()] == [6 / 9, 4 / 7, 0.0]  # twice the right, by both sums
    assert report.metrics["macro_f1"] == pytest.approx((6 / 9 + 4 / 7) / 2)
    assert (report.num_images, report.metrics["top1"], report.metrics["loss"]) == (8, 0.625, 0.5)


def test_write_makes_folders_and_reads_back(report: ClassificationReport, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    report.write(path)
    assert ClassificationReport.model_validate_json(path.read_text(), strict=True) == report


def test_figures_show_the_counts_and_the_weakest_class_that_occurs_first(report: ClassificationReport) -> None:
    figures = report.figures()
    confusion, recall = figures["confusion.png"].axes[0], figures["recall.png"].axes[0]
    assert [text.get_text() for text in confusion.texts] == [str(count) for count in CONFUSION.reshape(-1)]
    assert (confusion.get_ylabel(), confusion.get_xlabel()) == ("true", "predicted")
    f1 = figures["f1.png"].axes[0]
    assert (recall.get_xlabel(), f1.get_xlabel()) == ("recall", "F1")
    for axes in (recall, f1):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["bee", "ant"]


def test_figures_of_many_classes_leave_out_what_cannot_be_read() -> None:
    classes = tuple(f"class {label}" for label in range(60))
    figures = ClassificationReport.of(Counts(np.eye(60, dtype=np.int64)), "test", classes, {}).figures()
    assert len(figures["confusion.png"].axes[0].texts) == 0
    assert len(figures["recall.png"].axes[0].patches) == 40
