"""Linear layers that are solved for, not descended to: support vector machines and ridge regressions. No Ray.

The solvers are scikit-learn's. Features may come from anywhere; `solve` takes them from a fitted network.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Strict
from pipeline.types import Float32Array

BoolArray = npt.NDArray[np.bool_]

BIAS_SCALE = 10.0
"""Of the constant that the bias is the weight of, as in R-CNN's code: so large that the bias is hardly regularised."""
MAX_ITERATIONS = 10_000


class Config(Strict):
    """How last layers are solved for; the defaults are R-CNN's.

    Attributes:
        svm_c: weight of the hinge losses.
        feature_norm: mean length that features are brought to for the machines.
        positive_weight: of the hinge loss of an object.
        negative_iou: a region that overlaps each object of a class by less is an example against it.
        first_negatives: regions that the first machines see beside the objects, at most.
        hard_rounds: how often regions that are wrongly taken for objects are added.
        hard_negatives: that a round adds, at most, the worst first.
        ridge_penalty: of the box corrections' weights.
        correction_iou: a region that overlaps an object by so much teaches how to correct it.
        corrections: regions that teach that, at most.
    """

    svm_c: float = Field(default=1e-3, gt=0)
    feature_norm: float = Field(default=20.0, gt=0)
    positive_weight: float = Field(default=2.0, gt=0)
    negative_iou: float = Field(default=0.3, gt=0, le=1)
    first_negatives: int = Field(default=20_000, ge=1)
    hard_rounds: int = Field(default=1, ge=0)
    hard_negatives: int = Field(default=50_000, ge=1)
    ridge_penalty: float = Field(default=1000.0, ge=0)
    correction_iou: float = Field(default=0.6, gt=0, le=1)
    corrections: int = Field(default=50_000, ge=1)


class Solution(NamedTuple):
    """A linear layer, `x @ weight.T + bias`.

    Attributes:
        weight: float32 [outputs, inputs].
        bias: float32 [outputs].
    """

    weight: Float32Array
    bias: Float32Array

    def __call__(self, features: Float32Array) -> Float32Array:
        """What it says of features [N, inputs]: [N, outputs]."""
        return np.asarray(features @ self.weight.T + self.bias, np.float32)


def support_vectors(
    features: Float32Array, positive: BoolArray, negative: BoolArray, *, c: float, norm: float, positive_weight: float
) -> Solution:
    """One machine for each class, on the rows that are examples for or against it; the others are left out.

    A class without any example for it is told -1 everywhere, one without any against it 1.

    Args:
        features: [N, F].
        positive: [N, C], and `negative`, which rows are examples for, and against, a class.
        c: weight of the hinge losses against half the square of the weights' length, for features of the length below.
        norm: mean length that the features are brought to.
        positive_weight: of the hinge loss of an example for a class.
    """
    from sklearn.svm import LinearSVC  # noqa: PLC0415  (half a second, for the few that solve)

    scale = norm / max(float(np.linalg.norm(features, axis=1).mean()), 1e-12)
    weight = np.zeros((positive.shape[1], features.shape[1]), np.float32)
    bias = np.zeros(positive.shape[1], np.float32)
    for number, (ours, theirs) in enumerate(zip(positive.T, negative.T, strict=True)):
        if not (ours.any() and theirs.any()):
            bias[number] = 1 if ours.any() else -1
            continue
        machine = LinearSVC(
            C=c,
            loss="hinge",
            class_weight={True: positive_weight},
            intercept_scaling=BIAS_SCALE,
            random_state=0,
            max_iter=MAX_ITERATIONS,
        )
        rows = ours | theirs
        machine.fit(features[rows] * scale, ours[rows])
        weight[number], bias[number] = machine.coef_[0] * scale, machine.intercept_[0]
    return Solution(weight, bias)


def ridge(features: Float32Array, targets: Float32Array, penalty: float) -> Solution:
    """Least squares with `penalty` times the square of the weights' length; without any row, zeros.

    Args:
        features: [N, P].
        targets: [N, T].
    """
    from sklearn.linear_model import Ridge  # noqa: PLC0415  (as above)

    if not len(features):
        return Solution(
            np.zeros((targets.shape[1], features.shape[1]), np.float32), np.zeros(targets.shape[1], np.float32)
        )
    found = Ridge(alpha=penalty).fit(features, targets)
    return Solution(found.coef_.astype(np.float32), found.intercept_.astype(np.float32))
