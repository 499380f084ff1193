"""Class weights by hand, and as torch's own weighted cross-entropy has them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import ConfigError
from pipeline.training.targets import ClassWeights, class_weights, weigh


def test_balanced_weights_are_inverse_to_the_counts_and_1_on_average_over_images() -> None:
    weights = class_weights("balanced", [30, 10, 60])
    assert weights is not None
    assert weights.tolist() == pytest.approx([100 / 90, 100 / 30, 100 / 180])  # N / (C n_c), as scikit-learn has it
    assert float((weights * torch.tensor([30, 10, 60])).sum()) == pytest.approx(100)


def test_a_class_without_images_gets_no_weight() -> None:
    weights = class_weights("balanced", [0, 5, 5])
    assert weights is not None
    assert weights.tolist() == pytest.approx([0, 1, 1])


def test_given_weights_keep_their_proportions() -> None:
    weights = class_weights((2.0, 4.0), [10, 30])
    assert weights is not None
    assert weights.tolist() == pytest.approx([4 / 7, 8 / 7])
    assert class_weights("none", [1, 2]) is None


@pytest.mark.parametrize("given", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, 1.0, 1.0)])
def test_weights_that_do_not_suit_the_classes_are_refused(given: ClassWeights) -> None:
    with pytest.raises(ConfigError, match="expected 2 positive numbers, one a class"):
        class_weights(given, [1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_targets_give_torchs_weighted_cross_entropy(smoothing: float) -> None:
    logits = torch.randn(8, 3, generator=torch.manual_seed(0))
    targets, weights = torch.tensor([0, 1, 2, 0, 0, 1, 2, 2]), torch.tensor([0.5, 2.0, 1.0])
    soft = F.one_hot(targets, 3) * (1 - smoothing) + smoothing / 3
    expected = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum") / 8
    given = soft if smoothing else targets
    torch.testing.assert_close(F.cross_entropy(logits, weigh(given, weights)), expected)


def test_targets_without_weights_stay_what_they_are() -> None:
    targets = torch.tensor([0, 1])
    assert weigh(targets, None) is targets
