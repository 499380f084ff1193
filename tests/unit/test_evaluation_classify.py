"""Counts against scikit-learn on random data, by hand where scores tie, and as sums over workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from pipeline.errors import DataError
from pipeline.evaluation.classify import Counts
from pipeline.types import Float32Array, Int64Array


def random_batch(seed: int, num_images: int, num_classes: int) -> tuple[Float32Array, Int64Array]:
    rng = np.random.default_rng(seed)
    return rng.random((num_images, num_classes), np.float32), rng.integers(0, num_classes, num_images)


@pytest.mark.parametrize("num_classes", [3, 7, 20])
def test_counts_agree_with_sklearn(num_classes: int) -> None:
    scores, labels = random_batch(num_classes, 500, num_classes)
    counts = Counts.of(scores, labels, loss=50.0)
    predicted = scores.argmax(axis=1)
    np.testing.assert_array_equal(counts.confusion, sk.confusion_matrix(labels, predicted))
    top5 = sk.top_k_accuracy_score(labels, scores, k=5, labels=range(num_classes)) if num_classes > 5 else 1.0
    assert counts.metrics() == pytest.approx(
        {
            "top1": sk.accuracy_score(labels, predicted),
            "top5": top5,
            "mean_recall": sk.recall_score(labels, predicted, average="macro"),
            "macro_f1": sk.f1_score(labels, predicted, average="macro"),
            "loss": 0.1,
        }
    )


def test_of_equal_scores_the_lower_class_wins() -> None:
    scores = np.array([[0, 1, 1, 0, 0, 0, 0]] * 2 + [[0] * 7] * 2, np.float32)
    counts = Counts.of(scores, np.array([1, 2, 4, 5]), loss=0.0)
    assert counts.confusion[1, 1] == counts.confusion[2, 1] == counts.confusion[4, 0] == counts.confusion[5, 0] == 1
    assert counts.top_k == 3  # of seven equal scores, classes 0 to 4 are the first five
    many = Counts.of(
        np.tile(np.array([0, 1], np.float32), (1, 100)), np.array([9]), loss=0.0
    )  # too many to insert-sort
    assert (many.confusion[9, 1], many.top_k) == (1, 1)  # the first five are 1, 3, 5, 7, 9


def test_mean_recall_leaves_out_classes_that_do_not_occur() -> None:
    scores = np.eye(4, dtype=np.float32)[[0, 0, 1, 3]]
    counts = Counts.of(scores, np.array([0, 0, 1, 1]), loss=2.0)  # class 0: 2 of 2, class 1: 1 of 2
    assert counts.metrics()["mean_recall"] == 0.75
    assert counts.metrics()["loss"] == 0.5


def test_macro_f1_by_hand_counts_classes_that_are_only_predicted() -> None:
    scores = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    counts = Counts.of(scores, np.array([0, 0, 1, 1]), loss=0.0)
    np.testing.assert_allclose(counts.f1(), [1.0, 2 / 3, 0.0, 0.0])  # class 1: precision 1, recall 1/2
    assert counts.metrics()["macro_f1"] == pytest.approx(5 / 9)  # class 3 neither occurs nor is predicted


@given(st.integers(0, 1000), st.tuples(*[st.integers(1, 30)] * 3))
def test_counts_add_up_in_any_grouping(seed: int, sizes: tuple[int, int, int]) -> None:
    parts = [Counts.of(*random_batch(seed + size, size, 6), loss=size / 4) for size in sizes]
    left, right = (parts[0] + parts[1]) + parts[2], parts[0] + (parts[1] + parts[2])
    assert left.metrics() == right.metrics()
    batches = [random_batch(seed + size, size, 6) for size in sizes]
    scores, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    assert left.metrics() == Counts.of(scores, labels, loss=sum(sizes) / 4).metrics()


def test_vector_round_trip_and_sum_are_those_of_the_counts() -> None:
    first, second = (Counts.of(*random_batch(seed, 40, 5), loss=seed + 0.5) for seed in (1, 2))
    merged = Counts.from_vector(first.to_vector() + second.to_vector())
    np.testing.assert_array_equal(merged.confusion, (first + second).confusion)
    assert merged.confusion.dtype == np.int64
    assert (merged.top_k, merged.loss) == (first.top_k + second.top_k, 4.0)


def test_nothing_counted_is_neutral_and_has_no_metrics() -> None:
    counts = Counts.of(*random_batch(0, 10, 4), loss=1.0)
    assert (Counts.empty(4) + counts).metrics() == counts.metrics()
    assert Counts.empty(4).num_images == 0
    with pytest.raises(DataError, match="expected at least one labelled image"):
        Counts.empty(4).metrics()
