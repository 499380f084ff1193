"""The range test of rates and the search for the largest batch: what they find, and what they leave behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.errors import ConfigError, ModelError
from pipeline.models._contract import Classifier
from pipeline.training import optim
from pipeline.training.finder import Curve, RangeTest, largest_batch, range_test, step_probe


def model(**keys: Any) -> Classifier:
    torch.manual_seed(0)
    raw = {"fc_features": 16, "num_classes": 2, "norm": "batch", "input": {"size_hw": [64, 64]}} | keys
    return models.build_classifier(
        parse(models.config_of("alexnet"), raw, "here")
    ).train()  # has dropout and statistics


def batches() -> Iterator[Batch]:
    """Two classes that brightness tells apart."""
    generator = torch.manual_seed(3)
    while True:
        targets = torch.randint(0, 2, (8,), generator=generator)
        noise = torch.randint(0, 60, (8, 3, 64, 64), generator=generator)
        yield Batch((noise + 150 * targets.view(-1, 1, 1, 1)).to(torch.uint8), targets)


def mean_loss(net: Classifier) -> Callable[[Batch], Tensor]:
    def loss_of(batch: Batch) -> Tensor:
        return net.loss(net(batch), batch.labels)["cross_entropy"]

    return loss_of


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [value.detach().clone() for value in (*net.state_dict().values(), *state, torch.get_rng_state())]


def test_range_test_leaves_model_optimiser_and_randomness_as_they_were_to_the_bit() -> None:
    net = model()
    optimizer = optim.build_optimizer(net, optim.Config())
    source, loss_of = batches(), mean_loss(net)
    torch.autograd.backward(loss_of(next(source)))
    optimizer.step()  # so that there is momentum to keep
    optimizer.zero_grad()
    before, rates = snapshot(net, optimizer), [group["lr"] for group in optimizer.param_groups]
    curve = range_test(net, optimizer, source, loss_of, RangeTest(num_steps=12))
    assert len(curve.rates) >= 2
    for old, new in zip(before, snapshot(net, optimizer), strict=True):
        assert torch.equal(old, new)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_suggested_rate_of_a_parabola_lies_below_the_rate_that_diverges() -> None:
    # Of w^2 / 2 plain descent converges below a rate of 2 and is fastest at 1.
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = optim.build_optimizer(layer, optim.Config(momentum=0.0, weight_decay=0.0))
    config = RangeTest(lowest=1e-4, highest=100, num_steps=120, smoothing=0.5)
    curve = range_test(
        layer, optimizer, repeat(Batch(torch.zeros(1, 3, 1, 1))), lambda _: layer.weight.square().sum() / 2, config
    )
    assert 0.01 < curve.suggestion < 2
    assert curve.rates[-1] < 100, "it must end when the loss has exploded"
    assert layer.weight.item() == 1.0
    assert curve.rates[1] / curve.rates[0] == pytest.approx(1e6 ** (1 / 119))


def test_smoothed_losses_are_the_corrected_running_mean() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = optim.build_optimizer(layer, optim.Config())
    losses = iter([4.0, 2.0, 1.0])
    curve = range_test(
        layer,
        optimizer,
        repeat(Batch(torch.zeros(1, 3, 1, 1)), 3),
        lambda _: layer.weight.sum() * 0 + next(losses, 0.0),
        RangeTest(smoothing=0.5),
    )
    assert list(curve.losses) == [4, 2, 1]
    assert curve.smoothed == pytest.approx((4, (0.25 * 4 + 0.5 * 2) / 0.75, (0.125 * 4 + 0.25 * 2 + 0.5) / 0.875))


def test_suggestion_is_where_the_curve_falls_most_steeply() -> None:
    smoothed = (3.0, 3.0, 2.9, 2.0, 1.1, 1.0, 5.0)
    assert Curve(tuple(10.0**at for at in range(7)), smoothed, smoothed).suggestion == 1000


@pytest.mark.parametrize("smoothed", [(1.0, 2.0, 3.0), (1.0,), (2.0, 2.0, 2.0)])
def test_a_curve_that_never_falls_has_no_suggestion(smoothed: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="no rate in the range lowers the loss"):
        _ = Curve(tuple(range(1, len(smoothed) + 1)), smoothed, smoothed).suggestion


def test_a_loss_that_is_not_finite_from_the_start_is_said() -> None:
    net = model()
    optimizer = optim.build_optimizer(net, optim.Config())
    with pytest.raises(ModelError, match="saw no finite loss"):
        range_test(net, optimizer, batches(), lambda _: torch.tensor(math.nan), RangeTest())


@given(limit=st.integers(1, 5000), start=st.integers(1, 64), most=st.integers(1, 4096))
def test_largest_batch_fits_and_a_sixteenth_more_does_not(limit: int, start: int, most: int) -> None:
    tried: list[int] = []

    def probe(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise MemoryError

    found = largest_batch(probe, start=start, most=most)
    assert found <= min(limit, most)
    assert found == most or found + max(found // 16, 1) >= min(limit, most)
    assert max(tried) <= most
    assert len(tried) <= 30


def test_largest_batch_says_when_not_even_one_image_fits() -> None:
    def probe(_: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(ConfigError, match="not even one image fits"):
        largest_batch(probe, start=8)


def test_other_errors_of_a_probe_are_not_taken_for_full_memory() -> None:
    def probe(_: int) -> None:
        raise ModelError("broken")

    with pytest.raises(ModelError, match="broken"):
        largest_batch(probe)


def test_probe_of_a_step_counts_what_autograd_keeps_and_leaves_the_model_alone() -> None:
    net = model()
    optimizer = optim.build_optimizer(net, optim.Config())
    before = snapshot(net, optimizer)
    weights = sum(value.nbytes for value in net.parameters())

    def blank(num_images: int) -> Batch:
        images = torch.full((num_images, net.spec.num_channels, *net.spec.size_hw), 128, dtype=torch.uint8)
        return Batch(images, torch.zeros(num_images, dtype=torch.int64))

    found = [
        largest_batch(step_probe(net, optimizer, mean_loss(net), blank, 4 * weights + room), start=4, most=256)
        for room in (10_000_000, 20_000_000)
    ]
    assert 1 <= found[0] < found[1] < 256
    assert found[1] == pytest.approx(2 * found[0], rel=0.15)
    for old, new in zip(before, snapshot(net, optimizer), strict=True):
        assert torch.equal(old, new)
