"""One optimiser step: parts of a batch add up to the whole, clipping is of the sum, ranks wait for the last part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.models._contract import Classifier
from pipeline.training.precision import grad_scaler
from pipeline.training.step import backward, split, update


def lenet() -> Classifier:
    torch.manual_seed(0)
    return models.build_classifier(parse(models.config_of("lenet5"), {}, "here"))


def batch(count: int) -> Batch:
    generator = torch.manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.randint(0, 10, (count,), generator=generator))


def loss_of(model: nn.Module, of: Classifier) -> Callable[[Batch], Tensor]:
    def mean_loss(part: Batch) -> Tensor:
        return of.loss(model(part), part.labels)["cross_entropy"]

    return mean_loss


def gradients(num_parts: int, count: int = 14) -> tuple[list[Tensor], float]:
    model = lenet()
    loss = backward(model, split(batch(count), num_parts), loss_of(model, model), grad_scaler("fp32", "cpu"))
    assert not loss.requires_grad
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], float(loss)


@pytest.mark.parametrize("num_parts", [2, 3, 4, 14, 20])
def test_gradients_of_parts_however_unequal_are_those_of_the_whole_batch(num_parts: int) -> None:
    whole, whole_loss = gradients(1)
    parts, parts_loss = gradients(num_parts)
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)


def test_split_keeps_order_and_pairs_and_makes_no_empty_part() -> None:
    whole = batch(7)
    parts = split(whole, 3)
    assert [len(part) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert [len(part) for part in split(batch(2), 5)] == [1, 1]


def test_ranks_exchange_gradients_in_the_last_part_only(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = lenet()
        net = DistributedDataParallel(model)
        synchronised: list[bool] = []
        net.register_comm_hook(None, lambda _, bucket: exchanged(synchronised, bucket))
        with patch.object(net, "no_sync", wraps=net.no_sync) as without:
            backward(net, split(batch(9), 3), loss_of(net, model), grad_scaler("fp32", "cpu"))
        assert without.call_count == 2
        assert synchronised
        alone = lenet()
        backward(alone, split(batch(9), 3), loss_of(alone, alone), grad_scaler("fp32", "cpu"))
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    finally:
        dist.destroy_process_group()


def exchanged(seen: list[bool], bucket: Any) -> torch.futures.Future[Tensor]:
    seen.append(True)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize(("clip_norm", "moved"), [(None, 5.0), (1.0, 1.0), (10.0, 5.0)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_update_clips_the_unscaled_gradient_steps_and_clears(
    precision: str, clip_norm: float | None, moved: float
) -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler = grad_scaler("fp16" if precision == "fp16" else "fp32", "cpu")
    loss = 3 * parameters[0].sum() + 4 * parameters[1].sum()  # a gradient of norm 5
    torch.autograd.backward(scaler.scale(loss))
    update(optimizer, parameters, scaler, clip_norm)
    assert float(torch.cat([value.detach() for value in parameters]).norm()) == pytest.approx(moved, rel=1e-5)
    assert all(value.grad is None for value in parameters)


def test_parts_in_fp16_scale_back_to_the_gradients_of_fp32() -> None:
    changes = []
    for precision in ("fp32", "fp16"):
        model = lenet()
        before = [value.detach().clone() for value in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = grad_scaler("fp16" if precision == "fp16" else "fp32", "cpu")
        backward(model, split(batch(8), 2), loss_of(model, model), scaler)
        update(optimizer, model.parameters(), scaler, None)
        changes.append([value.detach() - old for value, old in zip(model.parameters(), before, strict=True)])
    for one, other in zip(*changes, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)
