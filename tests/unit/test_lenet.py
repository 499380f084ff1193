"""LeNet-1 and LeNet-5 against the figures and formulas of their papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.errors import ConfigError, ModelError
from pipeline.models import lenet1, lenet5
from pipeline.models._contract import Classifier
from pipeline.models._layers import PartialConv2d, ScaledTanh, Subsampling


def build(name: str, **keys: Any) -> Classifier:
    torch.manual_seed(0)
    return models.build_classifier(parse(models.config_of(name), keys, name))


def layer_of(model: Classifier, name: str) -> nn.Module:
    return model.network.get_submodule(name)


def num_parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def test_c3_table_has_the_sixty_connections_of_table_1() -> None:
    table = lenet5.C3_TABLE
    assert [len(columns) for columns in table] == [3] * 6 + [4] * 9 + [6]
    assert [sum(s2 in columns for columns in table) for s2 in range(6)] == [10] * 6
    assert len(set(table)) == 16
    # II.B: six contiguous triples, six contiguous quadruples, three discontinuous ones, all; contiguous around the end.
    contiguous = [
        any(set(columns) == {(start + k) % 6 for k in range(len(columns))} for start in range(6)) for columns in table
    ]
    assert contiguous == [True] * 12 + [False] * 3 + [True]


def test_lenet5_of_1998_has_the_papers_parameters_layer_by_layer() -> None:
    model = build("lenet5", variant="1998")
    counts = [num_parameters(layer_of(model, layer)) for layer in ("c1", "s2", "c3", "s4", "c5", "f6", "output")]
    assert counts == [156, 12, 1516, 32, 48120, 10164, 0]
    assert sum(counts) == num_parameters(model) == 60_000


def test_lenet1_of_1990_has_the_papers_parameters_and_connections() -> None:
    model = build("lenet1", variant="1990")
    table = lenet1.H3_TABLE
    assert [len(columns) for columns in table] == [1, 2, 2, 1, 2, 2] * 2
    assert [sum(h2 in columns for columns in table) for h2 in range(4)] == [5] * 4
    connections, values = 0, model.normalize(torch.zeros(1, 3, 28, 28))
    for layer in model.network.children():
        values = layer(values)
        if isinstance(layer, Subsampling):
            connections += values.numel() * (4 + 1)
        elif list(layer.parameters()):
            connections += num_parameters(layer) * values[0, 0].numel()
    assert (num_parameters(model), connections) == (2_578, 98_442)


@pytest.mark.parametrize(("name", "count"), [("lenet1", 3_246), ("lenet5", 61_706)])
def test_modern_variants_are_the_dense_nets(name: str, count: int) -> None:
    assert num_parameters(build(name)) == count


def test_partial_convolution_sums_only_the_connected_maps() -> None:
    torch.manual_seed(0)
    layer = PartialConv2d(((0,), (0, 2)), num_inputs=3, size=2)
    x = torch.rand(2, 3, 4, 4)
    kernels = layer.weight.view(3, 1, 1, 2, 2)
    first = F.conv2d(x[:, 0:1], kernels[0]) + layer.bias[0]
    second = F.conv2d(x[:, 0:1], kernels[1]) + F.conv2d(x[:, 2:3], kernels[2]) + layer.bias[1]
    torch.testing.assert_close(layer(x), torch.cat([first, second], dim=1))
    assert not layer.dense_weight()[0, 1:].any()
    assert not layer.dense_weight()[1, 1].any()


def test_subsampling_adds_four_pixels_then_scales_and_shifts() -> None:
    layer = Subsampling(2)
    with torch.no_grad():
        layer.coefficient.copy_(torch.tensor([0.5, -1.0]).view(2, 1, 1))
        layer.bias.copy_(torch.tensor([0.25, 3.0]).view(2, 1, 1))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 2, 2, 2)
    assert layer(x).flatten().tolist() == [5.25, -7.0]


def test_scaled_tanh_maps_plus_and_minus_one_to_themselves() -> None:
    values = ScaledTanh()(torch.tensor([-1e3, -1.0, 0.0, 1.0, 1e3])).tolist()
    assert values == pytest.approx([-1.7159, -1, 0, 1, 1.7159], abs=1e-4)


def test_input_of_1998_is_minus_a_tenth_for_background_frame_included_and_1_175_for_ink() -> None:
    model = build("lenet5", variant="1998")
    pixels = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    pixels[..., 10, 10] = 255
    framed = layer_of(model, "frame")(model.normalize(pixels))
    assert framed.shape == (1, 1, 32, 32)
    assert framed[0, 0, 12, 12].item() == pytest.approx(1.175, abs=1e-6)
    framed[0, 0, 12, 12] = -0.1
    torch.testing.assert_close(framed, torch.full_like(framed, -0.1))


def test_frame_of_the_modern_net_is_background_after_normalisation() -> None:
    model = build("lenet5")
    framed = layer_of(model, "frame")(model.normalize(torch.zeros(1, 3, 28, 28, dtype=torch.uint8)))
    torch.testing.assert_close(framed, torch.full((1, 1, 32, 32), -0.1307 / 0.3081))


def test_images_of_32_pixels_get_no_frame() -> None:
    spec = {"size_hw": [32, 32], "mean": [0.5], "std": [0.5]}
    model = build("lenet5", input=spec)
    assert layer_of(model, "frame")(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)
    assert model(Batch(torch.zeros(1, 3, 32, 32))).shape == (1, 10)


def test_weights_of_1998_start_within_2_4_over_the_fan_in_and_fill_it() -> None:
    model = build("lenet5", variant="1998")
    for name, fan_in in [("c1", 25), ("s2", 4), ("c5", 400), ("f6", 120)]:
        largest = max(parameter.abs().max().item() for parameter in layer_of(model, name).parameters())
        assert 0.5 * 2.4 / fan_in < largest <= 2.4 / fan_in, name
    dense = layer_of(model, "c3").dense_weight()  # type: ignore[operator]
    for kernels, inputs in zip(dense, lenet5.C3_TABLE, strict=True):
        assert 0.8 * 2.4 < kernels.abs().max().item() * 25 * len(inputs) <= 2.4 + 1e-5


def test_bitmaps_are_ten_distinct_codes_of_84_signs() -> None:
    codes = lenet5.bitmap_codes()
    assert codes.shape == (10, 84)
    assert codes.abs().eq(1).all()
    differing = (codes[:, None] != codes[None]).sum(dim=2) + 84 * torch.eye(10, dtype=torch.int64)
    assert differing.min() >= 5  # an error-correcting code, section II.B
    assert codes[1].view(12, 7)[9].tolist() == [-1, -1, -1, 1, -1, -1, -1]  # row 9 of the digit 1 is its stem


def test_radial_output_is_minus_the_squared_distance_to_each_code() -> None:
    codes = lenet5.bitmap_codes()
    outputs = lenet5.RadialOutput()(codes[3:4])[0]
    expected = [-4 * int((codes[3] != code).sum()) for code in codes]
    assert outputs.tolist() == expected
    assert outputs[3] == 0


def test_loss_of_1998_is_equation_9() -> None:
    model = build("lenet5", variant="1998", rubbish_penalty=0.5)
    penalties = [[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10], [3.0, 0.5, 2, 2, 2, 2, 2, 2, 2, 2]]
    expected = [
        row[label] + math.log(math.exp(-0.5) + sum(math.exp(-penalty) for penalty in row))
        for row, label in zip(penalties, (2, 1), strict=True)
    ]
    loss = model.loss(-torch.tensor(penalties), torch.tensor([2, 1]))
    assert loss["map"].item() == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_loss_of_1998_stays_finite_for_penalties_beyond_the_range_of_exp() -> None:
    model = build("lenet5", variant="1998")
    loss = model.loss(torch.full((1, 10), -1e4), torch.tensor([0]))["map"]
    assert loss.item() == pytest.approx(1e4 - 0.1)


def test_scores_of_1998_are_the_posterior_of_the_loss_without_rubbish() -> None:
    model = build("lenet5", variant="1998")
    penalties = torch.arange(10.0)
    weights = [math.exp(-penalty) for penalty in range(10)]
    assert model.scores(-penalties[None])[0].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("lenet5", {"variant": "1998", "num_classes": 26}, "10 digits only, got num_classes 26"),
        ("lenet5", {"variant": "1998", "activation": "relu"}, "variant 'modern'"),
        ("lenet1", {"variant": "1990", "pooling": "max"}, "variant 'modern'"),
        ("lenet5", {"input": {"size_hw": [30, 28], "mean": [0.5], "std": [0.5]}}, "28x28 or 32x32"),
        ("lenet1", {"input": {"size_hw": [32, 32], "mean": [0.5], "std": [0.5]}}, "28x28"),
        ("lenet5", {"input": {"size_hw": [28, 28]}}, "3 input.mean values"),
        ("lenet5", {"rubbish_penalty": 0}, "rubbish_penalty"),
    ],
)
def test_impossible_config_is_refused_with_its_reason(name: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(models.config_of(name), keys, "here")


def test_classes_of_the_shards_that_have_no_bitmaps_are_refused_when_built() -> None:
    config = lenet5.Config(variant="1998").model_copy(update={"num_classes": 11})
    with pytest.raises(ModelError, match="got num_classes 11"):
        models.build_classifier(config)


@pytest.mark.parametrize("name", ["lenet1", "lenet5"])
def test_activation_and_pooling_of_the_config_are_those_of_the_network(name: str) -> None:
    kinds = {type(layer) for layer in build(name, activation="sigmoid", pooling="average").network.modules()}
    assert {nn.Sigmoid, nn.AvgPool2d} <= kinds
    assert not {nn.ReLU, nn.Tanh, nn.MaxPool2d} & kinds
