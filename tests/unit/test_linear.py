"""Linear layers that are solved for, against the conditions that a solution must meet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError
from scipy.optimize import minimize

from pipeline.training import linear
from pipeline.training.linear import BIAS_SCALE, Config

FloatArray = npt.NDArray[np.float64]


def clouds(num: int = 60, features: int = 5, classes: int = 3) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A cloud of points for each class, which overlap a little."""
    rng = np.random.default_rng(0)
    labels = np.arange(num) % classes
    centres = rng.normal(0, 2, (classes, features))
    return (centres[labels] + rng.normal(0, 1, (num, features))).astype(np.float32), labels


def objective(solution: FloatArray, x: FloatArray, signs: FloatArray, c: float, positive_weight: float) -> float:
    """What a machine minimises, of its weights and the weight of a constant feature, by definition."""
    margins = signs * (x @ solution[:-1] + BIAS_SCALE * solution[-1])
    weights = np.where(signs > 0, positive_weight, 1.0)
    return float(solution @ solution / 2 + c * (weights * np.maximum(0, 1 - margins)).sum())


def test_machines_reach_the_least_objective_that_a_general_minimiser_finds() -> None:
    x, labels = clouds(features=2)
    of_class = labels[:, None] == np.arange(3)
    found = linear.support_vectors(x, of_class, ~of_class, c=0.05, norm=4.0, positive_weight=2.0)
    scale = 4.0 / np.linalg.norm(x, axis=1).mean()
    for number in range(3):
        signs = np.where(of_class[:, number], 1.0, -1.0)
        mine = np.append(found.weight[number] / scale, found.bias[number] / BIAS_SCALE).astype(np.float64)
        arguments = (x * scale, signs, 0.05, 2.0)
        best = min(
            minimize(objective, start, arguments, method="Powell", options={"maxiter": 300}).fun
            for start in (mine, np.zeros(3))
        )
        assert objective(mine, *arguments) <= best * 1.001


def test_machines_do_not_see_rows_that_are_no_examples() -> None:
    x, labels = clouds()
    of_class = labels[:, None] == np.arange(3)
    far = np.concatenate([x, 1e3 * np.ones((4, 5), np.float32)])
    positive, negative = (np.concatenate([one, np.zeros((4, 3), bool)]) for one in (of_class, ~of_class))
    norm = float(np.linalg.norm(x, axis=1).mean())
    plain = linear.support_vectors(x, of_class, ~of_class, c=0.05, norm=norm, positive_weight=1.0)
    scaled = float(np.linalg.norm(far, axis=1).mean())
    among = linear.support_vectors(far, positive, negative, c=0.05, norm=scaled, positive_weight=1.0)
    np.testing.assert_allclose(plain.weight, among.weight, rtol=1e-3, atol=1e-5)


def test_machines_without_examples_on_one_side_say_the_same_of_everything() -> None:
    x, _ = clouds(num=6)
    positive = np.array([[False, True, False]] * 6)
    found = linear.support_vectors(x, positive, ~positive, c=1.0, norm=20.0, positive_weight=2.0)
    np.testing.assert_array_equal(found(x), np.broadcast_to([-1.0, 1.0, -1.0], (6, 3)))


def test_machines_are_the_same_whatever_length_their_features_have() -> None:
    x, labels = clouds()
    of_class = labels[:, None] == np.arange(3)
    one, other = (
        linear.support_vectors(x * factor, of_class, ~of_class, c=0.01, norm=20.0, positive_weight=2.0)(x * factor)
        for factor in (1.0, 100.0)
    )
    np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)


def test_ridge_is_the_solution_of_the_normal_equations() -> None:
    x, _ = clouds()
    rng = np.random.default_rng(1)
    targets = rng.normal(size=(60, 4)).astype(np.float32)
    found = linear.ridge(x, targets, 7.0)
    centred = x - x.mean(axis=0)
    expected = np.linalg.solve(centred.T @ centred + 7.0 * np.eye(5), centred.T @ (targets - targets.mean(axis=0)))
    np.testing.assert_allclose(found.weight, expected.T, atol=1e-4)
    np.testing.assert_allclose(found(x).mean(axis=0), targets.mean(axis=0), atol=1e-4)


def test_ridge_without_any_row_corrects_nothing() -> None:
    found = linear.ridge(np.zeros((0, 5), np.float32), np.zeros((0, 4), np.float32), 1.0)
    np.testing.assert_array_equal(found(np.ones((2, 5), np.float32)), np.zeros((2, 4)))


@pytest.mark.parametrize("key", ["svm_c", "feature_norm", "negative_iou", "first_negatives", "correction_iou"])
def test_config_refuses_zero(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        Config(**{key: 0})
