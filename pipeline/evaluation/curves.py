"""Precision against recall, and confidence against accuracy, of stored predictions. NumPy only, nothing is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.tracking.predictions import Predictions
from pipeline.types import BoolArray, Float32Array

NUM_BINS = 15

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PrecisionRecall:
    """One class against all others, at every threshold that tells images apart, highest first.

    Attributes:
        precision: share of the images above the threshold that are of the class, float64 [T].
        recall: share of the class's images that are above the threshold, float64 [T].
    """

    precision: Float64Array
    recall: Float64Array

    @property
    def average_precision(self) -> float:
        """Precision at each threshold, weighted by the recall gained there; no interpolation."""
        return float((np.diff(self.recall, prepend=0.0) * self.precision).sum())


def precision_recall(predictions: Predictions, label: int) -> PrecisionRecall | None:
    """The curve of one class; None where no image is of it.

    Where only the best scores of each image were kept, the curve ends at the images that have one for this class:
    those without rank below all others.
    """
    num_positives = int((predictions.labels == label).sum())
    if num_positives == 0:
        return None
    rows, places = np.nonzero(predictions.ranked == label)
    scores = predictions.scores[rows, places]
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], (predictions.labels[rows] == label)[order]
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # of equal scores, all are above the threshold or none
    hits = np.cumsum(positive)[last]
    return PrecisionRecall(hits / (last + 1), hits / num_positives)


def all_precision_recall(predictions: Predictions) -> dict[int, PrecisionRecall]:
    """The curve of every class that occurs, by label."""
    found = ((label, precision_recall(predictions, label)) for label in range(len(predictions.origin.classes)))
    return {label: curve for label, curve in found if curve is not None}


def mean_average_precision(curves: dict[int, PrecisionRecall]) -> float:
    """The mean of average precision over the classes that occur."""
    return float(np.mean([curve.average_precision for curve in curves.values()]))


@dataclass(frozen=True)
class Reliability:
    """Predictions by confidence, in bins of equal width: bin m holds those in ((m - 1) / M, m / M].

    Attributes:
        counts: images in each bin, int64 [M].
        confidence: their mean confidence, float64 [M], 0 where there are none.
        accuracy: share of them that is right, float64 [M], 0 where there are none.
    """

    counts: npt.NDArray[np.int64]
    confidence: Float64Array
    accuracy: Float64Array

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over images of |accuracy - confidence| of their bin."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(self.counts.sum(), 1))


def reliability(confidence: Float32Array, right: BoolArray, num_bins: int = NUM_BINS) -> Reliability:
    """Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 2.

    Args:
        confidence: score of the predicted class, [N] in [0, 1].
        right: whether that class is the true one, [N].
        num_bins: the paper takes 15.
    """
    bins = (np.ceil(confidence * num_bins).astype(np.int64) - 1).clip(0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    held = np.maximum(counts, 1)
    return Reliability(
        counts,
        np.bincount(bins, confidence.astype(np.float64), num_bins) / held,
        np.bincount(bins, right.astype(np.float64), num_bins) / held,
    )
