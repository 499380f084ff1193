"""ILSVRC's localisation error: every case by hand, and counts that merge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluation.localise import Counts
from pipeline.types import Detections, Objects

Labelled = tuple[int, tuple[float, float, float, float]]
WHOLE = (0, 0, 100, 100)
SIXTY, HALF = (0, 0, 100, 60), (0, 0, 100, 50)  # their IoU with the whole is 0.6 and exactly 0.5
FAR = (200, 200, 300, 300)


def guesses(*found: Labelled) -> Detections:
    scores = np.linspace(1, 0.1, len(found)).astype(np.float32)
    return Detections(*boxes_and_labels(found), scores)


def objects(*truth: Labelled, crowd: tuple[int, ...] = (), difficult: tuple[int, ...] = ()) -> Objects:
    is_difficult, is_truncated, is_crowd = (np.isin(np.arange(len(truth)), places) for places in (difficult, (), crowd))
    return Objects(*boxes_and_labels(truth), is_difficult, is_truncated, is_crowd)


def boxes_and_labels(rows: tuple[Labelled, ...]) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.array([box for _, box in rows], np.float32).reshape(-1, 4)
    return boxes, np.array([label for label, _ in rows], np.int64)


def errors(found: Detections, truth: Objects) -> tuple[float, float]:
    """Of localisation and of class, of one image."""
    measured = Counts.of(found, truth).metrics()
    assert list(measured) == ["top5_localisation_error", "top5_class_error"]
    return measured["top5_localisation_error"], measured["top5_class_error"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (guesses((3, SIXTY)), (0, 0)),
        (guesses((3, HALF)), (1, 0)),
        (guesses((3, FAR)), (1, 0)),
        (guesses((4, WHOLE)), (1, 1)),
        (guesses((4, WHOLE), (3, FAR)), (1, 0)),
        (guesses(), (1, 1)),
        (guesses(*[(label, WHOLE) for label in (5, 6, 7, 8, 3)]), (0, 0)),
        (guesses(*[(label, WHOLE) for label in (5, 6, 7, 8, 9, 3)]), (1, 1)),
        (guesses(*[(3, FAR)] * 5, (3, WHOLE)), (1, 0)),
    ],
    ids=[
        "IoU above half",
        "IoU of exactly half",
        "right class elsewhere",
        "right place of another class",
        "class of one guess and place of another",
        "no guess",
        "fifth guess right",
        "sixth guess right",
        "sixth guess right of a class guessed before",
    ],
)
def test_guesses_at_one_object_have_the_error_computed_by_hand(
    found: Detections, expected: tuple[float, float]
) -> None:
    assert errors(found, objects((3, WHOLE))) == expected


def test_any_true_box_of_the_guessed_class_makes_a_guess_right() -> None:
    two = objects((3, FAR), (3, WHOLE))
    assert errors(guesses((3, SIXTY)), two) == (0, 0)
    assert errors(guesses((3, FAR)), two) == (0, 0)


def test_of_objects_of_several_classes_the_box_must_be_of_the_guessed_class() -> None:
    mixed = objects((3, FAR), (4, WHOLE))
    assert errors(guesses((3, WHOLE)), mixed) == (1, 0)
    assert errors(guesses((4, WHOLE)), mixed) == (0, 0)


def test_difficult_objects_count_and_crowds_do_not() -> None:
    assert errors(guesses((3, WHOLE)), objects((3, WHOLE), difficult=(0,))) == (0, 0)
    assert errors(guesses((3, WHOLE)), objects((3, WHOLE), (4, FAR), crowd=(0,))) == (1, 1)


@pytest.mark.parametrize("truth", [objects(), objects((3, WHOLE), crowd=(0,))], ids=["empty", "crowd"])
def test_image_without_a_single_object_is_not_judged(truth: Objects) -> None:
    counts = Counts.of(guesses((3, WHOLE)), truth)
    assert counts == Counts()
    with pytest.raises(DataError, match="expected at least one image with an object"):
        counts.metrics()


def test_counts_of_images_merge_in_any_order_to_the_same_figures() -> None:
    truth = objects((3, WHOLE))
    images = [
        *(Counts.of(found, truth) for found in (guesses((3, SIXTY)), guesses((3, HALF)), guesses((4, WHOLE)))),
        Counts.of(guesses((3, WHOLE)), objects()),
        Counts.of(guesses((3, WHOLE)), truth),
    ]
    for order in itertools.permutations(images):
        measured = sum(order, Counts()).metrics()
        assert measured == {"top5_localisation_error": 2 / 4, "top5_class_error": 1 / 4}
    assert (images[0] + images[1]) + images[2] == images[0] + (images[1] + images[2])
