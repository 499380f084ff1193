"""Classification metrics as mergeable counts: exact on any number of workers, because counts only add up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.types import Float32Array, Int64Array

TOP_K = 5


@dataclass(frozen=True)
class Counts:
    """What has been seen so far.

    Attributes:
        confusion: int64 [C, C], true class by row, predicted class by column.
        top_k: images whose true class is among the five best scores (or all, where there are fewer classes).
        loss: sum over images of the loss, in nats.
    """

    confusion: Int64Array
    top_k: int = 0
    loss: float = 0.0

    @classmethod
    def empty(cls, num_classes: int) -> Counts:
        """Nothing seen yet."""
        return cls(np.zeros((num_classes, num_classes), np.int64))

    @classmethod
    def of(cls, scores: Float32Array, labels: Int64Array, loss: float) -> Counts:
        """Count one batch: scores [B, C], true labels [B], summed loss. Of equal scores the lower class index wins."""
        ranked = np.argsort(-scores, axis=1, kind="stable")
        confusion = np.zeros((scores.shape[1], scores.shape[1]), np.int64)
        np.add.at(confusion, (labels, ranked[:, 0]), 1)
        return cls(confusion, int((ranked[:, :TOP_K] == labels[:, None]).sum()), loss)

    def __add__(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(self.confusion + other.confusion, self.top_k + other.top_k, self.loss + other.loss)

    @property
    def num_images(self) -> int:
        """Images seen."""
        return int(self.confusion.sum())

    def metrics(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy, mean recall over the classes that occur, macro-F1, and mean loss in nats.

        Macro-F1 is the mean of F1 over the classes that occur or are predicted.

        Raises:
            DataError: nothing has been counted.
        """
        if self.num_images == 0:
            raise DataError("expected at least one labelled image to measure, got none; check the split's shards")
        per_class = self.confusion.sum(axis=1)
        seen = per_class > 0
        return {
            "top1": float(self.confusion.trace() / self.num_images),
            f"top{TOP_K}": self.top_k / self.num_images,
            "mean_recall": float((self.confusion.diagonal()[seen] / per_class[seen]).mean()),
            "macro_f1": float(self.f1()[seen | (self.confusion.sum(axis=0) > 0)].mean()),
            "loss": self.loss / self.num_images,
        }

    def f1(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """F1 of each class, float64 [C]: the harmonic mean of recall and precision; 0 where none is right."""
        found: np.ndarray[tuple[int], np.dtype[np.float64]] = (
            2 * self.confusion.diagonal() / np.maximum(self.confusion.sum(axis=0) + self.confusion.sum(axis=1), 1)
        )
        return found

    def to_vector(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """All counts as float64 [C * C + 2], to be summed over workers; exact below 2**53 images."""
        return np.concatenate([self.confusion.reshape(-1).astype(np.float64), [self.top_k, self.loss]])

    @classmethod
    def from_vector(cls, vector: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Counts:
        """The inverse of `to_vector`."""
        num_classes = round(np.sqrt(len(vector) - 2))
        confusion = vector[:-2].reshape(num_classes, num_classes).astype(np.int64)
        return cls(confusion, int(vector[-2]), float(vector[-1]))
