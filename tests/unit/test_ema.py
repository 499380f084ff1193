"""The average of weights: by hand, against torch's own, and over a stop and resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.training.ema import Config, Ema, decay


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


def train(model: nn.Module, seed: int) -> None:
    """Change weights and running statistics."""
    generator = torch.manual_seed(seed)
    model.train()(torch.randn(5, 1, 4, 4, generator=generator))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_average_of_one_weight_is_the_one_computed_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    ema = Ema(layer, Config(decay=0.75, warmup=False))
    for value in (2.0, 4.0):
        nn.init.constant_(layer.weight, value)
        ema.update(layer)
    assert float(ema.model.weight.detach()) == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4)
    assert float(layer.weight.detach()) == 4.0


def test_averages_are_those_of_torchs_averaged_model() -> None:
    model = network()
    ema = Ema(model, Config(decay=0.9, warmup=False))
    averaging = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    theirs = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
    theirs.update_parameters(model)  # its first update only copies
    for seed in range(4):
        train(model, seed)
        ema.update(model)
        theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ema.model.state_dict()[name], value)


def test_running_statistics_are_averaged_and_counters_copied() -> None:
    model = network()
    ema = Ema(model, Config(decay=0.5, warmup=False))
    before = model.state_dict()["1.running_mean"].clone()
    train(model, 0)
    ema.update(model)
    after, mine = model.state_dict(), ema.model.state_dict()
    torch.testing.assert_close(mine["1.running_mean"], (before + after["1.running_mean"]) / 2)
    assert mine["1.num_batches_tracked"] == after["1.num_batches_tracked"] == 1


def test_decay_grows_from_small_values_to_the_configured_one() -> None:
    found = [decay(Config(decay=0.99), number) for number in (1, 2, 90, 890, 10_000)]
    assert found == pytest.approx([2 / 11, 3 / 12, 91 / 100, 0.99, 0.99])


def test_state_goes_on_exactly() -> None:
    model = network()
    ema = Ema(model, Config(decay=0.99))
    for seed in range(3):
        train(model, seed)
        ema.update(model)
    stored = copy.deepcopy(ema.state_dict())
    resumed = Ema(network(), Config(decay=0.99))
    resumed.load_state_dict(stored)
    train(model, 3)
    for one in (ema, resumed):
        one.update(model)
    assert ema.num_updates == resumed.num_updates == 4
    for name, value in ema.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_averaged_model_is_ready_to_be_measured_and_takes_no_gradient() -> None:
    ema = Ema(network().train(), Config())
    assert not any(part.training for part in ema.model.modules())
    assert not ema.model(torch.randn(1, 1, 4, 4)).requires_grad
