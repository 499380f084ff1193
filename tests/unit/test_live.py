"""A model in memory against batches: what is counted is what the model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline import models
from pipeline.batch import Batch
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.live import all_reduce, autocast, evaluate
from pipeline.models._contract import Classifier
from pipeline.types import Float32Array, InputSpec


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return models.build_classifier(models.config_of("lenet5")(name="lenet5", num_classes=4))


def batches(*sizes: int, side: int = 28) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for size in sizes
    ]


def test_evaluate_counts_every_image_and_weighs_the_loss_by_batch_size(model: Classifier) -> None:
    parts = batches(5, 2)
    counts = evaluate(model, parts, 4)
    images = torch.cat([part.images for part in parts])
    targets = torch.cat([part.labels for part in parts])
    with torch.no_grad():
        logits = model(Batch(images))
    assert counts.num_images == 7
    assert counts.metrics()["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert counts.metrics()["top1"] == pytest.approx(float((logits.argmax(1) == targets).float().mean()))


def test_evaluate_of_ten_views_averages_the_scores_of_ten_forward_passes() -> None:
    torch.manual_seed(0)
    model = models.build_classifier(models.config_of("lenet5")(name="lenet5", num_classes=4)).eval()
    model.spec = InputSpec(size_hw=(28, 28), resize_short=34)
    (batch,), seen = batches(6, side=34), list[Float32Array]()
    counts = evaluate(model, [batch], 4, watch=lambda _, scores: seen.append(scores), views="ten_crop")
    corners = [(top, left) for top in (0, 6) for left in (0, 6)]
    windows = [batch.images[:, :, top : top + 28, left : left + 28] for top, left in [*corners, (3, 3)]]
    with torch.no_grad():
        passes = [model(Batch(view)).softmax(1) for window in windows for view in (window, window.flip(3))]
    mean = sum(passes[1:], passes[0]) / 10
    np.testing.assert_allclose(seen[0], mean.numpy(), atol=1e-6)
    assert not np.allclose(seen[0], passes[8].numpy(), atol=1e-3)  # the centre alone
    assert counts.metrics()["loss"] == pytest.approx(float(F.nll_loss(mean.log(), batch.labels)), rel=1e-5)


def test_evaluate_leaves_the_model_in_evaluation_mode_and_without_gradients(model: Classifier) -> None:
    model.train()
    evaluate(model, batches(2), 4)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_of_no_batches_counts_nothing(model: Classifier) -> None:
    assert evaluate(model, [], 4).num_images == 0


def test_all_reduce_without_a_process_group_changes_nothing() -> None:
    counts = Counts(np.eye(3, dtype=np.int64))
    assert all_reduce(counts) is counts


def test_autocast_runs_products_in_bfloat16_only_when_asked() -> None:
    matrix = torch.ones(2, 2)
    with autocast("bf16", "cpu"):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast("fp32", "cpu"):
        assert (matrix @ matrix).dtype == torch.float32
