"""The learning rate by hand and against torch's own schedulers, and which parameters are treated how."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pipeline import models
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.training.optim import Config, blocks, build_optimizer, learning_rate, scaled, set_learning_rate


def config(**keys: Any) -> Config:
    return parse(Config, keys, "here")


def rates(epochs: int, steps_per_epoch: int, **keys: Any) -> list[float]:
    return [learning_rate(config(**keys), step, steps_per_epoch, epochs) for step in range(epochs * steps_per_epoch)]


def test_constant_stays() -> None:
    assert rates(2, 3, lr=0.5, schedule="constant") == [0.5] * 6


def test_step_falls_at_each_share_of_the_run() -> None:
    found = rates(3, 2, lr=1.0, schedule="step", step_factor=0.5)  # the default: at 1/3 and at 2/3
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])
    assert rates(5, 2, lr=1.0, schedule="step", step_at=[0.7]) == pytest.approx([1] * 7 + [0.1] * 3)


def test_plateau_falls_once_for_each_drop() -> None:
    found = [learning_rate(config(lr=2.0, schedule="plateau"), 5, 10, 1, drops) for drops in (0, 1, 3)]
    assert found == pytest.approx([2, 0.2, 0.002])


def test_cosine_falls_from_lr_towards_its_final_share() -> None:
    assert rates(2, 2, lr=2.0, schedule="cosine") == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    assert learning_rate(config(lr=2.0, final=0.25), 4, 2, 2) == pytest.approx(0.5)


def of_torch(make: Any, steps: int) -> list[float]:
    """What one of torch's schedulers does to a rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("keys", "theirs"),
    [
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, 40)),
        ({"schedule": "cosine", "final": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1)),
        ({"schedule": "polynomial"}, lambda o: lr_scheduler.PolynomialLR(o, 40)),
        ({"schedule": "polynomial", "power": 2}, lambda o: lr_scheduler.PolynomialLR(o, 40, power=2)),
        ({"schedule": "exponential", "final": 0.01}, lambda o: lr_scheduler.ExponentialLR(o, 0.01 ** (1 / 40))),
        ({"schedule": "step", "step_at": [0.5]}, lambda o: lr_scheduler.StepLR(o, 20)),
        (
            {"schedule": "constant", "warmup_epochs": 3, "warmup_from": 0.25},
            lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=24),
        ),
    ],
)
def test_schedule_equals_torchs_own(keys: dict[str, Any], theirs: Any) -> None:
    assert rates(5, 8, lr=1.0, **keys) == pytest.approx(of_torch(theirs, 40), abs=1e-9)


def test_warmup_rises_linearly_and_then_the_schedule_begins_at_lr() -> None:
    found = rates(3, 2, lr=1.0, schedule="cosine", warmup_epochs=1.5, warmup_from=0.1)  # 3 of 6 steps
    assert found == pytest.approx([0.1, 0.4, 0.7, 1, 0.75, 0.25])
    assert rates(1, 4, lr=2.0, schedule="constant", warmup_epochs=0.25, warmup_from=0) == pytest.approx([0, 2, 2, 2])


def test_warmup_longer_than_the_run_only_rises() -> None:
    found = rates(1, 3, lr=1.0, warmup_epochs=5)
    assert all(0 < earlier < later < 0.2 for earlier, later in pairwise(found))


@given(
    schedule=st.sampled_from(["constant", "step", "cosine", "polynomial", "exponential"]),
    step=st.integers(0, 99),
    batch=st.integers(1, 2048),
    warmup=st.floats(0, 6),
)
def test_rate_depends_on_the_share_of_the_run_and_not_on_its_unit(
    schedule: str, step: int, batch: int, warmup: float
) -> None:
    given_config = config(schedule=schedule, warmup_epochs=warmup, final=0.05)
    in_steps, in_draws = (learning_rate(given_config, step * unit, 20 * unit, 5) for unit in (1, batch))
    assert in_draws == pytest.approx(in_steps)
    assert 0 < in_steps <= given_config.lr


