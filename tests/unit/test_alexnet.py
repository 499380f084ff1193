"""AlexNet: torchvision's weights in one tower, the net of 2012 in two, and the normalisation by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.models import alexnet
from pipeline.models._layers import ResponseNorm, WithinMapNorm


def config(**keys: Any) -> alexnet.Config:
    return parse(alexnet.Config, keys, "here")


def network(**keys: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.build_classifier(config(**{"fc_features": 16, "num_classes": 4, **keys})).network


def sized(side: int) -> dict[str, Any]:
    return {"size_hw": [side, side]}


def kinds(part: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in part.children()]


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


def test_torchvision_weights_load_and_give_torchvision_outputs() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet().eval()
    ours = models.build_classifier(config()).eval()
    ours.network.load_state_dict(theirs.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(ours.network(normalised), theirs(normalised))
        torch.testing.assert_close(ours(Batch(pixels)), theirs(normalised), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [{"norm": "lrn"}, {"activation": "tanh", "pooling": "average", "overlapping": False}])
def test_names_of_weights_stay_torchvisions_whatever_surrounds_them(keys: dict[str, Any]) -> None:
    assert list(network(**keys).state_dict()) == list(network().state_dict())


def test_sizes_of_two_towers_at_224_are_the_papers() -> None:
    with torch.device("meta"):
        features = network(variant="two_towers").get_submodule("features")
        x, shapes = torch.zeros(1, 3, 224, 224), []
        for layer in features.children():
            x = layer(x)
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                shapes.append((x.shape[1], x.shape[2]))
    assert shapes == [(96, 55), (96, 27), (256, 27), (256, 13), (384, 13), (384, 13), (256, 13), (256, 6)]


def test_two_towers_at_224_equal_zeros_to_the_right_and_below() -> None:
    net = network(variant="two_towers").eval()
    wider = network(variant="two_towers", input=sized(227)).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.manual_seed(1))
    torch.testing.assert_close(net(x), wider(F.pad(x, (0, 3, 0, 3))))


def test_order_of_two_towers_is_the_original_codes() -> None:
    features = network(variant="two_towers").get_submodule("features")
    assert kinds(features) == [
        *("ZeroPad2d", "Conv2d", "ResponseNorm", "MaxPool2d", "ReLU"),
        *("Conv2d", "ReLU", "ResponseNorm", "WithinMapNorm", "MaxPool2d"),
        *("Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", "MaxPool2d", "ReLU"),
    ]
    assert [layer.groups for layer in convolutions(features)] == [1, 2, 1, 2, 2]
    assert all(
        (pool.kernel_size, pool.stride) == (3, 2) for pool in features.modules() if isinstance(pool, nn.MaxPool2d)
    )


def test_dropout_comes_before_the_full_layers_in_one_tower_and_behind_them_in_two() -> None:
    one, two = (kinds(network(variant=variant).get_submodule("classifier")) for variant in ("one_tower", "two_towers"))
    assert one == ["Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert two == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]


def response_norm_by_hand(x: Tensor, first: int, last: int) -> Tensor:
    """`a / (2 + 1e-4/5 sum a^2) ^ 0.75` for the maps first..last-1 of one tower, map by map."""
    result = torch.empty_like(x[:, first:last])
    for index in range(first, last):
        neighbours = x[:, max(first, index - 2) : min(last, index + 3)].double()
        divisor = (2 + 1e-4 / 5 * neighbours.square().sum(dim=1)) ** 0.75
        result[:, index - first] = (x[:, index].double() / divisor).float()
    return result


def test_response_norm_is_the_formula_clipped_at_the_edges_of_each_tower() -> None:
    x = torch.randn(2, 12, 3, 4, generator=torch.manual_seed(0)) * 200
    expected = torch.cat([response_norm_by_hand(x, 0, 6), response_norm_by_hand(x, 6, 12)], dim=1)
    torch.testing.assert_close(ResponseNorm(num_towers=2)(x), expected)
    torch.testing.assert_close(ResponseNorm()(x), nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)(x))


def test_response_norm_keeps_towers_strangers() -> None:
    x = torch.randn(1, 12, 2, 2, generator=torch.manual_seed(0)) * 200
    changed = x.clone()
    changed[:, 6:] *= 3
    norm = ResponseNorm(num_towers=2)
    assert torch.equal(norm(x)[:, :6], norm(changed)[:, :6])
    assert not torch.equal(ResponseNorm()(x)[:, :6], ResponseNorm()(changed)[:, :6])


@pytest.mark.parametrize("norm", [ResponseNorm(), WithinMapNorm()])
def test_norms_sum_squares_beyond_fp16_without_overflow(norm: nn.Module) -> None:
    x = torch.full((1, 8, 6, 6), 3000.0)
    half = norm(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), norm(x), rtol=1e-3, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x), norm(x.double()).float())


def test_within_map_norm_sums_the_25_neighbours_that_exist() -> None:
    x = torch.arange(36.0).view(1, 1, 6, 6) * 10
    corner, middle = WithinMapNorm()(x)[0, 0, 1, 0].item(), WithinMapNorm()(x)[0, 0, 2, 3].item()
    assert corner == pytest.approx(60 / (1 + 1e-3 / 25 * x[0, 0, :4, :3].square().sum().item()) ** 0.75)
    assert middle == pytest.approx(150 / (1 + 1e-3 / 25 * x[0, 0, :5, 1:6].square().sum().item()) ** 0.75)


def test_paper_init_is_the_original_codes() -> None:
    net = network(variant="two_towers", fc_features=64, num_classes=100)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    stds = [layer.weight.std().item() for layer in layers]
    assert stds == pytest.approx([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], rel=0.05)
    biases = [sorted(set(layer.bias.tolist())) for layer in layers if layer.bias is not None]
    assert biases == [[0.0], [1.0], [0.0], [1.0], [1.0], [1.0], [1.0], [0.0]]


def test_kaiming_init_starts_near_the_loss_of_guessing() -> None:
    torch.manual_seed(0)
    net = network(init="kaiming", fc_features=256)
    for layer in convolutions(net):
        fan_out = layer.weight[:, 0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert layer.bias is not None
        assert not layer.bias.any()
    logits = net(torch.randn(4, 3, 224, 224))
    loss = nn.functional.cross_entropy(logits, torch.arange(4)).item()
    assert loss == pytest.approx(math.log(logits.shape[1]), rel=0.1)


@pytest.mark.parametrize("variant", ["one_tower", "two_towers"])
def test_batch_norm_follows_every_convolution_which_has_no_bias(variant: str) -> None:
    features = network(variant=variant, norm="batch").get_submodule("features")
    order = kinds(features)
    assert all(order[index + 1] == "BatchNorm2d" for index, kind in enumerate(order) if kind == "Conv2d")
    assert order.count("BatchNorm2d") == 5
    assert all(layer.bias is None for layer in convolutions(features))
    assert "ResponseNorm" not in order
    assert "WithinMapNorm" not in order


def test_defaults_of_the_variant_fill_only_what_was_left_out() -> None:
    two = config(variant="two_towers")
    assert (two.norm, two.within_map_norm, two.init, two.input) == ("lrn", True, "paper", alexnet.INPUT_2012)
    plain = config(variant="two_towers", norm="none", init="kaiming", input=sized(224))
    assert (plain.norm, plain.within_map_norm, plain.init) == ("none", False, "kaiming")
    assert plain.input.std == (0.229, 0.224, 0.225)
    one = config()
    assert (one.norm, one.within_map_norm, one.init, one.input.resize_short) == ("none", False, "torch", 256)


@pytest.mark.parametrize("overlapping", [True, False])
@pytest.mark.parametrize(("variant", "side"), [("one_tower", (63, 35)), ("two_towers", (64, 36))])
def test_smallest_input_works_and_one_pixel_less_is_refused(
    variant: str, side: tuple[int, int], overlapping: bool
) -> None:
    smallest = side[0] if overlapping else side[1]
    net = network(variant=variant, overlapping=overlapping, input=sized(smallest)).eval()
    assert net(torch.zeros(1, 3, smallest, smallest)).shape == (1, 4)
    with pytest.raises(ConfigError, match=f"at least {smallest}x{smallest}, got input.size_hw"):
        config(variant=variant, overlapping=overlapping, input=sized(smallest - 1))


def test_other_sizes_and_grey_images_need_no_other_weights() -> None:
    net = network(input={"size_hw": [100, 160]}).eval()
    assert net(torch.zeros(1, 3, 100, 160)).shape == (1, 4)
    net.load_state_dict(network().state_dict())
    grey = network(input={"size_hw": [64, 64], "mean": [0.5], "std": [0.5]})
    assert convolutions(grey)[0].in_channels == 1


@pytest.mark.parametrize("keys", [{"dropout": 1.0}, {"fc_features": 0}, {"norm": "layer"}, {"activation": "gelu"}])
def test_impossible_values_are_refused_with_their_key(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        config(**keys)
