"""The learning rate by hand, and which parameters decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.training.optim import Config, build_optimizer, learning_rate


def rates(epochs: int, steps_per_epoch: int, **keys: Any) -> list[float]:
    config = parse(Config, keys, "here")
    return [learning_rate(config, step, steps_per_epoch, epochs) for step in range(epochs * steps_per_epoch)]


def test_constant_stays() -> None:
    assert rates(2, 3, lr=0.5, schedule="constant") == [0.5] * 6


def test_step_falls_at_each_share_of_the_run() -> None:
    found = rates(3, 2, lr=1.0, schedule="step", step_factor=0.5)  # the default: at 1/3 and at 2/3
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])
    assert rates(5, 2, lr=1.0, schedule="step", step_at=[0.7]) == pytest.approx([1] * 7 + [0.1] * 3)


def test_cosine_falls_from_lr_towards_0() -> None:
    assert rates(2, 2, lr=2.0, schedule="cosine") == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])


def test_warmup_rises_linearly_and_then_the_schedule_begins_at_lr() -> None:
    found = rates(3, 2, lr=1.0, schedule="cosine", warmup_epochs=1.5)  # 3 of 6 steps
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 0.75, 0.25])
    assert rates(1, 4, lr=1.0, schedule="constant", warmup_epochs=0.25) == pytest.approx([0.5, 1, 1, 1])


def test_warmup_longer_than_the_run_only_rises() -> None:
    found = rates(1, 3, lr=1.0, warmup_epochs=5)
    assert found == pytest.approx([1 / 16, 2 / 16, 3 / 16])


def test_weight_decay_spares_biases_and_scales_of_normalisation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(model, Config(lr=1.0, weight_decay=0.1, momentum=0.0))
    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 0.9 if name in {"0.weight", "3.weight"} else 1.0
        torch.testing.assert_close(value, before[name] * factor)


def test_momentum_and_nesterov_reach_the_optimiser() -> None:
    steps = {}
    for nesterov in (False, True):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = build_optimizer(layer, Config(lr=1.0, momentum=0.5, nesterov=nesterov, weight_decay=0.0))
        for _ in range(2):
            layer.weight.grad = torch.ones(1, 1)
            optimizer.step()
        steps[nesterov] = -float(layer.weight.detach())
    assert steps == {False: 1 + 1.5, True: 1.5 + 1.75}


@pytest.mark.parametrize("keys", [{"lr": 0}, {"momentum": 1}, {"weight_decay": -1}, {"clip_norm": 0}])
def test_impossible_values_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        parse(Config, keys, "here")