def test_rate_is_scaled_with_the_global_batch_only_where_it_has_a_reference() -> None:
    assert scaled(config(lr=0.1, reference_batch_size=256), 1024).lr == pytest.approx(0.4)
    assert scaled(config(lr=0.1, reference_batch_size=256), 32).lr == pytest.approx(0.0125)
    assert scaled(config(lr=0.1), 1024).lr == 0.1


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def changes(model: nn.Module, **keys: Any) -> dict[str, Tensor]:
    """What one step of rate 1 from gradients of 1 takes from each parameter."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, config(**{"momentum": 0.0, "weight_decay": 0.0} | keys))
    set_learning_rate(optimizer, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_spares_biases_and_scales_of_normalisation(optimizer: str) -> None:
    model, plain = small(), small()
    decayed = changes(model, optimizer=optimizer, weight_decay=0.1)
    without = changes(plain, optimizer=optimizer, weight_decay=0.0)
    weights = dict(small().named_parameters())
    for name, change in decayed.items():
        extra = 0.1 * weights[name].detach() if name in {"0.weight", "3.weight"} else torch.zeros_like(change)
        torch.testing.assert_close(change - without[name], extra)


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


@pytest.mark.parametrize("keys", [{"optimizer": "adamw", "betas": [0.8, 0.95]}, {"optimizer": "sgd"}])
def test_steps_are_those_of_torchs_plain_optimisers(keys: dict[str, Any]) -> None:
    mine, theirs = small().double(), small().double()
    optimizer = build_optimizer(mine, config(**keys, lr=0.01, weight_decay=0.1, bias_lr_factor=1.0))
    decay = [{"params": [v]} | ({} if v.ndim > 1 else {"weight_decay": 0.0}) for v in theirs.parameters()]
    reference: torch.optim.Optimizer = (
        torch.optim.AdamW(decay, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)
        if keys["optimizer"] == "adamw"
        else torch.optim.SGD(decay, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=False)
    )
    for step in range(5):
        for model, steps in ((mine, optimizer), (theirs, reference)):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            steps.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_biases_learn_at_their_factor() -> None:
    found = changes(small(), bias_lr_factor=2.0)
    assert {name: float(change.mean()) for name, change in found.items()} == pytest.approx(
        {"0.weight": 1, "0.bias": 2, "1.weight": 1, "1.bias": 2, "3.weight": 1, "3.bias": 2}, abs=1e-5
    )


def test_layer_decay_slows_each_block_by_its_distance_from_the_last() -> None:
    found = changes(small(), layer_decay=0.5)  # the normalisation belongs to the convolution before it
    assert {name: float(change.mean()) for name, change in found.items()} == pytest.approx(
        {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 0.5, "1.bias": 0.5, "3.weight": 1, "3.bias": 1}, abs=1e-5
    )


@pytest.mark.parametrize(
    ("name", "keys", "count", "ends"),
    [
        ("alexnet", {"norm": "batch"}, 8, ("network.features.0", "network.classifier.6")),
        ("resnet", {"depth": 18}, 10, ("network.conv1", "network.fc")),
        ("squeezenet", {}, 10, ("network.features.0", "network.classifier.1")),
        ("lenet5", {"variant": "1998"}, 6, ("network.c1", "network.f6")),
    ],
)
def test_blocks_are_the_parts_that_depth_is_counted_in(
    name: str, keys: dict[str, Any], count: int, ends: tuple[str, str]
) -> None:
    with torch.device("meta"):
        found = blocks(models.build_classifier(parse(models.config_of(name), keys, "here")))
    names = [name for name, _ in found]
    assert (len(names), (names[0], names[-1])) == (count, ends)


def test_frozen_parameters_are_none_of_the_optimisers_and_all_frozen_is_refused() -> None:
    model = small()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, config())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), config())


def test_state_goes_on_exactly_and_keeps_the_multiples_of_the_rate() -> None:
    model = small()
    optimizer = build_optimizer(model, config(bias_lr_factor=2.0))
    changes_of = [torch.randn(value.shape, generator=torch.manual_seed(1)) for value in model.parameters()]

    def step(net: nn.Module, steps: torch.optim.Optimizer, rate: float) -> None:
        set_learning_rate(steps, rate)
        for parameter, gradient in zip(net.parameters(), changes_of, strict=True):
            parameter.grad = gradient.clone()
        steps.step()

    step(model, optimizer, 0.1)
    resumed = copy.deepcopy(model)
    again = build_optimizer(resumed, config(bias_lr_factor=2.0))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both would move one momentum
    for net, steps in ((model, optimizer), (resumed, again)):
        step(net, steps, 0.05)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "keys",
    [
        *({"lr": 0}, {"momentum": 1}, {"weight_decay": -1}, {"clip_norm": 0}, {"final": 1.5}, {"layer_decay": 0}),
        {"schedule": "exponential"},
    ],
)
def test_impossible_values_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys)) if "schedule" not in keys else "never reaches 0"):
        config(**keys)
