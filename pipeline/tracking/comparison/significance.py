"""Is one model really better than another? Two questions, each with its own test, and the weaker answer counts.

Would other images of the same kind say the same? The models saw the same images, so the images testify in pairs:
McNemar's exact test on those that only one model got right, and the paired bootstrap for an interval.
Would other seeds say the same? Welch's t test over the metric of runs that differ in nothing else.

Every test asks whether the first is better. Its p-value is twice the one-sided one, at most 1: the usual two-sided
value where the first is ahead, for which model comes first was chosen by looking; and 1 where the second is ahead, so
that evidence for the second never counts for the first.

NumPy and `scipy.special` only; no MLflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from pipeline.types import BoolArray

NUM_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, the interval that holds the true one with the given confidence, and the p-value of its being above 0."""

    mean: float
    low: float
    high: float
    p: float


def mcnemar(first: BoolArray, second: BoolArray) -> float:
    """The p-value of "the first is right more often", from the images on which they disagree.

    Else each of those is a fair coin at best, so the p-value is an exact binomial one (McNemar 1947; Dietterich,
    "Approximate Statistical Tests for Comparing Supervised Classification Learning Algorithms", 1998, section 3.1).

    Args:
        first: whether the first model is right, bool [N].
        second: of the same images.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    both = only_first + only_second
    return min(1.0, 2 * float(special.bdtr(only_second, both, 0.5))) if both else 1.0


def bootstrap(
    differences: npt.NDArray[np.floating[Any]], *, confidence: float = 0.95, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Interval:
    """The mean of paired differences, its percentile interval and its p-value over resampled images.

    The p-value is twice the share of resampled means that are not above 0, with one more draw counted there, so never
    below 2 / (num_draws + 1) (Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, sections 13.3 and 15.4).

    Args:
        differences: of each image, [N], first less second: for one run each -1, 0 or 1, else the difference of the
            shares of seeds that are right.
        confidence: of the interval.
        num_draws: resampled sets of N images.
        seed: the result is a function of the arguments.
    """
    # Images of equal difference are interchangeable: how often each value is drawn is all that matters.
    values, counts = np.unique(differences, return_counts=True)
    total = len(differences)
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=num_draws)
    means = drawn @ values / total
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    far = int((means <= 0).sum())
    return Interval(float(differences.mean()), float(low), float(high), min(1.0, 2 * (far + 1) / (num_draws + 1)))


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The p-value of "the mean over all seeds of the first is higher".

    Where one side has a single seed there is no test: None, or 1 if the second is ahead, which needs none.

    Welch, "The Generalization of 'Student's' Problem when Several Different Population Variances are Involved", 1947.
    A permutation test needs no normal distribution, but cannot fall below 0.1 with three seeds a side. Where no side
    varies at all, a higher mean is beyond doubt: 0, else 1.
    """
    if not (first and second):
        return None
    ahead = float(np.mean(first)) - float(np.mean(second))
    if min(len(first), len(second)) < 2:
        return 1.0 if ahead < 0 else None
    parts = np.var(first, ddof=1) / len(first), np.var(second, ddof=1) / len(second)
    if sum(parts) == 0:
        return 0.0 if ahead > 0 else 1.0
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(first) - 1) + parts[1] ** 2 / (len(second) - 1))
    return min(1.0, 2 * float(special.stdtr(freedom, -ahead / np.sqrt(sum(parts)))))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests made at once, raised so that one false alarm among all stays as rare as promised.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        worst = max(worst, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = worst
    return adjusted
