"""What every model promises: for every file in `pipeline/models` and each of its variants, present and future.

`SMALL` makes expensive models quick and `MORE` adds configurations worth their own pass; a model in neither is tested
as it stands.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch.nn import functional as F

from pipeline import config as configuration
from pipeline import models
from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.errors import ModelError
from pipeline.models import AnyModel
from pipeline.models._contract import Classifier, ClassifierConfig

SMALL: dict[str, dict[str, Any]] = {
    "alexnet": {"fc_features": 32, "num_classes": 10, "dropout": 0.0},
    "resnet": {"depth": 18, "num_classes": 10},
    "squeezenet": {"num_classes": 10, "dropout": 0.0},
    "vgg": {"depth": 11, "fc_features": 256, "num_classes": 10, "dropout": 0.0},
    "zfnet": {"fc_features": 256, "num_classes": 10, "dropout": 0.0},
}
SMALL_SIDE = {"alexnet": 67, "resnet": 64, "squeezenet": 64, "vgg": 32, "zfnet": 64}
MORE: list[tuple[str, dict[str, Any]]] = [
    ("alexnet", {"norm": "batch", "pooling": "average"}),
    ("alexnet", {"variant": "two_towers", "activation": "tanh", "overlapping": False, "init": "torch"}),
    ("lenet1", {"activation": "sigmoid"}),
    ("lenet5", {"activation": "tanh", "pooling": "average"}),
    ("squeezenet", {"final_relu": False}),
    ("vgg", {"batch_norm": True}),
    ("zfnet", {"norm": "batch"}),
]


CLASSIFIERS = [name for name in models.names() if models.config_of(name).task == "classification"]


class Holder(Strict):
    model: AnyModel


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every model, once per value of its key `variant` where it has one."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in CLASSIFIERS:
        field = models.config_of(name).model_fields.get("variant")
        values = get_args(field.annotation) if field else ()
        found += [(name, {"variant": value}) for value in values] or [(name, {})]
    return found


def small(name: str, keys: dict[str, Any]) -> ClassifierConfig:
    raw = {**SMALL.get(name, {}), **keys}
    config = configuration.parse(models.config_of(name), raw, name)
    assert isinstance(config, ClassifierConfig)
    if name not in SMALL_SIDE:
        return config
    spec = dataclasses.replace(config.input, size_hw=(SMALL_SIDE[name],) * 2, resize_short=None)
    smaller = configuration.parse(models.config_of(name), {**raw, "input": dataclasses.asdict(spec)}, name)
    assert isinstance(smaller, ClassifierConfig)
    return smaller


def label(case: Any) -> str | None:
    if isinstance(case, str):
        return case
    return ",".join(map(str, case.values())) or "default" if isinstance(case, dict) else None


every_variant = pytest.mark.parametrize(("name", "keys"), variants(), ids=label)
every_case = pytest.mark.parametrize(("name", "keys"), variants() + MORE, ids=label)


def build(name: str, keys: dict[str, Any], seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return models.build_classifier(small(name, keys))


def images(model: Classifier, count: int) -> torch.Tensor:
    """Images uint8 that a network can tell apart: noise, bright all over or in the top quarter only, by turns."""
    height, width = model.spec.size_hw
    noise = torch.randint(0, 60, (count, model.spec.num_channels, height, width), generator=torch.manual_seed(7))
    for index in range(count):
        noise[index, :, : height if index % 2 else height // 4] += 190
    return noise.to(torch.uint8)


def backward(model: Classifier, pixels: torch.Tensor, targets: torch.Tensor) -> None:
    torch.autograd.backward([*model.loss(model(Batch(pixels)), targets).values()])


@pytest.mark.parametrize("name", models.names())
def test_config_of_every_file_names_that_file_and_no_other(name: str) -> None:
    schema = models.config_of(name)
    assert schema.model_validate({}).model_dump()["name"] == name
    assert Path(str(importlib.import_module(schema.__module__).__file__)).stem == name
    with pytest.raises(ValidationError, match="name"):
        schema.model_validate({"name": "another"})


@every_variant
def test_parameter_count_at_full_size_is_the_one_its_docstring_prints(name: str, keys: dict[str, Any]) -> None:
    config = configuration.parse(models.config_of(name), keys, name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in models.build_classifier(config).parameters())
    assert f"{count:,}" in str(importlib.import_module(type(config).__module__).__doc__)


@every_case
@pytest.mark.parametrize("count", [1, 3])
def test_outputs_of_any_batch_have_one_column_per_class(name: str, keys: dict[str, Any], count: int) -> None:
    model = build(name, keys).eval()
    outputs = model(Batch(images(model, count)))
    assert outputs.shape == (count, small(name, keys).num_classes)
    assert outputs.isfinite().all()


@every_case
def test_outputs_of_uint8_and_float_pixels_are_equal(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    pixels = images(model, 2)
    assert torch.equal(model(Batch(pixels)), model(Batch(pixels.float())))


@every_case
def test_outputs_of_an_image_do_not_depend_on_its_neighbours(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    pixels = images(model, 3)
    torch.testing.assert_close(model(Batch(pixels))[1:2], model(Batch(pixels[1:2])), rtol=1e-4, atol=1e-5)


@every_case
def test_loss_is_finite_named_scalars_and_takes_soft_targets(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    outputs, targets = model(Batch(images(model, 2))), torch.tensor([1, 0])
    hard = model.loss(outputs, targets)
    soft = model.loss(outputs, F.one_hot(targets, outputs.shape[1]).float())
    assert hard
    assert all(value.shape == () and value.isfinite() for value in hard.values())
    torch.testing.assert_close(hard, soft)


@every_case
def test_loss_is_linear_in_soft_targets_so_that_class_weights_weigh_it(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    outputs = model(Batch(images(model, 2)))
    one, other = (torch.rand(outputs.shape, generator=torch.manual_seed(seed)) for seed in (1, 2))
    parts = [sum(model.loss(outputs, targets).values()) for targets in (one, other, 2 * one + 3 * other)]
    torch.testing.assert_close(parts[2], 2 * parts[0] + 3 * parts[1])


@every_case
def test_gradient_reaches_every_parameter(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).train()
    backward(model, images(model, 4), torch.tensor([0, 1, 1, 0]))
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@every_case
def test_gradient_reaches_the_pixels_of_float_images(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    pixels = images(model, 2).float().requires_grad_()
    backward(model, pixels, torch.tensor([0, 1]))
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()
    assert pixels.grad.flatten(1).any(dim=1).all()


@every_variant
def test_two_images_are_learnt_by_heart_with_plain_sgd(name: str, keys: dict[str, Any]) -> None:
    assert any(learns_by_heart(build(name, keys), rate) for rate in (0.01, 0.003, 0.001))


def learns_by_heart(model: Classifier, rate: float, steps: int = 150) -> bool:
    batch, targets = Batch(images(model, 2)), torch.tensor([1, 0])
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        outputs = model(batch)
        if (model.scores(outputs.detach())[[0, 1], targets] > 0.9).all():
            return True
        optimiser.zero_grad()
        torch.autograd.backward([*model.loss(outputs, targets).values()])
        optimiser.step()
    return False


@every_case
def test_same_seed_gives_same_weights_and_another_seed_others(name: str, keys: dict[str, Any]) -> None:
    first, same, other = (build(name, keys, seed).eval() for seed in (0, 0, 1))
    weights = same.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in first.state_dict().items())
    batch = Batch(images(first, 1))
    assert torch.equal(first(batch), same(batch))
    assert not torch.equal(first(batch), other(batch))


@every_case
def test_state_dict_survives_safetensors_and_restores_the_outputs(name: str, keys: dict[str, Any]) -> None:
    first, other = build(name, keys).eval(), build(name, keys, seed=1).eval()
    batch = Batch(images(first, 2))
    other.load_state_dict(load(save(first.state_dict())))
    assert torch.equal(first(batch), other(batch))


@every_case
def test_postprocess_ranks_every_class_with_scores_that_sum_to_one(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    outputs = model(Batch(images(model, 3)))  # with a gradient, as in a training loop
    answers = model.postprocess(outputs, ())
    assert len(answers) == 3
    for row, answer in zip(outputs, answers, strict=True):
        assert sorted(answer.labels) == list(range(outputs.shape[1]))
        assert answer.labels[0] == row.argmax()
        assert (answer.scores[:-1] >= answer.scores[1:]).all()
        assert answer.scores.sum() == pytest.approx(1, abs=1e-5)


@every_case
def test_exported_network_gives_the_same_outputs_for_any_batch(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    pixels = model.normalize(images(model, 3))
    exported = torch.export.export(model.network, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for count in (1, 3):
        expected = model.network(pixels[:count])
        torch.testing.assert_close(exported.module()(pixels[:count]), expected, rtol=1e-4, atol=1e-5)


@every_variant
@pytest.mark.parametrize("wrong", [(0, 1, 0), (0, 0, -1), (1, 0, 0)], ids=["height", "width", "channels"])
def test_images_of_another_shape_raise_an_error_that_names_both(
    name: str, keys: dict[str, Any], wrong: tuple[int, int, int]
) -> None:
    model = build(name, keys)
    expected = (model.spec.num_channels, *model.spec.size_hw)
    shape = [2, *(side + more for side, more in zip(expected, wrong, strict=True))]
    with pytest.raises(ModelError) as caught:
        model(Batch(torch.zeros(shape, dtype=torch.uint8)))
    assert str(list(shape)) in str(caught.value)
    assert str(expected[1]) in str(caught.value)


@every_case
def test_resolved_config_reads_back_as_itself(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    holder = Holder(model=small(name, keys))
    file = tmp_path / "model.yaml"
    file.write_text(configuration.dump(holder))
    assert configuration.load(Holder, file) == holder
