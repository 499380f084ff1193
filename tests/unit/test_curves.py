"""Precision, recall and calibration against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from pipeline.evaluation.curves import (
    all_precision_recall,
    mean_average_precision,
    precision_recall,
    reliability,
)
from pipeline.evaluation.report import evidence_metrics
from pipeline.tracking.predictions import Origin, Predictions


def origin_of(num_classes: int) -> Origin:
    classes = tuple(f"class {label}" for label in range(num_classes))
    return Origin(split="val", dataset="made up", dataset_digest="d", weights_sha256="w" * 64, classes=classes)


def made_up(num_images: int, num_classes: int) -> Predictions:
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(num_classes), num_images).astype(np.float32)
    ids = [f"{number:05d}" for number in range(num_images)]
    return Predictions.of(origin_of(num_classes), ids, rng.integers(0, num_classes, num_images), scores)


@pytest.mark.parametrize("digits", [1, 6], ids=["many ties", "few ties"])
def test_average_precision_agrees_with_sklearn(digits: int) -> None:
    rng = np.random.default_rng(3)
    scores = rng.dirichlet(np.ones(4), 300).round(digits).astype(np.float32)
    labels = rng.integers(0, 3, 300)  # class 3 never occurs
    found = Predictions.of(origin_of(4), [f"{number:03d}" for number in range(300)], labels, scores)
    curves = all_precision_recall(found)
    assert sorted(curves) == [0, 1, 2]
    expected = [sk.average_precision_score(labels == label, scores[:, label]) for label in range(3)]
    assert [curves[label].average_precision for label in range(3)] == pytest.approx(expected)
    assert mean_average_precision(curves) == pytest.approx(np.mean(expected))
    precision, recall, _ = sk.precision_recall_curve(labels == 1, scores[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(curves[1].precision[::-1], precision[:-1])
    np.testing.assert_allclose(curves[1].recall[::-1], recall[:-1])


def test_precision_recall_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.1, 0.9]], np.float32)
    found = Predictions.of(origin_of(2), list("abcd"), np.array([0, 1, 0, 0]), scores)
    curve = precision_recall(found, 0)
    assert curve
    assert curve.precision.tolist() == [1.0, 2 / 3, 3 / 4]
    assert curve.recall.tolist() == [1 / 3, 2 / 3, 1.0]
    assert curve.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_precision_recall_from_the_best_five_ends_where_scores_end() -> None:
    found = made_up(400, 50)
    curve = precision_recall(found, 7)
    assert curve
    of_class = found.labels == 7
    assert curve.recall[-1] == pytest.approx((found.right(5) & of_class).sum() / of_class.sum())
    assert "mean_ap" not in evidence_metrics(found)
    assert evidence_metrics(made_up(50, 5)).keys() == {"ece", "mean_ap"}


def test_reliability_by_hand() -> None:
    confidence = np.array([0.05, 0.1, 0.55, 0.6, 1.0, 0.0], np.float64).astype(np.float32)
    right = np.array([False, True, True, False, True, False])
    found = reliability(confidence, right, num_bins=10)
    assert found.counts.tolist() == [3, 0, 0, 0, 0, 2, 0, 0, 0, 1]  # 0.1 and 0.6 belong to the bins that they close
    assert found.accuracy[[0, 5, 9]].tolist() == pytest.approx([1 / 3, 0.5, 1.0])
    assert found.confidence[[0, 5, 9]].tolist() == pytest.approx([0.05, 0.575, 1.0])
    assert found.ece == pytest.approx((3 * (1 / 3 - 0.05) + 2 * 0.075) / 6)


def test_reliability_of_a_calibrated_model_has_a_small_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 50_000).astype(np.float32)
    assert reliability(confidence, rng.random(50_000) < confidence).ece < 0.01
    assert reliability(confidence, rng.random(50_000) < confidence - 0.2).ece == pytest.approx(0.2, abs=0.01)
